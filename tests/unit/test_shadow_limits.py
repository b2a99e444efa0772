"""Limits in shadow count, record what they would have said, and never deny, wait or bind; off is off."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from licet.domain.catalog import Action, Catalog, Enforcement, Entitlement, Feature, Limit, OnExceeded, Plan
from licet.domain.catalog_wire import document_from_wire, document_to_wire
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet_control_plane.core.documents.writing import to_source
from licet_sidecar.ports import LinkDown
from tests.support.documents import catalog_of, only_error
from tests.support.published import catalog, limit
from tests.support.sidecar import FakeSidecar, World, hurried, running

SHADOW: Final = replace(limit(10, feature="tried"), enforcement=Enforcement.SHADOW)


def content(enforcement: Enforcement = Enforcement.SHADOW) -> Catalog:
    rate = replace(limit(2, Period.SECOND, feature="paced"), burst=2, enforcement=enforcement)
    tried = replace(limit(10, feature="tried"), enforcement=enforcement)
    ask = replace(
        limit(3, Period.DAY, feature="tried"), enforcement=enforcement, on_exceeded=OnExceeded.REQUIRE_APPROVAL
    )
    both = (tried, replace(limit(100, Period.YEAR, feature="tried")))
    features = {
        "tried": Entitlement(limits=(tried, ask)),
        "paced": Entitlement(limits=(rate,)),
        "both": Entitlement(limits=tuple(replace(one, key=one.key.replace("tried", "both")) for one in both)),  # type: ignore[arg-type]
    }
    return catalog(
        *(Feature(name) for name in features), *(Action(name, {"": name}) for name in features), Plan("pro", features)
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(content())
    made.license("acme")
    return made


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as made:
        yield made


async def told(world: World, sidecar: FakeSidecar) -> None:
    for _ in range(3):
        await sidecar.upkeep()
        world.advance(2)


async def test_a_limit_in_shadow_records_what_it_would_have_said_and_counts_on(
    sidecar: FakeSidecar, world: World
) -> None:
    answers = [await sidecar.check(action="tried", quantity=units) for units in (2, 2, 7, 50)]
    assert {(one.effect, one.reason, one.rule, len(one.quotas)) for one in answers} == {
        (pb.EFFECT_APPROVED, pb.REASON_OK, "", 0)
    }
    assert [event.shadow for event in sidecar.events()] == [
        [],
        ["tried:day=require_approval"],
        ["tried:month=deny", "tried:day=require_approval"],
        ["tried:month=deny", "tried:day=require_approval"],
    ]
    assert [[units for _, units in event.spends] for event in sidecar.events()] == [[2, 2], [2, 2], [7, 7], [50, 50]]
    await told(world, sidecar)
    assert world.quota("tried:month")[1] == world.quota("tried:day")[1] == 61


async def test_it_never_makes_a_check_wait_not_even_the_first(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.check(action="report.export")  # the license is here
    sidecar.link.failed(LinkDown("gone"))
    calls = sidecar.tally.lease_waits
    answer = await sidecar.check(action="tried", quantity=4)
    assert (answer.effect, answer.reason) == (pb.EFFECT_APPROVED, pb.REASON_OK)
    assert sidecar.tally.lease_waits == calls
    sidecar.link.succeeded()
    await told(world, sidecar)
    assert world.quota("tried:month")[1] == 4


async def test_it_knows_what_others_used_once_it_heard(world: World) -> None:
    async with running(world) as other, running(world, sidecar="6" * 32) as mine:
        await other.check(action="tried", quantity=10)
        await told(world, other)
        await mine.check(action="tried", quantity=1)
        await told(world, mine)
        await mine.check(action="tried", quantity=1)
        assert "tried:month=deny" in mine.events()[-1].shadow


async def test_what_it_counted_binds_once_it_is_enforced(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.check(action="tried", quantity=9)
    await told(world, sidecar)
    world.push(content(Enforcement.ENFORCE))
    await sidecar.synced()
    denied = await sidecar.check(action="tried", quantity=2)
    assert (denied.reason, denied.rule) == (pb.REASON_QUOTA_EXHAUSTED, "tried:month")


async def test_enforced_limits_beside_it_still_bind_and_a_denial_counts_nothing(
    sidecar: FakeSidecar, world: World
) -> None:
    assert (await sidecar.check(action="both", quantity=90)).reason == pb.REASON_OK
    denied = await sidecar.check(action="both", quantity=11)
    assert (denied.reason, denied.rule) == (pb.REASON_QUOTA_EXHAUSTED, "both:year")
    assert sidecar.events()[-1].spends == []
    await told(world, sidecar)
    assert world.quota("both:month")[1] == 90


async def test_a_rate_in_shadow_never_limits(sidecar: FakeSidecar, world: World) -> None:
    for _ in range(20):
        assert (await sidecar.check(action="paced", quantity=2)).reason == pb.REASON_OK
        await sidecar.upkeep()
        world.advance(1)
    assert sidecar.events()[-1].shadow == []
    for _ in range(3):
        assert (await sidecar.check(action="paced", quantity=2)).reason == pb.REASON_OK
    assert sidecar.events()[-1].shadow == ["paced:second.rate=deny"]


async def test_a_reservation_is_counted_when_it_is_used(sidecar: FakeSidecar, world: World) -> None:
    canceled = await sidecar.reserve(action="tried", quantity=8)
    await sidecar.cancel(canceled.reservation_id)
    made = await sidecar.reserve(action="tried", quantity=5)
    committed = await sidecar.commit(made.reservation_id, quantity=7)
    assert committed.committed == {"tried": 7}
    assert [event.spends for event in sidecar.events()[:-1]] == [[], [], []]
    assert {units for _, units in sidecar.events()[-1].spends} == {7}
    await told(world, sidecar)
    assert world.quota("tried:month")[1] == 7


async def test_a_peek_counts_nothing(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.check(action="tried", quantity=20, mode=pb.MODE_PEEK)
    await sidecar.check(action="tried", quantity=1)
    await told(world, sidecar)
    assert world.quota("tried:month")[1] == 1


async def test_a_limit_that_is_off_is_not_even_counted(world: World) -> None:
    world.push(content(Enforcement.OFF))
    async with running(world) as sidecar:
        assert (await sidecar.check(action="tried", quantity=50)).reason == pb.REASON_OK
        assert (sidecar.events()[-1].spends, sidecar.events()[-1].shadow) == ([], [])


# Documents and wire


@pytest.mark.parametrize("enforcement", Enforcement)
def test_a_limit_says_how_it_is_enforced(enforcement: Enforcement) -> None:
    text = "{kind: Feature, name: f}\n---\n{kind: Action, name: a, feature: f}\n---\nkind: Plan\nname: p\n"
    text += f"features: {{f: {{limits: [{{amount: 1, per: month, enforcement: {enforcement.value}}}]}}}}\n"
    plan = catalog_of(text).plans["p"]
    assert plan.features["f"].limits[0].enforcement is enforcement
    assert document_from_wire(document_to_wire(plan)) == plan
    written = to_source(plan)["features"]["f"]["limits"][0]
    assert written.get("enforcement", "enforce") == enforcement.value


def test_a_limit_cannot_be_enforced_a_little() -> None:
    text = "{kind: Feature, name: f}\n---\n{kind: Action, name: a, feature: f}\n---\nkind: Plan\nname: p\n"
    error = only_error(text + "features: {f: {limits: [{amount: 1, per: month, enforcement: ▶shadows}]}}\n")
    assert "'shadows' is not possible here" in error.message


@pytest.mark.parametrize("enforcement", [Enforcement.SHADOW, Enforcement.OFF])
def test_a_sidecar_that_would_enforce_it_refuses_the_bundle(enforcement: Enforcement) -> None:
    one: Limit = replace(SHADOW, enforcement=enforcement)
    wire = document_to_wire(Plan("p", {"tried": Entitlement(limits=(one,))}))
    word = wire["features"]["tried"][1][0][4]
    with pytest.raises(ValueError, match="is not a valid OnExceeded"):
        OnExceeded(word)
