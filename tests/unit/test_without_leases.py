"""What ``on_unavailable`` allows while Redis is away stays within what it says, also over restarts, and can be told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import pytest

from licet.domain.catalog import Action, Catalog, Entitlement, Grant, Limit, OnExceeded, OnUnavailable, Plan
from licet.domain.catalog import UnavailableMode as Mode
from licet.domain.ids import UNITS_MAX, LimitKey
from licet.domain.money import Price
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet_sidecar.ports import LinkDown
from tests.support.published import catalog, limit
from tests.support.sidecar import FakeSidecar, World, hurried, running

CAPPED: Final = OnUnavailable(Mode.CAPPED, units_max=5)
LAST_KNOWN: Final = OnUnavailable(Mode.LAST_KNOWN, for_s_max=3_600)
ALLOW: Final = OnUnavailable(Mode.ALLOW)
SECOND: Final = LimitKey("reports:second.rate")


def content(mode: OnUnavailable, *limits: Limit, price: Price | None = None) -> Catalog:
    action = Action("report.export", {"": "reports"}, on_unavailable=mode)
    return catalog(action, Plan("pro", {"reports": Entitlement(price=price, limits=limits)}))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    return World(tmp_path / "state")


def published(world: World, *arguments: Any, grants: tuple[Grant, ...] = (), **more: Any) -> World:
    world.push(content(*arguments, **more))
    world.license("acme", grants=grants)
    return world


def cut_off(sidecar: FakeSidecar) -> None:
    sidecar.link.failed(LinkDown("away"))


async def approved(sidecar: FakeSidecar, checks: int, quantity: int = 1) -> int:
    answers = [await sidecar.check(quantity=quantity) for _ in range(checks)]
    assert {one.reason for one in answers} <= {pb.REASON_OK, pb.REASON_DEGRADED_ALLOW, pb.REASON_DEGRADED_DENY}
    return quantity * sum(one.effect == pb.EFFECT_APPROVED for one in answers)


async def shared_rate(sidecar: FakeSidecar, world: World) -> None:
    """Leases a share of the rate, and lets it end."""
    asking = asyncio.ensure_future(sidecar.check())
    for _ in range(20):
        await asyncio.sleep(0)
    world.advance(0.5)
    assert (await asking).effect == pb.EFFECT_APPROVED
    cut_off(sidecar)
    world.advance(61)


# Rates


async def test_capped_allows_so_many_units_of_a_rate_in_a_second(world: World) -> None:
    published(world, CAPPED, Limit(SECOND, 10, Period.SECOND, burst=10))
    async with running(world) as sidecar:
        await shared_rate(sidecar, world)
        assert await approved(sidecar, 100) == 5
        world.advance(0.4)
        assert await approved(sidecar, 100) == 2
        world.advance(60)
        assert await approved(sidecar, 100) == 5
        assert "5 units a second" in (await sidecar.check()).message


async def test_last_known_keeps_to_a_part_of_the_rate(world: World) -> None:
    published(world, LAST_KNOWN, Limit(SECOND, 10, Period.SECOND, burst=20))
    async with running(world) as sidecar:
        sidecar.leases.live = 2
        await shared_rate(sidecar, world)
        assert await approved(sidecar, 100) == 7, "filled for 1.5 s since the share was over"
        world.advance(60)
        assert await approved(sidecar, 100) == 10, "half of the burst"
        world.advance(1)
        assert await approved(sidecar, 100) == 5


async def test_last_known_of_a_rate_that_nothing_was_known_of_is_nothing(world: World) -> None:
    published(world, LAST_KNOWN, Limit(SECOND, 10, Period.SECOND))
    async with running(world) as sidecar:
        await sidecar.sync.load("acme", 1.0)
        cut_off(sidecar)
        assert await approved(sidecar, 10) == 0


# Windows


async def restarted(world: World, sidecar: FakeSidecar, incarnation: int) -> FakeSidecar:
    await sidecar.kill()
    after = FakeSidecar(world, incarnation=incarnation)
    after.start()
    await after.synced()
    await after.sync.load("acme", 1.0)
    cut_off(after)
    return after


async def test_what_was_last_known_is_known_after_a_restart(world: World) -> None:
    published(world, LAST_KNOWN, limit(100))
    async with running(world) as other_world:  # another sidecar took some
        assert await approved(other_world, 90) == 90
    sidecar = FakeSidecar(world, incarnation=2)
    sidecar.start()
    await sidecar.synced()
    assert await approved(sidecar, 1) == 1
    total = 0
    for incarnation in (3, 4, 5):
        sidecar = await restarted(world, sidecar, incarnation)
        total += await approved(sidecar, 4)
    assert total == 9
    await sidecar.stop()


async def test_of_a_quota_never_heard_of_nothing_is_known(world: World) -> None:
    published(world, LAST_KNOWN, limit(100))
    async with running(world) as sidecar:
        await sidecar.sync.load("acme", 1.0)
        cut_off(sidecar)
        assert await approved(sidecar, 3) == 0


async def test_of_a_window_that_began_since_each_sidecar_has_its_part(world: World) -> None:
    published(world, LAST_KNOWN, limit(100, Period.MINUTE))
    async with running(world) as sidecar:
        assert await approved(sidecar, 1) == 1
        sidecar.leases.live = 4
        cut_off(sidecar)
        world.advance(120)
        assert await approved(sidecar, 60) == 25


async def test_a_reservation_counts_against_the_cap_also_after_a_restart(world: World) -> None:
    published(world, CAPPED, limit(100))
    sidecar = FakeSidecar(world)
    sidecar.start()
    await sidecar.synced()
    assert await approved(sidecar, 1, 100) == 100
    cut_off(sidecar)
    reserved = 0
    for incarnation in (2, 3, 4):
        for _ in range(3):
            made = await sidecar.reserve(after_s=3_600)
            reserved += made.decision.effect == pb.EFFECT_APPROVED
        sidecar = await restarted(world, sidecar, incarnation)
    assert reserved == 5
    message = (await sidecar.check()).message
    assert "allows 5 units of each quota then, and 5 were given" in message
    await sidecar.stop()


async def test_a_commit_counts_what_was_reserved_once(world: World) -> None:
    published(world, CAPPED, limit(100))
    sidecar = FakeSidecar(world)
    sidecar.start()
    await sidecar.synced()
    assert await approved(sidecar, 1, 100) == 100
    cut_off(sidecar)
    made = await sidecar.reserve(quantity=3)
    await sidecar.commit(made.reservation_id)
    sidecar = await restarted(world, sidecar, 2)
    assert await approved(sidecar, 5) == 2
    await sidecar.stop()


# What can be counted


async def test_no_more_is_allowed_than_can_be_told(world: World) -> None:
    soft = Limit(LimitKey("reports:month"), 10, Period.MONTH, on_exceeded=OnExceeded.OVERAGE)
    published(world, ALLOW, soft)
    async with running(world) as sidecar:
        assert (await sidecar.check(quantity=UNITS_MAX)).effect == pb.EFFECT_APPROVED
        more = await sidecar.check()
        assert (more.effect, more.reason) == (pb.EFFECT_DENIED, pb.REASON_QUOTA_EXHAUSTED)
        assert "9,007,199,254,740,991" in more.message
        cut_off(sidecar)
        assert (await sidecar.check()).effect == pb.EFFECT_DENIED
        sidecar.link.succeeded()
        await sidecar.upkeep()
        assert sidecar.tally.settle_failures == 0


async def test_all_sidecars_together_are_allowed_what_can_be_told(world: World) -> None:
    published(world, ALLOW, limit(10))
    async with running(world) as sidecar:
        sidecar.leases.live = 2
        await sidecar.sync.load("acme", 1.0)
        cut_off(sidecar)
        assert (await sidecar.check(quantity=5)).reason == pb.REASON_DEGRADED_ALLOW
        (lease,) = sidecar.leases.of("acme").leases.values()
        lease.degraded = lease.used = UNITS_MAX // 2
        answer = await sidecar.check(quantity=5)
        assert (answer.effect, answer.reason) == (pb.EFFECT_DENIED, pb.REASON_DEGRADED_DENY)


@pytest.mark.parametrize("mode", [OnUnavailable(), ALLOW])
async def test_what_costs_more_than_can_be_counted_is_denied_whole(world: World, mode: OnUnavailable) -> None:
    key = LimitKey("reports:month.usd")
    budget = Limit(key, 10**12, Period.MONTH, on_exceeded=OnExceeded.OVERAGE, currency="USD")
    grant = Grant("g", key, 10**9, 0, 10**10)
    published(world, mode, budget, price=Price(10**9, 1, "USD"), grants=(grant,))
    async with running(world) as sidecar:
        answer = await sidecar.check(quantity=UNITS_MAX)
        assert (answer.effect, answer.reason) == (pb.EFFECT_DENIED, pb.REASON_QUOTA_EXHAUSTED)
        assert "9007199.254740991 USD" in answer.message
        assert sidecar.used() == 0
        assert len(sidecar.events()) == 1
        assert (await sidecar.check()).effect == pb.EFFECT_APPROVED
