"""Events that came again under the same number with other content: what is recorded, and what came instead.

Reads only. The ledger transaction writes them, and nothing takes them away: they are evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, select, tuple_

from licet.wire.usage import UsageEvent
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.ledger import READABLE
from licet_control_plane.store.schema import conflicts, events, logs
from licet_control_plane.store.subjects import EventReader


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


def page(connection: Connection, ledger_key: LedgerKey, *, after: ConflictKey, limit: int) -> list[Conflict]:
    """Conflicts after ``after``, by log, number and digest.

    Raises:
        Damaged: a row was altered.
    """
    columns = conflicts.c.log, conflicts.c.seq, conflicts.c.digest
    query = select(conflicts).where(tuple_(*columns) > tuple_(*after)).order_by(*columns).limit(limit)
    return _read(EventReader(connection, ledger_key), connection.execute(query).all())


def of(
    connection: Connection, ledger_key: LedgerKey, log_id: str, seq: int
) -> tuple[UsageEvent | None, list[Conflict]]:
    """The event that is recorded under a number, and everything else that came under it.

    Raises:
        Damaged: a row was altered.
    """
    reader = EventReader(connection, ledger_key)
    log = connection.scalar(select(logs.c.log).where(logs.c.log_id == log_id))
    query = select(conflicts).where(conflicts.c.log == log, conflicts.c.seq == seq).order_by(conflicts.c.digest)
    found = _read(reader, connection.execute(query).all())
    stored = connection.execute(select(*READABLE).where(events.c.log == log, events.c.seq == seq)).all()
    return next(iter(reader.read(stored)), None), found


def differences(recorded: UsageEvent, came: UsageEvent) -> Sequence[str]:
    """Names of the fields that are not the same."""
    pairs = zip(UsageEvent._fields, recorded, came, strict=True)
    return [name for name, one, other in pairs if one != other]


def _read(reader: EventReader, rows: Sequence[Row[Any]]) -> list[Conflict]:
    readable = [_Readable(row.log, row.subject, row.public, row.commitment, row.personal) for row in rows]
    return [
        Conflict(ConflictKey(row.log, row.seq, row.digest), reader.log_id(row.log), row.at, came)
        for row, came in zip(rows, reader.read(readable), strict=True)
    ]


class _Readable(NamedTuple):
    """The columns of ``READABLE``."""

    log: int
    subject: int
    public: bytes
    commitment: bytes
    personal: bytes | None
