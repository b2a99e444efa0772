"""The keys that this deployment signs with, as the database has them, and the task that follows a rotation.

``SigningKeys`` stands where a ``Signer`` is asked for: whoever has it signs with the active key, and need not know
that there are several. It reads the database each second, so that every control plane follows when one is told to
rotate; then it signs anew, in slices, all that another key signed: the bundle, licenses, and acknowledgements in Redis.
Heads and checkpoints come by themselves.

Concurrency: one event loop; the keys are replaced whole, so that a thread that signs sees the old or the new one.
Source: ``docs/adr/0035-keys-rotate-by-revisions.md``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Self

import structlog

from licet.wire.documents import ACK
from licet.wire.names import RedisNames
from licet.wire.signing import SigningKey, Statement, VerificationError, Verifier, signed_with
from licet_control_plane.core.sealed_events import Damaged
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.redis_link import Redis, RedisRefused, RedisUnavailable, redis_errors
from licet_control_plane.state_dir import StartError
from licet_control_plane.store import signing_keys
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.store.signing_keys import ACTIVE, NEXT, PREVIOUS, RETIRED, StoredKey

log: Final = structlog.get_logger(__name__)

FOLLOW_S: Final = 1.0
"""How long another control plane may sign heads and acknowledgements with the previous key. Documents it cannot:
``revisions.append`` refuses what the active key did not sign."""
ACKS_SLICE: Final = 500

Keep = Callable[[SigningKey, list[str]], None]


class SigningKeys:
    """``keep`` is given the active key, and all public keys that sidecars should trust, whenever either changes."""

    def __init__(self, database: Database, ledger_key: LedgerKey, stored: list[StoredKey], keep: Keep | None) -> None:
        self._database = database
        self._ledger_key = ledger_key
        self._keep = keep
        self._kept: tuple[str, list[str]] | None = None
        self.stored = stored
        self._active = self._opened(stored)

    @classmethod
    def open(
        cls,
        database: Database,
        ledger_key: LedgerKey,
        key: SigningKey,
        *,
        may_replace: bool = False,
        keep: Keep | None = None,
    ) -> Self:
        """The keys of a database; ``key``, from the state directory, is the first one of a new database.

        ``may_replace``: the database was restored from a backup that does not know ``key``, which is the active one.

        Raises:
            StartError: the database has other keys.
            DatabaseUnavailable: it failed.
        """
        now_us = time.time_ns() // 1_000
        stored = database.read_now(signing_keys.stored)
        if not stored:
            database.write_now(
                signing_keys.add, key, ledger_key, state=ACTIVE, by="licet server", now_us=now_us, audited=False
            )
        elif key.key_id not in {one.id for one in stored}:
            if not may_replace:
                raise StartError(
                    f"The signing key {key.key_id} is not one of this database.",
                    "Put the right signing-key.pem back. To change the key: licet signing-key generate, then rotate. If"
                    " the database was restored from a backup, start the server once with --new-generation.",
                )
            database.write_now(signing_keys.adopt, key, ledger_key, by="new-generation", now_us=now_us)
        try:
            return cls(database, ledger_key, database.read_now(signing_keys.stored), keep)
        except Damaged as error:
            raise StartError(f"The signing key does not open: {error}.", "Put the right ledger-key back.") from error

    @property
    def active(self) -> SigningKey:
        """The active key, as of the last look."""
        return self._active

    @property
    def public_key(self) -> str:
        """Of the active key."""
        return self._active.public_key

    @property
    def trusted(self) -> list[str]:
        """Public keys that sidecars should trust now, the active one first."""
        active = next(one for one in self.stored if one.state == ACTIVE)
        wanted = [NEXT] if active.resigned_at_us is not None else [NEXT, PREVIOUS]
        return [active.public_key, *(one.public_key for one in self.stored if one.state in wanted)]

    @property
    def public_keys(self) -> list[str]:
        """Of every key that is valid."""
        return [one.public_key for one in self.stored if one.state != RETIRED]

    def sign(self, statement: Statement) -> bytes:
        """Sign with the active key."""
        return self._active.sign(statement)

    def verifier(self) -> Verifier:
        """Believes every key that is valid."""
        return Verifier(self.public_keys)

    def verifier_of_own_files(self) -> Verifier:
        """Believes every key there ever was: for what this server signed itself, and kept where only it can write."""
        return Verifier([one.public_key for one in self.stored])

    async def refresh(self) -> None:
        """Know what the database says now.

        Raises:
            DatabaseUnavailable: it failed.
        """
        self._take(await self._database.read(signing_keys.stored))

    def _take(self, stored: list[StoredKey]) -> None:
        before = self._active.key_id
        self._active = self._opened(stored)
        self.stored = stored
        if self._active.key_id != before:
            log.info("the signing key was rotated", before=before, now=self._active.key_id)
        self.keep()

    def keep(self) -> None:
        """Write down the keys, if they changed."""
        now = (self._active.key_id, self.trusted)
        if self._keep is not None and now != self._kept:
            self._keep(self._active, self.trusted)
            self._kept = now

    def _opened(self, stored: list[StoredKey]) -> SigningKey:
        active = next(one for one in stored if one.state == ACTIVE)
        known: SigningKey | None = getattr(self, "_active", None)
        return known if known is not None and known.key_id == active.id else active.opened(self._ledger_key)


class Resigner:
    """``run`` is the task that follows the database and signs anew. ``signed`` counts what it signed."""

    def __init__(
        self, database: Database, keys: SigningKeys, redis: Redis, names: RedisNames, *, wake: asyncio.Event,
        now_s: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database = database
        self._keys = keys
        self._redis = redis
        self._acked = names.acked()
        self._wake = wake
        self._now_s = now_s
        self._trouble = ""
        self.signed = 0

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._keys.refresh()
                await self.step()
                self._trouble = ""
            except (DatabaseUnavailable, RedisUnavailable, RedisRefused, StartError) as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.warning("signing keys are not followed", reason=str(error))
            await asyncio.sleep(FOLLOW_S)

    async def step(self) -> None:
        """Sign anew what the previous key signed, if there is one and that was not done. May be repeated."""
        active = next(one for one in self._keys.stored if one.state == ACTIVE)
        if active.resigned_at_us is not None:
            return
        key = self._keys.active
        await self._documents(key)
        await self._acknowledgements(key)
        await self._database.write(signing_keys.note_resigned, key.key_id, now_us=self._now_us())
        await self._keys.refresh()
        log.info("all that is published is signed with the new key", key=key.key_id, signed=self.signed)

    async def _documents(self, key: SigningKey) -> None:
        """Sign documents anew. Whatever is made from the rotation on is signed with the new key already."""
        self.signed += int(await self._database.write(signing_keys.resign_bundle, key, now_us=self._now_us()))
        after: str | None = ""
        while after is not None:
            after, some = await self._database.write(
                signing_keys.resign_licenses, key, after=after, now_us=self._now_us()
            )
            self.signed += some
            self._wake.set()

    async def _acknowledgements(self, key: SigningKey) -> None:
        """Sign acknowledgements anew as they are. One that the drain replaces meanwhile may be put back: its sidecar
        then hands its usage in once more, and is told again."""
        verifier = self._keys.verifier()
        cursor = 0
        while True:
            with redis_errors():
                cursor, found = await self._redis.hscan(self._acked, cursor=cursor, count=ACKS_SLICE)
            anew: dict[bytes, bytes] = {}
            for log_id, document in found.items():
                if signed_with(document) == key.key_id:
                    continue
                try:
                    anew[log_id] = key.sign(verifier.verify(document, kind=ACK, key=log_id.decode()))
                except (VerificationError, UnicodeDecodeError):
                    continue  # nobody believes it, before or after
            if anew:
                with redis_errors():
                    await self._redis.hset(self._acked, mapping=anew)
                self.signed += len(anew)
            if not cursor:
                return

    def _now_us(self) -> int:
        return int(self._now_s() * 1_000_000)
