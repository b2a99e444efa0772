"""Questions to the ledger: sums of usage, one workload's tally, and whether the ledger is whole.

Reads only; each function sees one committed state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, func, select

from licet.domain.outcomes import Effect, Reason
from licet.wire.usage import unpack_event
from licet_control_plane.core.accounting import Account
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.store import retention
from licet_control_plane.store.schema import conflicts, events, logs, ranges, rollups, shards

GROUPS: Final = ("tenant", "feature", "action", "effect", "reason")
"""What usage can be summed by."""
_PAGE_ROWS: Final = 5_000
_HOUR_US: Final = 3_600 * 1_000_000


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums of one group. ``cost_nanos`` by currency."""

    group: dict[str, str]
    events: int
    units: int
    cost_nanos: dict[str, int]


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of one workload. ``denied`` by reason; units are of approved events."""

    events: int
    approved: int
    denied: dict[str, int]
    pending: int
    units_approved: int
    units_by_feature: dict[str, int]


@dataclass(frozen=True, slots=True)
class Gap:
    """Events of a log that a sidecar numbered and the ledger does not have."""

    log_id: str
    from_seq: int
    to_seq: int
    why: str


@dataclass(frozen=True, slots=True)
class LogFacts:
    """One log as the ledger has it."""

    log_id: str
    sidecar: str
    incarnation: int
    watermark: int
    events: int


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the ledger is whole. ``duplicates`` counts events recorded twice, which the schema forbids.

    ``dropped``: events by month that were exported and dropped. What they should have been is known, and not counted
    again; the sums of those months are taken as they are.
    """

    events: int
    logs: list[LogFacts]
    gaps: list[Gap]
    duplicates: int
    conflicts: int
    rollups_match: bool
    dropped: dict[str, int]

    @property
    def ok(self) -> bool:
        """Nothing is missing, doubled, contested, or billed otherwise than recorded."""
        return not self.gaps and not self.duplicates and not self.conflicts and self.rollups_match


def summary(
    connection: Connection, *, by: Sequence[str], tenant: str = "", from_us: int = 0, to_us: int | None = None
) -> list[Usage]:
    """Usage summed by ``by`` (of ``GROUPS``), from the hourly rollups: whole hours that start in ``[from, to)``."""
    # By feature an event counts once for each of its features; otherwise once.
    counted = rollups.c.events if "feature" in by else rollups.c.decisions
    grouped = [rollups.c[name] for name in by]
    query: Select[Any] = select(
        *grouped,
        rollups.c.currency,
        func.sum(counted).label("events"),
        func.sum(rollups.c.units).label("units"),
        func.sum(rollups.c.cost_nanos).label("cost_nanos"),
    )
    query = query.where(rollups.c.hour >= from_us // _HOUR_US * 3_600)
    if to_us is not None:
        query = query.where(rollups.c.hour * 1_000_000 < to_us)
    if tenant:
        query = query.where(rollups.c.tenant == tenant)
    query = query.group_by(*grouped, rollups.c.currency).order_by(*grouped, rollups.c.currency)
    sums: dict[tuple[Any, ...], Usage] = {}
    for row in connection.execute(query):
        key = tuple(row[: len(by)])
        old = sums.get(key)
        costs = dict(old.cost_nanos) if old else {}
        if row.currency and row.cost_nanos:
            costs[row.currency] = costs.get(row.currency, 0) + int(row.cost_nanos)
        sums[key] = Usage(
            group={name: _named(name, value) for name, value in zip(by, key, strict=True)},
            events=int(row.events) + (old.events if old else 0),
            units=int(row.units) + (old.units if old else 0),
            cost_nanos=costs,
        )
    # Decisions over several features are counted on "": by feature, such a row has nothing to say.
    return [usage for usage in sums.values() if usage.events or usage.units or usage.cost_nanos]


def tally(
    connection: Connection,
    *,
    tenant: str = "",
    idempotency_prefix: str = "",
    from_us: int = 0,
    to_us: int | None = None,
) -> Tally:
    """What became of the events whose idempotency key starts with a prefix, from the events themselves."""
    where = [events.c.at >= from_us]
    if to_us is not None:
        where.append(events.c.at < to_us)
    if tenant:
        where.append(events.c.tenant == tenant)
    if idempotency_prefix:
        where.append(events.c.idempotency_key.startswith(idempotency_prefix, autoescape=True))
        # LIKE ignores the case of ASCII letters in SQLite; the keys do not.
        where.append(func.substr(events.c.idempotency_key, 1, len(idempotency_prefix)) == idempotency_prefix)
    condition = and_(*where)
    counts = connection.execute(
        select(events.c.effect, events.c.reason, func.count(), func.sum(events.c.units_total))
        .where(condition)
        .group_by(events.c.effect, events.c.reason)
    ).all()
    by_effect = {effect: sum(n for e, _, n, _ in counts if e == effect) for effect in Effect}
    return Tally(
        events=sum(n for _, _, n, _ in counts),
        approved=by_effect[Effect.APPROVED],
        denied={_named("reason", reason): n for effect, reason, n, _ in counts if effect == Effect.DENIED},
        pending=by_effect[Effect.PENDING],
        units_approved=sum(int(units) for effect, _, _, units in counts if effect == Effect.APPROVED),
        units_by_feature=_units_by_feature(connection, and_(condition, events.c.effect == Effect.APPROVED.value)),
    )


def totals(connection: Connection) -> tuple[int, int]:
    """Batches and events ever recorded."""
    row = connection.execute(
        select(func.coalesce(func.sum(shards.c.batches), 0), func.coalesce(func.sum(shards.c.events), 0))
    ).one()
    return int(row[0]), int(row[1])


def conflict_count(connection: Connection) -> int:
    """Events that came again with other content."""
    return connection.scalar(select(func.count()).select_from(conflicts)) or 0


def verify(connection: Connection) -> Verification:
    """Recount everything: sequence numbers, predecessors, duplicates, conflicts, and the rollups from the events.

    Reads every event; about two minutes for ten million.
    """
    found_logs, gaps = _verify_logs(connection)
    total = sum(log.events for log in found_logs)
    distinct = connection.scalar(
        select(func.count()).select_from(select(events.c.log, events.c.seq).distinct().subquery())
    )
    return Verification(
        events=total,
        logs=found_logs,
        gaps=gaps,
        duplicates=total - (distinct or 0),
        conflicts=conflict_count(connection),
        rollups_match=_rollups_match(connection),
        dropped={str(month): count for month, count in retention.dropped_by_month(connection).items()},
    )


def _verify_logs(connection: Connection) -> tuple[list[LogFacts], list[Gap]]:
    counts = {
        log: (count, last)
        for log, count, last in connection.execute(
            select(events.c.log, func.count(), func.max(events.c.seq)).group_by(events.c.log)
        )
    }
    above: dict[int, list[tuple[int, int]]] = {}
    for log, first, last in connection.execute(select(ranges)):
        above.setdefault(log, []).append((first, last))
    gone = retention.dropped_by_log(connection)
    rows = connection.execute(select(logs).order_by(logs.c.sidecar, logs.c.incarnation)).all()
    watermarks = {(row.sidecar, row.incarnation): row.watermark for row in rows}
    facts: list[LogFacts] = []
    gaps: list[Gap] = []
    for row in rows:
        count, last = counts.get(row.log, (0, 0))
        facts.append(LogFacts(row.log_id, row.sidecar, row.incarnation, row.watermark, count))
        recorded = RecordedSeqs(row.watermark, above.get(row.log, ()))
        gaps.extend(Gap(row.log_id, first, last, "not received yet, or lost") for first, last in recorded.holes())
        promised = row.watermark + sum(last - first + 1 for first, last in recorded.ranges)
        promised -= gone.get(row.log, 0)
        if count != promised or last > recorded.last:
            gaps.append(Gap(row.log_id, 1, recorded.last, f"{promised} events acknowledged, {count} in the ledger"))
        if row.previous_last_seq:
            reached = watermarks.get((row.sidecar, row.previous_incarnation), 0)
            if reached < row.previous_last_seq:
                log_id = f"{row.sidecar}:{row.previous_incarnation}"
                gaps.append(
                    Gap(log_id, reached + 1, row.previous_last_seq, "its successor says that it went on to here")
                )
    return facts, gaps


def _rollups_match(connection: Connection) -> bool:
    account = Account()
    for bodies in _pages(connection, select(events.c.body)):
        account.add("", [unpack_event(body) for (body,) in bodies])
    stored = {tuple(row[:7]): tuple(int(value) for value in row[7:]) for row in connection.execute(select(rollups))}
    counted = {tuple(key): tuple(sums) for key, sums in account.rollups.items()}
    for month in retention.dropped_by_month(connection):
        hours = range(month.start_us // 1_000_000, month.end_us // 1_000_000)
        for sums in (stored, counted):
            for key in [key for key in sums if key[0] in hours]:
                del sums[key]
    return stored == counted


def _units_by_feature(connection: Connection, condition: ColumnElement[bool]) -> dict[str, int]:
    units: dict[str, int] = {}
    for bodies in _pages(connection, select(events.c.body).where(condition)):
        for (body,) in bodies:
            for feature, count in unpack_event(body).units.items():
                units[feature] = units.get(feature, 0) + count
    return dict(sorted(units.items()))


def _pages(connection: Connection, query: Select[Any]) -> Iterable[Sequence[Any]]:
    return connection.execution_options(yield_per=_PAGE_ROWS).execute(query).partitions()


def _named(group: str, value: Any) -> str:
    if group not in ("effect", "reason"):
        return str(value)
    known: type[Effect] | type[Reason] = Effect if group == "effect" else Reason
    try:
        return known(value).name
    except ValueError:  # a newer sidecar's
        return f"{group.upper()}_{value}"
