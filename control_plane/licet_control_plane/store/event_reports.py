"""The events one by one: all of them, in pages that follow on each other, and the newest as they come.

Reads only. Nothing here knows the order in which events were recorded, and nothing needs to: an event is never changed,
its log and its number name it for good, and up to the last recorded number a log stands still, but for gaps that fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, Select, func, literal, select, tuple_

from licet.wire.usage import UsageEvent
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.ledger import READABLE
from licet_control_plane.store.schema import events, logs, ranges
from licet_control_plane.store.subjects import EventReader
from licet_control_plane.store.usage_reports import ALWAYS, Interval

SCAN_MAX: Final = 50_000
"""Numbers that one page looks through when few of them are wanted: so it is answered in a fraction of a second."""
RECENT_US: Final = 3_600 * 1_000_000
"""The newest events are looked for in logs that had one so long before the newest of all, and then followed there."""
_KEY: Final = (events.c.log, events.c.seq)
_READABLE: Final = tuple(column.name for column in READABLE)


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events; empty and 0 for any. Times are exact here."""

    tenant: str = ""
    action: str = ""
    effect: int = 0
    reason: int = 0
    interval: Interval = ALWAYS

    def conditions(self) -> list[ColumnElement[bool]]:
        """As SQL has it."""
        given: list[tuple[ColumnElement[Any], str | int]] = [
            (events.c.tenant, self.tenant),
            (events.c.action, self.action),
            (events.c.effect, self.effect),
            (events.c.reason, self.reason),
        ]
        where = [column == value for column, value in given if value]
        if self.interval.from_us:
            where.append(events.c.at >= self.interval.from_us)
        if self.interval.to_us is not None:
            where.append(events.c.at < self.interval.to_us)
        return where


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event as the ledger has it."""

    log_id: str
    decision_prefix: bytes
    event: UsageEvent


# All of them


@dataclass(frozen=True, slots=True)
class Place:
    """Where a reading of all events is: ``seq`` of ``log``, of which it reads up to ``end``. ``last_log``: the newest
    there was when it began. ``at_us`` is for the events of one tenant, which are read by time.
    """

    last_log: int
    log: int = 0
    end: int = 0
    seq: int = 0
    at_us: int = -1

    def __str__(self) -> str:
        return f"{self.last_log}.{self.log}.{self.end}.{self.seq}.{self.at_us}"

    @classmethod
    def parse(cls, written: str) -> Place:
        """The inverse of ``str``.

        Raises:
            ValueError: it is none.
        """
        last_log, log, end, seq, at_us = map(int, written.split("."))
        return cls(last_log, log, end, seq, at_us)


def begin(connection: Connection) -> Place:
    """The place before the first event."""
    return Place(connection.scalar(select(func.max(logs.c.log))) or 0)


def page(
    connection: Connection, ledger_key: LedgerKey, which: EventFilter, place: Place, *, limit: int
) -> tuple[list[Recorded], Place | None]:
    """The next events of a reading, which may be none, and where to go on; ``None`` at its end.

    However long it takes, a reading has every event once that was recorded when it began; of those that are recorded
    meanwhile, some. Events of one tenant are in order of time, others by log. Every log, and ``which.interval``, ends.
    """
    if which.tenant:
        return _page_of_tenant(connection, ledger_key, which, place, limit)
    rows: list[Row[Any]] = []
    scanned = 0
    while len(rows) < limit and scanned < SCAN_MAX:
        if place.seq >= place.end:
            following = _next_log(connection, which, place)
            if following is None:
                return _recorded(connection, ledger_key, rows), None
            place = following
        until = min(place.end, place.seq + SCAN_MAX - scanned)
        found = _of_log(connection, which, place.log, place.seq, until, limit - len(rows))
        rows += found
        reached = found[-1].seq if len(rows) == limit else until
        scanned += reached - place.seq
        place = replace(place, seq=reached)
    return _recorded(connection, ledger_key, rows), place


def _page_of_tenant(
    connection: Connection, ledger_key: LedgerKey, which: EventFilter, place: Place, limit: int
) -> tuple[list[Recorded], Place | None]:
    after = tuple_(events.c.at, *_KEY) > tuple_(literal(place.at_us), literal(place.log), literal(place.seq))
    query = _events(which).where(after, events.c.log <= place.last_log).order_by(events.c.at, *_KEY).limit(limit)
    rows = connection.execute(query).all()
    if len(rows) < limit:
        return _recorded(connection, ledger_key, rows), None
    last = rows[-1]
    return _recorded(connection, ledger_key, rows), replace(place, at_us=last.at, log=last.log, seq=last.seq)


def _next_log(connection: Connection, which: EventFilter, place: Place) -> Place | None:
    """The beginning of the next log that may have such events, and its end as of now."""
    log = connection.scalar(
        select(func.min(logs.c.log)).where(
            logs.c.log > place.log, logs.c.log <= place.last_log, logs.c.last_at >= which.interval.from_us
        )
    )
    return replace(place, log=log, end=_ends(connection, logs.c.log == log).get(log, 0), seq=0) if log else None


# As they come

Ends = Mapping[int, int]
"""How far each log is, or was read: its highest number, by the log's own number."""


def newest(
    connection: Connection, ledger_key: LedgerKey, which: EventFilter, *, limit: int
) -> tuple[list[Recorded], Ends]:
    """The newest events, oldest first, and where the logs are that may go on."""
    ends = _recent_ends(connection)
    if not limit:
        return [], ends
    if which.tenant:
        query = _events(which).order_by(events.c.at.desc(), events.c.log.desc(), events.c.seq.desc()).limit(limit)
        rows = list(connection.execute(query))
    else:
        rows = []
        for log, end in ends.items():
            query = _events(which).where(events.c.log == log, events.c.seq <= end, events.c.seq > end - SCAN_MAX)
            rows += connection.execute(query.order_by(events.c.seq.desc()).limit(limit))
    rows.sort(key=lambda row: (row.at, row.log, row.seq))
    return _recorded(connection, ledger_key, rows[-limit:]), ends


def following(
    connection: Connection, ledger_key: LedgerKey, which: EventFilter, ends: Ends, *, limit: int
) -> tuple[list[Recorded], Ends]:
    """The events that were recorded since, by time, and where the logs are then.

    For looking on: what fills a gap in a log that was read past is not among them.
    """
    rows: list[Row[Any]] = []
    read: dict[int, int] = {}
    for log, end in _recent_ends(connection).items():
        start = ends.get(log, 0)
        until = min(end, start + SCAN_MAX)
        found = _of_log(connection, which, log, start, until, limit - len(rows)) if start < until else []
        rows += found
        # Nothing of it was read when there was no room left.
        read[log] = until if len(rows) < limit else found[-1].seq if found else min(start, end)
    rows.sort(key=lambda row: (row.at, row.log, row.seq))
    return _recorded(connection, ledger_key, rows), read


def _recent_ends(connection: Connection) -> dict[int, int]:
    last_us = connection.scalar(select(func.max(logs.c.last_at))) or 0
    return _ends(connection, logs.c.last_at >= last_us - RECENT_US)


def _ends(connection: Connection, which: ColumnElement[bool]) -> dict[int, int]:
    """The highest recorded number of each of some logs."""
    above = select(ranges.c.log, func.max(ranges.c.last_seq).label("last_seq")).group_by(ranges.c.log).subquery()
    query = select(logs.c.log, logs.c.watermark, above.c.last_seq).outerjoin(above, above.c.log == logs.c.log)
    rows = connection.execute(query.where(which).order_by(logs.c.log))
    return {log: max(watermark, last_seq or 0) for log, watermark, last_seq in rows}


def _of_log(
    connection: Connection, which: EventFilter, log: int, after: int, until: int, limit: int
) -> Sequence[Row[Any]]:
    query = _events(which).where(events.c.log == log, events.c.seq > after, events.c.seq <= until)
    return connection.execute(query.order_by(events.c.seq).limit(limit)).all()


def _events(which: EventFilter) -> Select[Any]:
    columns = {column.name: column for column in (*_KEY, events.c.at, *READABLE)}
    return select(*columns.values()).where(*which.conditions())


def _recorded(connection: Connection, ledger_key: LedgerKey, rows: Sequence[Row[Any]]) -> list[Recorded]:
    of_logs = connection.execute(
        select(logs.c.log, logs.c.log_id, logs.c.decision_prefix).where(logs.c.log.in_({row.log for row in rows}))
    )
    known = {row.log: (row.log_id, bytes(row.decision_prefix)) for row in of_logs}
    opened = EventReader(connection, ledger_key).read([[getattr(row, name) for name in _READABLE] for row in rows])
    return [Recorded(*known[row.log], event) for row, event in zip(rows, opened, strict=True)]
