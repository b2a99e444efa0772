"""Events that came again under the same number with other content: what is recorded, and what came instead.

Reads only. The ledger transaction writes them, and nothing takes them away: they are evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Select, select, tuple_

from licet.wire.usage import UsageEvent, unpack_event
from licet_control_plane.store.schema import conflicts, events, logs


class ConflictKey(NamedTuple):
    """Where a conflict stands among the others: by log, number, and what came."""

    log: int = 0
    seq: int = 0
    digest: str = ""


class Conflict(NamedTuple):
    """One event that came instead of the recorded one. ``at_us`` is when it came."""

    key: ConflictKey
    log_id: str
    at_us: int
    came: UsageEvent


def page(connection: Connection, *, after: ConflictKey, limit: int) -> list[Conflict]:
    """Conflicts after ``after``, by log, number and digest."""
    columns = conflicts.c.log, conflicts.c.seq, conflicts.c.digest
    query = _with_log().where(tuple_(*columns) > tuple_(*after)).order_by(*columns).limit(limit)
    return [_conflict(row) for row in connection.execute(query)]


def of(connection: Connection, log_id: str, seq: int) -> tuple[UsageEvent | None, list[Conflict]]:
    """The event that is recorded under a number, and everything else that came under it."""
    query = _with_log().where(logs.c.log_id == log_id, conflicts.c.seq == seq).order_by(conflicts.c.digest)
    found = [_conflict(row) for row in connection.execute(query)]
    recorded = select(events.c.body).join(logs, logs.c.log == events.c.log)
    body = connection.scalar(recorded.where(logs.c.log_id == log_id, events.c.seq == seq))
    return (None if body is None else unpack_event(bytes(body))), found


def differences(recorded: UsageEvent, came: UsageEvent) -> Sequence[str]:
    """Names of the fields that are not the same."""
    pairs = zip(UsageEvent._fields, recorded, came, strict=True)
    return [name for name, one, other in pairs if one != other]


def _with_log() -> Select[Any]:
    return select(conflicts, logs.c.log_id).join(logs, logs.c.log == conflicts.c.log)


def _conflict(row: Row[Any]) -> Conflict:
    return Conflict(ConflictKey(row.log, row.seq, row.digest), row.log_id, row.at, unpack_event(bytes(row.body)))
