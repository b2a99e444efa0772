"""The state directory: one server's lock, its signing key, its ledger key, and the keys it hands out.

Secrets are files of mode 0600, written whole or not at all.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from licet.wire.signing import SigningKey
from licet_control_plane.core.access import KEY_ID_BYTES, SECRET_BYTES, key_text
from licet_control_plane.core.sealed_events import KEY_BYTES
from licet_control_plane.core.subject_keys import LedgerKey

LEDGER_KEY_FILE: Final = "ledger-key"
SIGNING_KEY_FILE: Final = "signing-key.pem"


class StartError(Exception):
    """The server cannot start. ``fix`` says what to do about it."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


class StateDir:
    """A claimed state directory. ``close`` lets another server have it."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path) -> Self:
        """Make the directory when there is none, and take its lock.

        Raises:
            StartError: it cannot be written, or another server uses it.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(
                f"The state directory {path} cannot be used: {error.strerror}.",
                "Make it writable for this user, or name another one with --state-dir.",
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
            os.close(lock)
            raise StartError(
                f"The state directory {path} is in use by another server{f' (process {holder})' if holder else ''}.",
                "Stop that one, or name another directory with --state-dir.",
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return cls(path, lock)

    def signing_key(self, *, may_create: bool) -> SigningKey:
        """The deployment's signing key; a new one on the first start (``may_create``).

        Raises:
            StartError: it is missing, or not a key.
        """
        path = self.path / SIGNING_KEY_FILE
        try:
            private = load_pem_private_key(path.read_bytes(), password=None)
        except FileNotFoundError as error:
            if not may_create:
                raise StartError(
                    f"The signing key {path} is missing, and the database is not new: sidecars trust that key only.",
                    "Put the file back from your backup.",
                ) from error
            private = Ed25519PrivateKey.generate()
            self._write(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
        except (OSError, ValueError, TypeError) as error:
            raise StartError(
                f"The signing key {path} cannot be read: {error}.", "It must be an Ed25519 private key in PEM."
            ) from error
        if not isinstance(private, Ed25519PrivateKey):
            raise StartError(f"The signing key {path} is not an Ed25519 key.", "Put the right file back.")
        return SigningKey(private)

    def keep_keys(self, key: SigningKey, trusted: list[str]) -> None:
        """Write down the active signing key, and the public keys that sidecars should trust.

        Raises:
            StartError: it cannot be written.
        """
        private = Ed25519PrivateKey.from_private_bytes(key.private_bytes())
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path = self.path / SIGNING_KEY_FILE
        if not path.exists() or path.read_bytes() != pem:
            self._write(path, pem, mode=0o600)
        self._write(self.path / "public-key.txt", "".join(f"{one}\n" for one in trusted).encode(), mode=0o644)

    def ledger_key(self, *, may_create: bool) -> LedgerKey:
        """The key that keys of subjects are wrapped with; a new one on the first start (``may_create``).

        Raises:
            StartError: it is missing, or not a key.
        """
        path = self.path / LEDGER_KEY_FILE
        if not path.exists():
            if not may_create:
                raise StartError(
                    f"The ledger key {path} is missing, and the database is not new: without it nobody can read what"
                    " the ledger holds about people.",
                    "Put the file back from your backup.",
                )
            self._write(path, f"{secrets.token_hex(KEY_BYTES)}\n".encode(), mode=0o600)
        try:
            return read_ledger_key(path)
        except (OSError, ValueError) as error:
            raise StartError(f"The ledger key {path} cannot be read: {error}.", "Put the right file back.") from error

    def new_api_key(self, name: str) -> str:
        """Make an API key and leave it in the file ``name``. The caller keeps only its hash."""
        key = key_text(secrets.token_bytes(KEY_ID_BYTES), secrets.token_bytes(SECRET_BYTES))
        self._write(self.path / name, f"{key}\n".encode(), mode=0o600)
        return key

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)

    def _write(self, path: Path, content: bytes, *, mode: int) -> None:
        temporary = path.with_name(f".{path.name}.new")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)  # the umask must not decide who reads a public key
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except OSError as error:
            raise StartError(
                f"{path} cannot be written: {error.strerror}.",
                "Make the state directory writable for this user, or name another one with --state-dir.",
            ) from error


def read_ledger_key(path: Path) -> LedgerKey:
    """The ledger key in a file: 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a key.
    """
    text = path.read_text().strip()
    try:
        return LedgerKey(bytes.fromhex(text))
    except ValueError as error:
        raise ValueError(f"it must be {2 * KEY_BYTES} hexadecimal digits") from error
