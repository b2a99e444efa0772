"""Plans that extend plans and roles that include roles: what they come to, and what is refused where."""

from __future__ import annotations

import pytest

from licet.domain.catalog import Plan
from licet_control_plane.core.documents import inheritance
from licet_control_plane.core.documents.inheritance import CHAIN_MAX
from tests.support.documents import catalog_of, only_error, validated

WORLD = """\
{kind: Feature, name: reports}
---
{kind: Feature, name: tokens}
---
{kind: Feature, name: editor}
---
{kind: Action, name: report.view, feature: reports}
---
{kind: Action, name: report.export, feature: reports}
---
{kind: Action, name: llm.chat, feature: tokens}
---
"""
PRO = (
    WORLD
    + """\
kind: Plan
name: pro
title: Pro
fee: "49.00 USD"
features:
  reports: {}
  tokens:
    included: 100
    price: {amount: "8.00", per_units: 1_000, currency: USD}
    limits:
      - {amount: 1_000, per: month}
      - {amount: 50, per: minute, scope: [subject]}
      - {spend: "5.00 USD", per: day}
  editor: {seats: 25, heartbeat: 30s}
---
"""
)


def extended(body: str) -> tuple[Plan, Plan]:
    """The plan ``pro`` and a plan that extends it."""
    plans = catalog_of(PRO + "kind: Plan\nname: plus\nextends: pro\n" + body).plans
    return plans["pro"], plans["plus"]


def amounts(plan: Plan, feature: str = "tokens") -> dict[str, int]:
    return {limit.key: limit.amount for limit in plan.features[feature].limits}


def test_a_plan_that_says_nothing_is_the_one_it_extends_but_for_its_name_and_title() -> None:
    pro, plus = extended("")
    assert (plus.features, plus.fee) == (pro.features, pro.fee)
    assert (plus.name, plus.title) == ("plus", "")


@pytest.mark.parametrize("fee", ['"0.00 USD"', "'0 EUR'"])
def test_a_fee_is_replaced_and_one_of_nothing_is_none(fee: str) -> None:
    assert extended('fee: "99.00 USD"\n')[1].fee != extended("")[0].fee
    assert extended(f"fee: {fee}\n")[1].fee is None


def test_a_field_that_is_written_replaces_and_the_others_stay() -> None:
    pro, plus = extended("features:\n  tokens: {included: 7}\n  editor: {seats: 50}\n")
    tokens = plus.features["tokens"]
    assert (tokens.included, tokens.price, tokens.limits) == (
        7,
        pro.features["tokens"].price,
        pro.features["tokens"].limits,
    )
    assert (plus.features["editor"].seats, plus.features["editor"].heartbeat_s) == (50, 30)
    assert extended("features: {editor: {seats: 50, heartbeat: 60s}}")[1].features["editor"].heartbeat_s == 60


def test_a_price_is_replaced_whole() -> None:
    _, plus = extended('features: {tokens: {price: {amount: "1.00", currency: USD}}}')
    price = plus.features["tokens"].price
    assert price is not None
    assert price.per_units == 1


def test_a_limit_replaces_the_one_of_its_key_in_place_and_others_are_added() -> None:
    _, plus = extended("features: {tokens: {limits: [{amount: 9, per: day}, {amount: 2_000, per: month}]}}")
    assert list(amounts(plus).items()) == [
        ("tokens:month", 2_000),
        ("tokens:minute@subject", 50),
        ("tokens:day.usd", 5_000_000_000),
        ("tokens:day", 9),
    ]


def test_a_feature_or_a_limit_is_left_out() -> None:
    _, plus = extended("without: [reports, 'tokens:minute@subject', tokens:day.usd]")
    assert list(plus.features) == ["tokens", "editor"]
    assert list(amounts(plus)) == ["tokens:month"]


def test_a_feature_that_is_left_out_and_written_begins_anew() -> None:
    _, plus = extended("without: [tokens]\nfeatures: {tokens: {limits: [{amount: 3, per: hour}]}}")
    tokens = plus.features["tokens"]
    assert (tokens.price, tokens.included, amounts(plus)) == (None, 0, {"tokens:hour": 3})


def test_a_chain_in_any_order_of_files_comes_to_the_same() -> None:
    top = "{kind: Plan, name: top, extends: middle, features: {tokens: {included: 3}}}"
    middle = "{kind: Plan, name: middle, extends: pro, without: [editor]}"
    one, other = catalog_of(PRO, middle, top), catalog_of(top, middle, PRO)
    assert one == other
    assert list(one.plans["top"].features) == ["reports", "tokens"]
    assert one.plans["top"].features["tokens"].included == 3


PLUS = PRO + "kind: Plan\nname: plus\n"


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        (PLUS + "extends: ▶por\n", "there is no plan 'por'", "Did you mean 'pro'?"),
        (PLUS + "extends: ▶plus\n", "the plan extends itself: plus -> plus", "none of the others"),
        (PLUS + "extends: pro\nwithout: [reports, ▶report]\n", "no feature 'report' to leave out of 'pro'", "editor"),
        (PLUS + "extends: pro\nwithout: [reports, ▶reports]\n", "no feature 'reports' to leave out", "There are"),
        (PLUS + "extends: pro\nwithout: [▶tokens:mont]\n", "no limit 'tokens:mont'", "Did you mean 'tokens:month'?"),
        (PLUS + "extends: pro\nwithout: [▶A b]\n", "neither a feature nor the key of a limit", "reports:month"),
        (PLUS + "without: ▶[reports]\nfeatures: {}\n", "'without' is only for plans that extend", "Add 'extends: …'"),
        (PRO + "▶kind: Plan\nname: plus\n", "'features' is missing", "Add 'features: …'."),
        (
            PLUS + 'extends: pro\nfeatures: {tokens: {price: ▶{amount: "1.00", currency: EUR}}}\n',
            "the budget 'tokens:day.usd' is in USD, and 'tokens' is priced in EUR in this plan",
            "Write the budget in EUR.",
        ),
        (
            PLUS
            + "extends: pro\nfeatures: {tokens: {limits: ▶["
            + ", ".join(f"{{amount: 1, per: day, name: n{number}}}" for number in range(14))
            + "]}}\n",
            "with those of 'pro' it has 17, and 16 are the most",
            "'without'",
        ),
        (WORLD + "{kind: Role, name: r, includes: [▶r]}\n", "the role includes itself: r -> r", "none of the others"),
        (WORLD + "{kind: Role, name: boss, includes: [▶bos]}\n", "there is no role 'bos'", "Did you mean 'boss'?"),
        (WORLD + "{kind: Role, name: r, includes: [], actions: ▶[]}\n", "needs 'actions' or 'includes'", "analyst"),
    ],
)
def test_refuses_at_its_place(text: str, message: str, fix: str) -> None:
    error = only_error(text)
    assert message in error.message
    assert fix in error.fix


def test_every_plan_of_a_circle_is_told_and_those_beside_it_are_not() -> None:
    result = validated(
        "{kind: Plan, name: a, extends: b}\n---\n{kind: Plan, name: b, extends: c}\n---\n"
        "{kind: Plan, name: c, extends: a}"
        "\n---\n{kind: Plan, name: beside, extends: a}"
    )
    assert [(error.code, error.message) for error in result.errors] == [
        ("circle", f"the plan extends itself: {circle}")
        for circle in ("a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c")
    ]


def test_a_chain_may_be_so_deep_and_no_deeper() -> None:
    def chain(length: int) -> str:
        links = [f"{{kind: Plan, name: p{number}, extends: p{number - 1}}}" for number in range(1, length + 1)]
        return "\n---\n".join(["{kind: Plan, name: p0, features: {}}", *links])

    assert len(catalog_of(chain(CHAIN_MAX)).plans) == CHAIN_MAX + 1
    (error,) = validated(chain(CHAIN_MAX + 1)).errors
    assert (error.line, error.message) == (2 * CHAIN_MAX + 3, f"there are more than {CHAIN_MAX} plans above this one")
    assert {error.message for error in validated(chain(100)).errors} == {error.message}


def test_a_long_circle_is_refused_for_its_depth() -> None:
    texts = [f"{{kind: Plan, name: p{number}, extends: p{(number + 1) % 50}}}" for number in range(50)]
    assert len(validated("\n---\n".join(texts)).errors) == 50


def test_an_error_in_one_plan_makes_no_others_in_those_that_extend_it() -> None:
    result = validated(
        WORLD + "{kind: Plan, name: pro, features: {tokens: {include: 3}}}\n---\n"
        "{kind: Plan, name: plus, extends: pro, without: [nothing]}"
    )
    assert [error.path for error in result.errors] == ["Plan pro: features.tokens.include"]


def test_short_files_cannot_say_more_features_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inheritance, "FEATURES_MAX", 5)
    text = PRO + "{kind: Plan, name: plus, extends: pro}"
    assert [error.message for error in validated(text).errors] == [
        "the plans have more than 5 features, counting what they take over"
    ]


def test_a_role_has_the_actions_of_those_it_includes_at_any_depth() -> None:
    roles = catalog_of(
        WORLD,
        """
        {kind: Role, name: owner, includes: [manager, chatter]}
        ---
        {kind: Role, name: manager, includes: [analyst], actions: [report.export, report.view]}
        ---
        {kind: Role, name: analyst, actions: [report.view]}
        ---
        {kind: Role, name: chatter, includes: [analyst], actions: [llm.*]}
        """,
    ).roles
    assert roles["owner"].actions == ("report.export", "report.view", "llm.*")
    assert roles["manager"].actions == ("report.export", "report.view")
    assert roles["analyst"].actions == ("report.view",)


def test_each_circle_of_roles_is_told_once_with_its_way_around() -> None:
    result = validated(
        "{kind: Role, name: a, includes: [b]}\n---\n{kind: Role, name: b, includes: [c, d]}\n---\n"
        "{kind: Role, name: c, includes: [a]}\n---\n{kind: Role, name: d, includes: [d]}"
    )
    assert [(error.path, error.message) for error in result.errors] == [
        ("Role c: includes[0]", "the role includes itself: a -> b -> c -> a"),
        ("Role d: includes[0]", "the role includes itself: d -> d"),
    ]


def test_a_chain_of_thousands_of_roles_is_no_trouble() -> None:
    links = [f"{{kind: Role, name: r{number}, includes: [r{number - 1}]}}" for number in range(1, 5_000)]
    text = WORLD + "\n---\n".join([*reversed(links), "{kind: Role, name: r0, actions: [llm.*]}"])
    assert catalog_of(text).roles["r4999"].actions == ("llm.*",)


def test_short_files_cannot_say_more_patterns_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inheritance, "PATTERNS_MAX", 3)
    roles = [f"{{kind: Role, name: r{number}, includes: [r0]}}" for number in range(1, 9)]
    text = WORLD + "\n---\n".join(["{kind: Role, name: r0, actions: [llm.*, report.*]}", *roles])
    assert ["counting those they include" in error.message for error in validated(text).errors] == [True]
