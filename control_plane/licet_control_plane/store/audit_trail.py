"""Reading, recounting and signing the audit trail that ``access.record`` writes.

A chain proves nothing to somebody who can rewrite all of it. So its head is signed: within a second of each entry, in
the database and in the state directory of each control plane; and on request, to be kept elsewhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from sqlalchemy import ColumnElement, Connection, Row, delete, func, select

from licet.wire.signing import Signer, Statement, VerificationError, Verifier
from licet_control_plane.core.audit_chain import GENESIS, Entry, Fault, Recount, recount
from licet_control_plane.store import meta
from licet_control_plane.store.database import upsert
from licet_control_plane.store.schema import audit, audit_checkpoints, audit_head

KIND: Final = "audit"
KEY: Final = "audit"
FILE_KIND: Final = "licet audit head"
CHECKPOINTS_MAX: Final = 10_000
"""Signed heads that are kept in the database; a newer one says all that an older one said."""
PAGE: Final = 1_000


@dataclass(frozen=True, slots=True)
class Head:
    """A signed head: entry ``number`` had this ``hash``. ``document`` is what was signed, with its signature."""

    number: int
    hash: bytes
    deployment: str
    at_us: int
    document: bytes

    @classmethod
    def of(cls, document: bytes, verifier: Verifier) -> Self:
        """What a signed document says.

        Raises:
            VerificationError: it is no head, or no trusted key signed it.
        """
        statement = verifier.verify(document, kind=KIND, key=KEY)
        try:
            at_us, hash_ = int(statement.payload["at_us"]), bytes(statement.payload["hash"])
        except (TypeError, ValueError, KeyError) as error:
            raise VerificationError(f"{KIND} {KEY!r}: its content cannot be read") from error
        return cls(statement.revision, hash_, statement.deployment, at_us, document)

    def as_json(self, public_key: str) -> dict[str, Any]:
        """As the API and files have it. Only ``document`` counts: the rest is what it says, for people."""
        return {
            "kind": FILE_KIND,
            "number": self.number,
            "hash": self.hash.hex(),
            "deployment": self.deployment,
            "at_us": self.at_us,
            "public_key": public_key,
            "document": base64.b64encode(self.document).decode(),
        }


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries; an empty field asks for all. Times in microseconds, ``to_us`` exclusive."""

    by: str = ""
    action: str = ""
    target: str = ""
    tenant: str = ""
    from_us: int = 0
    to_us: int | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """For a query. An action may end in ``*``."""
        made: list[ColumnElement[bool]] = [audit.c.at >= self.from_us] if self.from_us else []
        if self.to_us is not None:
            made.append(audit.c.at < self.to_us)
        if self.action.endswith("*"):
            made.append(audit.c.action.startswith(self.action[:-1], autoescape=True))
        elif self.action:
            made.append(audit.c.action == self.action)
        for name in ("by", "target", "tenant"):
            if wanted := getattr(self, name):
                made.append(audit.c[name] == wanted)
        return made


def page(
    connection: Connection, which: AuditFilter, *, before: int | None = None, after: int | None = None, limit: int
) -> list[tuple[Entry, bytes]]:
    """Entries with their hashes: the newest first, below ``before``; or with ``after``, the oldest first above it."""
    query = select(audit).where(*which.conditions()).limit(limit)
    if after is not None:
        query = query.where(audit.c.number > after).order_by(audit.c.number)
    else:
        query = query.order_by(audit.c.number.desc())
        if before is not None:
            query = query.where(audit.c.number < before)
    return [_entry(row) for row in connection.execute(query)]


def numbered(connection: Connection, first: int, last: int) -> Iterator[tuple[Entry, bytes]]:
    """Entries by number, both ends included."""
    while first <= last and (found := page(connection, AuditFilter(), after=first - 1, limit=PAGE)):
        yield from (one for one in found if one[0].number <= last)
        first = found[-1][0].number + 1


def span(connection: Connection, *, from_us: int, to_us: int) -> tuple[int, int]:
    """Numbers of the first and the last entry of an interval. Clocks may step back, so that some between may be of
    other times. Without any: the place where they would be, ``(n + 1, n)``."""
    row = connection.execute(
        select(func.min(audit.c.number), func.max(audit.c.number)).where(audit.c.at >= from_us, audit.c.at < to_us)
    ).one()
    if row[0] is not None:
        return row[0], row[1]
    before = connection.scalar(select(func.max(audit.c.number)).where(audit.c.at < from_us)) or 0
    return before + 1, before


def hash_at(connection: Connection, number: int) -> bytes | None:
    """The hash of an entry."""
    found = connection.scalar(select(audit.c.hash).where(audit.c.number == number))
    return None if found is None else bytes(found)


def head(connection: Connection) -> tuple[int, bytes]:
    """Number and hash of the last entry, as the head's row has them; 0 and ``GENESIS`` before the first."""
    row = connection.execute(select(audit_head)).first()
    return (row.number, bytes(row.hash)) if row is not None else (0, GENESIS)


def newest_signed(connection: Connection) -> bytes | None:
    """The newest signed head in the database."""
    found = connection.scalar(select(audit_checkpoints.c.document).order_by(audit_checkpoints.c.number.desc()).limit(1))
    return None if found is None else bytes(found)


def sign_head(connection: Connection, signer: Signer, *, now_us: int) -> bytes | None:
    """The head as it is, signed: now, unless it is already. ``None`` of an empty trail."""
    row = connection.execute(select(audit_head).with_for_update()).first()
    if row is None or not row.number:
        return None
    if (newest := newest_signed(connection)) is not None:
        with suppress(VerificationError):  # of a key that was rotated, or forged
            known = Head.of(newest, Verifier([signer.public_key]))
            if (known.number, known.hash) == (row.number, bytes(row.hash)):
                return newest
    about = meta.read(connection)
    payload = {"at_us": now_us, "hash": bytes(row.hash)}
    document = signer.sign(Statement(about.deployment, KIND, KEY, about.generation, row.number, payload))
    made = upsert(connection, audit_checkpoints).values(number=row.number, at=now_us, document=document)
    connection.execute(
        made.on_conflict_do_update(
            index_elements=[audit_checkpoints.c.number], set_={"at": now_us, "document": document}
        )
    )
    connection.execute(delete(audit_checkpoints).where(audit_checkpoints.c.number <= row.number - CHECKPOINTS_MAX))
    return document


@dataclass(frozen=True, slots=True)
class Recounted:
    """What recounting a trail found: ``fault`` is the first thing that is not as it was recorded, if there is one.

    ``heads`` is how many signed heads it was held to.
    """

    entries: int
    head: bytes
    heads: int
    fault: Fault | None

    def as_json(self) -> dict[str, Any]:
        """As the API has it."""
        return {
            "ok": self.fault is None,
            "entries": self.entries,
            "head": self.head.hex(),
            "heads": self.heads,
            "fault": None if self.fault is None else {"entry": self.fault.number, "what": self.fault.what},
        }


def verify(connection: Connection, held: Sequence[Head], deployment: str) -> Iterator[int | Recounted]:
    """Recount the whole trail and hold it to signed heads: numbers of entries done meanwhile, then what was found.

    The caller reads one committed state, and gives all heads that it believes.
    """
    wanted = {one.number for one in held}
    known: dict[int, bytes] = {}
    done = Recount()
    last = 0
    while found := page(connection, AuditFilter(), after=last, limit=PAGE):
        known |= {entry.number: hash_ for entry, hash_ in found if entry.number in wanted}
        done = recount(done, found, lambda hash_: _numbers_of(connection, hash_))
        last = found[-1][0].number
        if done.fault is not None:
            break
        yield last
    yield Recounted(done.number, done.head, len(held), _first(done, held, known, connection, deployment))


def _first(
    done: Recount, held: Sequence[Head], known: dict[int, bytes], connection: Connection, deployment: str
) -> Fault | None:
    """The first fault: of the chain, or of a head that it does not fit."""
    faults = [done.fault] if done.fault is not None else []
    below = connection.scalar(select(audit.c.number).where(audit.c.number < 1).order_by(audit.c.number).limit(1))
    if below is not None:
        faults.append(Fault(below, f"entry {below} was inserted: numbers begin with 1"))
    number, hash_ = head(connection)
    if done.fault is None and (number, hash_) != (done.number, done.head):
        if number > done.number:
            faults.append(Fault(done.number + 1, f"entries {done.number + 1} to {number} were removed from the end"))
        else:
            faults.append(Fault(number + 1, f"entries after {number} were inserted: the head does not know them"))
    fitting = 0
    for one in sorted(held, key=lambda head: head.number):
        if one.deployment != deployment:
            faults.append(Fault(one.number, f"the signed head of entry {one.number} is of another deployment"))
        elif one.number > done.number:
            if done.fault is None:
                first = done.number + 1
                faults.append(Fault(first, f"entries {first} to {one.number} were removed: a signed head knows them"))
        elif known.get(one.number) != one.hash:
            what = f"an entry from {fitting + 1} to {one.number} was written anew: a signed head of entry {one.number}"
            faults.append(Fault(fitting + 1, f"{what} does not fit"))
            break
        else:
            fitting = one.number
    return min(faults, key=lambda fault: fault.number, default=None)


def _numbers_of(connection: Connection, hash_: bytes) -> list[int]:
    return list(connection.scalars(select(audit.c.number).where(audit.c.hash == hash_).limit(2)))


def _entry(row: Row[Any]) -> tuple[Entry, bytes]:
    said = {name: getattr(row, name) for name in Entry.__slots__ if name not in ("at_us", "previous")}
    return Entry(**said, at_us=row.at, previous=bytes(row.previous)), bytes(row.hash)
