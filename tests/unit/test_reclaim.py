"""When a dead sidecar's units may be taken, and how many of them are free."""

from __future__ import annotations

import math

import pytest

from licet.wire.registers import Pair, Register
from licet_control_plane.core.fleet import Sidecar
from licet_control_plane.core.quotas import view
from licet_control_plane.core.reclaim import (
    SILENT_S_MIN,
    WATCHED_S_MIN,
    HolderState,
    Holding,
    holder_state,
    in_base,
    overdue,
    reclaim_wait_s,
)
from tests.support.control_plane import heartbeat

NOW_S = 100_000.0
LONG = math.inf


def sidecar(name: str = "a", *, silent_s: float = 0.0, gone: bool = False) -> Sidecar:
    return Sidecar(heartbeat(name), NOW_S - silent_s, gone)


def register(g: int, u: int = 0, h: int = 0, *, sealed: bool = False) -> Register:
    return Register(g, u, h, 1, 1, Pair(1, "run"), 0, sealed)


@pytest.mark.parametrize(
    ("one", "state"),
    [
        (None, HolderState.UNKNOWN),
        (sidecar(silent_s=5.0), HolderState.LIVE),
        (sidecar(silent_s=5.1), HolderState.SILENT),
        (sidecar(silent_s=SILENT_S_MIN - 0.1), HolderState.SILENT),
        (sidecar(silent_s=SILENT_S_MIN), HolderState.DEAD),
        (sidecar(silent_s=1e6), HolderState.DEAD),
        (sidecar(silent_s=1.0, gone=True), HolderState.GONE),
    ],
)
def test_state_of_a_holder(one: Sidecar | None, state: HolderState) -> None:
    assert holder_state(one, NOW_S) is state


@pytest.mark.parametrize(
    ("one", "watched_s", "wait_s"),
    [
        (sidecar(silent_s=10.0), LONG, SILENT_S_MIN - 10.0),
        (sidecar(silent_s=SILENT_S_MIN), LONG, 0.0),
        (sidecar(silent_s=1e6), 20.0, SILENT_S_MIN - 20.0),  # nobody listened before
        (sidecar(silent_s=0.0, gone=True), 0.0, 0.0),
        (None, 5.0, SILENT_S_MIN - 5.0),
        (None, LONG, 0.0),
    ],
)
def test_how_long_to_wait_before_a_sidecar_may_be_reclaimed(
    one: Sidecar | None, watched_s: float, wait_s: float
) -> None:
    assert reclaim_wait_s(one, watched_s=watched_s, now_s=NOW_S) == wait_s


def test_the_timer_takes_the_longest_silent_first_and_nobody_who_said_goodbye() -> None:
    fleet = [
        sidecar("a", silent_s=700),
        sidecar("b", silent_s=900),
        sidecar("c", silent_s=599),
        sidecar("d", gone=True),
    ]
    assert overdue(fleet, after_s=600.0, watched_s=LONG, now_s=NOW_S) == ["b", "a"]


def test_the_timer_waits_until_somebody_listened_for_a_while() -> None:
    # After Redis or this server was away for a day, everybody was silent for a day.
    fleet = [sidecar("a", silent_s=86_400)]
    assert overdue(fleet, after_s=600.0, watched_s=WATCHED_S_MIN - 1, now_s=NOW_S) == []
    assert overdue(fleet, after_s=600.0, watched_s=WATCHED_S_MIN, now_s=NOW_S) == ["a"]


def test_the_timer_never_takes_from_who_may_still_spend() -> None:
    assert overdue([sidecar(silent_s=SILENT_S_MIN - 1)], after_s=1.0, watched_s=LONG, now_s=NOW_S) == []


@pytest.mark.parametrize(
    ("held", "ledger", "counted", "freed"),
    [
        (register(50, 20), 0, 20, 30),
        (register(50, 20, 5), 0, 25, 25),
        (register(50, 20, 5), 40, 40, 10),
        (register(50, 20), 60, 60, -10),
    ],
)
def test_what_is_free(held: Register, ledger: int, counted: int, freed: int) -> None:
    holding = Holding("acme", "a:x:0", "a:x", "dead", held, ledger)
    assert (holding.counted, holding.freed) == (counted, freed)


@pytest.mark.parametrize(
    ("state", "held", "expected"),
    [
        (HolderState.LIVE, register(5), False),
        (HolderState.GONE, register(5), False),  # it left with reservations
        (HolderState.LIVE, register(0, sealed=True), True),
        (HolderState.GONE, None, True),
        (HolderState.UNKNOWN, None, True),
        (HolderState.DEAD, None, False),  # lost: who is folded is gone
        (HolderState.SILENT, None, False),
    ],
)
def test_whose_spend_is_counted_in_the_base(state: HolderState, held: Register | None, expected: bool) -> None:
    assert in_base(state, held) is expected


def test_a_view_adds_up() -> None:
    fleet = {"dead": sidecar("dead", silent_s=100.0), "live": sidecar("live")}
    registers = {"dead": register(50, 20), "live": register(30, 10, 5), "old": register(0, sealed=True)}
    seen = view(7, 87, registers, fleet, NOW_S)
    assert seen.used + seen.reserved + seen.unspent == seen.sum == 87
    assert (seen.used, seen.reserved, seen.unspent, seen.unspent_dead, seen.folded) == (37, 5, 45, 30, 7)
    assert [(one.sidecar, one.state) for one in seen.holders] == [("dead", "dead"), ("live", "live"), ("old", "sealed")]
    assert (seen.remaining(100), seen.overage(100)) == (13, 0)
    assert (seen.remaining(80), seen.overage(80)) == (0, 0), "what is leased is not used"
    assert seen.overage(30) == 7
