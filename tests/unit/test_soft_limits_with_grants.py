"""A soft limit with a grant: the allowance, then the grant, to the unit, and only then overage, which is marked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from licet.domain.catalog import Grant, OnExceeded
from licet.v1 import approval_pb2 as pb
from tests.support.published import MONTHLY, catalog, limit
from tests.support.sidecar import FakeSidecar, World, hurried, running


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(catalog(limits=[replace(limit(10), on_exceeded=OnExceeded.OVERAGE)]))
    made.license("acme", grants=(Grant("extra", MONTHLY, 50, 0, 10**10),))
    return made


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as made:
        yield made


def used(world: World) -> dict[str, int]:
    """As Redis knows it, by limit or grant."""
    return {name.rpartition(":")[0]: one.used for (_, name), one in world.registers.contents.quotas.items()}


async def asked(sidecar: FakeSidecar, checks: int) -> list[pb.CheckResponse]:
    """Checks at a steady pace, with the upkeep that goes on meanwhile."""
    answers = []
    for number in range(checks):
        answers.append(await sidecar.check())
        sidecar.world.advance(0.1)
        if number % 5 == 4:
            await sidecar.upkeep()
    return answers


async def test_a_grant_is_used_before_the_limit_is_exceeded(sidecar: FakeSidecar, world: World) -> None:
    answers = await asked(sidecar, 80)
    assert [one.reason for one in answers[:60]] == [pb.REASON_OK] * 60
    assert [event.overage for event in sidecar.events()[:60]] == [{}] * 60
    for _ in range(3):
        world.advance(2)
        await sidecar.upkeep()
    assert used(world) == {"reports:month": 30, "reports:month+extra": 50}


async def test_what_lies_beyond_the_limit_and_its_grant_is_marked(sidecar: FakeSidecar) -> None:
    answers = await asked(sidecar, 80)
    assert [one.reason for one in answers[60:]] == [pb.REASON_OVERAGE] * 20
    assert [sum(event.overage.values()) for event in sidecar.events()[60:]] == [1] * 20
    assert answers[70].quotas[0].overage


async def test_a_grant_that_comes_later_is_used_though_overage_is_leased(world: World) -> None:
    world.license("acme")
    async with running(world) as sidecar:
        assert [one.reason for one in await asked(sidecar, 30)][10:] == [pb.REASON_OVERAGE] * 20
        (lease,) = sidecar.leases.of("acme").leases.values()
        assert lease.free > 0
        await sidecar.synced(world.license("acme", grants=(Grant("late", MONTHLY, 5, 0, 10**10),)))
        answers = await asked(sidecar, 6)
        assert [one.reason for one in answers] == [pb.REASON_OK] * 5 + [pb.REASON_OVERAGE]


async def test_two_sidecars_use_the_grant_to_the_unit(sidecar: FakeSidecar, world: World) -> None:
    async with running(world, sidecar="7" * 32) as other:
        sidecar.leases.live = other.leases.live = 2
        overage = 0
        for _ in range(40):
            for one in (sidecar, other):
                overage += (await asked(one, 1))[0].reason == pb.REASON_OVERAGE
                await one.upkeep()
        assert overage <= 20, "never more than there is"
        for one in (sidecar, other, sidecar, other):
            world.advance(21)  # what is spent of a lease that is not used up is told with its next sign of life
            await one.upkeep()
        spent = used(world)
        assert sum(spent.values()) == 80
        assert spent["reports:month+extra"] >= 45, "all but what the other holds idle"


async def test_past_a_soft_limit_nothing_is_left(world: World) -> None:
    world.license("acme")
    async with running(world) as sidecar:
        answers = await asked(sidecar, 24)
        assert [one.quotas[0].remaining for one in answers] == [*range(9, -1, -1), *[0] * 14]
        assert [one.quotas[0].overage for one in answers] == [False] * 10 + [True] * 14
