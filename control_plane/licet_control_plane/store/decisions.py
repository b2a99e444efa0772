"""Recorded decisions one by one, tenant by tenant, in the order of their time: for whoever reads them all.

Reads only. Bounded for each call, whatever the ledger holds: it goes from tenant to tenant through the index.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select, tuple_

from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.event_reports import Recorded
from licet_control_plane.store.ledger import READABLE
from licet_control_plane.store.schema import events, logs
from licet_control_plane.store.subjects import EventReader

TENANTS_MAX: Final = 1_000
"""Tenants without a decision in the range that one call passes over."""


class Cursor(NamedTuple):
    """The last decision that was read."""

    tenant: str
    at_us: int
    log: int
    seq: int


def page(
    connection: Connection,
    ledger_key: LedgerKey,
    *,
    from_us: int,
    to_us: int,
    tenant: str,
    after: Cursor | None,
    limit: int,
) -> tuple[list[Recorded], Cursor | None]:
    """Decisions made in ``[from_us, to_us)``, by tenant and time, and where to go on (``None``: that was all).

    ``tenant`` keeps to one. A page may be empty and still not be the last. What is personal in events of erased
    subjects is not there.
    """
    reader = EventReader(connection, ledger_key)
    found: list[Recorded] = []
    cursor = after
    for _ in range(TENANTS_MAX):
        if cursor is None or cursor.at_us >= to_us:
            name = _next_tenant(connection, cursor.tenant if cursor else "", tenant)
            if name is None:
                return found, None
            cursor = Cursor(name, from_us, 0, 0)
        wanted = limit - len(found)
        rows: Any = connection.execute(
            select(*READABLE, events.c.at, events.c.seq, logs.c.log_id, logs.c.decision_prefix)
            .join(logs, logs.c.log == events.c.log)
            .where(
                events.c.tenant == cursor.tenant,
                events.c.at >= cursor.at_us,
                events.c.at < to_us,
                tuple_(events.c.at, events.c.log, events.c.seq) > cursor[1:],
            )
            .order_by(events.c.at, events.c.log, events.c.seq)
            .limit(wanted)
        ).all()
        opened = reader.read([row[: len(READABLE)] for row in rows])
        found += [
            Recorded(row.log_id, bytes(row.decision_prefix), event) for row, event in zip(rows, opened, strict=True)
        ]
        if len(rows) == wanted:
            return found, Cursor(cursor.tenant, rows[-1].at, rows[-1].log, rows[-1].seq)
        cursor = Cursor(cursor.tenant, to_us, 0, 0)
    return found, cursor


def count(connection: Connection, *, from_us: int, to_us: int, tenant: str) -> int:
    """How many there are."""
    query = select(func.count()).select_from(events).where(events.c.at >= from_us, events.c.at < to_us)
    return connection.scalar(query.where(events.c.tenant == tenant) if tenant else query) or 0


def _next_tenant(connection: Connection, after: str, only: str) -> str | None:
    if only:
        return only if after < only else None
    found: str | None = connection.scalar(select(func.min(events.c.tenant)).where(events.c.tenant > after))
    return found
