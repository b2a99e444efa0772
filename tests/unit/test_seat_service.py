"""Seats end to end inside one process: real services and log, a model of Redis, and a clock that stands still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Enforcement,
    Entitlement,
    OnUnavailable,
    Plan,
    Policy,
    Role,
    Rule,
    RuleEffect,
    UnavailableMode,
    seats_key,
)
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import EventKind
from licet_sidecar.ports import LinkDown
from licet_sidecar.services.approval import Malformed, NotReady
from tests.support.published import catalog
from tests.support.sidecar import FakeSidecar, World, ask, running, until

HEARTBEAT_S = 60
OTHER = "7" * 32
ALLOW = OnUnavailable(UnavailableMode.ALLOW)
EDITOR = Entitlement(seats=2, heartbeat_s=HEARTBEAT_S)
CATALOG = catalog(
    Action("editor.open", {"": "editor"}, {"note": Attribute(AttributeType.STRING, "")}),
    Action("editor.peek", {"": "editor"}, on_unavailable=ALLOW),
    Action("studio.open", {"": "studio"}),
    Plan("pro", {"reports": Entitlement(), "editor": EDITOR, "studio": Entitlement()}),
    Plan("large", {"editor": Entitlement(seats=3, heartbeat_s=HEARTBEAT_S)}),
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.push(CATALOG)
    world.license("acme")
    return world


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as sidecar:
        yield sidecar


@pytest.fixture
async def other(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world, sidecar=OTHER) as sidecar:
        yield sidecar


async def acquire(
    sidecar: FakeSidecar, who: str = "ada", action: str = "editor.open", *, timeout_s: float = 2.0, **fields: Any
) -> pb.AcquireSeatResponse:
    request = pb.AcquireSeatRequest(check=ask(action=action, subject={"type": "user", "id": who}, **fields))
    return pb.AcquireSeatResponse.FromString(await sidecar.call("AcquireSeat", request, timeout_s=timeout_s))


async def renew(sidecar: FakeSidecar, seat_id: str, *, timeout_s: float = 2.0) -> pb.RenewSeatResponse:
    request = pb.RenewSeatRequest(tenant="acme", seat_id=seat_id)
    return pb.RenewSeatResponse.FromString(await sidecar.call("RenewSeat", request, timeout_s=timeout_s))


async def release(sidecar: FakeSidecar, seat_id: str, *, timeout_s: float = 2.0) -> str:
    request = pb.ReleaseSeatRequest(tenant="acme", seat_id=seat_id)
    response = pb.ReleaseSeatResponse.FromString(await sidecar.call("ReleaseSeat", request, timeout_s=timeout_s))
    return pb.SeatState.Name(response.state)


def events(sidecar: FakeSidecar) -> list[tuple[str, str, str]]:
    """(kind, subject, about) of what was logged."""
    return [(EventKind(event.kind).name, event.subject_id, event.about) for event in sidecar.events()]


def holders(world: World) -> int:
    return len(world.seats.live("acme", "editor"))


async def upkeep(sidecar: FakeSidecar) -> None:
    """One round, once the calls under way have ended."""
    for _ in range(20):
        await asyncio.sleep(0)
    await sidecar.seats.upkeep()


async def pass_time(world: World, seconds: float, *sidecars: FakeSidecar, step_s: float = 10.0) -> None:
    """Lets time pass with upkeep, and nobody heard of."""
    left_s = seconds
    while left_s > 0:
        world.advance(min(step_s, left_s))
        left_s -= step_s
        for sidecar in sidecars:
            await upkeep(sidecar)
            await upkeep(sidecar)


# Acquiring


async def test_gives_a_seat_and_says_how_many_are_left(world: World, sidecar: FakeSidecar) -> None:
    response = await acquire(sidecar)
    assert (response.decision.effect, response.decision.reason) == (pb.EFFECT_APPROVED, pb.REASON_OK)
    assert response.seat_id.startswith("editor:")
    assert (response.seats, response.seats_taken, response.heartbeat.seconds) == (2, 1, HEARTBEAT_S)
    assert response.expires_at.ToMicroseconds() == world.clock.now_us() + 2 * HEARTBEAT_S * 1_000_000
    (event,) = sidecar.events()
    assert (event.kind, event.about, event.units, event.cost_nanos) == (
        EventKind.SEAT_ACQUIRE, response.seat_id, {}, 0,
    )  # fmt: skip
    assert response.decision.decision_id.endswith(f"{event.seq:016x}")


async def test_denies_when_all_seats_are_taken(world: World, sidecar: FakeSidecar) -> None:
    await acquire(sidecar, "ada")
    await acquire(sidecar, "bob")
    response = await acquire(sidecar, "eve")
    decision = response.decision
    assert (decision.effect, decision.reason) == (pb.EFFECT_DENIED, pb.REASON_SEAT_UNAVAILABLE)
    assert decision.message == "All 2 seats of editor are taken (2 holders)."
    assert decision.rule == "editor#seats"
    assert 0 < decision.retry_after.seconds <= 75
    assert (response.seat_id, response.seats, response.seats_taken) == ("", 2, 2)
    assert events(sidecar)[-1] == ("SEAT_ACQUIRE", "eve", "")
    assert (sidecar.tally.seats_acquired, sidecar.tally.seats_denied, sidecar.tally.seats_held) == (2, 1, 2)


async def test_the_same_holder_gets_the_seat_it_has_on_every_sidecar(
    world: World, sidecar: FakeSidecar, other: FakeSidecar
) -> None:
    seats = {(await acquire(one)).seat_id for one in (sidecar, sidecar, other, sidecar)}
    assert len(seats) == 1
    assert holders(world) == 1


async def test_all_sidecars_together_give_no_more_than_there_are(
    world: World, sidecar: FakeSidecar, other: FakeSidecar
) -> None:
    responses = await asyncio.gather(
        *(acquire(one, f"user-{number}") for number in range(5) for one in (sidecar, other))
    )
    assert len({response.seat_id for response in responses if response.seat_id}) == 2


async def test_many_at_once_take_few_calls(world: World, sidecar: FakeSidecar) -> None:
    await acquire(sidecar, "ada")
    before = sidecar.seat_store.calls
    await asyncio.gather(*(acquire(sidecar, f"user-{number}") for number in range(50)))
    assert sidecar.seat_store.calls - before <= 2


async def test_decides_as_a_check_does_before_it_takes_a_seat(world: World, sidecar: FakeSidecar) -> None:
    world.push(
        catalog(
            *(document for document in CATALOG.documents()),
            Role("writer", ("editor.*",)),
            Policy(
                "guard", ("editor.open",), (Rule("note", RuleEffect.DENY, 'context.note == "no"'),), Enforcement.ENFORCE
            ),
        )
    )
    await sidecar.synced()
    request = pb.AcquireSeatRequest(check=ask(action="editor.open", subject={"id": "ada", "roles": ["writer"]}))
    request.check.context["note"].string_value = "no"
    denied = pb.AcquireSeatResponse.FromString(await sidecar.call("AcquireSeat", request))
    assert (denied.decision.reason, denied.decision.rule) == (pb.REASON_POLICY_DENIED, "guard/note")
    assert (await acquire(sidecar)).decision.reason == pb.REASON_ROLE_REQUIRED
    assert (await acquire(sidecar, tenant="nobody")).decision.reason == pb.REASON_NO_LICENSE
    assert (await acquire(sidecar, action="nothing")).decision.reason == pb.REASON_UNKNOWN_ACTION
    assert sidecar.seat_store.calls == 0
    assert {kind for kind, _, _ in events(sidecar)} == {"SEAT_ACQUIRE"}


async def test_a_feature_without_seats_is_not_entitled_to_any(sidecar: FakeSidecar) -> None:
    decision = (await acquire(sidecar, action="studio.open")).decision
    assert decision.reason == pb.REASON_NOT_ENTITLED
    assert decision.message == "Plan pro grants studio without seats: ask with Check."


async def test_peeking_takes_and_records_nothing(world: World, sidecar: FakeSidecar) -> None:
    response = await acquire(sidecar, mode=pb.MODE_PEEK)
    assert response.decision.effect == pb.EFFECT_APPROVED
    assert (response.seat_id, response.decision.decision_id, response.seats) == ("", "", 2)
    assert holders(world) == 0
    await acquire(sidecar, "ada")
    await acquire(sidecar, "bob")
    assert (await acquire(sidecar, "eve", mode=pb.MODE_PEEK)).decision.reason == pb.REASON_SEAT_UNAVAILABLE
    assert (await acquire(sidecar, "ada", mode=pb.MODE_PEEK)).decision.reason == pb.REASON_OK
    assert len(sidecar.events()) == 2


async def test_in_observe_mode_whoever_asks_is_approved_and_the_truth_is_recorded(
    world: World, sidecar: FakeSidecar
) -> None:
    world.push(CATALOG, observe=True)
    await sidecar.synced()
    for who in ("ada", "bob"):
        await acquire(sidecar, who)
    response = await acquire(sidecar, "eve")
    assert response.decision.effect == pb.EFFECT_APPROVED
    assert response.decision.metadata["observed_effect"] == "DENIED"
    assert response.seat_id == ""
    assert holders(world) == 2


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.AcquireSeatRequest(check=ask(action="editor.open")), "check.subject.id: "),
        (pb.AcquireSeatRequest(check=ask(action="editor.open", subject={"type": "user"})), "check.subject.id: "),
        (pb.AcquireSeatRequest(check=ask("", "editor.open", subject={"id": "a"})), "check.tenant: "),
        (pb.AcquireSeatRequest(check=ask(action="editor.open", subject={"id": "a"}, quantity=2)), "check.quantity: "),
        (
            pb.AcquireSeatRequest(check=ask(action="editor.open", subject={"id": "a"}, context={"note": 1})),
            "check.context.note: ",
        ),
    ],
)
async def test_a_malformed_request_is_refused_by_field(
    sidecar: FakeSidecar, request_: pb.AcquireSeatRequest, field: str
) -> None:
    with pytest.raises(Malformed) as caught:
        await sidecar.call("AcquireSeat", request_)
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize("method", ["RenewSeat", "ReleaseSeat"])
async def test_renewals_and_releases_name_tenant_and_seat(sidecar: FakeSidecar, method: str) -> None:
    for request, field in (
        (pb.RenewSeatRequest(tenant="", seat_id="editor:0"), "tenant: "),
        (pb.RenewSeatRequest(tenant="acme"), "seat_id: "),
        (pb.RenewSeatRequest(tenant="acme", seat_id="x" * 300), "seat_id: "),
    ):
        with pytest.raises(Malformed) as caught:
            await sidecar.call(method, request)
        assert str(caught.value).startswith(field)


async def test_the_same_key_gets_the_same_answer_while_the_seat_is_held(world: World, sidecar: FakeSidecar) -> None:
    first = await acquire(sidecar, idempotency_key="k")
    assert await acquire(sidecar, idempotency_key="k") == first
    assert len(sidecar.events()) == 1
    with pytest.raises(Malformed, match=r"^check\.idempotency_key: "):
        await acquire(sidecar, "bob", idempotency_key="k")
    await release(sidecar, first.seat_id)
    await acquire(sidecar, "bob")
    await acquire(sidecar, "eve")
    assert (await acquire(sidecar, idempotency_key="k")).decision.reason == pb.REASON_SEAT_UNAVAILABLE


async def test_a_repeat_joins_the_first_call(world: World, sidecar: FakeSidecar) -> None:
    one, two = await asyncio.gather(acquire(sidecar, idempotency_key="k"), acquire(sidecar, idempotency_key="k"))
    assert one == two
    assert len(sidecar.events()) == 1


async def test_a_key_of_a_check_is_another_one(sidecar: FakeSidecar) -> None:
    checked = await sidecar.check(action="editor.open", subject={"type": "user", "id": "ada"}, idempotency_key="k")
    acquired = await acquire(sidecar, idempotency_key="k")
    assert acquired.decision.decision_id != checked.decision_id
    assert acquired.seat_id


# Holding


async def test_a_heartbeat_is_answered_without_redis(world: World, sidecar: FakeSidecar) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    before = sidecar.seat_store.calls
    response = await renew(sidecar, seat_id)
    assert (response.state, response.degraded) == (pb.SEAT_STATE_HELD, False)
    assert sidecar.seat_store.calls == before


async def test_one_call_in_twenty_seconds_keeps_the_seats_of_a_tenant(world: World, sidecar: FakeSidecar) -> None:
    world.license("acme", "large")
    await sidecar.synced()
    seats = [(await acquire(sidecar, who)).seat_id for who in ("ada", "bob", "eve")]
    before = sidecar.seat_store.calls
    for _ in range(120):
        world.advance(0.5)
        await upkeep(sidecar)
        for seat_id in seats:
            await renew(sidecar, seat_id)
    assert sidecar.seat_store.calls - before == 3
    assert holders(world) == 3


async def test_a_silent_holder_loses_its_seat_after_two_heartbeats(world: World, sidecar: FakeSidecar) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    await pass_time(world, 2 * HEARTBEAT_S - 1, sidecar)
    assert holders(world) == 1
    await pass_time(world, 1, sidecar)
    await until(lambda: holders(world) == 0)
    assert (await renew(sidecar, seat_id)).state == pb.SEAT_STATE_RECLAIMED
    assert await release(sidecar, seat_id) == "SEAT_STATE_RECLAIMED"
    assert events(sidecar)[1:] == [("SEAT_RECLAIM", "ada", seat_id)]
    assert (sidecar.tally.seats_reclaimed, sidecar.tally.seats_held) == (1, 0)


async def test_a_seat_that_nobody_has_is_unknown(sidecar: FakeSidecar) -> None:
    for seat_id in ("editor:" + "0" * 32, "nonsense", "editor:xyz", "Editor:" + "0" * 32):
        assert (await renew(sidecar, seat_id)).state == pb.SEAT_STATE_UNKNOWN
        assert await release(sidecar, seat_id) == "SEAT_STATE_UNKNOWN"
    assert not sidecar.events()


async def test_releasing_frees_the_seat_for_others(world: World, sidecar: FakeSidecar, other: FakeSidecar) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    await acquire(sidecar, "bob")
    assert await release(sidecar, seat_id) == "SEAT_STATE_RELEASED"
    assert (await acquire(other, "eve")).seat_id
    assert await release(sidecar, seat_id) == "SEAT_STATE_RELEASED"  # said again
    assert (await renew(sidecar, seat_id)).state == pb.SEAT_STATE_RELEASED
    assert events(sidecar)[2:] == [("SEAT_RELEASE", "ada", seat_id)]


async def test_a_released_seat_can_be_acquired_again(world: World, sidecar: FakeSidecar) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    await release(sidecar, seat_id)
    assert (await acquire(sidecar)).seat_id == seat_id
    assert (await renew(sidecar, seat_id)).state == pb.SEAT_STATE_HELD


async def test_holders_keep_their_seats_when_there_are_fewer(world: World, sidecar: FakeSidecar) -> None:
    seats = [(await acquire(sidecar, who)).seat_id for who in ("ada", "bob")]
    world.push(catalog(*CATALOG.documents(), Plan("pro", {"editor": Entitlement(seats=1, heartbeat_s=HEARTBEAT_S)})))
    await sidecar.synced()
    await pass_time(world, 60, sidecar)
    assert [(await renew(sidecar, seat)).state for seat in seats] == [pb.SEAT_STATE_HELD] * 2
    assert (await acquire(sidecar, "eve")).decision.message == "All 1 seats of editor are taken (2 holders)."


async def test_more_seats_are_given_as_soon_as_they_are_published(world: World, sidecar: FakeSidecar) -> None:
    for who in ("ada", "bob"):
        await acquire(sidecar, who)
    world.license("acme", "large")
    await sidecar.synced()
    assert (await acquire(sidecar, "eve")).seats_taken == 3


# Several sidecars


async def test_a_renewal_at_another_sidecar_moves_the_seat_there(
    world: World, sidecar: FakeSidecar, other: FakeSidecar
) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    assert (await renew(other, seat_id)).state == pb.SEAT_STATE_HELD
    for _ in range(4):
        await pass_time(world, 50, sidecar, other)
        assert (await renew(other, seat_id)).state == pb.SEAT_STATE_HELD
    assert holders(world) == 1
    assert sidecar.tally.seats_held == 0
    assert not sidecar.seats.book.tenants
    assert events(sidecar) == [("SEAT_ACQUIRE", "ada", seat_id)]
    await pass_time(world, 2 * HEARTBEAT_S, sidecar, other)
    assert events(other) == [("SEAT_RECLAIM", "ada", seat_id)]  # whose it is came with it


async def test_a_release_at_another_sidecar_ends_the_seat(
    world: World, sidecar: FakeSidecar, other: FakeSidecar
) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    assert await release(other, seat_id) == "SEAT_STATE_RELEASED"
    assert events(other) == [("SEAT_RELEASE", "ada", seat_id)]
    assert holders(world) == 1  # the first one may still be telling its holder that it is held
    await pass_time(world, 30, sidecar)
    await until(lambda: holders(world) == 0)
    assert (await renew(sidecar, seat_id)).state == pb.SEAT_STATE_UNKNOWN


async def test_a_release_where_the_seat_was_before_ends_it_too(
    world: World, sidecar: FakeSidecar, other: FakeSidecar
) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    await renew(other, seat_id)
    assert await release(sidecar, seat_id) == "SEAT_STATE_RELEASED"
    await pass_time(world, 30, sidecar, other)
    await until(lambda: holders(world) == 0)
    assert (await renew(other, seat_id)).state == pb.SEAT_STATE_UNKNOWN


async def test_seats_of_a_sidecar_that_died_are_free_when_their_holds_end(
    world: World, sidecar: FakeSidecar, other: FakeSidecar
) -> None:
    for who in ("ada", "bob"):
        await acquire(sidecar, who)
    world.advance(74)
    assert (await acquire(other, "eve")).decision.reason == pb.REASON_SEAT_UNAVAILABLE
    world.advance(2)
    assert (await acquire(other, "eve")).seat_id


# Redis away, lost, learning


async def test_holders_are_kept_while_redis_is_away_and_told_when_that_is_over(
    world: World, sidecar: FakeSidecar
) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    sidecar.seat_store.down = LinkDown("Redis is away")
    await pass_time(world, 50, sidecar)
    response = await renew(sidecar, seat_id)
    assert (response.state, response.degraded) == (pb.SEAT_STATE_HELD, True)
    assert response.expires_at.ToMicroseconds() == world.clock.now_us() + 10_000_000
    await pass_time(world, 10, sidecar)
    response = await renew(sidecar, seat_id)
    assert (response.state, response.degraded) == (pb.SEAT_STATE_RECLAIMED, True)
    assert events(sidecar)[1:] == [("SEAT_RECLAIM", "ada", seat_id)]
    sidecar.seat_store.down = None
    sidecar.link.succeeded()
    response = await renew(sidecar, seat_id)
    assert (response.state, response.degraded) == (pb.SEAT_STATE_HELD, False)
    await pass_time(world, 20, sidecar)
    assert holders(world) == 1


async def test_a_seat_regained_is_recorded_and_one_that_was_given_away_is_not(
    world: World, sidecar: FakeSidecar, other: FakeSidecar
) -> None:
    seats = [(await acquire(sidecar, who)).seat_id for who in ("ada", "bob")]
    sidecar.seat_store.down = LinkDown("Redis is away")
    await pass_time(world, 70, sidecar)
    for seat_id in seats:
        await renew(sidecar, seat_id)
    sidecar.seat_store.down = None
    sidecar.link.succeeded()
    world.seats.contents.holders["acme", "editor"][seats[1].partition(":")[2]].ends_ms = 0
    assert (await renew(sidecar, seats[0])).state == pb.SEAT_STATE_HELD
    assert (await acquire(other, "eve")).seat_id
    assert (await renew(sidecar, seats[1])).state == pb.SEAT_STATE_RECLAIMED
    assert events(sidecar)[2:] == [
        ("SEAT_RECLAIM", "ada", seats[0]), ("SEAT_RECLAIM", "bob", seats[1]), ("SEAT_ACQUIRE", "ada", seats[0]),
    ]  # fmt: skip


async def test_without_redis_on_unavailable_decides(world: World, sidecar: FakeSidecar) -> None:
    await sidecar.check(action="editor.open", subject={"id": "ada"})
    sidecar.seat_store.down = LinkDown("Redis is away")
    denied = (await acquire(sidecar)).decision
    assert (denied.effect, denied.reason, denied.degraded) == (pb.EFFECT_DENIED, pb.REASON_DEGRADED_DENY, True)
    allowed = await acquire(sidecar, action="editor.peek")
    assert (allowed.decision.effect, allowed.decision.reason) == (pb.EFFECT_APPROVED, pb.REASON_DEGRADED_ALLOW)
    assert (allowed.seat_id, allowed.HasField("expires_at")) == ("", False)


async def test_what_cannot_be_known_without_redis_is_not_answered(
    world: World, sidecar: FakeSidecar, other: FakeSidecar
) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    other.seat_store.down = LinkDown("Redis is away")
    with pytest.raises(NotReady, match="cannot be said just now: Redis is away"):
        await renew(other, seat_id)
    with pytest.raises(NotReady, match="cannot be released just now"):
        await release(other, seat_id)


async def test_a_release_without_redis_is_done_and_told_later(world: World, sidecar: FakeSidecar) -> None:
    seat_id = (await acquire(sidecar)).seat_id
    sidecar.seat_store.down = LinkDown("Redis is away")
    assert await release(sidecar, seat_id) == "SEAT_STATE_RELEASED"
    assert (await renew(sidecar, seat_id)).state == pb.SEAT_STATE_RELEASED
    assert holders(world) == 1
    sidecar.seat_store.down = None
    await pass_time(world, 3, sidecar)
    assert holders(world) == 0


async def test_after_a_loss_everything_held_is_asserted_before_this_is_said(world: World, sidecar: FakeSidecar) -> None:
    seats = [(await acquire(sidecar, who)).seat_id for who in ("ada", "bob")]
    world.registers.wipe("run2")
    world.seats.wipe()
    world.registers.begin("acme", 2)
    sidecar.seats.assert_all(2, "run2")
    await upkeep(sidecar)  # learns the pair
    assert sidecar.seats.asserted.epoch == 0
    await upkeep(sidecar)
    assert sidecar.seats.asserted == (2, "run2")
    assert holders(world) == 2
    assert (await acquire(sidecar, "eve", timeout_s=0.2)).decision.reason == pb.REASON_DEGRADED_DENY
    pair = world.registers.contents.marks["acme"].pair
    world.registers.open("acme", pair, world.publisher.revision, {seats_key("editor"): 2})
    assert (await acquire(sidecar, "eve")).decision.reason == pb.REASON_SEAT_UNAVAILABLE
    assert [(await renew(sidecar, seat)).state for seat in seats] == [pb.SEAT_STATE_HELD] * 2


async def test_a_lost_set_is_reported_to_the_control_plane(world: World, sidecar: FakeSidecar) -> None:
    await acquire(sidecar)
    world.seats.lose_set("acme", "editor")
    assert (await acquire(sidecar, "bob", timeout_s=0.2)).decision.reason == pb.REASON_DEGRADED_DENY
    assert ("acme", "quota-lost") in world.registers.asks


# Restarts and logs


async def test_seats_survive_a_restart(world: World) -> None:
    async with running(world) as before:
        seats = [(await acquire(before, who)).seat_id for who in ("ada", "bob", "eve")][:2]
        await release(before, seats[1])
    async with running(world, incarnation=2) as after:
        assert after.tally.seats_held == 0  # nothing is vouched for before Redis was asked
        assert (await renew(after, seats[0])).state == pb.SEAT_STATE_HELD
        await pass_time(world, 90, after)
        assert holders(world) == 1
        await pass_time(world, 60, after)
        assert events(after) == [("SEAT_RECLAIM", "ada", seats[0])]
    async with running(world, incarnation=3) as again:
        assert not again.seats.book.tenants


async def test_seats_survive_the_change_to_a_new_segment(world: World) -> None:
    async with running(world) as before:
        seat_id = (await acquire(before)).seat_id
        before.log.rotate(before.seats.records())
    async with running(world, incarnation=2) as after:
        await upkeep(after)
        await upkeep(after)
        assert after.seats.book.find("acme", seat_id)


async def test_a_seat_lost_during_a_restart_is_recorded_as_reclaimed(world: World) -> None:
    async with running(world) as before:
        seat_id = (await acquire(before)).seat_id
    world.advance(80)
    async with running(world, incarnation=2) as after:
        await pass_time(world, 1, after)
        assert events(after) == [("SEAT_RECLAIM", "ada", seat_id)]
        assert (await renew(after, seat_id)).state == pb.SEAT_STATE_RECLAIMED


async def test_after_a_restart_without_redis_nothing_is_vouched_for(world: World) -> None:
    async with running(world) as before:
        seat_id = (await acquire(before)).seat_id
    async with running(world, incarnation=2) as after:
        after.seat_store.down = LinkDown("Redis is away")
        with pytest.raises(NotReady):
            await renew(after, seat_id)


async def test_a_seat_that_cannot_be_recorded_is_not_given(world: World) -> None:
    async with running(world, log_bytes_max=1) as sidecar:
        decision = (await acquire(sidecar)).decision
        assert (decision.effect, decision.reason) == (pb.EFFECT_DENIED, pb.REASON_USAGE_LOG_FULL)
        await until(lambda: holders(world) == 0)
        allowed = await acquire(sidecar, action="editor.peek")
        assert (allowed.decision.effect, allowed.decision.reason) == (pb.EFFECT_APPROVED, pb.REASON_USAGE_LOG_FULL)
        assert allowed.seat_id


async def test_a_caller_that_left_leaves_no_seat_behind(world: World, sidecar: FakeSidecar) -> None:
    await sidecar.check(action="editor.open", subject={"id": "ada"})
    call = asyncio.ensure_future(acquire(sidecar))
    await until(lambda: sidecar.seats.book.of("acme").outstanding)
    call.cancel()
    await until(lambda: call.cancelled() and holders(world) == 0 and not sidecar.seats.book.of("acme").leaving)
    assert not any(kind.startswith("SEAT") for kind, _, _ in events(sidecar))
