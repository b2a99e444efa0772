"""Seats on real processes: restarts, kills, an outage and a loss of Redis, through the SDK and the command line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import count

import pytest

import licet
from licet.wire.names import RedisNames
from tests.support.fleet import Fleet, wait_until
from tests.support.ledger import recorded_decisions

CATALOG = """\
kind: Feature
name: editor
unit: seat
---
kind: Action
name: editor.open
feature: editor
---
kind: Plan
name: slow
features:
  editor: {seats: 2, heartbeat: 60s}
---
kind: Plan
name: quick
features:
  editor: {seats: 2, heartbeat: 1s}
"""
ACTION = "editor.open"
AWAY_S = 5
_tenants = count(1)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), count=2)
    try:
        fleet.start()
        fleet.push(CATALOG)
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def clients(fleet: Fleet) -> Iterator[list[licet.Client]]:
    made = [licet.Client(address, timeout=3.0) for address in fleet.addresses]
    yield made
    for client in made:
        client.close()


def tenant(fleet: Fleet, plan: str) -> str:
    name = f"tenant-{next(_tenants)}"
    fleet.licet("license", "create", name, "--plan", plan, "--wait")
    return name


def renewed(client: licet.Client, name: str, seat_id: str) -> licet.SeatRenewal:
    """The first answer that is one."""
    answers: list[licet.SeatRenewal] = []

    def ask() -> bool:
        try:
            answers.append(client.renew_seat(name, seat_id))
        except licet.SidecarUnavailable:
            return False
        return True

    wait_until("the sidecar can say whether the seat is held", ask)
    return answers[-1]


def test_seats_survive_a_killed_sidecar_and_are_counted_over_all(fleet: Fleet, clients: list[licet.Client]) -> None:
    name = tenant(fleet, "slow")
    ada = clients[0].acquire_seat(name, ACTION, subject="ada")
    bob = clients[1].acquire_seat(name, ACTION, subject="bob")
    assert (ada.seat_id != bob.seat_id, bob.seats, bob.taken) == (True, 2, 2)
    denied = clients[0].acquire_seat(name, ACTION, subject="eve")
    assert (bool(denied), denied.decision.reason) == (False, licet.Reason.SEAT_UNAVAILABLE)
    fleet.sidecars[0].kill()
    fleet.sidecars[0].start()
    fleet.wait_ready(0)
    assert renewed(clients[0], name, ada.seat_id)
    assert clients[1].acquire_seat(name, ACTION, subject="eve").decision.reason is licet.Reason.SEAT_UNAVAILABLE
    assert clients[0].release_seat(name, ada.seat_id) is licet.SeatState.RELEASED
    assert clients[1].acquire_seat(name, ACTION, subject="eve")

    asked = (ada, bob, denied)
    wait_until(
        "the ledger has every answer",
        lambda: {seat.decision.decision_id for seat in asked} <= recorded_decisions(fleet).keys(),
    )
    ledger = recorded_decisions(fleet)
    assert [ledger[seat.decision.decision_id][0] for seat in asked] == [seat.decision.effect for seat in asked]


def test_holders_of_a_sidecar_that_stays_dead_move_or_lose_their_seats(
    fleet: Fleet, clients: list[licet.Client]
) -> None:
    name = tenant(fleet, "slow")
    ada, bob = (clients[0].acquire_seat(name, ACTION, subject=who) for who in ("ada", "bob"))
    fleet.sidecars[0].kill()
    try:
        assert clients[1].renew_seat(name, ada.seat_id)
        assert clients[1].acquire_seat(name, ACTION, subject="eve").decision.reason is licet.Reason.SEAT_UNAVAILABLE
        # What 75 seconds would bring: bob's hold is over.
        key = RedisNames().seats(name, "editor")
        fleet.valkey.command("ZADD", key, str(time.time_ns() // 1_000_000 - 1), bob.seat_id.partition(":")[2])
        assert clients[1].acquire_seat(name, ACTION, subject="eve")
        assert clients[1].renew_seat(name, bob.seat_id).state is licet.SeatState.UNKNOWN
    finally:
        fleet.sidecars[0].start()
        fleet.wait_ready(0)
    assert renewed(clients[0], name, bob.seat_id).state is licet.SeatState.RECLAIMED
    assert clients[1].renew_seat(name, ada.seat_id)


def test_holders_keep_their_seats_while_redis_is_away(fleet: Fleet, clients: list[licet.Client]) -> None:
    name = tenant(fleet, "slow")
    seat = clients[0].acquire_seat(name, ACTION, subject="ada")
    fleet.valkey.pause()
    try:
        deadline = time.monotonic() + AWAY_S
        answers = []
        while time.monotonic() < deadline:
            answers.append(clients[0].renew_seat(name, seat.seat_id))
            time.sleep(0.1)  # as somebody who renews, and not as one who floods
        assert all(answers)
        assert answers[-1].degraded
    finally:
        fleet.valkey.resume()
    wait_until("Redis is back", lambda: not clients[0].renew_seat(name, seat.seat_id).degraded)


def test_holders_keep_their_seats_when_redis_is_emptied_and_nobody_gets_one_too_many(
    fleet: Fleet, clients: list[licet.Client]
) -> None:
    name = tenant(fleet, "slow")
    seats = [clients[number].acquire_seat(name, ACTION, subject=f"user-{number}").seat_id for number in (0, 1)]
    fleet.valkey.command("FLUSHALL")

    def denied_again() -> bool:
        assert all(clients[number].renew_seat(name, seats[number]) for number in (0, 1))
        answer = clients[0].acquire_seat(name, ACTION, subject="eve")
        assert not answer
        return answer.decision.reason is licet.Reason.SEAT_UNAVAILABLE

    wait_until("seats are given again", denied_again)
    assert clients[0].release_seat(name, seats[0]) is licet.SeatState.RELEASED
    assert clients[1].acquire_seat(name, ACTION, subject="eve")


def test_silent_holders_lose_their_seats_and_those_that_are_held_stay(
    fleet: Fleet, clients: list[licet.Client]
) -> None:
    name = tenant(fleet, "quick")
    silent = clients[1].acquire_seat(name, ACTION, subject="bob")
    lost: list[licet.SeatState] = []
    with clients[0].hold_seat(name, ACTION, subject="ada", on_lost=lost.append) as held:
        assert held
        assert not clients[0].acquire_seat(name, ACTION, subject="eve")
        wait_until("bob's seat is free", lambda: clients[0].acquire_seat(name, ACTION, subject="eve"))
        assert clients[1].renew_seat(name, silent.seat_id).state is licet.SeatState.RECLAIMED
        assert held
        assert clients[0].release_seat(name, held.seat.seat_id) is licet.SeatState.RELEASED
        wait_until("the holder is told", lambda: not held)
        assert lost == [licet.SeatState.RELEASED]
    assert fleet.metric(0, "licet_seats_acquired_total") > 0
    assert fleet.metric(0, "licet_seats_denied_total") > 0
    assert fleet.metric(1, "licet_seats_reclaimed_total") > 0


async def test_a_seat_is_held_by_a_task(fleet: Fleet) -> None:
    name = await asyncio.to_thread(tenant, fleet, "quick")
    async with licet.AsyncClient(fleet.addresses[0], timeout=3.0) as client:
        async with client.hold_seat(name, ACTION, subject="ada") as held:
            await asyncio.sleep(3)  # three heartbeats: silent, it would have been reclaimed
            assert held
        assert (await client.renew_seat(name, held.seat.seat_id)).state is licet.SeatState.RELEASED
        assert not await client.acquire_seat("nobody", ACTION, subject="ada")
        async with client.hold_seat("nobody", ACTION, subject="ada") as refused:
            assert not refused
            assert refused.decision.reason is licet.Reason.NO_LICENSE


def test_the_command_line_holds_a_seat(fleet: Fleet) -> None:
    name = tenant(fleet, "slow")
    acquired = fleet.licet("seat", "acquire", name, ACTION, "--subject", "user:ada")
    assert (acquired["decision"]["effect"], acquired["seats"], acquired["seats_taken"]) == ("APPROVED", 2, 1)
    assert fleet.licet("seat", "renew", name, acquired["seat_id"])["state"] == "HELD"
    assert fleet.licet("seat", "release", name, acquired["seat_id"])["state"] == "RELEASED"
    assert fleet.licet("seat", "renew", name, acquired["seat_id"], code=1)["state"] == "RELEASED"
    never = acquired["seat_id"].rpartition(":")[0] + ":" + "0" * 32
    assert fleet.licet("seat", "renew", name, never, code=1)["state"] == "UNKNOWN"
    assert fleet.licet("seat", "acquire", "nobody", ACTION, "--subject", "ada", code=1)["seat_id"] == ""
