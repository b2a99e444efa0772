"""Requests that were sent with an ``Idempotency-Key``, and how they were answered.

A request is ``begin``-ned before anything is done for it. The first transaction that it makes says, within itself, that
it was ``committed``; then its answer is kept. One that was refused before that is forgotten. So after a crash it is
known whether the change is there: a request that did not come to its commit can be done again, and one that did never
is, even though its answer was lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from sqlalchemy import ColumnElement, Connection, delete, func, select, update

from licet_control_plane.store.database import DatabaseUnavailable, upsert
from licet_control_plane.store.schema import idempotency_keys

KEPT_S: Final = 86_400
"""A day: longer than anybody goes on trying again by itself."""
RUNNING_S_MAX: Final = 60
"""A request that has not committed after so long is not running any more: whoever ran it died."""
KEYS_MAX: Final = 10_000
"""Of one caller, one every nine seconds for a day. Then the oldest make room."""
BYTES_MAX: Final = 32 * 1024 * 1024
"""Of answers of one caller: more than as many keys of usual ones take. Without it they could be gigabytes."""

_US: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """As it went out."""

    status: int
    headers: dict[str, str]
    body: bytes


class Standing(Enum):
    """What is known of a key."""

    NEW = auto()
    """Nothing: the request is to be done now."""
    OTHER = auto()
    """It was sent with another request."""
    RUNNING = auto()
    """The same request is being done."""
    LOST = auto()
    """The request was done, and whoever did it died before it answered."""


def begin(connection: Connection, caller: str, key: str, request: str, *, now_us: int) -> Answer | Standing:
    """The answer that the request was given; or what else is known of its key. ``NEW`` only once."""
    connection.execute(delete(idempotency_keys).where(idempotency_keys.c.at < now_us - KEPT_S * _US))
    mine = (idempotency_keys.c.caller == caller, idempotency_keys.c.key == key)
    row = connection.execute(select(idempotency_keys).where(*mine).with_for_update()).first()
    if row is None:
        _make_room(connection, caller)
        values = {"caller": caller, "key": key, "request": request, "at": now_us, "committed": False}
        # Another control plane may have begun it since the line above.
        # (What it returns says so: of an insert PostgreSQL's driver does not count the rows.)
        statement = upsert(connection, idempotency_keys).values(**values).on_conflict_do_nothing()
        begun = connection.execute(statement.returning(idempotency_keys.c.key)).first()
        return Standing.RUNNING if begun is None else Standing.NEW
    if row.request != request:
        return Standing.OTHER
    if row.status is not None:
        return Answer(row.status, json.loads(row.headers), bytes(row.body))
    if row.at > now_us - RUNNING_S_MAX * _US:
        return Standing.RUNNING
    if row.committed:
        return Standing.LOST
    connection.execute(update(idempotency_keys).where(*mine).values(at=now_us))
    return Standing.NEW


def commit(connection: Connection, caller: str, key: str, *, begun_us: int) -> None:
    """Say that the request's change is there, in the transaction that makes it. ``begun_us``: the ``now_us`` of its
    ``begin``.

    Raises:
        DatabaseUnavailable: whoever began it took so long that it was begun once more; or its key had to make room.
    """
    begun = update(idempotency_keys).where(*_begun(caller, key, begun_us)).values(committed=True)
    if connection.execute(begun).rowcount != 1:
        raise DatabaseUnavailable("the request took too long, and is being done by another with its key")


def keep(connection: Connection, caller: str, key: str, answer: Answer, *, begun_us: int) -> None:
    """Keep the answer for whoever asks again."""
    values = {"status": answer.status, "headers": json.dumps(answer.headers), "body": answer.body}
    connection.execute(update(idempotency_keys).where(*_begun(caller, key, begun_us)).values(**values))


def forget(connection: Connection, caller: str, key: str, *, begun_us: int) -> bool:
    """The request was not done: it may be sent again. Not when it has committed: that it was not, and ``False``."""
    begun = _begun(caller, key, begun_us)
    gone = connection.execute(delete(idempotency_keys).where(*begun, idempotency_keys.c.committed.is_(False)))
    return bool(gone.rowcount)


def _begun(caller: str, key: str, begun_us: int) -> tuple[ColumnElement[bool], ...]:
    keys = idempotency_keys.c
    return keys.caller == caller, keys.key == key, keys.at == begun_us


def _make_room(connection: Connection, caller: str) -> None:
    mine = idempotency_keys.c.caller == caller
    size = func.coalesce(func.length(idempotency_keys.c.body), 0)
    sums = select(func.count(), func.coalesce(func.sum(size), 0)).where(mine)
    count, total = connection.execute(sums).one()
    if count < KEYS_MAX and total <= BYTES_MAX:
        return
    oldest = []
    for key, answer_bytes in connection.execute(
        select(idempotency_keys.c.key, size).where(mine).order_by(idempotency_keys.c.at)
    ):
        if count < KEYS_MAX and total <= BYTES_MAX:
            break
        oldest.append(key)
        count, total = count - 1, total - answer_bytes
    connection.execute(delete(idempotency_keys).where(mine, idempotency_keys.c.key.in_(oldest)))
