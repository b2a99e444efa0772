"""A limit that changes in the middle of its window: raised, lowered below what is spent, removed, replaced, topped up.

With real processes. What was pushed with ``--wait`` is in force on every sidecar; what a sidecar had leased of a
lowered limit goes back with its next upkeep.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import licet
from tests.support.fleet import Fleet, wait_until


def catalog(*limits: str) -> str:
    lines = "".join(f"\n      - {{{one}}}" for one in limits)
    return f"""\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Plan
name: pro
features:
  reports:
    limits: {lines or "[]"}
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, count=2)
    try:
        fleet.start()
        fleet.push(catalog("amount: 100, per: month"))
        fleet.licet("license", "create", "acme", "--plan", "pro", "--wait")
        yield fleet
    finally:
        fleet.stop()


def spendable(fleet: Fleet, number: int, most: int) -> int:
    """Units that can be had one by one, up to ``most``; a first refusal may be of units that are on their way back."""
    with licet.Client(fleet.addresses[number]) as client:
        taken = 0
        refused = 0
        while taken < most and refused < 16:
            if client.check("acme", "report.export").approved:
                taken += 1
                refused = 0
            else:
                refused += 1
                time.sleep(0.1)  # so that sixteen refusals are more than a second
        return taken


def denied(fleet: Fleet, number: int) -> bool:
    with licet.Client(fleet.addresses[number]) as client:
        return not client.check("acme", "report.export").approved


def test_a_limit_follows_the_plan_in_the_middle_of_its_window(fleet: Fleet) -> None:
    assert spendable(fleet, 0, 40) + spendable(fleet, 1, 30) == 70

    fleet.push(catalog("amount: 75, per: month"))  # lowered: 5 are left, whatever was leased
    for number in (0, 1):
        spendable(fleet, number, 1)  # each learns of it with its next check, and gives back what it holds
    wait_until("idle units went back", lambda: _held(fleet) == 72)
    assert spendable(fleet, 1, 10) == 3
    assert denied(fleet, 0)

    fleet.push(catalog("amount: 20, per: month"))  # below what is spent
    assert denied(fleet, 0)
    assert denied(fleet, 1)

    fleet.push(catalog("amount: 80, per: month"))  # raised again: what was spent is not forgotten
    assert spendable(fleet, 0, 20) == 5

    fleet.licet("grant", "add", "acme", "--limit", "reports:month", "--amount", "7", "--for", "1h", "--wait")
    assert spendable(fleet, 1, 20) == 7

    fleet.push(catalog())  # removed
    assert spendable(fleet, 0, 30) == 30

    fleet.push(catalog("amount: 4, per: day", "amount: 1_000, per: month"))  # replaced: each counts for itself
    assert spendable(fleet, 1, 20) == 4
    shown = fleet.licet("quota", "show", "acme")["items"]
    used = {quota["limit"]: quota["used"] for quota in shown if not quota["limit"].startswith("reports:month+")}
    assert used == {"reports:day": 4, "reports:month": 84}


def _held(fleet: Fleet) -> int:
    """Units of the month that are spent, or held by sidecars."""
    (quota,) = fleet.licet("quota", "show", "acme", "--limit", "reports:month")["items"]
    return int(quota["used"]) + int(quota["leased"])
