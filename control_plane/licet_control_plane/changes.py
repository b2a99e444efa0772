"""What an operator changes: bundles and licenses. One transaction each: the change, its revision, its signed document
in the outbox, and its line in the audit trail.

Refuses what could not be meant: a license for a plan that does not exist, a bundle without a plan that licenses hold.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection

from licet.domain.catalog import Catalog, License, document_to_wire, license_to_wire
from licet.domain.ids import TENANT_PATTERN, UNITS_MAX
from licet.wire import envelope
from licet.wire.documents import BUNDLE, BUNDLE_KEY, LICENSE, Manifest, chunk_catalog, digest_of
from licet.wire.signing import SigningKey
from licet_control_plane.core.suggestion import did_you_mean
from licet_control_plane.store import access, bundles, licenses, meta, revisions
from licet_control_plane.store.bundles import Bundle
from licet_control_plane.store.database import Database
from licet_control_plane.store.licenses import StoredLicense

ADDONS_MAX: Final = 100
OVERRIDES_MAX: Final = 1_000


class ChangeInvalid(Exception):
    """The change cannot be made as asked. ``field`` says where, ``fix`` what to do."""

    def __init__(self, field: str, message: str, fix: str) -> None:
        super().__init__(message)
        self.field = field
        self.fix = fix


class LicenseExists(Exception):
    """The tenant has a license already."""


class LicenseUnknown(Exception):
    """The tenant has no license."""


class RevisionMoved(Exception):
    """Somebody else changed it meanwhile; the argument is the revision it is at now."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"it is at revision {revision} now")
        self.revision = revision


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did, or with ``dry_run`` would do. Documents are named ``Kind/name``."""

    revision: int
    generation: int
    digest: str
    added: list[str]
    modified: list[str]
    removed: list[str]
    unchanged: bool


class Changes:
    """Makes changes; ``wake`` is set after each, so that the publisher looks at once."""

    def __init__(self, database: Database, key: SigningKey, *, wake: asyncio.Event, now_s: Callable[[], float]) -> None:
        self._database = database
        self._key = key
        self._wake = wake
        self._now_s = now_s
        self._catalog: tuple[str, Catalog] = ("", Catalog())

    async def push(
        self,
        catalog: Catalog,
        files: list[tuple[str, str]],
        *,
        by: str,
        observe: bool = False,
        message: str = "",
        dry_run: bool = False,
    ) -> Pushed:
        """Make a validated catalog the current one. The same content again changes nothing.

        Raises:
            ChangeInvalid: licenses hold a plan that the catalog does not have.
        """
        chunks = chunk_catalog(catalog)
        pushed = await self._database.write(
            self._push, catalog, chunks, files, by=by, observe=observe, message=message, dry_run=dry_run
        )
        self._wake.set()
        return pushed

    async def create_license(self, license_: License, *, by: str) -> StoredLicense:
        """Give a tenant its license.

        Raises:
            LicenseExists: it has one.
            ChangeInvalid: the plan, an add-on, an override or the tenant's name cannot be.
        """
        stored = await self._database.write(self._create_license, license_, by)
        self._wake.set()
        return stored

    async def update_license(
        self, tenant: str, fields: Mapping[str, Any], *, if_revision: int | None, by: str
    ) -> StoredLicense:
        """Replace some fields of a license.

        Raises:
            LicenseUnknown: there is none.
            RevisionMoved: it is not at ``if_revision``.
            ChangeInvalid: as for ``create_license``.
        """
        stored = await self._database.write(self._update_license, tenant, fields, if_revision, by)
        self._wake.set()
        return stored

    def _push(
        self,
        connection: Connection,
        catalog: Catalog,
        chunks: list[bytes],
        files: list[tuple[str, str]],
        *,
        by: str,
        observe: bool,
        message: str,
        dry_run: bool,
    ) -> Pushed:
        row = meta.lock(connection)
        old = bundles.current(connection)
        documents = _digests(catalog)
        bodies = {digest_of(body): body for body in chunks}
        digest = hashlib.sha256("\n".join([str(observe), *bodies]).encode()).hexdigest()
        before = {f"{kind}/{name}": value for kind, name, value in old.documents} if old else {}
        after = {f"{kind}/{name}": value for kind, name, value in documents}
        pushed = Pushed(
            revision=old.revision if old else 0,
            generation=row.generation,
            digest=digest,
            added=sorted(after.keys() - before.keys()),
            modified=sorted(name for name in after.keys() & before.keys() if after[name] != before[name]),
            removed=sorted(before.keys() - after.keys()),
            unchanged=old is not None and old.digest == digest,
        )
        if pushed.unchanged:
            return pushed
        for plan, (count, tenant) in sorted(licenses.plans_in_use(connection).items()):
            if plan not in catalog.plans:
                raise ChangeInvalid(
                    f"Plan/{plan}",
                    f"plan {plan!r} is not in this bundle and is held by {count} license{'s' if count > 1 else ''},"
                    f" such as the one of {tenant}",
                    "Keep the plan, or move these licenses to another one first.",
                )
        if dry_run:
            return replace(pushed, revision=row.revision + 1)
        now_us = self._now_us()
        manifest = Manifest(chunks=tuple(bodies), observe=observe, message=message, published_us=now_us)
        revision = revisions.append(
            connection,
            kind=BUNDLE,
            key=BUNDLE_KEY,
            payload=manifest.to_payload(),
            sign=self._key.sign,
            now_us=now_us,
            by=by,
            message=message,
        )
        bundle = Bundle(revision, digest, observe, message, documents, tuple(bodies))
        bundles.insert_bundle(connection, bundle, files=files, bodies=bodies)
        access.record(
            connection,
            by=by,
            action="bundle.push",
            target=f"revision {revision}",
            before={"revision": pushed.revision, "digest": old.digest if old else None},
            after={
                "digest": digest,
                "observe": observe,
                "added": pushed.added,
                "modified": pushed.modified,
                "removed": pushed.removed,
            },
            now_us=now_us,
        )
        return replace(pushed, revision=revision)

    def _create_license(self, connection: Connection, license_: License, by: str) -> StoredLicense:
        meta.lock(connection)
        if not TENANT_PATTERN.fullmatch(license_.tenant):
            raise ChangeInvalid(
                "tenant",
                f"{license_.tenant!r} cannot name a tenant",
                "Use up to 128 letters, digits, dots, dashes and underscores, starting with a letter or a digit.",
            )
        self._check(connection, license_)
        if licenses.get(connection, license_.tenant) is not None:
            raise LicenseExists(license_.tenant)
        return self._save(connection, None, license_, by=by)

    def _update_license(
        self, connection: Connection, tenant: str, fields: Mapping[str, Any], if_revision: int | None, by: str
    ) -> StoredLicense:
        meta.lock(connection)
        old = licenses.get(connection, tenant)
        if old is None:
            raise LicenseUnknown(tenant)
        if if_revision is not None and if_revision != old.revision:
            raise RevisionMoved(old.revision)
        license_ = replace(old.license, **fields)
        if license_ == old.license:
            return old
        self._check(connection, license_)
        return self._save(connection, old, license_, by=by)

    def _save(self, connection: Connection, old: StoredLicense | None, license_: License, *, by: str) -> StoredLicense:
        now_us = self._now_us()
        wire = license_to_wire(license_)
        revision = revisions.append(
            connection, kind=LICENSE, key=license_.tenant, payload=wire, sign=self._key.sign, now_us=now_us, by=by
        )
        licenses.save(connection, license_, revision=revision, now_us=now_us, new=old is None)
        access.record(
            connection,
            by=by,
            action="license.create" if old is None else "license.update",
            target=license_.tenant,
            before=license_to_wire(old.license) if old else None,
            after=wire,
            now_us=now_us,
        )
        return StoredLicense(license_, revision, now_us)

    def _check(self, connection: Connection, license_: License) -> None:
        catalog = self._current_catalog(connection)
        plans = catalog.plans
        if license_.plan not in plans:
            raise ChangeInvalid("plan", f"there is no plan {license_.plan!r}", did_you_mean(license_.plan, plans))
        if license_.ends_s and license_.ends_s <= license_.starts_s:
            raise ChangeInvalid("ends_at", "the license ends before it starts", "Let it end after it starts.")
        if len(license_.addons) > ADDONS_MAX:
            raise ChangeInvalid("addons", f"more than {ADDONS_MAX} add-ons", "Put them together in one plan.")
        if len(license_.overrides) > OVERRIDES_MAX:
            raise ChangeInvalid("overrides", f"more than {OVERRIDES_MAX} overrides", "Make it a plan of its own.")
        for addon, count in license_.addons.items():
            if addon not in plans:
                raise ChangeInvalid(f"addons.{addon}", f"there is no plan {addon!r}", did_you_mean(addon, plans))
            if not 1 <= count <= UNITS_MAX:
                raise ChangeInvalid(f"addons.{addon}", f"a count of {count} add-ons", "Give a count of at least 1.")
        keys = {
            limit.key
            for plan in (license_.plan, *license_.addons)
            for entitlement in plans[plan].features.values()
            for limit in entitlement.limits
        }
        for key, amount in license_.overrides.items():
            if key not in keys:
                raise ChangeInvalid(
                    f"overrides.{key}",
                    f"plan {license_.plan!r} and its add-ons have no limit {key!r}",
                    did_you_mean(key, keys),
                )
            if not 0 <= amount <= UNITS_MAX:
                raise ChangeInvalid(f"overrides.{key}", f"an amount of {amount}", f"Give 0 to {UNITS_MAX}.")

    def _current_catalog(self, connection: Connection) -> Catalog:
        # Only the writer's thread comes here.
        bundle = bundles.current(connection)
        if bundle is not None and self._catalog[0] != bundle.digest:
            self._catalog = (bundle.digest, bundles.catalog(connection, bundle))
        return self._catalog[1]

    def _now_us(self) -> int:
        return int(self._now_s() * 1_000_000)


def _digests(catalog: Catalog) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (type(document).__name__, document.name, digest_of(envelope.pack("document", document_to_wire(document))))
        for document in catalog.documents()
    )
