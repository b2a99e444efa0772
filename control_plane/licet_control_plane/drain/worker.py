"""One shard's worker: reads batches, commits them, acknowledges them.

It reads first what it had read before and did not acknowledge (cursor ``0``: after a start, and after any failure),
then what is new (cursor ``>``), and now and then what a dead worker left. A batch that cannot be understood is moved
to the dead letters, so that it holds up nobody; one that the ledger cannot take now stays, and is tried again. So does
one that there is no room for among the dead letters: nothing leaves the stream that is not in the database.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import structlog
from redis.exceptions import ResponseError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from licet.wire.documents import ACK, AckPayload
from licet.wire.envelope import EnvelopeError
from licet.wire.names import RedisNames
from licet.wire.signing import Signer, Statement
from licet.wire.usage import LostRange, UsageBatch
from licet_control_plane.archive.files import ArchiveDamaged, ArchiveUnavailable
from licet_control_plane.archive.follower import Archive
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.redis_link import BLOCK_MS, Redis, RedisRefused, RedisUnavailable, backoff_s, redis_errors
from licet_control_plane.store import dead_letters, ledger, ledger_reports, meta
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.store.dead_letters import Letter, Waiting
from licet_control_plane.store.ledger import Recorded
from licet_control_plane.store.subjects import SubjectKeys

GROUP: Final = "ledger"
FIELD: Final = b"b"
READ_MAX: Final = 16
"""Batches of one transaction: at most 65,536 events, about two seconds of the database."""
CLAIM_IDLE_MS: Final = 30_000
"""A batch that a worker has had for this long without acknowledging it is somebody else's to do."""
CLAIM_S: Final = 10.0
_MISFIT: Final = (SQLAlchemyError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What the ledger raises for an event whose fields are not what they should be. A database that is away is not it."""
_PENDING: Final = "0"
_NEW: Final = ">"

log = structlog.get_logger(__name__)

Entry = tuple[bytes, dict[bytes, bytes] | None]


class NotRecordable(Exception):
    """A batch cannot be recorded. The message says why."""


@dataclass(slots=True)
class DrainCounts:
    """Since the start. ``trouble``: why each shard's worker waits; absent when it works. ``backlog`` by shard.

    ``dead_letters`` and ``conflicts_kept`` are what the database holds; ``held`` is how many batches each shard's
    stream holds because there was no room for them among the dead letters.
    """

    events: int = 0
    batches: int = 0
    duplicates: int = 0
    conflicts: int = 0
    declared_lost: int = 0
    poison: int = 0
    trouble: dict[int, str] = field(default_factory=dict)
    backlog: dict[int, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    dead_letters: Waiting = field(default_factory=Waiting)
    conflicts_kept: int = 0


class ShardWorker:
    """``run`` is the task."""

    def __init__(
        self,
        shard: int,
        redis: Redis,
        names: RedisNames,
        database: Database,
        key: Signer,
        subject_keys: SubjectKeys,
        counts: DrainCounts,
        *,
        archive: Archive | None = None,
        consumer: str,
        now_s: Callable[[], float],
    ) -> None:
        self._shard = shard
        self._redis = redis
        self._stream = names.usage(shard)
        self._acked = names.acked()
        self._database = database
        self._key = key
        self._subject_keys = subject_keys
        self._counts = counts
        self._archive = archive
        self._consumer = consumer
        self._now_s = now_s
        self._cursor = _PENDING
        self._claimed_s = -math.inf
        self._claim_from = "0-0"
        self._held: set[bytes] = set()

    async def run(self) -> None:
        """Drain until cancelled, through everything that passes by itself."""
        failures = 0
        while True:
            try:
                await self._step()
                failures = 0
                self._counts.trouble.pop(self._shard, None)
            except (
                RedisUnavailable,
                RedisRefused,
                DatabaseUnavailable,
                ArchiveUnavailable,
                ArchiveDamaged,
            ) as error:
                failures += 1
                self._cursor = _PENDING
                if self._shard not in self._counts.trouble:
                    log.warning("drain waits", shard=self._shard, reason=str(error))
                self._counts.trouble[self._shard] = str(error)
                await asyncio.sleep(backoff_s(failures))

    async def take(self, raws: Sequence[bytes]) -> dict[str, bytes]:
        """Commits packed batches that came by another way than the stream. Signed acknowledgements, by log id.

        May be repeated, also with what came through the stream: the ledger takes each event once. A batch that cannot
        be read or does not fit the ledger becomes a dead letter, and is not acknowledged.

        Raises:
            DatabaseUnavailable: nothing is known of what was committed: send it again.
        """
        entries: list[Entry] = [(b"-", {FIELD: raw}) for raw in raws]
        decoded, poison, _ = await asyncio.to_thread(_decode, entries)
        done = Recorded()
        try:
            done = await self._record([batch for _, batch in decoded])
        except _MISFIT:
            done = await self._record_singly(decoded, poison)
        if poison:
            await self._keep(poison)
        self._count(done, batches=len(decoded))
        try:
            return await self._acks(done)
        except (ArchiveUnavailable, ArchiveDamaged) as error:
            raise DatabaseUnavailable(f"the archive failed: {error}") from error

    async def _step(self) -> None:
        entries = await self._read()
        if entries:
            await self._drain(entries)
        if asyncio.get_running_loop().time() - self._claimed_s >= CLAIM_S:
            await self._claim()

    async def _read(self) -> list[Entry]:
        try:
            with redis_errors():
                block = BLOCK_MS if self._cursor == _NEW else None
                answer = await self._redis.xreadgroup(
                    GROUP, self._consumer, {self._stream: self._cursor}, count=READ_MAX, block=block
                )
        except RedisRefused as error:
            if "NOGROUP" not in str(error):
                raise
            await self._make_group()
            return []
        entries: list[Entry] = answer[0][1] if answer else []
        if not entries:
            self._cursor = _NEW
        elif self._cursor != _NEW:
            self._cursor = entries[-1][0].decode()  # past what is held
        return entries

    async def _make_group(self) -> None:
        """The stream is new, or was wiped; whatever is in it was sent since."""
        with redis_errors():
            try:
                await self._redis.xgroup_create(self._stream, GROUP, "0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
        self._cursor = _PENDING

    async def _claim(self) -> None:
        with redis_errors():
            cursor, entries, *_ = await self._redis.xautoclaim(
                self._stream, GROUP, self._consumer, CLAIM_IDLE_MS, self._claim_from, count=READ_MAX
            )
            self._counts.backlog[self._shard] = await self._redis.xlen(self._stream)
        self._claim_from = cursor.decode()
        if self._claim_from == "0-0":
            self._claimed_s = asyncio.get_running_loop().time()
        if entries:
            await self._drain(entries)
        await self._catch_up()
        await self.count_kept()

    async def count_kept(self) -> None:
        """Read what the database keeps aside, for metrics and alerts."""
        counts = self._counts
        counts.dead_letters = await self._database.read(dead_letters.waiting)
        counts.conflicts_kept = await self._database.read(ledger_reports.conflict_count)

    async def _drain(self, entries: Sequence[Entry]) -> None:
        # In a thread: decoding thousands of events would keep the loop from everything else.
        decoded, poison, gone = await asyncio.to_thread(_decode, entries)
        done = Recorded()
        if decoded:
            try:
                done = await self._record([batch for _, batch in decoded])
            except _MISFIT:
                done = await self._record_singly(decoded, poison)
        self._count(done, batches=len(decoded))  # it is done, whether or not Redis hears of it
        await self._acknowledge(done)
        self._held.difference_update(gone)
        await self._remove([*(entry for entry, _ in decoded), *gone])
        await self._set_aside(poison)

    def _count(self, done: Recorded, *, batches: int) -> None:
        counts = self._counts
        counts.batches += batches
        counts.events += done.inserted
        counts.duplicates += done.duplicates
        counts.conflicts += done.conflicts
        counts.declared_lost += done.declared
        if done.declared:
            log.error(
                "a sidecar declared events lost: they were answered, perhaps, and cannot be billed",
                shard=self._shard,
                events=done.declared,
                ranges={log_id: ranges[:10] for log_id, ranges in done.lost.items()},
                fix="See licet ledger verify for the reasons, and look at the disk of the sidecar.",
            )
        if done.conflicts:
            log.error(
                "events came again with other content, and are kept aside",
                shard=self._shard,
                events=done.conflicts,
                logs=sorted(done.watermarks),
                fix="A sidecar's volume may have been cloned or rolled back: see licet usage conflicts list.",
            )

    async def _record(self, batches: list[DecodedBatch]) -> Recorded:
        return await self._database.write(
            ledger.record, self._shard, batches, keys=self._subject_keys, now_us=int(self._now_s() * 1_000_000)
        )

    async def _record_singly(self, decoded: list[tuple[bytes, DecodedBatch]], poison: list[Letter]) -> Recorded:
        """One of the batches does not fit the ledger: find it, and do the others."""
        done = Recorded()
        for entry, batch in list(decoded):
            try:
                one = await self._record([batch])
            except _MISFIT as error:
                decoded.remove((entry, batch))
                poison.append(_misfit(entry, batch, error))
                continue
            done.inserted += one.inserted
            done.duplicates += one.duplicates
            done.conflicts += one.conflicts
            done.declared += one.declared
            done.watermarks |= one.watermarks
            done.lost |= one.lost
        return done

    async def _catch_up(self) -> None:
        """Archive what is committed. No sidecar is told of anything that the archive does not have."""
        if self._archive is not None:
            await self._archive.catch_up(self._shard)

    async def _acknowledge(self, done: Recorded) -> None:
        """Tell sidecars what is committed, signed: who can write Redis must not make them delete the bill."""
        if not done.watermarks:
            return
        acks = await self._acks(done)
        with redis_errors():
            await self._redis.hset(self._acked, mapping=acks)

    async def _acks(self, done: Recorded) -> dict[str, bytes]:
        await self._catch_up()
        about = await self._database.read(meta.read)
        return {
            log_id: acknowledgement(self._key, about, log_id, watermark, done.lost.get(log_id, []))
            for log_id, watermark in done.watermarks.items()
        }

    async def retry(self, number: int, body: bytes, *, by: str) -> tuple[Recorded, bool]:
        """Record the batch of a dead letter, as if it came by the stream, and settle the letter with it.

        What was recorded, and whether its sidecar was told; if not, it sends the batch again, which is harmless.

        Raises:
            NotRecordable: it still cannot be recorded; the letter stays, with the new reason.
            DatabaseUnavailable: nothing was changed.
        """
        decoded: DecodedBatch | None = None
        try:
            decoded = await asyncio.to_thread(DecodedBatch.of, body)
            done = await self._database.write(self._record_letter, number, decoded, by=by)
        except (EnvelopeError, *_MISFIT) as error:
            reason = _misfit(b"", decoded, error).reason if decoded else str(error)
            await self._database.write(dead_letters.set_reason, number, reason)
            raise NotRecordable(reason) from error
        self._count(done, batches=1)
        try:
            await self._acknowledge(done)
        except (RedisUnavailable, RedisRefused, ArchiveUnavailable, ArchiveDamaged) as error:
            log.warning("a dead letter is recorded, its sidecar not told yet", letter=number, reason=str(error))
            return done, False
        return done, True

    async def drop(self, number: int, body: bytes, *, by: str) -> bool:
        """Give a dead letter up. Its events, as far as its numbers can be read, are declared lost in its sidecar's
        name: else that would keep them for ever, and before long all that comes after them.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        try:
            batch = await asyncio.to_thread(UsageBatch.unpack, body)
        except EnvelopeError:
            batch = None  # nobody can say what it was about
        settled, done = await self._database.write(self._drop_letter, number, batch, by=by)
        self._count(done, batches=0)
        try:
            await self._acknowledge(done)
        except (RedisUnavailable, RedisRefused, ArchiveUnavailable, ArchiveDamaged) as error:
            log.warning("a dead letter is dropped, its sidecar not told yet", letter=number, reason=str(error))
        await self.count_kept()
        return settled

    def _drop_letter(
        self, connection: Connection, number: int, batch: UsageBatch | None, *, by: str
    ) -> tuple[bool, Recorded]:
        now_us = int(self._now_s() * 1_000_000)
        ledger.lock_shard(connection, self._shard)  # before the audit trail, as whoever records a letter does
        settled = dead_letters.settle(connection, number, dead_letters.DROPPED, by=by, now_us=now_us)
        if not settled or batch is None:
            return settled, Recorded()
        lost = LostRange(batch.first_seq, batch.last_seq, f"dead letter {number} was dropped by {by}")
        empty = replace(batch, last_seq=batch.first_seq - 1, events=(), lost=(lost,))
        return settled, ledger.record(
            connection, self._shard, [DecodedBatch(empty, [])], keys=self._subject_keys, now_us=now_us
        )

    def _record_letter(self, connection: Connection, number: int, decoded: DecodedBatch, *, by: str) -> Recorded:
        now_us = int(self._now_s() * 1_000_000)
        done = ledger.record(connection, self._shard, [decoded], keys=self._subject_keys, now_us=now_us)
        dead_letters.settle(connection, number, dead_letters.RECORDED, by=by, now_us=now_us)
        return done

    async def _set_aside(self, poison: Sequence[Letter]) -> None:
        """Move ``poison`` to the dead letters. What there is no room for stays pending in the stream."""
        if not poison:
            return
        kept: list[bytes] = []
        for letter, became in zip(poison, await self._keep(poison), strict=True):
            entry = letter.entry.encode()
            if became.kept:
                kept.append(entry)
                self._held.discard(entry)
            elif entry not in self._held:
                self._held.add(entry)
                log.error(
                    "dead letters are full: a batch that cannot be read stays in the stream",
                    shard=self._shard,
                    entry=letter.entry,
                    reason=letter.reason,
                    fix="Look at licet usage dead-letters list, then retry or drop.",
                )
        self._counts.held[self._shard] = len(self._held)
        await self._remove(kept)

    async def _keep(self, poison: Sequence[Letter]) -> Sequence[dead_letters.Kept]:
        """Make dead letters of ``poison``, as far as there is room; their sidecars send the rest again."""
        now_us = int(self._now_s() * 1_000_000)
        done = await self._database.write(dead_letters.keep, self._shard, poison, now_us=now_us)
        for letter, became in zip(poison, done, strict=True):
            if became.kept and became.new:
                self._counts.poison += 1
                log.error(
                    "batch cannot be recorded and is set aside",
                    shard=self._shard,
                    entry=letter.entry,
                    log=letter.log_id,
                    reason=letter.reason,
                    fix="See licet usage dead-letters list.",
                )
        await self.count_kept()
        return done

    async def _remove(self, entries: Sequence[bytes]) -> None:
        if not entries:
            return
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.xack(self._stream, GROUP, *entries)
                pipe.xdel(self._stream, *entries)
                pipe.xlen(self._stream)
                self._counts.backlog[self._shard] = (await pipe.execute())[2]


def acknowledgement(
    key: Signer, about: meta.Meta, log_id: str, watermark: int, lost: Sequence[tuple[int, int]]
) -> bytes:
    """A signed acknowledgement of a log, up to its watermark. ``lost``: what of it was declared lost."""
    payload = AckPayload(tuple(lost)).to_payload()
    return key.sign(Statement(about.deployment, ACK, log_id, about.ledger_generation, watermark, payload))


def _misfit(entry: bytes, decoded: DecodedBatch, error: BaseException) -> Letter:
    return _letter(entry, decoded.batch, f"does not fit the ledger: {type(error).__name__}: {error}")


def _unread(entry: bytes, raw: bytes, error: EnvelopeError) -> Letter:
    try:
        return _letter(entry, UsageBatch.unpack(raw), str(error))  # only an event of it cannot be read
    except EnvelopeError:
        return Letter(entry.decode(), raw, str(error))


def _letter(entry: bytes, batch: UsageBatch, reason: str) -> Letter:
    return Letter(entry.decode(), batch.pack(), reason, batch.log_id, batch.first_seq, batch.last_seq)


def _decode(
    entries: Sequence[Entry],
) -> tuple[list[tuple[bytes, DecodedBatch]], list[Letter], list[bytes]]:
    """Batches; what is not one, with the reason; and entries that were deleted while pending."""
    decoded: list[tuple[bytes, DecodedBatch]] = []
    poison: list[Letter] = []
    gone: list[bytes] = []
    for entry, fields in entries:
        if fields is None:
            gone.append(entry)
            continue
        raw = fields.get(FIELD, b"")
        try:
            decoded.append((entry, DecodedBatch.of(raw)))
        except EnvelopeError as error:
            poison.append(_unread(entry, raw, error))
    return decoded, poison, gone
