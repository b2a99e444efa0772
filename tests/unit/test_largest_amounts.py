"""Amounts at the edge of what is counted exactly, 2^53 - 1, and nothing at all: each has a defined answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, Limit, OnExceeded, Plan
from licet.domain.ids import UNITS_MAX, LimitKey
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from tests.support.published import catalog
from tests.support.sidecar import FakeSidecar, World, ask, hurried, running

LARGEST = LimitKey("reports:month")
SOFT = LimitKey("soft:month")


def content() -> Catalog:
    limits: dict[str, Entitlement] = {
        "reports": Entitlement(limits=(Limit(LARGEST, UNITS_MAX, Period.MONTH),)),
        "soft": Entitlement(limits=(Limit(SOFT, UNITS_MAX, Period.MONTH, on_exceeded=OnExceeded.OVERAGE),)),
        "small": Entitlement(limits=(Limit(LimitKey("small:month"), 5, Period.MONTH),)),
        "none": Entitlement(limits=(Limit(LimitKey("none:month"), 0, Period.MONTH),)),
    }
    return catalog(
        *(Feature(name) for name in limits), *(Action(name, {"": name}) for name in limits), Plan("pro", limits)
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(content())
    made.license("acme")
    return made


async def answer(sidecar: FakeSidecar, action: str, quantity: int) -> tuple[str, str]:
    response = await sidecar.check(ask(action=action, quantity=quantity))
    return pb.Effect.Name(response.effect).removeprefix("EFFECT_"), pb.Reason.Name(response.reason).removeprefix(
        "REASON_"
    )


async def test_a_limit_of_the_largest_amount_is_exact(world: World) -> None:
    async with running(world) as sidecar:
        assert await answer(sidecar, "reports", UNITS_MAX - 1) == ("APPROVED", "OK")
        assert await answer(sidecar, "reports", 2) == ("DENIED", "QUOTA_EXHAUSTED")
        assert await answer(sidecar, "reports", 1) == ("APPROVED", "OK")
        assert await answer(sidecar, "reports", 1) == ("DENIED", "QUOTA_EXHAUSTED")
        assert sidecar.used() == UNITS_MAX


async def test_nothing_can_be_asked_and_takes_nothing(world: World) -> None:
    async with running(world) as sidecar:
        assert await answer(sidecar, "small", 0) == ("APPROVED", "OK")
        assert await answer(sidecar, "none", 0) == ("APPROVED", "OK")
        assert await answer(sidecar, "none", 1) == ("DENIED", "QUOTA_EXHAUSTED")
        assert await answer(sidecar, "small", 5) == ("APPROVED", "OK")
        assert await answer(sidecar, "small", 0) == ("APPROVED", "OK")
        assert await answer(sidecar, "small", UNITS_MAX) == ("DENIED", "QUOTA_EXHAUSTED")
        assert sidecar.used() == 5


async def test_a_soft_limit_ends_where_counting_does_and_nothing_is_lost(world: World) -> None:
    async with running(world) as sidecar:
        assert await answer(sidecar, "soft", UNITS_MAX) == ("APPROVED", "OK")
        assert await answer(sidecar, "soft", 1) == ("DENIED", "QUOTA_EXHAUSTED")
        assert sidecar.used() == UNITS_MAX
        assert await answer(sidecar, "reports", 1) == ("APPROVED", "OK"), "only that quota is concerned"
