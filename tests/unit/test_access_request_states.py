"""The life of an access request: who may take it where, and when its clock runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from licet.domain.approvals import EXPIRES_AFTER_S, RequestState
from licet.domain.catalog import ApprovalStage
from licet_control_plane.core import access_requests as core
from licet_control_plane.core.access_requests import AccessRequest, NotAllowed, NotPossible, Principal, Terms
from licet_control_plane.core.refusal import ChangeInvalid

S = 1_000_000
ASKED_US = 1_790_000_000 * S
LATER_US = ASKED_US + 600 * S
HOUR = Terms(3_600)
ADMIN = Principal("root", "admin")
BEN, CORA = (Principal(name, "approver", frozenset({"finance"})) for name in ("ben", "cora"))
FINANCE = ApprovalStage(("group:finance",), deny_after_s=7_200)
ASKED = AccessRequest(
    id="1" * 32,
    key="2" * 32,
    tenant="acme",
    subject_type="user",
    subject_id="ana",
    on_behalf_of="",
    action="report.export",
    rule="guard/large",
    asked_at=ASKED_US,
    units={"reports": 50},
)


def pending(*stages: ApprovalStage, **changes: Any) -> AccessRequest:
    return core.opened(replace(ASKED, **changes), "finance", stages, ASKED_US + S)


def test_an_approval_ends_so_long_after_it_was_given_and_not_after_it_was_asked_for() -> None:
    made = core.approved(pending(FINANCE), BEN, Terms(3_600, 70), "fine", LATER_US)
    assert (made.state, made.ends_at, made.decided_by) == (RequestState.APPROVED, LATER_US + 3_600 * S, "ben")
    entry = made.entry()
    assert (entry.until_us, entry.units, entry.feature, entry.by) == (made.ends_at, 70, "reports", "ben")


def test_a_request_expires_when_its_chain_says_so_or_after_a_day() -> None:
    assert pending(FINANCE).expires_at == ASKED_US + 7_200 * S
    assert pending().expires_at == ASKED_US + EXPIRES_AFTER_S * S
    overdue = pending(FINANCE)
    assert core.expired(overdue, overdue.expires_at - 1).state is RequestState.PENDING
    assert core.expired(overdue, overdue.expires_at).state is RequestState.EXPIRED
    with pytest.raises(NotPossible, match="expired"):
        core.approved(overdue, BEN, HOUR, "", overdue.expires_at)
    assert core.opened(ASKED, "", (), ASKED_US + EXPIRES_AFTER_S * S).state is RequestState.EXPIRED


def test_a_request_from_a_clock_that_is_ahead_expires_by_our_clock() -> None:
    assert core.opened(replace(ASKED, asked_at=ASKED_US + 9_999 * S), "", (FINANCE,), ASKED_US).expires_at == (
        ASKED_US + 7_200 * S
    )


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ({"subject_id": "ben"}, "ben"),
        ({"subject_id": "BEN"}, "ben"),
        ({"subject_id": "agent-7", "on_behalf_of": "ben"}, "ben"),
        ({"subject_id": "ben@example.com"}, "ben"),
        ({"subject_id": "ben"}, "ben@example.com"),
    ],
)
def test_nobody_approves_their_own_request(own: dict[str, str], name: str) -> None:
    with pytest.raises(NotAllowed, match="nobody approves their own"):
        core.approved(pending(**own), Principal(name, "admin"), HOUR, "", LATER_US)


def test_who_asked_may_take_the_request_back() -> None:
    assert core.denied(pending(FINANCE), Principal("ana", "approver"), "not needed", LATER_US).state == "denied"


@pytest.mark.parametrize(
    ("stage", "who", "may"),
    [
        (FINANCE, BEN, True),
        (FINANCE, Principal("dan", "approver"), False),
        (FINANCE, Principal("finance", "approver"), False),
        (FINANCE, ADMIN, True),
        (ApprovalStage(("user:dan",)), Principal("dan", "approver"), True),
        (ApprovalStage(("user:dan",)), BEN, False),
        (ApprovalStage(("role:approver",)), BEN, True),
        (ApprovalStage(("role:operator",)), Principal("dan", "operator"), False),
        (core.ANYBODY, Principal("dan", "approver"), True),
        (FINANCE, Principal("theirs", "admin", tenant="acme"), False),
        (core.ANYBODY, Principal("theirs", "admin", tenant="acme"), True),
        (core.ANYBODY, Principal("dan", "operator"), False),
        (ApprovalStage(("user:dan",)), Principal("dan", "auditor"), False),
    ],
)
def test_only_those_whom_the_stage_names_decide(stage: ApprovalStage, who: Principal, may: bool) -> None:
    assert core.may_decide(stage, who) is may
    request = pending(stage)
    for step in (
        lambda: core.approved(request, who, HOUR, "", LATER_US),
        lambda: core.denied(request, who, "no", LATER_US),
    ):
        if may:
            step()
        else:
            with pytest.raises(NotAllowed):
                step()


def test_two_different_people_are_needed_where_the_stage_says_two() -> None:
    first = core.approved(pending(replace(FINANCE, need=2)), BEN, HOUR, "", LATER_US)
    assert (first.state, first.votes) == (RequestState.PENDING, ("ben",))
    assert core.approved(first, BEN, HOUR, "", LATER_US + S) == first
    second = core.approved(first, CORA, HOUR, "", LATER_US + 9 * S)
    assert (second.state, second.ends_at) == (RequestState.APPROVED, LATER_US + 3_609 * S)


def test_every_stage_has_to_say_yes_and_has_its_own_time() -> None:
    legal = ApprovalStage(("user:dan",), deny_after_s=60)
    first = core.approved(pending(FINANCE, legal), BEN, HOUR, "", LATER_US)
    assert (first.state, first.stage, first.votes) == (RequestState.PENDING, 1, ())
    assert first.expires_at == LATER_US + 60 * S
    with pytest.raises(NotAllowed, match="user:dan"):
        core.approved(first, CORA, HOUR, "", LATER_US)
    assert core.approved(first, Principal("dan", "approver"), HOUR, "", LATER_US).state is RequestState.APPROVED
    assert core.denied(first, Principal("dan", "approver"), "no", LATER_US).state is RequestState.DENIED


APPROVED = core.approved(pending(FINANCE), BEN, HOUR, "", LATER_US)
DENIED = core.denied(pending(FINANCE), BEN, "no", LATER_US)
REVOKED = core.revoked(APPROVED, CORA, "oops", LATER_US + S)


def test_saying_the_same_again_changes_nothing() -> None:
    assert core.approved(APPROVED, BEN, HOUR, "again", LATER_US + S) == APPROVED
    assert core.denied(DENIED, BEN, "again", LATER_US + S) == DENIED
    assert core.revoked(REVOKED, BEN, "again", LATER_US + 2 * S) == REVOKED


@pytest.mark.parametrize("state", [APPROVED, DENIED, REVOKED], ids=lambda one: one.state.value)
def test_what_is_decided_is_not_decided_otherwise(state: AccessRequest) -> None:
    with pytest.raises(NotPossible):
        core.approved(state, CORA, Terms(60), "", LATER_US + S)
    with pytest.raises(NotPossible):
        core.denied(state, CORA, "no", LATER_US + S)


def test_only_an_approval_that_has_not_ended_is_revoked() -> None:
    for state, at in ((pending(FINANCE), LATER_US), (DENIED, LATER_US), (APPROVED, APPROVED.ends_at)):
        with pytest.raises(NotPossible):
            core.revoked(state, BEN, "oops", at)
    with pytest.raises(NotAllowed):
        core.revoked(APPROVED, Principal("eve", "operator"), "oops", LATER_US)


@pytest.mark.parametrize(
    ("changes", "terms", "field"),
    [
        ({}, Terms(0), "expires_after_s"),
        ({}, Terms(core.LASTS_S_MAX + 1), "expires_after_s"),
        ({}, Terms(60, -1), "units"),
        ({}, Terms(60, money="5.00 USD"), "units"),
        ({"units": {"input": 1, "output": 1}}, Terms(60, 5), "units"),
        ({"rule": "reports:month"}, Terms(60), "units"),
    ],
)
def test_terms_that_cannot_be_are_refused(changes: dict[str, Any], terms: Terms, field: str) -> None:
    with pytest.raises(ChangeInvalid) as refused:
        core.approved(pending(**changes), ADMIN, terms, "", LATER_US)
    assert refused.value.field == field


@pytest.mark.parametrize("reason", ["", "  ", "x" * 301])
def test_a_no_says_why_in_a_few_words(reason: str) -> None:
    with pytest.raises(ChangeInvalid):
        core.denied(pending(), ADMIN, reason, LATER_US)
