"""The keys of subjects in the archive: the one part of it that is rewritten, so that erasing somebody reaches it.

``<directory>/subject-keys/<number of the first subject, 12 digits>.keys``: 1,024 subjects a file, each replaced as a
whole (written beside, fsynced, renamed). Keys are as the database has them, under the ledger's key: without the file
``ledger-key`` they open nothing.

A copy of the archive that was made earlier holds the keys it held then. Erasing cannot reach it: see
``docs/operations.md``.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgpack

from licet_control_plane.archive.files import ArchiveDamaged, ArchiveUnavailable

FOLDER: Final = "subject-keys"
FILE_SUBJECTS: Final = 1_024
"""150 KB: what a new subject costs to write."""
_SUFFIX: Final = ".keys"
_CHECKSUM_BYTES: Final = 4


class ArchivedSubject(NamedTuple):
    """A row of the ledger's subjects. ``tag``, ``principal`` and ``key`` are ``None`` once it was erased."""

    number: int
    tenant: str
    type: str
    tag: bytes | None
    principal: bytes | None
    key: bytes | None
    created_at: int
    erased_at: int | None


class SubjectKeyFiles:
    """The folder. One thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / FOLDER
        self._known: dict[int, set[int]] = {}
        """Numbers by file, of the files that were looked at."""

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of ``numbers`` that are not there, ascending.

        Raises:
            ArchiveDamaged, ArchiveUnavailable: a file cannot be read.
        """
        return sorted({number for number in numbers if number not in self._numbers(number // FILE_SUBJECTS)})

    def put(self, subjects: Collection[ArchivedSubject]) -> None:
        """Put subjects there, in place of what is there under their numbers. On disk when it returns.

        Raises:
            ArchiveDamaged, ArchiveUnavailable: a file cannot be read or written; may be repeated.
        """
        for index in sorted({subject.number // FILE_SUBJECTS for subject in subjects}):
            held = {subject.number: subject for subject in self._read(index)}
            held |= {subject.number: subject for subject in subjects if subject.number // FILE_SUBJECTS == index}
            self._write(index, list(held.values()))

    def erase(self, numbers: Collection[int], *, at: int) -> None:
        """Destroy the keys of subjects, and what they could be found by. Raises as ``put``."""
        for index in sorted({number // FILE_SUBJECTS for number in numbers}):
            held = self._read(index)
            kept = [
                subject
                if subject.number not in numbers or subject.erased_at is not None
                else subject._replace(tag=None, principal=None, key=None, erased_at=at)
                for subject in held
            ]
            if kept != held:
                self._write(index, kept)

    def all(self) -> Iterator[ArchivedSubject]:
        """Every subject, by number. Raises as ``missing``."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            yield from self._read(int(path.stem) // FILE_SUBJECTS)

    def _numbers(self, index: int) -> set[int]:
        known = self._known.get(index)
        if known is None:
            known = self._known[index] = {subject.number for subject in self._read(index)}
        return known

    def _path(self, index: int) -> Path:
        return self._folder / f"{index * FILE_SUBJECTS:012d}{_SUFFIX}"

    def _read(self, index: int) -> list[ArchivedSubject]:
        path = self._path(index)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ArchiveUnavailable(f"{path}: {error.strerror}") from error
        body = content[_CHECKSUM_BYTES:]
        if zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "big") != content[:_CHECKSUM_BYTES]:
            raise ArchiveDamaged(f"{path}: it is damaged")
        return [ArchivedSubject(*fields) for fields in msgpack.unpackb(body)]

    def _write(self, index: int, subjects: list[ArchivedSubject]) -> None:
        body: bytes = msgpack.packb(sorted(subjects, key=lambda subject: subject.number), use_bin_type=True)
        path = self._path(index)
        fresh = path.with_suffix(".new")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "big") + body)
                file.flush()
                os.fsync(descriptor)
            os.replace(fresh, path)
            for folder in (self._folder, self._folder.parent):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise ArchiveUnavailable(f"{path}: {error.strerror}") from error
        self._known[index] = {subject.number for subject in subjects}
