"""Signs the head of the audit trail within a second of each entry, and recounts the trail when asked: one task.

The signed head is kept in the database and in the state directory. The latter is out of reach of whoever can only write
to the database: a trail that was cut off or put back to what it was is found by it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

import structlog
from sqlalchemy import Connection

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.redis_link import backoff_s
from licet_control_plane.signing_keys import SigningKeys
from licet_control_plane.store import audit_trail
from licet_control_plane.store.audit_trail import Head, Recounted
from licet_control_plane.store.database import Database, DatabaseUnavailable

log: Final = structlog.get_logger(__name__)

AUDIT_HEAD_FILE: Final = "audit-head"
SIGN_EVERY_S: Final = 1.0
"""How old the newest signed head may be: who alters the database in less than this is found by the chain alone."""


class HeadUnreadable(Exception):
    """What is in the file is no head that this deployment signed. The message says which file, and why."""


class AuditKeeper:
    """``run`` is the task; ``number`` is that of the last entry whose head this process signed or found signed."""

    def __init__(
        self, database: Database, key: SigningKeys, *, file: Path, deployment: str, now_s: Callable[[], float]
    ) -> None:
        self._database = database
        self._key = key
        self._file = file
        self._deployment = deployment
        self._now_s = now_s
        self._is_behind = False
        self._signing = asyncio.Lock()  # the task signs, and whoever asks for the head: one file, one at a time
        self.number = 0

    async def run(self) -> None:
        """Sign until cancelled."""
        failures = 0
        while True:
            try:
                await self.keep()
                failures = 0
            except (DatabaseUnavailable, HeadUnreadable, OSError) as error:
                failures += 1
                if failures == 1:
                    log.error("the head of the audit trail cannot be signed and kept", reason=str(error))
                await asyncio.sleep(backoff_s(failures))
                continue
            await asyncio.sleep(SIGN_EVERY_S)

    async def keep(self) -> None:
        """Sign the head if an entry was added since. Raises as ``sign``."""
        number, _ = await self._database.read(audit_trail.head)
        if number != self.number:
            await self.sign()

    async def sign(self) -> Head | None:
        """The head, signed now; ``None`` of an empty trail.

        Raises:
            DatabaseUnavailable: the database failed.
            HeadUnreadable, OSError: the file cannot be read or written.
        """
        async with self._signing:
            document = await self._database.write(
                audit_trail.sign_head, self._key, now_us=int(self._now_s() * 1_000_000)
            )
            if document is None:
                return None
            made = Head.of(document, self._key.verifier())
            kept = await asyncio.to_thread(self._kept)
            if kept is not None and kept.number > made.number:
                # The file is the proof that something is missing: it stays. ``verify`` says what.
                if not self._is_behind:
                    self._is_behind = True
                    log.error(
                        "the audit trail is shorter than this server knew it",
                        entries=made.number,
                        known=kept.number,
                        fix="Run licet audit verify. If the database was restored from a backup, move the file"
                        f" {self._file} elsewhere.",
                    )
            else:
                self._is_behind = False
                await asyncio.to_thread(self._keep, document)
            self.number = made.number
            return made

    async def verify(self, given: Sequence[Head]) -> AsyncIterator[int | Recounted]:
        """Recount the trail, held to ``given``, to the newest signed head of the database and to the file's.

        Yields numbers of entries done, then what was found.

        Raises:
            DatabaseUnavailable: the database failed.
            HeadUnreadable, OSError: a head that should be there cannot be read.
        """
        held = [*given]
        if (kept := await asyncio.to_thread(self._kept)) is not None:
            held.append(kept)
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[int | Recounted] = asyncio.Queue()

        def recount(connection: Connection) -> None:
            newest = audit_trail.newest_signed(connection)
            everything = (
                held if newest is None else [*held, self._head(newest, "in the database", self._key.verifier())]
            )
            for step in audit_trail.verify(connection, everything, self._deployment):
                loop.call_soon_threadsafe(steps.put_nowait, step)

        work = asyncio.ensure_future(self._database.read(recount))
        while True:
            waiting = asyncio.ensure_future(steps.get())
            await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done() and work.done():
                waiting.cancel()
                work.result()
                raise AssertionError("a recount ends with what it found")
            step = await waiting
            yield step
            if isinstance(step, Recounted):
                await work
                return

    def _kept(self) -> Head | None:
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            return None
        return self._head(data, f"in {self._file}", self._key.verifier_of_own_files())

    @staticmethod
    def _head(document: bytes, where: str, verifier: Verifier) -> Head:
        try:
            return Head.of(document, verifier)
        except VerificationError as error:
            raise HeadUnreadable(f"the signed head {where}: {error}") from error

    def _keep(self, document: bytes) -> None:
        draft = self._file.with_name(f".{self._file.name}.new")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._file)
