"""The leasing service after a restart, over the model of the registers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, Limit, Plan
from licet.domain.ids import LimitKey
from licet.domain.windows import Period, window_at
from licet.v1 import approval_pb2 as pb
from licet.wire.registers import Pair
from licet_sidecar.core.lease import HOLD_MS, Lease, Terms
from licet_sidecar.core.leases import QUOTAS_PER_BULK_CALL_MAX
from licet_sidecar.services import leasing
from licet_sidecar.services.approval import WAIT_S_MAX
from tests.support.published import catalog, limit
from tests.support.sidecar import EPOCH, FakeSidecar, World, running, until


def _content() -> Catalog:
    limits = (Limit(LimitKey("reports:monthly"), 1_000, Period.MONTH),)
    return Catalog.of(
        [
            Feature("reports"),
            Action("report.export", {"": "reports"}),
            Plan("pro", {"reports": Entitlement(None, limits)}),
        ]
    )


async def test_a_restarted_sidecar_asserts_in_rounds_that_do_not_wait_for_their_turn(tmp_path: Path) -> None:
    """A fleet that is restarted again and again would otherwise always have one that has not asserted yet, and no
    quota would open."""
    world = World(tmp_path)
    world.push(_content())
    world.license("acme")
    before = FakeSidecar(world)
    before.start()
    await before.synced()
    await before.check(quantity=3)
    await before.kill()
    async with running(world, incarnation=2) as after:
        service = after.leasing
        service.assert_all(EPOCH, world.registers.run_id)
        rounds = 0
        while service.urgent.is_set():
            service.urgent.clear()
            world.advance(0.01)
            await service.upkeep()
            rounds += 1
        assert rounds == 2  # one to learn the pair, one to assert under it
        assert service.asserted == (EPOCH, world.registers.run_id)


def _replaced() -> Catalog:
    limits = (Limit(LimitKey("reports:daily"), 1_000, Period.DAY),)
    return Catalog.of(
        [
            Feature("reports"),
            Action("report.export", {"": "reports"}),
            Plan("pro", {"reports": Entitlement(None, limits)}),
        ]
    )


async def _check_under_a_replaced_limit(sidecar: FakeSidecar) -> asyncio.Task[pb.CheckResponse]:
    """A check that needs units of a limit that the mark has no more, and the sidecar has not heard of it."""
    world = sidecar.world
    assert (await sidecar.check()).effect == pb.EFFECT_APPROVED
    world.registers.publish_limits("acme", sidecar.engine.revision + 1, {"reports:daily": 1_000})
    calls = sidecar.tally.settle_calls
    check = asyncio.create_task(sidecar.check(quantity=900))
    await until(lambda: sidecar.tally.settle_calls > calls + 1)
    assert not check.done(), "nothing says that this limit is used up"
    return check


async def test_a_check_waits_for_a_limit_that_was_replaced_and_not_announced_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasing, "SYNC_WAIT_S", 0.001)
    world = World(tmp_path)
    world.push(_content())
    world.license("acme")
    async with running(world) as sidecar:
        check = await _check_under_a_replaced_limit(sidecar)
        world.push(_replaced())
        assert (await check).effect == pb.EFFECT_APPROVED


async def test_a_replaced_limit_that_is_never_announced_is_for_on_unavailable_to_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasing, "SYNC_WAIT_S", 0.001)
    world = World(tmp_path)
    world.push(_content())
    world.license("acme")
    async with running(world) as sidecar:
        check = await _check_under_a_replaced_limit(sidecar)
        world.advance(WAIT_S_MAX)
        response = await check
        assert response.reason == pb.REASON_DEGRADED_DENY
        assert not response.HasField("retry_after"), "it is not known until when"


def _scoped(amount: int) -> Catalog:
    return catalog(Action("report.export", {"": "reports"}), limits=[limit(amount, Period.YEAR, scope=("subject",))])


def _with_leases(world: World, count: int, *, cap: int, used: int) -> FakeSidecar:
    """A sidecar with so many leases of one tenant, of which Redis has not heard yet."""
    world.push(_scoped(100))
    world.license("acme")
    sidecar = FakeSidecar(world, incarnation=2)
    start, end = window_at(Period.YEAR, world.clock.us // 1_000_000)
    for number in range(count):
        lease = Lease(LimitKey("reports:year@subject"), f"{number:016x}", start, end, Terms(100))
        lease.cap, lease.used = cap, used
        sidecar.leases.restore("acme", lease, world.clock.ms)
        lease.hold_until_ms = world.clock.ms + HOLD_MS
    return sidecar


async def _assert_all(sidecar: FakeSidecar) -> int:
    """Rounds of upkeep that do not wait for their turn, until all is said."""
    world, service = sidecar.world, sidecar.leasing
    service.assert_all(EPOCH, world.registers.run_id)
    rounds = 0
    while service.urgent.is_set():
        service.urgent.clear()
        world.advance(0.01)
        await service.upkeep()
        rounds += 1
    return rounds


async def test_one_tenant_with_many_leases_asserts_them_without_waiting_between_calls(tmp_path: Path) -> None:
    # Every tenant's leasing stays closed until then.
    world = World(tmp_path)
    sidecar = _with_leases(world, 4_000, cap=5, used=2)
    try:
        calls = -(-4_000 // QUOTAS_PER_BULK_CALL_MAX)
        assert await _assert_all(sidecar) == 1 + calls, "one to learn the pair"
        assert sidecar.leasing.asserted == (EPOCH, world.registers.run_id)
        world.registers.restart("run2")
        assert await _assert_all(sidecar) == 1 + calls
        assert sidecar.leasing.asserted == (EPOCH, "run2")
    finally:
        await sidecar.stop()


async def test_what_redis_knows_and_nothing_is_left_of_is_said_again_only_after_a_loss(tmp_path: Path) -> None:
    world = World(tmp_path)
    sidecar = _with_leases(world, 300, cap=5, used=5)
    try:
        await _assert_all(sidecar)
        before = sidecar.tally.settle_calls
        for _ in range(60):
            world.advance(1.25)
            await sidecar.leasing.upkeep()
        assert sidecar.tally.settle_calls == before
        assert sidecar.used() == 1_500, "and nothing of it is forgotten"
        world.registers.wipe("run2")
        pair = Pair(EPOCH, world.registers.begin("acme", EPOCH) or "")
        await _assert_all(sidecar)
        assert world.registers.contents.marks["acme"].pair == pair
        assert sum(quota.sum for quota in world.registers.contents.quotas.values()) == 1_500
    finally:
        await sidecar.stop()


async def test_many_leases_are_all_returned_at_the_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    sidecar = _with_leases(world, 2_000, cap=5, used=2)
    try:
        await _assert_all(sidecar)
        assert sum(quota.sum for quota in world.registers.contents.quotas.values()) == 10_000
        until_ms = world.clock.ms + 10_000
        assert await sidecar.leasing.give_back_all(until_ms) == 0
        assert sum(quota.sum for quota in world.registers.contents.quotas.values()) == 4_000
        assert await sidecar.leasing.retire(until_ms) == 0
        assert sum(quota.base for quota in world.registers.contents.quotas.values()) == 4_000
    finally:
        await sidecar.stop()


async def test_who_has_no_time_to_return_all_begins_with_the_most_and_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    sidecar = _with_leases(world, 600, cap=5, used=4)
    large = next(lease for lease in reversed(list(sidecar.leases.of("acme").all())))
    large.used = 0
    try:
        await _assert_all(sidecar)
        settle = sidecar.store.settle

        async def slowly(calls: Any, live: int) -> Any:
            world.advance(6)
            return await settle(calls, live)

        monkeypatch.setattr(sidecar.store, "settle", slowly)
        assert await sidecar.leasing.give_back_all(world.clock.ms + 10_000) == 1
        assert large.cap == 0
        left = 600 - 2 * QUOTAS_PER_BULK_CALL_MAX
        assert sum(lease.free for lease in sidecar.leases.of("acme").all()) == left
        assert vars(caplog.records[-1])["fields"] == {"tenants": 1, "units": left}
    finally:
        await sidecar.stop()


async def test_subjects_that_were_only_asked_about_leave_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.push(_scoped(0))
    world.license("acme")
    async with running(world) as sidecar:
        for number in range(500):
            await sidecar.check(subject={"id": f"u{number}"}, mode=pb.MODE_PEEK)
        held = sidecar.leases.of("acme")
        assert len(held.leases) == 500
        world.advance(60)
        await sidecar.leasing.upkeep()
        assert not list(held.all())


async def test_thousands_of_leases_of_one_tenant_are_kept_alive_with_one_call_a_round(tmp_path: Path) -> None:
    world = World(tmp_path)
    sidecar = _with_leases(world, 5_000, cap=5, used=2)
    try:
        await _assert_all(sidecar)
        before, rounds = sidecar.tally.settle_calls, 80
        for _ in range(rounds):  # 100 s, more than a hold
            world.advance(1.25)
            await sidecar.leasing.upkeep()
        assert sidecar.tally.settle_calls - before <= rounds
        assert not sidecar.leasing.urgent.is_set()
        held = sidecar.leases.of("acme")
        assert all(lease.hold_until_ms > world.clock.ms and lease.free == 3 for lease in held.all())
        assert len(held.by_age) == 5_000, "each once"
    finally:
        await sidecar.stop()
