"""API keys, of which only the hashes are kept, and the audit trail of what was done with them.

``record`` adds an entry to the trail in the transaction that makes the change, last of all: it locks the trail's head,
and whoever holds that lock asks for no other. Who acts, and from where, it takes from ``acting``, which the API sets
for each request; so no function in between carries it.
"""

from __future__ import annotations

import hmac
import json
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, Row, insert, or_, select, update

from licet_control_plane.core.access import Role, hash_of, key_id_of
from licet_control_plane.core.audit_chain import Entry
from licet_control_plane.core.audit_chain import hash_of as hash_of_entry
from licet_control_plane.store.schema import api_keys, audit, audit_head

ADMIN: Final = Role.ADMIN.value
SIDECAR: Final = Role.SIDECAR.value
"""The role of sidecars: it reads what any sidecar may read and hands usage in, and nothing else."""

USED_EVERY_US: Final = 60_000_000
"""How exact ``last_used_at`` is: a write for each request would cost more than the request."""


class KeyNameTaken(Exception):
    """Another key has the name; the argument is the name."""


class KeyUnknown(Exception):
    """There is no such key; the argument is what was asked for."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. ``tenant``: the only one it reaches, empty for all. Times in microseconds.

    A key that was revoked or has expired stays in the list, for the audit trail names it.
    """

    id: str
    name: str
    role: str
    tenant: str
    hash: str
    created_at_us: int
    created_by: str
    expires_at_us: int | None
    revoked_at_us: int | None
    last_used_at_us: int | None

    def is_admitted(self, now_us: int) -> bool:
        """Whether it opens anything now."""
        return self.revoked_at_us is None and (self.expires_at_us is None or now_us < self.expires_at_us)


@dataclass(frozen=True, slots=True)
class Origin:
    """By what means, and from where, somebody acts. The default is the program itself."""

    via: str = "system"
    credential: str = ""
    address: str = ""
    request: str = ""
    tenant: str = ""


_PROGRAM: Final = Origin()
acting: Final[ContextVar[Origin]] = ContextVar("acting", default=_PROGRAM)
"""Of the request that is being answered. The database takes it along into its threads."""


def add_key(
    connection: Connection,
    *,
    name: str,
    role: str,
    key: str,
    now_us: int,
    tenant: str = "",
    expires_at_us: int | None = None,
    by: str = "licet server",
) -> ApiKey:
    """Admit a key, without an entry in the audit trail: see ``create_key``.

    Raises:
        KeyNameTaken: another one has the name, revoked ones included: the audit trail would be ambiguous.
    """
    if connection.execute(select(api_keys.c.id).where(api_keys.c.name == name)).first() is not None:
        raise KeyNameTaken(name)
    added = ApiKey(
        key_id_of(key) or hash_of(key)[:12], name, role, tenant, hash_of(key), now_us, by, expires_at_us, None, None
    )
    connection.execute(
        insert(api_keys).values(
            key_id=added.id,
            name=name,
            role=role,
            tenant=tenant,
            hash=added.hash,
            created_at=now_us,
            created_by=by,
            expires_at=expires_at_us,
        )
    )
    return added


def create_key(
    connection: Connection,
    *,
    name: str,
    role: str,
    key: str,
    now_us: int,
    by: str,
    tenant: str = "",
    expires_at_us: int | None = None,
) -> ApiKey:
    """``add_key``, with its entry in the audit trail."""
    added = add_key(
        connection,
        name=name,
        role=role,
        key=key,
        now_us=now_us,
        tenant=tenant,
        expires_at_us=expires_at_us,
        by=by,
    )
    record(
        connection,
        by=by,
        action="api_key.create",
        target=name,
        before=None,
        after=_shown(added),
        now_us=now_us,
        tenant=tenant,
    )
    return added


def revoke_key(connection: Connection, asked: str, *, by: str, now_us: int) -> ApiKey:
    """Revoke a key by its id or its name; one that is revoked stays as it is.

    Raises:
        KeyUnknown: there is none.
    """
    rows = connection.execute(
        select(api_keys).where(or_(api_keys.c.key_id == asked, api_keys.c.name == asked)).with_for_update()
    )
    # An id wins over a name that looks like one.
    found = sorted(map(_key, rows), key=lambda key: key.id != asked)
    if not found:
        raise KeyUnknown(asked)
    old = found[0]
    if old.revoked_at_us is not None:
        return old
    connection.execute(update(api_keys).where(api_keys.c.key_id == old.id).values(revoked_at=now_us))
    new = replace(old, revoked_at_us=now_us)
    record(
        connection,
        by=by,
        action="api_key.revoke",
        target=old.name,
        before=_shown(old),
        after=_shown(new),
        now_us=now_us,
        tenant=old.tenant,
    )
    return new


def keys(connection: Connection) -> list[ApiKey]:
    """Every key there ever was, the oldest first."""
    return [_key(row) for row in connection.execute(select(api_keys).order_by(api_keys.c.id))]


def find(connection: Connection, key: str, *, now_us: int) -> ApiKey | None:
    """The key with this text, if it is admitted now.

    It is looked up by its hash, which tells whoever measures nothing about the key, and compared in constant time.
    """
    digest = hash_of(key)
    row = connection.execute(select(api_keys).where(api_keys.c.hash == digest)).first()
    found = _key(row) if row is not None else None
    if found is None or not hmac.compare_digest(found.hash, digest) or not found.is_admitted(now_us):
        return None
    return found


def note_use(connection: Connection, id_: str, *, now_us: int) -> None:
    """Note that a key was used."""
    connection.execute(update(api_keys).where(api_keys.c.key_id == id_).values(last_used_at=now_us))


def record(
    connection: Connection,
    *,
    by: str,
    action: str,
    target: str,
    before: Any,
    after: Any,
    now_us: int,
    tenant: str | None = None,
) -> int:
    """Add to the audit trail, in the transaction that makes the change. ``before`` and ``after`` as JSON has them.

    ``tenant``: whom it is about; ``None`` for the one that the request is about. Returns the entry's number.
    """
    origin = acting.get()
    head = connection.execute(select(audit_head).with_for_update()).one()
    entry = Entry(
        number=head.number + 1,
        at_us=now_us,
        by=by,
        via=origin.via,
        credential=origin.credential,
        address=origin.address,
        request=origin.request,
        action=action,
        target=target,
        tenant=origin.tenant if tenant is None else tenant,
        before=json.dumps(before),
        after=json.dumps(after),
        previous=bytes(head.hash),
    )
    hash_ = hash_of_entry(entry)
    values = {name: getattr(entry, name) for name in Entry.__slots__}
    values["at"] = values.pop("at_us")
    connection.execute(insert(audit).values(**values, hash=hash_))
    connection.execute(update(audit_head).values(number=entry.number, hash=hash_))
    return entry.number


def _shown(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "role": key.role,
        "tenant": key.tenant,
        "expires_at_us": key.expires_at_us,
        "revoked_at_us": key.revoked_at_us,
    }


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        row.key_id,
        row.name,
        row.role,
        row.tenant,
        row.hash,
        row.created_at,
        row.created_by,
        row.expires_at,
        row.revoked_at,
        row.last_used_at,
    )
