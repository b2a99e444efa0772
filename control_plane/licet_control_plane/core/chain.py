"""The chain of blocks over a shard of the ledger, and the Merkle tree in each. Pure.

A block says what one transaction put in the ledger: which numbers of which logs, in that order, and the root of the
tree over their leaves; or which subjects were erased. Its hash covers all of it and the hash before it, so that a head
(shard, number, hash) fixes everything up to it.
Source: RFC 6962, section 2.1, for the tree; ``docs/adr/0017-a-ledger-that-proves-and-forgets.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgpack

HASH_BYTES: Final = 32
SCHEMA_VERSION: Final = 1
_DOMAIN: Final = b"licet ledger chain v1\0"
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
"""Of a tree without leaves."""

Range = tuple[str, int, int]
"""(log id, first, last) of sequence numbers, bounds included."""


class Block(NamedTuple):
    """One block. ``at`` is when it was made, ``first_at`` and ``last_at`` the earliest and latest time of its events,
    microseconds since the Unix epoch; ``generation`` is the ledger's. ``ranges`` and ``erased`` are msgpack: a list of
    ``Range`` in the order of the leaves, and a list of numbers of subjects.
    """

    shard: int
    number: int
    generation: int
    at: int
    events: int
    first_at: int
    last_at: int
    ranges: bytes
    erased: bytes
    root: bytes
    previous: bytes
    hash: bytes


def genesis(deployment: str, shard: int) -> bytes:
    """What block 1 of a shard has for the hash before it."""
    return hashlib.sha256(_DOMAIN + f"{deployment}/{shard}".encode()).digest()


def next_block(
    previous: bytes,
    shard: int,
    number: int,
    *,
    generation: int,
    at: int,
    ranges: Sequence[Range] = (),
    leaves: Sequence[bytes] = (),
    span: tuple[int, int] = (0, 0),
    erased: Sequence[int] = (),
) -> Block:
    """The block after the one with the hash ``previous``. ``leaves`` are of the events of ``ranges``, in order;
    ``span`` is the earliest and latest time of them."""
    block = Block(
        shard=shard,
        number=number,
        generation=generation,
        at=at,
        events=len(leaves),
        first_at=span[0],
        last_at=span[1],
        ranges=_packed(ranges),
        erased=_packed(erased),
        root=root_of(leaves),
        previous=previous,
        hash=b"",
    )
    return block._replace(hash=hash_of(block))


def hash_of(block: Block) -> bytes:
    """What the block's hash must be."""
    body = _packed(
        [
            SCHEMA_VERSION,
            block.shard,
            block.number,
            block.generation,
            block.at,
            block.events,
            block.first_at,
            block.last_at,
            block.ranges,
            block.erased,
            block.root,
        ]
    )
    return hashlib.sha256(_DOMAIN + block.previous + body).digest()


def ranges_of(block: Block) -> list[Range]:
    """The ranges, read.

    Raises:
        ValueError: they are damaged.
    """
    try:
        return [(str(log_id), int(first), int(last)) for log_id, first, last in msgpack.unpackb(block.ranges)]
    except (TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"ranges cannot be read: {error}") from error


def erased_of(block: Block) -> list[int]:
    """Numbers of the subjects that it says were erased.

    Raises:
        ValueError: they are damaged.
    """
    try:
        return [int(number) for number in msgpack.unpackb(block.erased)]
    except (TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"erased subjects cannot be read: {error}") from error


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes (``sealed_events.leaf_hash``), in order.

    Pairing neighbors level by level, an odd last one as it is, gives the tree of RFC 6962, which splits at the largest
    power of two.
    """
    if not leaves:
        return EMPTY_ROOT
    sha256 = hashlib.sha256
    level = list(leaves)
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        pairs = iter(level)
        level = [sha256(b"\1" + left + right).digest() for left, right in zip(pairs, pairs, strict=False)]
        level += odd
    return level[0]


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed
