"""What stays of a block's tree when some of its events leave the ledger, and not all: enough to check its root.

Written in the transaction that lets the first of them go. A block that is gone whole needs nothing: its root is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, delete, select

from licet_control_plane.core import chain
from licet_control_plane.core.chain import HASH_BYTES, Block
from licet_control_plane.core.merkle import Span, hash_over, subtrees
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.core.sealed_events import leaf_hash
from licet_control_plane.store.database import upsert
from licet_control_plane.store.exports import BlockName
from licet_control_plane.store.schema import blocks, events, logs, remnants

Numbers = Mapping[str, RecordedSeqs]
"""Sequence numbers by log id."""


class Unprovable(Exception):
    """An event that a block names is missing: what would stay of the block cannot be proven."""


def keep(connection: Connection, names: Sequence[BlockName], *, gone: Numbers, going: Numbers) -> None:
    """Write the remnants of blocks that have events in ``going``, which are here still; those in ``gone`` may be not.

    Raises:
        Unprovable: the ledger is not whole.
    """
    for shard, number in names:
        here = (remnants.c.shard == shard) & (remnants.c.number == number)
        row = connection.execute(select(blocks).where(blocks.c.shard == shard, blocks.c.number == number)).first()
        if row is None:
            raise Unprovable(f"block {number} of shard {shard} is missing")
        block = Block._make(row)
        ranges = chain.ranges_of(block)
        before = chain.positions(ranges, gone)
        after = _united(before, chain.positions(ranges, going))
        if after == [(0, block.events)]:
            connection.execute(delete(remnants).where(here))
            continue
        stored = connection.scalar(select(remnants.c.nodes).where(here)) or b""
        known = dict(zip(subtrees(block.events, before), split(bytes(stored)), strict=False))
        known |= _leaves(connection, ranges)
        try:
            nodes = b"".join(hash_over(start, end, known) for start, end in subtrees(block.events, after))
        except KeyError as error:
            what = f"event {error.args[0] + 1} of the {block.events} of block {number} of shard {shard} is missing"
            raise Unprovable(what) from error
        statement = upsert(connection, remnants).values(shard=shard, number=number, nodes=nodes)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["shard", "number"], set_={"nodes": statement.excluded.nodes}
            )
        )


def of_blocks(connection: Connection, shard: int, first: int, last: int) -> dict[int, bytes]:
    """The remnants of blocks ``first`` to ``last`` of a shard, by number."""
    query = select(remnants.c.number, remnants.c.nodes).where(
        remnants.c.shard == shard, remnants.c.number.between(first, last)
    )
    return {number: bytes(nodes) for number, nodes in connection.execute(query)}


def split(nodes: bytes) -> list[bytes]:
    """The hashes, one by one."""
    return [nodes[start : start + HASH_BYTES] for start in range(0, len(nodes), HASH_BYTES)]


def _leaves(connection: Connection, ranges: Sequence[chain.Range]) -> dict[Span, bytes]:
    """The leaves of a block's events that are here."""
    found: dict[Span, bytes] = {}
    offset = 0
    for log_id, first, last in ranges:
        log = connection.scalar(select(logs.c.log).where(logs.c.log_id == log_id))
        rows = connection.execute(
            select(events.c.seq, events.c.public, events.c.commitment).where(
                events.c.log == log, events.c.seq.between(first, last)
            )
        )
        for seq, public, commitment in rows:
            at = offset + seq - first
            found[at, at + 1] = leaf_hash(bytes(public), bytes(commitment))
        offset += last - first + 1
    return found


def _united(some: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Spans that cover both, ascending, none touching the next."""
    found: list[Span] = []
    for start, end in sorted((*some, *others)):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
