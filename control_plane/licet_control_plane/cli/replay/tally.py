"""Counting answers: what was asked, what came back and how fast, for one sidecar and over all. Pure."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from licet.domain.outcomes import Effect

if TYPE_CHECKING:
    from licet.client.model import Decision

PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}
_LATENCY_US_MAX: Final = 2**32 - 1


def percentile(ordered: Sequence[int], percent: float) -> int:
    """The smallest value that at least ``percent`` of all values do not exceed (nearest rank); 0 when there are none.

    ``ordered`` ascends; ``0 < percent <= 100``.
    """
    if not ordered:
        return 0
    # Counted in thousandths of a percent, exactly: 99.9 as a float would round some ranks up by one.
    rank = -(-len(ordered) * round(percent * 1000) // 100_000)
    return ordered[max(rank, 1) - 1]


def latency_summary(latencies_us: Iterable[int]) -> dict[str, int]:
    """Percentiles and the maximum, in microseconds."""
    ordered = sorted(latencies_us)
    summary = {name: percentile(ordered, percent) for name, percent in PERCENTILES.items()}
    return {**summary, "max": ordered[-1] if ordered else 0}


@dataclass(slots=True)
class SidecarTally:
    """Answers of one sidecar. A latency is whole microseconds, four bytes: a million checks take 4 MB."""

    address: str
    latencies_us: array[int] = field(default_factory=lambda: array("I"))
    approved: int = 0
    units_approved: int = 0
    denied: Counter[str] = field(default_factory=Counter)
    pending: int = 0
    stale: int = 0
    degraded: int = 0
    cost_nanos: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def count(self, decision: Decision, units: int, latency_ns: int) -> None:
        """One answer to a check for ``units``."""
        self.latencies_us.append(min(latency_ns // 1_000, _LATENCY_US_MAX))
        if decision.effect is Effect.APPROVED:
            self.approved += 1
            self.units_approved += units
            if decision.cost is not None:
                self.cost_nanos[decision.cost.currency] += decision.cost.amount_nanos
        elif decision.effect is Effect.DENIED:
            self.denied[decision.reason.name] += 1
        else:
            self.pending += 1
        self.stale += decision.stale
        self.degraded += decision.degraded

    @property
    def answered(self) -> int:
        """Checks that got an answer."""
        return len(self.latencies_us)


@dataclass(frozen=True, slots=True)
class Answers:
    """The tallies of all sidecars, and their sums."""

    sidecars: Sequence[SidecarTally]

    @property
    def answered(self) -> int:
        """Checks that got an answer: what the ledger must hold."""
        return sum(tally.answered for tally in self.sidecars)

    @property
    def approved(self) -> int:
        """Checks that were approved."""
        return sum(tally.approved for tally in self.sidecars)

    @property
    def pending(self) -> int:
        """Checks that wait for a person."""
        return sum(tally.pending for tally in self.sidecars)

    @property
    def units_approved(self) -> int:
        """Units of the approved checks."""
        return sum(tally.units_approved for tally in self.sidecars)

    @property
    def errors(self) -> int:
        """Calls that failed; what became of their checks is not known."""
        return sum(tally.errors.total() for tally in self.sidecars)

    def denied(self) -> dict[str, int]:
        """Denials by reason, the most frequent first."""
        return _most_common(tally.denied for tally in self.sidecars)

    def errors_by_message(self) -> dict[str, int]:
        """Failed calls by their message, the most frequent first."""
        return _most_common(tally.errors for tally in self.sidecars)

    def as_json(self) -> dict[str, Any]:
        """The counts, with the names that scripts rely on."""
        return {
            "approved": self.approved,
            "denied": self.denied(),
            "pending": self.pending,
            "errors": self.errors,
            "units_approved": self.units_approved,
            "cost_nanos": _most_common(tally.cost_nanos for tally in self.sidecars),
            "stale": sum(tally.stale for tally in self.sidecars),
            "degraded": sum(tally.degraded for tally in self.sidecars),
            "latency_us": latency_summary(us for tally in self.sidecars for us in tally.latencies_us),
            "sidecars": [
                {
                    "address": tally.address,
                    "requests": tally.answered + tally.errors.total(),
                    "approved": tally.approved,
                    "errors": tally.errors.total(),
                    "latency_us": latency_summary(tally.latencies_us),
                }
                for tally in self.sidecars
            ],
        }


def _most_common(counters: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total.most_common())
