"""Usage events and the batches that carry them from a sidecar's log to the ledger.

An event is packed once, when it is decided, and travels as those bytes: the log, the stream and the ledger's digest
all see the same. A log is named by ``<sidecar>:<incarnation>``; its sequence numbers start at 1 and have no gaps.
Where a sidecar cannot send events that it numbered, its batch says so: what is lost is declared, never skipped.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Self

import msgpack

from licet.domain.catalog import AttributeValue
from licet.wire import envelope

FLAG_STALE: Final = 1
FLAG_DEGRADED: Final = 2
FLAG_OVERAGE: Final = 4
FLAG_OBSERVED: Final = 8
"""The bundle was pushed in observe mode: the caller was answered APPROVED, ``effect`` is what would have been."""
FLAG_EXPIRED: Final = 16
"""A COMMIT that nobody asked for: the reservation expired, and its action says that it is committed then."""


class EventKind(IntEnum):
    """What an event records. Only CHECK and COMMIT use units; the others have none in ``units``."""

    CHECK = 0
    RESERVE = 1
    """Units are held: ``held`` says of which quotas, ``units_held`` of which features (when denied: what was asked)."""
    COMMIT = 2
    """A reservation was used: ``units`` is what was used, whatever was reserved."""
    CANCEL = 3
    EXPIRE = 4
    """Nobody settled a reservation in time, and it was canceled."""
    EXTEND = 5
    SEAT_ACQUIRE = 6
    SEAT_RELEASE = 7
    SEAT_RECLAIM = 8


BATCH_EVENTS_MAX: Final = 4_096
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
"""Uncompressed. A Redis stream entry should stay small enough not to stall the server."""
BATCHES_MAX: Final = 8
"""Of one request over HTTP."""
LOST_RANGES_MAX: Final = 1_000
"""Of one batch. A log has a handful at worst: one for each place where its disk failed."""
REASON_CHARS_MAX: Final = 200
SEQ_MAX: Final = 2**63 - 1
_BATCH_KIND: Final = "usage"
_BATCHES_KIND: Final = "usage-batches"


class UsageEvent(NamedTuple):
    """The record of one decision, in wire order. Append fields at the end; never reorder.

    ``at_us`` is the sidecar's clock, microseconds since the Unix epoch. ``units`` are the units asked, by feature;
    they were taken when ``effect`` is APPROVED (or the event is flagged OBSERVED). ``spends`` are ``[quota, units]``
    pairs: which quota register of this sidecar they were taken from. ``shadow`` names the rules of shadow policies that
    matched, as ``policy/rule=effect``, and the limits in shadow that would have objected, as
    ``limit key=on_exceeded``. ``feature_costs`` divides ``cost_nanos`` among several features with a price; it is empty
    when one bears all of it.

    ``kind`` is an ``EventKind``; ``about`` the reservation (the decision id of its RESERVE event) or seat it is about.
    ``overage`` says of each quota in ``spends`` how much lies beyond its soft limit, provisionally; ``unfunded`` what
    a COMMIT used that no limit had room for, not in ``units``. ``expires_us`` is when a reservation expires.

    ``priced_as`` names, for each feature that is priced by an attribute, the value that picked its price; a feature
    whose value has no price of its own is left out. ``exposures`` are the feature flags the decision was subject to,
    by name, with the variant that applied: ``on`` or ``off``.
    """

    seq: int
    at_us: int
    tenant: str
    subject_type: str
    subject_id: str
    on_behalf_of: str
    action: str
    effect: int
    reason: int
    rule: str
    revision: int
    units: dict[str, int]
    cost_nanos: int
    currency: str
    flags: int
    idempotency_key: str
    resource_type: str
    resource_id: str
    context: dict[str, AttributeValue]
    spends: list[tuple[str, int]]
    shadow: list[str]
    feature_costs: Mapping[str, int] = MappingProxyType({})
    kind: int = EventKind.CHECK
    about: str = ""
    held: Sequence[tuple[str, int]] = ()
    units_held: Mapping[str, int] = MappingProxyType({})
    overage: Mapping[str, int] = MappingProxyType({})
    unfunded: Mapping[str, int] = MappingProxyType({})
    expires_us: int = 0
    priced_as: Mapping[str, str] = MappingProxyType({})
    exposures: Mapping[str, str] = MappingProxyType({})


class LostRange(NamedTuple):
    """Events ``first_seq`` to ``last_seq``, bounds included, that their sidecar numbered and does not have any more.

    It may name more than there were: where the end of a log is damaged, how many events it held is not known.
    """

    first_seq: int
    last_seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class UsageBatch:
    """Events ``first_seq`` to ``last_seq`` of one log, each as its packed bytes.

    ``lost`` declares what cannot be sent. A batch that only declares has no events, and ``last_seq`` is
    ``first_seq - 1``.

    ``decision_prefix`` is 8 random bytes of the incarnation: a decision's id is the prefix and the sequence number.
    ``previous_incarnation`` and ``previous_last_seq`` say where the predecessor's log ended (0, 0 for the first), so
    that a lost tail shows as a gap.
    """

    sidecar: str
    incarnation: int
    previous_incarnation: int
    previous_last_seq: int
    decision_prefix: bytes
    first_seq: int
    last_seq: int
    events: tuple[bytes, ...]
    lost: tuple[LostRange, ...] = ()

    @property
    def log_id(self) -> str:
        """Names the log in acknowledgements and watermarks."""
        return log_id(self.sidecar, self.incarnation)

    def pack(self) -> bytes:
        """Compressed, in an envelope."""
        return envelope.pack(
            _BATCH_KIND,
            [
                self.sidecar,
                self.incarnation,
                self.previous_incarnation,
                self.previous_last_seq,
                self.decision_prefix,
                self.first_seq,
                self.last_seq,
                zlib.compress(b"".join(self.events), level=1),
                *([[list(one) for one in self.lost]] if self.lost else ()),
            ],
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The inverse of ``pack``.

        Raises:
            EnvelopeError: not a batch, damaged, too large, or its events are not exactly ``first_seq…last_seq``.
        """
        try:
            body = envelope.unpack(_BATCH_KIND, data)
            sidecar, incarnation, prev_incarnation, prev_last, prefix, first, last, packed = body[:8]
            lost = tuple(_lost_range(*one) for one in body[8]) if len(body) > 8 else ()
            inflater = zlib.decompressobj()
            raw = inflater.decompress(packed, envelope.MESSAGE_BYTES_MAX)
            if inflater.unconsumed_tail:
                raise envelope.EnvelopeError("usage: the batch is larger than is accepted")
            events = _split(raw)
            seqs = [event_seq(event) for event in events]
        except (ValueError, TypeError, zlib.error, msgpack.UnpackException) as error:
            if isinstance(error, envelope.EnvelopeError):
                raise
            raise envelope.EnvelopeError(f"usage: damaged batch: {error}") from error
        if not (seqs or lost) or last - first + 1 != len(seqs) or seqs != list(range(first, last + 1)):
            raise envelope.EnvelopeError(f"usage: batch {first}…{last} of {sidecar} does not hold exactly these events")
        if len(lost) > LOST_RANGES_MAX:
            raise envelope.EnvelopeError(
                f"usage: the batch declares {len(lost):,} ranges; {LOST_RANGES_MAX:,} are read"
            )
        return cls(sidecar, incarnation, prev_incarnation, prev_last, prefix, first, last, tuple(events), lost)


def pack_batches(batches: Sequence[bytes]) -> bytes:
    """Several packed batches as one body of a request."""
    return envelope.pack(_BATCHES_KIND, list(batches))


def unpack_batches(data: bytes) -> list[bytes]:
    """The inverse of ``pack_batches``.

    Raises:
        EnvelopeError: not that, empty, or more than ``BATCHES_MAX``.
    """
    body = envelope.unpack(_BATCHES_KIND, data)
    if not isinstance(body, list) or not all(isinstance(one, bytes) for one in body):
        raise envelope.EnvelopeError("usage: not a list of batches")
    if not 1 <= len(body) <= BATCHES_MAX:
        raise envelope.EnvelopeError(f"usage: {len(body)} batches; send 1 to {BATCHES_MAX} at once")
    return body


def log_id(sidecar: str, incarnation: int) -> str:
    """``<sidecar>:<incarnation>``."""
    return f"{sidecar}:{incarnation}"


def decision_id(prefix: bytes, seq: int) -> str:
    """32 hex digits: unique, and enough to find the event in the ledger."""
    return f"{prefix.hex()}{seq:016x}"


_FIELDS_MIN: Final = UsageEvent._fields.index("kind")
"""Fields that every event has. Later ones are left out from where on all are empty."""
_PLAIN: Final = b"\xdc" + _FIELDS_MIN.to_bytes(2, "big")
"""How an event of exactly those fields begins: an array of so many (msgpack's array 16)."""


_ARRAY16: Final = b"\xdc"


def pack_event(event: UsageEvent) -> bytes:
    """An event as it is logged and travels."""
    fields = list(event)
    while len(fields) > _FIELDS_MIN and not fields[-1]:
        fields.pop()
    packed: bytes = msgpack.packb(fields, use_bin_type=True, default=dict)
    return packed


def unpack_event(data: bytes) -> UsageEvent:
    """The event of packed bytes; fields a newer sidecar appended are ignored.

    Raises:
        EnvelopeError: not an event.
    """
    try:
        fields: Sequence[Any] = msgpack.unpackb(data, raw=False, strict_map_key=False)
        return UsageEvent(*fields[: len(UsageEvent._fields)])
    except (ValueError, TypeError) as error:
        raise envelope.EnvelopeError(f"usage: damaged event: {error}") from error


def has_kind(data: bytes) -> bool:
    """Whether a packed event may be other than a plain CHECK, without unpacking it."""
    return not data.startswith(_PLAIN)


def event_seq(data: bytes) -> int:
    """The sequence number of a packed event, without unpacking the rest."""
    if data[:1] == _ARRAY16:  # the way every event begins; a reader for each would cost as much as the rest of a batch
        first = data[3]
        if first < 0x80:
            return first
        if 0xCC <= first <= 0xCF:  # an unsigned integer of 1, 2, 4 or 8 bytes
            return int.from_bytes(data[4 : 4 + (1 << (first - 0xCC))], "big")
    unpacker = msgpack.Unpacker(raw=False)
    unpacker.feed(data[:16])
    unpacker.read_array_header()
    return int(unpacker.unpack())


def _lost_range(first_seq: int, last_seq: int, reason: str, *_: Any) -> LostRange:
    if not 1 <= first_seq <= last_seq <= SEQ_MAX or not isinstance(reason, str):
        raise ValueError(f"{first_seq}…{last_seq} is no range of events")
    return LostRange(int(first_seq), int(last_seq), reason[:REASON_CHARS_MAX])


def _split(raw: bytes) -> list[bytes]:
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=envelope.MESSAGE_BYTES_MAX)
    unpacker.feed(raw)
    events: list[bytes] = []
    start = 0
    while start < len(raw):
        unpacker.skip()
        end = unpacker.tell()
        events.append(raw[start:end])
        start = end
    return events
