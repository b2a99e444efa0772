"""The chain of blocks over a shard of the ledger. Pure.

A block says what one transaction did to the ledger: which numbers of which logs it put there, in that order, and the
root of the tree over their leaves; which logs it met first; which numbers were declared lost; which subjects were
erased; which month began to be dropped, or is gone. Its hash covers all of it and the hash before it, so that a head
(shard, number, hash) fixes everything up to it.
Source: ``docs/adr/0017-a-ledger-that-proves-and-forgets.md``,
``docs/adr/0028-what-leaves-the-ledger-is-in-its-chain.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgpack

from licet_control_plane.core.merkle import Span, root_of
from licet_control_plane.core.recorded import RecordedSeqs

HASH_BYTES: Final = 32
SCHEMA_VERSION: Final = 1
_DOMAIN: Final = b"licet ledger chain v1\0"
Range = tuple[str, int, int]
"""(log id, first, last) of sequence numbers, bounds included."""


class MetLog(NamedTuple):
    """A log that a block is the first to name: what is known of it for good. A decision's id is the prefix and the
    sequence number."""

    log_id: str
    sidecar: str
    incarnation: int
    previous_incarnation: int
    previous_last_seq: int
    decision_prefix: bytes


class Lost(NamedTuple):
    """Numbers of a log, bounds included, that its sidecar declared lost, as far as they were not recorded then."""

    log_id: str
    first: int
    last: int
    reason: str


class Drop(NamedTuple):
    """A month such as ``2026-05`` whose events leave the ledger, as a signed export lists them.

    ``export`` is the SHA-256 of its signed document, ``sums`` a digest of what the month came to when it began, over
    all that ever left of it. ``done``: everything is gone.
    """

    month: str
    export: bytes
    sums: bytes
    done: bool


T = TypeVar("T", MetLog, Lost, Drop)


class Block(NamedTuple):
    """One block. ``at`` is when it was made, ``first_at`` and ``last_at`` the earliest and latest time of its events,
    microseconds since the Unix epoch; ``generation`` is the ledger's. ``ranges``, ``erased``, ``logs``, ``lost`` and
    ``dropped`` are msgpack: lists of ``Range`` in the order of the leaves, of numbers of subjects, of ``MetLog``, of
    ``Lost`` and of ``Drop``.
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
    logs: bytes
    lost: bytes
    dropped: bytes
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
    logs: Sequence[MetLog] = (),
    lost: Sequence[Lost] = (),
    dropped: Sequence[Drop] = (),
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
        logs=_packed(logs),
        lost=_packed(lost),
        dropped=_packed(dropped),
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
            block.logs,
            block.lost,
            block.dropped,
            block.root,
        ]
    )
    return hashlib.sha256(_DOMAIN + block.previous + body).digest()


def ranges_of(block: Block) -> list[Range]:
    """The ranges, read.

    Raises:
        ValueError: they are damaged; as the next ones do.
    """
    return [(str(log_id), int(first), int(last)) for log_id, first, last in _items(block.ranges, 3, "ranges")]


def erased_of(block: Block) -> list[int]:
    """Numbers of the subjects that it says were erased."""
    try:
        return [int(number) for number in msgpack.unpackb(block.erased)]
    except (TypeError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"erased subjects cannot be read: {error}") from error


def logs_of(block: Block) -> list[MetLog]:
    """The logs that it is the first to name."""
    return _all(MetLog, block.logs, "logs")


def lost_of(block: Block) -> list[Lost]:
    """The numbers that were declared lost with it."""
    return _all(Lost, block.lost, "lost numbers")


def drops_of(block: Block) -> list[Drop]:
    """The months that began to be dropped with it, or were gone."""
    return _all(Drop, block.dropped, "dropped months")


def positions(ranges: Sequence[Range], numbers: Mapping[str, RecordedSeqs]) -> list[Span]:
    """Which leaves of a block with these ranges are events in ``numbers`` (by log id): ascending, none touching."""
    found: list[Span] = []
    offset = 0
    for log_id, first, last in ranges:
        wanted = numbers.get(log_id)
        start = first
        for outside, until in (*wanted.missing(first, last), (last + 1, last + 1)) if wanted else ():
            if outside > start:
                begin, end = offset + start - first, offset + outside - first
                if found and found[-1][1] == begin:
                    begin = found.pop()[0]
                found.append((begin, end))
            start = until + 1
        offset += last - first + 1
    return found


def _all(kind: type[T], packed: bytes, what: str) -> list[T]:
    return [kind(*fields) for fields in _items(packed, len(kind._fields), what)] if packed != _NOTHING else []


def _items(packed: bytes, width: int, what: str) -> list[Sequence[Any]]:
    try:
        items: list[Sequence[Any]] = msgpack.unpackb(packed)
        if any(len(item) != width for item in items):
            raise ValueError(f"one has not {width} fields")
    except (TypeError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    return items


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


_NOTHING: Final = _packed([])
