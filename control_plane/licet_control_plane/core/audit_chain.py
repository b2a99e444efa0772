"""The audit trail as a hash chain: what an entry's hash covers, and recounting a trail. Pure.

An entry's hash covers all that it says, its number, and the hash of the entry before it. So no entry can be altered,
removed, inserted or moved without all that follow being written anew, and then the signed heads do not fit
(``store/audit_trail.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import msgpack

GENESIS: Final = bytes(32)
"""What the first entry follows."""
_DOMAIN: Final = b"licet audit entry v1\0"
NEARBY_MAX: Final = 1_000
"""How far from its place an entry is looked for, to say what became of it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One change, or one attempt that was refused. ``at_us``: the control plane's clock.

    ``by`` is who: the name of a key, the subject of a token, or a part of the program. ``via``: ``api-key``, ``oidc``
    or ``system``; ``credential``: the key's id, or the token's issuer. ``address``: from where, empty for the program
    itself. ``request``: the id that the caller was answered with. ``tenant``: whom it is about, empty for the
    deployment. ``before`` and ``after`` are JSON.
    """

    number: int
    at_us: int
    by: str
    via: str
    credential: str
    address: str
    request: str
    action: str
    target: str
    tenant: str
    before: str
    after: str
    previous: bytes

    def as_json(self, hash_: bytes) -> dict[str, Any]:
        """With its hash; bytes in hex. Times stay numbers, so that the hash can be computed from it."""
        return {**asdict(self), "previous": self.previous.hex(), "hash": hash_.hex()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> tuple[Entry, bytes]:
        """The inverse of ``as_json``.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        fields = {name: found[name] for name in cls.__slots__}
        fields["previous"] = bytes.fromhex(fields["previous"])
        return cls(**fields), bytes.fromhex(found["hash"])


def hash_of(entry: Entry) -> bytes:
    """SHA-256 of everything an entry says. Each field is packed with its type and length: none runs into the next."""
    fields = [getattr(entry, name) for name in Entry.__slots__]
    return hashlib.sha256(_DOMAIN + msgpack.packb(fields, use_bin_type=True)).digest()


@dataclass(frozen=True, slots=True)
class Fault:
    """The first thing that is not as it was recorded: ``what`` is said of entry ``number``."""

    number: int
    what: str


@dataclass(frozen=True, slots=True)
class Recount:
    """How far a trail was recounted: ``number`` and ``head`` are of the last entry that fits."""

    number: int = 0
    head: bytes = GENESIS
    fault: Fault | None = None


def recount(
    so_far: Recount, page: Sequence[tuple[Entry, bytes]], look_up: Callable[[bytes], Iterable[int]] = lambda _hash: ()
) -> Recount:
    """Recount entries that should follow ``so_far``, in the order of their numbers; stops at the first fault.

    ``look_up`` tells the numbers of entries with a hash, to say where a misplaced one belongs.
    """
    if so_far.fault is not None:
        return so_far
    number, head = so_far.number, so_far.head
    for entry, stored in page:
        fits = entry.number == number + 1 and entry.previous == head and hash_of(entry) == stored
        if not fits:
            return Recount(number, head, _fault(number, head, entry, stored, look_up))
        number, head = entry.number, stored
    return Recount(number, head)


def _fault(number: int, head: bytes, entry: Entry, stored: bytes, look_up: Callable[[bytes], Iterable[int]]) -> Fault:
    """What became of the entry that should be ``number + 1``, as far as what is there tells."""
    due = number + 1
    if entry.number > due:
        last = entry.number - 1
        return Fault(due, f"entry {due} was removed" if last == due else f"entries {due} to {last} were removed")
    place = _own_place(entry, stored)
    if place is None:
        return Fault(due, f"entry {due} was altered: its hash is not that of what it says")
    if place != due:
        if place == due + 1:
            return Fault(due, f"entry {due} was removed, and those after it were numbered anew")
        if place == due - 1 and entry.previous != head:
            return Fault(due - 1, f"an entry was inserted as entry {due - 1}")
        return Fault(due, f"entries were reordered: entry {due} is the one that was entry {place}")
    follows = sorted(look_up(entry.previous))
    if follows and follows != [number]:
        return Fault(due, f"entry {due} follows entry {follows[0]}, and not entry {number}: it was inserted or moved")
    return Fault(number or due, f"entry {due} does not follow entry {number}: one of them was written anew")


def _own_place(entry: Entry, stored: bytes) -> int | None:
    """The number under which the entry's hash is right."""
    first = max(1, entry.number - NEARBY_MAX)
    near = range(first, entry.number + NEARBY_MAX + 1)
    for number in sorted(near, key=lambda one: abs(one - entry.number)):
        if hash_of(replace(entry, number=number)) == stored:
            return number
    return None
