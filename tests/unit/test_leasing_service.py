"""The leasing service after a restart, over the model of the registers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, Limit, Plan
from licet.domain.ids import LimitKey
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet_sidecar.services import leasing
from licet_sidecar.services.approval import WAIT_S_MAX
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
