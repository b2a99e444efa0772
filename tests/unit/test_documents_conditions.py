"""Conditions of policies: checked for every action they are asked about, and refused inside the expression."""

from __future__ import annotations

import pytest

from licet_control_plane.core.documents import SourceFile, validate
from licet_control_plane.core.documents.findings import ERRORS_MAX
from tests.support.documents import catalog_of, only_error, validated

WORLD = """\
{kind: Feature, name: f}
---
{kind: Action, name: report.view, feature: f, attributes: {region: string, level: int}}
---
{kind: Action, name: report.export, feature: f, attributes: {region: string, level: string, format: string}}
---
{kind: Action, name: llm.chat, feature: f}
---
kind: Policy
name: guard
"""


@pytest.mark.parametrize(
    "rules",
    [
        "  - {name: r, effect: deny, when: '▶context.regoin == \"x\"'}\n",
        "  - {name: r, effect: deny, when: \"true && ▶context.regoin == 'x'\"}\n",
        "  - {name: r, effect: deny, when: true && ▶context.regoin == 'x'}\n",
        "  - name: r\n    effect: deny\n    when: |\n      true &&\n\n        ▶context.regoin == 'x'\n",
        "  - name: r\n    effect: deny\n    when: >-\n      true && ▶context.regoin == 'x'\n",
        # Where the text is not in the file as it stands, the value's own place is the best there is.
        "  - {name: r, effect: deny, when: ▶'tenant == ''x'' && context.regoin == \"x\"'}\n",
        "  - name: r\n    effect: deny\n    when: ▶>-\n      true &&\n      context.regoin == 'x'\n",
    ],
)
def test_points_into_the_expression_however_it_is_quoted(rules: str) -> None:
    error = only_error(WORLD + "actions: [report.view]\nrules:\n" + rules)
    assert error.message == "context.regoin is not a declared attribute; did you mean context.region?"
    assert error.path == "Policy guard: rules[0].when"


def test_reports_every_undeclared_name_of_one_condition() -> None:
    result = validated(
        WORLD + "actions: [report.view]\nrules: [{name: r, effect: deny, when: 'context.a == 1 && context.b == 2'}]\n"
    )
    assert [error.message.partition(" ")[0] for error in result.errors] == ["context.a", "context.b"]


def test_names_the_actions_a_condition_fails_for() -> None:
    text = WORLD + "actions: ['*']\nrules: [{name: r, effect: deny, when: '▶context.region == \"x\"'}]\n"
    assert only_error(text).fix == "The condition is asked about 'llm.chat'."


def test_checks_a_condition_again_where_an_attribute_has_another_type() -> None:
    text = WORLD + "actions: [report.*]\nrules: [{name: r, effect: deny, when: 'context.level ▶> 3'}]\n"
    error = only_error(text)
    assert error.message == "'>' does not work on (string, int)"
    assert error.fix == "The condition is asked about 'report.export'."


def test_accepts_a_condition_over_what_all_its_actions_share() -> None:
    text = WORLD + "actions: [report.*]\nrules: [{name: r, effect: deny, when: 'context.region == \"x\"'}]\n"
    assert catalog_of(text).policies["guard"].rules[0].when == 'context.region == "x"'


@pytest.mark.parametrize("enforcement", ["enforce", "shadow", "off"])
def test_checks_policies_however_they_are_enforced(enforcement: str) -> None:
    only_error(
        WORLD
        + f"enforcement: {enforcement}\nactions: [llm.chat]\nrules: [{{name: r, effect: deny, when: ▶quantity}}]\n"
    )


def test_a_rule_with_another_error_has_its_condition_checked_too() -> None:
    result = validated(WORLD + "actions: [llm.chat]\nrules: [{name: r, effect: dny, when: 'context.x == 1'}]\n")
    assert [error.path for error in result.errors] == ["Policy guard: rules[0].effect", "Policy guard: rules[0].when"]


def rules_file(count: int, condition: str) -> str:
    lines = [
        f"  - {{name: r{number}, effect: deny, when: '{condition} && quantity > {number}'}}" for number in range(count)
    ]
    return "\n".join([WORLD + "actions: [report.*]\nrules:", *lines])


def test_ten_thousand_different_rules_are_all_checked() -> None:
    catalog = validate(
        [
            SourceFile("1.yaml", rules_file(5_000, 'context.region == "x"')),
            SourceFile(
                "2.yaml",
                rules_file(5_000, 'context.region == "y"').partition("kind: Policy\n")[1]
                + "name: second\n"
                + rules_file(5_000, 'context.region == "y"').partition("name: guard\n")[2],
            ),
        ]
    ).catalog
    assert catalog is not None
    assert sum(len(policy.rules) for policy in catalog.policies.values()) == 10_000


def test_stops_describing_errors_at_a_bound_and_says_so() -> None:
    errors = validated(rules_file(ERRORS_MAX + 5, "context.regoin == 1")).errors
    assert len(errors) == ERRORS_MAX + 1
    assert errors[-1].message == f"no more than {ERRORS_MAX} errors are shown"
