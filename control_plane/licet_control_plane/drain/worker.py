"""One shard's worker: reads batches, commits them, acknowledges them.

It reads first what it had read before and did not acknowledge (cursor ``0``: after a start, and after any failure),
then what is new (cursor ``>``), and now and then what a dead worker left. A batch that cannot be understood is moved
aside, so that it holds up nobody; one that the ledger cannot take now stays, and is tried again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from redis.exceptions import ResponseError
from sqlalchemy.exc import SQLAlchemyError

from licet.wire.documents import ACK, AckPayload
from licet.wire.envelope import EnvelopeError
from licet.wire.names import RedisNames
from licet.wire.signing import SigningKey, Statement
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.redis_link import BLOCK_MS, Redis, RedisRefused, RedisUnavailable, backoff_s, redis_errors
from licet_control_plane.store import ledger, meta
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.store.ledger import Recorded
from licet_control_plane.store.subjects import SubjectKeys

GROUP: Final = "ledger"
FIELD: Final = b"b"
READ_MAX: Final = 16
"""Batches of one transaction: at most 65,536 events, about two seconds of the database."""
CLAIM_IDLE_MS: Final = 30_000
"""A batch that a worker has had for this long without acknowledging it is somebody else's to do."""
CLAIM_S: Final = 10.0
DEAD_MAX: Final = 10_000
"""Undecodable batches that are kept to be looked at."""
_MISFIT: Final = (SQLAlchemyError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What the ledger raises for an event whose fields are not what they should be. A database that is away is not it."""
_PENDING: Final = "0"
_NEW: Final = ">"

log = structlog.get_logger(__name__)

Entry = tuple[bytes, dict[bytes, bytes] | None]


@dataclass(slots=True)
class DrainCounts:
    """Since the start. ``trouble``: why each shard's worker waits; absent when it works. ``backlog`` by shard."""

    events: int = 0
    batches: int = 0
    duplicates: int = 0
    conflicts: int = 0
    declared_lost: int = 0
    poison: int = 0
    trouble: dict[int, str] = field(default_factory=dict)
    backlog: dict[int, int] = field(default_factory=dict)


class ShardWorker:
    """``run`` is the task."""

    def __init__(
        self,
        shard: int,
        redis: Redis,
        names: RedisNames,
        database: Database,
        key: SigningKey,
        subject_keys: SubjectKeys,
        counts: DrainCounts,
        *,
        consumer: str,
        now_s: Callable[[], float],
    ) -> None:
        self._shard = shard
        self._redis = redis
        self._stream = names.usage(shard)
        self._dead = names.usage_dead()
        self._acked = names.acked()
        self._database = database
        self._key = key
        self._subject_keys = subject_keys
        self._counts = counts
        self._consumer = consumer
        self._now_s = now_s
        self._cursor = _PENDING
        self._claimed_s = -math.inf
        self._claim_from = "0-0"

    async def run(self) -> None:
        """Drain until cancelled, through everything that passes by itself."""
        failures = 0
        while True:
            try:
                await self._step()
                failures = 0
                self._counts.trouble.pop(self._shard, None)
            except (RedisUnavailable, RedisRefused, DatabaseUnavailable) as error:
                failures += 1
                self._cursor = _PENDING
                if self._shard not in self._counts.trouble:
                    log.warning("drain waits", shard=self._shard, reason=str(error))
                self._counts.trouble[self._shard] = str(error)
                await asyncio.sleep(backoff_s(failures))

    async def take(self, raws: Sequence[bytes]) -> dict[str, bytes]:
        """Commits packed batches that came by another way than the stream. Signed acknowledgements, by log id.

        May be repeated, also with what came through the stream: the ledger takes each event once. A batch that does not
        fit the ledger is not acknowledged.

        Raises:
            EnvelopeError: what was sent is not a batch; nothing was committed.
            DatabaseUnavailable: nothing is known of what was committed: send it again.
        """
        entries: list[Entry] = [(b"-", {FIELD: raw}) for raw in raws]
        decoded, poison, _ = await asyncio.to_thread(_decode, entries)
        if poison:
            raise EnvelopeError(poison[0][2])
        done = Recorded()
        try:
            done = await self._record([batch for _, batch in decoded])
        except _MISFIT:
            done = await self._record_singly(decoded, poison)
        for _, _, reason in poison:
            log.error("a batch that came over HTTP is not taken", shard=self._shard, reason=reason)
        self._count(done, batches=len(decoded), poison=len(poison))
        return await self._acks(done)

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

    async def _drain(self, entries: Sequence[Entry]) -> None:
        # In a thread: decoding thousands of events would keep the loop from everything else.
        decoded, poison, gone = await asyncio.to_thread(_decode, entries)
        done = Recorded()
        if decoded:
            try:
                done = await self._record([batch for _, batch in decoded])
            except _MISFIT:
                done = await self._record_singly(decoded, poison)
        await self._acknowledge(done)
        await self._set_aside(poison)
        await self._remove([*(entry for entry, _ in decoded), *(entry for entry, _, _ in poison), *gone])
        self._count(done, batches=len(decoded), poison=len(poison))

    def _count(self, done: Recorded, *, batches: int, poison: int) -> None:
        counts = self._counts
        counts.batches += batches
        counts.events += done.inserted
        counts.duplicates += done.duplicates
        counts.conflicts += done.conflicts
        counts.declared_lost += done.declared
        counts.poison += poison
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
                fix="A sidecar's volume may have been cloned or rolled back: see licet ledger verify.",
            )

    async def _record(self, batches: list[DecodedBatch]) -> Recorded:
        return await self._database.write(
            ledger.record, self._shard, batches, keys=self._subject_keys, now_us=int(self._now_s() * 1_000_000)
        )

    async def _record_singly(self, decoded: list[tuple[bytes, DecodedBatch]], poison: list[Any]) -> Recorded:
        """One of the batches does not fit the ledger: find it, and do the others."""
        done = Recorded()
        for entry, batch in list(decoded):
            try:
                one = await self._record([batch])
            except _MISFIT as error:
                decoded.remove((entry, batch))
                poison.append((entry, batch.batch.pack(), f"does not fit the ledger: {type(error).__name__}: {error}"))
                continue
            done.inserted += one.inserted
            done.duplicates += one.duplicates
            done.conflicts += one.conflicts
            done.declared += one.declared
            done.watermarks |= one.watermarks
            done.lost |= one.lost
        return done

    async def _acknowledge(self, done: Recorded) -> None:
        """Tell sidecars what is committed, signed: who can write Redis must not make them delete the bill."""
        if not done.watermarks:
            return
        acks = await self._acks(done)
        with redis_errors():
            await self._redis.hset(self._acked, mapping=acks)

    async def _acks(self, done: Recorded) -> dict[str, bytes]:
        about = await self._database.read(meta.read)
        return {
            log_id: acknowledgement(self._key, about, log_id, watermark, done.lost.get(log_id, []))
            for log_id, watermark in done.watermarks.items()
        }

    async def _set_aside(self, poison: Sequence[tuple[bytes, bytes, str]]) -> None:
        for entry, raw, reason in poison:
            log.error("batch cannot be read and is set aside", shard=self._shard, entry=entry.decode(), reason=reason)
            fields = {"shard": self._shard, "entry": entry, "reason": reason[:1_000], "b": raw}
            with redis_errors():
                await self._redis.xadd(self._dead, fields, maxlen=DEAD_MAX, approximate=True)

    async def _remove(self, entries: Sequence[bytes]) -> None:
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.xack(self._stream, GROUP, *entries)
                pipe.xdel(self._stream, *entries)
                pipe.xlen(self._stream)
                self._counts.backlog[self._shard] = (await pipe.execute())[2]


def acknowledgement(
    key: SigningKey, about: meta.Meta, log_id: str, watermark: int, lost: Sequence[tuple[int, int]]
) -> bytes:
    """A signed acknowledgement of a log, up to its watermark. ``lost``: what of it was declared lost."""
    payload = AckPayload(tuple(lost)).to_payload()
    return key.sign(Statement(about.deployment, ACK, log_id, about.ledger_generation, watermark, payload))


def _decode(
    entries: Sequence[Entry],
) -> tuple[list[tuple[bytes, DecodedBatch]], list[tuple[bytes, bytes, str]], list[bytes]]:
    """Batches; what is not one, with the reason; and entries that were deleted while pending."""
    decoded: list[tuple[bytes, DecodedBatch]] = []
    poison: list[tuple[bytes, bytes, str]] = []
    gone: list[bytes] = []
    for entry, fields in entries:
        if fields is None:
            gone.append(entry)
            continue
        raw = fields.get(FIELD, b"")
        try:
            decoded.append((entry, DecodedBatch.of(raw)))
        except EnvelopeError as error:
            poison.append((entry, raw, str(error)))
    return decoded, poison, gone
