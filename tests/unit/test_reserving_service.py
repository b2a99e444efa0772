"""Reservations from bytes to bytes: what is held and spent, answered and recorded, and what survives a crash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Entitlement,
    Feature,
    Flag,
    OnExpiry,
    OnUnavailable,
    Plan,
    Policy,
    ReservationTerms,
    Rule,
    RuleEffect,
    UnavailableMode,
)
from licet.domain.money import NANOS, Price
from licet.domain.outcomes import Effect
from licet.domain.windows import Period, window_at
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import FLAG_EXPIRED, FLAG_OBSERVED, EventKind
from licet_sidecar.core import reservations
from licet_sidecar.core.lease import HOLD_MS
from licet_sidecar.services.approval import Malformed, NotReady
from tests.support.published import catalog, limit
from tests.support.sidecar import FakeSidecar, LinkDown, World, ask, hurried, running, until

HELD, COMMITTED = pb.RESERVATION_STATE_HELD, pb.RESERVATION_STATE_COMMITTED
CANCELED, EXPIRED, UNKNOWN = (
    pb.RESERVATION_STATE_CANCELED,
    pb.RESERVATION_STATE_EXPIRED,
    pb.RESERVATION_STATE_UNKNOWN,
)
NOWHERE = "0" * 32


def content(*more: Any, amount: int = 1_000) -> Catalog:
    plan = Plan(
        "pro",
        {
            "reports": Entitlement(limits=(limit(amount), limit(100, Period.MINUTE))),
            "monthly": Entitlement(limits=(limit(amount, feature="monthly"),)),
            "input": Entitlement(limits=(limit(amount, feature="input"),)),
            "output": Entitlement(limits=(limit(amount, feature="output"),)),
            "open": Entitlement(limits=(limit(amount, feature="open"),)),
            "free": Entitlement(),
            "priced": Entitlement(price=Price(8 * NANOS, 1_000, "USD")),
            "teams": Entitlement(limits=(limit(100, feature="teams", scope=("context.team",)),)),
        },
    )
    return catalog(
        *(Feature(name) for name in plan.features),
        Action("monthly", {"": "monthly"}),
        Action("paid-late", {"": "monthly"}, reservation=ReservationTerms(60, OnExpiry.COMMIT)),
        Action("llm.generate", {"input": "input", "output": "output"}),
        Action("open", {"": "open"}, on_unavailable=OnUnavailable(UnavailableMode.ALLOW)),
        Action("free", {"": "free"}),
        Action("priced", {"": "priced"}),
        Action("team", {"": "teams"}, {"team": Attribute(AttributeType.STRING)}),
        Action("guarded", {"": "free"}),
        Policy(
            "guard",
            ("guarded",),
            (
                Rule("large", RuleEffect.REQUIRE_APPROVAL, "quantity > 10", "finance"),
                Rule("huge", RuleEffect.DENY, "quantity > 100"),
            ),
        ),
        plan,
        *more,
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(content())
    made.license("acme")
    made.license("globex")
    return made


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as made:
        yield made


async def restarted(world: World, before: FakeSidecar, incarnation: int = 2) -> FakeSidecar:
    """The next process on the same state directory, after a kill."""
    await before.kill()
    after = FakeSidecar(world, incarnation=incarnation)
    after.start()
    await after.synced()
    return after


async def told(world: World, sidecar: FakeSidecar) -> None:
    """Time goes by, and Redis learns what is held."""
    world.advance(1)
    await sidecar.upkeep()
    world.advance(1)
    await sidecar.upkeep()


def registered(world: World, sidecar: FakeSidecar, prefix: str) -> tuple[int, int]:
    """(u, h) of the sidecar's registers of quotas whose name starts so."""
    found = [
        register
        for (_, name), quota in world.registers.contents.quotas.items()
        if name.startswith(prefix)
        for register in quota.registers.values()
    ]
    return sum(one.u for one in found), sum(one.h for one in found)


# Reserving


async def test_reserving_holds_units_and_spends_none(sidecar: FakeSidecar, world: World) -> None:
    response = await sidecar.reserve(quantity=10)
    assert (response.decision.effect, response.decision.reason) == (pb.EFFECT_APPROVED, pb.REASON_OK)
    assert response.reservation_id == response.decision.decision_id
    assert response.expires_at.ToMicroseconds() == world.clock.us + 900_000_000
    assert (sidecar.used(), sidecar.reserved()) == (0, 20)  # of the month and of the minute
    assert {quota.window: quota.remaining for quota in response.decision.quotas} == {"month": 990, "minute": 90}


async def test_reserving_records_what_is_held_and_uses_nothing(sidecar: FakeSidecar, world: World) -> None:
    response = await sidecar.reserve(quantity=10, idempotency_key="k")
    (event,) = sidecar.events()
    now_s = world.clock.us // 1_000_000
    month, minute = window_at(Period.MONTH, now_s).start, window_at(Period.MINUTE, now_s).start
    assert (event.kind, event.effect, event.units, event.spends) == (EventKind.RESERVE, Effect.APPROVED, {}, [])
    assert event.held == [[f"reports:month:{month}", 10], [f"reports:minute:{minute}", 10]]
    assert event.units_held == {"reports": 10}
    assert event.expires_us == response.expires_at.ToMicroseconds()
    assert event.idempotency_key == "k"


async def test_a_commit_says_by_what_it_was_priced_and_which_flags_its_reservation_was_subject_to(world: World) -> None:
    modeled = Price(NANOS, 1, "USD", "context.model", {"small": 1})
    world.push(
        content(
            Feature("modeled"),
            Flag("new-editor", "modeled"),
            Action("modeled", {"": "modeled"}, {"model": Attribute(AttributeType.STRING)}),
            Plan("pro", {"modeled": Entitlement(modeled)}),
        )
    )
    async with running(world) as sidecar:
        made = await sidecar.reserve(action="modeled", quantity=10, context={"model": "small"})
        again = await restarted(world, sidecar)
        try:
            await again.commit(made.reservation_id, quantity=4)
            (used,) = again.events()
        finally:
            await again.stop()
    assert (used.kind, used.units) == (EventKind.COMMIT, {"modeled": 4})
    assert (used.priced_as, used.exposures) == ({"modeled": "small"}, {"new-editor": "on"})


async def test_units_held_cannot_be_had_by_others(sidecar: FakeSidecar) -> None:
    await sidecar.reserve(action="monthly", quantity=990)
    response = await sidecar.check(action="monthly", quantity=11)
    assert (response.effect, response.reason) == (pb.EFFECT_DENIED, pb.REASON_QUOTA_EXHAUSTED)
    assert (await sidecar.check(action="monthly", quantity=10)).effect == pb.EFFECT_APPROVED


async def test_a_reservation_that_is_denied_holds_nothing_and_has_no_id(sidecar: FakeSidecar) -> None:
    response = await sidecar.reserve(quantity=101)
    assert (response.decision.effect, response.decision.rule) == (pb.EFFECT_DENIED, "reports:minute")
    assert (response.reservation_id, response.HasField("expires_at"), sidecar.reserved()) == ("", False, 0)
    (event,) = sidecar.events()
    assert (event.kind, event.effect, event.units, event.expires_us) == (EventKind.RESERVE, Effect.DENIED, {}, 0)
    assert (event.units_held, event.held) == ({"reports": 101}, [])


async def test_a_reservation_that_a_person_has_to_approve_is_pending(sidecar: FakeSidecar) -> None:
    response = await sidecar.reserve(action="guarded", quantity=50)
    assert (response.decision.effect, response.reservation_id) == (pb.EFFECT_PENDING, "")


async def test_a_peek_holds_and_records_nothing(sidecar: FakeSidecar) -> None:
    response = await sidecar.reserve(quantity=10, mode=pb.MODE_PEEK)
    assert (response.decision.effect, response.decision.decision_id) == (pb.EFFECT_APPROVED, "")
    assert (response.reservation_id, sidecar.reserved(), sidecar.events()) == ("", 0, [])


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_the_same_key_makes_one_reservation(sidecar: FakeSidecar, warm: bool) -> None:
    if warm:
        await sidecar.check()
    request = ask(quantity=10, idempotency_key="k")
    first, second = await asyncio.gather(sidecar.reserve(request), sidecar.reserve(request))
    assert first == second == await sidecar.reserve(request)
    assert sidecar.reserved() == 20


async def test_a_key_that_was_used_for_another_request_is_malformed(sidecar: FakeSidecar) -> None:
    await sidecar.reserve(quantity=10, idempotency_key="k")
    await sidecar.check(quantity=1, idempotency_key="c")
    for request in (
        sidecar.reserve(quantity=11, idempotency_key="k"),
        sidecar.reserve(quantity=10, idempotency_key="k", after_s=5),
        sidecar.reserve(quantity=1, idempotency_key="c"),
        sidecar.check(quantity=10, idempotency_key="k"),
    ):
        with pytest.raises(Malformed, match="idempotency_key"):
            await request
    assert sidecar.reserved() == 20


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(0, 0), (0, 999_999_999), (-1, 0), (604_800, 1_000), (10**11, 0)], ids=str
)
async def test_how_long_it_is_held_has_bounds(sidecar: FakeSidecar, seconds: int, nanos: int) -> None:
    request = pb.ReserveRequest(check=ask(), expires_after=Duration(seconds=seconds, nanos=nanos))
    with pytest.raises(Malformed, match=r"^expires_after: "):
        await sidecar.call("Reserve", request)
    assert sidecar.reserved() == 0


async def test_what_is_wrong_in_the_check_is_named_with_its_place(sidecar: FakeSidecar) -> None:
    for fields, expected in (
        ({"tenant": ""}, "check.tenant: is empty"),
        ({"quantity": 2**53}, "check.quantity: "),
        ({"quantity": -1}, "check.quantity: "),
        ({"action": "llm.generate", "quantity": 3}, "check.quantity: "),
    ):
        with pytest.raises(Malformed, match=f"^{expected}"):
            await sidecar.reserve(**fields)


@pytest.mark.parametrize("method", ["Reserve", "CommitReservation", "CancelReservation", "ExtendReservation"])
async def test_bytes_that_are_no_message_are_malformed(sidecar: FakeSidecar, method: str) -> None:
    for garbage in (b"\xff", b"\x0a\xff", b"\x00" * 40):
        with pytest.raises(Malformed):
            sidecar.service.handle(method, garbage, 1.0)


async def test_nothing_is_reserved_or_settled_before_the_first_state(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as sidecar:
        for call in (sidecar.reserve(), sidecar.commit(NOWHERE), sidecar.cancel(NOWHERE), sidecar.extend(NOWHERE)):
            with pytest.raises(NotReady):
                await call


async def test_no_more_are_taken_than_the_log_can_keep(sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "OPEN_MAX", 2)
    first = await sidecar.reserve(action="monthly")
    await sidecar.reserve(action="monthly")
    refused = await sidecar.reserve(action="monthly")
    assert (refused.decision.effect, refused.decision.reason) == (pb.EFFECT_DENIED, pb.REASON_USAGE_LOG_FULL)
    assert "open reservations" in refused.decision.message
    assert (refused.reservation_id, sidecar.reserved()) == ("", 2)
    await sidecar.cancel(first.reservation_id)
    assert (await sidecar.reserve(action="monthly")).reservation_id


async def test_observe_mode_gives_a_reservation_that_takes_nothing(world: World) -> None:
    world.push(content(), observe=True)
    async with running(world) as sidecar:
        made = await sidecar.reserve(action="guarded", quantity=500)
        assert (made.decision.effect, bool(made.reservation_id)) == (pb.EFFECT_APPROVED, True)
        done = await sidecar.commit(made.reservation_id, quantity=700)
        assert (done.state, done.decision.effect, dict(done.committed)) == (
            COMMITTED,
            pb.EFFECT_APPROVED,
            {"free": 700},
        )
        event = sidecar.events()[-1]
        assert (event.effect, event.flags & FLAG_OBSERVED) == (Effect.DENIED, FLAG_OBSERVED)


# Committing


async def test_a_commit_spends_what_was_reserved_in_every_quota(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(quantity=10)
    done = await sidecar.commit(made.reservation_id)
    assert (done.state, done.decision.effect, done.decision.reason) == (COMMITTED, pb.EFFECT_APPROVED, pb.REASON_OK)
    assert (dict(done.committed), dict(done.unfunded)) == ({"reports": 10}, {})
    assert (sidecar.used(), sidecar.reserved()) == (20, 0)
    assert {quota.window: quota.remaining for quota in done.decision.quotas} == {"month": 990, "minute": 90}


async def test_a_commit_is_the_event_that_bills(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(quantity=10, subject={"type": "user", "id": "ada"})
    done = await sidecar.commit(made.reservation_id, quantity=7)
    reserve, commit = sidecar.events()
    assert (commit.kind, commit.about, commit.effect) == (EventKind.COMMIT, made.reservation_id, Effect.APPROVED)
    assert (commit.units, commit.unfunded) == ({"reports": 7}, {})
    assert commit.spends == [[quota, 7] for quota, _ in reserve.held]
    assert (commit.subject_type, commit.subject_id, commit.action) == ("user", "ada", "report.export")
    assert done.decision.decision_id.endswith(f"{commit.seq:016x}")
    assert commit.idempotency_key == ""


async def test_what_a_commit_leaves_is_free_at_once(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="monthly", quantity=1_000)
    await sidecar.commit(made.reservation_id, quantity=1)
    assert (sidecar.used(), sidecar.reserved()) == (1, 0)
    assert (await sidecar.check(action="monthly", quantity=999)).effect == pb.EFFECT_APPROVED


async def test_a_commit_of_nothing_is_a_commit(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(quantity=10)
    done = await sidecar.commit(made.reservation_id, quantity=0)
    assert (done.state, dict(done.committed)) == (COMMITTED, {"reports": 0})
    assert (sidecar.used(), sidecar.reserved()) == (0, 0)


async def test_a_commit_awaits_nothing_within_its_reservation(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(quantity=10)
    request = pb.CommitReservationRequest(tenant="acme", reservation_id=made.reservation_id)
    assert isinstance(sidecar.service.handle("CommitReservation", request.SerializeToString(), 1.0), bytes)


async def test_what_exceeds_the_reservation_is_a_check_of_its_own(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10)
    done = await sidecar.commit(made.reservation_id, quantity=400)
    assert (done.state, done.decision.effect) == (COMMITTED, pb.EFFECT_APPROVED)
    assert (dict(done.committed), dict(done.unfunded)) == ({"monthly": 400}, {})
    assert (sidecar.used(), sidecar.reserved()) == (400, 0)
    (_, commit) = sidecar.events()
    assert (commit.units, [units for _, units in commit.spends]) == ({"monthly": 400}, [400])


async def test_what_no_limit_has_room_for_is_recorded_and_not_approved(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="monthly", quantity=600)
    done = await sidecar.commit(made.reservation_id, quantity=1_001)
    assert (done.state, done.decision.effect) == (COMMITTED, pb.EFFECT_APPROVED)
    assert (dict(done.committed), dict(done.unfunded)) == ({"monthly": 600}, {"monthly": 401})
    assert "401 units of monthly" in done.decision.message
    assert (sidecar.used(), sidecar.reserved(), sidecar.tally.units_unfunded) == (600, 0, 401)
    (_, commit) = sidecar.events()
    assert (commit.units, commit.unfunded) == ({"monthly": 600}, {"monthly": 401})
    assert [units for _, units in commit.spends] == [600]


async def test_the_part_beyond_is_asked_of_the_policies_too(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="guarded", quantity=10)
    done = await sidecar.commit(made.reservation_id, quantity=21)
    assert (dict(done.committed), dict(done.unfunded)) == ({"free": 10}, {"free": 11})


async def test_a_commit_names_its_meters(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="llm.generate", quantities={"input": 10, "output": 100})
    done = await sidecar.commit(made.reservation_id, quantities={"input": 12, "output": 40})
    assert dict(done.committed) == {"input": 12, "output": 40}
    assert (sidecar.used(), sidecar.reserved()) == (52, 0)


async def test_a_meter_that_a_commit_does_not_name_was_not_used(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="llm.generate", quantities={"input": 10, "output": 100})
    done = await sidecar.commit(made.reservation_id, quantities={"input": 10})
    assert (dict(done.committed), sidecar.used()) == ({"input": 10, "output": 0}, 10)


async def test_the_part_beyond_counts_in_the_same_scope(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="team", quantity=90, context={"team": "red"})
    await sidecar.check(action="team", quantity=100, context={"team": "blue"})
    done = await sidecar.commit(made.reservation_id, quantity=100)
    assert (dict(done.committed), dict(done.unfunded)) == ({"teams": 100}, {})
    again = await sidecar.reserve(action="team", quantity=1, context={"team": "red"})
    assert again.decision.effect == pb.EFFECT_DENIED


@pytest.mark.parametrize(
    ("used", "field"),
    [
        ({"quantity": -1}, "quantity"),
        ({"quantity": 2**53}, "quantity"),
        ({"quantities": {"input": 1}}, "quantities"),
        ({"quantity": 1, "quantities": {"": 1}}, "quantity"),
    ],
    ids=str,
)
async def test_a_commit_of_what_cannot_be_settles_nothing(sidecar: FakeSidecar, used: Any, field: str) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10)
    with pytest.raises(Malformed, match=f"^{field}"):
        await sidecar.commit(made.reservation_id, **used)
    assert sidecar.reserved() == 10


async def test_a_commit_costs_what_was_used(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="priced", quantity=1_000)
    assert made.decision.cost.amount_nanos == 8 * NANOS
    done = await sidecar.commit(made.reservation_id, quantity=250)
    reserve, commit = sidecar.events()
    assert (done.decision.cost.amount_nanos, done.decision.cost.currency) == (2 * NANOS, "USD")
    assert (reserve.cost_nanos, commit.cost_nanos, commit.currency) == (0, 2 * NANOS, "USD")


async def test_without_limits_any_quantity_is_committed(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="free", quantity=5)
    done = await sidecar.commit(made.reservation_id, quantity=10**12)
    assert (dict(done.committed), dict(done.unfunded)) == ({"free": 10**12}, {})


# Settling again, and what is unknown


async def test_settling_again_gives_the_same_answer_and_records_nothing(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(quantity=10)
    done = await sidecar.commit(made.reservation_id, quantity=5)
    assert await sidecar.commit(made.reservation_id, quantity=5) == done
    assert await sidecar.commit(made.reservation_id, quantity=9) == done
    assert await sidecar.cancel(made.reservation_id) == COMMITTED
    assert (await sidecar.extend(made.reservation_id)).state == COMMITTED
    assert (len(sidecar.events()), sidecar.used()) == (2, 10)


async def test_a_commit_joins_one_that_waits(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10)
    answers = await asyncio.gather(
        sidecar.commit(made.reservation_id, quantity=600),
        sidecar.commit(made.reservation_id, quantity=600),
        sidecar.cancel(made.reservation_id),
        sidecar.extend(made.reservation_id),
    )
    assert answers[0] == answers[1]
    assert (answers[2], answers[3].state) == (COMMITTED, COMMITTED)
    assert (len(sidecar.events()), sidecar.used()) == (2, 600)


async def test_a_caller_that_leaves_does_not_end_its_commit(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10)
    caller = asyncio.create_task(sidecar.commit(made.reservation_id, quantity=600))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    assert (await sidecar.commit(made.reservation_id)).committed == {"monthly": 600}


async def test_canceling_frees_everything_and_says_so(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(quantity=10)
    assert await sidecar.cancel(made.reservation_id) == CANCELED
    assert (sidecar.used(), sidecar.reserved()) == (0, 0)
    event = sidecar.events()[-1]
    assert (event.kind, event.about, event.units, event.spends) == (EventKind.CANCEL, made.reservation_id, {}, [])
    assert await sidecar.cancel(made.reservation_id) == CANCELED
    done = await sidecar.commit(made.reservation_id)
    assert (done.state, done.decision.effect, dict(done.committed)) == (CANCELED, pb.EFFECT_DENIED, {})
    assert len(sidecar.events()) == 2


async def test_what_was_never_made_is_unknown_and_recorded_nowhere(sidecar: FakeSidecar) -> None:
    done = await sidecar.commit(NOWHERE)
    assert (done.state, done.decision.effect, done.decision.decision_id) == (UNKNOWN, pb.EFFECT_DENIED, "")
    assert await sidecar.cancel(NOWHERE) == UNKNOWN
    extended = await sidecar.extend(NOWHERE)
    assert (extended.state, extended.HasField("expires_at")) == (UNKNOWN, False)
    assert sidecar.events() == []


async def test_the_reservation_of_another_tenant_is_unknown(sidecar: FakeSidecar) -> None:
    made = await sidecar.reserve(quantity=10)
    assert (await sidecar.commit(made.reservation_id, tenant="globex")).state == UNKNOWN
    assert await sidecar.cancel(made.reservation_id, tenant="globex") == UNKNOWN
    assert sidecar.reserved() == 20
    await sidecar.commit(made.reservation_id)
    assert (await sidecar.commit(made.reservation_id, tenant="globex")).state == UNKNOWN


@pytest.mark.parametrize("id_", ["", "x" * 32, "A" * 32, "0" * 31, "0" * 33, f"{'0' * 32}\n"], ids=repr)
async def test_an_id_that_is_none_is_malformed(sidecar: FakeSidecar, id_: str) -> None:
    for call in (sidecar.commit(id_), sidecar.cancel(id_), sidecar.extend(id_)):
        with pytest.raises(Malformed, match=r"^reservation_id: "):
            await call


async def test_a_tenant_that_is_none_is_malformed(sidecar: FakeSidecar) -> None:
    with pytest.raises(Malformed, match=r"^tenant: "):
        await sidecar.commit(NOWHERE, tenant="")


async def test_an_outcome_is_known_for_ten_minutes(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=10)
    await sidecar.cancel(made.reservation_id)
    world.advance(599)
    await sidecar.upkeep()
    assert await sidecar.cancel(made.reservation_id) == CANCELED
    world.advance(1)
    await sidecar.upkeep()
    assert await sidecar.cancel(made.reservation_id) == UNKNOWN


# Expiring


async def test_nobody_settles_it_and_it_expires(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=10, after_s=5)
    world.advance(4.9)
    await sidecar.upkeep()
    assert sidecar.reserved() == 20
    world.advance(0.1)
    await sidecar.upkeep()
    assert (sidecar.used(), sidecar.reserved()) == (0, 0)
    event = sidecar.events()[-1]
    assert (event.kind, event.about, event.units) == (EventKind.EXPIRE, made.reservation_id, {})
    done = await sidecar.commit(made.reservation_id)
    assert (done.state, done.decision.effect) == (EXPIRED, pb.EFFECT_DENIED)
    assert await sidecar.cancel(made.reservation_id) == EXPIRED
    assert len(sidecar.events()) == 2


async def test_a_commit_that_is_late_finds_it_expired_before_anybody_looked(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=10, after_s=5)
    world.advance(5)
    assert (await sidecar.commit(made.reservation_id)).state == EXPIRED
    assert sidecar.events()[-1].kind == EventKind.EXPIRE


async def test_it_expires_to_a_commit_when_the_action_says_so(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="paid-late", quantity=10)
    await told(world, sidecar)
    world.advance(58)
    await sidecar.upkeep()
    assert (sidecar.used(), sidecar.reserved()) == (10, 0)
    event = sidecar.events()[-1]
    assert (event.kind, event.units, event.flags & FLAG_EXPIRED) == (EventKind.COMMIT, {"monthly": 10}, FLAG_EXPIRED)
    done = await sidecar.commit(made.reservation_id, quantity=3)
    assert (done.state, dict(done.committed)) == (COMMITTED, {"monthly": 10})


async def test_one_that_redis_was_not_told_of_expires_to_a_commit_once_it_was_asked(
    sidecar: FakeSidecar, world: World
) -> None:
    await sidecar.reserve(action="paid-late", quantity=10)
    world.advance(HOLD_MS / 1_000 + 1)
    await sidecar.upkeep()
    await until(lambda: not sidecar.reservations.open_count)
    assert (sidecar.used(), sidecar.reserved()) == (10, 0)


async def test_many_expire_without_stopping_the_checks(
    sidecar: FakeSidecar, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("licet_sidecar.services.reserving.EXPIRED_PER_STEP_MAX", 3)
    for _ in range(10):
        await sidecar.reserve(action="monthly", after_s=5)
    await sidecar.reserve(action="paid-late", after_s=5)
    world.advance(5)
    await sidecar.upkeep()
    assert (sidecar.reserved(), sidecar.used(), sidecar.reservations.open_count) == (0, 1, 0)


async def test_extending_counts_from_now(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=10, after_s=5)
    world.advance(4)
    extended = await sidecar.extend(made.reservation_id, after_s=5)
    assert (extended.state, extended.expires_at.ToMicroseconds()) == (HELD, world.clock.us + 5_000_000)
    event = sidecar.events()[-1]
    assert (event.kind, event.about, event.expires_us) == (
        EventKind.EXTEND,
        made.reservation_id,
        world.clock.us + 5_000_000,
    )
    world.advance(4)
    await sidecar.upkeep()
    assert sidecar.reserved() == 20
    world.advance(1)
    await sidecar.upkeep()
    assert sidecar.reserved() == 0


async def test_extending_without_a_time_is_for_as_long_as_the_action_says(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=10, after_s=5)
    assert (await sidecar.extend(made.reservation_id)).expires_at.ToMicroseconds() == world.clock.us + 900_000_000
    with pytest.raises(Malformed, match=r"^expires_after: "):
        await sidecar.extend(made.reservation_id, after_s=0.5)


async def test_it_does_not_expire_while_its_commit_waits(
    sidecar: FakeSidecar, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, answered = sidecar.store.settle, asyncio.Event()

    async def slow(*arguments: Any) -> Any:
        await answered.wait()
        return await settle(*arguments)

    made = await sidecar.reserve(action="monthly", quantity=10, after_s=5)
    monkeypatch.setattr(sidecar.store, "settle", slow)
    waiting = asyncio.create_task(sidecar.commit(made.reservation_id, quantity=600))
    await asyncio.sleep(0.001)
    world.advance(6)
    await sidecar.service.reserving.upkeep()
    assert sidecar.reserved() == 10
    answered.set()
    assert (await waiting).state == COMMITTED


# Windows


async def test_a_commit_after_the_windows_end_is_spent_in_the_window_reserved_in(
    sidecar: FakeSidecar, world: World
) -> None:
    made = await sidecar.reserve(quantity=60)
    (reserve,) = sidecar.events()
    await told(world, sidecar)
    world.advance(60)
    assert (await sidecar.check(quantity=100)).effect == pb.EFFECT_APPROVED  # the next minute is all there
    done = await sidecar.commit(made.reservation_id, quantity=50)
    assert (done.state, dict(done.committed), dict(done.unfunded)) == (COMMITTED, {"reports": 50}, {})
    assert sidecar.events()[-1].spends == [[quota, 50] for quota, _ in reserve.held]


async def test_a_commit_long_after_the_windows_end_still_finds_its_lease(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=60)
    await told(world, sidecar)
    for _ in range(10):
        world.advance(60)
        await sidecar.upkeep()
    done = await sidecar.commit(made.reservation_id)
    assert (done.state, dict(done.committed)) == (COMMITTED, {"reports": 60})
    await told(world, sidecar)
    assert not [lease for lease in sidecar.leases.of("acme").all() if lease.reserved]


async def test_what_exceeds_it_is_taken_in_the_current_window(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=60)
    await told(world, sidecar)
    world.advance(60)
    done = await sidecar.commit(made.reservation_id, quantity=130)
    assert (dict(done.committed), dict(done.unfunded)) == ({"reports": 130}, {})
    minute = window_at(Period.MINUTE, world.clock.us // 1_000_000).start
    spends = dict(map(tuple, sidecar.events()[-1].spends))
    assert spends[f"reports:minute:{minute}"] == 70
    assert spends[f"reports:minute:{minute - 60}"] == 60
    assert sum(units for quota, units in spends.items() if "month" in quota) == 130


# What Redis knows


async def test_redis_learns_what_is_held_within_one_upkeep(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10)
    world.advance(0.5)
    await sidecar.upkeep()
    assert registered(world, sidecar, "monthly") == (0, 10)
    await sidecar.commit(made.reservation_id, quantity=4)
    world.advance(0.5)
    await sidecar.upkeep()
    assert registered(world, sidecar, "monthly") == (4, 0)
    canceled = await sidecar.reserve(action="monthly", quantity=5)
    world.advance(0.5)
    await sidecar.upkeep()
    await sidecar.cancel(canceled.reservation_id)
    world.advance(0.5)
    await sidecar.upkeep()
    assert registered(world, sidecar, "monthly") == (4, 0)


async def test_what_redis_was_told_of_is_committed_however_long_it_is_away(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10, after_s=3_600)
    await told(world, sidecar)
    sidecar.link.failed(LinkDown("gone"))
    world.clock.advance(2 * HOLD_MS / 1_000)
    done = await sidecar.commit(made.reservation_id)
    assert (done.state, dict(done.committed)) == (COMMITTED, {"monthly": 10})


async def test_what_redis_was_never_told_of_is_not_certain_once_the_hold_is_over(
    sidecar: FakeSidecar, world: World
) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10, after_s=3_600)
    sidecar.link.failed(LinkDown("gone"))
    world.clock.advance(2 * HOLD_MS / 1_000)
    done = await sidecar.commit(made.reservation_id)
    assert (done.state, done.decision.effect) == (COMMITTED, pb.EFFECT_DENIED)
    assert (done.decision.reason, dict(done.unfunded)) == (pb.REASON_DEGRADED_DENY, {"monthly": 10})
    assert (sidecar.used(), sidecar.reserved()) == (0, 0)
    event = sidecar.events()[-1]
    assert (event.kind, event.effect, event.units) == (EventKind.COMMIT, Effect.DENIED, {"monthly": 0})
    assert event.unfunded == {"monthly": 10}


async def test_within_the_hold_it_is_certain_without_redis(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10, after_s=3_600)
    sidecar.link.failed(LinkDown("gone"))
    world.clock.advance(HOLD_MS / 1_000 - 1)
    assert dict((await sidecar.commit(made.reservation_id)).committed) == {"monthly": 10}


async def test_a_commit_after_the_hold_asks_redis_first(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=1_000, after_s=3_600)
    world.advance(2 * HOLD_MS / 1_000)
    done = await sidecar.commit(made.reservation_id)
    assert (done.state, dict(done.committed), dict(done.unfunded)) == (COMMITTED, {"monthly": 1_000}, {})


# A log that is full


async def test_a_log_that_is_full_holds_nothing(world: World) -> None:
    async with running(world, log_bytes_max=1) as sidecar:
        denied = await sidecar.reserve(action="monthly", quantity=10)
        assert (denied.decision.effect, denied.decision.reason) == (pb.EFFECT_DENIED, pb.REASON_USAGE_LOG_FULL)
        allowed = await sidecar.reserve(action="open", quantity=10)
        assert (allowed.decision.effect, allowed.decision.reason) == (pb.EFFECT_APPROVED, pb.REASON_USAGE_LOG_FULL)
        assert (denied.reservation_id, allowed.reservation_id, sidecar.reserved()) == ("", "", 0)


async def test_a_log_that_is_full_settles_nothing(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10, after_s=60)
    room = sidecar.log._bytes_max
    sidecar.log._bytes_max = 1
    for quantity in (5, 600):
        done = await sidecar.commit(made.reservation_id, quantity=quantity)
        assert (done.state, done.decision.reason) == (HELD, pb.REASON_USAGE_LOG_FULL)
        assert (sidecar.used(), sidecar.reserved()) == (0, 10)
    assert await sidecar.cancel(made.reservation_id) == HELD
    expires_at = made.expires_at.ToMicroseconds()
    extended = await sidecar.extend(made.reservation_id, after_s=90)
    assert (extended.state, extended.expires_at.ToMicroseconds()) == (HELD, expires_at)
    world.advance(60)
    await sidecar.upkeep()
    assert sidecar.reserved() == 10
    sidecar.log._bytes_max = room
    await sidecar.upkeep()
    assert (sidecar.reserved(), sidecar.events()[-1].kind) == (0, EventKind.EXPIRE)


# Restarts


async def test_a_reservation_survives_a_kill(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=10, idempotency_key="k")
    again = await restarted(world, sidecar)
    try:
        assert (again.used(), again.reserved()) == (0, 20)
        repeated = await again.reserve(quantity=10, idempotency_key="k")
        assert (repeated.reservation_id, repeated.expires_at) == (made.reservation_id, made.expires_at)
        done = await again.commit(made.reservation_id, quantity=7)
        assert (done.state, dict(done.committed)) == (COMMITTED, {"reports": 7})
        assert (again.used(), again.reserved()) == (14, 0)
    finally:
        await again.stop()


@pytest.mark.parametrize("quantity", [10, 10**9])
async def test_a_key_that_only_the_log_knows_is_compared_with_what_was_asked(
    sidecar: FakeSidecar, world: World, quantity: int
) -> None:
    """Also when that was denied, and nothing was held."""
    first = await sidecar.reserve(action="monthly", quantity=quantity, idempotency_key="k")
    again = await restarted(world, sidecar)
    try:
        with pytest.raises(Malformed, match="idempotency_key"):
            await again.reserve(action="monthly", quantity=7, idempotency_key="k")
        repeated = await again.reserve(action="monthly", quantity=quantity, idempotency_key="k")
        assert repeated.decision.effect == first.decision.effect
        assert repeated.decision.decision_id == first.decision.decision_id
        committed = repeated.reservation_id and await again.commit(repeated.reservation_id)
        assert bool(committed) is (first.decision.effect == pb.EFFECT_APPROVED)
        if committed:
            # The window's word is there though nothing was decided from this lease since.
            assert [one.window for one in committed.decision.quotas] == ["month"]
    finally:
        await again.stop()


async def test_outcomes_survive_kills(sidecar: FakeSidecar, world: World) -> None:
    ids = [(await sidecar.reserve(action="monthly", quantity=400)).reservation_id for _ in range(2)]
    expiring = (await sidecar.reserve(action="monthly", quantity=1, after_s=5)).reservation_id
    done = await sidecar.commit(ids[0], quantity=900)
    await sidecar.cancel(ids[1])
    world.advance(5)
    await sidecar.upkeep()
    second = await restarted(world, sidecar)
    third = await restarted(world, second, 3)
    try:
        again = await third.commit(ids[0], quantity=900)
        assert (again.state, again.committed, again.unfunded) == (done.state, done.committed, done.unfunded)
        assert again.decision.decision_id == done.decision.decision_id
        assert await third.cancel(ids[1]) == CANCELED
        assert (await third.commit(expiring)).state == EXPIRED
        assert (third.reserved(), third.events()) == (0, [])
    finally:
        await third.stop()


async def test_what_expired_while_it_was_down_expires_at_the_start(sidecar: FakeSidecar, world: World) -> None:
    canceled = await sidecar.reserve(action="monthly", quantity=10, after_s=60)
    committed = await sidecar.reserve(action="paid-late", quantity=5)
    await told(world, sidecar)
    await sidecar.kill()
    world.advance(3_600)
    again = FakeSidecar(world, incarnation=2)
    again.start()
    await again.synced()
    try:
        await again.upkeep()
        assert (again.used(), again.reserved()) == (5, 0)
        assert (await again.commit(canceled.reservation_id)).state == EXPIRED
        assert (await again.commit(committed.reservation_id)).state == COMMITTED
    finally:
        await again.stop()


async def test_an_extension_survives_a_kill(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10, after_s=5)
    await sidecar.extend(made.reservation_id, after_s=500)
    world.advance(100)
    again = await restarted(world, sidecar)
    try:
        await again.upkeep()
        assert again.reserved() == 10
    finally:
        await again.stop()


async def test_a_rotated_log_alone_tells_what_is_held(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10, context={"team": "red"})
    await sidecar.check(action="monthly", quantity=7)
    sidecar.log.rotate([*sidecar.leasing.lease_records(), *sidecar.service.reserving.records()])
    again = await restarted(world, sidecar)
    try:
        assert (again.used(), again.reserved()) == (7, 10)
        assert (await again.commit(made.reservation_id)).state == COMMITTED
    finally:
        await again.stop()


async def test_a_window_long_over_is_committed_after_a_restart(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(quantity=10, after_s=7 * 86_400)
    (reserve,) = sidecar.events()
    await told(world, sidecar)
    await sidecar.kill()
    world.advance(6 * 3_600)
    second = FakeSidecar(world, incarnation=2)
    second.start()
    await second.synced()
    await second.upkeep()
    third = await restarted(world, second, 3)
    try:
        done = await third.commit(made.reservation_id)
        assert (done.state, dict(done.committed)) == (COMMITTED, {"reports": 10})
        assert third.events()[-1].spends == [[quota, 10] for quota, _ in reserve.held]
    finally:
        await third.stop()


async def test_what_redis_was_told_of_stays_certain_after_a_restart_without_it(
    sidecar: FakeSidecar, world: World
) -> None:
    made = await sidecar.reserve(action="monthly", quantity=10)
    await told(world, sidecar)
    again = await restarted(world, sidecar)
    try:
        again.link.failed(LinkDown("gone"))
        done = await again.commit(made.reservation_id)
        assert (done.state, dict(done.committed), dict(done.unfunded)) == (COMMITTED, {"monthly": 10}, {})
    finally:
        await again.stop()


async def test_a_restarted_sidecar_asks_redis_about_what_it_never_told(sidecar: FakeSidecar, world: World) -> None:
    made = await sidecar.reserve(action="monthly", quantity=1_000)
    again = await restarted(world, sidecar)
    try:
        world.advance(0.1)
        done = await again.commit(made.reservation_id)
        assert (dict(done.committed), dict(done.unfunded)) == ({"monthly": 1_000}, {})
    finally:
        await again.stop()


async def test_metrics_count_what_became_of_them(sidecar: FakeSidecar, world: World) -> None:
    ids = [(await sidecar.reserve(action="monthly", after_s=5)).reservation_id for _ in range(4)]
    await sidecar.reserve(action="paid-late", after_s=5)
    await sidecar.commit(ids[0])
    await sidecar.cancel(ids[1])
    assert sidecar.reservations.open_count == 3
    world.advance(5)
    await sidecar.upkeep()
    assert sidecar.tally.reservations_settled == {
        "committed": 1,
        "canceled": 1,
        "expired": 2,
        "committed_on_expiry": 1,
    }


async def under_a_new_id(
    world: World, before: FakeSidecar, sidecar: str = "6" * 32, *, moved: bool = False
) -> FakeSidecar:
    """The next process on the same state directory, whose id was sealed or cannot be trusted any more."""
    await before.kill()
    after = FakeSidecar(world, sidecar=sidecar, directory=world.directory, moved=moved)
    after.start()
    await after.synced()
    return after


async def test_what_was_reserved_under_an_id_that_was_sealed_is_decided_anew_when_committed(
    sidecar: FakeSidecar, world: World
) -> None:
    kept = await sidecar.reserve(action="monthly", quantity=40)
    canceled = await sidecar.reserve(action="monthly", quantity=10)
    settled = await sidecar.reserve(action="monthly", quantity=5)
    await sidecar.commit(settled.reservation_id)
    await told(world, sidecar)
    again = await under_a_new_id(world, sidecar)
    third: FakeSidecar | None = None
    try:
        assert (again.used(), again.reserved()) == (0, 0), "its leases were the other id's"
        done = await again.commit(kept.reservation_id, quantity=30)
        assert (done.state, dict(done.committed), dict(done.unfunded)) == (COMMITTED, {"monthly": 30}, {})
        assert again.used() == 30
        (commit,) = again.events()
        assert (commit.kind, commit.about, commit.units) == (EventKind.COMMIT, kept.reservation_id, {"monthly": 30})
        assert [units for _, units in commit.spends] == [30]
        assert (await again.commit(settled.reservation_id)).state == COMMITTED, "as it was"
        assert again.used() == 30
        # And under a third id only what the second left open.
        third = await under_a_new_id(world, again, "7" * 32)
        assert [one.id for one in third.reservations.all()] == [canceled.reservation_id]
        assert await third.cancel(canceled.reservation_id) == CANCELED
    finally:
        await (third or again).stop()


async def test_a_commit_of_what_is_all_gone_meanwhile_is_recorded_as_unfunded(
    sidecar: FakeSidecar, world: World
) -> None:
    made = await sidecar.reserve(action="monthly", quantity=900)  # counted in the register, which stays as it is
    await told(world, sidecar)
    again = await under_a_new_id(world, sidecar)
    try:
        done = await again.commit(made.reservation_id)
        assert (done.state, dict(done.unfunded)) == (COMMITTED, {"monthly": 900})
        assert done.decision.reason == pb.REASON_QUOTA_EXHAUSTED
        assert again.events()[-1].unfunded == {"monthly": 900}
    finally:
        await again.stop()


@pytest.mark.parametrize(
    ("moved", "kind", "state"),
    [(False, EventKind.COMMIT, COMMITTED), (True, EventKind.EXPIRE, EXPIRED)],
    ids=["here", "perhaps-a-copy"],
)
async def test_what_was_reserved_under_another_id_expires(
    sidecar: FakeSidecar, world: World, moved: bool, kind: EventKind, state: Any
) -> None:
    # Of a directory that may be a copy the original may be at work, and commit the same by itself.
    made = await sidecar.reserve(action="paid-late", quantity=5)
    await told(world, sidecar)
    again = await under_a_new_id(world, sidecar, moved=moved)
    try:
        world.advance(61)
        world.publisher.beat(world.clock.us, epoch=1)
        again.hear_head()
        await again.upkeep()
        await until(lambda: again.events() and not any(again.reservations.all()))
        assert [(one.kind, one.about) for one in again.events()] == [(kind, made.reservation_id)]
        assert (await again.commit(made.reservation_id)).state == state
    finally:
        await again.stop()


async def test_a_reservation_of_an_action_for_seats_says_that_it_takes_none(world: World) -> None:
    world.push(content(Plan("pro", {"reports": Entitlement(seats=2), "free": Entitlement()})))
    async with running(world) as sidecar:
        made = await sidecar.reserve()
        assert (made.decision.effect, bool(made.reservation_id)) == (pb.EFFECT_APPROVED, True)
        assert "AcquireSeat" in made.decision.message
        assert (await sidecar.reserve(action="free")).decision.message == ""
