"""What is legal and makes no sense is told, where it stands, and only when it is certain."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from licet.domain.catalog import Attribute, AttributeType
from licet.domain.conditions import ConditionEnvironment, ConditionFailed
from licet_control_plane.core.documents import DocumentError, SourceFile, validate
from licet_control_plane.core.documents.satisfiability import why_never_true
from tests.support.documents import MARK

WORLD = """\
{kind: Feature, name: reports}
---
{kind: Feature, name: tokens}
---
kind: Action
name: report.view
feature: reports
attributes: &declared {region: string, count: int, ratio: double, beta: bool, tags: list, at: timestamp}
---
{kind: Action, name: report.export, feature: reports, attributes: {region: string, count: int, ratio: double,
  beta: bool, tags: list, at: timestamp}}
---
{kind: Action, name: llm.chat, meters: {input: tokens, output: tokens}}
---
{kind: Plan, name: pro, features: {reports: {}, tokens: {}}}
---
{kind: Role, name: analyst, actions: [report.*]}
---
{kind: ApprovalChain, name: finance, stages: [{approvers: [group:finance]}]}
---
"""


def warnings_of(text: str) -> list[DocumentError]:
    result = validate([SourceFile("1.yaml", text)])
    assert [str(error) for error in result.errors] == []
    return list(result.warnings)


def only_warning(text: str) -> DocumentError:
    """The one warning of a text, which must stand at its mark."""
    before, mark, after = text.partition(MARK)
    assert mark
    found = warnings_of(before + after)
    assert len(found) == 1, [str(one) for one in found]
    position = (before.count("\n") + 1, len(before) - before.rfind("\n"))
    assert (found[0].line, found[0].column) == position, str(found[0])
    return found[0]


def policy(rules: str, *, name: str = "guard", actions: str = "report.*", more: str = "") -> str:
    return f"---\nkind: Policy\nname: {name}\n{more}actions: ['{actions}']\nrules:\n{rules}"


def deny(when: str, name: str = "r") -> str:
    return (
        f"  - name: {name}\n    effect: deny\n    when: >-\n      {when}\n"
        if when
        else f"  - {{name: {name}, effect: deny}}\n"
    )


NEVER = [
    "false",
    "!true",
    "1 == 2",
    "2 < 1 || 'a' > 'b'",
    'context.region == "eu" && context.region == "us"',
    'context.region == "eu" && !(context.region == "eu")',
    'context.region in ["eu", "us"] && context.region == "xx"',
    'context.region in ["eu"] && context.region in ["us"]',
    'context.region == "eu" && context.region != "eu"',
    'context.region in ["eu", "us"] && context.region != "eu" && !(context.region in ["us"])',
    "context.region in []",
    'context.region.startsWith("eu-") && context.region == "us-1"',
    'context.region.startsWith("eu") && context.region.startsWith("us")',
    'context.region.startsWith("eu") && !context.region.startsWith("e")',
    'context.region.endsWith("1") && context.region == "eu-2"',
    'context.region.lowerAscii() == "EU"',
    'context.region > "b" && context.region < "a"',
    "context.count > 5 && context.count < 6",
    "context.count > 5 && context.count <= 5",
    "5 > context.count && 6 < context.count",
    "context.count > 9223372036854775807",
    "context.count >= 5 && context.count <= 6 && context.count != 5 && context.count != 6",
    "!(context.count > 3) && context.count == 4",
    "context.count < context.count",
    "quantity < 0",
    "quantity == -1",
    "size(context.tags) < 0",
    "size(context.region) == -1",
    "now.getMonth() == 12",
    "now.getDayOfWeek() > 6",
    'now.getHours("Europe/Paris") == 24',
    "context.ratio > 1.5 && context.ratio < 1.5",
    "context.ratio == 0.5 && context.ratio == 0.75",
    "context.beta && !context.beta",
    "context.beta && context.beta == false",
    '"a" in context.tags && !("a" in context.tags)',
    'now > timestamp("2027-01-01T00:00:00Z") && now < timestamp("2026-01-01T00:00:00Z")',
    'now == timestamp("2026-01-01T00:00:00Z") && now == timestamp("2026-01-01T02:00:00+01:00")',
    "subject.attributes.level == null",
    'resource.attributes["level"] == null',
    'subject.attributes.level == "a" && subject.attributes.level == 1',
    'context.beta ? context.region == "a" && context.region == "b" : false',
    '!(context.region == "a" || true)',
]
MAYBE = [
    "true",
    "1 / quantity > 0",
    'context.region == "eu" || context.region == "us"',
    'context.region == "eu" || (context.beta && !context.beta)',
    "context.count > 5 && context.count < 7",
    "context.count >= 5 && context.count <= 5",
    "context.ratio > 1.5 && context.ratio < 1.50001",
    "!(context.ratio < 1.0) && !(context.ratio >= 1.0)",  # not a number
    "context.ratio != context.ratio",
    "subject.attributes.level > 5 && subject.attributes.level < 6",  # 5.5
    "subject.attributes.level == 1 && subject.attributes.level == 1.0",
    "!(subject.attributes.level < 1) && !(subject.attributes.level >= 1)",
    'context.region.startsWith("eu") && context.region.startsWith("eu-")',
    'context.region.contains("a") && context.region == "a"',
    "context.region > 'a' && context.region < 'b'",
    "context.tags.exists(t, t == 'a' && t != 'a')",  # a loop is not looked into
    "(now - context.at).getHours() > 24",
    "(now - context.at).getSeconds() > 60",
    "now.getMonth() == 11",
    "quantity == 0",
    "has(subject.attributes.level) && !has(resource.attributes.level)",
]


@pytest.mark.parametrize("when", NEVER)
def test_a_condition_that_is_never_true_is_told(when: str) -> None:
    warning = only_warning(WORLD + policy(f"  - name: r\n    effect: deny\n    when: {MARK}>-\n      {when}\n"))
    assert (warning.code, warning.severity.value) == ("never-true", "warning")
    assert warning.message.startswith("the condition is never true: ")
    assert warning.fix == "Correct it, or remove the rule."


@pytest.mark.parametrize("when", MAYBE)
def test_a_condition_that_may_be_true_is_not(when: str) -> None:
    assert warnings_of(WORLD + policy(deny(when))) == []


def test_a_condition_of_too_many_alternatives_is_not_decided() -> None:
    when = " && ".join([f"(quantity == {n} || tenant == 't{n}')" for n in range(40)])
    assert warnings_of(WORLD + policy(deny(when))) == []


@pytest.mark.parametrize(
    ("when", "code", "message", "fix"),
    [
        ('license.plan == "por"', "unknown-value", "license.plan is never 'por'", "Did you mean 'pro'?"),
        ('license.plan in ["pro", "por"]', "unknown-value", "there is no plan of that name", "'pro'"),
        ('license.status == "suspendet"', "unknown-value", "license.status is never 'suspendet'", "'suspended'"),
        ('"llm.chat" == action', "unknown-value", "the policy is not asked about an action", "There are"),
        ('!("analist" in subject.roles)', "unknown-role", "no Role is named 'analist'", "Did you mean 'analyst'?"),
        ('quantities["inputs"] > 1', "unknown-meter", "none of the policy's actions has a meter 'inputs'", "none yet"),
    ],
)
def test_a_name_that_nobody_has_is_told(when: str, code: str, message: str, fix: str) -> None:
    warning = only_warning(WORLD + policy(f"  - name: r\n    effect: deny\n    when: {MARK}>-\n      {when}\n"))
    assert warning.code == code
    assert message in warning.message
    assert fix in warning.fix


def test_a_meter_that_one_of_the_actions_has_is_no_mistake() -> None:
    assert warnings_of(WORLD + policy(deny('action == "llm.chat" && quantities.input > 1'), actions="*")) == []


def test_roles_are_not_missed_where_none_is_declared() -> None:
    world = WORLD.replace("{kind: Role, name: analyst, actions: [report.*]}\n---\n", "")
    assert warnings_of(world + policy(deny('"analyst" in subject.roles'))) == []


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("{kind: Feature, name: ▶unused}", "unused-feature", "no action draws on 'unused'"),
        (
            "{kind: Feature, name: f}\n---\n{kind: Action, name: a, feature: ▶f}",
            "unreachable-action",
            "no plan grants 'f', so that 'a' is always answered NOT_ENTITLED",
        ),
        (
            "{kind: Feature, name: f}\n---\n{kind: Action, name: a, meters: ▶{x: tokens, y: f}}",
            "unreachable-action",
            "no plan grants 'f'",
        ),
        (
            "{kind: ApprovalChain, name: c, stages: [{approvers: [user:a, ▶role:analist]}]}",
            "unknown-role",
            "no Role is named 'analist'",
        ),
    ],
)
def test_what_nobody_can_reach_is_told(text: str, code: str, message: str) -> None:
    warning = only_warning(WORLD + text)
    assert warning.code == code
    assert message in warning.message


def test_a_feature_sold_by_the_seat_needs_no_action() -> None:
    assert warnings_of(WORLD + "{kind: Feature, name: e}\n---\n{kind: Plan, name: s, features: {e: {seats: 3}}}") == []


ASK = "effect: require_approval, approval: finance"


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (  # a wider denial, in a policy that comes later
            policy(f"  - ▶{{name: r, {ASK}}}\n") + policy("  - {name: all, effect: deny}\n", name="zz", actions="*"),
            "zz/all denies always, and a denial wins",
        ),
        (
            policy(f"  - {{name: d, effect: deny}}\n  - ▶{{name: r, {ASK}, when: quantity > 1}}\n"),
            "guard/d denies always",
        ),
        (policy("  - {name: d, effect: deny, when: 'true'}\n  - ▶{name: r, effect: deny}\n"), "guard/d denies always"),
        (  # two that deny together what it is about
            policy(f"  - ▶{{name: r, {ASK}}}\n")
            + policy("  - {name: v, effect: deny}\n", name="a", actions="report.view")
            + policy("  - {name: e, effect: deny}\n", name="b", actions="report.export"),
            "b/e denies always",
        ),
        (
            policy(f"  - ▶{{name: r, {ASK}, when: quantity>1}}\n  - {{name: d, effect: deny, when: (quantity > 1)}}\n"),
            "guard/d denies on the same condition",
        ),
        (policy(f"  - ▶{{name: r, {ASK}}}\n  - {{name: e, effect: allow}}\n"), "guard/e exempts from it always"),
        (
            policy(f"  - {{name: a, {ASK}}}\n  - ▶{{name: r, {ASK}, when: quantity > 1}}\n"),
            "guard/a, above it, does the same always",
        ),
        (policy("  - ▶{name: r, effect: allow, when: quantity > 1}\n"), "it asks for none"),
    ],
)
def test_a_rule_that_never_decides_is_told(policies: str, message: str) -> None:
    warning = only_warning(WORLD + policies.removeprefix("---\n"))
    assert warning.code == "shadowed-rule"
    assert message in warning.message


@pytest.mark.parametrize(
    "policies",
    [
        # The denial is not about all of its actions.
        policy(f"  - {{name: r, {ASK}}}\n") + policy("  - {name: d, effect: deny}\n", name="zz", actions="report.view"),
        # It does not decide, or is recorded all the same.
        policy(f"  - {{name: r, {ASK}}}\n")
        + policy("  - {name: d, effect: deny}\n", name="zz", more="enforcement: shadow\n"),
        policy(f"  - {{name: r, {ASK}}}\n", more="enforcement: shadow\n")
        + policy("  - {name: d, effect: deny}\n", name="zz"),
        # Two loops, which look alike from outside, and two maps.
        policy(
            "  - {name: d, effect: deny, when: 'context.tags.exists(t, t == \"a\")'}\n"
            "  - {name: r, effect: deny, when: 'context.tags.exists(t, t == \"b\")'}\n"
            '  - {name: m, effect: deny, when: \'{"a": 1} == {"a": context.count}\'}\n'
            '  - {name: n, effect: deny, when: \'{"a": 2} == {"a": context.count}\'}\n'
        ),
        # Of two denials the first one decides, wherever the other is.
        policy("  - {name: r, effect: deny, when: quantity > 1}\n  - {name: d, effect: deny}\n"),
        # Rules of other policies exempt from nothing.
        policy(f"  - {{name: r, {ASK}}}\n")
        + policy(
            f"  - {{name: a, effect: allow, when: quantity > 1}}\n  - {{name: b, {ASK}, when: quantity > 2}}\n",
            name="zz",
        ),
        policy(f"  - {{name: a, {ASK}, when: quantity > 1}}\n  - {{name: r, {ASK}}}\n"),
    ],
)
def test_a_rule_that_may_decide_is_not(policies: str) -> None:
    assert [str(one) for one in warnings_of(WORLD + policies.removeprefix("---\n"))] == []


# What is called never true is asked, of everything that can be asked about.

ENVIRONMENT = ConditionEnvironment(
    {
        "region": Attribute(AttributeType.STRING),
        "count": Attribute(AttributeType.INT),
        "ratio": Attribute(AttributeType.DOUBLE),
        "beta": Attribute(AttributeType.BOOL),
    }
)
KNOWN = {"license.plan": frozenset(("pro", "free"))}
TEXTS = ("", "a", "ab", "b", "A", "é")
INTS = (-1, 0, 1, 2, 2**63 - 1)
DOUBLES = (-1.0, -0.0, 0.0, 0.5, 1.0, float("nan"), float("inf"))
texts = st.sampled_from([f'"{text}"' for text in TEXTS])
ints = st.sampled_from([str(number) for number in INTS])
doubles = st.sampled_from(("-1.0", "0.0", "0.5", "1.0", "1.5"))
orders = st.sampled_from(("==", "!=", "<", "<=", ">", ">="))
level = st.sampled_from(("subject.attributes.level", 'subject.attributes["level"]'))
instants = st.sampled_from([f'timestamp("2026-01-0{day}T00:00:00Z")' for day in (1, 2, 3)])


def _joined(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(" ".join)


atoms = st.one_of(
    _joined(st.just("context.region"), orders, texts),
    _joined(texts, orders, st.just("context.region")),
    st.lists(texts, max_size=3).map(lambda some: f"context.region in [{', '.join(some)}]"),
    st.tuples(st.sampled_from(("startsWith", "endsWith", "contains")), texts).map(
        lambda pair: f"context.region.{pair[0]}({pair[1]})"
    ),
    _joined(st.sampled_from(("context.region.lowerAscii()", "context.region.upperAscii()")), orders, texts),
    _joined(st.sampled_from(("context.count", "quantity", "size(context.region)", "now.getDate()")), orders, ints),
    _joined(st.just("context.ratio"), orders, doubles),
    _joined(level, orders, st.one_of(ints, doubles, texts, st.just("null"))),
    _joined(st.just("now"), orders, instants),
    _joined(st.just("license.plan"), orders, st.sampled_from(('"pro"', '"free"', '"none"'))),
    st.sampled_from(("context.beta", "true", "false", "context.beta == true", "1 / quantity > 0")),
)


def _put_together(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.sampled_from(("&&", "&&", "||")), inner).map(lambda some: f"({' '.join(some)})"),
        inner.map(lambda one: f"!({one})"),
        st.tuples(inner, inner, inner).map(lambda some: "({} ? {} : {})".format(*some)),
    )


conditions = _put_together(st.one_of(atoms, _put_together(st.one_of(atoms, atoms, _put_together(atoms)))))


def bindings(rng: random.Random) -> dict[str, Any]:
    return {
        "context.region": rng.choice(TEXTS),
        "context.count": rng.choice(INTS),
        "context.ratio": rng.choice(DOUBLES),
        "context.beta": rng.choice((True, False)),
        "quantity": rng.choice((0, 1, 2)),
        "now": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=rng.randint(-24, 96)),
        "license.plan": rng.choice(("pro", "free")),
        "subject.attributes": {"level": rng.choice((*TEXTS, *INTS, *DOUBLES, True, ["a"]))}
        if rng.random() < 0.9
        else {},
    }


@settings(max_examples=400, deadline=None)
@given(conditions, st.integers(0, 2**32))
def test_what_is_called_never_true_is_true_of_no_request(source: str, seed: int) -> None:
    condition, checked = ENVIRONMENT.compile_checked(source)
    why = why_never_true(checked.tree(), KNOWN)
    if not why:
        return
    rng = random.Random(seed)
    for _ in range(60):
        values = bindings(rng)
        try:
            assert not condition.evaluate(values), (source, why, values)
        except ConditionFailed:
            pass
