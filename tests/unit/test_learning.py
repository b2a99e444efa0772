"""When quotas that learn may open."""

from __future__ import annotations

import math

import pytest

from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, Pair, Register
from licet_control_plane.core.learning import WAIT_S_MIN, Holder, Verdict, corrections, may_open
from licet_control_plane.core.reclaim import HolderState

MARK = Pair(7, "run-b")
NOW_S = 1_000.0
SINCE_MS = 1_000_000
LONG = HOLD_S + HOLD_MARGIN_S


def decide(*holders: Holder, learning_s: float = 10.0, registry_s: float = math.inf) -> tuple[Verdict, list[str]]:
    return may_open(MARK, since_ms=SINCE_MS, learning_s=learning_s, registry_s=registry_s, holders=holders, now_s=NOW_S)


def holder(name: str = "a", *, epoch: int = 7, run: str = "run-b", silent_s: float = 0.0) -> Holder:
    return Holder(name, NOW_S - silent_s, Pair(epoch, run), SINCE_MS)


def test_opens_when_every_sidecar_has_asserted() -> None:
    assert decide(holder("a"), holder("b", epoch=9)) == (Verdict.ALL_ASSERTED, [])


def test_opens_when_there_is_no_sidecar() -> None:
    assert decide() == (Verdict.ALL_ASSERTED, [])


@pytest.mark.parametrize("behind", [holder("b", epoch=6), holder("b", run="run-a"), holder("b", epoch=0, run="")])
def test_waits_for_a_sidecar_that_has_not_asserted_under_this_pair(behind: Holder) -> None:
    assert decide(holder("a"), behind) == (Verdict.WAIT, ["b"])


def test_waits_for_a_silent_sidecar_as_long_as_it_may_hold_a_lease() -> None:
    assert decide(holder(epoch=6, silent_s=LONG - 0.1)) == (Verdict.WAIT, ["a"])
    assert decide(holder(epoch=6, silent_s=LONG)) == (Verdict.ALL_ASSERTED, [])


def test_opens_when_every_lease_has_expired_whoever_is_missing() -> None:
    assert decide(holder(epoch=6), learning_s=LONG, registry_s=0.0) == (Verdict.HOLD_EXPIRED, [])


def test_gives_a_sidecar_nobody_knows_time_to_show_itself() -> None:
    assert decide(holder(), learning_s=WAIT_S_MIN - 0.1) == (Verdict.WAIT, [])
    assert decide(holder(), learning_s=WAIT_S_MIN) == (Verdict.ALL_ASSERTED, [])


def test_trusts_only_a_registry_that_is_complete() -> None:
    assert decide(holder(), registry_s=LONG - 0.1) == (Verdict.WAIT, [])
    assert decide(holder(), registry_s=LONG) == (Verdict.ALL_ASSERTED, [])


def register(g: int, u: int = 0, *, epoch: int = 6, sealed: bool = False, folded: int = 0) -> Register:
    return Register(g, u, 0, 1, 1, Pair(epoch, "run-b"), 0, sealed, folded)


def right(registers: dict[str, Register], spent: dict[str, int], *gone: str) -> tuple[dict[str, int], int, set[str]]:
    found = corrections(
        registers,
        spent,
        pair=MARK,
        said={"said", "again"},
        state_of=lambda one: HolderState.GONE if one in gone else HolderState.LIVE,
    )
    return dict(found.spent), found.base, set(found.releases)


def test_what_the_ledger_knows_is_counted_for_each_sidecar_or_in_the_base() -> None:
    assert right({"here": register(5)}, {"here": 3, "gone": 4, "also": 2}, "gone", "also") == ({"here": 3}, 6, set())


def test_a_tombstone_counts_what_was_folded_though_the_ledger_does_not_know_it_yet() -> None:
    registers = {"young": register(0, sealed=True, folded=5), "old": register(0, sealed=True, folded=2)}
    assert right(registers, {"old": 3, "gone": 4}, "gone") == ({}, 5 + 3 + 4, set())


def test_only_units_that_their_sidecar_does_not_hold_are_freed() -> None:
    registers = {
        "said": register(5, 1),
        "again": register(5, 1, epoch=7),
        "silent": register(5, 1),
    }
    assert right(registers, {}) == ({}, 0, {"said"})
    assert right({"said": register(2, 2)}, {}) == ({}, 0, set()), "all of it was spent"
    assert right({"said": register(0, sealed=True, folded=2)}, {}) == ({}, 2, set())
