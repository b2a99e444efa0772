"""Break-glass overrides, as they were set and cleared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from licet.domain.approvals import Override, OverrideEffect
from licet_control_plane.store.schema import overrides as table


@dataclass(frozen=True, slots=True)
class StoredOverride:
    """An override, when it was set, and when (0: not) and by whom it was cleared before its end; microseconds."""

    override: Override
    set_at_us: int
    cleared_at_us: int
    cleared_by: str


def live(connection: Connection, now_us: int) -> tuple[Override, ...]:
    """Those in force, the first set first."""
    query = select(table).where(table.c.ends_at > now_us, table.c.cleared_at == 0).order_by(table.c.set_at, table.c.id)
    return tuple(_stored(row).override for row in connection.execute(query))


def get(connection: Connection, id_: str) -> StoredOverride | None:
    """One of them."""
    row = connection.execute(select(table).where(table.c.id == id_)).first()
    return _stored(row) if row else None


def newest(connection: Connection, limit: int) -> list[StoredOverride]:
    """The last set first, those that are over included."""
    rows = connection.execute(select(table).order_by(table.c.set_at.desc(), table.c.id.desc()).limit(limit))
    return [_stored(row) for row in rows]


def add(connection: Connection, override: Override, now_us: int) -> None:
    """Record one that is set."""
    connection.execute(
        insert(table).values(
            id=override.id,
            action=override.action,
            effect=override.effect.value,
            tenant=override.tenant,
            subject=override.subject,
            reason=override.reason,
            by=override.by,
            set_at=now_us,
            ends_at=override.ends_us,
            cleared_at=0,
            cleared_by="",
        )
    )


def clear(connection: Connection, id_: str, *, by: str, now_us: int) -> None:
    """Record that one is cleared."""
    connection.execute(update(table).where(table.c.id == id_).values(cleared_at=now_us, cleared_by=by))


def _stored(row: Row[Any]) -> StoredOverride:
    effect = OverrideEffect(row.effect)
    override = Override(row.id, row.action, effect, row.ends_at, row.reason, row.by, row.tenant, row.subject)
    return StoredOverride(override, row.set_at, row.cleared_at, row.cleared_by)
