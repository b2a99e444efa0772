"""The leasing service after a restart, over the model of the registers."""

from __future__ import annotations

from pathlib import Path

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, Limit, Plan
from licet.domain.ids import LimitKey
from licet.domain.windows import Period
from tests.support.sidecar import EPOCH, FakeSidecar, World, running


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
        leasing = after.leasing
        leasing.assert_all(EPOCH, world.registers.run_id)
        rounds = 0
        while leasing.urgent.is_set():
            leasing.urgent.clear()
            world.advance(0.01)
            await leasing.upkeep()
            rounds += 1
        assert rounds == 2  # one to learn the pair, one to assert under it
        assert leasing.asserted == (EPOCH, world.registers.run_id)
