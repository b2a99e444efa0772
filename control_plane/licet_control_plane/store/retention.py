"""Closed months leave the ledger: exported to a file first, then dropped, exactly the events that are in the file.

Watermarks, ranges, conflicts, sums and the registers' spend stay, so that nothing of a dropped month is taken again and
every bill stands. An event of that month that was never recorded is taken when it comes late; the month is then
exported and dropped once more. On PostgreSQL the month's partition goes; what is elsewhere is deleted in parts.
Source: ``docs/adr/0025-months-of-the-ledger.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack
from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, insert, or_, select, update

from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.store import access, partitions
from licet_control_plane.store.database import POSTGRESQL, upsert
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.schema import dropped, events, exports, logs

CLOSED_AFTER_US: Final = 7 * 24 * 3_600 * 1_000_000
"""After its end: what sidecars held back over a long weekend is in by then."""
PART_SEQS: Final = 10_000
"""Numbers deleted in one transaction: some 100 ms of the database, in which the drain waits."""
MONTHS_MAX: Final = 1_200
"""Months with events that are listed: a hundred years."""

Range = tuple[int, int, int]
"""Log number, first and last sequence number."""


class MonthRefused(Exception):
    """The month cannot be exported or dropped now. ``fix`` says what to do."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class MonthFacts:
    """One month. ``exported_at_us``, ``sha256``, ``exported``: of its newest export. ``dropped``: over all of them."""

    month: Month
    events: int
    closed: bool
    exported_at_us: int | None
    exported: int
    sha256: str
    dropped: int
    dropped_at_us: int | None


@dataclass(frozen=True, slots=True)
class Dropped:
    """``events`` are gone so far; ``done``: all of the export are."""

    events: int
    done: bool


def is_closed(month: Month, now_us: int) -> bool:
    """Whether nothing more is expected of it."""
    return now_us >= month.end_us + CLOSED_AFTER_US


def months(connection: Connection, *, now_us: int) -> list[MonthFacts]:
    """Every month that has events or had them, newest first. Events of odd clocks (before 1970) are in none."""
    counts: dict[Month, int] = {}
    end_us: int | None = None
    while len(counts) < MONTHS_MAX:
        newest = select(func.max(events.c.at))
        if end_us is not None:
            newest = newest.where(events.c.at < end_us)
        at_us = connection.scalar(newest)
        if at_us is None or at_us < 0:
            break
        try:
            month = Month.at(int(at_us))
        except (ValueError, OverflowError, OSError):
            end_us = Month(9999, 1).start_us  # a clock beyond what a calendar can say
            continue
        if month.year > 9998:
            end_us = Month(9999, 1).start_us
            continue
        counts[month] = count(connection, month)
        end_us = month.start_us
    newest_export: dict[Month, Row[Any]] = {}
    for row in connection.execute(select(exports).order_by(exports.c.id)):
        newest_export[Month.parse(row.month)] = row
    gone = dropped_by_month(connection)
    found = []
    for month in sorted({*counts, *newest_export, *gone}, reverse=True):
        export = newest_export.get(month)
        found.append(
            MonthFacts(
                month=month,
                events=counts.get(month, 0),
                closed=is_closed(month, now_us),
                exported_at_us=export.at if export else None,
                exported=export.events if export else 0,
                sha256=export.sha256 if export else "",
                dropped=gone.get(month, 0),
                dropped_at_us=export.dropped_at if export else None,
            )
        )
    return found


def count(connection: Connection, month: Month) -> int:
    """Events of a month that are here."""
    return connection.scalar(select(func.count()).select_from(events).where(_in(month))) or 0


def page(connection: Connection, month: Month, *, after: tuple[int, int], limit: int) -> Sequence[Row[Any]]:
    """Events of a month as the table has them, by (log, seq), after one of them."""
    log, seq = after
    later = or_(events.c.log > log, and_(events.c.log == log, events.c.seq > seq))
    query = select(events).where(_in(month), events.c.log >= log, later).order_by(events.c.log, events.c.seq)
    return connection.execute(query.limit(limit)).all()


def log_ids(connection: Connection) -> dict[int, str]:
    """The id of every log by its number."""
    return {row.log: row.log_id for row in connection.execute(select(logs.c.log, logs.c.log_id))}


def record_export(
    connection: Connection, month: Month, *, events: int, sha256: str, ranges: list[Range], by: str, now_us: int
) -> None:
    """Note that a file with exactly these events is where it was wanted.

    Raises:
        MonthRefused: it is not closed, or events came while it was exported.
    """
    _must_be_closed(month, now_us)
    if (here := count(connection, month)) != events:
        raise MonthRefused(f"{month} has {here:,} events, and the export {events:,}", "Export it again.")
    connection.execute(
        insert(exports).values(
            month=str(month),
            events=events,
            sha256=sha256,
            ranges=msgpack.packb(ranges),
            at=now_us,
            by=by,
            dropped=0,
        )
    )
    access.record(
        connection,
        by=by,
        action="ledger.export",
        target=str(month),
        before=None,
        after={"events": events, "sha256": sha256},
        now_us=now_us,
    )


def to_drop(connection: Connection, month: Month, *, now_us: int) -> list[Range]:
    """What is to be dropped of a month, in parts of at most ``PART_SEQS``.

    Raises:
        MonthRefused: it is not closed, not exported, or has events that the export has not.
    """
    export = _droppable(connection, month, now_us, locked=False)
    return list(_parts(msgpack.unpackb(export.ranges)))


def drop_partition(connection: Connection, month: Month, *, now_us: int) -> None:
    """Drop the month's partition, when there is one. May be repeated.

    Raises:
        MonthRefused: as for ``to_drop``.
    """
    if connection.dialect.name != POSTGRESQL or month.partition not in partitions.existing(connection):
        return
    partitions.lock_against_writers(connection)
    export = _droppable(connection, month, now_us)
    table = f'"{month.partition}"'
    counts = connection.exec_driver_sql(f"SELECT log, count(*) FROM {table} GROUP BY log").all()  # noqa: S608  # own name
    _count_dropped(connection, month, export.id, {row[0]: row[1] for row in counts})
    connection.exec_driver_sql(f"DROP TABLE {table}")


def drop_part(connection: Connection, month: Month, parts: Sequence[Range], *, now_us: int) -> int:
    """Delete some of what ``to_drop`` named; returns how many events that were. May be repeated.

    Raises:
        MonthRefused: not exported, or dropped meanwhile.
    """
    export = _droppable(connection, month, now_us, exact=False)
    gone: dict[int, int] = {}
    for log, first, last in parts:
        done = connection.execute(
            delete(events).where(events.c.log == log, events.c.seq.between(first, last), _in(month))
        )
        gone[log] = gone.get(log, 0) + done.rowcount
    _count_dropped(connection, month, export.id, gone)
    return sum(gone.values())


def finish(connection: Connection, month: Month, *, by: str, now_us: int) -> int:
    """Note that all of the export is gone; returns how many events that were.

    Raises:
        MonthRefused: not exported, or dropped meanwhile.
    """
    export = _droppable(connection, month, now_us, exact=False)
    connection.execute(update(exports).where(exports.c.id == export.id).values(dropped_at=now_us))
    access.record(
        connection,
        by=by,
        action="ledger.drop",
        target=str(month),
        before={"events": export.events, "sha256": export.sha256},
        after={"dropped": export.dropped},
        now_us=now_us,
    )
    return int(export.dropped)


def dropped_by_log(connection: Connection) -> dict[int, int]:
    """Events that are no longer here, by log number."""
    rows = connection.execute(select(dropped.c.log, func.sum(dropped.c.events)).group_by(dropped.c.log))
    return {log: int(number) for log, number in rows}


def dropped_by_month(connection: Connection) -> dict[Month, int]:
    """Events that are no longer here, by month."""
    rows = connection.execute(
        select(dropped.c.month, func.sum(dropped.c.events)).group_by(dropped.c.month).order_by(dropped.c.month)
    )
    return {Month.parse(month): int(number) for month, number in rows}


def dropped_numbers(connection: Connection) -> dict[int, RecordedSeqs]:
    """Sequence numbers that were exported and are being dropped, or are gone, by log number."""
    numbers: dict[int, RecordedSeqs] = {}
    for ranges in connection.scalars(select(exports.c.ranges).where(exports.c.dropped > 0)):
        for log, first, last in msgpack.unpackb(ranges):
            numbers.setdefault(log, RecordedSeqs()).add(first, last)
    return numbers


class Ranges:
    """Collects the sequence numbers of an export as ranges; they come by (log, seq)."""

    def __init__(self) -> None:
        self.found: list[Range] = []

    def add(self, log: int, seq: int) -> None:
        """The next event."""
        if self.found:
            last_log, first, last = self.found[-1]
            if last_log == log and last == seq - 1:
                self.found[-1] = (log, first, seq)
                return
        self.found.append((log, seq, seq))


def _droppable(
    connection: Connection, month: Month, now_us: int, *, exact: bool = True, locked: bool = True
) -> Row[Any]:
    _must_be_closed(month, now_us)
    newest = select(exports).where(exports.c.month == str(month)).order_by(exports.c.id.desc()).limit(1)
    export = connection.execute(newest.with_for_update() if locked else newest).first()
    if export is None or export.dropped_at is not None:
        again = " since it was dropped" if export else ""
        raise MonthRefused(f"{month} was not exported{again}", f"licet ledger export --month {month} --output FILE")
    here = count(connection, month) if exact else 0
    if exact and here + export.dropped != export.events:
        more = here + export.dropped - export.events
        raise MonthRefused(
            f"{month} has {more:,} events that came after it was exported",
            f"Export it again: licet ledger export --month {month} --output FILE",
        )
    return export


def _must_be_closed(month: Month, now_us: int) -> None:
    if not is_closed(month, now_us):
        days = CLOSED_AFTER_US // (24 * 3_600 * 1_000_000)
        raise MonthRefused(f"{month} is not closed", f"A month is closed {days} days after its end (UTC).")


def _count_dropped(connection: Connection, month: Month, export: int, gone: dict[int, int]) -> None:
    rows = [{"month": str(month), "log": log, "events": number} for log, number in sorted(gone.items()) if number]
    if not rows:
        return
    statement = upsert(connection, dropped)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["month", "log"], set_={"events": dropped.c.events + statement.excluded.events}
        ),
        rows,
    )
    total = sum(gone.values())
    connection.execute(update(exports).where(exports.c.id == export).values(dropped=exports.c.dropped + total))


def _parts(ranges: Sequence[Sequence[int]]) -> Iterator[Range]:
    for log, first, last in ranges:
        for start in range(first, last + 1, PART_SEQS):
            yield log, start, min(start + PART_SEQS - 1, last)


def _in(month: Month) -> ColumnElement[bool]:
    return and_(events.c.at >= month.start_us, events.c.at < month.end_us)
