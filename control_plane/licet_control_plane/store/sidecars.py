"""The registry of sidecars, as it is remembered over a restart of the control plane and a loss of Redis."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, delete, select

from licet.wire.documents import Heartbeat
from licet.wire.envelope import EnvelopeError
from licet_control_plane.core.fleet import LogMark, Sidecar
from licet_control_plane.store.database import upsert
from licet_control_plane.store.schema import sidecars

_US = 1_000_000
_DELETED_AT_ONCE = 500


def load(connection: Connection) -> list[Sidecar]:
    """Every sidecar ever heard of. One whose heartbeat this program cannot read is left out: it will be heard again."""
    found: list[Sidecar] = []
    for row in connection.execute(select(sidecars)):
        try:
            heartbeat = Heartbeat.unpack(row.heartbeat)
        except EnvelopeError:
            continue
        settled = LogMark(row.settled_seq, row.settled_at / _US)
        found.append(Sidecar(heartbeat, row.last_heard_at / _US, row.gone, settled))
    return found


def forget(connection: Connection, names: Collection[str]) -> None:
    """Remember these sidecars no more."""
    for start in range(0, len(names), _DELETED_AT_ONCE):
        some = list(names)[start : start + _DELETED_AT_ONCE]
        connection.execute(delete(sidecars).where(sidecars.c.sidecar.in_(some)))


def save(connection: Connection, changed: Collection[Sidecar]) -> None:
    """Remember these sidecars as they are now."""
    for sidecar in changed:
        values = {
            "last_heard_at": int(sidecar.last_heard_s * _US),
            "gone": sidecar.gone,
            "heartbeat": sidecar.heartbeat.pack(),
            "settled_seq": sidecar.settled.seq,
            "settled_at": int(sidecar.settled.at_s * _US),
        }
        statement = upsert(connection, sidecars).values(sidecar=sidecar.heartbeat.sidecar, **values)
        connection.execute(statement.on_conflict_do_update(index_elements=["sidecar"], set_=values))
