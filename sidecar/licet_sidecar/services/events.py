"""What decisions and their events have in common."""

from __future__ import annotations

from licet.domain.outcomes import Effect
from licet.wire import usage
from licet_sidecar.core.decision import Decision


def flags_of(decision: Decision) -> int:
    """The flags of a decision's event."""
    return (
        (usage.FLAG_STALE if decision.stale else 0)
        | (usage.FLAG_DEGRADED if decision.degraded else 0)
        | (usage.FLAG_OVERAGE if decision.overage else 0)
        | (usage.FLAG_OBSERVED if decision.observed else 0)
    )


def spends_of(decision: Decision) -> list[tuple[str, int]]:
    """(quota, units) that a decision took; a denial takes only what observe mode lets through."""
    taken = (*decision.spends, *decision.counted) if decision.effect is Effect.APPROVED else decision.counted
    return [(lease.quota, units) for lease, units in taken if units]
