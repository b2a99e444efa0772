"""The drain on a real server and a real database: every event in the ledger once, whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError
from sqlalchemy import Connection

from licet.domain.outcomes import Effect, Reason
from licet.wire.documents import ACK
from licet.wire.names import usage_shard
from licet.wire.signing import Statement
from licet.wire.usage import FLAG_OBSERVED, LostRange, UsageBatch, log_id
from licet_control_plane.drain.worker import GROUP, NotRecordable
from licet_control_plane.store import dead_letters, ledger, usage_reports
from licet_control_plane.store.schema import register_spend
from licet_control_plane.store.verification import Verification
from tests.support.control_plane import NAMES, WAIT_S_MAX, Deployment, deployment, until
from tests.support.ledger import verification_of
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
    kept, _ = await running.plane.database.read(
        ledger.events_about, running.ledger_key, "acme", "user", "mallory", after=None, limit=10
    )
    assert [(one.event.seq, one.conflict) for one in kept] == [(4, False), (2, True), (3, True)]


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


async def test_what_is_declared_lost_lets_the_watermark_pass_and_is_told(running: Deployment) -> None:
    await send(running, batch(1, 5))
    await send(running, batch(9, 12, lost=(LostRange(6, 8, "bytes 900 to 1200 are damaged"),)))
    ack = await acked(running, 12)
    assert ack.payload == {"lost": [[6, 8]]}
    report = await verified(running)
    assert (report.ok, report.events, report.gaps) == (True, 9, [])
    assert [(one.from_seq, one.to_seq, one.why) for one in report.lost] == [(6, 8, "bytes 900 to 1200 are damaged")]
    assert running.plane.drain.declared_lost == 3


async def test_nothing_that_is_recorded_can_be_declared_lost(running: Deployment) -> None:
    await send(running, batch(1, 5))
    await acked(running, 5)
    await send(running, batch(7, 6, lost=(LostRange(2, 6, "a mistake"),)))
    assert (await acked(running, 6)).payload == {"lost": [[6, 6]]}
    await send(running, batch(6, 6, lost=(LostRange(1, 6, "again"),)))
    await until(lambda: is_empty(running))
    report = await verified(running)
    assert (report.ok, report.events, report.lost) == (True, 6, [])
    assert running.plane.drain.conflicts == 0


async def test_an_event_that_comes_after_it_was_declared_lost_is_billed_once(running: Deployment) -> None:
    await send(running, batch(1, 0, lost=(LostRange(1, 10, "the ledger was restored"),)))
    assert (await acked(running, 10)).payload == {"lost": [[1, 10]]}
    for _ in range(2):
        await send(running, batch(3, 4))
    await until(lambda: is_empty(running))
    report = await verified(running)
    assert (report.ok, report.events, await decisions(running)) == (True, 2, 2)
    assert [(one.from_seq, one.to_seq) for one in report.lost] == [(1, 2), (5, 10)]
    await send(running, batch(1, 10))
    await until(lambda: is_empty(running))
    report = await verified(running)
    assert (report.ok, report.events, report.lost) == (True, 10, [])
    assert (await acked(running, 10)).payload == {}


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
    dead = await letters(running)
    assert len(dead) == 5
    assert all(letter.reason for letter in dead)
    assert [letter.log_id for letter in dead if letter.log_id] == [log_id("f" * 32, 1), log_id("e" * 32, 1)]
    assert (running.plane.drain.poison, running.plane.drain.dead_letters.letters) == (5, 5)
    assert (await verified(running)).events == 10


async def test_a_bad_batch_that_comes_again_is_kept_once_and_counted(running: Deployment) -> None:
    for _ in range(3):
        await running.redis.xadd(STREAM, {"b": b"not a batch"})
    await until(lambda: is_empty(running))
    await running.redis.xadd(STREAM, {"b": b"not a batch"})
    await until(lambda: is_empty(running))
    assert [(letter.times, letter.body) for letter in await letters(running)] == [(4, b"not a batch")]
    assert running.plane.drain.poison == 1


async def test_a_bad_batch_that_finds_no_room_stays_in_the_stream_and_holds_up_nobody(
    running: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "LETTERS_MAX", 1)
    monkeypatch.setattr("licet_control_plane.drain.worker.CLAIM_IDLE_MS", 1)
    monkeypatch.setattr("licet_control_plane.drain.worker.CLAIM_S", 0.0)
    for number in range(3):
        await running.redis.xadd(STREAM, {"b": b"not a batch %d" % number})
    await send(running, batch(1, 10))
    await acked(running, 10)
    await until(lambda: has_held(running, 2))
    await until(lambda: has_length(running, 2))
    assert len(await letters(running)) == 1
    await running.stop()
    await running.start()
    await send(running, batch(11, 12))
    await acked(running, 12)
    await until(lambda: has_held(running, 2))
    await running.plane.database.write(settle_all)
    monkeypatch.setattr(dead_letters, "LETTERS_MAX", 10)
    await until(lambda: is_empty(running))
    assert sorted(letter.body for letter in await letters(running)) == [b"not a batch 1", b"not a batch 2"]
    assert await has_held(running, 0)


async def test_a_dead_letter_is_retried_through_the_ledger_transaction(
    running: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = ledger.record

    def too_old(*_args: Any, **_kwargs: Any) -> Any:
        raise ValueError("a field of a newer sidecar")

    monkeypatch.setattr(ledger, "record", too_old)
    await send(running, batch(1, 10))
    await until(lambda: is_empty(running))
    (letter,) = await letters(running)
    assert (letter.first_seq, letter.last_seq) == (1, 10)
    worker = running.plane.workers[letter.shard]
    with pytest.raises(NotRecordable, match="newer sidecar"):
        await worker.retry(letter.number, letter.body, by="test")
    assert len(await letters(running)) == 1
    assert await running.redis.hgetall(NAMES.acked()) == {}

    monkeypatch.setattr(ledger, "record", record)
    await send(running, batch(1, 4))
    await acked(running, 4)
    done, told = await worker.retry(letter.number, letter.body, by="test")
    assert (done.inserted, done.duplicates, told) == (6, 4, True)
    await acked(running, 10)
    assert await letters(running) == []
    report = await verified(running)
    assert (report.ok, report.events) == (True, 10)


async def test_what_was_recorded_once_is_kept_again_when_it_is_refused_later(running: Deployment) -> None:
    await running.redis.xadd(STREAM, {"b": b"not a batch"})
    await until(lambda: is_empty(running))
    await running.plane.database.write(settle_all, outcome=dead_letters.RECORDED)
    assert await letters(running) == []
    await running.redis.xadd(STREAM, {"b": b"not a batch"})
    await until(lambda: is_empty(running))
    assert [(letter.times, letter.body) for letter in await letters(running)] == [(2, b"not a batch")]


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
    await acked(running, 10, within_s=20)


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
    await until(lambda: is_out_of_trouble(running))


async def test_spends_of_approved_events_fill_the_register_spend(running: Deployment) -> None:
    quota = "reports:monthly:1788220800"
    await send(running, batch(1, 4, spends=[(quota, 3)]))
    await send(running, batch(5, 6, effect=Effect.DENIED.value, reason=Reason.POLICY_DENIED.value, spends=[(quota, 3)]))
    await send(running, batch(7, 7, effect=Effect.DENIED.value, flags=FLAG_OBSERVED, spends=[(quota, 3)]))
    await acked(running, 7)
    rows = await running.plane.database.read(lambda connection: connection.execute(register_spend.select()).all())
    assert [(row.quota, row.sidecar, row.window_start, row.units, row.observed) for row in rows] == [
        (quota, SIDECAR, 1_788_220_800, 15, 3)
    ]


async def test_an_event_over_two_features_is_one_decision_and_one_cost(running: Deployment) -> None:
    await send(running, batch(1, 2, units={"in": 10, "out": 4}, cost_nanos=7, feature_costs={"in": 3, "out": 4}))
    await send(running, batch(3, 3, units={}, cost_nanos=0, currency="", effect=2, reason=6))
    await acked(running, 3)
    by_feature, _ = await running.plane.database.read(usage_reports.summary, by=["feature"])
    assert {(one.group["feature"], one.events, one.units, one.cost_nanos.get("USD", 0)) for one in by_feature} == {
        ("", 1, 0, 0),
        ("in", 2, 20, 6),
        ("out", 2, 8, 8),
    }
    by_tenant, _ = await running.plane.database.read(usage_reports.summary, by=["tenant"])
    assert [(one.events, one.cost_nanos) for one in by_tenant] == [(3, {"USD": 14})]


async def send(running: Deployment, one: UsageBatch, *, stream: str = "") -> None:
    await running.redis.xadd(stream or NAMES.usage(usage_shard(one.sidecar)), {"b": one.pack()})


async def acked(
    running: Deployment, watermark: int, *, incarnation: int = 1, within_s: float = WAIT_S_MAX
) -> Statement:
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


async def verified(running: Deployment) -> Verification:
    return await asyncio.to_thread(verification_of, running.plane.database, running.ledger_key)


async def letters(running: Deployment) -> list[Any]:
    """Dead letters that wait, with their bodies."""
    page = await running.plane.database.read(dead_letters.page, after=0, limit=100, settled=False)
    return [await running.plane.database.read(dead_letters.get, row.number) for row in page]


def settle_all(connection: Connection, outcome: str = dead_letters.DROPPED) -> None:
    for row in dead_letters.page(connection, after=0, limit=100, settled=False):
        assert dead_letters.settle(connection, row.number, outcome, by="test", now_us=1)


async def has_length(running: Deployment, count: int) -> bool:
    length: int = await running.redis.xlen(STREAM)
    return length == count


async def has_held(running: Deployment, count: int) -> bool:
    return sum(running.plane.drain.held.values()) == count


async def decisions(running: Deployment) -> int:
    usage, _ = await running.plane.database.read(usage_reports.summary, by=["tenant"])
    return sum(one.events for one in usage)


async def is_empty(running: Deployment) -> bool:
    return bool(await running.redis.xlen(STREAM) == 0)


async def has_events(running: Deployment, count: int) -> bool:
    return running.plane.drain.events >= count


async def is_in_trouble(running: Deployment) -> bool:
    return bool(running.plane.drain.trouble)


async def is_out_of_trouble(running: Deployment) -> bool:
    return not running.plane.drain.trouble


async def has_group(running: Deployment) -> bool:
    try:
        return bool(await running.redis.xinfo_groups(STREAM))
    except ResponseError:
        return False


async def first_id(running: Deployment) -> bytes:
    entries = await running.redis.xrange(STREAM, count=1)
    first: bytes = entries[0][0]
    return first
