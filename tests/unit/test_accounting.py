"""What events of a reservation add to the sums: each action counts once, and only what was used counts as units."""

from __future__ import annotations

from typing import Any

import pytest

from licet.domain.outcomes import Effect
from licet.wire.usage import FLAG_OBSERVED, EventKind
from licet_control_plane.core.accounting import Account, BilledKey, ExposureKey
from tests.support.usage import event

NOTHING: dict[str, Any] = {"units": {}, "spends": [], "cost_nanos": 0}


def sums(*events: Any) -> tuple[int, int, int]:
    """Decisions, units and units spent from registers."""
    account = Account()
    account.add("s", events)
    rows = account.rollups.values()
    return sum(row.decisions for row in rows), sum(row.units for row in rows), sum(account.spend.values())


def test_a_reservation_that_is_committed_counts_once() -> None:
    made = event(1, kind=EventKind.RESERVE, units_held={"reports": 9}, held=[("q:1", 9)], **NOTHING)
    extended = event(2, kind=EventKind.EXTEND, **NOTHING)
    used = event(3, kind=EventKind.COMMIT, units={"reports": 7}, spends=[("q:1", 7)], unfunded={"reports": 2})
    assert sums(made, extended, used) == (1, 7, 7)


@pytest.mark.parametrize("kind", [EventKind.CANCEL, EventKind.EXPIRE])
def test_a_reservation_that_is_dropped_counts_for_nothing(kind: EventKind) -> None:
    assert sums(event(1, kind=EventKind.RESERVE, **NOTHING), event(2, kind=kind, **NOTHING)) == (0, 0, 0)


def test_a_reservation_that_was_not_approved_is_a_denied_action() -> None:
    assert sums(event(1, kind=EventKind.RESERVE, effect=Effect.DENIED.value, **NOTHING)) == (1, 0, 0)


def test_a_reservation_under_observation_counts_when_it_is_committed() -> None:
    observed = {"effect": Effect.DENIED.value, "flags": FLAG_OBSERVED}
    made = event(1, kind=EventKind.RESERVE, **observed, **NOTHING)
    used = event(2, kind=EventKind.COMMIT, units={"reports": 7}, spends=[], **observed)
    assert sums(made, used) == (1, 7, 0)


def test_what_is_approved_is_billed_by_month_value_and_revision() -> None:
    account = Account()
    month_us = 1_790_812_800 * 1_000_000  # October 2026
    account.add(
        "s",
        [
            event(1, at_us=month_us - 1, units={"in": 3}, priced_as={"in": "large"}),
            event(2, at_us=month_us, units={"in": 3, "out": 4}, priced_as={"in": "large"}, revision=7),
            event(3, at_us=month_us + 1, units={"in": 5}, priced_as={"in": "large"}, revision=7),
            event(4, at_us=month_us, units={"in": 0}),
            event(5, at_us=month_us, units={"in": 9}, effect=Effect.DENIED.value),
            event(6, at_us=month_us, kind=EventKind.COMMIT, units={"in": 2}),
            event(7, at_us=month_us, kind=EventKind.RESERVE, units_held={"in": 2}, **NOTHING),
        ],
    )
    september = 1_788_220_800
    assert {BilledKey(*key): (events, units) for key, (_, events, units, _) in account.billed.items()} == {
        BilledKey("acme", september, "in", "large", 1): (1, 3),
        BilledKey("acme", 1_790_812_800, "in", "large", 7): (2, 8),
        BilledKey("acme", 1_790_812_800, "out", "", 7): (1, 4),
        BilledKey("acme", 1_790_812_800, "in", "", 1): (1, 2),
    }


def test_an_event_counts_for_each_of_its_flags_as_it_counts_for_its_features() -> None:
    account = Account()
    flags = {"editor": "on", "export": "off"}
    account.add(
        "s", [event(1, units={"in": 3, "out": 4}, feature_costs={"in": 2, "out": 3}, exposures=flags), event(2)]
    )
    rows = {
        (key.flag, key.variant, key.feature): sums
        for row, sums in account.exposed.items()
        if (key := ExposureKey(*row))
    }
    assert rows == {
        (flag, variant, feature): sums
        for flag, variant in flags.items()
        for feature, sums in {"": [1, 0, 0, 0], "in": [0, 1, 3, 2], "out": [0, 1, 4, 3]}.items()
    }


def test_sums_by_day_are_those_of_its_hours() -> None:
    account = Account()
    day_us = 1_790_812_800 * 1_000_000
    account.add("s", [event(number, at_us=day_us + number * 3_600_000_000) for number in range(30)])
    assert sorted((key[0], sums) for key, sums in account.days().items()) == [
        (1_790_812_800, [24, 24, 24, 120]),
        (1_790_899_200, [6, 6, 6, 30]),
    ]
    assert len(account.hours) == 30


def test_a_denied_reservation_counts_the_units_that_were_asked() -> None:
    account = Account()
    denied = {"kind": EventKind.RESERVE, "effect": Effect.DENIED.value, "units_held": {"reports": 9}, **NOTHING}
    account.add("s", [event(1, **denied)])
    ((key, sums),) = account.rollups.items()
    assert (key.feature, sums.decisions, sums.events, sums.units) == ("reports", 1, 1, 9)
