"""When quotas that learn may open."""

from __future__ import annotations

import math

import pytest

from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, Pair
from licet_control_plane.core.learning import WAIT_S_MIN, Holder, Verdict, may_open

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
