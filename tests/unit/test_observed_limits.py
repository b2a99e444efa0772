"""In observe mode limits are as soft ones: what they would have denied is done all the same, so that it is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from licet.domain.catalog import (
    Action,
    Catalog,
    Entitlement,
    Feature,
    OnExceeded,
    Plan,
    Policy,
    Rule,
    RuleEffect,
)
from licet.domain.outcomes import Effect
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import FLAG_OBSERVED
from licet_sidecar.adapters.usage_log import UsageLogError
from licet_sidecar.ports import LinkDown
from tests.support.published import catalog, limit
from tests.support.sidecar import FakeSidecar, World, hurried, running

MONTH: Final = "reports:month"


def content() -> Catalog:
    asked = replace(limit(5, Period.DAY, feature="asked"), on_exceeded=OnExceeded.REQUIRE_APPROVAL)
    features = {
        "reports": Entitlement(limits=(limit(10), limit(1_000, Period.YEAR))),
        "asked": Entitlement(limits=(asked,)),
        "paced": Entitlement(limits=(replace(limit(2, Period.SECOND, feature="paced"), burst=2),)),
    }
    return catalog(
        *(Feature(name) for name in features),
        *(Action(name, {"": name}) for name in features),
        Action("guarded", {"": "reports"}),
        Policy("guard", ("guarded",), (Rule("never", RuleEffect.DENY),)),
        Plan("pro", features),
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(content(), observe=True)
    made.license("acme")
    return made


async def told(world: World, sidecar: FakeSidecar) -> None:
    for _ in range(3):
        await sidecar.upkeep()
        world.advance(2)


def observed(answer: pb.CheckResponse) -> tuple[Any, str]:
    """The reason, and what the answer would have been."""
    assert answer.effect == pb.EFFECT_APPROVED
    return answer.reason, answer.metadata["observed_effect"]


EXHAUSTED: Final = (pb.REASON_QUOTA_EXHAUSTED, "DENIED")


async def test_what_a_limit_would_have_denied_is_counted_in_all_limits_and_owed_to_nobody(world: World) -> None:
    async with running(world) as sidecar:
        await sidecar.check(action="reports", quantity=8)
        assert observed(await sidecar.check(action="reports", quantity=5)) == EXHAUSTED
        assert observed(await sidecar.check(action="reports", quantity=1)) == EXHAUSTED
        events = sidecar.events()
        assert [[units for _, units in one.spends] for one in events] == [[8, 8], [5, 5], [1, 1]]
        assert [(one.effect, one.flags & FLAG_OBSERVED) for one in events[1:]] == [(Effect.DENIED, FLAG_OBSERVED)] * 2
        assert [one.cost_nanos for one in events[1:]] == [0, 0]
        await told(world, sidecar)
        assert world.quota(MONTH) == (14, 14)
        assert world.quota("reports:year")[1] == 14


async def test_it_binds_once_it_is_enforced(world: World) -> None:
    async with running(world) as sidecar:
        await sidecar.check(action="reports", quantity=50)
        await told(world, sidecar)
        world.push(content())
        await sidecar.synced()
        denied = await sidecar.check(action="reports", quantity=1)
        assert (denied.effect, denied.reason, denied.rule) == (pb.EFFECT_DENIED, pb.REASON_QUOTA_EXHAUSTED, MONTH)
        assert sidecar.events()[-1].spends == []


async def test_it_is_known_after_a_kill_and_by_others(world: World) -> None:
    async with running(world) as sidecar:
        await sidecar.check(action="reports", quantity=50)
        await sidecar.kill()
    async with running(world, incarnation=2) as after, running(world, sidecar="6" * 32) as other:
        assert after.used() == 100
        await told(world, after)
        assert world.quota(MONTH) == (50, 50)
        assert observed(await other.check(action="reports", quantity=1)) == EXHAUSTED


async def test_a_limit_that_asks_people_counts_too_and_asks_nobody(world: World) -> None:
    async with running(world) as sidecar:
        answer = await sidecar.check(action="asked", quantity=9)
        assert observed(answer) == (pb.REASON_APPROVAL_REQUIRED, "PENDING")
        assert answer.access_request_id == ""
        await told(world, sidecar)
        assert world.quota("asked:day") == (9, 9)


async def test_a_rate_that_is_exceeded_keeps_being_so(world: World) -> None:
    async with running(world) as sidecar:
        found = [observed(await sidecar.check(action="paced", quantity=3)) for _ in range(2)]
        assert found == [(pb.REASON_RATE_LIMITED, "DENIED")] * 2


async def test_what_a_policy_would_have_denied_is_counted_in_no_limit(world: World) -> None:
    async with running(world) as sidecar:
        assert observed(await sidecar.check(action="guarded", quantity=4)) == (pb.REASON_POLICY_DENIED, "DENIED")
        made = await sidecar.reserve(action="guarded", quantity=4)
        await sidecar.commit(made.reservation_id, quantity=4)
        assert (sidecar.used(), [one.spends for one in sidecar.events()]) == (0, [[], [], []])


async def test_a_peek_counts_nothing(world: World) -> None:
    async with running(world) as sidecar:
        assert observed(await sidecar.check(action="reports", quantity=50, mode=pb.MODE_PEEK)) == EXHAUSTED
        assert sidecar.used() == 0


async def test_a_reservation_is_counted_by_what_it_used(world: World) -> None:
    async with running(world) as sidecar:
        canceled = await sidecar.reserve(action="reports", quantity=50)
        await sidecar.cancel(canceled.reservation_id)
        made = await sidecar.reserve(action="reports", quantity=50)
        committed = await sidecar.commit(made.reservation_id, quantity=60)
        assert observed(committed.decision) == EXHAUSTED
        assert committed.committed == {"reports": 60}
        assert {units for _, units in sidecar.events()[-1].spends} == {60}
        await told(world, sidecar)
        assert world.quota(MONTH) == (60, 60)


async def test_what_is_not_logged_is_not_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(world) as sidecar:
        await sidecar.check(action="reports", quantity=4)

        def full(*_: object) -> None:
            raise UsageLogError("full")

        monkeypatch.setattr(sidecar.log, "append", full)
        answer = await sidecar.check(action="reports", quantity=50)
        assert (answer.effect, answer.decision_id, sidecar.used()) == (pb.EFFECT_APPROVED, "", 8)


async def test_without_redis_it_is_counted_later(world: World) -> None:
    async with running(world) as sidecar:
        await sidecar.check(action="guarded")  # the license is here
        sidecar.link.failed(LinkDown("gone"))
        answer = await sidecar.check(action="reports", quantity=4)
        assert observed(answer) == (pb.REASON_DEGRADED_DENY, "DENIED")
        sidecar.link.succeeded()
        await told(world, sidecar)
        assert world.quota(MONTH) == (4, 4)
