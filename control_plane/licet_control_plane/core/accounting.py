"""What one event means for the ledger: its row, its rollups, what it spent. Pure.

Each event is decoded once, here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from licet.domain.outcomes import Effect
from licet.wire.usage import FLAG_OBSERVED, EventKind, UsageBatch, UsageEvent, unpack_event

_HOUR_US = 3_600 * 1_000_000


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """A batch, and its events both as they were packed and as they read."""

    batch: UsageBatch
    events: list[UsageEvent]

    @classmethod
    def of(cls, data: bytes) -> DecodedBatch:
        """The batch of a stream entry.

        Raises:
            EnvelopeError: not a batch, or an event of it is damaged.
        """
        batch = UsageBatch.unpack(data)
        return cls(batch, [unpack_event(event) for event in batch.events])


class RollupKey(NamedTuple):
    """One row of the hourly rollups. ``hour`` is seconds since the Unix epoch."""

    hour: int
    tenant: str
    feature: str
    action: str
    effect: int
    reason: int
    currency: str


class RollupSums(NamedTuple):
    """See ``store.schema.rollups`` for what counts where."""

    decisions: int
    events: int
    units: int
    cost_nanos: int


@dataclass(slots=True)
class Account:
    """What the rows inserted in one transaction add to the rollups and to what registers spent."""

    _rollups: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)
    _spend: defaultdict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, sidecar: str, events: Iterable[UsageEvent]) -> None:
        """Count events of a log of ``sidecar``, which must be counted here only once."""
        rollups, spend = self._rollups, self._spend
        for event in events:
            if event.kind and not is_outcome(event):
                continue
            features = event.units
            hour = event.at_us // _HOUR_US * 3_600
            action = storable(event.action)
            bearer = next(iter(features)) if len(features) == 1 else ""
            named = features.items() if bearer in features else [("", 0), *features.items()]
            for feature, units in named:
                key = (hour, event.tenant, feature, action, event.effect, event.reason, event.currency)
                sums = rollups.get(key)
                if sums is None:
                    sums = rollups[key] = [0, 0, 0, 0]
                if feature == bearer:
                    sums[0] += 1
                    if not event.feature_costs:
                        sums[3] += event.cost_nanos
                sums[3] += event.feature_costs.get(feature, 0)
                if feature or not features:
                    sums[1] += 1
                sums[2] += units
            if event.spends and spends_count(event):
                for quota, units in event.spends:
                    spend[event.tenant, quota, sidecar] += units

    @property
    def rollups(self) -> dict[RollupKey, RollupSums]:
        """What to add to each row."""
        return {RollupKey(*key): RollupSums(*sums) for key, sums in self._rollups.items()}

    @property
    def spend(self) -> dict[tuple[str, str, str], int]:
        """Units by (tenant, quota, sidecar)."""
        return dict(self._spend)


_STEPS: Final = frozenset(
    (EventKind.CANCEL, EventKind.EXPIRE, EventKind.EXTEND, EventKind.SEAT_RELEASE, EventKind.SEAT_RECLAIM)
)


def is_outcome(event: UsageEvent) -> bool:
    """Whether the event says what became of an action, so that sums count each action once.

    A reservation that was approved is counted when it is committed; making, extending or dropping it is only a step, as
    is the end of a seat.
    """
    return event.kind not in _STEPS and not (event.kind == EventKind.RESERVE and spends_count(event))


def spends_count(event: UsageEvent) -> bool:
    """Whether the event's spends were really taken from its sidecar's registers."""
    return event.effect == Effect.APPROVED or bool(event.flags & FLAG_OBSERVED)


def storable(text: str) -> str:
    """The text as a column can hold it: PostgreSQL takes no NUL. The event's body keeps it as it is."""
    return text.replace("\0", "\ufffd") if "\0" in text else text


def window_start_of(quota: str) -> int:
    """The start, in seconds, of the window that a quota's name ends with; 0 when it has none."""
    start = quota.rpartition(":")[2]
    return int(start) if start.isdigit() else 0
