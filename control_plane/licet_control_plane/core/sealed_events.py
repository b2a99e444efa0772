"""How an event is kept: what is needed to bill and to prove it, in clear; what is about a person, under that person's
key. Pure; the ledger and the archive store the same bytes.

An event becomes three byte strings:

- ``public``: msgpack of the fields that are about no person, the subject's number among them;
- ``commitment``: ``SHA-256(salt ‖ personal fields)``, 32 bytes;
- ``personal``: a nonce, and under AES-256-GCM with the key of the subject: 16 bytes of salt and the msgpack of the
  personal fields. What it is the personal part *of* (log and public bytes) is authenticated with it.

The leaf of the Merkle tree is ``SHA-256(0x00 ‖ public ‖ commitment)``. Erasing a subject destroys its key and
``personal``, and with them the salt: the commitment stays, says nothing without the salt, and the chain verifies as
before. While the key is there, a change of any byte of any of the three shows, and shows in which event.

Personal are: the subject's id, on whose behalf, the resource's id, the idempotency key, the context attributes, the
seat or reservation it is about, and the names of quotas with a scope, whose digests could be guessed back. So is every
field that a newer sidecar appended and this program does not know.
Source: ``docs/adr/0017-a-ledger-that-proves-and-forgets.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple, Protocol

import msgpack
from cryptography.exceptions import InvalidTag

from licet.wire.usage import UsageEvent

SCHEMA_VERSION: Final = 1
SALT_BYTES: Final = 16
NONCE_BYTES: Final = 12
RANDOM_BYTES: Final = SALT_BYTES + NONCE_BYTES
"""Fresh random bytes that sealing one event takes."""
KEY_BYTES: Final = 32
ERASED: Final = "(erased)"
"""Shown for a subject whose data was erased."""
UNREADABLE: Final = "(no key)"
"""Shown for a subject whose key the reader does not have."""
ALTERED: Final = "(altered)"
"""Shown for a subject when the personal part does not open although there is a key."""
_NAMES: Final = UsageEvent._fields
_PERSONAL: Final = ("subject_id", "on_behalf_of", "idempotency_key", "resource_id", "context", "about")
"""In this order, and after them: what of the public fields is about quotas with a scope (``[spends, held, overage]``:
in an event that is opened it comes after the others), and fields that a newer sidecar appended."""
_PUBLIC: Final = tuple(name for name in _NAMES if name not in _PERSONAL)
"""In this order, after the version and the subject's number. Fields are only ever appended to an event, so these stay
where they are."""
_FIELDS_MIN: Final = 2 + _PUBLIC.index("shadow") + 1
"""Public fields that every event has; later ones are left out from where on all are empty."""
_public_of: Final = itemgetter(*(_NAMES.index(name) for name in _PUBLIC))
_personal_of: Final = itemgetter(*(_NAMES.index(name) for name in _PERSONAL))
_in_order: Final = itemgetter(*((*_PUBLIC, *_PERSONAL).index(name) for name in _NAMES))
"""From public fields and then personal ones to those of an event."""
_PUBLIC_EMPTY: Final = tuple(UsageEvent._field_defaults.get(name, "") for name in _PUBLIC)
_PERSONAL_EMPTY: Final[Sequence[Any]] = ("", "", "", "", {}, "")


class Cipher(Protocol):
    """``cryptography``'s ``AESGCM`` over a subject's key."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None, /) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None, /) -> bytes: ...


class Sealed(NamedTuple):
    """An event as it is kept. ``personal`` is ``None`` once it was erased."""

    public: bytes
    commitment: bytes
    personal: bytes | None


class Damaged(ValueError):
    """The bytes are not what was sealed. The message says which part does not fit, without a subject."""


def seal(event: UsageEvent, packed: bytes, log_id: str, subject: int, cipher: Cipher, random: bytes) -> Sealed:
    """Seal ``event``, which was unpacked from ``packed``, an event of the log ``log_id``.

    ``subject`` is the number of its subject, ``cipher`` over the key of that subject, ``random`` ``RANDOM_BYTES`` fresh
    random bytes, never used before.
    """
    public, personal = _split(event, packed, subject)
    salted = random[:SALT_BYTES] + personal
    nonce = random[SALT_BYTES:]
    return Sealed(
        public, hashlib.sha256(salted).digest(), nonce + cipher.encrypt(nonce, salted, belonging(log_id) + public)
    )


def open_event(log_id: str, sealed: Sealed, cipher: Cipher) -> UsageEvent:
    """The event that was sealed.

    Raises:
        Damaged: any byte of it, its log, or the key is another than when it was sealed.
    """
    return _joined(_public_fields(sealed.public), _fields(opened(belonging(log_id), *sealed, cipher)))


def public_event(public: bytes, *, shown: str = ERASED) -> UsageEvent:
    """What is left of an event without its personal fields: ``shown`` stands for the subject's id, the rest is empty.

    Raises:
        Damaged: not public bytes.
    """
    return _joined(_public_fields(public), [shown])


def is_same(event: UsageEvent, packed: bytes, log_id: str, subject: int, sealed: Sealed, cipher: Cipher | None) -> bool:
    """Whether ``sealed``, of ``subject``, was made of the same event. Without its key only the public part can differ.

    What cannot be opened although there is a key counts as different: the event that came again is then evidence.
    """
    public, personal = _split(event, packed, subject)
    if public != sealed.public:
        return False
    if cipher is None or sealed.personal is None:
        return True
    try:
        return opened(belonging(log_id), *sealed, cipher) == personal
    except Damaged:
        return False


def leaf_hash(public: bytes, commitment: bytes) -> bytes:
    """The event's leaf in the Merkle tree of its block."""
    return hashlib.sha256(b"\0" + public + commitment).digest()


def fields_of(public: bytes) -> list[Any]:
    """The public fields: the version of the schema, ``COLUMNS``, the units, and the rest.

    Raises:
        Damaged: not public bytes.
    """
    fields = _public_fields(public)
    if not isinstance(fields[UNITS], dict):
        raise Damaged("the public part cannot be read: its units are no map")
    return fields


COLUMNS: Final = ("subject", "seq", "at", "tenant", "subject_type", "action", "effect", "reason", "rule", "revision")
"""What an event's row repeats of its public fields, which have these names from the second one on."""
UNITS: Final = 1 + len(COLUMNS)
SPENDS: Final = 2 + _PUBLIC.index("spends")
"""Where they are among the public fields."""


class PublicEvent(NamedTuple):
    """The public fields in their order: the version, the subject's number, and what ``UsageEvent`` has."""

    version: int
    subject: int
    seq: int
    at_us: int
    tenant: str
    subject_type: str
    action: str
    effect: int
    reason: int
    rule: str
    revision: int
    units: Mapping[str, int]
    cost_nanos: int
    currency: str
    flags: int
    resource_type: str
    spends: Sequence[tuple[str, int]]
    shadow: Sequence[str]
    feature_costs: Mapping[str, int]
    kind: int
    held: Sequence[tuple[str, int]]
    units_held: Mapping[str, int]
    overage: Mapping[str, int]
    unfunded: Mapping[str, int]
    expires_us: int
    priced_as: Mapping[str, str]
    exposures: Mapping[str, str]


def named(fields: list[Any]) -> PublicEvent:
    """Fields that were read, by name; empty where they are cut short."""
    return _new_tuple(PublicEvent, (*fields[:_WIDTH], *_PUBLIC_EMPTY[len(fields) - 2 :]))


def all_fields_of(publics: Sequence[bytes]) -> list[list[Any]]:
    """``fields_of`` of many, at once.

    Raises:
        Damaged: one is not public bytes; ask for each.
    """
    found: list[list[Any]] = _fields(_ARRAY32 + len(publics).to_bytes(4, "big") + b"".join(publics))
    for fields in found:
        if type(fields) is not list or len(fields) < _FIELDS_MIN or fields[0] != SCHEMA_VERSION:
            raise Damaged("a public part cannot be read")
        if type(fields[UNITS]) is not dict:
            raise Damaged("a public part cannot be read: its units are no map")
    return found


def belonging(log_id: str) -> bytes:
    """What the personal part of every event of a log is bound to, before the event's public part."""
    return log_id.encode() + b"\0"


def opened(belongs_to: bytes, public: bytes, commitment: bytes, personal: bytes | None, cipher: Cipher) -> bytes:
    """The personal fields of an event, packed, of the parts of ``Sealed``; ``belongs_to`` is what ``belonging`` says of
    its log.

    Raises:
        Damaged: any byte of the three, its log, or the key is another than when it was sealed.
    """
    if personal is None:
        raise Damaged("the personal part is missing, and its subject was not erased")
    try:
        salted = cipher.decrypt(personal[:NONCE_BYTES], personal[NONCE_BYTES:], belongs_to + public)
    except (InvalidTag, ValueError) as error:
        raise Damaged("the personal part does not open: it, the public part, the log or the key was altered") from error
    if hashlib.sha256(salted).digest() != commitment:
        raise Damaged("the commitment is not that of the personal part")
    return salted[SALT_BYTES:]


def scoped_spends(personal: bytes) -> Sequence[tuple[str, int]]:
    """What the event spent from quotas with a scope, as its personal fields have it, which ``opened`` gave."""
    if personal[0] < SCOPED_FROM:
        return ()
    scoped = _fields(personal)[len(_PERSONAL)]
    return scoped[0] if scoped else ()


_ARRAY32: Final = b"\xdd"
"""Begins a msgpack list; its length follows."""
_new_tuple: Final = tuple.__new__
"""As ``_make`` does, which takes three times as long to get there."""
_WIDTH: Final = len(PublicEvent._fields)
SCOPED_FROM: Final = 0x90 + len(_PERSONAL) + 1
"""First byte of personal fields that go as far as what has a scope: a msgpack list of few items begins with how many
they are. Most events have nothing there, and need not be unpacked to know it."""


def _split(event: UsageEvent, packed: bytes, subject: int) -> tuple[bytes, bytes]:
    """Public and personal fields, packed."""
    scoped: Sequence[Any] = ()
    if (
        _has_scope(event.spends)
        or (event.held and _has_scope(event.held))
        or (event.overage and any("@" in name for name in event.overage))
    ):
        scoped = (
            [pair for pair in event.spends if "@" in pair[0]],
            [pair for pair in event.held if "@" in pair[0]],
            {quota: units for quota, units in event.overage.items() if "@" in quota},
        )
        event = event._replace(
            spends=[pair for pair in event.spends if "@" not in pair[0]],
            held=[pair for pair in event.held if "@" not in pair[0]],
            overage={quota: units for quota, units in event.overage.items() if "@" not in quota},
        )
    public = _without_empty_end((SCHEMA_VERSION, subject, *_public_of(event)), _FIELDS_MIN)
    personal = _without_empty_end((*_personal_of(event), scoped, _appended(packed)), 1)
    pack = msgpack.packb
    return pack(public, use_bin_type=True, default=dict), pack(personal, use_bin_type=True, default=dict)


def _without_empty_end(fields: tuple[Any, ...], fields_min: int) -> tuple[Any, ...]:
    if not any(fields[fields_min:]):  # as in most events; asked first, for it is asked of every one
        end = fields_min
    else:
        end = len(fields)
        while not fields[end - 1]:
            end -= 1
    return fields[:end]


def _has_scope(quotas: Iterable[Any]) -> bool:
    for quota, _ in quotas:  # noqa: SIM110  # ``any`` takes three times as long over the one or two that there are
        if "@" in quota:
            return True
    return False


def _appended(packed: bytes) -> Sequence[Any]:
    """Fields that a newer sidecar appended to those known here."""
    if packed[:1] != b"\xdc" or int.from_bytes(packed[1:3], "big") <= len(_NAMES):
        return ()
    fields: list[Any] = msgpack.unpackb(packed, raw=False, strict_map_key=False)
    return fields[len(_NAMES) :]


def _public_fields(public: bytes) -> list[Any]:
    fields = _fields(public)
    if len(fields) < _FIELDS_MIN:
        raise Damaged(f"the public part has {len(fields)} fields")
    if fields[0] != SCHEMA_VERSION:
        raise Damaged(f"the public part is of version {fields[0]!r}; this program reads {SCHEMA_VERSION}")
    return fields


def _fields(packed: bytes) -> list[Any]:
    try:
        fields: Any = msgpack.unpackb(packed, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Damaged(f"the public part cannot be read: {error}") from error
    if not isinstance(fields, list):
        raise Damaged("the public part is not a list")
    return fields


def _joined(public: list[Any], personal: list[Any]) -> UsageEvent:
    """The event of both parts, empty where a part is cut short."""
    fields = public[2:]
    if len(fields) < len(_PUBLIC):
        fields += _PUBLIC_EMPTY[len(fields) :]
    else:
        del fields[len(_PUBLIC) :]
    fields += personal
    if len(personal) < len(_PERSONAL):
        fields += _PERSONAL_EMPTY[len(personal) :]
    event = UsageEvent._make(_in_order(fields))
    if len(personal) > len(_PERSONAL) and (scoped := personal[len(_PERSONAL)]):
        event = event._replace(
            spends=[*event.spends, *scoped[0]],
            held=[*event.held, *scoped[1]],
            overage={**event.overage, **scoped[2]},
        )
    return event
