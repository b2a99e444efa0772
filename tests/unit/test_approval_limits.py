"""Limits of every kind through the whole service: what is leased, taken, logged, answered, and known later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Entitlement,
    Feature,
    Grant,
    OnExceeded,
    OnUnavailable,
    Plan,
    UnavailableMode,
)
from licet.domain.ids import LimitKey
from licet.domain.money import Price
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import FLAG_DEGRADED, FLAG_OVERAGE
from licet_sidecar.ports import LinkDown
from tests.support.published import catalog, limit
from tests.support.sidecar import FakeSidecar, World, hurried, running

SOFT: Final = replace(limit(10, feature="soft"), on_exceeded=OnExceeded.OVERAGE)
BUDGET: Final = replace(
    limit(1_000_000_000, feature="paid", scope=("context.team",)), key=LimitKey("paid:month.usd"), currency="USD"
)
CENT: Final = Price(10_000_000, 1, "USD")
MONTH: Final = LimitKey("topped:month")


def content() -> Catalog:
    features: dict[str, Entitlement] = {
        "capped": Entitlement(limits=(limit(100, feature="capped"),)),
        "soft": Entitlement(limits=(SOFT,)),
        "fast": Entitlement(limits=(replace(limit(5, Period.SECOND, feature="fast"), burst=5),)),
        "paid": Entitlement(CENT, (BUDGET,)),
        "topped": Entitlement(limits=(limit(10, feature="topped"),)),
        "asked": Entitlement(limits=(replace(limit(10, feature="asked"), on_exceeded=OnExceeded.REQUIRE_APPROVAL),)),
    }
    attributes = {"team": Attribute(AttributeType.STRING, "")}
    capped = OnUnavailable(UnavailableMode.CAPPED, units_max=5)
    return catalog(
        *(Feature(name) for name in features),
        *(Action(name, {"": name}, attributes) for name in features if name != "capped"),
        Action("capped", {"": "capped"}, on_unavailable=capped),
        Plan("pro", features),
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(content())
    now_s = made.clock.us // 1_000_000
    made.license("acme", grants=(Grant("extra", MONTH, 5, now_s - 10, now_s + 1_000),))
    return made


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as made:
        yield made


def quota(world: World, key: str) -> tuple[int, int]:
    """(sum, used) of the only quota of a limit."""
    (found,) = [one for (_, name), one in world.registers.contents.quotas.items() if name.startswith(f"{key}:")]
    return found.sum, found.used


# Without a lease


async def test_what_was_approved_without_a_lease_is_posted_when_redis_answers(
    sidecar: FakeSidecar, world: World
) -> None:
    await sidecar.check(action="topped")  # the license is here, leases of `capped` are not
    sidecar.link.failed(LinkDown("gone"))
    answers = [await sidecar.check(action="capped", quantity=units) for units in (3, 3, 2)]
    assert [one.reason for one in answers] == [
        pb.REASON_DEGRADED_ALLOW,
        pb.REASON_DEGRADED_DENY,
        pb.REASON_DEGRADED_ALLOW,
    ]
    flagged = [event for event in sidecar.events() if event.flags & FLAG_DEGRADED and event.spends]
    assert [units for event in flagged for _, units in event.spends] == [3, 2]
    sidecar.link.succeeded()
    for _ in range(3):
        await sidecar.upkeep()
        world.advance(2)
    assert quota(world, "capped:month") == (5, 5)
    assert (await sidecar.check(action="capped", quantity=95)).reason == pb.REASON_OK
    assert (await sidecar.check(action="capped", quantity=1)).reason == pb.REASON_QUOTA_EXHAUSTED


async def test_the_cap_is_not_reset_by_a_restart(world: World) -> None:
    async with running(world) as before:
        await before.check(action="topped")
        before.link.failed(LinkDown("gone"))
        assert (await before.check(action="capped", quantity=4)).reason == pb.REASON_DEGRADED_ALLOW
        await before.kill()
    async with running(world, incarnation=2) as after:
        await after.check(action="topped")
        after.link.failed(LinkDown("gone"))
        assert (await after.check(action="capped", quantity=2)).reason == pb.REASON_DEGRADED_DENY
        assert (await after.check(action="capped", quantity=1)).reason == pb.REASON_DEGRADED_ALLOW


# Soft limits


async def test_overage_is_split_marked_and_logged(sidecar: FakeSidecar, world: World) -> None:
    first = await sidecar.check(action="soft", quantity=8)
    assert (first.reason, first.quotas[0].overage) == (pb.REASON_OK, False)
    over = await sidecar.check(action="soft", quantity=7)
    assert (over.effect, over.reason, over.quotas[0].overage) == (pb.EFFECT_APPROVED, pb.REASON_OVERAGE, True)
    event = sidecar.events()[-1]
    assert event.flags & FLAG_OVERAGE
    assert (event.units, list(event.overage.values())) == ({"soft": 7}, [5])
    assert quota(world, "soft:month")[0] >= 15


async def test_a_reservation_may_run_into_overage(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="soft", quantity=12)
    committed = await sidecar.commit(made.reservation_id, quantity=11)
    assert committed.decision.reason == pb.REASON_OVERAGE
    assert list(sidecar.events()[-1].overage.values()) == [2]


# Approval


async def test_past_the_limit_a_person_is_asked(sidecar: FakeSidecar) -> None:
    answer = await sidecar.check(action="asked", quantity=11)
    assert (answer.effect, answer.reason) == (pb.EFFECT_PENDING, pb.REASON_APPROVAL_REQUIRED)
    assert sidecar.events()[-1].spends == []


# Rates


async def share(sidecar: FakeSidecar, world: World) -> None:
    """A first check leases a share, whose bucket is empty, and waits for it to fill."""
    asking = asyncio.ensure_future(sidecar.check(action="fast"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not asking.done()
    world.advance(0.2)
    assert (await asking).effect == pb.EFFECT_APPROVED


async def test_a_rate_lets_its_burst_through_and_no_more(sidecar: FakeSidecar, world: World) -> None:
    await share(sidecar, world)
    world.advance(10)
    answers = [await sidecar.check(action="fast") for _ in range(7)]
    assert [one.effect for one in answers] == [pb.EFFECT_APPROVED] * 5 + [pb.EFFECT_DENIED] * 2
    refused = answers[-1]
    assert (refused.reason, refused.rule) == (pb.REASON_RATE_LIMITED, "fast:second.rate")
    assert 0 < refused.retry_after.nanos <= 200_000_000
    assert (answers[0].quotas[0].window, answers[0].quotas[0].limit) == ("second", 5)
    assert all(event.spends == [] for event in sidecar.events())
    world.advance(0.2)
    assert (await sidecar.check(action="fast")).effect == pb.EFFECT_APPROVED


async def test_a_share_is_not_taken_up_after_a_restart(world: World) -> None:
    async with running(world) as before:
        await share(before, world)
        await before.kill()
    async with running(world, incarnation=2) as after:
        await share(after, world)
        assert quota(world, "fast:second.rate") == (5_000, 0)


# Budgets


async def test_each_team_has_a_budget_of_its_own(sidecar: FakeSidecar) -> None:
    assert (await sidecar.check(action="paid", quantity=99, context={"team": "a"})).reason == pb.REASON_OK
    refused = await sidecar.check(action="paid", quantity=2, context={"team": "a"})
    assert refused.reason == pb.REASON_QUOTA_EXHAUSTED
    assert (refused.quotas[0].currency, refused.quotas[0].limit) == ("USD", 1_000_000_000)
    assert (await sidecar.check(action="paid", quantity=100, context={"team": "b"})).reason == pb.REASON_OK


async def test_a_budget_reserved_and_not_needed_is_free_again(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="paid", quantity=100)
    assert (await sidecar.check(action="paid", quantity=1)).reason == pb.REASON_QUOTA_EXHAUSTED
    assert (await sidecar.commit(made.reservation_id, quantity=40)).decision.cost.amount_nanos == 400_000_000
    assert (await sidecar.check(action="paid", quantity=60)).reason == pb.REASON_OK
    assert (await sidecar.check(action="paid", quantity=1)).reason == pb.REASON_QUOTA_EXHAUSTED


# Grants


async def test_a_grant_is_used_after_the_allowance_to_the_unit(sidecar: FakeSidecar) -> None:
    answers = [await sidecar.check(action="topped", quantity=4) for _ in range(4)]
    assert [one.reason for one in answers] == [pb.REASON_OK] * 3 + [pb.REASON_QUOTA_EXHAUSTED]
    third = answers[2]
    assert [(state.grant, state.limit) for state in third.quotas] == [("", 10), ("extra", 5)]
    spent = [units for _, units in sidecar.events()[2].spends]
    assert sum(spent) == 4
    assert len(spent) == 2
    assert (await sidecar.check(action="topped", quantity=3)).reason == pb.REASON_OK
    assert (await sidecar.check(action="topped", quantity=1)).reason == pb.REASON_QUOTA_EXHAUSTED


async def test_a_reservation_over_a_grant_gives_back_the_grant_first(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="topped", quantity=15)
    assert made.decision.effect == pb.EFFECT_APPROVED
    committed = await sidecar.commit(made.reservation_id, quantity=11)
    assert committed.committed["topped"] == 11
    assert sorted(units for _, units in sidecar.events()[-1].spends) == [1, 10]
    assert (await sidecar.check(action="topped", quantity=4)).reason == pb.REASON_OK


async def test_a_grant_that_ended_counts_no_more(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.check(action="topped", quantity=10)
    world.advance(2_000)
    world.publisher.beat(world.clock.us)
    sidecar.hear_head()
    assert (await sidecar.check(action="topped", quantity=1)).reason == pb.REASON_QUOTA_EXHAUSTED
