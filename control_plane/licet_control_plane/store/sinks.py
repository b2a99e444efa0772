"""How far each shard's events were handed to a sink, and what comes next.

A place is a block and how many of its events were taken: the chain's order, which never changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from sqlalchemy import Connection, func, select

from licet.wire.usage import UsageEvent
from licet_control_plane.core import chain
from licet_control_plane.core.chain import Block
from licet_control_plane.core.sealed_events import public_event
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.database import upsert
from licet_control_plane.store.ledger import READABLE
from licet_control_plane.store.schema import blocks, events, logs, shards, sinks
from licet_control_plane.store.subjects import EventReader

_BLOCKS_MAX: Final = 64


class Place(NamedTuple):
    """Everything of blocks before ``block`` was taken, and ``events`` of that one."""

    block: int = 1
    events: int = 0


class NextEvent(NamedTuple):
    """An event and what its log says of it."""

    log_id: str
    decision_prefix: bytes
    event: UsageEvent


@dataclass(frozen=True, slots=True)
class Backlog:
    """How far a sink is behind: blocks that were not taken whole, and when the oldest of them was made, in
    microseconds; ``None`` when it has everything."""

    blocks: int
    oldest_at: int | None


class EventsGone(Exception):
    """What comes next was dropped from the ledger."""


def place_of(connection: Connection, name: str, shard: int) -> Place:
    """Where a sink is; at the first event when it took nothing yet."""
    row = connection.execute(
        select(sinks.c.block, sinks.c.events).where(sinks.c.name == name, sinks.c.shard == shard)
    ).first()
    return Place(row.block, row.events) if row else Place()


def move(connection: Connection, name: str, shard: int, place: Place, *, now_us: int) -> None:
    """Note that everything up to ``place`` was taken."""
    values = {"block": place.block, "events": place.events, "updated_at": now_us}
    statement = upsert(connection, sinks).values(name=name, shard=shard, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["name", "shard"], set_=values))


def events_from(
    connection: Connection, shard: int, place: Place, *, limit: int, ledger_key: LedgerKey | None
) -> tuple[list[NextEvent], Place]:
    """At most ``limit`` events from ``place`` on, in the order of the chain, and the place after them.

    With ``ledger_key`` they are whole, as far as their subjects were not erased; without it what is personal is empty.

    Raises:
        EventsGone: some were dropped.
        Damaged: a row was altered.
    """
    query = select(blocks).where(blocks.c.shard == shard, blocks.c.number >= place.block).order_by(blocks.c.number)
    found: list[NextEvent] = []
    reader = EventReader(connection, ledger_key)
    headers: dict[str, tuple[int, bytes]] = {}
    for row in connection.execute(query.limit(_BLOCKS_MAX)).all():
        block = Block._make(row)
        if block.number != place.block:
            raise EventsGone(f"block {place.block} of shard {shard} is not in the ledger any more")
        skip = place.events
        for log_id, first, last in chain.ranges_of(block):
            count = last - first + 1
            if skip >= count:
                skip -= count
                continue
            first, skip = first + skip, 0
            last = min(last, first + limit - len(found) - 1)
            if log_id not in headers:
                log = connection.execute(
                    select(logs.c.log, logs.c.decision_prefix).where(logs.c.log_id == log_id)
                ).one()
                headers[log_id] = (log.log, bytes(log.decision_prefix))
            number, prefix = headers[log_id]
            rows = connection.execute(
                select(*READABLE)
                .where(events.c.log == number, events.c.seq >= first, events.c.seq <= last)
                .order_by(events.c.seq)
            ).all()
            if len(rows) != last - first + 1:
                raise EventsGone(f"events {first} to {last} of log {log_id} are not in the ledger any more")
            read = (
                [public_event(bytes(one.public), shown="") for one in rows] if ledger_key is None else reader.read(rows)
            )
            found += [NextEvent(log_id, prefix, event) for event in read]
            place = Place(place.block, place.events + len(rows))
            if len(found) >= limit:
                break
        if place.events >= block.events:
            place = Place(block.number + 1)
        if len(found) >= limit:
            break
    return found, place


def backlog(connection: Connection, shard: int, place: Place) -> Backlog:
    """How far behind ``place`` is."""
    head = connection.scalar(select(shards.c.blocks).where(shards.c.shard == shard)) or 0
    oldest = connection.scalar(
        select(func.min(blocks.c.at)).where(blocks.c.shard == shard, blocks.c.number == place.block)
    )
    return Backlog(max(0, head - place.block + 1), oldest)
