"""Questions about usage: sums by hour, day or month, the largest, and what was denied.

Reads only; each function sees one committed state. Sums come from the rollups, by day where whole days are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    and_,
    case,
    distinct,
    func,
    literal,
    literal_column,
    select,
    tuple_,
)

from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Period, window_at
from licet_control_plane.core.accounting import DAY_S
from licet_control_plane.store.schema import events, exposures, rollup_days, rollups

TIMES: Final = ("hour", "day", "month")
FLAGS: Final = ("flag", "variant")
GROUPS: Final = ("tenant", "feature", "action", "effect", "reason", *FLAGS, *TIMES)
"""What usage can be summed by."""
TOP_GROUPS: Final = ("tenant", "feature", "action")

DEMAND: Final = (
    Reason.NO_LICENSE,
    Reason.LICENSE_EXPIRED,
    Reason.NOT_ENTITLED,
    Reason.FEATURE_OFF,
    Reason.QUOTA_EXHAUSTED,
    Reason.RATE_LIMITED,
    Reason.SEAT_UNAVAILABLE,
)
"""Denials that say what a tenant wanted and does not have, or has no more of."""

_US: Final = 1_000_000
_HOUR_S: Final = 3_600
_HOUR_US: Final = _HOUR_S * _US


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums of one group. ``cost_nanos`` by currency."""

    group: dict[str, str | int]
    """Values by group; of a time, its first second since the Unix epoch."""
    events: int
    units: int
    cost_nanos: dict[str, int]


@dataclass(frozen=True, slots=True)
class Interval:
    """Times in ``[from_us, to_us)``, microseconds; ``to_us`` ``None`` for no end. For sums: hours that start in it."""

    from_us: int = 0
    to_us: int | None = None

    @property
    def whole_days(self) -> bool:
        """Whether it holds every day wholly or not at all."""
        day_us = DAY_S * _US
        return not self.from_us % day_us and (self.to_us is None or not self.to_us % day_us)

    def of_hours(self, hour: ColumnElement[int]) -> ColumnElement[bool]:
        """The condition that an hour (seconds) starts in it."""
        starts = hour >= self.from_us // _HOUR_US * _HOUR_S
        return starts if self.to_us is None else and_(starts, hour < -(-self.to_us // _US))


ALWAYS: Final = Interval()


# Sums


def summary(
    connection: Connection,
    *,
    by: Sequence[str],
    tenant: str = "",
    interval: Interval = ALWAYS,
    after: Sequence[Any] = (),
    limit: int | None = None,
) -> tuple[list[Usage], list[Any] | None]:
    """Usage summed by ``by`` (of ``GROUPS``; ``variant`` only with ``flag``), in that order.

    At most ``limit`` groups after the one whose key is ``after``; and the key to go on after, ``None`` at the end.
    An event counts once for each of its flags.
    """
    table = _table(by, interval)
    where = [interval.of_hours(table.c.hour)]
    if tenant:
        where.append(table.c.tenant == tenant)
    # By feature an event counts once for each of its features; otherwise once.
    counted = table.c.events if "feature" in by else table.c.decisions
    months = _months(connection, table, and_(*where)) if "month" in by else ()
    # Named in a query of its own: PostgreSQL does not know an expression with parameters for the same when it groups.
    rows = (
        select(
            *(_group(table, name, months).label(f"by_{name}") for name in by),
            table.c.currency,
            counted.label("counted"),
            table.c.units,
            table.c.cost_nanos,
        )
        .where(*where)
        .subquery()
    )
    grouped = [rows.c[f"by_{name}"] for name in by]
    query: Select[Any] = select(
        *grouped,
        rows.c.currency,
        func.sum(rows.c.counted).label("events"),
        func.sum(rows.c.units).label("units"),
        func.sum(rows.c.cost_nanos).label("cost_nanos"),
    )
    if after and grouped:
        query = query.where(tuple_(*grouped) > tuple_(*(literal(value) for value in after)))
    query = query.group_by(*grouped, rows.c.currency).order_by(*grouped, rows.c.currency)
    found: list[Usage] = []
    last: list[Any] = []
    for key, of_group in groupby(connection.execute(query), key=lambda row: tuple(row[: len(by)])):
        usage = _usage(by, key, of_group)
        # Decisions over several features are counted on "": by feature, such a row has nothing to say.
        if not (usage.events or usage.units or usage.cost_nanos):
            continue
        if limit is not None and len(found) == limit:
            return found, last
        found.append(usage)
        last = list(key)
    return found, None


def _table(by: Iterable[str], interval: Interval) -> Table:
    if any(name in FLAGS for name in by):
        return exposures
    return rollup_days if "hour" not in by and interval.whole_days else rollups


def _group(table: Table, name: str, months: Sequence[tuple[int, int]]) -> ColumnElement[Any]:
    hour = table.c.hour
    if name == "day":
        return hour - hour % DAY_S
    if name == "month":
        return case(*((hour < end, literal(start)) for start, end in months), else_=literal(0)) if months else hour
    return table.c[name]


def _months(connection: Connection, table: Table, where: ColumnElement[bool]) -> list[tuple[int, int]]:
    """Start and end of each calendar month that there are rows of."""
    first, last = connection.execute(select(func.min(table.c.hour), func.max(table.c.hour)).where(where)).one()
    months: list[tuple[int, int]] = []
    at_s = first
    while at_s is not None and at_s <= last:
        months.append(window_at(Period.MONTH, at_s))
        at_s = months[-1][1]
    return months


def _usage(by: Sequence[str], key: tuple[Any, ...], rows: Iterable[Row[Any]]) -> Usage:
    counted = units = 0
    costs: dict[str, int] = {}
    for row in rows:
        counted += int(row.events)
        units += int(row.units)
        if row.currency and row.cost_nanos:
            costs[row.currency] = costs.get(row.currency, 0) + int(row.cost_nanos)
    return Usage({name: named(name, value) for name, value in zip(by, key, strict=True)}, counted, units, costs)


# The largest


class Order(StrEnum):
    """What makes a group large."""

    UNITS = "units"
    COST = "cost"
    EVENTS = "events"
    DENIALS = "denials"


@dataclass(frozen=True, slots=True)
class Ranked:
    """``units`` and ``cost_nanos`` (of one currency) are of approved events, ``denials`` those that were denied."""

    name: str
    events: int
    units: int
    denials: int
    cost_nanos: int
    currency: str


def top(
    connection: Connection,
    *,
    by: str,
    order: Order,
    tenant: str = "",
    interval: Interval = ALWAYS,
    currency: str = "",
    limit: int = 10,
) -> list[Ranked]:
    """The largest groups, largest first. ``currency``: the one that costs are ranked in; needed for ``Order.COST``."""
    table = _table((), interval)
    counted = table.c.events if by == "feature" else table.c.decisions
    approved, denied = table.c.effect == Effect.APPROVED.value, table.c.effect == Effect.DENIED.value
    sums = {
        Order.EVENTS: func.sum(counted),
        Order.UNITS: func.sum(case((approved, table.c.units), else_=0)),
        Order.DENIALS: func.sum(case((denied, counted), else_=0)),
        Order.COST: func.sum(case((and_(approved, table.c.currency == currency), table.c.cost_nanos), else_=0)),
    }
    name = table.c[by]
    query = select(name, *(one.label(str(key)) for key, one in sums.items())).where(
        interval.of_hours(table.c.hour), *([table.c.tenant == tenant] if tenant else [])
    )
    query = query.group_by(name).having(sums[order] > 0).order_by(sums[order].desc(), name).limit(limit)
    return [
        Ranked(name, int(counted), int(units), int(denials), int(cost), currency)
        for name, counted, units, denials, cost in connection.execute(query)
    ]


def currencies(connection: Connection, *, tenant: str = "", interval: Interval = ALWAYS) -> list[str]:
    """Those that something cost."""
    table = _table((), interval)
    query = select(table.c.currency).distinct()
    query = query.where(
        interval.of_hours(table.c.hour), table.c.currency != "", *([table.c.tenant == tenant] if tenant else [])
    )
    return sorted(connection.scalars(query))


# What was denied


@dataclass(frozen=True, slots=True)
class Denied:
    """What was asked for and denied: how often, how many units, by how many tenants and subjects."""

    feature: str
    action: str
    reason: str
    events: int
    units: int
    tenants: int
    subjects: int


def denied(
    connection: Connection, *, reasons: Collection[Reason] = DEMAND, tenant: str = "", interval: Interval = ALWAYS
) -> list[Denied]:
    """Denials by feature, action and reason, the most frequent first."""
    table = _table((), interval)
    numbers = [reason.value for reason in reasons]
    key = (table.c.feature, table.c.action, table.c.reason)
    query = select(*key, func.sum(table.c.events), func.sum(table.c.units), func.count(distinct(table.c.tenant))).where(
        interval.of_hours(table.c.hour),
        table.c.effect == Effect.DENIED.value,
        table.c.reason.in_(numbers),
        # Not the row that only counts a decision over several features.
        table.c.events > 0,
    )
    if tenant:
        query = query.where(table.c.tenant == tenant)
    subjects = _denied_subjects(connection, numbers, tenant, interval)
    found = [
        Denied(
            feature,
            action,
            str(named("reason", reason)),
            int(count),
            int(units),
            tenants,
            subjects.get((action, reason), 0),
        )
        for feature, action, reason, count, units, tenants in connection.execute(query.group_by(*key))
    ]
    return sorted(found, key=lambda one: (-one.events, one.feature, one.action, one.reason))


def _denied_subjects(
    connection: Connection, reasons: Collection[int], tenant: str, interval: Interval
) -> dict[tuple[str, int], int]:
    """Distinct subjects by action and reason. An action's features are those of all its events."""
    # As text, because SQLite uses its partial index only for a condition that it can read.
    where: list[ColumnElement[bool]] = [literal_column(f"effect = {Effect.DENIED.value}", Boolean)]
    where.append(events.c.reason.in_(reasons))
    where.append(events.c.at >= interval.from_us // _HOUR_US * _HOUR_US)
    if interval.to_us is not None:
        where.append(events.c.at < -(-interval.to_us // _HOUR_US) * _HOUR_US)
    if tenant:
        where.append(events.c.tenant == tenant)
    apart = select(events.c.action, events.c.reason, events.c.tenant, events.c.subject).where(*where).distinct()
    one = apart.subquery()
    query = select(one.c.action, one.c.reason, func.count()).group_by(one.c.action, one.c.reason)
    return {(action, reason): count for action, reason, count in connection.execute(query)}


def named(group: str, value: Any) -> str | int:
    """A value of a group as people know it."""
    if group in TIMES:
        return int(value)
    if group not in ("effect", "reason"):
        return str(value)
    known: type[Effect] | type[Reason] = Effect if group == "effect" else Reason
    try:
        return known(value).name
    except ValueError:  # a newer sidecar's
        return f"{group.upper()}_{value}"
