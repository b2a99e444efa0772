"""What one record of the archive says: a block of a shard's chain, with the events it covers, as the ledger keeps them.

Events are sealed: without the keys in ``subject-keys`` nothing in a record says who did anything. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgpack

from licet_control_plane.core import chain
from licet_control_plane.core.chain import Block
from licet_control_plane.core.merkle import root_of
from licet_control_plane.core.sealed_events import Sealed, leaf_hash

SCHEMA_VERSION: Final = 2


class ArchivedBlock(NamedTuple):
    """``events`` are in the order of the block's leaves, as its ranges name them."""

    block: Block
    events: Sequence[Sealed]

    def pack(self) -> bytes:
        """As the record's bytes."""
        columns = list(zip(*self.events, strict=True)) or [(), (), ()]
        packed: bytes = msgpack.packb([SCHEMA_VERSION, self.block, columns], use_bin_type=True)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> ArchivedBlock:
        """The inverse of ``pack``.

        Raises:
            ValueError: not such a record, or one of a newer version.
        """
        try:
            fields: list[Any] = msgpack.unpackb(data, raw=False)
            if fields[0] != SCHEMA_VERSION:
                raise ValueError(f"it is of version {fields[0]}; this program reads {SCHEMA_VERSION}")
            _, block, columns = fields[:3]
            return cls(Block(*block), [Sealed(*event) for event in zip(*columns, strict=True)])
        except (TypeError, IndexError, msgpack.UnpackException) as error:
            raise ValueError(f"it is not a block: {error}") from error

    def problem(self, previous: bytes) -> str:
        """Why it is not the block after the one with the hash ``previous``; empty when it is."""
        block = self.block
        if block.previous != previous:
            return "its hash of the block before it is another one"
        if chain.hash_of(block) != block.hash:
            return "its hash is not that of its contents"
        if root_of([leaf_hash(event.public, event.commitment) for event in self.events]) != block.root:
            return "its events are not those that it was made of"
        if sum(last - first + 1 for _, first, last in chain.ranges_of(block)) != len(self.events):
            return "its ranges do not fit its events"
        return ""
