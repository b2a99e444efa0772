"""Policies in a decision: which rule answers, what exempts, what is only recorded, and what a condition sees."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Enforcement,
    Entitlement,
    License,
    LicenseStatus,
    Plan,
    Policy,
    Rule,
    RuleEffect,
)
from licet.domain.outcomes import Effect, Reason
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.inquiry import TimestampUs
from tests.support.engine import NOW_US, decided, engine_with, inquiry
from tests.support.published import catalog

ACME = License("acme", "pro")
ALLOW, DENY, ASK = RuleEffect.ALLOW, RuleEffect.DENY, RuleEffect.REQUIRE_APPROVAL
FAILS = "1 / (quantity - quantity) > 0"


def policy(name: str, *rules: tuple[RuleEffect, str], enforcement: Enforcement = Enforcement.ENFORCE) -> Policy:
    """Rules are named r0, r1, …"""
    made = tuple(Rule(f"r{number}", effect, when) for number, (effect, when) in enumerate(rules))
    return Policy(name, ("*",), made, enforcement)


def shadow(name: str, *rules: tuple[RuleEffect, str]) -> Policy:
    return policy(name, *rules, enforcement=Enforcement.SHADOW)


def under(*policies: Policy, **fields: Any) -> Decision:
    return decided(engine_with(catalog(*policies), ACME), inquiry(**fields))


@pytest.mark.parametrize(
    ("policies", "effect", "reason", "rule"),
    [
        ([], Effect.APPROVED, Reason.OK, ""),
        ([policy("p", (ALLOW, ""))], Effect.APPROVED, Reason.OK, ""),
        ([policy("p", (DENY, "false"))], Effect.APPROVED, Reason.OK, ""),
        ([policy("p", (DENY, "true"))], Effect.DENIED, Reason.POLICY_DENIED, "p/r0"),
        ([policy("p", (ASK, ""))], Effect.PENDING, Reason.APPROVAL_REQUIRED, "p/r0"),
        # Any deny wins, wherever it stands.
        ([policy("p", (ASK, ""), (DENY, ""))], Effect.DENIED, Reason.POLICY_DENIED, "p/r1"),
        ([policy("p", (DENY, ""), (ASK, ""))], Effect.DENIED, Reason.POLICY_DENIED, "p/r0"),
        ([policy("p", (ALLOW, ""), (DENY, ""))], Effect.DENIED, Reason.POLICY_DENIED, "p/r1"),
        ([policy("a", (ASK, "")), policy("b", (DENY, ""))], Effect.DENIED, Reason.POLICY_DENIED, "b/r0"),
        ([policy("a", (ALLOW, "")), policy("b", (DENY, ""))], Effect.DENIED, Reason.POLICY_DENIED, "b/r0"),
        # An allow exempts from approval within its policy, and only there.
        ([policy("p", (ALLOW, ""), (ASK, ""))], Effect.APPROVED, Reason.OK, ""),
        ([policy("p", (ASK, ""), (ALLOW, ""))], Effect.APPROVED, Reason.OK, ""),
        ([policy("p", (ASK, ""), (ALLOW, "false"))], Effect.PENDING, Reason.APPROVAL_REQUIRED, "p/r0"),
        ([policy("a", (ALLOW, "")), policy("b", (ASK, ""))], Effect.PENDING, Reason.APPROVAL_REQUIRED, "b/r0"),
        (
            [policy("a", (ALLOW, ""), (ASK, "")), policy("b", (ASK, ""))],
            Effect.PENDING,
            Reason.APPROVAL_REQUIRED,
            "b/r0",
        ),
        # What fails, denies.
        ([policy("p", (DENY, FAILS))], Effect.DENIED, Reason.POLICY_ERROR, "p/r0"),
        ([policy("p", (ALLOW, FAILS))], Effect.DENIED, Reason.POLICY_ERROR, "p/r0"),
        ([policy("p", (ASK, FAILS))], Effect.DENIED, Reason.POLICY_ERROR, "p/r0"),
        ([policy("p", (DENY, "context.undeclared == 1"))], Effect.DENIED, Reason.POLICY_ERROR, "p/r0"),
        ([policy("p", (ALLOW, "not a condition"))], Effect.DENIED, Reason.POLICY_ERROR, "p/r0"),
        ([policy("p", (ASK, ""), (DENY, FAILS))], Effect.DENIED, Reason.POLICY_ERROR, "p/r1"),
        # A policy that is off does not exist.
        ([policy("p", (DENY, ""), enforcement=Enforcement.OFF)], Effect.APPROVED, Reason.OK, ""),
        ([policy("p", (DENY, FAILS), enforcement=Enforcement.OFF)], Effect.APPROVED, Reason.OK, ""),
    ],
)
def test_rules_answer_in_their_order_of_strength(
    policies: list[Policy], effect: Effect, reason: Reason, rule: str
) -> None:
    decision = under(*policies)
    assert (decision.effect, decision.reason, decision.rule) == (effect, reason, rule)


def test_a_rule_that_answers_is_the_same_whatever_the_order_of_the_documents() -> None:
    policies = [policy("a", (ASK, "")), policy("b", (DENY, "")), policy("c", (DENY, "")), policy("d", (ALLOW, ""))]
    rules = {under(*order).rule for order in itertools.permutations(policies)}
    assert rules == {"b/r0"}


@pytest.mark.parametrize(
    ("patterns", "applies"),
    [
        (("report.export",), True),
        (("report.*",), True),
        (("*",), True),
        (("other", "report.export"), True),
        (("report",), False),
        (("report.export.*",), False),
        (("rep.*",), False),
        ((), False),
    ],
)
def test_a_policy_applies_to_the_actions_it_names(patterns: tuple[str, ...], applies: bool) -> None:
    decision = under(Policy("p", patterns, (Rule("no", DENY),)))
    assert (decision.reason is Reason.POLICY_DENIED) is applies


# Shadow


@pytest.mark.parametrize(
    ("policies", "reason", "recorded"),
    [
        ([shadow("s", (DENY, ""))], Reason.OK, ["s/r0=deny"]),
        ([shadow("s", (DENY, "false"))], Reason.OK, []),
        ([shadow("s", (ASK, ""), (ALLOW, ""))], Reason.OK, ["s/r0=require_approval", "s/r1=allow"]),
        ([shadow("s", (DENY, FAILS))], Reason.OK, ["s/r0=error"]),
        ([shadow("s", (DENY, "nonsense"))], Reason.OK, ["s/r0=error"]),
        ([shadow("s", (ALLOW, "")), policy("t", (ASK, ""))], Reason.APPROVAL_REQUIRED, ["s/r0=allow"]),
        ([policy("a", (DENY, "")), shadow("s", (DENY, ""))], Reason.POLICY_DENIED, ["s/r0=deny"]),
        ([shadow("s", (DENY, "")), policy("t", (DENY, ""))], Reason.POLICY_DENIED, ["s/r0=deny"]),
        ([policy("a", (DENY, FAILS)), shadow("s", (ASK, ""))], Reason.POLICY_ERROR, ["s/r0=require_approval"]),
    ],
)
def test_a_shadow_policy_is_recorded_and_does_not_answer(
    policies: list[Policy], reason: Reason, recorded: list[str]
) -> None:
    decision = under(*policies)
    assert (decision.reason, list(decision.shadow)) == (reason, recorded)


# What a condition sees


TYPED = Action(
    "report.export",
    {"": "reports"},
    {
        "region": Attribute(AttributeType.STRING, "eu"),
        "model": Attribute(AttributeType.STRING),
        "size": Attribute(AttributeType.INT, 1),
        "share": Attribute(AttributeType.DOUBLE, 0.5),
        "urgent": Attribute(AttributeType.BOOL, False),
        "tags": Attribute(AttributeType.LIST, []),
        "at": Attribute(AttributeType.TIMESTAMP, 0),
    },
)
BUSINESS_HOUR = datetime.fromtimestamp(NOW_US / 1e6, UTC)


@pytest.mark.parametrize(
    ("when", "fields"),
    [
        ('tenant == "acme"', {}),
        ('action == "report.export"', {}),
        ('license.plan == "pro" && license.status == "active"', {}),
        ("quantity == 1", {}),
        ("quantity == 0", {"quantity": 0}),
        ("quantity == 7", {"quantity": 7}),
        ("quantity == 9007199254740991", {"quantity": 2**53 - 1}),
        ('quantities[""] == 7', {"quantity": 7}),
        ('subject.id == "" && subject.type == ""', {}),
        ('subject.id == "ada" && subject.type == "user"', {"subject_id": "ada", "subject_type": "user"}),
        ('subject.on_behalf_of == "bob"', {"on_behalf_of": "bob"}),
        ('"cook" in subject.roles && size(subject.roles) == 2', {"roles": ("cook", "waiter")}),
        ("size(subject.roles) == 0", {}),
        ('subject.attributes["level"] == 3', {"subject_attributes": {"level": 3}}),
        ('subject.attributes["name"] == "x"', {"subject_attributes": {"name": "x"}}),
        ('!("level" in subject.attributes)', {}),
        ('resource.type == "report" && resource.id == "r1"', {"resource_type": "report", "resource_id": "r1"}),
        ('resource.attributes["owner"] == "ada"', {"resource_attributes": {"owner": "ada"}}),
        ('context.region == "eu" && context.size == 1 && context.share == 0.5 && !context.urgent', {}),
        ('context.region == "us"', {"context": {"region": "us"}}),
        ('context.model == ""', {"context": {"model": ""}}),
        ("context.share == 2.0", {"context": {"share": 2}}),
        ("size(context.tags) == 0", {}),
        ('"a" in context.tags', {"context": {"tags": ["a"]}}),
        ('context.at == timestamp("1970-01-01T00:00:00Z")', {}),
        ('context.at == timestamp("2024-05-06T07:08:09.5Z")', {"context": {"at": TimestampUs(1_714_979_289_500_000)}}),
        (f'now == timestamp("{BUSINESS_HOUR.isoformat()}")', {}),
        ("now.getHours() == 14", {}),
    ],
)
def test_a_condition_sees_the_request(when: str, fields: dict[str, Any]) -> None:
    engine = engine_with(catalog(TYPED, policy("p", (DENY, when))), ACME)
    decision = decided(engine, inquiry(**fields))
    assert decision.reason is Reason.POLICY_DENIED, decision.message


def test_a_missing_attribute_without_a_default_denies_and_names_the_rule() -> None:
    engine = engine_with(catalog(TYPED, policy("p", (ALLOW, 'context.model == "x"'))), ACME)
    decision = decided(engine, inquiry())
    assert (decision.reason, decision.rule) == (Reason.POLICY_ERROR, "p/r0")
    assert "p/r0" in decision.message


@pytest.mark.parametrize("number", [2**70, -(2**70)])
def test_an_attribute_no_condition_can_read_denies(number: int) -> None:
    """Attributes of subjects and resources are not declared, so that only a condition finds out."""
    decision = under(policy("p", (ALLOW, 'subject.attributes["since"] > 0')), subject_attributes={"since": number})
    assert (decision.reason, decision.rule) == (Reason.POLICY_ERROR, "p/r0")


def test_a_meter_that_was_not_named_counts_as_none() -> None:
    content = catalog(
        Action("llm", {"input": "in", "output": "out"}),
        Plan("pro", {"in": Entitlement(), "out": Entitlement()}),
        policy("p", (DENY, 'quantities["input"] > 10 || quantities["output"] > 10')),
    )
    engine = engine_with(content, ACME)
    assert decided(engine, inquiry(action="llm", quantities={"input": 5})).reason is Reason.OK
    assert decided(engine, inquiry(action="llm", quantities={"output": 11})).reason is Reason.POLICY_DENIED


def test_the_quantity_of_several_meters_is_their_sum() -> None:
    content = catalog(
        Action("llm", {"input": "in", "output": "out"}),
        Plan("pro", {"in": Entitlement(), "out": Entitlement()}),
        policy("p", (DENY, "quantity > 10")),
    )
    engine = engine_with(content, ACME)
    assert decided(engine, inquiry(action="llm", quantities={"input": 5, "output": 5})).reason is Reason.OK
    assert decided(engine, inquiry(action="llm", quantities={"input": 5, "output": 6})).reason is Reason.POLICY_DENIED


def test_conditions_of_many_rules_bind_each_variable_once() -> None:
    rules = [(DENY, f"quantity == {number}") for number in range(2, 50)]
    assert under(policy("p", *rules), quantity=49).rule == "p/r47"
    assert under(policy("p", *rules), quantity=50).reason is Reason.OK


def test_conditions_are_not_asked_about_a_license_that_ended() -> None:
    engine = engine_with(catalog(policy("p", (DENY, FAILS))), License("acme", "pro", LicenseStatus.SUSPENDED))
    assert decided(engine, inquiry()).reason is Reason.TENANT_SUSPENDED
