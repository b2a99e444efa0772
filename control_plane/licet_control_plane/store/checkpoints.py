"""Signed checkpoints: what the heads of all chains were at some time, as whoever keeps a copy can hold the ledger to.

A chain proves nothing to somebody who can rewrite all of it. A head that was signed and kept elsewhere does: everything
up to it is fixed.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import Connection, delete, insert, select

from licet.wire.signing import Signer, Statement, VerificationError, Verifier
from licet_control_plane.store import meta
from licet_control_plane.store.schema import checkpoints, shards

KIND: Final = "checkpoint"
FILE_KIND: Final = "licet ledger checkpoint"
KEY: Final = "ledger"
KEPT_MAX: Final = 10_000
"""Checkpoints kept in the database: a week of one a minute. A newer one says all that an older one said."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``heads`` are (shard, number of its last block, hash). ``generation`` is the ledger's, ``at_us`` its time.

    ``document`` is what was signed, with its signature.
    """

    number: int
    deployment: str
    generation: int
    at_us: int
    heads: Sequence[tuple[int, int, bytes]]
    document: bytes

    @classmethod
    def of(cls, document: bytes, verifier: Verifier) -> Self:
        """What a signed document says.

        Raises:
            VerificationError: it is no checkpoint, or no trusted key signed it.
        """
        statement = verifier.verify(document, kind=KIND, key=KEY)
        try:
            at_us = int(statement.payload["at_us"])
            heads = [(int(shard), int(number), bytes(hash_)) for shard, number, hash_ in statement.payload["heads"]]
        except (TypeError, ValueError, KeyError) as error:
            raise VerificationError(f"{KIND} {KEY!r}: its content cannot be read") from error
        return cls(statement.revision, statement.deployment, statement.generation, at_us, heads, document)

    def as_json(self, public_key: str) -> dict[str, Any]:
        """As the API and files have it. Only ``document`` counts: the rest is what it says, for people."""
        at = datetime.fromtimestamp(self.at_us // 1_000_000, UTC).isoformat().replace("+00:00", "Z")
        return {
            "kind": FILE_KIND,
            "number": self.number,
            "deployment": self.deployment,
            "generation": self.generation,
            "at": at,
            "heads": [{"shard": shard, "block": number, "hash": head.hex()} for shard, number, head in self.heads],
            "public_key": public_key,
            "document": base64.b64encode(self.document).decode(),
        }


class Stored(NamedTuple):
    """A checkpoint as the database has it; only ``document`` is signed."""

    number: int
    at: int
    document: bytes


def newest(connection: Connection) -> Stored | None:
    """The newest one; ``None`` before the first."""
    row = connection.execute(select(checkpoints).order_by(checkpoints.c.number.desc()).limit(1)).first()
    return None if row is None else Stored(row.number, row.at, bytes(row.document))


def make(connection: Connection, key: Signer, *, now_us: int) -> bytes | None:
    """The newest signed document, made now if anything was recorded since the last; ``None`` while there is nothing."""
    about = meta.lock(connection)  # one at a time
    heads = [
        [row.shard, row.blocks, bytes(row.head)]
        for row in connection.execute(select(shards).where(shards.c.blocks > 0).order_by(shards.c.shard))
    ]
    last = newest(connection)
    number = 0
    if last is not None:
        try:
            known = Checkpoint.of(last.document, Verifier([key.public_key]))
        except VerificationError:
            pass  # of a key that was replaced, or altered: a new one is due
        else:
            if (known.generation, [list(head) for head in known.heads]) == (about.ledger_generation, heads):
                return last.document
        number = last.number
    if not heads:
        return last.document if last is not None else None
    number += 1
    payload: dict[str, Any] = {"at_us": now_us, "heads": heads}
    document = key.sign(Statement(about.deployment, KIND, KEY, about.ledger_generation, number, payload))
    connection.execute(insert(checkpoints).values(number=number, at=now_us, document=document))
    connection.execute(delete(checkpoints).where(checkpoints.c.number <= number - KEPT_MAX))
    return document
