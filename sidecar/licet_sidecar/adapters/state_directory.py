"""A sidecar's state directory: whose it is, and that only one process uses it.

The id is resumed only where the recorded boot id, device and inode match: a cloned volume, or one rolled back to an
earlier state, must not go on with registers that were spent meanwhile. Then a new id is taken, and the old log is
shipped as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from licet.domain.ids import SidecarId
from licet.wire import envelope

IDENTITY_FILE: Final = "identity"
LOCK_FILE: Final = "lock"
_KIND: Final = "identity"
_BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")


class StateDirectoryError(Exception):
    """The directory cannot be used. The message says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is. ``previous`` is the incarnation before, whose leases may be taken up; 0 for none.

    ``moved``: what else lies in the directory was not, for certain, left by the last process that used this very one.
    A copy of it may be in use elsewhere.
    """

    sidecar: SidecarId
    incarnation: int
    previous: int
    moved: bool = False


class StateDirectory:
    """The directory, locked for as long as this object lives."""

    def __init__(self, path: Path) -> None:
        """Creates the directory when missing, and locks it.

        Raises:
            StateDirectoryError: not writable, or in use by another process.
        """
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateDirectoryError(
                f"state directory {path} cannot be written: {error.strerror}; give a writable one with --state-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_text(self._lock)
            os.close(self._lock)
            raise StateDirectoryError(
                f"state directory {path} is in use by another sidecar{f' (pid {holder})' if holder else ''};"
                " stop that one, or give each sidecar a directory of its own with --state-dir"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        """Unlocks the directory."""
        os.close(self._lock)

    def claim_identity(self) -> Identity:
        """Resumes the id recorded here or takes a new one; durably counts a new incarnation.

        Raises:
            StateDirectoryError: the directory cannot be written.
        """
        place = self._place()
        recorded = self._recorded()
        moved = recorded is None or recorded[2] != place
        if recorded is not None and not moved and recorded[0]:
            sidecar, previous = SidecarId(recorded[0]), recorded[1]
        else:
            sidecar, previous = SidecarId(secrets.token_hex(16)), 0
        self._record(sidecar, previous + 1, place)
        return Identity(sidecar, previous + 1, previous, moved)

    def renounce_identity(self) -> None:
        """Makes the next start take a new id: this one's registers were sealed, or a newer incarnation is at work.

        Raises:
            StateDirectoryError: the directory cannot be written, and the id neither removed.
        """
        try:
            self._record("", 0, self._place())
        except StateDirectoryError:  # a full disk, say; nothing then tells the next start that this is the same place
            try:
                (self.path / IDENTITY_FILE).unlink(missing_ok=True)
                self._sync()
            except OSError as error:
                raise StateDirectoryError(
                    f"cannot remove {self.path / IDENTITY_FILE}: {error.strerror}; remove it before the next start"
                ) from error

    def write_atomically(self, name: str, data: bytes) -> None:
        """Replaces the file ``name`` by ``data``, wholly or not at all, also across a power loss.

        Raises:
            StateDirectoryError: the directory cannot be written.
        """
        temporary = self.path / f"{name}.new"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.rename(self.path / name)
            self._sync()
        except OSError as error:
            raise StateDirectoryError(f"cannot write {self.path / name}: {error.strerror}; free space there") from error

    def read(self, name: str) -> bytes | None:
        """Contents of the file ``name``; ``None`` when there is none."""
        try:
            return (self.path / name).read_bytes()
        except OSError:
            return None

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _place(self) -> list[str | int]:
        status = self.path.stat()
        try:
            boot_id = _BOOT_ID_PATH.read_text().strip()
        except OSError:
            boot_id = secrets.token_hex(16)  # without a boot id nothing tells a reboot: never resume
        return [boot_id, status.st_dev, status.st_ino]

    def _recorded(self) -> tuple[str, int, list[str | int]] | None:
        data = self.read(IDENTITY_FILE)
        if data is None:
            return None
        try:
            sidecar, incarnation, place = envelope.unpack(_KIND, data)
            return str(sidecar), int(incarnation), list(place)
        except (envelope.EnvelopeError, ValueError, TypeError):
            return None  # damaged: as good as none, the old registers stay counted

    def _record(self, sidecar: str, incarnation: int, place: list[str | int]) -> None:
        self.write_atomically(IDENTITY_FILE, envelope.pack(_KIND, [sidecar, incarnation, place]))


def _read_text(descriptor: int) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return os.pread(descriptor, 32, 0).decode().strip()
    return ""
