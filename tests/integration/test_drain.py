"""The drain on a real server and a real database: every event in the ledger once, whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from licet.domain.outcomes import Effect, Reason
from licet.wire.documents import ACK
from licet.wire.names import usage_shard
from licet.wire.signing import Statement
from licet.wire.usage import FLAG_OBSERVED, UsageBatch, log_id
from licet_control_plane.drain.worker import GROUP
from licet_control_plane.store import ledger_reports
from licet_control_plane.store.schema import conflicts, register_spend
from tests.support.control_plane import NAMES, Deployment, deployment, until
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

SIDECAR = "a" * 32
STREAM = NAMES.usage(usage_shard(SIDECAR))


@pytest.fixture
async def running(tmp_path: Path, valkey_process: ValkeyProcess, database_url: str) -> AsyncIterator[Deployment]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=database_url) as made:
        yield made


async def test_a_batch_is_committed_acknowledged_with_a_signature_and_removed(running: Deployment) -> None:
    await send(running, batch(1, 10))
    ack = await acked(running, 10)
    assert ack.generation == 1
    assert ack.payload == {}
    await until(lambda: is_empty(running))
    report = await verified(running)
    assert report.ok
    assert (report.events, report.logs[0].watermark) == (10, 10)


async def test_repeats_count_once(running: Deployment) -> None:
    for _ in range(3):
        await send(running, batch(1, 10))
    await send(running, batch(5, 20))
    await acked(running, 20)
    await until(lambda: is_empty(running))
    report = await verified(running)
    assert (report.ok, report.events) == (True, 20)
    assert running.plane.drain.duplicates == 26
    assert await decisions(running) == 20


async def test_a_gap_shows_until_it_is_filled(running: Deployment) -> None:
    await send(running, batch(1, 5))
    await send(running, batch(11, 15))
    await send(running, batch(8, 9))
    await until(lambda: is_empty(running))
    await acked(running, 5)
    gaps = (await verified(running)).gaps
    assert [(gap.from_seq, gap.to_seq) for gap in gaps] == [(6, 7), (10, 10)]
    await send(running, batch(6, 10))
    await acked(running, 15)
    report = await verified(running)
    assert (report.ok, report.events) == (True, 15)


async def test_the_same_id_with_other_content_is_kept_aside(running: Deployment) -> None:
    await send(running, batch(1, 3))
    await acked(running, 3)
    for _ in range(2):
        await send(running, batch(2, 4, subject_id="mallory"))
    await acked(running, 4)
    await until(lambda: is_empty(running))
    report = await verified(running)
    assert not report.ok
    assert (report.events, report.conflicts, report.rollups_match) == (4, 2, True)
    kept = await running.plane.database.read(lambda connection: connection.execute(conflicts.select()).all())
    assert all(b"mallory" in row.body for row in kept)


async def test_a_lost_tail_of_the_predecessor_is_a_gap(running: Deployment) -> None:
    await send(running, batch(1, 5))
    await send(running, batch(1, 2, incarnation=2, previous=(1, 8)))
    await acked(running, 2, incarnation=2)
    await until(lambda: is_empty(running))
    gaps = (await verified(running)).gaps
    assert [(gap.log_id, gap.from_seq, gap.to_seq) for gap in gaps] == [(log_id(SIDECAR, 1), 6, 8)]
    await send(running, batch(6, 8))
    await acked(running, 8)
    assert (await verified(running)).ok


async def test_what_cannot_be_read_is_set_aside_and_holds_up_nobody(running: Deployment) -> None:
    await running.redis.xadd(STREAM, {"b": b"not a batch"})
    await running.redis.xadd(STREAM, {"c": b"no field"})
    damaged = batch(1, 3)
    packed = UsageBatch.pack(damaged)
    await running.redis.xadd(STREAM, {"b": packed[:-2]})
    wrong_type = batch(1, 2, sidecar="f" * 32, at_us="yesterday")
    await send(running, wrong_type, stream=STREAM)
    await send(running, batch(1, 2, sidecar="e" * 32, units=["reports"]), stream=STREAM)
    await send(running, batch(1, 10))
    await acked(running, 10)
    await until(lambda: is_empty(running))
    dead = await running.redis.xrange(f"{NAMES.prefix}:usage:dead")
    assert len(dead) == 5
    assert all(fields[b"reason"] for _, fields in dead)
    assert running.plane.drain.poison == 5
    assert (await verified(running)).events == 10


async def test_a_wiped_server_is_drained_again_once_sidecars_send_again(running: Deployment) -> None:
    await send(running, batch(1, 10))
    await acked(running, 10)
    await running.redis.flushall()
    await send(running, batch(1, 10))
    await send(running, batch(11, 20))
    await acked(running, 20)
    report = await verified(running)
    assert (report.ok, report.events) == (True, 20)


async def test_a_restart_of_redis_in_the_middle_loses_and_doubles_nothing(
    running: Deployment, valkey_process: ValkeyProcess
) -> None:
    sending = asyncio.create_task(send_until_acked(running, 3_000))
    await until(lambda: has_events(running, 300))
    await asyncio.to_thread(valkey_process.kill)
    await asyncio.to_thread(valkey_process.start)
    await sending
    report = await verified(running)
    assert (report.ok, report.events) == (True, 3_000)
    assert await decisions(running) == 3_000


async def test_a_restart_of_the_control_plane_takes_up_what_it_had_read(running: Deployment) -> None:
    await until(lambda: has_group(running))
    await running.stop()
    # Read by this server before it died, and never acknowledged.
    await send(running, batch(1, 10))
    consumer = running.plane.workers[0]._consumer
    await running.redis.xreadgroup(GROUP, consumer, {STREAM: ">"})
    await running.start()
    await acked(running, 10, within_s=5)


async def test_a_dead_workers_batches_are_taken_over(running: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    await until(lambda: has_group(running))
    await running.stop()
    await send(running, batch(1, 10))
    await running.redis.xreadgroup(GROUP, "dead", {STREAM: ">"})
    await running.redis.xclaim(STREAM, GROUP, "dead", 0, [await first_id(running)], idle=60_000)
    await running.start()
    await acked(running, 10)
    assert (await verified(running)).ok


async def test_nothing_is_acknowledged_while_the_database_is_away(
    running: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: has_group(running))
    database = running.plane.database
    works = database.write_now

    def fails(*_args: Any, **_kwargs: Any) -> Any:
        from licet_control_plane.store.database import DatabaseUnavailable

        raise DatabaseUnavailable("the disk is full")

    monkeypatch.setattr(database, "write_now", fails)
    await send(running, batch(1, 10))
    await until(lambda: is_in_trouble(running))
    assert await running.redis.xlen(STREAM) == 1
    assert await running.redis.hgetall(NAMES.acked()) == {}
    monkeypatch.setattr(database, "write_now", works)
    await acked(running, 10)
    assert not running.plane.drain.trouble


async def test_spends_of_approved_events_fill_the_register_spend(running: Deployment) -> None:
    quota = "reports:monthly:1788220800"
    await send(running, batch(1, 4, spends=[(quota, 3)]))
    await send(running, batch(5, 6, effect=Effect.DENIED.value, reason=Reason.POLICY_DENIED.value, spends=[(quota, 3)]))
    await send(running, batch(7, 7, effect=Effect.DENIED.value, flags=FLAG_OBSERVED, spends=[(quota, 3)]))
    await acked(running, 7)
    rows = await running.plane.database.read(lambda connection: connection.execute(register_spend.select()).all())
    assert [(row.quota, row.sidecar, row.window_start, row.units) for row in rows] == [
        (quota, SIDECAR, 1_788_220_800, 15)
    ]


async def test_an_event_over_two_features_is_one_decision_and_one_cost(running: Deployment) -> None:
    await send(running, batch(1, 2, units={"in": 10, "out": 4}, cost_nanos=7, feature_costs={"in": 3, "out": 4}))
    await send(running, batch(3, 3, units={}, cost_nanos=0, currency="", effect=2, reason=6))
    await acked(running, 3)
    by_feature = await running.plane.database.read(ledger_reports.summary, by=["feature"])
    assert {(one.group["feature"], one.events, one.units, one.cost_nanos.get("USD", 0)) for one in by_feature} == {
        ("", 1, 0, 0),
        ("in", 2, 20, 6),
        ("out", 2, 8, 8),
    }
    by_tenant = await running.plane.database.read(ledger_reports.summary, by=["tenant"])
    assert [(one.events, one.cost_nanos) for one in by_tenant] == [(3, {"USD": 14})]


async def send(running: Deployment, one: UsageBatch, *, stream: str = "") -> None:
    await running.redis.xadd(stream or NAMES.usage(usage_shard(one.sidecar)), {"b": one.pack()})


async def acked(running: Deployment, watermark: int, *, incarnation: int = 1, within_s: float = 15) -> Statement:
    """The ack of the log once it is at ``watermark``."""
    log = log_id(SIDECAR, incarnation)

    async def there() -> Statement | None:
        data = await running.redis.hget(NAMES.acked(), log)
        statement = running.verifier.verify(data, kind=ACK, key=log) if data else None
        return statement if statement and statement.revision == watermark else None

    found: Statement = await until(there, within_s=within_s)
    return found


async def send_until_acked(running: Deployment, last: int) -> None:
    """As a sidecar does: whatever is not acknowledged is sent again, from the watermark on."""
    watermark = 0
    while watermark < last:
        try:
            for first in range(watermark + 1, min(watermark + 500, last), 50):
                await send(running, batch(first, min(first + 49, last)))
            data = await running.redis.hget(NAMES.acked(), log_id(SIDECAR, 1))
            if data:
                watermark = running.verifier.verify(data, kind=ACK, key=log_id(SIDECAR, 1)).revision
        except (OSError, ResponseError, Exception) as error:
            if not isinstance(error, OSError) and "redis" not in type(error).__module__:
                raise
        await asyncio.sleep(0.01)


async def verified(running: Deployment) -> ledger_reports.Verification:
    return await running.plane.database.read(ledger_reports.verify)


async def decisions(running: Deployment) -> int:
    return sum(one.events for one in await running.plane.database.read(ledger_reports.summary, by=["tenant"]))


async def is_empty(running: Deployment) -> bool:
    return bool(await running.redis.xlen(STREAM) == 0)


async def has_events(running: Deployment, count: int) -> bool:
    return running.plane.drain.events >= count


async def is_in_trouble(running: Deployment) -> bool:
    return bool(running.plane.drain.trouble)


async def has_group(running: Deployment) -> bool:
    try:
        return bool(await running.redis.xinfo_groups(STREAM))
    except ResponseError:
        return False


async def first_id(running: Deployment) -> bytes:
    entries = await running.redis.xrange(STREAM, count=1)
    first: bytes = entries[0][0]
    return first
