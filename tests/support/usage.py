"""Builders of usage events and batches, as a sidecar makes them."""

from __future__ import annotations

from typing import Any

from licet.domain.outcomes import Effect, Reason
from licet.wire.usage import LostRange, UsageBatch, UsageEvent, pack_event

AT_US = 1_790_000_000_000_000


def event(seq: int, **changes: Any) -> UsageEvent:
    """An approved event of one unit of ``reports`` for ``acme``, with the given fields changed."""
    plain = UsageEvent(
        seq=seq,
        at_us=AT_US + seq,
        tenant="acme",
        subject_type="user",
        subject_id="ada",
        on_behalf_of="",
        action="report.export",
        effect=Effect.APPROVED.value,
        reason=Reason.OK.value,
        rule="",
        revision=1,
        units={"reports": 1},
        cost_nanos=5,
        currency="USD",
        flags=0,
        idempotency_key=f"job-{seq}",
        resource_type="",
        resource_id="",
        context={"region": "eu"},
        spends=[("reports:monthly:1788220800", 1)],
        shadow=[],
        feature_costs={},
    )
    return plain._replace(**changes)


def packed(one: UsageEvent) -> bytes:
    """As the sidecar's log holds it."""
    return pack_event(one)


def batch(
    first: int,
    last: int,
    *,
    sidecar: str = "a" * 32,
    incarnation: int = 1,
    previous: tuple[int, int] = (0, 0),
    lost: tuple[LostRange, ...] = (),
    **changes: Any,
) -> UsageBatch:
    """Events ``first…last`` of one log, each with ``changes``, and what it declares lost."""
    return UsageBatch(
        sidecar=sidecar,
        incarnation=incarnation,
        previous_incarnation=previous[0],
        previous_last_seq=previous[1],
        decision_prefix=b"prefix00",
        first_seq=first,
        last_seq=last,
        events=tuple(packed(event(seq, **changes)) for seq in range(first, last + 1)),
        lost=lost,
    )
