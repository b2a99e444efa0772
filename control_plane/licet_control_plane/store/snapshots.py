"""The published state as one signed snapshot, for sidecars that cannot reach Redis."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sqlalchemy import Connection, func, select

from licet.wire.documents import BUNDLE, HEAD, HEAD_KEY, Head, Snapshot
from licet.wire.signing import Statement
from licet_control_plane.store import bundles, meta
from licet_control_plane.store.revisions import Sign
from licet_control_plane.store.schema import revisions

_KEYS_PER_QUERY: Final = 500


def read(
    connection: Connection,
    *,
    sign: Sign,
    have: tuple[int, int],
    known: Collection[str],
    wanted: Collection[str],
    now_us: int,
    epoch: int,
    live: int,
) -> Snapshot:
    """All that is committed, in one read. To who ``have`` the same (generation, revision) only the ``wanted`` licenses
    are sent; to others also the bundle, and the licenses of ``known``.

    The head names no server of Redis: none was looked at, so that it vouches for nothing there.
    """
    about = meta.read(connection)
    head = Head(now_us, "", epoch, max(1, live), about.ledger_generation)
    statement = Statement(about.deployment, HEAD, HEAD_KEY, about.generation, about.revision, head.to_payload())
    changed = have != (about.generation, about.revision)
    manifest: bytes | None = None
    chunks: dict[str, bytes] = {}
    if changed:
        bundle = bundles.current(connection)
        if bundle is not None:
            # The newest manifest: overrides that were set since the bundle was pushed are in it.
            newest = select(func.max(revisions.c.revision)).where(revisions.c.kind == BUNDLE).scalar_subquery()
            manifest = connection.scalar(select(revisions.c.document).where(revisions.c.revision == newest))
            chunks = bundles.bodies(connection, bundle.chunks)
    tenants = sorted({*wanted, *known} if changed else set(wanted))
    licenses = _licenses(connection, tenants)
    return Snapshot(
        head=sign(statement),
        manifest=bytes(manifest) if manifest is not None else None,
        chunks=chunks,
        licenses=licenses,
        absent=tuple(tenant for tenant in tenants if tenant not in licenses),
    )


def _licenses(connection: Connection, tenants: list[str]) -> dict[str, bytes]:
    """The newest signed license of each tenant that has one."""
    found: dict[str, bytes] = {}
    for start in range(0, len(tenants), _KEYS_PER_QUERY):
        newest = (
            select(func.max(revisions.c.revision).label("revision"))
            .where(revisions.c.kind == "license", revisions.c.key.in_(tenants[start : start + _KEYS_PER_QUERY]))
            .group_by(revisions.c.key)
            .subquery()
        )
        rows = connection.execute(
            select(revisions.c.key, revisions.c.document).join(newest, revisions.c.revision == newest.c.revision)
        )
        found |= {row.key: bytes(row.document) for row in rows}
    return found
