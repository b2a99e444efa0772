"""Which state of a license somebody saw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from licet.domain.approvals import RequestEntry, RequestState
from licet.domain.catalog import Grant, License, LicenseStatus, PlannedPlan
from licet.domain.ids import LimitKey
from licet_control_plane.core.license_version import SeenLicense, terms_digest

ACME = License("acme", "pro", overrides={LimitKey("a:month"): 1, LimitKey("b:month"): 2})
GRANT = Grant("g", LimitKey("a:month"), 5, 0, 60, 100)
ASKED = RequestEntry("a1" * 16, "k", RequestState.PENDING, 1, 2)


@pytest.mark.parametrize("changed", [{"grants": (GRANT,)}, {"requests": (ASKED,)}])
def test_a_grant_and_a_request_leave_the_terms_as_they_are(changed: dict[str, Any]) -> None:
    seen = SeenLicense(3, terms_digest(ACME))
    assert seen.is_still(replace(ACME, **changed), 4)


@pytest.mark.parametrize(
    "changed",
    [
        {"plan": "big"},
        {"status": LicenseStatus.SUSPENDED},
        {"ends_s": 60},
        {"overrides": {}},
        {"addons": {"more": 1}},
        {"grace_s": 1},
        {"cancels": True},
        {"planned": PlannedPlan("big", 60)},
    ],
)
def test_whatever_an_operator_edits_is_a_term(changed: dict[str, Any]) -> None:
    assert not SeenLicense(3, terms_digest(ACME)).is_still(replace(ACME, **changed), 4)


def test_the_order_of_overrides_says_nothing() -> None:
    other = replace(ACME, overrides=dict(reversed(ACME.overrides.items())))
    assert terms_digest(other) == terms_digest(ACME)


def test_a_revision_alone_holds_to_that_revision() -> None:
    assert SeenLicense(3).is_still(ACME, 3)
    assert not SeenLicense(3).is_still(ACME, 4)
