"""API keys, of which only the hashes are kept, and the audit trail of what was done with them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, insert, select

from licet_control_plane.store.schema import api_keys, audit

ADMIN: Final = "admin"
SIDECAR: Final = "sidecar"
"""The role of sidecars: it reads what any sidecar may read and hands usage in, and nothing else."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key's name, role and SHA-256 (hex)."""

    name: str
    role: str
    hash: str


def hash_of(key: str) -> str:
    """SHA-256, hex. A key is 256 random bits, so nothing slower is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def add_key(connection: Connection, *, name: str, role: str, key: str, now_us: int) -> None:
    """Admit a key."""
    connection.execute(insert(api_keys).values(name=name, role=role, hash=hash_of(key), created_at=now_us))


def keys(connection: Connection) -> list[ApiKey]:
    """The keys that are admitted."""
    rows = connection.execute(select(api_keys).where(api_keys.c.revoked_at.is_(None)).order_by(api_keys.c.id))
    return [ApiKey(row.name, row.role, row.hash) for row in rows]


def record(
    connection: Connection,
    *,
    by: str,
    action: str,
    target: str,
    before: Any,
    after: Any,
    now_us: int,
) -> None:
    """Add to the audit trail, in the transaction that makes the change. ``before`` and ``after`` as JSON has them."""
    connection.execute(
        insert(audit).values(
            at=now_us, by=by, action=action, target=target, before=json.dumps(before), after=json.dumps(after)
        )
    )
