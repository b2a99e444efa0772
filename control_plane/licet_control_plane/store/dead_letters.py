"""Batches that the ledger could not take, kept with the reason until somebody decides about them.

Guaranteed:
- a batch is here, durably, before it leaves the usage stream; what there is no room for stays in the stream;
- the same bytes are kept once, however often they come: a sidecar sends again what was not acknowledged;
- one that was dropped leaves its digest, its reason and who dropped it; its bytes are gone.

They are kept as they came: personal data in them is in clear, and erasing a subject does not reach it.
Source: ``docs/adr/0021-dead-letters-in-the-database.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, func, insert, select, update

from licet_control_plane.store import access
from licet_control_plane.store.schema import dead_letters

LETTERS_MAX: Final = 10_000
BYTES_MAX: Final = 1 << 30
"""Of all bodies together. A sidecar with one bad event sends one batch, so this is room for hundreds of them."""
REASON_CHARS_MAX: Final = 1_000
_LOG_ID_CHARS_MAX: Final = 96
WAITS: Final = ""
RECORDED: Final = "recorded"
DROPPED: Final = "dropped"


class Letter(NamedTuple):
    """A batch that cannot be recorded. ``log_id``, ``first_seq`` and ``last_seq`` as far as it can be read."""

    entry: str
    body: bytes
    reason: str
    log_id: str = ""
    first_seq: int = 0
    last_seq: int = 0


class Kept(NamedTuple):
    """What became of a letter: whether it is kept, and whether nobody knew it before."""

    kept: bool
    new: bool


@dataclass(frozen=True, slots=True)
class Waiting:
    """Letters that nobody decided about yet, and the bytes of their bodies."""

    letters: int = 0
    bytes: int = 0


def keep(connection: Connection, shard: int, letters: Sequence[Letter], *, now_us: int) -> list[Kept]:
    """Keep ``letters`` as far as there is room; what became of each, in order. May be repeated."""
    room = waiting(connection)
    count, size = room.letters, room.bytes
    done: list[Kept] = []
    for letter in letters:
        digest = hashlib.sha256(letter.body).hexdigest()
        outcome = connection.scalar(select(dead_letters.c.outcome).where(dead_letters.c.digest == digest))
        if outcome in (WAITS, DROPPED):
            connection.execute(
                update(dead_letters)
                .where(dead_letters.c.digest == digest)
                .values(times=dead_letters.c.times + 1, last_at=now_us)
            )
            done.append(Kept(kept=True, new=False))
            continue
        if count >= LETTERS_MAX or size + len(letter.body) > BYTES_MAX:
            done.append(Kept(kept=False, new=True))
            continue
        count, size = count + 1, size + len(letter.body)
        values = letter._asdict() | {"shard": shard, "last_at": now_us}
        values |= {"reason": _text(letter.reason, REASON_CHARS_MAX), "log_id": _text(letter.log_id, _LOG_ID_CHARS_MAX)}
        if outcome is None:
            connection.execute(
                insert(dead_letters).values(
                    **values, digest=digest, first_at=now_us, times=1, bytes=len(letter.body), outcome=WAITS
                )
            )
        else:  # it was recorded once, and is refused now
            connection.execute(
                update(dead_letters)
                .where(dead_letters.c.digest == digest)
                .values(**values, times=dead_letters.c.times + 1, outcome=WAITS, settled_at=None, settled_by=None)
            )
        done.append(Kept(kept=True, new=True))
    return done


def waiting(connection: Connection) -> Waiting:
    """How many wait for a decision."""
    row = connection.execute(
        select(func.count(), func.coalesce(func.sum(dead_letters.c.bytes), 0)).where(dead_letters.c.outcome == WAITS)
    ).one()
    return Waiting(int(row[0]), int(row[1]))


def page(connection: Connection, *, after: int, limit: int, settled: bool) -> Sequence[Row[Any]]:
    """Letters by number, after ``after``, without their bodies; with ``settled`` also those that were decided about."""
    query = select(*(column for column in dead_letters.c if column.name != "body"))
    query = query.where(dead_letters.c.number > after)
    if not settled:
        query = query.where(dead_letters.c.outcome == WAITS)
    return connection.execute(query.order_by(dead_letters.c.number).limit(limit)).all()


def get(connection: Connection, number: int) -> Row[Any] | None:
    """One letter, with its body (``None`` once it is settled)."""
    return connection.execute(select(dead_letters).where(dead_letters.c.number == number)).first()


def settle(connection: Connection, number: int, outcome: str, *, by: str, now_us: int) -> bool:
    """Note that a letter was ``RECORDED`` (in the transaction that did it) or is ``DROPPED``; its body is discarded.

    Whether it waited until now.
    """
    columns = ("digest", "shard", "reason", "log_id", "first_seq", "last_seq", "bytes", "times")
    row = connection.execute(
        select(*(dead_letters.c[name] for name in columns)).where(
            dead_letters.c.number == number, dead_letters.c.outcome == WAITS
        )
    ).first()
    if row is None:
        return False
    connection.execute(
        update(dead_letters)
        .where(dead_letters.c.number == number)
        .values(body=None, outcome=outcome, settled_at=now_us, settled_by=by)
    )
    access.record(
        connection,
        by=by,
        action=f"dead_letter.{outcome}",
        target=str(number),
        before=dict(row._mapping),
        after=None,
        now_us=now_us,
    )
    return True


def set_reason(connection: Connection, number: int, reason: str) -> None:
    """Why the last retry failed."""
    connection.execute(
        update(dead_letters).where(dead_letters.c.number == number).values(reason=_text(reason, REASON_CHARS_MAX))
    )


def _text(text: str, chars_max: int) -> str:
    """What every database takes: a bad batch must not fail here a second time."""
    return text.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")[:chars_max]
