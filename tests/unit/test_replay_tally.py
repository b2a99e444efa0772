"""Counting answers, percentiles, and the comparison with the ledger."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.client.model import Cost, Decision
from licet.domain.outcomes import Effect, Reason
from licet_control_plane.cli.replay.reconcile import differences, wait_for_ledger
from licet_control_plane.cli.replay.tally import Answers, SidecarTally, latency_summary, percentile

APPROVED = Decision(Effect.APPROVED, Reason.OK, cost=Cost(5, "USD"))
DENIED = Decision(Effect.DENIED, Reason.QUOTA_EXHAUSTED, stale=True)
PENDING = Decision(Effect.PENDING, Reason.APPROVAL_REQUIRED, degraded=True)


def answers(*decisions: Decision, units: int = 10) -> Answers:
    tally = SidecarTally("a")
    for decision in decisions:
        tally.count(decision, units, 1_999)
    return Answers([tally])


def ledger(**changed: Any) -> dict[str, Any]:
    return {"events": 2, "approved": 1, "denied": {"QUOTA_EXHAUSTED": 1}, "pending": 0, "units_approved": 10, **changed}


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [
        (1, 50, 1),
        (2, 50, 1),
        (3, 50, 2),
        (100, 99, 99),
        (101, 99, 100),
        (1000, 99.9, 999),
        (1000, 100, 1000),
        (5, 0.1, 1),
    ],
)
def test_percentile_is_the_nearest_rank(count: int, percent: float, expected: int) -> None:
    assert percentile(range(1, count + 1), percent) == expected


@given(st.lists(st.integers(0, 10**9), min_size=1), st.sampled_from([50.0, 90.0, 99.0, 99.9]))
def test_percentile_covers_as_many_values_as_it_says(values: list[int], percent: float) -> None:
    found = percentile(sorted(values), percent)
    assert found in values
    needed = math.ceil(round(percent * 1000) * len(values) / 100_000)
    assert sum(value <= found for value in values) >= needed
    assert sum(value < found for value in values) < needed


def test_latencies_of_nothing_are_zero() -> None:
    assert latency_summary([]) == {"p50": 0, "p90": 0, "p99": 0, "p999": 0, "max": 0}


def test_counts_each_kind_of_answer_once() -> None:
    counted = answers(APPROVED, APPROVED, DENIED, PENDING).as_json()
    assert (counted["approved"], counted["units_approved"], counted["pending"]) == (2, 20, 1)
    assert counted["denied"] == {"QUOTA_EXHAUSTED": 1}
    assert counted["cost_nanos"] == {"USD": 10}
    assert (counted["stale"], counted["degraded"], counted["errors"]) == (1, 1, 0)
    assert counted["latency_us"]["max"] == 1
    assert counted["sidecars"][0]["requests"] == 4


def test_adds_up_over_sidecars() -> None:
    one, two = SidecarTally("a"), SidecarTally("b")
    one.count(DENIED, 1, 0)
    two.count(DENIED, 1, 0)
    two.errors["away"] += 1
    total = Answers([one, two])
    assert total.denied() == {"QUOTA_EXHAUSTED": 2}
    assert (total.answered, total.errors) == (2, 1)


def test_agrees_when_the_ledger_holds_every_answer() -> None:
    assert differences(answers(APPROVED, DENIED), ledger()) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"events": 3}, "events: answered 2, the ledger holds 3"),
        ({"units_approved": 9}, "units approved: answered 10, the ledger holds 9"),
        ({"approved": 2}, "approved"),
        ({"pending": 1}, "pending"),
        ({"denied": {}}, "denied QUOTA_EXHAUSTED: answered 1, the ledger holds 0"),
        ({"denied": {"QUOTA_EXHAUSTED": 1, "NO_LICENSE": 1}}, "denied NO_LICENSE: answered 0, the ledger holds 1"),
    ],
)
def test_names_what_does_not_agree(changed: dict[str, Any], named: str) -> None:
    (difference,) = differences(answers(APPROVED, DENIED), ledger(**changed))
    assert named in difference


def test_a_failed_call_never_agrees() -> None:
    counted = answers(APPROVED, DENIED)
    counted.sidecars[0].errors["away"] += 1
    assert any("1 calls failed" in difference for difference in differences(counted, ledger()))


class FakeLedger:
    """Grows as ``growth`` says, one entry a look, on a clock that only ``sleep`` moves."""

    def __init__(self, *growth: int) -> None:
        self.growth = list(growth)
        self.now = 0.0
        self.looks = 0

    def fetch(self) -> dict[str, Any]:
        self.looks += 1
        return {"events": self.growth.pop(0) if len(self.growth) > 1 else self.growth[0]}

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, expected: int, stall_s_max: float = 1.0) -> dict[str, Any]:
        return wait_for_ledger(
            self.fetch,
            expected=expected,
            stall_s_max=stall_s_max,
            progress=lambda events: None,
            now=lambda: self.now,
            sleep=self.sleep,
        )


def test_waits_as_long_as_the_ledger_grows() -> None:
    slow = FakeLedger(*(count for count in range(50) for _ in range(3)), 50)
    assert slow.wait(50)["events"] == 50
    assert slow.now > 10


def test_gives_up_when_the_ledger_stands_still() -> None:
    stuck = FakeLedger(3)
    assert stuck.wait(5)["events"] == 3
    assert 1.0 <= stuck.now < 1.5


def test_looks_once_more_for_events_that_come_twice() -> None:
    doubled = FakeLedger(5, 6)
    assert doubled.wait(5)["events"] == 6
