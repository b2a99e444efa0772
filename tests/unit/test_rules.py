"""Rulings that are remembered: as they would be made anew, for every inquiry, and never too many of them."""

from __future__ import annotations

from typing import Any

import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Enforcement,
    Entitlement,
    Feature,
    License,
    Plan,
    Policy,
    Rule,
    RuleEffect,
)
from licet.domain.conditions import Condition
from licet.domain.outcomes import Effect, Reason
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.rules import RULINGS_MAX
from tests.support.engine import decided, engine_with, inquiry

REGION = Attribute(AttributeType.STRING)
SIZE = Attribute(AttributeType.INT, 0)


def engine(
    when: str, *, effect: RuleEffect = RuleEffect.DENY, enforcement: Enforcement = Enforcement.ENFORCE
) -> Engine:
    """One action, with attributes region and size, under one rule."""
    return engine_with(
        Catalog.of(
            [
                Feature("reports"),
                Action("report.export", {"": "reports"}, {"region": REGION, "size": SIZE}),
                Plan("pro", {"reports": Entitlement()}),
                Plan("max", {"reports": Entitlement()}),
                Policy("p", ("report.*",), (Rule("r", effect, when),), enforcement),
            ]
        ),
        License("acme", "pro"),
        License("globex", "max"),
    )


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The source of every condition that was evaluated."""
    seen: list[str] = []
    real = Condition.evaluate

    def counting(condition: Condition, bindings: Any) -> bool:
        seen.append(condition.source)
        return real(condition, bindings)

    monkeypatch.setattr(Condition, "evaluate", counting)
    return seen


def test_the_same_values_are_ruled_on_once(evaluations: list[str]) -> None:
    subject = engine('context.region == "xx"')
    effects = [decided(subject, inquiry(context={"region": region})).effect for region in ("xx", "eu", "xx", "eu")]
    assert effects == [Effect.DENIED, Effect.APPROVED] * 2
    assert len(evaluations) == 2


def test_a_missing_value_is_ruled_on_apart_from_an_empty_one() -> None:
    subject = engine('context.region == "xx"')
    reasons = [decided(subject, inquiry(context=context)).reason for context in ({"region": ""}, {}, {"region": ""})]
    assert reasons == [Reason.OK, Reason.POLICY_ERROR, Reason.OK]


def test_a_missing_value_is_named_with_what_is_wrong() -> None:
    decision = decided(engine('context.region == "xx"'), inquiry())
    assert decision.message == "The condition of p/r failed: context.region was not sent and has no default."


def test_the_plan_of_the_license_is_one_of_the_values() -> None:
    subject = engine('license.plan == "max"')
    effects = {name: decided(subject, inquiry(name)).effect for name in ("acme", "globex")}
    assert effects == {"acme": Effect.APPROVED, "globex": Effect.DENIED}


@pytest.mark.parametrize(
    ("when", "field", "values"),
    [
        ("quantity > 5", "quantity", [9, 3]),
        ("context.size > 5", "context", [{"size": 9}, {"size": 3}]),
        ('subject.id == "a"', "subject_id", ["a", "b"]),
        ('"admin" in subject.roles', "roles", [("admin",), ()]),
    ],
)
def test_what_has_many_values_is_evaluated_each_time(
    when: str, field: str, values: list[Any], evaluations: list[str]
) -> None:
    subject = engine(when)
    effects = [decided(subject, inquiry(**{field: value})).effect for value in [*values, *values]]
    assert effects == [Effect.DENIED, Effect.APPROVED] * 2
    assert len(evaluations) == 4


def test_what_a_shadow_policy_says_is_remembered_too() -> None:
    subject = engine('context.region == "xx"', enforcement=Enforcement.SHADOW)
    shadows = [list(decided(subject, inquiry(context={"region": region})).shadow) for region in ("xx", "eu", "xx")]
    assert shadows == [["p/r=deny"], [], ["p/r=deny"]]


def test_no_more_rulings_are_kept_than_the_maximum() -> None:
    subject = engine('context.region == "xx"')
    for number in range(RULINGS_MAX + 10):
        decided(subject, inquiry(context={"region": str(number)}))
    assert subject.rulebook is not None
    bound = subject.rulebook.action("report.export")
    assert bound is not None
    assert 0 < len(bound.rulings) <= RULINGS_MAX
