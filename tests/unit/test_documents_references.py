"""What documents say about each other."""

from __future__ import annotations

import pytest

from tests.support.documents import MARK, catalog_of, only_error, validated

WORLD = """\
{kind: Feature, name: llm.tokens}
---
{kind: Feature, name: reports}
---
kind: Action
name: llm.complete
feature: llm.tokens
attributes: {model: string, region: string, level: int, tags: list}
---
kind: Action
name: llm.chat
meters: {all: llm.tokens}
attributes: {region: string, tags: list}
---
{kind: ApprovalChain, name: finance, stages: [{approvers: [group:finance]}]}
---
"""
PLAN = WORLD + "kind: Plan\nname: p\nfeatures: "
POLICY = WORLD + "kind: Policy\nname: guard\nactions: ['*']\nrules: "


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        (
            WORLD + "kind: Action\nname: x\nfeature: ▶report\n",
            "there is no feature 'report'",
            "Did you mean 'reports'?",
        ),
        (WORLD + "kind: Action\nname: x\nmeters: {in: ▶llm.token}\n", "no feature 'llm.token'", "'llm.tokens'"),
        (
            WORLD + "kind: Flag\nname: x\nfeature: ▶nothing.alike\n",
            "no feature 'nothing.alike'",
            "There are: llm.tokens",
        ),
        (PLAN + "{▶llm.token: {}}", "there is no feature 'llm.token'", "Did you mean 'llm.tokens'?"),
        (WORLD + "kind: Feature\nname: ▶reports\n", "is taken by the Feature at 1.yaml:3:23", "Rename or remove"),
        (
            PLAN.replace("model: string", "model: {type: string, record: hash}")
            + '{llm.tokens: {price: {amount: "1", currency: USD, by: ▶context.model, amounts: {a: "1"}}}}',
            "'model' has 'record: hash' in the action 'llm.complete': the bill needs its value",
            "record: keep",
        ),
        (
            PLAN.replace("{region: string, tags", "{region: {type: string, record: redact}, tags")
            + "{llm.tokens: {limits: [{amount: 1, per: day, scope: [▶context.region]}]}}",
            "'region' has 'record: redact' in the action 'llm.chat': the names of its quotas would tell it",
            "Use another attribute here",
        ),
        (
            PLAN + '{llm.tokens: {price: {amount: "1", currency: USD, by: ▶context.modle, amounts: {a: "1"}}}}',
            "no action that draws on 'llm.tokens' declares the attribute 'modle'",
            "Did you mean 'model'?",
        ),
        (
            PLAN + '{llm.tokens: {price: {amount: "1", currency: USD, by: ▶context.level, amounts: {a: "1"}}}}',
            "context.level is of type int",
            "type string",
        ),
        (
            PLAN + "{llm.tokens: {limits: [{amount: 1, per: day, scope: [subject, ▶context.model]}]}}",
            "the action 'llm.chat' draws on 'llm.tokens' and does not declare the attribute 'model'",
            "Declare it there",
        ),
        (
            PLAN + "{llm.tokens: {limits: [{amount: 1, per: day}, ▶{amount: 2, per: day}]}}",
            "this limit and the one at 19:34 both have the key 'llm.tokens:day'",
            "Give one a name",
        ),
        (
            PLAN + "{llm.tokens: {limits: [{amount: 1, per: day, name: hour}, ▶{amount: 2, per: hour}]}}",
            "both have the key 'llm.tokens:hour'",
            "Give one a name",
        ),
        (
            PLAN + '{llm.tokens: {limits: [{amount: 1, per: day}, {spend: ▶"5.00 USD", per: day}]}}',
            "this budget is in USD, and 'llm.tokens' has no price in this plan",
            "Add a price in USD",
        ),
        (
            PLAN + '{llm.tokens: {price: {amount: "1", currency: EUR}, limits: [{spend: ▶"5.00 USD", per: day}]}}',
            "this budget is in USD, and 'llm.tokens' is priced in EUR",
            "Write the budget in EUR.",
        ),
        (
            POLICY + "[{name: r, effect: require_approval, approval: ▶finanse}]",
            "there is no approval chain 'finanse'",
            "Did you mean 'finance'?",
        ),
        (POLICY + "[{name: r, effect: deny}, {name: ▶r, effect: allow}]", "the rule 'r' is there twice", "Rename"),
    ],
)
def test_refuses_at_its_place(text: str, message: str, fix: str) -> None:
    error = only_error(text)
    assert message in error.message
    assert fix in error.fix


def test_a_scope_is_refused_for_each_action_that_cannot_count_it() -> None:
    result = validated(PLAN + "{llm.tokens: {limits: [{amount: 1, per: day, scope: [context.tags]}]}}")
    assert ["'llm.chat'" in error.message for error in result.errors] == [True, False]
    assert all("is of type list" in error.message for error in result.errors)


def test_a_scope_that_every_metering_action_declares_is_accepted() -> None:
    catalog_of(PLAN + "{llm.tokens: {limits: [{amount: 1, per: day, scope: [context.region]}]}}")


def test_a_name_makes_room_for_two_limits_of_one_period() -> None:
    plan = catalog_of(
        PLAN + "{llm.tokens: {limits: [{amount: 1, per: day}, {amount: 2, per: day, name: soft}]}}"
    ).plans["p"]
    assert [limit.key for limit in plan.features["llm.tokens"].limits] == ["llm.tokens:day", "llm.tokens:soft"]


def test_names_may_be_defined_in_any_file_and_order() -> None:
    catalog = catalog_of("{kind: Action, name: a, feature: f}", "{kind: Feature, name: f}")
    assert catalog.actions["a"].meters == {"": "f"}


def test_kinds_have_names_of_their_own() -> None:
    catalog_of(
        "{kind: Feature, name: x}\n---\n{kind: Action, name: x, feature: x}\n---\n{kind: Plan, name: x, features: {}}"
    )


def test_a_document_with_errors_still_defines_its_name() -> None:
    result = validated("{kind: Feature, name: f, title: 1}\n---\n{kind: Action, name: a, feature: f}")
    assert [error.path for error in result.errors] == ["Feature f: title"]


def test_an_action_with_errors_makes_no_attribute_look_undeclared() -> None:
    result = validated(
        """
        {kind: Feature, name: f}
        ---
        {kind: Action, name: a, feature: f, attributes: {x: strin}}
        ---
        {kind: Plan, name: p, features: {f: {limits: [{amount: 1, per: day, scope: [context.x]}]}}}
        ---
        {kind: Policy, name: q, actions: [a], rules: [{name: r, effect: deny, when: context.x == "1"}]}
        """
    )
    assert [error.path for error in result.errors] == ["Action a: attributes.x.type"]


def test_warns_of_patterns_that_match_nothing() -> None:
    text = WORLD + "kind: Role\nname: r\nactions: [llm.*, ▶llm.compleet]\n"
    before, _, after = text.partition(MARK)
    warning = next(one for one in validated(before + after).warnings if one.code == "matches-no-action")
    assert (warning.line, warning.column) == (before.count("\n") + 1, len(before) - before.rfind("\n"))
    assert warning.message == "'llm.compleet' matches no action, so that it has no effect"
    assert warning.fix == "Did you mean 'llm.complete'?"


def test_warns_of_limits_on_what_no_action_draws_on() -> None:
    found = validated(PLAN + "{reports: {limits: [{amount: 1, per: day}]}}").warnings
    warning = next(one for one in found if one.code == "limit-without-action")
    assert warning.message == "no action draws on 'reports', so that its limits have no effect"


def test_warnings_do_not_stand_in_the_way() -> None:
    assert "r" in catalog_of(WORLD + "{kind: Role, name: r, actions: [nothing.*]}").roles


FLAG = WORLD + "kind: Flag\nname: f\nfeature: llm.tokens\nvariants: {red: 1, green: 2}\ntargeting:\n  - "


@pytest.mark.parametrize(
    ("rule", "message", "fix"),
    [
        ("{name: t, serve: ▶rde}\n", "'rde' is neither a variant of the flag nor on or off", "'red'"),
        ("{name: t, serve: on}\n  - {name: ▶t, serve: off}\n", "'t' is there twice", "Rename"),
        (
            "{name: t, serve: off, when: '▶context.regoin == \"eu\"'}\n",
            "context.regoin is not a declared attribute",
            "asked about",
        ),
        (
            "{name: t, serve: off, when: '▶context.level == 1'}\n",
            "context.level is not a declared attribute",
            "'llm.chat'",
        ),
    ],
)
def test_targeting_fits_the_flag_and_every_action_of_its_feature(rule: str, message: str, fix: str) -> None:
    error = only_error(FLAG + rule)
    assert message in error.message
    assert fix in f"{error.message} {error.fix}"


def test_warns_of_an_action_that_is_priced_in_two_currencies() -> None:
    features = "{kind: Feature, name: f}\n---\n{kind: Feature, name: g}\n---\n"
    action = "{kind: Action, name: a, meters: {x: f, y: g}}\n---\n"
    price = '{{price: {{amount: "1", per_units: 1, currency: {}}}}}'
    plan = f"kind: Plan\nname: p\nfeatures:\n  f: {price.format('USD')}\n  g: {price.format('EUR')}\n"
    (warning,) = validated(features + action + plan).warnings
    assert "'a' is priced in EUR and USD" in warning.message
