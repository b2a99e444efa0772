"""Which tenants have a mark in Redis, written before Redis is: the difference between new and lost."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, insert, select, update

from licet_control_plane.store.schema import marks


def intend(connection: Connection, tenants: Collection[str], *, now_us: int) -> set[str]:
    """Note that marks of these tenants are about to be made. Returns those that were never made before."""
    known = set(connection.scalars(select(marks.c.tenant).where(marks.c.tenant.in_(list(tenants)))))
    new = set(tenants) - known
    if new:
        connection.execute(
            insert(marks), [{"tenant": tenant, "learning": False, "created_at": now_us} for tenant in sorted(new)]
        )
    return new


def page(connection: Connection, *, after: str, limit: int) -> list[str]:
    """Tenants with a mark, ascending, after ``after``."""
    return list(
        connection.scalars(select(marks.c.tenant).where(marks.c.tenant > after).order_by(marks.c.tenant).limit(limit))
    )


def set_learning(connection: Connection, tenants: Collection[str], learning: bool) -> None:
    """Note which marks are in learning, so that a restarted control plane opens them; at most a few hundred."""
    if tenants:
        connection.execute(update(marks).where(marks.c.tenant.in_(list(tenants))).values(learning=learning))


def set_all_learning(connection: Connection) -> None:
    """Every mark is, or is about to be, in learning."""
    connection.execute(update(marks).values(learning=True))


def learning(connection: Connection) -> list[str]:
    """Tenants whose mark is in learning: all of them, after a loss."""
    return list(connection.scalars(select(marks.c.tenant).where(marks.c.learning).order_by(marks.c.tenant)))
