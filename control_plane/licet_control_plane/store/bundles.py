"""Bundles, as they were pushed and as they are published."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
from sqlalchemy import Connection, Row, insert, select

from licet.domain.catalog import Catalog
from licet.wire.documents import catalog_of_chunks
from licet_control_plane.store.database import upsert
from licet_control_plane.store.schema import bundles, chunks, revisions


@dataclass(frozen=True, slots=True)
class Bundle:
    """One pushed bundle. ``documents`` are (kind, name, digest); ``chunks`` the digests its manifest names."""

    revision: int
    digest: str
    observe: bool
    message: str
    documents: tuple[tuple[str, str, str], ...]
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """When a bundle was pushed (microseconds), by whom, and when it was published (``None``: not yet)."""

    generation: int
    at_us: int
    by: str
    published_at_us: int | None


def insert_bundle(
    connection: Connection, bundle: Bundle, *, files: list[tuple[str, str]], bodies: dict[str, bytes]
) -> None:
    """Record a bundle under its revision, with the files as pushed and the chunks that are new."""
    for digest, body in bodies.items():
        connection.execute(upsert(connection, chunks).values(digest=digest, body=body).on_conflict_do_nothing())
    connection.execute(
        insert(bundles).values(
            revision=bundle.revision,
            digest=bundle.digest,
            observe=bundle.observe,
            message=bundle.message,
            files=zlib.compress(msgpack.packb(files)),
            documents=msgpack.packb(bundle.documents),
            chunks=msgpack.packb(bundle.chunks),
        )
    )


def newest(connection: Connection, *, up_to: int | None = None, limit: int = 1) -> list[Bundle]:
    """The newest bundles at ``up_to``, newest first."""
    query = select(bundles).order_by(bundles.c.revision.desc()).limit(limit)
    if up_to is not None:
        query = query.where(bundles.c.revision <= up_to)
    return [_bundle(row) for row in connection.execute(query)]


def at(connection: Connection, revision: int) -> Bundle | None:
    """The bundle that was pushed as ``revision``; ``None`` when that is no revision of a bundle."""
    row = connection.execute(select(bundles).where(bundles.c.revision == revision)).first()
    return _bundle(row) if row else None


def current(connection: Connection) -> Bundle | None:
    """The newest bundle, published or about to be."""
    return next(iter(newest(connection)), None)


def origins(connection: Connection, among: Sequence[int]) -> dict[int, Origin]:
    """Where each of these revisions comes from."""
    rows = connection.execute(
        select(
            revisions.c.revision, revisions.c.generation, revisions.c.at, revisions.c.by, revisions.c.published_at
        ).where(revisions.c.revision.in_(among))
    )
    return {row.revision: Origin(row.generation, row.at, row.by, row.published_at) for row in rows}


def facts(connection: Connection, revision: int) -> tuple[int, int | None]:
    """Generation, and when it was published (microseconds; ``None`` when it is not yet)."""
    row = connection.execute(
        select(revisions.c.generation, revisions.c.published_at).where(revisions.c.revision == revision)
    ).one()
    return row.generation, row.published_at


def files(connection: Connection, revision: int) -> list[tuple[str, str]]:
    """The files of a bundle, (path, content), as pushed."""
    packed = connection.scalar(select(bundles.c.files).where(bundles.c.revision == revision))
    return [(path, content) for path, content in msgpack.unpackb(zlib.decompress(packed))] if packed else []


def bodies(connection: Connection, digests: tuple[str, ...]) -> dict[str, bytes]:
    """The chunks of ``digests``, at most ``CHUNK_COUNT`` of them."""
    rows: Any = connection.execute(select(chunks).where(chunks.c.digest.in_(digests)))
    return {row.digest: row.body for row in rows}


def catalog(connection: Connection, bundle: Bundle | None) -> Catalog:
    """The catalog of a bundle; an empty one for none."""
    return catalog_of(connection, bundle.chunks) if bundle else Catalog()


def catalog_of(connection: Connection, digests: tuple[str, ...]) -> Catalog:
    """The catalog of a manifest's chunks."""
    found = bodies(connection, digests)
    return catalog_of_chunks([found[digest] for digest in digests], digests)


def _bundle(row: Row[Any]) -> Bundle:
    return Bundle(
        row.revision,
        row.digest,
        row.observe,
        row.message,
        tuple((kind, name, digest) for kind, name, digest in msgpack.unpackb(row.documents)),
        tuple(msgpack.unpackb(row.chunks)),
    )


def in_force(connection: Connection, *, from_us: int, to_us: int) -> list[int]:
    """Revisions of the bundle that was the newest at ``from_us``, and of those made until before ``to_us``."""
    made = select(bundles.c.revision).join(revisions, revisions.c.revision == bundles.c.revision)
    pushed = made.where(revisions.c.at >= from_us, revisions.c.at < to_us)
    before = made.where(revisions.c.at < from_us).order_by(bundles.c.revision.desc()).limit(1)
    return sorted({*connection.scalars(pushed), *connection.scalars(before)})
