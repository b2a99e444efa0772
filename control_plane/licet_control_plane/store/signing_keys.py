"""Keys that sign what is published, and signing anew what another key signed.

Two are valid at once at most: ``next`` and ``active``, or ``active`` and ``previous``. The row of the active one is
locked by whoever changes that; ``meta.lock`` comes before it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, Row, insert, select, update

from licet.domain.catalog_wire import license_to_wire
from licet.wire.documents import BUNDLE, BUNDLE_KEY, LICENSE, Manifest
from licet.wire.signing import SigningKey, signed_with
from licet_control_plane.core.sealed_events import NONCE_BYTES
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import access, bundles, licenses, meta, overrides, revisions
from licet_control_plane.store.schema import licenses as license_table
from licet_control_plane.store.schema import signing_keys

NEXT: Final = "next"
ACTIVE: Final = "active"
PREVIOUS: Final = "previous"
RETIRED: Final = "retired"
SLICE: Final = 200
"""Licenses that are signed anew in one transaction: others that change something wait for it."""
BY: Final = "signing-key rotate"


class KeyStateRefused(Exception):
    """The keys are in no state for it. ``fix`` says what comes first."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key, with its private half as it is stored. Times in microseconds."""

    id: str
    public_key: str
    private: bytes | None
    state: str
    created_at_us: int
    activated_at_us: int | None
    resigned_at_us: int | None
    retired_at_us: int | None

    def opened(self, ledger_key: LedgerKey) -> SigningKey:
        """The key itself.

        Raises:
            Damaged: it was altered, or wrapped with another ledger key.
        """
        assert self.private is not None
        return SigningKey.from_private_bytes(ledger_key.unwrap(self.private, _tag(self.public_key)))


def stored(connection: Connection) -> list[StoredKey]:
    """Every key there ever was, the oldest first."""
    rows = connection.execute(select(signing_keys).order_by(signing_keys.c.created_at, signing_keys.c.key_id))
    return [_key(row) for row in rows]


def add(
    connection: Connection,
    key: SigningKey,
    ledger_key: LedgerKey,
    *,
    state: str = NEXT,
    by: str,
    now_us: int,
    audited: bool = True,
) -> StoredKey:
    """Keep a key: as the next one, or at once as the active one. ``audited``: with an entry in the audit trail.

    Raises:
        KeyStateRefused: two keys are valid already.
    """
    valid = [one for one in _locked(connection) if one.state in (NEXT, PREVIOUS)]
    if valid and state == NEXT:
        raise KeyStateRefused(
            f"Two keys are valid already: {valid[0].id} is the {valid[0].state} one.",
            "Go on with licet signing-key rotate, or retire that one first.",
        )
    wrapped = ledger_key.wrap(key.private_bytes(), _tag(key.public_key), secrets.token_bytes(NONCE_BYTES))
    active_us = now_us if state == ACTIVE else None
    added = StoredKey(key.key_id, key.public_key, wrapped, state, now_us, active_us, active_us, None)
    connection.execute(
        insert(signing_keys).values(
            key_id=added.id,
            public_key=added.public_key,
            private=wrapped,
            state=state,
            created_at=now_us,
            activated_at=active_us,
            resigned_at=active_us,
        )
    )
    if audited:
        _record(connection, "signing_key.generate", added, None, {"state": state}, by=by, now_us=now_us)
    return added


def adopt(connection: Connection, key: SigningKey, ledger_key: LedgerKey, *, by: str, now_us: int) -> None:
    """Sign with a key that the database does not know, as it was restored from a backup that is older."""
    for one in _locked(connection):
        if one.state in (NEXT, ACTIVE):
            _set(connection, one.id, state=PREVIOUS)
    add(connection, key, ledger_key, state=ACTIVE, by=by, now_us=now_us)
    _set(connection, key.key_id, resigned_at=None)


def activate(connection: Connection, *, by: str, now_us: int) -> StoredKey:
    """Sign with the next key from now on; the active one becomes the previous one. What it signed is to be signed anew.

    Raises:
        KeyStateRefused: there is no next one.
    """
    meta.lock(connection)  # nobody is in the middle of a change that the other key signs
    keys = {one.state: one for one in _locked(connection) if one.state != RETIRED}
    if NEXT not in keys:
        raise KeyStateRefused(
            "There is no next key.",
            "Make one with licet signing-key generate, and give its public half to the sidecars first.",
        )
    made = replace(keys[NEXT], state=ACTIVE, activated_at_us=now_us)
    _set(connection, keys[ACTIVE].id, state=PREVIOUS)
    _set(connection, made.id, state=ACTIVE, activated_at=now_us)
    before = {"active": keys[ACTIVE].id}
    _record(connection, "signing_key.rotate", made, before, {"active": made.id}, by=by, now_us=now_us)
    return made


def retire(connection: Connection, id_: str, *, by: str, now_us: int) -> StoredKey:
    """Destroy the private half of a key that is not active.

    Raises:
        KeyStateRefused: there is no such key, it is active, or documents that are in force are signed with it.
    """
    keys = {one.id: one for one in _locked(connection)}
    key, active = keys.get(id_), next(one for one in keys.values() if one.state == ACTIVE)
    if key is None:
        raise KeyStateRefused(f"There is no key {id_!r}.", "licet signing-key list shows them.")
    if key.state == ACTIVE:
        raise KeyStateRefused(f"{id_} is the active key.", "Rotate first: then it is the previous one.")
    if key.state == RETIRED:
        return key
    if key.state == PREVIOUS and active.resigned_at_us is None:
        raise KeyStateRefused(f"Documents that {id_} signed are still being signed anew.", "Ask again in a moment.")
    _set(connection, id_, state=RETIRED, private=None, retired_at=now_us)
    before = {"state": key.state}
    _record(connection, "signing_key.retire", key, before, {"state": RETIRED}, by=by, now_us=now_us)
    return replace(key, state=RETIRED, private=None, retired_at_us=now_us)


def resign_bundle(connection: Connection, key: SigningKey, *, now_us: int) -> bool:
    """Publish the current bundle as a new revision that ``key`` signs, unless it did already. Whether it was needed."""
    about = meta.lock(connection)
    newest = revisions.newest(connection, BUNDLE, up_to=about.revision)
    bundle = bundles.current(connection)
    if bundle is None or not newest or signed_with(newest[0].document) == key.key_id:
        return False
    in_force = overrides.live(connection, now_us)
    manifest = Manifest(bundle.chunks, bundle.observe, bundle.message, now_us, about.redaction_salt, in_force)
    revision = revisions.append(
        connection, kind=BUNDLE, key=BUNDLE_KEY, payload=manifest.to_payload(), sign=key.sign, now_us=now_us, by=BY
    )
    files = bundles.files(connection, bundle.revision)
    bundles.insert_bundle(connection, replace(bundle, revision=revision), files=files, bodies={})
    return True


def resign_licenses(connection: Connection, key: SigningKey, *, after: str, now_us: int) -> tuple[str | None, int]:
    """The same for a slice of licenses, by tenant after ``after``. Where it ended (``None``: all is done); how many.

    Documents of tenants without a license, which withdraw what was published, are signed anew as they are.
    """
    about = meta.lock(connection)
    page = revisions.newest(connection, LICENSE, up_to=about.revision, after_key=after, limit=SLICE)
    old = [one.key for one in page if signed_with(one.document) != key.key_id]
    held = licenses.of_tenants(connection, old)
    for document in page:
        if document.key not in old:
            continue
        tenant = document.key
        payload = license_to_wire(held[tenant].license) if tenant in held else revisions.payload_of(document)
        revision = revisions.append(
            connection, kind=LICENSE, key=tenant, payload=payload, sign=key.sign, now_us=now_us, by=BY
        )
        connection.execute(update(license_table).where(license_table.c.tenant == tenant).values(revision=revision))
    return (page[-1].key if len(page) == SLICE else None), len(old)


def note_resigned(connection: Connection, id_: str, *, now_us: int) -> None:
    """All that is published is signed with the active key."""
    _set(connection, id_, resigned_at=now_us)


def _locked(connection: Connection) -> list[StoredKey]:
    return [
        _key(row) for row in connection.execute(select(signing_keys).order_by(signing_keys.c.key_id).with_for_update())
    ]


def _set(connection: Connection, id_: str, **values: Any) -> None:
    connection.execute(update(signing_keys).where(signing_keys.c.key_id == id_).values(**values))


def _record(
    connection: Connection, action: str, key: StoredKey, before: Any, after: Any, *, by: str, now_us: int
) -> None:
    said = {**after, "public_key": key.public_key}
    access.record(connection, by=by, action=action, target=key.id, before=before, after=said, now_us=now_us, tenant="")


def _tag(public_key: str) -> bytes:
    return b"signing key " + public_key.encode()


def _key(row: Row[Any]) -> StoredKey:
    private = None if row.private is None else bytes(row.private)
    times = (row.created_at, row.activated_at, row.resigned_at, row.retired_at)
    return StoredKey(row.key_id, row.public_key, private, row.state, *times)
