"""The one row that says which deployment this is, and from which revisions and epochs are allocated."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from licet.domain.redaction import SALT_BYTES
from licet_control_plane.core.lost import new_generation
from licet_control_plane.store.schema import META_ID, meta


@dataclass(frozen=True, slots=True)
class Meta:
    """``revision`` and ``epoch`` are the last allocated; ``redis_run`` the server whose marks were last checked."""

    deployment: str
    generation: int
    ledger_generation: int
    revision: int
    epoch: int
    redis_run: str
    redaction_salt: bytes


def ensure(connection: Connection, *, deployment: str, now_us: int) -> bool:
    """Make the row, with ``deployment``, when there is none. Whether it was made."""
    if connection.execute(select(meta.c.id)).first() is not None:
        return False
    connection.execute(
        insert(meta).values(
            id=META_ID,
            deployment=deployment,
            generation=1,
            ledger_generation=1,
            revision=0,
            epoch=0,
            redis_run="",
            created_at=now_us,
            redaction_salt=os.urandom(SALT_BYTES),
        )
    )
    return True


def read(connection: Connection) -> Meta:
    """The row."""
    return _meta(connection.execute(select(meta)).one())


def lock(connection: Connection) -> Meta:
    """The row, locked until the transaction ends."""
    return _meta(connection.execute(select(meta).with_for_update()).one())


def allocate_revision(connection: Connection) -> Meta:
    """The row with a new revision; the lock is held until the transaction ends."""
    row = lock(connection)
    connection.execute(update(meta).values(revision=row.revision + 1))
    return replace(row, revision=row.revision + 1)


def allocate_epoch(connection: Connection, *, above: int = 0) -> int:
    """A new epoch, greater than any before it and than ``above``."""
    epoch = max(lock(connection).epoch, above) + 1
    connection.execute(update(meta).values(epoch=epoch))
    return epoch


def start_generation(connection: Connection, *, revision: int, seen: Iterable[int] = ()) -> Meta:
    """Begin a new generation, of revisions and of the ledger, whose revisions are all greater than ``revision``. It is
    above those that were ``seen``, as far as they are believed.
    """
    row = lock(connection)
    connection.execute(
        update(meta).values(
            generation=new_generation(row.generation, seen),
            ledger_generation=row.ledger_generation + 1,
            revision=max(row.revision, revision),
        )
    )
    return read(connection)


def start_ledger_generation(connection: Connection) -> int:
    """Begin a new generation of the ledger, which may have lost what it had acknowledged. Returns it."""
    generation = lock(connection).ledger_generation + 1
    connection.execute(update(meta).values(ledger_generation=generation))
    return generation


def set_redis_run(connection: Connection, run: str) -> None:
    """Remember the server whose contents and marks were checked."""
    connection.execute(update(meta).values(redis_run=run))


def _meta(row: Row[Any]) -> Meta:
    return Meta(
        row.deployment,
        row.generation,
        row.ledger_generation,
        row.revision,
        row.epoch,
        row.redis_run,
        bytes(row.redaction_salt),
    )
