"""What the scripts ``seal``, ``sweep_markers`` and ``sweep_quota`` promise, on a real Valkey."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis

from licet.domain.windows import FOREVER_S
from licet.wire.registers import QUOTA_KEPT_S, WINDOW_GRACE_S, Marker, Pair
from licet_control_plane.core.reclaim import SILENT_S_MIN, TOMBSTONE_KEPT_S, Holding
from licet_control_plane.publisher.registers import RedisRegisters, Seal, Sealed, SealStatus
from licet_sidecar.core.settling import Status
from tests.contract.test_lease_store import Caller, ask, month, opened
from tests.support.lease_backends import TENANT, real_backend
from tests.support.registers import LONG_AGO_MS, NAMES, add_markers, look, make_mark, make_quota, register
from tests.support.valkey import ValkeyProcess

QUOTA = "calls:month:1000"
DAY_S = 86_400


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    process = ValkeyProcess(tmp_path_factory.mktemp("valkey"))
    process.start()
    yield process
    process.kill()


@pytest.fixture
async def redis(server: ValkeyProcess) -> AsyncIterator[Any]:
    client = Redis.from_url(server.url, protocol=2)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def registers(redis: Any) -> RedisRegisters:
    return RedisRegisters(redis, NAMES)


async def seal(
    redis: Any, sidecar: str, pair: Pair, *, ledger: int = 0, quota: str = QUOTA, tenant: str = TENANT
) -> Sealed:
    """One attempt, and a look at the quota afterwards."""
    found = await look(redis, tenant, quota)
    held = found["registers"].get(sidecar) or next(iter(found["registers"].values()), None)
    assert held is not None
    holding = Holding(tenant, quota, "calls:month", sidecar, held, ledger)
    (answer,) = await RedisRegisters(redis, NAMES).seal([Seal(holding, pair)])
    after = await look(redis, tenant, quota)
    freed = answer.granted - answer.counted if answer.status is SealStatus.SEALED else 0
    assert after["sum"] == found["sum"] - freed
    return answer


# Sealing


async def test_sealing_folds_what_was_spent_and_frees_the_rest(redis: Any) -> None:
    pair = await make_mark(redis, TENANT)
    await make_quota(redis, TENANT, QUOTA, {"dead": register(50, 20), "other": register(30, 3)}, base=7)
    answer = await seal(redis, "dead", pair)
    assert answer == Sealed(SealStatus.SEALED, 50, 20, 0, 20, 0.0)
    after = await look(redis, TENANT, QUOTA)
    assert (after["base"], after["sum"], after["used"]) == (27, 57, 30)
    tombstone = after["registers"]["dead"]
    assert (tombstone.granted, tombstone.used, tombstone.reserved, tombstone.sealed) == (0, 0, 0, True)
    assert (tombstone.incarnation, tombstone.op, tombstone.pair) == (1, 5, pair)
    assert tombstone.time_ms > LONG_AGO_MS
    assert after["registers"]["other"].granted == 30


@pytest.mark.parametrize(
    ("g", "u", "h", "ledger", "counted"),
    [
        (50, 20, 0, 35, 35),  # it spent more than it reported
        (50, 20, 0, 10, 20),  # the ledger is behind
        (50, 20, 10, 0, 30),  # open reservations stay counted
        (50, 20, 10, 25, 30),
        (50, 50, 0, 50, 50),
        (50, 20, 0, 60, 60),  # only what was really spent raises it
        (0, 0, 0, 0, 0),
    ],
)
async def test_what_stays_counted(redis: Any, g: int, u: int, h: int, ledger: int, counted: int) -> None:
    pair = await make_mark(redis, TENANT)
    await make_quota(redis, TENANT, QUOTA, {"dead": register(g, u, h)})
    answer = await seal(redis, "dead", pair, ledger=ledger)
    assert (answer.status, answer.counted, answer.reserved) == (SealStatus.SEALED, counted, h)
    assert (await look(redis, TENANT, QUOTA))["base"] == counted


async def test_a_register_that_was_heard_of_lately_is_not_sealed(redis: Any) -> None:
    pair = await make_mark(redis, TENANT)
    at_ms = int(time.time() * 1_000) - 30_000
    await make_quota(redis, TENANT, QUOTA, {"live": register(50, 20, at_ms=at_ms)})
    answer = await seal(redis, "live", pair)
    assert answer.status is SealStatus.LIVE
    assert SILENT_S_MIN - 35 < answer.wait_s <= SILENT_S_MIN - 30
    after = await look(redis, TENANT, QUOTA)
    assert (after["base"], after["registers"]["live"].granted) == (0, 50)


async def test_sealing_again_changes_nothing(redis: Any) -> None:
    pair = await make_mark(redis, TENANT)
    await make_quota(redis, TENANT, QUOTA, {"dead": register(50, 20)})
    await seal(redis, "dead", pair)
    before = await redis.hgetall(NAMES.quota(TENANT, QUOTA))
    assert (await seal(redis, "dead", pair, ledger=45)).status is SealStatus.ALREADY
    assert await redis.hgetall(NAMES.quota(TENANT, QUOTA)) == before


async def test_nothing_is_sealed_while_learning_under_another_pair_or_without_a_register(redis: Any) -> None:
    pair = await make_mark(redis, TENANT)
    await make_quota(redis, TENANT, QUOTA, {"dead": register(50, 20)})
    before = await redis.hgetall(NAMES.quota(TENANT, QUOTA))
    assert (await seal(redis, "dead", Pair(pair.epoch + 1, pair.run))).status is SealStatus.STALE
    assert (await seal(redis, "dead", Pair(pair.epoch, "other"))).status is SealStatus.STALE
    assert (await seal(redis, "nobody", pair)).status is SealStatus.NONE
    await make_mark(redis, TENANT, phase="learning")
    assert (await seal(redis, "dead", pair)).status is SealStatus.LEARNING
    assert await redis.hgetall(NAMES.quota(TENANT, QUOTA)) == before


async def test_a_register_that_was_not_asserted_since_a_loss_is_sealed_too(redis: Any) -> None:
    pair = await make_mark(redis, TENANT, epoch=3)
    await make_quota(redis, TENANT, QUOTA, {"dead": register(50, 20, epoch=1, run="before")})
    assert (await seal(redis, "dead", pair)).status is SealStatus.SEALED


async def test_sealing_removes_old_tombstones_and_keeps_young_ones(redis: Any) -> None:
    pair = await make_mark(redis, TENANT)
    now_ms = int(time.time() * 1_000)
    await make_quota(
        redis,
        TENANT,
        QUOTA,
        {
            "dead": register(5, 5),
            "old": register(sealed=True),
            "young": register(sealed=True, at_ms=now_ms - (TOMBSTONE_KEPT_S - 60) * 1_000),
            "silent": register(9, 4),
        },
    )
    await seal(redis, "dead", pair)
    assert set((await look(redis, TENANT, QUOTA))["registers"]) == {"dead", "young", "silent"}


async def test_a_damaged_register_is_named_and_nothing_is_done(redis: Any, registers: RedisRegisters) -> None:
    from licet_control_plane.redis_link import RedisRefused

    pair = await make_mark(redis, TENANT)
    await make_quota(redis, TENANT, QUOTA, {"dead": register(5, 5)})
    held = (await look(redis, TENANT, QUOTA))["registers"]["dead"]
    await redis.hset(NAMES.quota(TENANT, QUOTA), "r|dead", "what is this")
    with pytest.raises(RedisRefused, match="dead"):
        await registers.seal([Seal(Holding(TENANT, QUOTA, "calls:month", "dead", held, 0), pair)])


async def test_two_thousand_dead_sidecars_are_folded_and_the_hash_stays_small(
    redis: Any, registers: RedisRegisters
) -> None:
    pair = await make_mark(redis, TENANT)
    everyone = {f"dead{number}": register(10, 3) for number in range(2_000)}
    await make_quota(redis, TENANT, QUOTA, {"live": register(40, 1, at_ms=int(time.time() * 1_000)), **everyone})
    found = (await look(redis, TENANT, QUOTA))["registers"]
    answers = await registers.seal(
        [Seal(Holding(TENANT, QUOTA, "calls:month", name, found[name], 4), pair) for name in everyone]
    )
    assert {answer.status for answer in answers} == {SealStatus.SEALED}
    after = await look(redis, TENANT, QUOTA)
    assert (after["base"], after["sum"]) == (8_000, 8_040)
    key = NAMES.quota(TENANT, QUOTA)
    for name in everyone:  # an hour and more later
        await redis.hset(key, f"r|{name}", register(sealed=True))
    assert await registers.sweep_quotas([(TENANT, QUOTA, "")]) == (2_000, 0)
    after = await look(redis, TENANT, QUOTA)
    assert list(after["registers"]) == ["live"]
    assert (after["base"], after["sum"], await redis.hlen(key)) == (8_000, 8_040, 5)


async def test_a_sealed_sidecar_that_comes_back_is_told_and_its_units_were_given_to_others(
    server: ValkeyProcess,
) -> None:
    async with real_backend(server) as backend:
        client: Any = backend._redis
        lease = await month(backend)
        pair = await opened(backend, lease)
        dead, other = Caller(backend, "dead"), Caller(backend, "other")
        held = (await dead(ask(lease, min=60))).granted[0].g
        await dead(ask(lease, cap=held, used=25))
        key = NAMES.quota(TENANT, lease.quota)
        fields = (await client.hget(key, "r|dead")).split(b"|")
        assert (await seal(client, "dead", pair, quota=lease.quota)).status is SealStatus.LIVE
        fields[7] = b"1000"
        await client.hset(key, "r|dead", b"|".join(fields))
        answer = await seal(client, "dead", pair, quota=lease.quota)
        assert (answer.status, answer.counted) == (SealStatus.SEALED, 25)
        assert (await dead(ask(lease, cap=held, used=25))).status is Status.SEALED
        assert (await dead(ask(lease, cap=held, used=30, min=1))).status is Status.SEALED
        assert (await other(ask(lease, min=75))).granted[0].g == 75
        assert (await look(client, TENANT, lease.quota))["sum"] == 100


# Markers


async def test_markers_of_windows_that_are_long_over_are_removed_and_no_others(
    redis: Any, registers: RedisRegisters
) -> None:
    now_s = await registers.now_s()
    kept_s = WINDOW_GRACE_S + QUOTA_KEPT_S
    markers = {
        "calls:minute@over": f"{now_s - kept_s - 120}|{now_s - kept_s - 60}|0",
        "calls:minute@over-said": f"{now_s - kept_s - 120}|{now_s - kept_s - 60}|{now_s - kept_s - 180}|7|7",
        "calls:minute@still-kept": f"{now_s - kept_s}|{now_s - kept_s + 60}|0",
        "calls:day": f"{now_s - 10}|{now_s + DAY_S}|{now_s - DAY_S}|0|0",
        "calls:second": f"0|{FOREVER_S}|0|0|0",
    }
    await make_mark(redis, TENANT)
    await add_markers(redis, TENANT, markers)
    (read,) = await registers.markers([(TENANT, 0)])
    assert read.cursor == 0
    assert set(read.markers) == set(markers)
    assert await registers.sweep_markers({TENANT: read.markers}) == 2  # the script decides, whatever it is asked
    (read,) = await registers.markers([(TENANT, 0)])
    assert set(read.markers) == {"calls:minute@still-kept", "calls:day", "calls:second"}
    assert await registers.sweep_markers({TENANT: read.markers}) == 0


async def test_a_marker_stays_while_one_of_its_hashes_is_there(redis: Any, registers: RedisRegisters) -> None:
    await make_mark(redis, TENANT)
    await add_markers(redis, TENANT, {"a:x": "100|160|40", "b:x": "100|160|40", "c:x": "100|160|40"})
    await make_quota(redis, TENANT, "a:x:100", {"one": register(5, 5)})
    await make_quota(redis, TENANT, "b:x:40", {"one": register(5, 5)})
    (read,) = await registers.markers([(TENANT, 0)])
    assert await registers.sweep_markers({TENANT: read.markers}) == 1
    (read,) = await registers.markers([(TENANT, 0)])
    assert set(read.markers) == {"a:x", "b:x"}


async def test_a_marker_that_moved_on_since_it_was_read_stays(redis: Any, registers: RedisRegisters) -> None:
    await make_mark(redis, TENANT)
    await add_markers(redis, TENANT, {"a:x": "100|160|0"})
    (read,) = await registers.markers([(TENANT, 0)])
    for newer in ("160|220|100", "100|160|40"):
        await add_markers(redis, TENANT, {"a:x": newer})
        assert await registers.sweep_markers({TENANT: read.markers}) == 0
    await add_markers(redis, TENANT, {"a:x": "100|160|0"})
    await make_mark(redis, TENANT, phase="learning")
    assert await registers.sweep_markers({TENANT: read.markers}) == 0
    assert await registers.sweep_markers({"nobody": {"a:x": Marker(100, 160, 0)}}) == 0


async def test_a_large_mark_is_read_in_parts(redis: Any, registers: RedisRegisters) -> None:
    await make_mark(redis, TENANT)
    await add_markers(redis, TENANT, {f"a:x@{number:016x}": "100|160|0" for number in range(3_000)})
    cursor, parts, seen = 0, 0, 0
    while parts == 0 or cursor:
        (read,) = await registers.markers([(TENANT, cursor)])
        seen += await registers.sweep_markers({TENANT: read.markers})
        cursor, parts = read.cursor, parts + 1
    assert parts > 1
    assert seen == 3_000


# Rates


async def test_a_rate_that_nobody_has_a_share_of_goes_with_its_marker(redis: Any, registers: RedisRegisters) -> None:
    await make_mark(redis, TENANT)
    await add_markers(redis, TENANT, {"calls:second": f"0|{FOREVER_S}|0|0|0"})
    await make_quota(redis, TENANT, "calls:second:0", {"idle": register(0), "dead": register(700)})
    assert await registers.sweep_quotas([(TENANT, "calls:second:0", "calls:second")]) == (2, 1)
    assert not await redis.exists(NAMES.quota(TENANT, "calls:second:0"))
    assert not await redis.hexists(NAMES.limits(TENANT), "m|calls:second")


async def test_shares_that_are_over_go_and_those_in_use_stay(redis: Any, registers: RedisRegisters) -> None:
    await make_mark(redis, TENANT)
    await add_markers(redis, TENANT, {"calls:second": f"0|{FOREVER_S}|0"})
    now_ms = int(time.time() * 1_000)
    young = register(300, at_ms=now_ms - (SILENT_S_MIN - 20) * 1_000)
    await make_quota(redis, TENANT, "calls:second:0", {"live": young, "dead": register(700)})
    assert await registers.sweep_quotas([(TENANT, "calls:second:0", "calls:second")]) == (1, 0)
    after = await look(redis, TENANT, "calls:second:0")
    assert (after["sum"], list(after["registers"])) == (300, ["live"])
    assert await redis.hexists(NAMES.limits(TENANT), "m|calls:second")


async def test_a_quota_in_units_is_never_swept_away(redis: Any, registers: RedisRegisters) -> None:
    # Also when somebody takes it for a rate: what was spent, and what was folded, holds it.
    await make_mark(redis, TENANT)
    await make_quota(redis, TENANT, "a:term:0", base=4)
    await make_quota(redis, TENANT, "b:term:0", {"dead": register(5, 2)})
    asked = [(TENANT, "a:term:0", "a:term"), (TENANT, "b:term:0", "b:term"), (TENANT, "c:term:0", "c:term")]
    assert await registers.sweep_quotas(asked) == (0, 0)
    assert (await look(redis, TENANT, "a:term:0"))["base"] == 4
    assert (await look(redis, TENANT, "b:term:0"))["sum"] == 5


async def test_nothing_is_swept_while_learning(redis: Any, registers: RedisRegisters) -> None:
    await make_mark(redis, TENANT, phase="learning")
    await make_quota(redis, TENANT, "calls:second:0", {"dead": register(700), "old": register(sealed=True)})
    assert await registers.sweep_quotas([(TENANT, "calls:second:0", "calls:second")]) == (0, 0)
    assert len((await look(redis, TENANT, "calls:second:0"))["registers"]) == 2
