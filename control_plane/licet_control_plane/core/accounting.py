"""What one event means for the ledger: its row, its rollups, what it spent. Pure.

Each event is decoded once, here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

from licet.domain.outcomes import Effect
from licet.domain.windows import Period, window_at
from licet.wire.usage import FLAG_OBSERVED, EventKind, UsageBatch, UsageEvent, unpack_event

_HOUR_US: Final = 3_600 * 1_000_000
DAY_S: Final = 86_400
_APPROVED: Final = int(Effect.APPROVED)


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


class BilledKey(NamedTuple):
    """One row of the units that are billed. ``month`` is its first second since the Unix epoch (UTC); ``priced_as``
    the value that picked the price, empty for none; ``revision`` the one the event was decided under.
    """

    tenant: str
    month: int
    feature: str
    priced_as: str
    revision: int


class ExposureKey(NamedTuple):
    """One row of the hourly sums by flag; its other fields are those of a ``RollupKey``."""

    hour: int
    tenant: str
    flag: str
    variant: str
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


Sums = dict[tuple[Any, ...], list[int]]
"""Decisions, events, units and cost, as ``RollupSums`` has them, by key. Plain tuples and lists: there are many."""


class Countable(Protocol):
    """What of an event is counted: a ``UsageEvent``, or the public part of one."""

    @property
    def at_us(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def effect(self) -> int: ...
    @property
    def reason(self) -> int: ...
    @property
    def revision(self) -> int: ...
    @property
    def units(self) -> Mapping[str, int]: ...
    @property
    def cost_nanos(self) -> int: ...
    @property
    def currency(self) -> str: ...
    @property
    def flags(self) -> int: ...
    @property
    def spends(self) -> Sequence[tuple[str, int]]: ...
    @property
    def feature_costs(self) -> Mapping[str, int]: ...
    @property
    def kind(self) -> int: ...
    @property
    def units_held(self) -> Mapping[str, int]: ...
    @property
    def priced_as(self) -> Mapping[str, str]: ...
    @property
    def exposures(self) -> Mapping[str, str]: ...


class Account:
    """What the rows inserted in one transaction add to the rollups, to the bill and to what registers spent.

    ``hours`` are the hourly rollups, by ``RollupKey``; ``exposed`` those by flag, by ``ExposureKey``, an event once for
    each of its flags; ``billed`` events and units by ``BilledKey``.
    """

    def __init__(self) -> None:
        self.exposed: Sums = {}
        self._hours: Sums = {}
        self._billed: Sums = {}
        self._spend: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._observed: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._plain: dict[tuple[Any, ...], list[int]] = {}
        """Events, units and cost of events of one feature, by all that their sums depend on. Most are such, and of
        many that are alike this takes one addition each; what it means is worked out when it is asked for."""

    @property
    def hours(self) -> Sums:
        """The hourly rollups so far."""
        self._work_out()
        return self._hours

    @property
    def billed(self) -> Sums:
        """What is billed so far."""
        self._work_out()
        return self._billed

    def add(self, sidecar: str, events: Iterable[Countable]) -> None:
        """Count events of a log of ``sidecar``, which must be counted here only once.

        Raises:
            TypeError, ValueError, AttributeError: one is not what an event must be; those before it were counted.
        """
        plain, spend = self._plain, self._spend
        for event in events:
            units, kind = event.units, event.kind
            if kind or len(units) != 1 or event.feature_costs or event.priced_as or event.exposures:
                if not kind or is_outcome(event):
                    self._add_one(event)
                else:
                    continue
            else:
                ((feature, count),) = units.items()
                key = (
                    event.at_us // _HOUR_US,
                    event.tenant,
                    feature,
                    event.action,
                    event.effect,
                    event.reason,
                    event.currency,
                    event.revision,
                    count == 0,
                )
                old = plain.get(key)
                if old is None:
                    storable(event.action)
                    plain[key] = [1, count + 0, event.cost_nanos + 0]
                else:
                    old[0] += 1
                    old[1] += count
                    old[2] += event.cost_nanos
            if event.spends and spends_count(event):
                tenant = event.tenant
                for quota, count in event.spends:
                    spend[tenant, quota, sidecar] += count
                if event.effect != _APPROVED:
                    for quota, count in event.spends:
                        self._observed[tenant, quota, sidecar] += count

    def _add_one(self, event: Countable) -> None:
        hour = event.at_us // _HOUR_US * 3_600
        tenant, units = event.tenant, event.units
        of = (storable(event.action), event.effect, event.reason, event.currency)
        parts = _parts(event, event.units_held if event.kind == EventKind.RESERVE else units)
        for feature, *counts in parts:
            _add(self._hours, (hour, tenant, feature, *of), *counts)
        if event.exposures:
            for flag, variant in event.exposures.items():
                for feature, *counts in parts:
                    _add(self.exposed, (hour, tenant, flag, variant, feature, *of), *counts)
        if units and event.effect == _APPROVED:
            month, revision, priced_as = month_of(hour), event.revision, event.priced_as
            for feature, count in units.items():
                if count:
                    key = (tenant, month, feature, priced_as.get(feature, ""), revision)
                    _add(self._billed, key, 0, 1, count, 0)

    def _work_out(self) -> None:
        plain, self._plain = self._plain, {}
        for (hours, tenant, feature, action, effect, reason, currency, revision, is_free), sums in plain.items():
            events, units, cost_nanos = sums
            hour = hours * 3_600
            key = (hour, tenant, feature, storable(action), effect, reason, currency)
            _add(self._hours, key, events, events, units, cost_nanos)
            if effect == _APPROVED and not is_free:
                _add(self._billed, (tenant, month_of(hour), feature, "", revision), 0, events, units, 0)

    def merge(self, other: Account) -> None:
        """Add what another account counted, of other events."""
        pairs = ((self._hours, other.hours), (self.exposed, other.exposed), (self._billed, other.billed))
        for mine, others in pairs:
            for key, sums in others.items():
                _add(mine, key, *sums)
        for spent, theirs in ((self._spend, other._spend), (self._observed, other._observed)):
            for quota, units in theirs.items():
                spent[quota] += units

    def days(self) -> Sums:
        """The rollups by day: the ``hour`` of a key is the first of its day."""
        days: Sums = {}
        for (hour, *of), sums in self.hours.items():
            _add(days, (hour // DAY_S * DAY_S, *of), *sums)
        return days

    @property
    def rollups(self) -> dict[RollupKey, RollupSums]:
        """``hours``, with names."""
        return {RollupKey(*key): RollupSums(*sums) for key, sums in self.hours.items()}

    @property
    def spend(self) -> dict[tuple[str, str, str], int]:
        """Units by (tenant, quota, sidecar)."""
        return dict(self._spend)

    @property
    def observed(self) -> dict[tuple[str, str, str], int]:
        """Those of ``spend`` that only observe mode let through: taken from registers, and not billed."""
        return dict(self._observed)


def _parts(event: Countable, features: Mapping[str, int]) -> Sequence[tuple[str, int, int, int, int]]:
    """Feature, decisions, events, units and cost of each row that an event over ``features`` adds to."""
    costs = event.feature_costs
    if len(features) == 1 and not costs:
        for feature, units in features.items():
            return ((feature, 1, 1, units, event.cost_nanos),)
    bearer = next(iter(features)) if len(features) == 1 else ""
    return [
        (
            feature,
            1 if feature == bearer else 0,
            1 if feature or not features else 0,
            units,
            costs.get(feature, 0) if costs else event.cost_nanos if feature == bearer else 0,
        )
        for feature, units in (features.items() if bearer in features else [("", 0), *features.items()])
    ]


def _add(
    sums: Sums,
    key: tuple[Any, ...],
    decisions: int,
    events: int,
    units: int,
    cost_nanos: int,
) -> None:
    old = sums.get(key)
    if old is None:
        sums[key] = [decisions, events, units, cost_nanos]
    else:
        old[0] += decisions
        old[1] += events
        old[2] += units
        old[3] += cost_nanos


@lru_cache(maxsize=1_024)
def month_of(at_s: int) -> int:
    """The first second of the calendar month (UTC) of an instant; 0 for one that no calendar has: a sidecar's clock may
    be anything, and what it recorded is taken all the same.
    """
    try:
        return window_at(Period.MONTH, at_s).start
    except ValueError:
        return 0


_STEPS: Final = frozenset(
    (EventKind.CANCEL, EventKind.EXPIRE, EventKind.EXTEND, EventKind.SEAT_RELEASE, EventKind.SEAT_RECLAIM)
)


def is_outcome(event: Countable) -> bool:
    """Whether the event says what became of an action, so that sums count each action once.

    A reservation that was approved is counted when it is committed; making, extending or dropping it is only a step, as
    is the end of a seat.
    """
    return event.kind not in _STEPS and not (event.kind == EventKind.RESERVE and spends_count(event))


def spends_count(event: Countable) -> bool:
    """Whether the event's spends were really taken from its sidecar's registers."""
    return event.effect == Effect.APPROVED or bool(event.flags & FLAG_OBSERVED)


def storable(text: str) -> str:
    """The text as a column can hold it: PostgreSQL takes no NUL. The event's own bytes keep it as it is.

    Raises:
        TypeError: it is no text.
    """
    if type(text) is not str:
        raise TypeError(f"{text!r} stands where an action or a type should")
    return text.replace("\0", "\ufffd") if "\0" in text else text


def window_start_of(quota: str) -> int:
    """The start, in seconds, of the window that a quota's name ends with; 0 when it has none."""
    start = quota.rpartition(":")[2]
    return int(start) if start.isdigit() else 0
