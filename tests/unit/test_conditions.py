"""What a condition can say, what is refused before it ever runs, and where the refusal points."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.catalog import Attribute, AttributeType
from licet.domain.conditions import (
    LOOP_DEPTH_MAX,
    SOURCE_CHARS_MAX,
    VARIABLE_TYPES,
    ConditionEnvironment,
    ConditionError,
    ConditionFailed,
)

ENVIRONMENT = ConditionEnvironment(
    {
        "region": Attribute(AttributeType.STRING, ""),
        "count": Attribute(AttributeType.INT),
        "ratio": Attribute(AttributeType.DOUBLE),
        "beta": Attribute(AttributeType.BOOL, False),
        "tags": Attribute(AttributeType.LIST),
        "signed_at": Attribute(AttributeType.TIMESTAMP),
    }
)

BINDINGS: dict[str, Any] = {
    "tenant": "acme",
    "license.plan": "pro",
    "license.status": "active",
    "subject.type": "user",
    "subject.id": "ada",
    "subject.on_behalf_of": "",
    "subject.roles": ["analyst", "owner"],
    "subject.attributes": {"level": 3, "team": {"name": "core"}},
    "action": "report.export",
    "resource.type": "report",
    "resource.id": "r1",
    "resource.attributes": {"draft": True},
    "quantity": 12,
    "quantities": {"input": 10, "output": 2},
    "now": datetime(2026, 1, 31, 22, 30, tzinfo=UTC),
    "context.region": "eu-west",
    "context.count": 7,
    "context.ratio": 0.5,
    "context.beta": True,
    "context.tags": ["a", "b"],
    "context.signed_at": datetime(2025, 6, 1, tzinfo=UTC),
}


def refusal(source: str) -> ConditionError:
    with pytest.raises(ConditionError) as caught:
        ENVIRONMENT.compile(source)
    return caught.value


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('tenant == "acme" && license.plan == "pro" && license.status != "suspended"', True),
        ('subject.type == "user" && subject.id == "ada" && subject.on_behalf_of == ""', True),
        ('"analyst" in subject.roles', True),
        ('subject.attributes.level >= 3 && subject.attributes.team.name == "core"', True),
        ("has(subject.attributes.level) && !has(subject.attributes.age)", True),
        ('action == "report.export"', True),
        ('resource.type == "report" && resource.id == "r1" && resource.attributes.draft == true', True),
        ("quantity > 12", False),
        ('quantities["input"] + quantities["output"] == quantity', True),
        ('context.region.startsWith("eu-") && context.region.upperAscii() == "EU-WEST"', True),
        ("context.count > 6 && context.ratio < 1.0 && context.beta", True),
        ('context.tags.exists(tag, tag == "b")', True),
        ("now - context.signed_at > duration('24h')", True),
        ('now.getHours("Europe/Paris") == 23', True),
        ('context.region.matches("^(eu|us)-[a-z]+$")', True),
    ],
)
def test_answers_over_every_variable(source: str, expected: bool) -> None:
    assert ENVIRONMENT.compile(source).evaluate(BINDINGS) is expected


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        ("true", ()),
        ("quantity > 1 && quantity < 5", ("quantity",)),
        ('"context.region" == tenant', ("tenant",)),
        (
            'context . region == "x" || subject.roles.exists(role, role == tenant)',
            ("context.region", "subject.roles", "tenant"),
        ),
        ("has(subject.attributes.level)", ("subject.attributes",)),
        ('{"a": [context.count]} == {"a": [1]}', ("context.count",)),
    ],
)
def test_knows_exactly_the_variables_it_needs(source: str, variables: tuple[str, ...]) -> None:
    condition = ENVIRONMENT.compile(source)
    assert condition.variables == variables
    assert isinstance(condition.evaluate({name: BINDINGS[name] for name in variables}), bool)


@given(st.lists(st.sampled_from(sorted(BINDINGS)), max_size=6))
def test_needs_each_variable_that_is_compared(names: list[str]) -> None:
    source = " && ".join(["true", *(f"{name} == {name}" for name in names)])
    assert ENVIRONMENT.compile(source).variables == tuple(sorted(set(names)))


@pytest.mark.parametrize(
    ("source", "line", "column", "message"),
    [
        ('context.regoin == "x"', 1, 1, "context.regoin is not a declared attribute; did you mean context.region?"),
        ('true &&\n  context.zzz == "x"', 2, 3, "context.zzz is not a declared attribute; declared: context.beta, "),
        ('tenent == "acme"', 1, 1, "there is no variable tenent; did you mean tenant?"),
        ('subject.role == "x"', 1, 1, "there is no variable subject.role; did you mean subject.roles?"),
        ('license == "pro"', 1, 1, "license has no value of its own; it has license.plan, license.status"),
        ('context.region.startswith("eu")', 1, 16, "there is no function startswith(); did you mean startsWith()?"),
        ('quantity > "10"', 1, 10, "'>' does not work on (int, string)"),
        ("quantity > 1.5", 1, 10, "'>' does not work on (int, double); convert with double(), or write 2.0 for 2"),
        ("quantity >", 1, 11, "syntax error: the expression ends too early"),
        ('context.region = "x"', 1, 16, "syntax error: '=' does not compare; write '=='"),
        ("context.beta and true", 1, 14, "syntax error: unexpected 'and'; write '&&'"),
        ("context.region == 'x", 1, 19, "syntax error: the string 'x is not closed, or has an unknown escape"),
        ("quantity", 1, 1, "the condition must be true or false, but is int"),
        ("subject.attributes.level", 1, 1, "but is of unknown type: compare it with a value"),
        ("  ", 1, 1, "the condition is empty"),
        ("quantity > 0 && has(context.beta)", 1, 17, "has(context.beta) is always true"),
        ('context.region.matches("(")', 1, 24, "matches() cannot read '('"),
        ('now > timestamp("yesterday")', 1, 17, "timestamp() cannot read 'yesterday'"),
        ("tenant == '\ud800'", 1, 1, "not valid Unicode"),
    ],
)
def test_refuses_what_cannot_work_at_its_place(source: str, line: int, column: int, message: str) -> None:
    error = refusal(source)
    assert (error.line, error.column) == (line, column)
    assert message in error.message


def test_reports_every_undeclared_name_of_a_source() -> None:
    error = refusal("context.a == 1 || context.b == 2")
    assert [(one.line, one.column) for one in (error, *error.further)] == [(1, 1), (1, 19)]


def test_messages_hold_nothing_of_the_library() -> None:
    for source in ("(" * 200, "1 +", "foo()", "tenant . x", "1 / 'a' == 2"):
        message = str(refusal(source))
        assert "<input>" not in message
        assert "INVALID_ARGUMENT" not in message
        assert "\n" not in message


def test_accepts_the_longest_source_and_refuses_one_character_more() -> None:
    longest = "true".ljust(SOURCE_CHARS_MAX)
    assert ENVIRONMENT.compile(longest).evaluate({})
    assert str(SOURCE_CHARS_MAX) in refusal(longest + " ").message


def nested_loops(depth: int) -> str:
    source = "true"
    for level in range(depth):
        source = f"context.tags.all(v{level}, {source})"
    return source


def test_refuses_loops_only_when_nested_too_deep() -> None:
    assert ENVIRONMENT.compile(nested_loops(LOOP_DEPTH_MAX)).evaluate(BINDINGS)
    assert "nested 3 deep" in refusal(nested_loops(LOOP_DEPTH_MAX + 1)).message


def test_chained_loops_are_not_nested() -> None:
    source = "context.tags.map(a, a).filter(b, true).map(c, c).exists(d, d == 'a')"
    assert ENVIRONMENT.compile(source).evaluate(BINDINGS)


@pytest.mark.parametrize(
    ("source", "bindings"),
    [
        ("subject.attributes.level > 1", {"subject.attributes": {}}),
        ("10 / quantity > 1", {"quantity": 0}),
        ("quantity > 1", {}),
        ("quantity > 1", {"quantity": "1"}),
        ("quantity > 1", {"quantity": 2**63}),
        ("'a' in subject.roles", {"subject.roles": ["a", 1]}),
        ("now > timestamp(0)", {"now": 5}),
    ],
)
def test_fails_when_an_evaluation_has_no_answer(source: str, bindings: dict[str, Any]) -> None:
    condition = ENVIRONMENT.compile(source)
    with pytest.raises(ConditionFailed):
        condition.evaluate(bindings)


# What CEL means in conditions. A newer library that says otherwise fails here, and not in somebody's policy.
FAILS = "fails"
SEMANTICS: list[tuple[str, bool | str]] = [
    # Texts: code points, byte order, no conversion.
    ("size('añ€😀') == 4", True),
    ("'a' < 'b' && 'B' < 'a' && 'Z' < 'é'", True),
    ("'a' + 'b' == 'ab'", True),
    ("'ab'.contains('') && 'ab'.startsWith('') && 'ab'.endsWith('')", True),
    ("'Straße'.upperAscii() == 'STRAßE' && 'ÀB'.lowerAscii() == 'Àb'", True),
    ("'a,b,,c'.split(',') == ['a', 'b', '', 'c']", True),
    ("['a', 'b'].join('-') == 'a-b'", True),
    ("'abcb'.indexOf('b') == 1 && 'abcb'.lastIndexOf('b') == 3 && 'abc'.indexOf('z') == -1", True),
    ("'abc'.substring(1) == 'bc' && 'abc'.substring(0, 2) == 'ab' && 'abc'.charAt(3) == ''", True),
    ("'abc'.substring(5) == ''", FAILS),
    ("'aXbX'.replace('X', '-') == 'a-b-' && ' a '.trim() == 'a'", True),
    ("'eu-west'.matches('west')", True),  # anywhere in the text, unless it is anchored
    ("'eu-west'.matches('^west$')", False),
    ("int('12') == 12 && string(12) == '12' && double('0.5') == 0.5", True),
    ("int(tenant) == 1", FAILS),
    # Lists and maps.
    ("'a' in context.tags && !('z' in context.tags) && size(context.tags) == 2", True),
    ("context.tags[0] == 'a'", True),
    ("context.tags[2] == 'c'", FAILS),
    ("context.tags.all(t, t != '') && context.tags.exists(t, t == 'b') && context.tags.exists_one(t, t == 'a')", True),
    ("context.tags.filter(t, t != 'a') == ['b'] && context.tags.map(t, t + t) == ['aa', 'bb']", True),
    ("[].all(t, false) && ![].exists(t, true)", True),
    ("context.tags + ['c'] == ['a', 'b', 'c'] && context.tags != ['b', 'a']", True),
    ("quantities['output'] == 2 && 'input' in quantities && !('x' in quantities)", True),
    ("quantities['x'] == 0", FAILS),
    # Instants and durations: UTC unless a zone is named; months and days of months and years from 0, weeks from Sunday.
    ("now == timestamp('2026-01-31T22:30:00Z') && now == timestamp('2026-01-31T23:30:00+01:00')", True),
    ("now.getFullYear() == 2026 && now.getMonth() == 0 && now.getDate() == 31 && now.getDayOfMonth() == 30", True),
    ("now.getDayOfWeek() == 6 && now.getDayOfYear() == 30 && now.getHours() == 22 && now.getMinutes() == 30", True),
    ("now.getDate('Asia/Tokyo') == 1 && now.getMonth('Asia/Tokyo') == 1 && now.getHours('+02:00') == 0", True),
    ("now + duration('90m') == timestamp('2026-02-01T00:00:00Z') && now - duration('1h') < now", True),
    ("duration('90m') == duration('1.5h') && duration('-1s') < duration('0s')", True),
    ("(now - context.signed_at).getHours() == 5878", True),
    ("now.getHours('Nowhere/Land') == 1", FAILS),
    ("timestamp(tenant) < now", FAILS),
    # Numbers: int has 64 bits and never wraps; double is IEEE 754; neither becomes the other by itself.
    ("9223372036854775807 + quantity > 0", FAILS),
    ("-9223372036854775807 - quantity < 0", FAILS),
    ("quantity * 9223372036854775807 > 0", FAILS),
    ("quantity / 0 == 1", FAILS),
    ("quantity % 0 == 1", FAILS),
    ("7 / 2 == 3 && -7 / 2 == -3 && 7 % 3 == 1 && -7 % 3 == -1", True),
    ("1.0 / 0.0 > 1e308 && -1.0 / 0.0 < -1e308", True),
    ("0.0 / 0.0 == 0.0 / 0.0", False),
    ("0.1 + 0.2 == 0.3", False),
    ("int(2.9) == 2 && int(-2.9) == -2 && double(3) == 3.0", True),
    ("int(1e300) == 1", FAILS),
    # Of attributes of any type: equal across numbers, otherwise never equal; order needs one type.
    ("subject.attributes.level == 3.0 && subject.attributes.level == 3u && subject.attributes.level != '3'", True),
    ("subject.attributes.level > 2.5", True),
    ("subject.attributes.level < 'a'", FAILS),
    ("subject.attributes.level == null", False),
    ("subject.attributes.age == 1", FAILS),
    ("has(subject.attributes.age)", False),
    ("'level' in subject.attributes", True),
    ("subject.attributes.level.name == 'x'", FAILS),
    # What fails does not matter where the other side decides, on either side.
    ("false && 1 / 0 > 0", False),
    ("1 / 0 > 0 && false", False),
    ("true || 1 / 0 > 0", True),
    ("1 / 0 > 0 || true", True),
    ("1 / 0 > 0 || false", FAILS),
    ("!(1 / 0 > 0)", FAILS),
    ("true ? true : 1 / 0 > 0", True),
    ("1 / 0 > 0 ? true : true", FAILS),
    ("context.tags.exists(t, t == 'a' || 1 / 0 > 0)", True),
    ("context.tags.all(t, t == 'a' && 1 / 0 > 0)", False),
]


@pytest.mark.parametrize(("source", "expected"), SEMANTICS)
def test_means_what_the_table_says(source: str, expected: bool | str) -> None:
    condition = ENVIRONMENT.compile(source)
    try:
        found: bool | str = condition.evaluate(BINDINGS)
    except ConditionFailed:
        found = FAILS
    assert found == expected


@pytest.mark.parametrize(
    "source",
    [
        "'a' == 1",
        "tenant == null",
        "1 + 1.0 > 1.0",
        "quantity > 1u",
        "context.tags == 'a'",
        "now > 5",
        "now > '2026-01-01'",
        "9223372036854775808 > 0",
        "quantity && true",
        "quantity = 1",
        "context.tags.sort() == []",
        "math.greatest(1, 2) == 2",
    ],
)
def test_types_never_mix_by_themselves(source: str) -> None:
    refusal(source)


def test_fails_instead_of_looping_for_long() -> None:
    condition = ENVIRONMENT.compile("context.tags.all(a, context.tags.all(b, a != b || true))")
    with pytest.raises(ConditionFailed, match="budget"):
        condition.evaluate({"context.tags": ["x"] * 5_000})


def test_an_environment_without_attributes_still_has_the_common_variables() -> None:
    environment = ConditionEnvironment({})
    assert environment.compile(" && ".join(f"{name} == {name}" for name in VARIABLE_TYPES)).variables == tuple(
        sorted(VARIABLE_TYPES)
    )
    with pytest.raises(ConditionError, match="the action declares none"):
        environment.compile('context.region == "x"')
