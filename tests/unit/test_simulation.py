"""Replaying recorded decisions: what is asked, what is doubted, and what is known of earlier use."""

from __future__ import annotations

from typing import Any

from licet.domain.catalog import (
    Action,
    Catalog,
    Enforcement,
    Entitlement,
    Feature,
    Grant,
    License,
    Limit,
    Plan,
    Policy,
    Role,
    Rule,
    RuleEffect,
)
from licet.domain.ids import LimitKey
from licet.domain.windows import Anchor, Period
from licet_control_plane.core.simulation import (
    EXAMPLES_MAX,
    Change,
    Doubt,
    Skipped,
    Summary,
    Unrecorded,
    check_of,
    cost_rows,
    priors,
)

NOON_S = 1_800_014_400  # 2027-01-15T12:00:00Z
MIDNIGHT_S = NOON_S - 12 * 3_600
MONTH_S = MIDNIGHT_S - 14 * 86_400


def event(**changes: Any) -> dict[str, Any]:
    return {
        "decision_id": "d1", "tenant": "acme", "action": "a", "subject": {"type": "", "id": "ada", "on_behalf_of": ""},
        "resource": {"type": "", "id": ""}, "context": {"x": 1}, "units": {"f": 3}, "at_us": 7, **changes,
    }  # fmt: skip


def answer(effect: str = "APPROVED", reason: str = "OK", rule: str = "", cost: int = 0) -> dict[str, Any]:
    said = {"effect": effect, "reason": reason, "rule": rule, "exposures": {}}
    return said | {"cost_nanos": cost, "currency": "USD" if cost else ""}


def limit(name: str, per: Period, **fields: Any) -> Limit:
    return Limit(LimitKey(f"f:{name}"), 10, per, **fields)


def sold(*limits: Limit) -> Catalog:
    return Catalog.of([Feature("f"), Action("a", {"": "f"}), Plan("pro", {"f": Entitlement(limits=limits)})])


def test_asks_what_is_recorded_with_the_roles_that_are_assumed() -> None:
    asked = check_of(event(), ["r"])
    assert asked["subject"] == {"type": "", "id": "ada", "on_behalf_of": "", "roles": ["r"]}
    assert (asked["units"], asked["context"], asked["now_us"]) == ({"f": 3}, {"x": 1}, 7)


def test_sums_changes_by_tenant_and_answer_and_keeps_a_few_examples() -> None:
    summary = Summary()
    for number in range(EXAMPLES_MAX + 2):
        denied = answer("DENIED", "POLICY_DENIED", "p/r")
        summary.add(event(decision_id=f"d{number}"), answer(cost=5), denied, {Doubt.ROLES})
    summary.add(event(tenant="b"), answer(cost=5), answer(cost=7), set())
    summary.add(event(), answer(), {"invalid": "context.x: no"}, {Doubt.ROLES})
    assert (summary.replayed, summary.changed, summary.doubtful) == (
        EXAMPLES_MAX + 3,
        EXAMPLES_MAX + 2,
        EXAMPLES_MAX + 2,
    )
    one = summary.changes[Change("acme", "APPROVED OK", "DENIED POLICY_DENIED p/r")]
    assert (one.units, one.examples) == (3 * (EXAMPLES_MAX + 2), [f"d{n}" for n in range(EXAMPLES_MAX)])
    assert summary.skipped == {Skipped.FEATURES: 1}
    rows = list(cost_rows(summary))
    assert [(row["tenant"], row["difference"]) for row in rows] == [
        ("acme", "-0.000000025 USD"), ("b", "+0.000000002 USD"),
    ]  # fmt: skip


def test_doubts_what_conditions_read_and_events_do_not_hold() -> None:
    def governed(when: str, enforcement: Enforcement = Enforcement.ENFORCE) -> Unrecorded:
        policy = Policy("p", ("a",), (Rule("r", RuleEffect.DENY, when),), enforcement)
        return Unrecorded([Catalog.of([Action("a", {"": "f"}), Action("b", {"": "f"}), policy])])

    assert governed("quantity > 3").doubts("a") == set()
    assert governed('"boss" in subject.roles').doubts("a") == {Doubt.ROLES}
    assert governed('"boss" in subject.roles').doubts("b") == set()
    assert governed('"boss" in subject.roles').roles("a") == [(), ("boss",), ()]
    assert governed('"boss" in subject.roles', Enforcement.OFF).doubts("a") == set()
    assert governed('"team" in subject.attributes').doubts("a") == {Doubt.ATTRIBUTES}
    assert governed('resource.attributes["x"] == 1').roles("a") == [()]
    both = Action("a", {"in": "f", "out": "f"})
    opened = Unrecorded([Catalog.of([both]), Catalog.of([Role("s", ("a",)), Role("r", ("a",)), Role("t", ("z",))])])
    assert opened.doubts("a") == {Doubt.METERS, Doubt.ROLES}
    assert opened.roles("a") == [(), ("r",), ("s",), ("t",), ("r", "s")]


def test_earlier_use_is_needed_of_windows_that_were_open_already() -> None:
    catalog = sold(
        limit("month", Period.MONTH),
        limit("day", Period.DAY),
        limit("minute", Period.MINUTE),
        limit("second", Period.SECOND),
        limit("month.usd", Period.MONTH, currency="USD"),
        limit("day@subject", Period.DAY, scope=("subject",)),
        limit("mine", Period.MONTH, anchor=Anchor.LICENSE),
    )
    grant = Grant("more", LimitKey("f:month"), 5, 0, 2**33)
    license_ = License("acme", "pro", starts_s=NOON_S - 3 * 86_400, grants=(grant,))
    wanted, unknown = priors(license_, [catalog, catalog], NOON_S)
    assert sorted(tuple(prior) for prior in wanted) == [
        ("f:day", "f", MIDNIGHT_S, ""),
        ("f:mine", "f", NOON_S - 3 * 86_400, ""),
        ("f:month", "f", MONTH_S, ""),
        ("f:month.usd", "f", MONTH_S, "USD"),
    ]
    assert unknown == {"f:day@subject", "f:month+more"}
    assert priors(license_, [catalog], MIDNIGHT_S)[1] == {"f:month+more"}
    assert {prior.limit for prior in priors(license_, [catalog], MONTH_S)[0]} <= {"f:mine"}
