"""Which of several control planes on one database publishes: a lease that its holder renews, by the database's clock.

A holder that was paused may go on for a moment after another took over. What it does then changes nothing: documents
are replaced only by newer ones, entries of the stream are numbered, and marks are changed only under their epoch.
Source: ``docs/adr/0026-one-of-several-control-planes-publishes.md``.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, func, select, update

from licet_control_plane.store import meta
from licet_control_plane.store.database import POSTGRESQL, upsert
from licet_control_plane.store.schema import META_ID, publisher_lease

LEASE_S: Final = 15.0
"""As long as sidecars go without a head before anybody else publishes one."""


def take(connection: Connection, holder: str, *, now_us: int) -> str:
    """Take the lease, or renew it, unless somebody else has it. Returns who has it now."""
    row = connection.execute(select(publisher_lease).with_for_update()).first()
    now_us = _now_us(connection, now_us)
    if row is not None and row.holder != holder and row.ends_at > now_us:
        return str(row.holder)
    values = {"holder": holder, "ends_at": now_us + int(LEASE_S * 1_000_000)}
    statement = upsert(connection, publisher_lease).values(id=META_ID, **values)
    if row is None:
        # Two that find none: the first one has it.
        connection.execute(statement.on_conflict_do_nothing())
        return str(connection.scalar(select(publisher_lease.c.holder)))
    connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))
    return holder


def leads(connection: Connection, holder: str) -> bool:
    """Whether nobody took the lease from ``holder``; nobody can until the transaction ends."""
    return connection.scalar(select(publisher_lease.c.holder).with_for_update()) == holder


def note_run(connection: Connection, holder: str, run: str) -> None:
    """Remember the server whose contents were put right, if ``holder`` still has the lease: one that was paused put
    right only what it knew of.
    """
    if leads(connection, holder):
        meta.set_redis_run(connection, run)


def give_back(connection: Connection, holder: str) -> None:
    """Let somebody else have it at once, if ``holder`` has it."""
    connection.execute(update(publisher_lease).where(publisher_lease.c.holder == holder).values(ends_at=0))


def _now_us(connection: Connection, now_us: int) -> int:
    if connection.dialect.name != POSTGRESQL:
        return now_us  # one machine, one clock
    return int(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one() * 1_000_000)
