"""The write-ahead log: usage events, and what a restarted sidecar must know of its leases.

*Files.* ``usage-<sidecar>-<incarnation>-<first seq>.log`` in the state directory. A file is made whole (header, the
leases held at that moment, the newest revision acted on) under another name and renamed, so that the newest file
alone tells what is held (leases and seats). Records follow, framed as ``log_records`` says. The header is there twice,
at both ends of what a file is made with.

*Promises.* When ``append`` returns, the records are in the kernel: they survive the process (``logged``). Only records
below ``synced`` survived ``fdatasync``, and only those may be shipped. A torn tail, which a killed process or a power
loss leaves, is cut off on recovery; a valid record never is. Damage is reported with its extent and the numbers of the
events in it, whether it is found at the start or while reading; what lies behind it is read.

*Concurrency.* ``append`` and ``rotate`` are called from the event loop. ``sync`` and ``read_events`` may run in a
thread: they touch only what was written before they were called. A lock keeps ``rotate`` from closing a file that is
being synced.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgpack

from licet.domain.ids import LimitKey
from licet.wire import envelope, usage
from licet.wire.registers import Pair
from licet.wire.usage import LostRange
from licet_sidecar.adapters.log_records import (
    EVENT,
    FLOOR,
    FRAME,
    HEADER,
    LEASE,
    RESERVATION,
    SEAT,
    Damage,
    Examined,
    examine,
    frame,
    is_broken,
    next_record,
    readable,
    records,
)
from licet_sidecar.core.lease import Lease, Terms
from licet_sidecar.core.reservations import held_in

SEGMENT_BYTES: Final = 16 * 1024 * 1024
"""When a segment is closed. About 80,000 events: small enough that acknowledged space comes back soon."""

RETAINED_S: Final = 600
"""How long an event stays past its acknowledgement, so that a repeated call with the same idempotency key is still
answered. A restart, which does not know when that was, begins it again."""

RETAINED_SHARE_MAX: Final = 0.5
"""Of the log's size. Beyond it what is acknowledged makes room at once: what is not must have some."""

RESERVED_BYTES: Final = 1024 * 1024
"""Kept beyond ``bytes_max`` for what is not an event: without it a full log could neither return leases nor note a
new revision. A note takes 30 bytes and a lease 100, so this outlasts any outage."""

POSITION_BITS: Final = 32
"""Of a position, for the offset in a segment; the bits above are its ordinal."""

_NAME: Final = re.compile(r"usage-([0-9a-f]{32})-(\d{10})-(\d{16})\.log")
_UNFINISHED: Final = ".new"
_HEADER_KIND: Final = "usage-log"
_READ_BYTES: Final = 1024 * 1024

GONE: Final = "acknowledged once, and deleted since"
"""Why events cannot be sent again to a ledger that was restored."""

_SETTLED: Final = (usage.EventKind.COMMIT, usage.EventKind.CANCEL, usage.EventKind.EXPIRE)
_SETTLED_MAX: Final = 65_536
"""As many outcomes of reservations as a sidecar remembers."""


class UsageLogError(Exception):
    """The log cannot take a record: it is full, or the disk is. The decision must not be approved by default."""


@dataclass(frozen=True, slots=True)
class LogHeader:
    """Whose log it is, and where the log of the incarnation before it ended (0, 0 for the first)."""

    sidecar: str
    incarnation: int
    previous_incarnation: int
    previous_last_seq: int
    decision_prefix: bytes
    first_seq: int


@dataclass(slots=True)
class Segment:
    """One file. ``last_seq`` is ``first_seq - 1`` while it holds no event, and counts what is damaged.

    ``size`` ends at the last whole record, or behind the damage at the end. ``ordinal`` grows from segment to segment,
    in the order they were written, as far as that is known.
    """

    path: Path
    header: LogHeader
    size: int
    last_seq: int
    damage: list[Damage] = field(default_factory=list)
    ordinal: int = 0

    @property
    def log(self) -> tuple[str, int]:
        """Which log it is part of."""
        return (self.header.sidecar, self.header.incarnation)


@dataclass(slots=True)
class Recovered:
    """What the newest segment of this id's last incarnation tells."""

    incarnation: int = 0
    """The last incarnation that left a log, 0 for none: one that failed to start left none."""
    intact: bool = False
    """Whether that segment is whole. When it is not, what was held and spent is not known: take a new id."""

    leases: dict[tuple[str, str], Lease] = field(default_factory=dict)
    """By (tenant, quota)."""
    seats: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """Packed seats by (tenant, seat id)."""
    floor: tuple[int, int] = (0, 0)
    """Newest (generation, revision) that was acted on."""
    reservations: dict[str, list[Any]] = field(default_factory=dict)
    """Open reservations as they were logged, by id. What they hold is not in ``leases`` yet."""
    orphans: dict[str, list[Any]] = field(default_factory=dict)
    """When nothing of this id is taken up: open reservations in the logs of others, by id, as ``reservations``. Their
    leases are those others', so that they hold nothing any more."""
    doubted: set[str] = field(default_factory=set)
    """Those of ``orphans`` that may have been settled, or are open elsewhere too."""
    settled: list[tuple[bytes, bytes]] = field(default_factory=list)
    """(decision prefix, packed event) of reservations settled lately, by any incarnation; oldest first."""
    last_seq: int = 0
    """Where the log of ``incarnation`` ends."""
    damaged: list[str] = field(default_factory=list)
    """One sentence for each stretch of a file that cannot be read."""


def lease_record(tenant: str, lease: Lease) -> bytes:
    """A record of what is held: absolute values, so that the newest one and the events after it tell all."""
    return frame(
        LEASE,
        msgpack.packb(
            [
                tenant,
                lease.limit_key,
                lease.scope,
                lease.start,
                lease.end,
                lease.amount,
                lease.cap,
                lease.used,
                lease.over,
                lease.degraded,
                *lease.pair,
                lease.remaining,
                lease.terms.window,
                lease.terms.currency,
                lease.terms.grant,
            ]
        ),
    )


def seat_record(tenant: str, seat_id: str, packed: bytes) -> bytes:
    """A record of a seat that is answered for from here on; with ``packed`` empty, of one that is not any more."""
    return frame(SEAT, msgpack.packb([tenant, seat_id, packed]))


def floor_record(generation: int, revision: int) -> bytes:
    """A record of the newest revision acted on: a restart must not answer from an older one."""
    return frame(FLOOR, msgpack.packb([generation, revision]))


def reservation_record(wire: list[Any]) -> bytes:
    """A record of an open reservation: absolute, so that the newest one and the events after it tell all.

    It is written before the event of its decision, in the same write: a torn tail leaves none of it, or a record
    without its event, which recovery drops.
    """
    return frame(RESERVATION, msgpack.packb(wire))


class UsageLog:
    """The log of one incarnation, and the older ones that the ledger has not committed yet."""

    def __init__(self, directory: Path, *, bytes_max: int) -> None:
        """``bytes_max`` bounds all files together. Nothing is written before ``start``."""
        self._directory = directory
        self._bytes_max = bytes_max
        self.segments: list[Segment] = []
        self._descriptor = -1
        self._header: LogHeader | None = None
        self.last_seq = 0
        self.synced_seq = 0
        self._total_bytes = 0
        self._head_bytes = 0  # of the present segment
        self._unsyncable = ""
        self._resume: dict[Path, tuple[int, int]] = {}  # where the last reading ended: (next seq, offset)
        self._ordinals = 0
        self._acks: dict[tuple[str, int], deque[tuple[int, float]]] = {}  # (watermark, boot time), by log
        self._past: dict[tuple[str, int], int] = {}  # what was acknowledged RETAINED_S ago, by log
        self._syncing = threading.Lock()
        self._found_damaged: list[str] = []

    # Starting

    def recover(self, sidecar: str, incarnation: int, *, moved: bool = False) -> Recovered:
        """Reads what is there: older logs to ship, and the leases of the newest incarnation up to ``incarnation``.

        Cuts torn tails off. ``incarnation`` 0: a new id, nothing is taken up but what others left to be settled.
        ``moved``: a copy of this directory may be in use elsewhere.

        Raises:
            UsageLogError: a file cannot be read, or was written by a newer program.
        """
        recovered = Recovered()
        files = self._files()
        self._recover_segments(files, recovered)
        newest = max((name for name, _ in files if name[0] == sidecar and name[1] <= incarnation), default=None)
        if newest is not None:
            recovered.incarnation = newest[1]
            mine = [s for s in self.segments if (s.header.sidecar, s.header.incarnation) == newest[:2]]
            recovered.last_seq = max((segment.last_seq for segment in mine), default=0)
            if mine and mine[-1].header.first_seq == newest[2] and not mine[-1].damage:
                recovered.intact = True
                self._recover_leases(mine[-1], recovered)
        settled = self._recover_settled(recovered)
        if not recovered.intact:
            self._recover_orphans(recovered, settled, moved)
        self._total_bytes = sum(segment.size for segment in self.segments)
        return recovered

    def start(self, header: LogHeader, records: Sequence[bytes]) -> None:
        """Begins the log of this incarnation, with ``records`` (leases, floor) at its head.

        Raises:
            UsageLogError: the disk does not take it.
        """
        older = list(self.segments)
        self._header = header
        self.last_seq = self.synced_seq = header.first_seq - 1
        self._open_segment(header, records)
        for segment in older:
            # What it said of leases is said again above; the ledger will never acknowledge a log without events.
            if segment.last_seq < segment.header.first_seq and not segment.damage:
                self._delete(segment)

    @property
    def header(self) -> LogHeader:
        """The header of this incarnation's log."""
        assert self._header is not None, "start() first"
        return self._header

    # Writing

    def append(self, records: bytes, events: int) -> int:
        """Appends framed records, ``events`` of which are usage events numbered on from ``last_seq``.

        All or nothing: on failure the log is as before. Returns the position of the first record, for ``event_at``;
        that of a later one is as many bytes further.

        Raises:
            UsageLogError: the log or the disk is full, or the disk failed.
        """
        segment = self.segments[-1]
        if self._total_bytes + len(records) > self._bytes_max + (0 if events else RESERVED_BYTES):
            raise UsageLogError(f"the usage log holds its maximum of {self._bytes_max:,} bytes")
        try:
            written = os.pwrite(self._descriptor, records, segment.size)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, segment.size)
            raise UsageLogError(f"the usage log cannot be written: {error.strerror}") from error
        if written != len(records):
            # Cut the part off; if that fails too, the next append overwrites it, and recovery sees a torn tail.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, segment.size)
            raise UsageLogError("the usage log cannot be written: the disk is full")
        position = segment.ordinal << POSITION_BITS | segment.size
        segment.size += written
        self._total_bytes += written
        self.last_seq += events
        segment.last_seq = self.last_seq
        return position

    @property
    def wants_rotation(self) -> bool:
        """Whether the present segment has grown enough to be closed."""
        return self.segments[-1].size - self._head_bytes >= SEGMENT_BYTES

    @property
    def bytes_max(self) -> int:
        """What all files together may take."""
        return self._bytes_max

    def disk_free_bytes(self) -> float:
        """What the file system of the log has room for; not a number when that cannot be said."""
        try:
            found = os.statvfs(self._directory)
        except OSError:
            return float("nan")
        return float(found.f_bavail * found.f_frsize)

    @property
    def has_room(self) -> bool:
        """Whether there is room for what is useful to know after a restart, and not needed."""
        return self._total_bytes < self._bytes_max

    def rotate(self, records: Sequence[bytes]) -> None:
        """Goes on in a new segment, with ``records`` (all leases held, the floor) at its head.

        Raises:
            UsageLogError: the disk does not take it; the present segment stays in use.
        """
        with self._syncing:
            previous = self._descriptor
            self._sync()  # from here on only the new segment is
            self._open_segment(replace(self.header, first_seq=self.last_seq + 1), records)
            os.close(previous)

    def sync(self) -> int:
        """Makes everything appended so far survive a power loss. Blocks; returns the last sequence number covered.

        Raises:
            UsageLogError: the disk failed: nothing more of this log may be shipped.
        """
        with self._syncing:
            return self._sync()

    def _sync(self) -> int:
        seq = self.last_seq
        if self._unsyncable:
            raise UsageLogError(self._unsyncable)
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            # The kernel reports a failed write once and then forgets it: a second try would succeed, and prove nothing.
            self._unsyncable = f"the usage log could not be synced: {error.strerror}; restart on a disk that works"
            raise UsageLogError(f"the usage log cannot be synced: {error.strerror}") from error
        self.synced_seq = max(self.synced_seq, seq)
        return seq

    def close(self) -> None:
        """Syncs and closes the present segment."""
        if self._descriptor >= 0:
            with contextlib.suppress(UsageLogError):
                self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    # Shipping

    def logs(self) -> list[tuple[LogHeader, int]]:
        """Each log that still has files, oldest first, with its last sequence number."""
        last: dict[tuple[str, int], tuple[LogHeader, int]] = {}
        for segment in self.segments:
            key = (segment.header.sidecar, segment.header.incarnation)
            seen = last.get(key)
            last[key] = (seen[0] if seen else segment.header, max(segment.last_seq, seen[1] if seen else 0))
        return list(last.values())

    def read_events(
        self, sidecar: str, incarnation: int, first_seq: int, last_seq: int, *, events_max: int, bytes_max: int
    ) -> list[bytes]:
        """Packed events of a log, contiguous, at most so many; empty when there are none from ``first_seq`` on.

        They begin at ``first_seq``, or after it when that event is gone or was damaged: ``lost`` tells.

        Raises:
            OSError: a file cannot be read now.
        """
        found: list[bytes] = []
        found_bytes = 0
        expected = 0
        for segment in [s for s in self.segments if (s.header.sidecar, s.header.incarnation) == (sidecar, incarnation)]:
            if segment.last_seq < first_seq or segment.header.first_seq > last_seq:
                continue
            seq, start = self._resume.get(segment.path, (segment.header.first_seq, 0))
            if seq > first_seq:
                seq, start = segment.header.first_seq, 0
            for event, end in self._events(segment, start):
                seq = usage.event_seq(event)
                if seq >= first_seq:
                    if seq > last_seq:
                        return found
                    if found and (seq != expected or len(found) >= events_max or found_bytes + len(event) > bytes_max):
                        return found
                    found.append(event)
                    found_bytes += len(event)
                    expected = seq + 1
                self._resume[segment.path] = (seq + 1, end)
        return found

    def lost(self, sidecar: str, incarnation: int, first_seq: int, last_seq: int) -> list[LostRange]:
        """What of ``first_seq…last_seq`` the files do not hold, ascending, and why."""
        found: list[LostRange] = []

        def note(first: int, last: int, reason: str) -> None:
            if max(first, first_seq) <= min(last, last_seq):
                found.append(LostRange(max(first, first_seq), min(last, last_seq), reason))

        next_seq = 1
        for segment in [one for one in self.segments if one.log == (sidecar, incarnation)]:
            note(next_seq, segment.header.first_seq - 1, GONE)
            for damage in segment.damage:
                note(damage.first_lost, damage.last_lost, damage.reason)
            next_seq = segment.last_seq + 1
        note(next_seq, last_seq, GONE)
        return found

    def first_held(self, sidecar: str, incarnation: int, ranges: Sequence[tuple[int, int]]) -> int | None:
        """The first number in ``ranges`` whose event the files hold; ``None`` when they hold none of them."""
        firsts: list[int] = []
        for segment in [one for one in self.segments if one.log == (sidecar, incarnation)]:
            for first, last in ranges:
                seq = max(first, segment.header.first_seq)
                for damage in segment.damage:
                    if damage.first_lost <= seq <= damage.last_lost:
                        seq = damage.last_lost + 1
                if seq <= min(last, segment.last_seq):
                    firsts.append(seq)
        return min(firsts, default=None)

    @property
    def events_damaged(self) -> int:
        """Events that damage has taken, at most, of the files that are there."""
        return sum(damage.lost for segment in self.segments for damage in segment.damage)

    def found_damaged(self) -> list[str]:
        """One sentence for each stretch that was found damaged since the last time this was asked."""
        found, self._found_damaged = self._found_damaged, []
        return found

    def release(self, sidecar: str, incarnation: int, watermark: int, boot_s: float) -> None:
        """Takes an acknowledgement up to ``watermark``; deletes segments that are past the retention.

        To be called again and again, at growing times. A watermark may go back, when the ledger was restored.
        """
        log = (sidecar, incarnation)
        acks = self._acks.setdefault(log, deque())
        if acks and watermark < acks[-1][0]:
            acks.clear()
            self._past[log] = min(watermark, self._past.get(log, 0))
        if not acks or watermark > acks[-1][0]:
            acks.append((watermark, boot_s))
        while acks and acks[0][1] + RETAINED_S <= boot_s:
            self._past[log] = max(self._past.get(log, 0), acks[0][0])
            if len(acks) == 1:
                break  # what was acknowledged last is still to be compared with
            acks.popleft()
        past = self._past.get(log, 0)
        for segment in list(self.segments):
            header = segment.header
            if (header.sidecar, header.incarnation) != log or segment.last_seq > watermark:
                continue
            if segment is self.segments[-1] and self._header is not None:
                continue
            if segment.last_seq <= past or self._total_bytes > RETAINED_SHARE_MAX * self._bytes_max:
                self._delete(segment)

    # Looking back

    def event_at(self, position: int) -> tuple[LogHeader, bytes] | None:
        """The packed event at a position, and whose log it is in; ``None`` when it is gone or damaged."""
        ordinal, offset = position >> POSITION_BITS, position & ((1 << POSITION_BITS) - 1)
        segment = next((one for one in reversed(self.segments) if one.ordinal == ordinal), None)
        if segment is None:
            return None
        try:
            with segment.path.open("rb", buffering=0) as file:
                file.seek(offset)
                length, checksum, kind = FRAME.unpack(file.read(FRAME.size))
                payload = file.read(length)
        except (OSError, struct.error):
            return None
        intact = kind == EVENT and len(payload) == length and zlib.crc32(payload, kind) == checksum
        return (segment.header, payload) if intact else None

    def is_past(self, header: LogHeader, seq: int) -> bool:
        """Whether an event was acknowledged so long ago that nobody is to be answered from it."""
        return seq <= self._past.get((header.sidecar, header.incarnation), 0)

    def positions(self, segment: Segment) -> Iterator[tuple[bytes, int]]:
        """(packed event, position) of each event of a segment, oldest first."""
        for event, end in self._events(segment):
            yield event, segment.ordinal << POSITION_BITS | end - len(event) - FRAME.size

    def _events(self, segment: Segment, start: int = 0) -> Iterator[tuple[bytes, int]]:
        """(packed event, end offset) of each event of a segment from the offset ``start`` on, read in pieces.

        Damage that was not known is examined, noted, and passed over.
        """
        size = segment.size
        with segment.path.open("rb") as file:
            position, rest = start, b""  # `rest` begins at `position`
            file.seek(start)
            while position < size:
                if _is_known(segment, position):
                    position = next(one.end for one in segment.damage if one.start <= position < one.end)
                    rest = b""
                    file.seek(position)
                    continue
                piece = file.read(min(_READ_BYTES, size - position - len(rest)))
                rest += piece
                end = 0
                for kind, payload, end in records(rest):
                    if kind == EVENT:
                        yield payload, position + end
                position += end
                rest = rest[end:]
                if rest and (is_broken(rest) or not piece) and not _is_known(segment, position):
                    rest += file.read(size - position - len(rest))
                    following = next_record(rest, 1)
                    self._note_damage(segment, position, size if following < 0 else position + following)

    def _note_damage(self, segment: Segment, start: int, end: int) -> None:
        """A stretch that could be read, or was not looked at, cannot be read: the file is examined as at a start."""
        with segment.path.open("rb") as file:
            found = examine(file.read(segment.size), segment.header.first_seq)
        known = {(one.start, one.end) for one in segment.damage}
        fresh = Segment(segment.path, segment.header, segment.size, found.last_seq, list(found.damage))
        if not any(one.start <= start < one.end for one in fresh.damage):
            # As a torn tail would look. But here everything was written, and its last number is known.
            fresh.damage.append(Damage(start, end, found.last_seq + 1, found.last_seq, exact=False))
        _bound(fresh, segment.last_seq)
        segment.damage = fresh.damage
        new = [one for one in fresh.damage if (one.start, one.end) not in known]
        self._found_damaged.extend(_told(replace(fresh, damage=new)))

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return self._total_bytes

    def _files(self) -> list[tuple[tuple[str, int, int], Path]]:
        """((sidecar, incarnation, first seq), path) of each file, in shipping order; deletes unfinished ones."""
        found: list[tuple[tuple[str, int, int], Path]] = []
        oldest_ns: dict[str, int] = {}
        for path in self._directory.iterdir():
            if match := _NAME.fullmatch(path.name):
                sidecar, incarnation, first_seq = match.groups()
                found.append(((sidecar, int(incarnation), int(first_seq)), path))
                # Of several ids (after a clone) the older one goes first. Times tell no more than that: a copied
                # directory has its files in any order.
                written_ns = path.stat().st_mtime_ns
                oldest_ns[sidecar] = min(written_ns, oldest_ns.get(sidecar, written_ns))
            elif _NAME.fullmatch(path.with_suffix(".log").name) and path.suffix == _UNFINISHED:
                path.unlink(missing_ok=True)
        return sorted(found, key=lambda file: (oldest_ns[file[0][0]], file[0]))

    def _delete(self, segment: Segment) -> None:
        with contextlib.suppress(OSError):
            segment.path.unlink()
        self.segments.remove(segment)
        self._resume.pop(segment.path, None)
        self._total_bytes -= segment.size
        log = (segment.header.sidecar, segment.header.incarnation)
        if all((one.header.sidecar, one.header.incarnation) != log for one in self.segments):
            self._acks.pop(log, None)
            self._past.pop(log, None)

    def _open_segment(self, header: LogHeader, records: Sequence[bytes]) -> None:
        path = self._directory / f"usage-{header.sidecar}-{header.incarnation:010d}-{header.first_seq:016d}.log"
        temporary = path.with_suffix(_UNFINISHED)
        head = frame(
            HEADER,
            envelope.pack(
                _HEADER_KIND,
                [
                    header.sidecar,
                    header.incarnation,
                    header.previous_incarnation,
                    header.previous_last_seq,
                    header.decision_prefix,
                    header.first_seq,
                ],
            ),
        )
        data = b"".join((head, *records, head))
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(28, "the disk is full")
                os.fsync(descriptor)
                temporary.rename(path)
                parent = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                os.fsync(parent)
                os.close(parent)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            raise UsageLogError(f"cannot write {path}: {error.strerror}; free space there") from error
        self._descriptor = descriptor
        for replaced in [segment for segment in self.segments if segment.path == path]:  # it held no event
            self.segments.remove(replaced)
            self._total_bytes -= replaced.size
        self._resume.pop(path, None)
        segment = Segment(path, header, len(data), header.first_seq - 1, ordinal=self._next_ordinal())
        self.segments.append(segment)
        self._head_bytes = len(data)
        self._total_bytes += len(data)

    def _next_ordinal(self) -> int:
        self._ordinals += 1
        return self._ordinals

    def _recover_segments(self, files: Sequence[tuple[tuple[str, int, int], Path]], recovered: Recovered) -> None:
        """Looks through the files, cuts torn tails off, and takes up what can be read."""
        headers: dict[tuple[str, int], LogHeader] = {}
        examined: list[tuple[tuple[str, int, int], Path, Examined, int]] = []
        for name, path in files:
            try:
                data = path.read_bytes()
                found = examine(data, name[2])
                if found.header is not None:
                    headers[name[:2]] = LogHeader(*_header_fields(found.header))
                _settle(path, found.torn_at if found.header is not None else None)
            except OSError as error:
                raise UsageLogError(f"cannot read {path}: {error.strerror}") from error
            except (envelope.EnvelopeError, TypeError) as error:
                raise UsageLogError(f"cannot read {path}: {error}") from error
            size = len(data) if found.torn_at is None or found.header is None else found.torn_at
            examined.append((name, path, found, size))
        for name, path, found, size in examined:
            header = headers.get(name[:2])
            if header is None or (found.header is None and not found.events):
                recovered.damaged.append(f"{path}: no readable header; the file was left as it was")
                continue
            header = replace(header, first_seq=name[2])
            self.segments.append(Segment(path, header, size, found.last_seq, found.damage, self._next_ordinal()))
        for segment, following in pairwise(self.segments):
            if following.log == segment.log:
                _bound(segment, following.header.first_seq - 1)
        for segment in self.segments:
            recovered.damaged.extend(_told(segment))

    def _recover_leases(self, segment: Segment, recovered: Recovered) -> None:
        data = segment.path.read_bytes()[: segment.size]
        reserved: Counter[tuple[str, str]] = Counter()
        for kind, payload, _ in records(data):
            if kind == LEASE:
                tenant, lease = _lease_of(msgpack.unpackb(payload))
                recovered.leases[(tenant, lease.quota)] = lease
            elif kind == SEAT:
                tenant, seat_id, packed = msgpack.unpackb(payload)
                recovered.seats.pop((tenant, seat_id), None)
                if packed:
                    recovered.seats[(tenant, seat_id)] = packed
            elif kind == FLOOR:
                generation, revision = msgpack.unpackb(payload)
                recovered.floor = max(recovered.floor, (generation, revision))
            elif kind == EVENT:
                event = usage.unpack_event(payload)
                settled = recovered.reservations.pop(event.about, None) if event.kind in _SETTLED else None
                before = dict(held_in(settled)) if settled else {}
                reserved.subtract(before)
                for quota, units in event.spends:
                    key = (event.tenant, quota)
                    if (found := recovered.leases.get(key)) is not None:
                        if event.flags & usage.FLAG_DEGRADED:
                            _overdraw(found, max(0, units - before.get(key, 0)), reserved[key] + before.get(key, 0))
                        found.used += units
                for quota, units in event.held if event.flags & usage.FLAG_DEGRADED else ():
                    key = (event.tenant, quota)
                    if (found := recovered.leases.get(key)) is not None:
                        _overdraw(found, units, reserved[key] - units)  # its record came before
            elif kind == RESERVATION:
                wire = msgpack.unpackb(payload)
                if (replaced := recovered.reservations.get(wire[0])) is not None:
                    reserved.subtract(dict(held_in(replaced)))
                reserved.update(dict(held_in(wire)))
                recovered.reservations[wire[0]] = wire
        unfinished = usage.decision_id(segment.header.decision_prefix, segment.last_seq + 1)
        recovered.reservations.pop(unfinished, None)

    def _recover_settled(self, recovered: Recovered) -> set[str]:
        """Ids of all reservations that the events here settle."""
        settled: set[str] = set()
        for segment in self.segments:
            prefix = segment.header.decision_prefix
            for data, _ in self._events(segment):
                if usage.has_kind(data) and (event := usage.unpack_event(data)).kind in _SETTLED:
                    recovered.settled.append((prefix, data))
                    settled.add(event.about)
            del recovered.settled[:-_SETTLED_MAX]
        return settled

    def _recover_orphans(self, recovered: Recovered, settled: set[str], moved: bool) -> None:
        """What was reserved under ids that are used no more is still to be settled, by whoever has their logs."""
        newest: dict[str, Segment] = {}
        for segment in sorted(self.segments, key=lambda one: (one.log, one.header.first_seq)):
            newest[segment.header.sidecar] = segment  # which alone tells what is open
        for segment in newest.values():
            unfinished = usage.decision_id(segment.header.decision_prefix, segment.last_seq + 1)
            for kind, payload, _ in readable(segment.path.read_bytes()[: segment.size]):
                if kind != RESERVATION:
                    continue
                wire = msgpack.unpackb(payload)
                if wire[0] not in settled and wire[0] != unfinished:
                    recovered.orphans[wire[0]] = wire
                    if moved or segment.damage:
                        recovered.doubted.add(wire[0])


def _lease_of(wire: list[Any]) -> tuple[str, Lease]:
    """The tenant and the lease of a ``lease_record``; an older program wrote fewer fields."""
    tenant, limit_key, scope, start, end, amount, cap, used, *later = wire
    remaining, window, currency, grant = later[4:8] if len(later) >= 8 else (0, "", "", "")
    terms = Terms(amount, window=window, currency=currency, grant=grant)
    lease = Lease(LimitKey(limit_key), scope, start, end, terms)
    lease.cap, lease.used, lease.remaining = cap, used, remaining
    if later:
        lease.over, lease.degraded, epoch, run = later[:4]
        lease.pair = Pair(epoch, run)
    return tenant, lease


def _overdraw(lease: Lease, units: int, reserved: int) -> None:
    """Notes that ``units`` were approved without a lease, of one of which ``reserved`` were held.

    As ``LeaseBook.overdraw`` did, except that what the lease may still have covered counts against the cap as well:
    whether its hold was over is not in the log.
    """
    lease.degraded += units
    lease.remaining = max(0, lease.remaining - max(0, units - max(0, lease.free - reserved)))


def _header_fields(payload: bytes) -> list[Any]:
    fields: list[Any] = envelope.unpack(_HEADER_KIND, payload)
    return fields


def _settle(path: Path, torn_at: int | None) -> None:
    """Cuts a torn tail off, and sees to it that what is left is on the disk: only that may be shipped."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if torn_at is not None:
            os.ftruncate(descriptor, torn_at)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _bound(segment: Segment, last_seq: int) -> None:
    """The next file says where this one ended: events that damage at its end took are counted exactly."""
    if segment.last_seq == last_seq:
        return
    readable = segment.last_seq
    if segment.damage and not segment.damage[-1].exact:
        open_ended = segment.damage.pop()
        readable = open_ended.first_lost - 1
        segment.damage.append(replace(open_ended, last_lost=last_seq, exact=True))
    elif last_seq > readable:
        segment.damage.append(Damage(segment.size, segment.size, readable + 1, last_seq))
    segment.last_seq = max(readable, last_seq)


def _told(segment: Segment) -> list[str]:
    """In words, what of a file is damaged."""
    said = []
    for damage in segment.damage:
        lost = "no event is lost"
        if damage.lost:
            known = "" if damage.exact else "at most "
            lost = f"{known}{damage.lost:,} events are lost, {damage.first_lost:,} to {damage.last_lost:,}"
        said.append(f"{segment.path}: {damage.reason}; {lost}; all others are kept")
    return said


def _is_known(segment: Segment, position: int) -> bool:
    return any(one.start <= position < one.end for one in segment.damage)
