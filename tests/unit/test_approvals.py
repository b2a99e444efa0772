"""Approvals and overrides in a decision: what each lifts, until when, and what it never lifts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.approvals import (
    CLOCK_BEHIND_US_MAX,
    CLOSED_KEPT_US,
    CLOSED_MAX,
    OPEN_MAX,
    QUIET_US,
    Override,
    OverrideEffect,
    RequestEntry,
    RequestState,
    kept_entries,
    request_key,
)
from licet.domain.catalog import (
    Action,
    Entitlement,
    Feature,
    Flag,
    License,
    LicenseStatus,
    Plan,
    Policy,
    Role,
    Rule,
    RuleEffect,
)
from licet.domain.catalog_wire import license_from_wire, license_to_wire
from licet.domain.outcomes import Effect, Reason
from licet_sidecar.core.access_requests import ASKED_MAX, RequestBook, TenantRequests
from tests.support.engine import NOW_US, decided, engine_with, inquiry, leased
from tests.support.published import catalog, limit

S = 1_000_000
DENY, ASK = RuleEffect.DENY, RuleEffect.REQUIRE_APPROVAL
GUARD = Policy("guard", ("report.*",), (Rule("large", ASK, "quantity > 10"),))
LEGAL = Policy("legal", ("report.*",), (Rule("large", ASK, "quantity > 10"),))
ANA = {"subject_type": "user", "subject_id": "ana", "quantity": 50}


def entry(state: RequestState, *, rule: str = "guard/large", number: int = 1, **changes: Any) -> RequestEntry:
    """Of ana, who wants to export; in force for an hour from now on."""
    key = request_key("acme", ("user", "ana"), "", "report.export", rule)
    made = RequestEntry(f"{number:032x}", key, state, NOW_US - 60 * S, NOW_US + 3_600 * S, "ben", "fine")
    return replace(made, **changes)


APPROVED = entry(RequestState.APPROVED)


def acme(*requests: RequestEntry) -> License:
    return License("acme", "pro", requests=requests)


def test_an_approval_lifts_its_rule_for_who_asked_until_it_ends() -> None:
    engine = engine_with(catalog(GUARD), acme(APPROVED))
    decision = decided(engine, inquiry(**ANA))
    assert (decision.effect, decision.access_request_id) == (Effect.APPROVED, APPROVED.id)
    early_us = APPROVED.at_us - CLOCK_BEHIND_US_MAX
    assert decided(engine, inquiry(**ANA), now_us=early_us).effect is Effect.APPROVED  # by a clock that is behind
    assert decided(engine, inquiry(**ANA), now_us=early_us - 1).effect is Effect.PENDING  # long before
    last_us, end_us = APPROVED.until_us - 1, APPROVED.until_us
    engine.as_of_us = end_us
    assert decided(engine, inquiry(**ANA), now_us=last_us).effect is Effect.APPROVED
    assert decided(engine, inquiry(**ANA), now_us=end_us).effect is Effect.PENDING


@pytest.mark.parametrize(
    "other",
    [
        {"subject_id": "ben"},
        {"subject_type": "agent"},
        {"on_behalf_of": "ben"},
        {"action": "report.delete"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_an_approval_lifts_nothing_for_anybody_or_anything_else(other: dict[str, Any]) -> None:
    engine = engine_with(catalog(GUARD, Action("report.delete", {"": "reports"})), acme(APPROVED))
    assert decided(engine, inquiry(**{**ANA, **other})).effect is Effect.PENDING


@pytest.mark.parametrize("state", [state for state in RequestState if state is not RequestState.APPROVED])
def test_only_an_approval_lifts_anything(state: RequestState) -> None:
    decision = decided(engine_with(catalog(GUARD), acme(entry(state))), inquiry(**ANA))
    assert decision.effect is not Effect.APPROVED


def test_every_rule_that_wants_an_approval_wants_its_own() -> None:
    both = catalog(GUARD, LEGAL)
    decision = decided(engine_with(both, acme(APPROVED)), inquiry(**ANA))
    assert (decision.effect, decision.rule) == (Effect.PENDING, "legal/large")
    second = entry(RequestState.APPROVED, rule="legal/large", number=2)
    assert decided(engine_with(both, acme(APPROVED, second)), inquiry(**ANA)).effect is Effect.APPROVED


def test_any_deny_wins_over_an_approval() -> None:
    embargo = Policy("embargo", ("*",), (Rule("all", DENY),))
    decision = decided(engine_with(catalog(GUARD, embargo), acme(APPROVED)), inquiry(**ANA))
    assert (decision.effect, decision.reason) == (Effect.DENIED, Reason.POLICY_DENIED)


def test_units_of_an_approval_are_leased_like_those_of_a_limit_and_then_another_is_wanted() -> None:
    counted = replace(APPROVED, units=70, feature="reports")
    engine = engine_with(catalog(GUARD, limits=[limit(1_000)]), acme(counted))
    leased(engine, inquiry(**ANA), {"reports:month": 1_000, counted.limit_key: 70})
    decision = decided(engine, inquiry(**ANA))
    assert decision.effect is Effect.APPROVED
    assert {lease.limit_key: units for lease, units in decision.spends} == {"reports:month": 50, counted.limit_key: 50}
    for lease, units in decision.spends:
        lease.used += units
    for lease in engine.leases.of("acme").all():
        lease.short_until_ms = 2**62
    decision = decided(engine, inquiry(**ANA))
    assert (decision.effect, decision.rule) == (Effect.PENDING, "guard/large")
    assert decision.access_request_id not in ("", counted.id)
    assert "20 are left" in decision.message


def test_a_denial_is_what_asking_again_gets_for_an_hour_and_then_it_may_be_asked_again() -> None:
    denied = entry(RequestState.DENIED, at_us=NOW_US)
    engine = engine_with(catalog(GUARD), acme(denied))
    decision = decided(engine, inquiry(**ANA))
    assert (decision.effect, decision.reason) == (Effect.DENIED, Reason.APPROVAL_REQUIRED)
    assert (decision.access_request_id, decision.retry_after_s) == (denied.id, 3_600)
    assert "ben denied that: fine." in decision.message
    later = NOW_US + QUIET_US
    engine.as_of_us = later
    decision = decided(engine, inquiry(**ANA), now_us=later)
    assert decision.effect is Effect.PENDING
    assert decision.access_request_id not in ("", denied.id)


def test_the_document_s_open_request_is_the_one_that_everybody_waits_for() -> None:
    pending = entry(RequestState.PENDING)
    revoked = entry(RequestState.REVOKED, number=2, at_us=NOW_US)
    decision = decided(engine_with(catalog(GUARD), acme(pending, revoked)), inquiry(**ANA))
    assert (decision.effect, decision.access_request_id) == (Effect.PENDING, pending.id)


def test_sidecars_that_know_the_same_come_to_the_same_id() -> None:
    one, other = engine_with(catalog(GUARD), acme()), engine_with(catalog(GUARD), acme())
    first = decided(one, inquiry(**ANA)).access_request_id
    assert len(first) == 32
    assert decided(other, inquiry(**ANA), now_us=NOW_US + S).access_request_id == first
    assert decided(one, inquiry(**{**ANA, "subject_id": "ben"})).access_request_id != first


def test_who_asks_again_gets_the_same_id_also_in_another_hour() -> None:
    engine = engine_with(catalog(GUARD), acme())
    first = decided(engine, inquiry(**ANA)).access_request_id
    later = NOW_US + 5 * 3_600 * S
    engine.as_of_us = later
    assert decided(engine, inquiry(**ANA), now_us=later).access_request_id == first


@pytest.mark.parametrize("observe", [False, True])
def test_a_peek_and_observe_mode_ask_nobody(observe: bool) -> None:
    engine = engine_with(catalog(GUARD), acme(), observe=observe)
    decision = decided(engine, inquiry(**ANA, peek=not observe))
    assert (decision.effect, decision.access_request_id) == (Effect.PENDING, "")


def test_no_more_than_so_many_requests_of_a_tenant_are_open() -> None:
    many = [RequestEntry(f"{n:032x}", f"{n:032x}", RequestState.PENDING, NOW_US, NOW_US + S) for n in range(OPEN_MAX)]
    engine = engine_with(catalog(GUARD), acme(*many))
    decision = decided(engine, inquiry(**ANA))
    assert (decision.effect, decision.access_request_id) == (Effect.PENDING, "")
    assert "as many open requests" in decision.message


def test_what_is_remembered_of_requests_is_bounded() -> None:
    book = RequestBook()
    none = TenantRequests(())
    ids = [book.ask(none, "acme", f"{n:032x}", NOW_US, records=True).id for n in range(ASKED_MAX + 10)]
    assert sum(bool(book.until_us("acme", id_)) for id_ in ids) == ASKED_MAX
    assert book.until_us("other", ids[-1]) == 0
    assert book.ask(none, "acme", f"{0:032x}", NOW_US, records=True).id == ids[0]


@given(
    st.lists(
        st.tuples(st.sampled_from(RequestState), st.integers(0, 3 * CLOSED_KEPT_US), st.integers(0, CLOSED_KEPT_US)),
        max_size=40,
    )
)
def test_a_document_keeps_what_is_open_or_live_and_what_closed_lately(changes: list[Any]) -> None:
    now_us = 2 * CLOSED_KEPT_US
    entries = [
        RequestEntry(f"{n:032x}", "k", state, at_us, at_us + lasts_us)
        for n, (state, at_us, lasts_us) in enumerate(changes)
    ]
    kept = kept_entries(entries, now_us)
    assert {one.id for one in entries if one.is_open(now_us) or one.is_live(now_us)} <= {one.id for one in kept}
    assert all(max(one.at_us, one.until_us) > now_us - CLOSED_KEPT_US for one in kept)
    assert [one.at_us for one in kept] == sorted(one.at_us for one in kept)


def test_a_document_keeps_the_newest_of_many_closed_requests() -> None:
    many = [RequestEntry(f"{n:032x}", "k", RequestState.DENIED, NOW_US + n) for n in range(CLOSED_MAX + 5)]
    assert next(one.at_us - NOW_US for one in kept_entries(many, NOW_US + CLOSED_MAX + 5)) == 5


def test_a_license_carries_its_requests() -> None:
    license_ = acme(APPROVED, replace(entry(RequestState.PENDING, number=2), by="", reason=""))
    assert license_from_wire(license_to_wire(license_)) == license_
    wire = license_to_wire(license_)
    wire["requests"][0] = [*APPROVED.to_wire(), "", 0, "of a newer writer"]
    assert license_from_wire(wire) == license_
    wire["requests"][0][2] = "deferred"
    with pytest.raises(ValueError, match="deferred"):
        license_from_wire(wire)


# Overrides


def override(effect: OverrideEffect = OverrideEffect.ALLOW, **changes: Any) -> Override:
    return replace(Override("i1", "report.*", effect, NOW_US + 60 * S, "INC-1", "root"), **changes)


OBJECTIONS = {
    "flag by tenant": (Flag("f", "reports", percent=0.0),),
    "flag by subject": (Flag("f", "reports", percent=0.0, by="subject"),),
    "role": (Role("exporter", ("report.*",)),),
    "deny": (Policy("p", ("*",), (Rule("all", DENY),)),),
    "condition": (Policy("p", ("*",), (Rule("all", DENY, "1 / (quantity - quantity) > 0"),)),),
    "approval": (GUARD,),
}


@pytest.mark.parametrize("objection", OBJECTIONS.values(), ids=OBJECTIONS)
def test_an_allowing_override_lifts_what_flags_roles_and_policies_object_to(objection: Any) -> None:
    content = catalog(*objection)
    assert decided(engine_with(content, acme()), inquiry(**ANA)).effect is not Effect.APPROVED
    decision = decided(engine_with(content, acme(), overrides=(override(),)), inquiry(**ANA))
    assert (decision.effect, decision.reason, decision.rule) == (Effect.APPROVED, Reason.OK, "override/i1")
    assert "INC-1" in decision.message
    assert decision.units == {"reports": 50}
    assert decision.access_request_id == ""


@pytest.mark.parametrize(
    ("license_", "content", "reason"),
    [
        (None, catalog(), Reason.NO_LICENSE),
        (License("acme", "pro", ends_s=1), catalog(), Reason.LICENSE_EXPIRED),
        (License("acme", "pro", LicenseStatus.SUSPENDED), catalog(), Reason.TENANT_SUSPENDED),
        (License("acme", "free"), catalog(), Reason.NOT_ENTITLED),
        (acme(), catalog(limits=[limit(10)]), Reason.QUOTA_EXHAUSTED),
        (acme(), catalog(Flag("f", "reports", percent=0.0), limits=[limit(10)]), Reason.QUOTA_EXHAUSTED),
    ],
)
def test_an_allowing_override_never_lifts_a_license_or_a_limit(license_: Any, content: Any, reason: Reason) -> None:
    engine = engine_with(content, *([license_] if license_ else []), overrides=(override(),))
    if license_ is None:
        engine.install_absence("acme", 1_000_000)
    decision = decided(engine, inquiry(**ANA))
    assert (decision.effect, decision.reason) == (Effect.DENIED, reason)


def test_an_override_that_changes_nothing_leaves_no_trace() -> None:
    decision = decided(engine_with(catalog(), acme(), overrides=(override(),)), inquiry(**ANA))
    assert (decision.effect, decision.rule, decision.message) == (Effect.APPROVED, "", "")


@pytest.mark.parametrize("observe", [False, True])
def test_a_denying_override_beats_everything_also_observe_mode_and_who_is_not_known(observe: bool) -> None:
    both = (override(), override(OverrideEffect.DENY, id="i2"))
    engine = engine_with(catalog(), acme(APPROVED), observe=observe, overrides=both)
    for tenant in ("acme", "unheard-of"):
        decision = decided(engine, inquiry(tenant, **ANA))
        assert (decision.effect, decision.reason, decision.rule) == (
            Effect.DENIED, Reason.POLICY_DENIED, "override/i2",
        )  # fmt: skip
        assert not decision.observed


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"action": "llm.*"},
        {"action": "report.export.all"},
        {"tenant": "other"},
        {"subject": "ben"},
        {"ends_us": NOW_US},
    ],
    ids=str,
)
def test_an_override_changes_only_what_it_is_about_and_only_for_its_time(elsewhere: dict[str, Any]) -> None:
    denying = override(OverrideEffect.DENY, **elsewhere)
    assert decided(engine_with(catalog(), acme(), overrides=(denying,)), inquiry(**ANA)).effect is Effect.APPROVED


def test_an_override_ends_by_itself() -> None:
    engine = engine_with(catalog(), acme(), overrides=(override(OverrideEffect.DENY),))
    last_us = NOW_US + 60 * S - 1
    assert decided(engine, inquiry(**ANA), now_us=last_us).effect is Effect.DENIED
    assert decided(engine, inquiry(**ANA), now_us=last_us + 1).effect is Effect.APPROVED


def test_a_new_override_compiles_nothing_again() -> None:
    engine = engine_with(catalog(GUARD), acme())
    assert engine.rulebook is not None
    bound = engine.rulebook.action("report.export")
    engine.install_bundle(engine.rulebook.with_overrides((override(),), generation=1, revision=2))
    assert engine.rulebook.action("report.export") is bound
    assert decided(engine, inquiry(**ANA)).rule == "override/i1"


def test_an_action_with_several_meters_is_allowed_all_the_same() -> None:
    content = catalog(
        Feature("other"),
        Action("report.export", {"a": "reports", "b": "other"}),
        Plan("pro", {"reports": Entitlement(), "other": Entitlement()}),
        GUARD,
    )
    asked = inquiry(subject_type="user", subject_id="ana", quantities={"a": 50, "b": 1})
    assert decided(engine_with(content, acme(APPROVED)), asked).effect is Effect.APPROVED
