"""Blocks as the archive holds them: read from the ledger, and put back in an empty one.

This is the one place where the forms of the ledger and the archive meet.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sqlalchemy import Connection, insert, select, update

from licet_control_plane.archive.files import ArchiveDamaged
from licet_control_plane.archive.records import ArchivedBlock
from licet_control_plane.archive.subject_keys import ArchivedSubject
from licet_control_plane.core import chain
from licet_control_plane.core.chain import Block
from licet_control_plane.core.sealed_events import Sealed
from licet_control_plane.store import access, meta
from licet_control_plane.store.database import POSTGRESQL
from licet_control_plane.store.schema import blocks, events, logs, shards, subjects

_ASK_MAX: Final = 500
"""Values in one question: SQLite takes at least 999."""


@dataclass(frozen=True, slots=True)
class ChainHead:
    """Where a shard's chain ends: the number of its last block, 0 for none, and its hash."""

    shard: int
    blocks: int
    hash: bytes


def heads(connection: Connection) -> dict[int, ChainHead]:
    """Of every shard that has one, by shard."""
    rows = connection.execute(select(shards.c.shard, shards.c.blocks, shards.c.head))
    return {row.shard: ChainHead(row.shard, row.blocks, bytes(row.head)) for row in rows}


def hash_at(connection: Connection, shard: int, number: int) -> bytes | None:
    """The hash of a block; of block 0, what the first block has for the one before it. ``None``: it is not there."""
    if number == 0:
        return chain.genesis(meta.read(connection).deployment, shard)
    found = connection.scalar(select(blocks.c.hash).where(blocks.c.shard == shard, blocks.c.number == number))
    return None if found is None else bytes(found)


class FoundBlock(NamedTuple):
    """A block of the ledger, and the numbers of the subjects that its events are about, or that it says were erased:
    also somebody who was never in an event must keep the number.
    """

    archived: ArchivedBlock
    subjects: set[int]


def blocks_after(
    connection: Connection, shard: int, after: int, *, events_max: int, blocks_max: int
) -> list[FoundBlock]:
    """The blocks of a shard after number ``after``, ascending: at most ``blocks_max``, and no more once they hold
    ``events_max`` events. Fewer when there are no more, or when one was dropped from the ledger."""
    query = (select(blocks).where(blocks.c.shard == shard, blocks.c.number > after).order_by(blocks.c.number)).limit(
        blocks_max
    )
    found: list[FoundBlock] = []
    count = 0
    for row in connection.execute(query).all():
        block = Block._make(row)
        if block.number != after + 1 + len(found):
            break
        found.append(_archived(connection, block))
        count += block.events
        if count >= events_max:
            break
    return found


def _archived(connection: Connection, block: Block) -> FoundBlock:
    held: list[Sealed] = []
    about = set(chain.erased_of(block))
    numbers: dict[str, int] = {}
    for log_id, first, last in chain.ranges_of(block):
        if log_id not in numbers:
            numbers[log_id] = connection.execute(select(logs.c.log).where(logs.c.log_id == log_id)).scalar_one()
        rows = connection.execute(
            select(events.c.subject, events.c.public, events.c.commitment, events.c.personal)
            .where(events.c.log == numbers[log_id], events.c.seq >= first, events.c.seq <= last)
            .order_by(events.c.seq)
        )
        for subject, *sealed in rows:
            about.add(subject)
            held.append(Sealed(*sealed))
    if len(held) != block.events:
        raise ArchiveDamaged(
            f"block {block.number} of shard {block.shard} has {block.events} events, and the ledger {len(held)} of"
            " them: a month that was dropped before it was archived cannot be"
        )
    return FoundBlock(ArchivedBlock(block, held), about)


def subject_rows(connection: Connection, numbers: Sequence[int]) -> list[ArchivedSubject]:
    """The subjects of these numbers, with their wrapped keys."""
    found: list[ArchivedSubject] = []
    for start in range(0, len(numbers), _ASK_MAX):
        some = numbers[start : start + _ASK_MAX]
        for row in connection.execute(select(subjects).where(subjects.c.number.in_(some))):
            found.append(
                ArchivedSubject(
                    row.number,
                    row.tenant,
                    row.type,
                    row.tag,
                    row.principal,
                    row.key,
                    row.created_at,
                    row.erased_at,
                )
            )
    return found


def begin_rebuilding(connection: Connection, source: str, *, now_us: int) -> int:
    """A new generation of the ledger, so that sidecars send again what they still hold. Returns it."""
    generation = meta.start_ledger_generation(connection)
    access.record(
        connection,
        by="licet ledger rebuild",
        action="ledger.rebuild",
        target=f"ledger generation {generation}",
        before=None,
        after={"archive": source},
        now_us=now_us,
    )
    return generation


def put_subjects(connection: Connection, archived: Collection[ArchivedSubject]) -> None:
    """Put subjects in the ledger that it does not have; those that it has stay as they are."""
    numbers = [subject.number for subject in archived]
    known: set[int] = set()
    for start in range(0, len(numbers), _ASK_MAX):
        some = numbers[start : start + _ASK_MAX]
        known |= set(connection.scalars(select(subjects.c.number).where(subjects.c.number.in_(some))))
    new = [subject._asdict() for subject in archived if subject.number not in known]
    gone = [subject.number for subject in archived if subject.erased_at is not None and subject.number in known]
    for start in range(0, len(gone), _ASK_MAX):  # somebody who came back since has the same tag under another number
        some = gone[start : start + _ASK_MAX]
        erased = update(subjects).where(subjects.c.number.in_(some)).values(tag=None, principal=None, key=None)
        connection.execute(erased)
    if new:
        connection.execute(insert(subjects), new)
    if connection.dialect.name == POSTGRESQL:
        # Numbers that were given explicitly do not move what the next one is taken from.
        connection.exec_driver_sql(
            "SELECT setval(pg_get_serial_sequence('ledger_subjects', 'number'),"
            " greatest((SELECT max(number) FROM ledger_subjects), 1))"
        )


def erase_subjects(connection: Connection, numbers: Sequence[int], *, at: int) -> None:
    """What an erasure that the chain records did to the ledger, done to it again."""
    for start in range(0, len(numbers), _ASK_MAX):
        some = numbers[start : start + _ASK_MAX]
        connection.execute(update(events).where(events.c.subject.in_(some)).values(personal=None))
        connection.execute(
            update(subjects)
            .where(subjects.c.number.in_(some), subjects.c.erased_at.is_(None))
            .values(tag=None, principal=None, key=None, erased_at=at)
        )
