"""Starts a new generation, after the database was restored from a backup and Redis knows more than it.

Everything the database holds is published again, under revisions greater than any that Redis has seen; what only
Redis has, because it was made after the backup, is withdrawn.
"""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection, update

from licet.domain.catalog import License, LicenseStatus
from licet.domain.catalog_wire import license_to_wire
from licet.wire.documents import BUNDLE, BUNDLE_KEY, LICENSE, Manifest
from licet_control_plane.core.contents import Found
from licet_control_plane.store import access, bundles, licenses, meta, overrides, revisions
from licet_control_plane.store.revisions import Sign
from licet_control_plane.store.schema import licenses as license_table

_PAGE = 500


def start(connection: Connection, found: Found, tenants_in_redis: set[str], *, sign: Sign, now_us: int) -> meta.Meta:
    """In one transaction: the new generation, a new epoch, and every current document as a new revision of it."""
    old = meta.lock(connection)
    # Also above the head: whoever is where that says takes what follows in the stream for the next change.
    there = max(found.last_revision, found.head[1])
    meta.start_generation(connection, revision=there, seen=(found.generation, found.head[0], found.acted[0]))
    meta.allocate_epoch(connection, above=found.epoch)
    # What was still in the outbox is published again below, as a new revision.
    revisions.mark_published(connection, up_to=max(old.revision, there), now_us=now_us)

    def again(kind: str, key: str, payload: object) -> int:
        return revisions.append(
            connection, kind=kind, key=key, payload=payload, sign=sign, now_us=now_us, by="new-generation"
        )

    if bundle := bundles.current(connection):
        in_force = overrides.live(connection, now_us)
        manifest = Manifest(bundle.chunks, bundle.observe, bundle.message, now_us, old.redaction_salt, in_force)
        revision = again(BUNDLE, BUNDLE_KEY, manifest.to_payload())
        files = bundles.files(connection, bundle.revision)
        bundles.insert_bundle(connection, replace(bundle, revision=revision), files=files, bodies={})
    known: set[str] = set()
    after = ""
    while page := licenses.page(connection, after=after, limit=_PAGE):
        for stored in page:
            revision = again(LICENSE, stored.license.tenant, license_to_wire(stored.license))
            connection.execute(
                update(license_table).where(license_table.c.tenant == stored.license.tenant).values(revision=revision)
            )
            known.add(stored.license.tenant)
        after = page[-1].license.tenant
    withdrawn = sorted(tenants_in_redis - known)
    for tenant in withdrawn:
        # Signed, so that a sidecar that holds the license lets it go as surely as it would take a new one.
        again(LICENSE, tenant, license_to_wire(License(tenant, plan="", status=LicenseStatus.CANCELED)))
    new = meta.read(connection)
    access.record(
        connection,
        by="new-generation",
        action="generation.start",
        target=f"generation {new.generation}",
        before={"generation": old.generation, "revision": old.revision, "epoch": old.epoch},
        after={
            "generation": new.generation,
            "revision": new.revision,
            "epoch": new.epoch,
            "withdrawn": withdrawn[:100],
        },
        now_us=now_us,
    )
    return new
