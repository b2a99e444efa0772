"""Copies revisions from the database's outbox to Redis, contiguously; and all documents again after a loss.

A change is copied so that a sidecar that acts on it finds everything it needs: chunks, limits of the marks, the
document, and only then the entry in the stream.
"""

from __future__ import annotations

from itertools import groupby
from typing import Final

from sqlalchemy import Connection

from licet.domain.catalog import Catalog
from licet.wire.documents import BUNDLE, LICENSE, digest_of
from licet.wire.signing import VerificationError, read_own
from licet_control_plane.core.publishing import COPYING, Write, contiguous, is_written_again
from licet_control_plane.publisher.documents import RedisDocuments
from licet_control_plane.publisher.quotas import SLICE, Quotas, changed_plans, limits_under
from licet_control_plane.store import bundles, licenses, meta, publisher_lease, revisions
from licet_control_plane.store.bundles import Bundle
from licet_control_plane.store.database import Database
from licet_control_plane.store.revisions import Revision

BATCH_MAX: Final = 200
"""Revisions copied before they are noted as published: one transaction for all of them."""


class Overtaken(Exception):
    """Another publisher took over while this one was paused: what it knows of Redis is of the past."""


class OutboxCopier:
    """``revision``: everything up to it is published. ``catalog``: of the last published bundle.

    ``bundle_revision``: of the manifest that is published, 0 when there is none in this generation. A change of
    overrides signs the same bundle under a newer one.
    """

    def __init__(self, database: Database, documents: RedisDocuments, quotas: Quotas) -> None:
        self._database = database
        self._documents = documents
        self._quotas = quotas
        self.revision = 0
        self.catalog = Catalog()
        self.bundle_revision = 0
        self._generation = 0
        self._bundles: list[Bundle] = []  # the last two published, newest first
        self._last = (0, "")  # the last change that was found to be its own
        self._manifest: bytes | None = None  # the last that was found to be its own

    @property
    def has_manifest(self) -> bool:
        """Whether a bundle was published in this generation."""
        return self.bundle_revision > 0

    @property
    def chunks(self) -> tuple[str, ...]:
        """Of the last published bundle."""
        return self._bundles[0].chunks if self._bundles else ()

    async def is_own(self, manifest: bytes | None) -> bool:
        """Whether that manifest is of this database, and not older than the last published. One that is newer was
        written by a publisher that died before it announced it.
        """
        if manifest is None:
            return False
        if manifest == self._manifest:
            return True
        try:
            revision = read_own(manifest).revision
        except (VerificationError, TypeError):
            return False
        if revision < self.bundle_revision:
            return False
        if await self._database.read(revisions.digest, revision) != digest_of(manifest):
            return False
        self._manifest = manifest
        return True

    async def load(self) -> None:
        """Take up where the last publisher was."""
        self.revision = await self._database.read(revisions.last_published)
        self._bundles = await self._database.read(bundles.newest, up_to=self.revision, limit=2)
        self._generation = (await self._database.read(meta.read)).generation
        manifests = self._current(await self._database.read(revisions.newest, BUNDLE, up_to=self.revision))
        self.bundle_revision = max((row.revision for row in manifests), default=0)
        self.catalog = await self._database.read(bundles.catalog, next(iter(self._bundles), None))

    async def is_own_change(self, generation: int, revision: int, digest: str) -> bool:
        """Whether the database has that change under that revision of ``generation``, or none, or it is not told which
        it is.
        """
        if not digest or (revision, digest) == self._last:
            return True
        known = await self._database.read(revisions.get, revision)
        own = await self._database.read(revisions.digest, revision)
        if known is not None and known.generation == generation and own != digest:
            return False
        self._last = (revision, digest)
        return True

    async def copy(self, deployment: str, *, holder: str, epoch: int, now_us: int) -> list[str]:
        """Copy what is in the outbox. Returns tenants whose mark was found lost: begin them, and call again.

        Raises:
            Overtaken: ``holder`` does not lead any more, or what Redis holds was lost since ``epoch``.
        """
        while rows := await self._database.read(revisions.outbox, after=self.revision, limit=BATCH_MAX):
            rows = rows[: contiguous([row.revision for row in rows], after=self.revision)]
            if not rows:
                break
            for kind, group in groupby(rows, key=lambda row: row.kind):
                part = list(group)
                if kind == BUNDLE:
                    for row in part:
                        await self._copy_bundle(deployment, row)
                        self.revision = self.bundle_revision = row.revision
                elif lost := await self._copy_licenses(deployment, part):
                    return lost
                self.revision = part[-1].revision
            if not await self._database.write(_note, holder, epoch, up_to=self.revision, now_us=now_us):
                raise Overtaken
        return []

    async def republish(self, deployment: str) -> None:
        """Write every document that was published in this generation, and its limits, again."""
        bodies: dict[str, bytes] = {}
        for bundle in self._bundles:
            bodies |= await self._database.read(bundles.bodies, bundle.chunks)
        await self._documents.set_chunks(bodies)
        after = ""
        while True:
            page = await self._database.read(
                revisions.newest, LICENSE, up_to=self.revision, after_key=after, limit=SLICE
            )
            if not page:
                break
            current = self._current(page)
            await self._publish_limits({row.key: row.revision for row in current})
            await self._documents.set_documents(deployment, current)
            after = page[-1].key
        manifest = await self._database.read(revisions.newest, BUNDLE, up_to=self.revision)
        await self._documents.set_documents(deployment, self._current(manifest))

    def _current(self, rows: list[Revision]) -> list[Revision]:
        return [row for row in rows if is_written_again(row.generation, current=self._generation)]

    async def _copy_licenses(self, deployment: str, rows: list[Revision]) -> list[str]:
        for write in COPYING:
            if write is Write.LIMITS and (lost := await self._publish_limits({row.key: row.revision for row in rows})):
                return lost
            if write is Write.DOCUMENT:
                await self._documents.set_documents(deployment, rows)
            if write is Write.ENTRY:
                await self._documents.announce(rows)
        return []

    async def _copy_bundle(self, deployment: str, row: Revision) -> None:
        bundle = (await self._database.read(bundles.newest, up_to=row.revision))[0]
        if self._bundles and bundle.revision == self._bundles[0].revision:  # the same bundle, under other overrides
            await self._documents.set_documents(deployment, [row])
            await self._documents.announce([row])
            return
        old = self._bundles[0].chunks if self._bundles else ()
        new = tuple(digest for digest in bundle.chunks if digest not in set(old))
        catalog = await self._database.read(bundles.catalog, bundle)
        for write in COPYING:
            if write is Write.CHUNKS:
                await self._documents.set_chunks(await self._database.read(bundles.bodies, new))
            if write is Write.LIMITS:
                await self._publish_changed_limits(catalog, row.revision)
            if write is Write.DOCUMENT:
                await self._documents.set_documents(deployment, [row])
            if write is Write.ENTRY:
                await self._documents.announce([row])
        kept = {*bundle.chunks, *old}
        await self._documents.expire_chunks(
            digest for outdated in self._bundles[1:] for digest in outdated.chunks if digest not in kept
        )
        self._bundles = [bundle, *self._bundles[:1]]
        self.catalog = catalog

    async def _publish_changed_limits(self, catalog: Catalog, revision: int) -> None:
        """Write the limits of every tenant to which the new catalog gives others.

        A lost mark is left to the next look and to the sidecars, who ask; it cannot grant anything meanwhile.
        """
        changed = changed_plans(self.catalog, catalog)
        after = ""
        while changed:
            page = await self._database.read(licenses.holding, changed, after=after, limit=SLICE)
            if not page:
                break
            limits = {stored.license.tenant: limits_under(stored.license, catalog) for stored in page}
            await self._quotas.publish(limits, dict.fromkeys(limits, revision))
            after = page[-1].license.tenant

    async def _publish_limits(self, revision_of: dict[str, int]) -> list[str]:
        """Write the limits of tenants that have a license in the database. Returns those whose mark is lost."""
        found = await self._database.read(licenses.of_tenants, list(revision_of))
        limits = {tenant: limits_under(stored.license, self.catalog) for tenant, stored in found.items()}
        return await self._quotas.publish(limits, revision_of) if limits else []


def _note(connection: Connection, holder: str, epoch: int, *, up_to: int, now_us: int) -> bool:
    """Note what was published, if it was by who leads, and nothing was lost since."""
    if not publisher_lease.leads(connection, holder) or meta.read(connection).epoch != epoch:
        return False
    revisions.mark_published(connection, up_to=up_to, now_us=now_us)
    return True
