"""What a signed export of a month says: exactly which events are in its file, and so which may be missing here.

The signature is the deployment's. Whoever can write the database cannot make one, and so cannot let events disappear as
if their month had been exported. That a drop was ordered is in the chain besides, with the digest of the document.
Source: ``docs/adr/0028-what-leaves-the-ledger-is-in-its-chain.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from sqlalchemy import Connection, and_, or_, select

from licet.wire.signing import Signer, Statement, VerificationError, Verifier, unverified
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.schema import blocks

KIND: Final = "ledger-export"

BlockName = tuple[int, int]
"""Shard and number."""


@dataclass(frozen=True, slots=True)
class Export:
    """``ranges`` are (first, last) of sequence numbers by log id; ``straddling`` the blocks that have events of the
    month and others; ``sha256`` (hexadecimal) is of what the file holds, but for its last line."""

    deployment: str
    month: str
    generation: int
    events: int
    sha256: str
    ranges: Mapping[str, Sequence[tuple[int, int]]]
    straddling: Sequence[BlockName]
    document: bytes

    @classmethod
    def of(cls, document: bytes, month: str, verifier: Verifier | None) -> Self:
        """What a signed document says; with ``verifier`` ``None``, whoever signed it.

        Raises:
            VerificationError: it is no export of that month, or no trusted key signed it.
        """
        if verifier is None:
            statement = unverified(document, kind=KIND, key=month)
        else:
            statement = verifier.verify(document, kind=KIND, key=month)
        try:
            says = statement.payload
            ranges = {
                str(log_id): [(int(first), int(last)) for first, last in spans]
                for log_id, spans in says["ranges"].items()
            }
            straddling = [(int(shard), int(number)) for shard, number in says["blocks"]]
            sha256 = str(says["sha256"])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise VerificationError(f"{KIND} {month!r}: its content cannot be read") from error
        return cls(
            statement.deployment,
            month,
            statement.generation,
            statement.revision,
            sha256,
            ranges,
            straddling,
            document,
        )

    @classmethod
    def signed(
        cls,
        key: Signer,
        *,
        deployment: str,
        generation: int,
        month: Month,
        events: int,
        sha256: str,
        ranges: Ranges,
        straddling: Sequence[BlockName],
    ) -> Self:
        """An export of this deployment."""
        payload: dict[str, Any] = {
            "sha256": sha256,
            "ranges": ranges.found,
            "blocks": [list(one) for one in straddling],
        }
        document = key.sign(Statement(deployment, KIND, str(month), generation, events, payload))
        return cls(deployment, str(month), generation, events, sha256, ranges.found, straddling, document)

    @property
    def digest(self) -> bytes:
        """Names the document in the chain."""
        return digest_of(self.document)


class Ranges:
    """Collects the sequence numbers of an export as ranges; those of a log come in order."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, int]]] = {}

    def add(self, log_id: str, seq: int) -> None:
        """The next event."""
        spans = self.found.setdefault(log_id, [])
        if spans and spans[-1][1] == seq - 1:
            spans[-1] = (spans[-1][0], seq)
        else:
            spans.append((seq, seq))


def digest_of(document: bytes) -> bytes:
    """SHA-256 of a signed document, as the chain names it."""
    return hashlib.sha256(document).digest()


def numbers_of(exports: Iterable[Export]) -> dict[str, RecordedSeqs]:
    """All sequence numbers in ``exports``, by log id."""
    numbers: dict[str, RecordedSeqs] = {}
    for export in exports:
        for log_id, spans in export.ranges.items():
            of_log = numbers.setdefault(log_id, RecordedSeqs())
            for first, last in spans:
                of_log.add(first, last)
    return numbers


def straddling(connection: Connection, month: Month) -> list[BlockName]:
    """Blocks with events of a month and others. Reads what every block says of its times, 100,000 in some 50 ms."""
    over = [
        and_(blocks.c.first_at < instant, blocks.c.last_at >= instant) for instant in (month.start_us, month.end_us)
    ]
    query = select(blocks.c.shard, blocks.c.number).where(blocks.c.events > 0, or_(*over))
    return [(shard, number) for shard, number in connection.execute(query.order_by(blocks.c.shard, blocks.c.number))]
