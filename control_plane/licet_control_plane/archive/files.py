"""The files of the archive: numbered records of one shard, appended, checksummed, and rotated. What a record says is
none of its business.

``<directory>/shard-<shard>/<number of the first record, 16 digits>.archive``

A file begins with ``MAGIC`` and a frame that says whose it is; each further frame holds one or more records with
consecutive numbers. A frame is a marker, the CRC-32 of what follows, the length of the packed records, the first
number, and the records: msgpack, compressed. Numbers go on from file to file.

Guaranteed:
- when ``append`` returns, the records are on disk: file and directory are fsynced;
- a frame is fsynced before the next one is begun. So only the last frame can be torn; opening cuts it off, and the
  number it ends with says what must be appended again. Damage before a good frame is never cut off: it is an error;
- after a failed write or fsync nothing after the last good frame is trusted: it is cut off before the next one.

One process at a time; one thread at a time for each shard. It blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, Final, NamedTuple, Self

import msgpack

MAGIC: Final = b"licet archive 1\n"
SUFFIX: Final = ".archive"
FILE_BYTES_MAX: Final = 64 * 1024 * 1024
"""A file that has grown to this is not appended to any more: some 500,000 events."""
FILE_S_MAX: Final = 3_600
"""Nor is one that was begun so long ago: whoever copies finished files away has a copy at most an hour old."""
FRAME_BYTES_MAX: Final = 256 * 1024 * 1024
"""Larger than any ledger transaction: a length beyond it is damage."""
_HEADER_BYTES_MAX: Final = 512
_MARKER: Final = b"\xf7LAR"
_HEAD: Final = Struct(">4sIIQ")
"""Marker, CRC-32 of the rest of the head and the body, length of the body, number of the first record."""


class ArchiveUnavailable(Exception):
    """The archive cannot be written now: the disk is full, read-only or broken. Nothing was lost; try again."""


class ArchiveDamaged(Exception):
    """Files are not what was written. The message says where; nothing was changed."""


class ArchiveInUse(Exception):
    """Another process writes to this directory."""


@dataclass(frozen=True, slots=True)
class Torn:
    """The end of a file that was cut off: it was never known to be on disk."""

    path: Path
    offset: int
    bytes: int


class ArchiveDirectory:
    """A claimed directory. ``close`` lets another process have it."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path) -> Self:
        """Make the directory when there is none, and take its lock.

        Raises:
            ArchiveInUse: by another process.
            ArchiveUnavailable: it cannot be written.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArchiveUnavailable(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ArchiveInUse(f"{path} is written by another process") from error
        return cls(path, lock)

    def shard(self, shard: int, deployment: str) -> ShardArchive:
        """The files of one shard, opened for appending. Raises as ``ShardArchive.open``."""
        return ShardArchive.open(self.path, shard, deployment)

    def close(self) -> None:
        """Give the lock back. May be repeated."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


class ShardArchive:
    """Appends the records of one shard. ``last`` is the number of the last one that is on disk, 0 for none."""

    def __init__(self, folder: Path, shard: int, deployment: str) -> None:
        self.last = 0
        self.bytes = 0
        """Of all files."""
        self.torn: Torn | None = None
        """What opening cut off."""
        self._folder = folder
        self._shard = shard
        self._deployment = deployment
        self._descriptor = -1
        self._path = folder
        self._end = 0
        self._begun_s = 0.0
        self._suspect = False

    @classmethod
    def open(cls, directory: Path, shard: int, deployment: str) -> Self:
        """Look at what is there, cut off a torn end, and be ready to go on.

        Raises:
            ArchiveDamaged: a file is damaged before its end, or belongs to another deployment or shard.
            ArchiveUnavailable: it cannot be read or written.
        """
        archive = cls(_folder(directory, shard), shard, deployment)
        try:
            archive._folder.mkdir(mode=0o700, exist_ok=True)
            _sync_directory(directory)
            archive._recover()
        except OSError as error:
            raise ArchiveUnavailable(f"{archive._folder}: {error.strerror}") from error
        return archive

    def append(self, first: int, records: Sequence[bytes], *, now_s: float) -> None:
        """Put ``records`` ``first``, ``first + 1``, … on disk. ``first`` must be the number after ``last``.

        Raises:
            ArchiveUnavailable: nothing is appended; may be repeated.
            ValueError: ``first`` is another number.
        """
        if first != self.last + 1:
            raise ValueError(f"record {first} cannot follow record {self.last}")
        if not records:
            return
        frame = _frame(first, records)
        try:
            self._repair()
            if self._descriptor >= 0 and (self._end >= FILE_BYTES_MAX or now_s - self._begun_s >= FILE_S_MAX):
                self._close_file()
            if self._descriptor < 0:
                self._begin_file(first, now_s)
            self._suspect = True
            _write(self._descriptor, frame)
            os.fsync(self._descriptor)
            self._suspect = False
        except OSError as error:
            raise ArchiveUnavailable(f"{self._path}: {error.strerror}") from error
        self._end += len(frame)
        self.bytes += len(frame)
        self.last = first + len(records) - 1

    def close(self) -> None:
        """Let the file go. What was appended is on disk already."""
        self._close_file()

    def _recover(self) -> None:
        paths = files_of(self._folder)
        self.bytes = sum(path.stat().st_size for path in paths)
        if not paths:
            return
        path = paths[-1]
        scanned = _scan(path, self._shard, self._deployment)
        if scanned.header_end == 0:
            # Begun, and not on disk when the machine stopped: there is nothing in it.
            begun = Torn(path, 0, path.stat().st_size)
            path.unlink()
            _sync_directory(self._folder)
            self._recover()
            self.torn = self.torn or begun
            return
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._path, self._end, self.last = path, scanned.end, scanned.last
        self._begun_s = scanned.begun_s
        torn = path.stat().st_size - scanned.end
        if torn:
            self.torn = Torn(path, scanned.end, torn)
            self.bytes -= torn
            os.ftruncate(self._descriptor, scanned.end)
        # Whatever a process that died had written, and not yet fsynced.
        os.fsync(self._descriptor)

    def _begin_file(self, first: int, now_s: float) -> None:
        path = self._folder / f"{first:016d}{SUFFIX}"
        header = MAGIC + _frame(
            0, [msgpack.packb({"deployment": self._deployment, "shard": self._shard, "first": first, "at": now_s})]
        )
        # A file of this name was never finished: its first record is not on disk, or ``last`` would say so.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write(descriptor, header)
            os.fsync(descriptor)
            _sync_directory(self._folder)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self._descriptor, self._path, self._end, self._begun_s = descriptor, path, len(header), now_s
        self.bytes += len(header)

    def _repair(self) -> None:
        """Cut off what a failed append may have left: after a failed fsync it looks written, and need not be."""
        if self._suspect and self._descriptor >= 0:
            os.ftruncate(self._descriptor, self._end)
            os.fsync(self._descriptor)
        self._suspect = False

    def _close_file(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


class Record(NamedTuple):
    """One record, and where it stands."""

    number: int
    data: bytes
    path: Path


def read(directory: Path, shard: int, deployment: str, *, after: int = 0) -> Iterator[Record]:
    """Every record of a shard with a number above ``after``, ascending. A torn end is passed over.

    Raises:
        ArchiveDamaged: a record is damaged or missing, or a file belongs to another deployment or shard. Everything
            before it was given.
        ArchiveUnavailable: a file cannot be read.
    """
    paths = files_of(_folder(directory, shard))
    firsts = [_first_of(path) for path in paths]
    number = after
    for index, path in enumerate(paths):
        is_last = index == len(paths) - 1
        if not is_last and firsts[index + 1] <= after + 1:
            continue
        if firsts[index] > number + 1:
            raise ArchiveDamaged(
                f"{path}: it begins with record {firsts[index]}; {number + 1} to {firsts[index] - 1} are missing"
            )
        for first, records in _frames(path, shard, deployment, may_be_torn=is_last):
            for offset, data in enumerate(records):
                if first + offset <= number:
                    continue
                if first + offset != number + 1:
                    raise ArchiveDamaged(f"{path}: record {first + offset} follows record {number}")
                number = first + offset
                yield Record(number, data, path)


def shards_in(directory: Path) -> list[int]:
    """The shards that have files, ascending."""
    names = (path.name.removeprefix("shard-") for path in directory.glob("shard-*"))
    return sorted(int(name) for name in names if name.isdigit())


def deployment_of(directory: Path) -> str:
    """Whose archive it is, by the first file there is; empty when there is none.

    Raises:
        ArchiveDamaged: that file cannot be read.
        ArchiveUnavailable: likewise, because of the disk.
    """
    for shard in shards_in(directory):
        for path in files_of(_folder(directory, shard)):
            return str(_header(path, _content(path))[0].get("deployment", ""))
    return ""


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for shard in shards_in(directory) for path in files_of(_folder(directory, shard)))


def files_of(folder: Path) -> list[Path]:
    """A shard's files, in the order of their records."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())


class _Scanned(NamedTuple):
    header_end: int
    end: int
    last: int
    begun_s: float


def _scan(path: Path, shard: int, deployment: str) -> _Scanned:
    """Where the good frames of the last file end, and with which record."""
    content = _content(path)
    header, start = _header(path, content, may_be_torn=True)
    if not start:
        return _Scanned(0, 0, 0, 0.0)
    _check_owner(path, header, shard, deployment)
    end, last = start, _first_of(path) - 1
    for first, records, after in _walk(path, content, start, may_be_torn=True):
        end, last = after, first + len(records) - 1
    return _Scanned(start, end, last, float(header["at"]))


def _frames(path: Path, shard: int, deployment: str, *, may_be_torn: bool) -> Iterator[tuple[int, list[bytes]]]:
    content = _content(path)
    header, start = _header(path, content, may_be_torn=may_be_torn)
    if not start:
        return
    _check_owner(path, header, shard, deployment)
    for first, records, _ in _walk(path, content, start, may_be_torn=may_be_torn):
        yield first, records


def _header(path: Path, content: bytes, *, may_be_torn: bool = False) -> tuple[dict[str, Any], int]:
    """What a file says of itself, and where that ends; 0 when it was begun and nothing more."""
    found = _frame_at(content, len(MAGIC)) if content.startswith(MAGIC) else None
    if found is None:
        # It is fsynced before anything else is written: a file that holds more was damaged later.
        if may_be_torn and len(content) <= _HEADER_BYTES_MAX and _next_frame(content, 1) is None:
            return {}, 0
        raise ArchiveDamaged(f"{path}: its beginning is damaged")
    header: dict[str, Any] = msgpack.unpackb(found[1][0])
    return header, found[2]


def _check_owner(path: Path, header: dict[str, Any], shard: int, deployment: str) -> None:
    if (header.get("deployment"), header.get("shard")) != (deployment, shard):
        raise ArchiveDamaged(
            f"{path}: it belongs to shard {header.get('shard')} of deployment {header.get('deployment')},"
            f" not to shard {shard} of {deployment}"
        )
    if header.get("first") != _first_of(path):
        raise ArchiveDamaged(f"{path}: it was renamed; it begins with record {header.get('first')}")


def _walk(path: Path, content: bytes, start: int, *, may_be_torn: bool) -> Iterator[tuple[int, list[bytes], int]]:
    """Frames from ``start`` on: first number, records, and where the frame ends."""
    expected = _first_of(path)
    while start < len(content):
        found = _frame_at(content, start)
        if found is None:
            good = _next_frame(content, start + 1)
            if good is None and may_be_torn:
                return
            upto = f"up to byte {good}" if good is not None else "up to its end"
            raise ArchiveDamaged(f"{path}: damaged from byte {start} {upto}, after record {expected - 1}")
        first, records, start = found
        if first != expected:
            raise ArchiveDamaged(f"{path}: record {first} follows record {expected - 1}")
        expected = first + len(records)
        yield first, records, start


def _frame(first: int, records: Sequence[bytes]) -> bytes:
    body = zlib.compress(msgpack.packb(list(records), use_bin_type=True), 1)
    head = _HEAD.pack(_MARKER, 0, len(body), first)
    return _HEAD.pack(_MARKER, zlib.crc32(body, zlib.crc32(head[8:])), len(body), first) + body


def _frame_at(content: bytes, start: int) -> tuple[int, list[bytes], int] | None:
    """The good frame that begins at ``start``, if one does: its first number, its records, and where it ends."""
    end = start + _HEAD.size
    if end > len(content):
        return None
    marker, checksum, length, first = _HEAD.unpack_from(content, start)
    if marker != _MARKER or length > FRAME_BYTES_MAX or end + length > len(content):
        return None
    body = content[end : end + length]
    if zlib.crc32(body, zlib.crc32(content[start + 8 : end])) != checksum:
        return None
    return first, msgpack.unpackb(zlib.decompress(body)), end + length


def _next_frame(content: bytes, start: int) -> int | None:
    """Where the next good frame begins."""
    while (start := content.find(_MARKER, start)) >= 0:
        if _frame_at(content, start) is not None:
            return start
        start += 1
    return None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArchiveUnavailable(f"{path}: {error.strerror}") from error


def _folder(directory: Path, shard: int) -> Path:
    return directory / f"shard-{shard}"


def _first_of(path: Path) -> int:
    return int(path.stem)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
