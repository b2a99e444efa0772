"""Published changes: the outbox the publisher copies from, and the record of what was published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, func, insert, select, update

from licet.wire.documents import digest_of
from licet.wire.signing import Statement, read_own, signed_with
from licet_control_plane.store import meta
from licet_control_plane.store.database import DatabaseUnavailable
from licet_control_plane.store.schema import revisions, signing_keys

RESYNC: Final = "resync"
"""Kind of an entry in the stream of changes that names no document: whoever was behind it reads them all again."""

Sign = Callable[[Statement], bytes]


@dataclass(frozen=True, slots=True)
class Revision:
    """One change. ``document`` is signed; its SHA-256 (hex) is ``digest``."""

    revision: int
    generation: int
    kind: str
    key: str
    digest: str
    document: bytes


@dataclass(frozen=True, slots=True)
class Published:
    """What is known of a revision without its document."""

    revision: int
    generation: int
    at_us: int
    published_at_us: int | None


def append(
    connection: Connection,
    *,
    kind: str,
    key: str,
    payload: Any,
    sign: Sign,
    now_us: int,
    by: str,
    message: str = "",
) -> int:
    """Allocate the next revision for a document and put it in the outbox. Returns the revision.

    Raises:
        DatabaseUnavailable: another control plane rotated the signing key, and this one has yet to follow.
    """
    row = meta.allocate_revision(connection)
    document = sign(Statement(row.deployment, kind, key, row.generation, row.revision, payload))
    active = connection.scalar(select(signing_keys.c.key_id).where(signing_keys.c.state == "active"))
    if active is not None and signed_with(document) != active:
        raise DatabaseUnavailable("the signing key was rotated a moment ago")
    connection.execute(
        insert(revisions).values(
            revision=row.revision,
            generation=row.generation,
            kind=kind,
            key=key,
            digest=digest_of(document),
            document=document,
            at=now_us,
            by=by,
            message=message,
        )
    )
    return row.revision


def last_published(connection: Connection) -> int:
    """Every revision up to this one is published, or was superseded by a new generation; 0 for none."""
    first_unpublished = connection.scalar(
        select(func.min(revisions.c.revision)).where(revisions.c.published_at.is_(None))
    )
    return meta.read(connection).revision if first_unpublished is None else int(first_unpublished) - 1


def outbox(connection: Connection, *, after: int, limit: int) -> list[Revision]:
    """The next revisions to publish, ascending."""
    rows = connection.execute(
        select(revisions).where(revisions.c.revision > after).order_by(revisions.c.revision).limit(limit)
    )
    return [_revision(row) for row in rows]


def mark_published(connection: Connection, *, up_to: int, now_us: int) -> None:
    """Everything up to ``up_to`` is in Redis."""
    connection.execute(
        update(revisions)
        .where(revisions.c.published_at.is_(None), revisions.c.revision <= up_to)
        .values(published_at=now_us)
    )


def get(connection: Connection, revision: int) -> Published | None:
    """What is known of one revision."""
    row = connection.execute(
        select(revisions.c.generation, revisions.c.at, revisions.c.published_at).where(revisions.c.revision == revision)
    ).first()
    return Published(revision, row.generation, row.at, row.published_at) if row else None


def digest(connection: Connection, revision: int) -> str | None:
    """The digest of a revision's document."""
    return connection.scalar(select(revisions.c.digest).where(revisions.c.revision == revision))


def newest(connection: Connection, kind: str, *, up_to: int, after_key: str = "", limit: int = 1) -> list[Revision]:
    """The newest document of each key of ``kind`` at ``up_to``, by key: one page, after ``after_key``."""
    latest = (
        select(func.max(revisions.c.revision).label("revision"))
        .where(revisions.c.kind == kind, revisions.c.revision <= up_to, revisions.c.key > after_key)
        .group_by(revisions.c.key)
        .order_by(revisions.c.key)
        .limit(limit)
        .subquery()
    )
    rows = connection.execute(
        select(revisions).join(latest, revisions.c.revision == latest.c.revision).order_by(revisions.c.key)
    )
    return [_revision(row) for row in rows]


def payload_of(document: Revision) -> Any:
    """What a document of one's own database says."""
    return read_own(document.document).payload


def _revision(row: Row[Any]) -> Revision:
    return Revision(row.revision, row.generation, row.kind, row.key, row.digest, row.document)
