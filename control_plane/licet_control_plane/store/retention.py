"""Closed months leave the ledger: exported to a file first, then dropped, exactly the events that are in the file.

Watermarks, ranges, conflicts, sums and the registers' spend stay, so that nothing of a dropped month is taken again and
every bill stands. An event of that month that was never recorded is taken when it comes late; the month is then
exported and dropped once more. On PostgreSQL the month's partition goes; what is elsewhere is deleted in parts.

Nothing goes before the chain says so (``begin``), with the digest of the signed export and of the month's sums; and
``finish`` says there that everything is gone. Verifying takes no event for dropped that is in no such export.
Source: ``docs/adr/0025-months-of-the-ledger.md``, ``docs/adr/0028-what-leaves-the-ledger-is-in-its-chain.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, insert, or_, select, update

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.core.chain import Drop
from licet_control_plane.store import access, ledger, ledger_sums, meta, partitions, remnants
from licet_control_plane.store.database import POSTGRESQL
from licet_control_plane.store.exports import Export, digest_of, numbers_of
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.remnants import Unprovable
from licet_control_plane.store.schema import events, exports, logs

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


def record_export(connection: Connection, export: Export, *, by: str, now_us: int) -> None:
    """Note that a file with exactly these events is where it was wanted. ``export`` was verified.

    Raises:
        MonthRefused: it is not closed, or events came while it was exported.
    """
    month = Month.parse(export.month)
    _must_be_closed(month, now_us)
    if (here := count(connection, month)) != export.events:
        raise MonthRefused(f"{month} has {here:,} events, and the export {export.events:,}", "Export it again.")
    connection.execute(
        insert(exports).values(
            month=export.month,
            events=export.events,
            sha256=export.sha256,
            document=export.document,
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
        after={"events": export.events, "sha256": export.sha256},
        now_us=now_us,
    )


def begin(connection: Connection, month: Month, verifier: Verifier, *, now_us: int) -> list[Range]:
    """Say in the chain that the newest export of a month is being dropped; returns what is to be dropped, in parts of
    at most ``PART_SEQS``. May be repeated.

    Ledger transactions wait meanwhile: counting a million events takes some 100 ms.

    Raises:
        MonthRefused: it is not closed, not exported, its export is not what this deployment signed, it has events that
            the export has not, or the ledger lacks some already.
    """
    _must_be_closed(month, now_us)
    ledger.stand_still(connection)
    row = _newest(connection, month)
    export = _signed(connection, row, verifier)
    if row.begun_at is None:
        _must_be_exact(connection, month, row)
        query = select(exports).where(exports.c.begun_at.is_not(None)).order_by(exports.c.id)
        # Perhaps of a key that was replaced since: with other numbers than were dropped, a remnant proves nothing.
        gone = numbers_of(_signed(connection, one, None) for one in connection.execute(query).all())
        try:
            remnants.keep(connection, export.straddling, gone=gone, going=numbers_of([export]))
        except Unprovable as error:
            raise MonthRefused(f"{month} cannot be dropped: {error}", "See what it is: licet ledger verify") from error
        sums = ledger_sums.digest_of(ledger_sums.stored_in(connection, month))
        ledger.note_drop(connection, Drop(str(month), export.digest, sums, False), now_us=now_us)
        connection.execute(update(exports).where(exports.c.id == row.id).values(begun_at=now_us))
    numbers = {log_id: log for log, log_id in log_ids(connection).items()}
    ranges = [
        (numbers[log_id], *span) for log_id, spans in export.ranges.items() for span in spans if log_id in numbers
    ]
    return list(_parts(sorted(ranges)))


def drop_partition(connection: Connection, month: Month, *, now_us: int) -> None:
    """Drop the month's partition, when there is one. May be repeated.

    Raises:
        MonthRefused: it was not begun, or has events that the export has not.
    """
    if connection.dialect.name != POSTGRESQL or month.partition not in partitions.existing(connection):
        return
    partitions.lock_against_writers(connection)
    export = _begun(connection, month, now_us)
    _must_be_exact(connection, month, export)
    table = f'"{month.partition}"'
    here = connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()  # noqa: S608  # own name
    _count_dropped(connection, export.id, int(here))
    connection.exec_driver_sql(f"DROP TABLE {table}")


def drop_part(connection: Connection, month: Month, parts: Sequence[Range], *, now_us: int) -> int:
    """Delete some of what ``begin`` named; returns how many events that were. May be repeated.

    Raises:
        MonthRefused: not begun, or dropped meanwhile.
    """
    export = _begun(connection, month, now_us)
    gone = 0
    for log, first, last in parts:
        done = connection.execute(
            delete(events).where(events.c.log == log, events.c.seq.between(first, last), _in(month))
        )
        gone += done.rowcount
    _count_dropped(connection, export.id, gone)
    return gone


def finish(connection: Connection, month: Month, *, by: str, now_us: int) -> int:
    """Note, in the chain too, that all of the export is gone; returns how many events that were.

    Raises:
        MonthRefused: not begun, or dropped meanwhile.
    """
    ledger.stand_still(connection)
    export = _begun(connection, month, now_us)
    ledger.note_drop(connection, Drop(str(month), digest_of(bytes(export.document)), b"", True), now_us=now_us)
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


def dropped_by_month(connection: Connection) -> dict[Month, int]:
    """Events that are no longer here, by month."""
    total = func.sum(exports.c.dropped)
    rows = connection.execute(
        select(exports.c.month, total).group_by(exports.c.month).having(total > 0).order_by(exports.c.month)
    )
    return {Month.parse(month): int(number) for month, number in rows}


def _newest(connection: Connection, month: Month) -> Row[Any]:
    """The newest export of a month, locked."""
    newest = select(exports).where(exports.c.month == str(month)).order_by(exports.c.id.desc()).limit(1)
    export = connection.execute(newest.with_for_update()).first()
    if export is None or export.dropped_at is not None:
        again = " since it was dropped" if export else ""
        raise MonthRefused(f"{month} was not exported{again}", _export_it(month))
    return export


def _begun(connection: Connection, month: Month, now_us: int) -> Row[Any]:
    _must_be_closed(month, now_us)
    export = _newest(connection, month)
    if export.begun_at is None:
        raise MonthRefused(f"{month} was exported anew meanwhile", "Drop it again.")
    return export


def _signed(connection: Connection, row: Row[Any], verifier: Verifier | None) -> Export:
    """What was signed of an export, and not what its row says."""
    month = Month.parse(row.month)
    try:
        export = Export.of(bytes(row.document), row.month, verifier)
    except VerificationError as error:
        raise MonthRefused(f"the export of {month} counts no more: {error}", _export_it(month)) from error
    if export.deployment != meta.read(connection).deployment:
        raise MonthRefused(f"the export of {month} is of deployment {export.deployment}", _export_it(month))
    return export


def _must_be_exact(connection: Connection, month: Month, export: Row[Any]) -> None:
    more = count(connection, month) + export.dropped - export.events
    if more > 0:
        raise MonthRefused(
            f"{month} has {more:,} events that came after it was exported", f"Export it again: {_export_it(month)}"
        )
    if more < 0:
        raise MonthRefused(f"{month} lacks {-more:,} events of its export", "See which: licet ledger verify")


def _export_it(month: Month) -> str:
    return f"licet ledger export --month {month} --output FILE"


def _must_be_closed(month: Month, now_us: int) -> None:
    if not is_closed(month, now_us):
        days = CLOSED_AFTER_US // (24 * 3_600 * 1_000_000)
        raise MonthRefused(f"{month} is not closed", f"A month is closed {days} days after its end (UTC).")


def _count_dropped(connection: Connection, export: int, gone: int) -> None:
    connection.execute(update(exports).where(exports.c.id == export).values(dropped=exports.c.dropped + gone))


def _parts(ranges: Sequence[Sequence[int]]) -> Iterator[Range]:
    for log, first, last in ranges:
        for start in range(first, last + 1, PART_SEQS):
            yield log, start, min(start + PART_SEQS - 1, last)


def _in(month: Month) -> ColumnElement[bool]:
    return and_(events.c.at >= month.start_us, events.c.at < month.end_us)
