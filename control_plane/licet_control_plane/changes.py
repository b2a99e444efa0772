"""What an operator changes: bundles and licenses. One transaction each: the change, its revision, its signed document
in the outbox, and its line in the audit trail.

Refuses what could not be meant: a license for a plan that does not exist, a bundle without a plan that licenses hold.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection

from licet.domain.catalog import Catalog, Grant, License, Limit, Plan
from licet.domain.catalog_wire import document_to_wire, license_to_wire
from licet.domain.entitlements import entitlements_of
from licet.domain.ids import TENANT_PATTERN, UNITS_MAX
from licet.wire import envelope
from licet.wire.documents import BUNDLE, BUNDLE_KEY, LICENSE, Manifest, chunk_catalog, digest_of
from licet.wire.signing import Signer, Statement
from licet_control_plane.core.bundle_changes import document_changes
from licet_control_plane.core.grants import GrantAsked, amount_of, grant_of, is_same, kept
from licet_control_plane.core.license_version import SeenLicense
from licet_control_plane.core.lifecycle import NO_NOTICES, Move, MoveRefused, check_move, next_due, with_fields
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.core.suggestion import did_you_mean
from licet_control_plane.core.webhook_events import change_type, license_data
from licet_control_plane.store import access, bundles, licenses, meta, overrides, revisions, webhooks
from licet_control_plane.store.bundles import Bundle
from licet_control_plane.store.database import Database
from licet_control_plane.store.licenses import StoredLicense

EXPIRING_NOTICE_S: Final = 14 * 86_400
"""Two weeks: long enough to renew a contract."""
ADDONS_MAX: Final = 100
OVERRIDES_MAX: Final = 1_000

Step = Callable[[License, float], License]
"""What a license becomes, from what it is and the instant in seconds."""


CREATED: Final = "created"
CHANGED: Final = "changed"
UNCHANGED: Final = "unchanged"
OUTCOMES: Final = (CREATED, CHANGED, UNCHANGED)
"""What becomes of a license of an import."""


class LicenseExists(Exception):
    """The tenant has a license already."""


class LicenseUnknown(Exception):
    """The tenant has no license."""


class GrantExists(Exception):
    """The license has another grant with this id; the argument is the id."""


class GrantUnknown(Exception):
    """The license has no grant with this id; the argument is the id."""


class RevisionMoved(Exception):
    """Somebody else changed it meanwhile; the argument is the revision it is at now, ``None`` when it is not there."""

    def __init__(self, revision: int | None) -> None:
        super().__init__("there is none" if revision is None else f"it is at revision {revision} now")
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


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one license of an import."""

    tenant: str
    outcome: str
    revision: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one license of an import cannot be: ``place`` counts from 0, ``message`` is a clause."""

    place: int
    field: str
    message: str
    fix: str


class ImportRefused(Exception):
    """Some licenses of an import cannot be, so none was changed."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        super().__init__(f"{len(refusals)} licenses cannot be")
        self.refusals = tuple(refusals)


class _DryRun(Exception):
    """Takes back all that was written, and says what it was."""

    def __init__(self, imported: list[Imported]) -> None:
        super().__init__()
        self.imported = imported


class Changes:
    """Makes changes; ``wake`` is set after each, so that the publisher looks at once."""

    def __init__(
        self,
        database: Database,
        key: Signer,
        *,
        wake: asyncio.Event,
        now_s: Callable[[], float],
        notice_s: int = EXPIRING_NOTICE_S,
    ) -> None:
        """``notice_s``: how long before its end the end of a term is announced."""
        self.notice_s = notice_s
        self._database = database
        self._key = key
        self._wake = wake
        self._now_s = now_s
        self._catalog: tuple[str, Catalog] = ("", Catalog())

    def sign(self, statement: Statement) -> bytes:
        """Signs with the deployment's key."""
        return self._key.sign(statement)

    def catalog_in_force(self, connection: Connection) -> Catalog:
        """The catalog of the newest bundle. Only for who writes: it is kept in the writer's thread."""
        return self._current_catalog(connection)

    async def push(
        self,
        catalog: Catalog,
        files: list[tuple[str, str]],
        *,
        by: str,
        observe: bool = False,
        message: str = "",
        dry_run: bool = False,
        restores: int | None = None,
    ) -> Pushed:
        """Make a validated catalog the current one. The same content again changes nothing.

        ``restores`` is the revision whose content this is, for the audit trail.

        Raises:
            ChangeInvalid: licenses hold a plan that the catalog does not have.
        """
        chunks = chunk_catalog(catalog)
        pushed = await self._database.write(
            self._push,
            catalog,
            chunks,
            files,
            by=by,
            observe=observe,
            message=message,
            dry_run=dry_run,
            restores=restores,
        )
        self._wake.set()
        return pushed

    async def create_license(
        self, license_: License, *, by: str, overrides: Mapping[str, int | str] | None = None
    ) -> StoredLicense:
        """Give a tenant its license. ``overrides`` are as operators write them: ``core.grants.amount_of``.

        Raises:
            LicenseExists: it has one.
            ChangeInvalid: the plan, an add-on, an override or the tenant's name cannot be.
        """
        stored = await self._database.write(self._create_license, license_, overrides, by)
        self._wake.set()
        return stored

    async def update_license(
        self, tenant: str, fields: Mapping[str, Any], *, if_seen: Collection[SeenLicense] | None, by: str
    ) -> StoredLicense:
        """Replace some fields of a license; overrides are as for ``create_license``.

        Raises:
            LicenseUnknown: there is none.
            RevisionMoved: it is as none of ``if_seen`` says.
            ChangeInvalid: as for ``create_license``.
        """
        stored = await self._database.write(self._update_license, tenant, fields, if_seen, by)
        self._wake.set()
        return stored

    async def put_license(
        self,
        tenant: str,
        fields: Mapping[str, Any],
        *,
        if_seen: Collection[SeenLicense] | None,
        must_exist: bool,
        only_new: bool,
        by: str,
    ) -> tuple[StoredLicense, bool]:
        """Make a tenant's license what ``fields`` say, whether it has one or not. Repeated it changes nothing.

        Returns the license, and whether it is new. ``must_exist``: only when there is one; ``only_new``: only when not.

        Raises:
            RevisionMoved: it is as none of ``if_seen`` says, or is there, or not, although it should not be, or should.
            MoveRefused, ChangeInvalid: as for ``update_license``.
        """
        put = await self._database.write(
            self.put, tenant, fields, if_seen=if_seen, must_exist=must_exist, only_new=only_new, by=by
        )
        self._wake.set()
        return put

    async def import_licenses(
        self, rows: Sequence[tuple[str, Mapping[str, Any]]], *, dry_run: bool, by: str
    ) -> list[Imported]:
        """``put_license`` of each tenant with its fields, all or none. ``dry_run``: only see what would become of them.

        Raises:
            ImportRefused: some cannot be; nothing was changed.
        """
        try:
            imported = await self._database.write(self._import, rows, dry_run, by)
        except _DryRun as done:
            return done.imported
        self._wake.set()
        return imported

    async def alter_license(
        self, tenant: str, step: Step, *, action: str, if_seen: Collection[SeenLicense] | None = None, by: str
    ) -> StoredLicense:
        """Take a license one ``step`` on: a function from the license and the instant to the license. One that changes
        nothing publishes nothing.

        Raises:
            LicenseUnknown: there is none.
            RevisionMoved: it is as none of ``if_seen`` says.
            ChangeInvalid: what comes of it cannot be. And whatever ``step`` raises.
        """
        stored = await self._database.write(self.alter, tenant, step, action=action, if_seen=if_seen, by=by)
        self._wake.set()
        return stored

    def wake(self) -> None:
        """Let the publisher look at once: work of a transaction of its own was committed."""
        self._wake.set()

    def alter(
        self,
        connection: Connection,
        tenant: str,
        step: Step,
        *,
        action: str,
        if_seen: Collection[SeenLicense] | None = None,
        by: str,
    ) -> StoredLicense:
        """``alter_license`` within a transaction; ``wake`` comes after its commit."""
        old = self._locked(connection, tenant)
        if not _is_as_seen(old, if_seen):
            raise RevisionMoved(old.revision)
        license_ = step(old.license, self._now_s())
        if license_ == old.license:
            return old
        if license_.plan != old.license.plan or license_.planned not in (None, old.license.planned):
            license_ = self._checked(connection, license_, None)
        return self._save(connection, old, license_, by=by, action=action)

    def put(
        self,
        connection: Connection,
        tenant: str,
        fields: Mapping[str, Any],
        *,
        if_seen: Collection[SeenLicense] | None = None,
        must_exist: bool = False,
        only_new: bool = False,
        by: str,
    ) -> tuple[StoredLicense, bool]:
        """``put_license`` within a transaction; ``wake`` comes after its commit."""
        meta.lock(connection)
        old = licenses.get(connection, tenant)
        if old is None:
            if must_exist or if_seen is not None:
                raise RevisionMoved(None)
            license_ = with_fields(License(tenant, fields.get("plan", "")), fields, self._now_s())
            return self._create_license(connection, license_, fields.get("overrides"), by), True
        if only_new:
            raise RevisionMoved(old.revision)
        return self._update_license(connection, tenant, fields, if_seen, by), False

    def _import(
        self, connection: Connection, rows: Sequence[tuple[str, Mapping[str, Any]]], dry_run: bool, by: str
    ) -> list[Imported]:
        meta.lock(connection)
        imported: list[Imported] = []
        refusals: list[Refusal] = []
        seen: set[str] = set()
        for place, (tenant, fields) in enumerate(rows):
            try:
                if tenant in seen:
                    raise ChangeInvalid("tenant", f"{tenant!r} is there twice", "Send each tenant once.")
                seen.add(tenant)
                old = licenses.get(connection, tenant)
                stored, _ = self.put(connection, tenant, fields, by=by)
            except ChangeInvalid as invalid:
                refusals.append(Refusal(place, invalid.field, str(invalid), invalid.fix))
            except MoveRefused as refused:
                message = f"the license is {refused.stage.value}, and cannot {refused.move.value}: {refused}"
                refusals.append(Refusal(place, "tenant", message, refused.fix))
            else:
                outcome = CREATED if old is None else UNCHANGED if stored.revision == old.revision else CHANGED
                imported.append(Imported(tenant, outcome, stored.revision))
        if refusals:
            raise ImportRefused(refusals)
        if dry_run:
            raise _DryRun(imported)
        return imported

    def publish(
        self,
        connection: Connection,
        old: StoredLicense | None,
        license_: License,
        *,
        by: str,
        now_us: int,
        message: str = "",
    ) -> StoredLicense:
        """Write a license that may be, and have it published: every change of a license comes here, within the
        transaction of who makes it, which also says in the audit trail what it was. ``wake`` comes after its commit.
        """
        revision = revisions.append(
            connection,
            kind=LICENSE,
            key=license_.tenant,
            payload=license_to_wire(license_),
            sign=self._key.sign,
            now_us=now_us,
            by=by,
            message=message,
        )
        notices = old.notices if old else NO_NOTICES
        due = next_due(license_, notices, notice_s=self.notice_s)
        licenses.save(
            connection, license_, revision=revision, now_us=now_us, new=old is None, due_s=due[0] if due else None
        )
        return StoredLicense(license_, revision, now_us, notices)

    def announce(self, connection: Connection, old: StoredLicense | None, new: StoredLicense, *, action: str) -> None:
        """Tell webhooks of a change. ``action``: as the audit trail has it."""
        license_ = new.license
        type_ = change_type(old.license if old else None, license_, action)
        data = license_data(license_, revision=new.revision)
        webhooks.announce(connection, type_, license_.tenant, data, now_us=new.updated_at_us)

    async def add_grant(self, tenant: str, asked: GrantAsked, *, by: str) -> tuple[StoredLicense, Grant, bool]:
        """Top up a limit of a license. Repeated with the same id it changes nothing.

        Returns the license, the grant, and whether it is new.

        Raises:
            LicenseUnknown: there is no license.
            GrantExists: it has another grant with this id.
            ChangeInvalid: the grant cannot be.
        """
        added = await self._database.write(self._add_grant, tenant, asked, by)
        self._wake.set()
        return added

    async def revoke_grant(self, tenant: str, grant_id: str, *, by: str) -> StoredLicense:
        """Take a grant away; what was used of it stays used.

        Raises:
            LicenseUnknown: there is no license.
            GrantUnknown: it has no such grant.
        """
        stored = await self._database.write(self._revoke_grant, tenant, grant_id, by)
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
        restores: int | None,
    ) -> Pushed:
        row = meta.lock(connection)
        old = bundles.current(connection)
        documents = _digests(catalog)
        bodies = {digest_of(body): body for body in chunks}
        digest = hashlib.sha256("\n".join([str(observe), *bodies]).encode()).hexdigest()
        changed = document_changes(old.documents if old else (), documents)
        pushed = Pushed(
            revision=old.revision if old else 0,
            generation=row.generation,
            digest=digest,
            added=changed.added,
            modified=changed.modified,
            removed=changed.removed,
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
        manifest = Manifest(
            chunks=tuple(bodies),
            observe=observe,
            message=message,
            published_us=now_us,
            salt=row.redaction_salt,
            overrides=overrides.live(connection, now_us),
        )
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
            action="bundle.push" if restores is None else "bundle.rollback",
            target=f"revision {revision}",
            before={"revision": pushed.revision, "digest": old.digest if old else None},
            after={
                "digest": digest,
                "observe": observe,
                "added": pushed.added,
                "modified": pushed.modified,
                "removed": pushed.removed,
                **({} if restores is None else {"restores": restores}),
            },
            now_us=now_us,
        )
        return replace(pushed, revision=revision)

    def _create_license(
        self, connection: Connection, license_: License, overrides: Mapping[str, int | str] | None, by: str
    ) -> StoredLicense:
        meta.lock(connection)
        if not TENANT_PATTERN.fullmatch(license_.tenant):
            raise ChangeInvalid(
                "tenant",
                f"{license_.tenant!r} cannot name a tenant",
                "Use up to 128 letters, digits, dots, dashes and underscores, starting with a letter or a digit.",
            )
        license_ = self._checked(connection, license_, overrides)
        if licenses.get(connection, license_.tenant) is not None:
            raise LicenseExists(license_.tenant)
        return self._save(connection, None, license_, by=by, action="license.create")

    def _update_license(
        self,
        connection: Connection,
        tenant: str,
        fields: Mapping[str, Any],
        if_seen: Collection[SeenLicense] | None,
        by: str,
    ) -> StoredLicense:
        old = self._locked(connection, tenant)
        if not _is_as_seen(old, if_seen):
            raise RevisionMoved(old.revision)
        license_ = with_fields(old.license, fields, self._now_s())
        if license_ == old.license and "overrides" not in fields:
            return old
        license_ = self._checked(connection, license_, fields.get("overrides"))
        if license_ == old.license:
            return old
        if fields.get("overrides") is not None:
            check_move(license_, Move.CHANGE, self._now_s())
        return self._save(connection, old, license_, by=by, action="license.update")

    def _add_grant(
        self, connection: Connection, tenant: str, asked: GrantAsked, by: str
    ) -> tuple[StoredLicense, Grant, bool]:
        old = self._locked(connection, tenant)
        before = old.license.grants
        if asked.id and (existing := next((grant for grant in before if grant.id == asked.id), None)):
            if not is_same(existing, asked):
                raise GrantExists(asked.id)
            return old, existing, False
        in_force = entitlements_of(old.license, self._current_catalog(connection))
        limits: dict[str, Limit] = {limit.key: limit for one in in_force.values() for limit in one.limits}
        grant = grant_of(asked, limits, before, id_=secrets.token_hex(8), now_s=int(self._now_s()))
        license_ = replace(old.license, grants=(*before, grant))
        return self._save(connection, old, license_, by=by, action="grant.add"), grant, True

    def _revoke_grant(self, connection: Connection, tenant: str, grant_id: str, by: str) -> StoredLicense:
        old = self._locked(connection, tenant)
        left = tuple(grant for grant in old.license.grants if grant.id != grant_id)
        if len(left) == len(old.license.grants):
            raise GrantUnknown(grant_id)
        return self._save(connection, old, replace(old.license, grants=left), by=by, action="grant.revoke")

    def _locked(self, connection: Connection, tenant: str) -> StoredLicense:
        """The license to change, which nobody else changes meanwhile."""
        meta.lock(connection)
        old = licenses.get(connection, tenant)
        if old is None:
            raise LicenseUnknown(tenant)
        return old

    def _save(
        self, connection: Connection, old: StoredLicense | None, license_: License, *, by: str, action: str
    ) -> StoredLicense:
        now_us = self._now_us()
        license_ = replace(license_, grants=kept(license_.grants, now_us // 1_000_000))
        stored = self.publish(connection, old, license_, by=by, now_us=now_us)
        self.announce(connection, old, stored, action=action)
        access.record(
            connection,
            by=by,
            action=action,
            target=license_.tenant,
            before=_audited(old.license) if old else None,
            after=_audited(license_),
            now_us=now_us,
            tenant=license_.tenant,
        )
        return stored

    def _checked(self, connection: Connection, license_: License, overrides: Mapping[str, int | str] | None) -> License:
        """The license, with ``overrides`` if there are new ones.

        Raises:
            ChangeInvalid: it cannot be.
        """
        plans = self._current_catalog(connection).plans
        if license_.plan not in plans:
            raise ChangeInvalid("plan", f"there is no plan {license_.plan!r}", did_you_mean(license_.plan, plans))
        if license_.ends_s and license_.ends_s <= license_.starts_s:
            raise ChangeInvalid("ends_at", "the license ends before it starts", "Let it end after it starts.")
        if len(license_.addons) > ADDONS_MAX:
            raise ChangeInvalid("addons", f"more than {ADDONS_MAX} add-ons", "Put them together in one plan.")
        if overrides is not None and len(overrides) > OVERRIDES_MAX:
            raise ChangeInvalid("overrides", f"more than {OVERRIDES_MAX} overrides", "Make it a plan of its own.")
        for addon, count in license_.addons.items():
            if addon not in plans:
                raise ChangeInvalid(f"addons.{addon}", f"there is no plan {addon!r}", did_you_mean(addon, plans))
            if not 1 <= count <= UNITS_MAX:
                raise ChangeInvalid(f"addons.{addon}", f"a count of {count} add-ons", "Give a count of at least 1.")
        limits = _limits_of_plans(plans, license_)
        written = license_.overrides if overrides is None else overrides
        for key in written:
            if key not in limits:
                raise ChangeInvalid(
                    f"overrides.{key}",
                    f"plan {license_.plan!r} and its add-ons have no limit {key!r}",
                    did_you_mean(key, limits),
                )
        if license_.planned:
            # Now, so that it does not fail when it is due.
            self._checked(connection, replace(license_, plan=license_.planned.plan, planned=None), overrides)
        if overrides is None:
            return license_
        amounts = {key: amount_of(amount, limits[key], f"overrides.{key}") for key, amount in overrides.items()}
        return replace(license_, overrides=amounts)

    def _current_catalog(self, connection: Connection) -> Catalog:
        # Only the writer's thread comes here.
        bundle = bundles.current(connection)
        if bundle is not None and self._catalog[0] != bundle.digest:
            self._catalog = (bundle.digest, bundles.catalog(connection, bundle))
        return self._catalog[1]

    def _now_us(self) -> int:
        return int(self._now_s() * 1_000_000)


def _is_as_seen(stored: StoredLicense, if_seen: Collection[SeenLicense] | None) -> bool:
    return if_seen is None or any(one.is_still(stored.license, stored.revision) for one in if_seen)


def _audited(license_: License) -> dict[str, Any]:
    """What the audit trail keeps of a license: its access requests have lines of their own."""
    return license_to_wire(replace(license_, requests=()))


def _digests(catalog: Catalog) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (type(document).__name__, document.name, digest_of(envelope.pack("document", document_to_wire(document))))
        for document in catalog.documents()
    )


def _limits_of_plans(plans: Mapping[str, Plan], license_: License) -> dict[str, Limit]:
    """The limits of a license's plan and add-ons, by key; those of the plan win."""
    return {
        limit.key: limit
        for plan in (*license_.addons, license_.plan)
        for entitlement in plans[plan].features.values()
        for limit in entitlement.limits
    }
