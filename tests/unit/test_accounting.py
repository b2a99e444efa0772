"""What events of a reservation add to the sums: each action counts once, and only what was used counts as units."""

from __future__ import annotations

from typing import Any

import pytest

from licet.domain.outcomes import Effect
from licet.wire.usage import FLAG_OBSERVED, EventKind
from licet_control_plane.core.accounting import Account
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
