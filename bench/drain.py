"""The drain: one shard's worker from a real Redis into a real database, every event committed and acknowledged.

Sidecars of a shard send batches as they do under load; the stream holds all of them before the worker begins. The
database is on a disk that is flushed at each commit, as in production.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis.asyncio as aioredis
from sqlalchemy import func, select

from licet.domain.outcomes import Effect, Reason
from licet.wire.names import RedisNames, usage_shard
from licet.wire.signing import SigningKey
from licet.wire.usage import BATCH_EVENTS_MAX, UsageBatch, UsageEvent, pack_event
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.drain.worker import DrainCounts, ShardWorker
from licet_control_plane.redis_link import connect
from licet_control_plane.store import meta, partitions
from licet_control_plane.store.database import Database
from licet_control_plane.store.schema import events
from licet_control_plane.store.subjects import SubjectKeys
from tests.support.postgres import PostgresProcess
from tests.support.valkey import ValkeyProcess

EVENTS: Final = 200_000
TENANTS: Final = 200
SUBJECTS: Final = 5_000
_START_US: Final = 1_790_000_000_000_000
_NAMES: Final = RedisNames()


@dataclass(frozen=True, slots=True)
class Drained:
    """One run. ``cpu_us``: of the control plane's process, an event."""

    events: int
    events_per_s: float
    cpu_us: float


def run(events_count: int = EVENTS) -> dict[str, Drained]:
    """Events a second into each kind of database."""
    batches = _batches(events_count)
    found: dict[str, Drained] = {}
    with tempfile.TemporaryDirectory(prefix="licet-bench-") as directory:
        for name, url in _databases(Path(directory)):
            found[name] = asyncio.run(_drain(url, batches, Path(directory) / f"valkey-{name}"))
    return found


def _databases(directory: Path) -> Iterator[tuple[str, str]]:
    yield "SQLite", f"sqlite:///{directory / 'licet.db'}"
    with _postgres() as process:
        yield "PostgreSQL", process.url()


@contextmanager
def _postgres() -> Iterator[PostgresProcess]:
    process = PostgresProcess(durable=True)
    try:
        yield process.start()
    finally:
        process.close()


async def _drain(url: str, batches: list[UsageBatch], valkey_dir: Path) -> Drained:
    server = ValkeyProcess(valkey_dir, appendonly=False).start()
    database = Database(url)
    redis = connect(server.url)
    try:
        database.migrate()
        database.write_now(meta.ensure, deployment="bench", now_us=1)
        database.write_now(partitions.ensure, now_us=_START_US)
        shard = usage_shard(batches[0].sidecar)
        sender = aioredis.Redis.from_url(server.url)
        for batch in batches:
            await sender.xadd(_NAMES.usage(shard), {"b": batch.pack()})
        await sender.aclose()
        counts = DrainCounts()
        worker = ShardWorker(
            shard,
            redis,
            _NAMES,
            database,
            SigningKey.generate(),
            SubjectKeys(LedgerKey(bytes(32))),
            counts,
            archive=None,
            consumer="bench",
            now_s=time.time,
        )
        total = sum(len(batch.events) for batch in batches)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        task = asyncio.create_task(worker.run())
        while counts.events < total and not task.done():
            await asyncio.wait([task], timeout=0.005)
        took_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        if task.done():
            task.result()  # raises what ended it
        while not task.done():  # redis-py can swallow a cancellation that comes while it reads
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        stored: Any = await database.read(
            lambda connection: connection.scalar(select(func.count()).select_from(events))
        )
        assert stored == total
        return Drained(total, total / took_s, 1e6 * cpu_s / total)
    finally:
        await redis.aclose()
        database.close()
        server.kill()


def _batches(count: int) -> list[UsageBatch]:
    """Of one sidecar, over some hours, as services make them: many tenants and subjects, a denial now and then."""
    sidecar = "a" * 32
    batches: list[UsageBatch] = []
    for first in range(1, count + 1, BATCH_EVENTS_MAX):
        last = min(first + BATCH_EVENTS_MAX - 1, count)
        packed = tuple(pack_event(_event(seq)) for seq in range(first, last + 1))
        batches.append(UsageBatch(sidecar, 1, 0, 0, b"prefix00", first, last, packed))
    return batches


def _event(seq: int) -> UsageEvent:
    denied = seq % 20 == 0
    return UsageEvent(
        seq=seq,
        at_us=_START_US + seq * 50_000,
        tenant=f"tenant-{seq % TENANTS}",
        subject_type="user",
        subject_id=f"user-{seq * 7 % SUBJECTS}",
        on_behalf_of="",
        action="report.export",
        effect=Effect.DENIED.value if denied else Effect.APPROVED.value,
        reason=Reason.QUOTA_EXHAUSTED.value if denied else Reason.OK.value,
        rule="",
        revision=1,
        units={"reports": 1},
        cost_nanos=5,
        currency="USD",
        flags=0,
        idempotency_key=f"job-{seq}",
        resource_type="report",
        resource_id=f"r-{seq % 1_000}",
        context={"region": "eu", "model": "small"},
        spends=[] if denied else [("reports:monthly:1788220800", 1)],
        shadow=[],
        feature_costs={},
    )
