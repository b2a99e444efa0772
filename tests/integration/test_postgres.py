"""What only PostgreSQL does: months as partitions, several control planes, a server that fails and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, make_url, select, text

from licet.wire.documents import ACK
from licet.wire.names import usage_shard
from licet.wire.usage import UsageBatch
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import ledger, meta, partitions, revisions
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.store.partitions import DEFAULT, Month
from licet_control_plane.store.schema import events
from licet_control_plane.store.subjects import SubjectKeys
from tests.support.control_plane import NAMES, WAIT_S_MAX, Deployment, deployment, until
from tests.support.ledger import verification_of
from tests.support.postgres import PostgresProcess, PostgresServer
from tests.support.usage import AT_US, batch
from tests.support.valkey import ValkeyProcess

LEDGER_KEY = LedgerKey(bytes(32))
MONTH = Month.at(AT_US)
SIDECARS = [letter * 32 for letter in "abcdef"]


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    made = Database(postgres_url)
    made.write_now(meta.ensure, deployment="d", now_us=1)
    yield made
    made.close()


def record(database: Database, one: UsageBatch, shard: int = 0) -> ledger.Recorded:
    return database.write_now(
        ledger.record, shard, [DecodedBatch.of(one.pack())], keys=SubjectKeys(LEDGER_KEY), now_us=1
    )


def where(database: Database) -> dict[str, int]:
    """Events by the table that holds them."""
    query = text("SELECT tableoid::regclass::text AS name, count(*) AS events FROM ledger_events GROUP BY 1")
    return {row.name: row.events for row in database.read_now(lambda connection: connection.execute(query).all())}


# Months


def test_events_are_in_the_partition_of_their_month(database: Database) -> None:
    made = database.write_now(partitions.ensure, now_us=AT_US)
    assert made == [MONTH.plus(-1), MONTH, MONTH.plus(1), MONTH.plus(2)]
    assert database.write_now(partitions.ensure, now_us=AT_US) == []
    record(database, batch(1, 1, at_us=MONTH.start_us - 1))
    record(database, batch(2, 3, at_us=MONTH.start_us))
    record(database, batch(4, 4, at_us=MONTH.end_us - 1))
    record(database, batch(5, 5, at_us=MONTH.end_us))
    assert where(database) == {
        MONTH.plus(-1).partition: 1,
        MONTH.partition: 3,
        MONTH.plus(1).partition: 1,
    }


@pytest.mark.parametrize("at_us", [0, -(10**15), 2**62], ids=["1970", "before", "far ahead"])
def test_an_event_of_an_odd_clock_is_taken_as_well(database: Database, at_us: int) -> None:
    database.write_now(partitions.ensure, now_us=AT_US)
    record(database, batch(1, 2, at_us=at_us))
    done = record(database, batch(1, 2, at_us=at_us))
    assert (done.duplicates, done.conflicts) == (2, 0)
    assert where(database) == {DEFAULT: 2}


def test_a_partition_takes_over_what_came_before_it_was_made(database: Database) -> None:
    record(database, batch(1, 5))
    record(database, batch(6, 6, at_us=0))
    assert where(database) == {DEFAULT: 6}
    database.write_now(partitions.ensure, now_us=AT_US)
    assert where(database) == {MONTH.partition: 5, DEFAULT: 1}
    done = record(database, batch(1, 8))
    assert (done.inserted, done.duplicates) == (2, 5)
    assert done.conflicts == 1  # the sixth, of another time


def test_control_planes_that_make_partitions_at_once_make_each_once(database: Database, postgres_url: str) -> None:
    made: list[Month] = []

    def make() -> None:
        mine = Database(postgres_url)
        made.extend(mine.write_now(partitions.ensure, now_us=AT_US))
        mine.close()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(partitions.wanted(AT_US))


def test_making_a_partition_gives_way_to_who_reads_for_long(database: Database) -> None:
    record(database, batch(1, 1, at_us=0))
    with database.engine.connect() as reader:
        reader.execute(select(events)).all()
        with pytest.raises(DatabaseUnavailable, match="lock timeout"):
            database.write_now(partitions.ensure, now_us=AT_US)
        record(database, batch(2, 3))
    assert len(database.write_now(partitions.ensure, now_us=AT_US)) == 4


def test_a_partition_that_is_made_while_events_come_loses_none(database: Database, postgres_url: str) -> None:
    def write() -> None:
        mine = Database(postgres_url)
        for first in range(1, 400, 20):
            record(mine, batch(first, first + 19))
        mine.close()

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        with contextlib.suppress(DatabaseUnavailable):
            database.write_now(partitions.ensure, now_us=AT_US)
    thread.join()
    assert sum(where(database).values()) == 400


# What its columns hold


def test_what_no_column_can_hold_is_recorded_all_the_same(database: Database) -> None:
    odd = batch(1, 2, subject_id="a\0b", action="x\0y", idempotency_key="k\0")
    record(database, odd)
    assert record(database, odd).duplicates == 2
    assert verification_of(database, LEDGER_KEY).ok
    [newest, _] = database.read_now(ledger.newest_events, "acme", ledger_key=LEDGER_KEY, limit=5)
    assert (newest.subject_id, newest.action) == ("a\0b", "x\0y")


# Several writers


def test_shards_that_add_to_the_same_sums_never_deadlock(database: Database, postgres_url: str) -> None:
    failed: list[BaseException] = []

    def write(shard: int) -> None:
        mine = Database(postgres_url)
        keys = SubjectKeys(LEDGER_KEY)
        try:
            for turn in range(15):
                # Each in an order of its own, and all to the same rows.
                tenants = [f"tenant-{(number * (shard + 3) + turn) % 23}" for number in range(23)]
                some = [
                    DecodedBatch.of(batch(turn * 23 + n, turn * 23 + n, sidecar=SIDECARS[shard], tenant=tenant).pack())
                    for n, tenant in enumerate(tenants, 1)
                ]
                mine.write_now(ledger.record, shard, some, keys=keys, now_us=1)
        except BaseException as error:
            failed.append(error)
        finally:
            mine.close()

    threads = [threading.Thread(target=write, args=(shard,)) for shard in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    report = verification_of(database, LEDGER_KEY)
    assert (report.ok, report.events) == (True, 4 * 15 * 23)


def test_a_log_in_the_streams_of_two_shards_is_recorded_once(database: Database, postgres_url: str) -> None:
    inserted: list[int] = []

    def write(shard: int) -> None:
        mine = Database(postgres_url)
        for first in range(1, 200, 10):
            inserted.append(record(mine, batch(first, first + 9), shard).inserted)
        mine.close()

    record(database, batch(1, 1))
    threads = [threading.Thread(target=write, args=(shard,)) for shard in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(inserted) == 199
    assert verification_of(database, LEDGER_KEY).ok


def test_a_read_sees_one_state_whatever_is_committed_meanwhile(database: Database) -> None:
    def twice(connection: Connection) -> tuple[int, int]:
        before = meta.read(connection).revision
        database.write_now(
            revisions.append, kind="license", key="a", payload={}, sign=lambda _: b"", now_us=1, by="test"
        )
        return before, meta.read(connection).revision

    assert database.read_now(twice) == (0, 0)
    assert database.read_now(meta.read).revision == 1


def test_a_read_changes_nothing(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        database.read_now(meta.set_redis_run, "x")


# Two control planes on one database


@pytest.fixture
async def two(
    tmp_path: Path, valkey_process: ValkeyProcess, postgres_url: str
) -> AsyncIterator[tuple[Deployment, Deployment]]:
    async with (
        deployment(tmp_path / "one", valkey_process.url, database_url=postgres_url) as one,
        deployment(tmp_path / "two", valkey_process.url, database_url=postgres_url, start=False) as two,
    ):
        await one.headed(0)
        two.key, two.verifier, two.ledger_key = one.key, one.verifier, one.ledger_key
        await two.start()
        await until(lambda: stands_by(two))
        yield one, two


async def test_one_of_two_publishes_and_the_other_takes_over(two: tuple[Deployment, Deployment]) -> None:
    one, other = two
    await one.headed(await other.push(100))  # what the other one was told, the first one publishes
    assert other.plane.publisher.status.state == "standby"
    revision = await other.license("acme")
    await one.headed(revision)
    await one.opened("acme")
    await one.stop()
    await until(lambda: publishes(other))
    await other.headed(await other.push(200))
    await one.start()
    await until(lambda: stands_by(one))


async def test_two_drain_one_stream_and_count_once(two: tuple[Deployment, Deployment]) -> None:
    one, _ = two
    for _ in range(2):  # each batch twice
        for sidecar in SIDECARS:
            for first in range(1, 500, 50):
                made = batch(first, first + 49, sidecar=sidecar)
                await one.redis.xadd(NAMES.usage(usage_shard(sidecar)), {"b": made.pack()})
    await until(lambda: are_empty(one))
    report = await asyncio.to_thread(verification_of, one.plane.database, one.ledger_key)
    assert (report.ok, report.events) == (True, len(SIDECARS) * 500)
    assert sum(deployment.plane.drain.duplicates for deployment in two) == len(SIDECARS) * 500
    assert all(deployment.plane.drain.batches for deployment in two)


# A server that fails


async def test_a_server_that_crashes_again_and_again_loses_and_doubles_nothing(
    tmp_path: Path, valkey_process: ValkeyProcess, postgres_process: PostgresProcess
) -> None:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=postgres_process.url()) as running:
        sending = asyncio.create_task(send_until_acked(running, 4_000))
        for share in (1, 2, 3):
            await until(lambda share=share: has_events(running, share * 800))  # type: ignore[misc]
            await asyncio.to_thread(postgres_process.kill if share != 2 else postgres_process.stop)
            await until(lambda: is_in_trouble(running))
            await asyncio.to_thread(postgres_process.start)
        await asyncio.wait_for(sending, WAIT_S_MAX)
        report = await asyncio.to_thread(verification_of, running.plane.database, running.ledger_key)
        assert (report.ok, report.events, report.conflicts) == (True, 4_000, 0)
        # And so does everything else.
        await running.headed(await running.push(100))


async def test_a_request_while_it_is_away_says_so_and_the_next_one_is_answered(
    tmp_path: Path, postgres_process: PostgresProcess
) -> None:
    database = Database(postgres_process.url())
    database.migrate()
    await database.write(meta.ensure, deployment="d", now_us=1)
    await asyncio.to_thread(postgres_process.stop)
    with pytest.raises(DatabaseUnavailable):
        await database.read(meta.read)
    await asyncio.to_thread(postgres_process.start)
    assert (await database.read(meta.read)).deployment == "d"
    await asyncio.to_thread(postgres_process.restart)  # between two requests: nobody notices
    assert (await database.read(meta.read)).deployment == "d"
    database.close()


def test_a_role_that_may_not_make_tables_is_told_so(postgres_server: PostgresServer) -> None:
    with postgres_server.database() as url:
        database = Database(url)
        database.write_now(lambda connection: connection.exec_driver_sql("DROP SCHEMA public CASCADE"))
        database.write_now(lambda connection: connection.exec_driver_sql("CREATE SCHEMA public"))
        database.write_now(lambda connection: connection.exec_driver_sql("CREATE ROLE poor LOGIN"))
        database.write_now(lambda connection: connection.exec_driver_sql("GRANT USAGE ON SCHEMA public TO poor"))
        poor = Database(make_url(url).set(username="poor").render_as_string(hide_password=False))
        with pytest.raises(DatabaseUnavailable, match="permission denied for schema public"):
            poor.migrate()
        poor.close()
        database.write_now(lambda connection: connection.exec_driver_sql("DROP OWNED BY poor"))
        database.write_now(lambda connection: connection.exec_driver_sql("DROP ROLE poor"))
        database.close()


async def test_a_standby_that_takes_no_writes_is_waited_for(postgres_url: str) -> None:
    database = Database(postgres_url)

    def as_on_a_standby(connection: Connection) -> None:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        meta.ensure(connection, deployment="d", now_us=1)

    with pytest.raises(DatabaseUnavailable, match="read-only"):
        database.write_now(as_on_a_standby)
    database.close()


async def send_until_acked(running: Deployment, last: int) -> None:
    """As a sidecar does: whatever is not acknowledged is sent again, from the watermark on."""
    log = f"{SIDECARS[0]}:1"
    watermark = 0
    while watermark < last:
        for first in range(watermark + 1, min(watermark + 500, last), 50):
            made = batch(first, min(first + 49, last))
            await running.redis.xadd(NAMES.usage(usage_shard(made.sidecar)), {"b": made.pack()})
        if data := await running.redis.hget(NAMES.acked(), log):
            watermark = running.verifier.verify(data, kind=ACK, key=log).revision
        await asyncio.sleep(0.02)


async def has_events(running: Deployment, count: int) -> bool:
    return running.plane.drain.events >= count


async def is_in_trouble(running: Deployment) -> bool:
    return bool(running.plane.drain.trouble)


async def stands_by(one: Deployment) -> bool:
    return one.plane.publisher.status.state == "standby"


async def publishes(one: Deployment) -> bool:
    return one.plane.publisher.status.state == "publishing"


async def are_empty(running: Deployment) -> bool:
    lengths: list[Any] = [await running.redis.xlen(NAMES.usage(usage_shard(sidecar))) for sidecar in SIDECARS]
    return not any(lengths)
