"""Each kind of document alone: what it means, and what is refused where."""

from __future__ import annotations

import pytest

from licet.domain.catalog import (
    Action,
    ApprovalChain,
    ApprovalStage,
    Attribute,
    AttributeType,
    Enforcement,
    Entitlement,
    Feature,
    Flag,
    Limit,
    OnExceeded,
    OnExpiry,
    OnUnavailable,
    Plan,
    Policy,
    ReservationTerms,
    Role,
    Rule,
    RuleEffect,
    UnavailableMode,
)
from licet.domain.entitlements import RATE_MAX
from licet.domain.flags import RolloutStep, Target, Variant
from licet.domain.ids import UNITS_MAX, LimitKey
from licet.domain.money import NANOS, Fee, Price, Step, TierMode, Tiers
from licet.domain.windows import Anchor, Period
from licet_control_plane.core.documents.scalars import duration_s
from tests.support.documents import catalog_of, only_error, validated

WORLD = """
kind: Feature
name: llm.tokens
unit: token
title: Tokens
---
kind: Feature
name: editor
---
kind: Action
name: llm.complete
feature: llm.tokens
attributes:
  model: string
  region: {type: string, default: ""}
  level: {type: int, default: -3}
  ratio: {type: double, default: 1}
  beta: {type: bool, default: false}
  tags: {type: list, default: [a]}
  since: {type: timestamp, default: "1970-01-01T01:00:00+01:00"}
on_unavailable: {mode: allow}
---
kind: ApprovalChain
name: finance
stages:
  - {approvers: [group:finance, user:ada], need: 2, escalate_after: 30m, escalate_to: [user:cfo], deny_after: 24h}
---
"""


def test_a_feature_says_its_unit_and_title() -> None:
    features = catalog_of(WORLD).features
    assert features == {"llm.tokens": Feature("llm.tokens", "token", "Tokens"), "editor": Feature("editor")}


def test_an_action_of_one_feature_has_the_meter_without_name() -> None:
    assert catalog_of(WORLD).actions["llm.complete"] == Action(
        "llm.complete",
        {"": "llm.tokens"},
        {
            "model": Attribute(AttributeType.STRING),
            "region": Attribute(AttributeType.STRING, ""),
            "level": Attribute(AttributeType.INT, -3),
            "ratio": Attribute(AttributeType.DOUBLE, 1.0),
            "beta": Attribute(AttributeType.BOOL, False),
            "tags": Attribute(AttributeType.LIST, ["a"]),
            "since": Attribute(AttributeType.TIMESTAMP, 0),
        },
        on_unavailable=OnUnavailable(UnavailableMode.ALLOW),
    )


def test_an_action_of_several_meters_names_a_feature_for_each() -> None:
    text = WORLD + "{kind: Action, name: a, meters: {in: llm.tokens, out: editor}}"
    assert catalog_of(text).actions["a"].meters == {"in": "llm.tokens", "out": "editor"}


def test_a_plan_grants_features_with_prices_limits_and_seats() -> None:
    text = """
    kind: Plan
    name: pro
    title: Pro
    features:
      llm.tokens:
        price:
          {amount: "8.00", per_units: 1_000_000, currency: USD, by: context.model, amounts: {small: "0.60", tiny: 0}}
        limits:
          - {amount: 10_000_000, per: month}
          - {amount: 200_000, per: minute, scope: [subject, context.region], on_exceeded: deny}
          - {amount: 5, per: minute, name: burst, anchor: calendar}
      editor: {seats: 25}
    """
    plan = catalog_of(WORLD, text).plans["pro"]
    amounts = {"small": 600_000_000, "tiny": 0}
    assert plan == Plan(
        "pro",
        {
            "llm.tokens": Entitlement(
                Price(8 * NANOS, 1_000_000, "USD", "context.model", amounts),
                (
                    Limit(LimitKey("llm.tokens:month"), 10_000_000, Period.MONTH),
                    Limit(
                        LimitKey("llm.tokens:minute@context.region+subject"),
                        200_000,
                        Period.MINUTE,
                        ("context.region", "subject"),
                    ),
                    Limit(LimitKey("llm.tokens:burst"), 5, Period.MINUTE),
                ),
            ),
            "editor": Entitlement(seats=25, heartbeat_s=60),
        },
        "Pro",
    )


def test_a_plan_has_a_fee_included_units_tiers_and_a_price_of_overage() -> None:
    text = """
    kind: Plan
    name: pro
    fee: "49.00 USD"
    features:
      llm.tokens:
        included: 1_000_000
        price:
          per_units: 1_000
          currency: USD
          by: context.model
          tiers:
            mode: graduated
            steps:
              - {up_to: 1_000, amount: "8.00", amounts: {small: "0.60"}}
              - {up_to: null, amount: "6.00", flat: "5.00", amounts: {large: 9}}
        limits:
          - {amount: 10, per: month, on_exceeded: overage, overage_price: {amount: "0.10", currency: USD}}
    """
    plan = catalog_of(WORLD, text).plans["pro"]
    first = Step(1_000, 8 * NANOS, 0, {"small": 600_000_000})
    last = Step(0, 6 * NANOS, 5 * NANOS, {"large": 9 * NANOS})
    price = Price(
        8 * NANOS,
        1_000,
        "USD",
        "context.model",
        {"small": 600_000_000, "large": 8 * NANOS},
        Tiers(TierMode.GRADUATED, (first, last)),
    )
    tokens = plan.features["llm.tokens"]
    assert (plan.fee, tokens.included, tokens.price) == (Fee(49 * NANOS, "USD"), 1_000_000, price)
    assert tokens.limits[0].overage_price == Price(100_000_000, 1, "USD")


def limits(*written: str, price: str = '{amount: "8.00", currency: USD}') -> tuple[Limit, ...]:
    text = f"kind: Plan\nname: p\nfeatures: {{llm.tokens: {{price: {price}, limits: [{', '.join(written)}]}}}}"
    return catalog_of(WORLD, text).plans["p"].features["llm.tokens"].limits


def test_a_rate_is_units_a_second_with_a_burst() -> None:
    assert limits("{amount: 50, per: second, burst: 200, scope: [subject]}", "{amount: 9, per: second}") == (
        Limit(LimitKey("llm.tokens:second@subject.rate"), 50, Period.SECOND, ("subject",), burst=200),
        Limit(LimitKey("llm.tokens:second.rate"), 9, Period.SECOND),
    )


def test_a_named_limit_counts_a_rate_units_and_money_under_different_keys() -> None:
    written = ("{name: cap, amount: 5, per: second}", "{name: cap, amount: 5, per: term}")
    keys = [limits(one)[0].key for one in (*written, '{name: cap, spend: "5.00 USD", per: month}')]
    assert keys == ["llm.tokens:cap.rate", "llm.tokens:cap", "llm.tokens:cap.usd"]


def test_a_window_is_the_term_or_follows_the_license() -> None:
    assert limits("{amount: 5, per: term}", "{amount: 5, per: month, anchor: license, durable: true}") == (
        Limit(LimitKey("llm.tokens:term"), 5, Period.TERM),
        Limit(LimitKey("llm.tokens:month"), 5, Period.MONTH, anchor=Anchor.LICENSE, durable=True),
    )


def test_a_budget_is_in_nanos_and_its_key_ends_in_the_currency() -> None:
    written = ['{spend: "500.00 USD", per: month, scope: [context.region]}', "{spend: 0.25 USD, per: day, name: tiny}"]
    assert limits(*written) == (
        Limit(
            LimitKey("llm.tokens:month@context.region.usd"),
            500 * NANOS,
            Period.MONTH,
            ("context.region",),
            currency="USD",
        ),
        Limit(LimitKey("llm.tokens:tiny.usd"), NANOS // 4, Period.DAY, currency="USD"),
    )


def test_a_limit_in_units_and_one_in_money_of_the_same_period_have_keys_of_their_own() -> None:
    assert [limit.key for limit in limits("{amount: 5, per: month}", '{spend: "5.00 USD", per: month}')] == [
        "llm.tokens:month",
        "llm.tokens:month.usd",
    ]


def test_the_largest_budget_is_the_largest_number_of_nanos_that_is_counted_exactly() -> None:
    (largest,) = limits('{spend: "9007199.254740991 USD", per: year}')
    assert largest.amount == UNITS_MAX


@pytest.mark.parametrize("on_exceeded", OnExceeded)
def test_a_limit_says_what_happens_past_it(on_exceeded: OnExceeded) -> None:
    (limit,) = limits(f"{{amount: 5, per: month, on_exceeded: {on_exceeded.value}}}")
    assert limit.on_exceeded is on_exceeded


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{mode: deny}", OnUnavailable()),
        ("{mode: capped, units_max: 1_000}", OnUnavailable(UnavailableMode.CAPPED, units_max=1_000)),
        ("{mode: last_known, for_max: 10m}", OnUnavailable(UnavailableMode.LAST_KNOWN, for_s_max=600)),
    ],
)
def test_an_action_says_what_happens_without_redis(written: str, meant: OnUnavailable) -> None:
    text = f"{{kind: Action, name: a, feature: editor, on_unavailable: {written}}}"
    assert catalog_of(WORLD, text).actions["a"].on_unavailable == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{}", ReservationTerms(900, OnExpiry.CANCEL)),
        ("{expires_after: 1s}", ReservationTerms(1, OnExpiry.CANCEL)),
        ("{expires_after: 7d, on_expiry: commit}", ReservationTerms(7 * 86_400, OnExpiry.COMMIT)),
    ],
)
def test_an_action_says_how_long_its_reservations_are_held(written: str, meant: ReservationTerms) -> None:
    text = f"{{kind: Action, name: a, feature: editor, reservation: {written}}}"
    assert catalog_of(WORLD, text).actions["a"].reservation == meant


def test_an_empty_entitlement_grants_the_feature_unmetered() -> None:
    plan = catalog_of(WORLD, "kind: Plan\nname: p\nfeatures:\n  llm.tokens: {}\n  editor:\n").plans["p"]
    assert plan.features == {"llm.tokens": Entitlement(), "editor": Entitlement()}


@pytest.mark.parametrize("scopes", [("subject", "context.region"), ("context.region", "subject")])
def test_the_key_of_a_limit_does_not_depend_on_amount_position_or_order_of_scope(scopes: tuple[str, str]) -> None:
    limits = [f"{{amount: 7, per: hour, scope: [{', '.join(scopes)}]}}", "{amount: 1, per: day}"]
    for order in (limits, limits[::-1]):
        text = f"kind: Plan\nname: p\nfeatures: {{llm.tokens: {{limits: [{', '.join(order)}]}}}}"
        keys = {limit.key for limit in catalog_of(WORLD, text).plans["p"].features["llm.tokens"].limits}
        assert keys == {"llm.tokens:hour@context.region+subject", "llm.tokens:day"}


def test_a_policy_keeps_its_rules_in_order() -> None:
    text = """
    kind: Policy
    name: guard
    enforcement: shadow
    actions: [llm.*]
    rules:
      - {name: embargo, effect: deny, when: 'context.region == "xx"'}
      - {name: large, effect: require_approval, approval: finance, when: "quantity > 10"}
      - {name: rest, effect: allow}
    """
    assert catalog_of(WORLD, text).policies["guard"] == Policy(
        "guard",
        ("llm.*",),
        (
            Rule("embargo", RuleEffect.DENY, 'context.region == "xx"'),
            Rule("large", RuleEffect.REQUIRE_APPROVAL, "quantity > 10", "finance"),
            Rule("rest", RuleEffect.ALLOW),
        ),
        Enforcement.SHADOW,
    )


def test_roles_flags_and_approval_chains_say_what_they_mean() -> None:
    catalog = catalog_of(
        WORLD,
        "{kind: Role, name: analyst, actions: [llm.complete, '*']}",
        "{kind: Flag, name: soon, feature: editor, rollout: {percent: 12.5, by: subject}}\n---\n"
        "{kind: Flag, name: all, feature: editor}",
    )
    assert catalog.roles["analyst"] == Role("analyst", ("llm.complete", "*"))
    assert catalog.flags == {
        "soon": Flag("soon", "editor", 12.5, "subject"),
        "all": Flag("all", "editor", 100.0, "tenant"),
    }
    stage = ApprovalStage(("group:finance", "user:ada"), 2, 1_800, ("user:cfo",), 86_400)
    assert catalog.approval_chains["finance"] == ApprovalChain("finance", (stage,))


def test_the_version_may_be_written() -> None:
    assert "a" in catalog_of("apiVersion: licet/v1\nkind: Feature\nname: a\n").features


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("30m", 1_800), ("24h", 86_400), ("7d", 604_800)])
def test_durations_have_a_unit(text: str, seconds: int) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "60", "0s", "-1s", "1.5h", "1h30m", "24 h", "367d", "1w", "٣s"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        duration_s(text)


ACTION = "kind: Action\nname: a\nfeature: editor\n"
FLAG = "kind: Flag\nname: f\nfeature: editor\n"
PLAN = "kind: Plan\nname: p\nfeatures: {llm.tokens: "
TIERS = "kind: Plan\nname: p\nfeatures: {{llm.tokens: {{price: {{currency: USD, tiers: {{{}}}}}}}}}"


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("kind: ▶Featur\nname: a\n", "there is no kind 'Featur'", "Did you mean 'Feature'?"),
        ("kind: ▶[a]\nname: a\n", "the kind must be a word", "There are: Action, "),
        ("▶name: a\n", "does not say its kind", "Add 'kind: …'"),
        ("kind: ▶License\ntenant: acme\n", "licenses are not documents", "licet license"),
        ("kind: Feature\nname: a\napiVersion: ▶licet/v2\n", "'licet/v2' is not known", "Write licet/v1"),
        ("▶kind: Feature\n", "'name' is missing", "Add 'name: …'"),
        ("kind: Feature\nname: ▶Bad Name\n", "'Bad Name' is not a name", "lower case"),
        (f"kind: Feature\nname: ▶{'a' * 129}\n", "is not a name", "at most 128"),
        ("kind: Feature\nname: a\ntitle: ▶1.10\n", "1.1 is not a text", "quotes"),
        ("kind: Feature\nname: a\ntitle:▶\n", "nothing is not a text", "Fill it in"),
        (f"kind: Feature\nname: a\ntitle: ▶{'x' * 257}\n", "more than 256 characters", "Shorten it"),
        ("▶kind: Action\nname: a\n", "either 'feature' or 'meters'", "Write 'feature: reports'"),
        ("kind: Action\nname: a\nfeature: ▶editor\nmeters: {x: editor}\n", "either 'feature' or 'meters'", "meters"),
        ("kind: Action\nname: a\nmeters: ▶{}\n", "it is empty", "Name at least one"),
        ("kind: Action\nname: a\nfeature: editor\nattributes: {x: ▶strnig}\n", "'strnig' is not", "'string'"),
        ("kind: Action\nname: a\nfeature: editor\nattributes: {▶in: string}\n", "'in' cannot name", "word of CEL"),
        ("kind: Action\nname: a\nfeature: editor\nattributes: {▶a-b: string}\n", "'a-b' cannot name", "letters"),
        (
            "kind: Action\nname: a\nfeature: editor\nattributes: {x: {type: int, default: ▶true}}\n",
            "the default True is not of type int",
            "a whole number",
        ),
        (
            'kind: Action\nname: a\nfeature: editor\nattributes: {x: {type: timestamp, default: ▶"2026-01-01"}}\n',
            "is not of type timestamp",
            "an instant with its offset",
        ),
        (ACTION + "on_unavailable: {mode: ▶denny}\n", "'denny' is not", "'deny'"),
        (ACTION + "on_unavailable: ▶{mode: capped}\n", "'mode: capped' needs 'units_max'", "Add 'units_max: …'"),
        (ACTION + "on_unavailable: {mode: capped, units_max: ▶0}\n", "0 is less than 1", "1 or more"),
        (ACTION + "on_unavailable: {mode: deny, units_max: ▶5}\n", "only for 'mode: capped'", "remove 'units_max'"),
        (ACTION + "on_unavailable: {units_max: ▶5}\n", "only for 'mode: capped'", "remove 'units_max'"),
        (ACTION + "on_unavailable: ▶{mode: last_known}\n", "'mode: last_known' needs 'for_max'", "such as 10m"),
        (ACTION + "on_unavailable: {mode: last_known, for_max: ▶10}\n", "10 is not a duration", "90s"),
        (ACTION + "on_unavailable: {mode: allow, for_max: ▶5m}\n", "only for 'mode: last_known'", "remove 'for_max'"),
        (ACTION + "reservation: {expires_after: ▶0s}\n", "is not between 1s", "90s"),
        (ACTION + "reservation: {expires_after: ▶8d}\n", "cannot be held for 8d", "7d or less"),
        (ACTION + "reservation: {on_expiry: ▶comit}\n", "'comit' is not", "'commit'"),
        (ACTION + "reservation: {▶expires: 5m}\n", "no field 'expires'", "'expires_after'"),
        (PLAN + "{limits: [{amount: ▶1.5, per: day}]}}", "1.5 is not a whole number", "fractions"),
        (PLAN + '{limits: [{amount: ▶"5", per: day}]}}', "'5' is not a whole number", "digits"),
        (PLAN + "{limits: [{amount: ▶true, per: day}]}}", "true is not a whole number", "digits"),
        (PLAN + "{limits: [{amount: ▶-1, per: day}]}}", "-1 is less than 0", "0 or more"),
        (PLAN + f"{{limits: [{{amount: ▶{UNITS_MAX + 1}, per: day}}]}}}}", "is more than", str(UNITS_MAX)),
        (PLAN + "{limits: [{amount: 1, per: ▶mont}]}}", "'mont' is not possible", "Did you mean 'month'?"),
        (PLAN + "{limits: [{amount: 1, per: day, scope: [▶team]}]}}", "'team' is not a scope", "context.<attribute>"),
        (PLAN + "{limits: [{amount: 1, per: day, scope: ▶[subject, subject]}]}}", "names a path twice", "Remove"),
        (PLAN + "{limits: [{amount: 1, per: day, name: ▶A b}]}}", "not a name for a limit", "lower-case"),
        (PLAN + "{limits: [▶{per: day}]}}", "either 'amount' or 'spend'", "'amount: 1_000'"),
        (PLAN + '{limits: [{amount: 1, spend: ▶"5.00 USD", per: day}]}}', "either 'amount' or 'spend'", "500.00 USD"),
        (PLAN + "{limits: [▶{amount: 1}]}}", "'per' is missing", "Add"),
        (PLAN + "{limits: [{spend: ▶5.00, per: day}]}}", "5.0 is not an amount of money", "500.00 USD"),
        (PLAN + '{limits: [{spend: ▶"5.00", per: day}]}}', "'5.00' is not an amount of money", "and a currency"),
        (PLAN + '{limits: [{spend: ▶"5,00 USD", per: day}]}}', "'5,00' is not a plain", "a plain decimal"),
        (PLAN + '{limits: [{spend: ▶"-5 USD", per: day}]}}', "'-5' is not a plain", "a plain decimal"),
        (
            PLAN + '{limits: [{spend: ▶"9007199.254740992 USD", per: day}]}}',
            "is more than 9007199.254740991, the largest budget",
            "a plain decimal",
        ),
        (PLAN + '{limits: [{spend: ▶"5.00 USD", per: second}]}}', "units and not money", "'per: minute' or longer"),
        (PLAN + "{limits: [{amount: 1, per: day, anchor: ▶lisence}]}}", "'lisence' is not", "license"),
        (PLAN + "{limits: [{amount: 1, per: second, anchor: ▶license}]}}", "a rate has no windows", "Remove 'anchor'"),
        (PLAN + "{limits: [{amount: 1, per: term, anchor: ▶license}]}}", "is the license's already", "Remove 'anchor'"),
        (
            PLAN + "{limits: [{amount: 1, per: second, on_exceeded: ▶overage}]}}",
            "cannot have 'on_exceeded: overage'",
            "RATE_LIMITED",
        ),
        (
            PLAN + "{limits: [{amount: 1, per: second, on_exceeded: ▶require_approval}]}}",
            "cannot have 'on_exceeded: require_approval'",
            "Write 'deny'",
        ),
        (PLAN + "{limits: [{amount: 1, per: day, burst: ▶5}]}}", "'burst' is only for 'per: second'", "remove 'burst'"),
        (PLAN + "{limits: [{amount: 1, per: second, burst: ▶0}]}}", "0 is less than 1", "1 or more"),
        (PLAN + f"{{limits: [{{amount: 1, per: second, burst: ▶{RATE_MAX + 1}}}]}}}}", "is more than", str(RATE_MAX)),
        (PLAN + f"{{limits: [{{per: second, amount: ▶{RATE_MAX + 1}}}]}}}}", "a second are more", str(RATE_MAX)),
        (PLAN + "{limits: [{amount: 1, per: second, durable: ▶true}]}}", "cannot be durable", "Remove 'durable'"),
        (PLAN + '{limits: [{amount: 1, per: day, durable: ▶"yes"}]}}', "'yes' is not true or false", "quotes"),
        (PLAN + "{limits: ▶5}}", "5 is not a list", "- "),
        (PLAN + "{limits: [{amount: 1, per: day, ▶amonut: 2}]}}", "no field 'amonut'", "Did you mean 'amount'?"),
        (PLAN + "{▶limit: []}}", "no field 'limit'", "Did you mean 'limits'?"),
        (PLAN + "{price: {amount: ▶8.00, currency: USD}}}", "8.0 is a number that cannot be exact", 'in quotes: "8.0"'),
        (PLAN + '{price: {amount: ▶"8,00", currency: USD}}}', "'8,00' is not a plain", "in quotes"),
        (PLAN + '{price: {amount: "8", currency: ▶usd}}}', "'usd' is not a currency", "ISO 4217"),
        (PLAN + '{price: {amount: "8", currency: USD, per_units: ▶0}}}', "0 is less than 1", "1 or more"),
        (PLAN + '{price: ▶{amount: "8", currency: USD, by: context.model}}}', "need each other", "'by' names"),
        (PLAN + '{price: {amount: "8", currency: USD, amounts: ▶{a: "1"}}}}', "need each other", "'by' names"),
        (
            PLAN + '{price: {amount: "8", currency: USD, by: ▶model, amounts: {a: "1"}}}}',
            "does not name an attr",
            "context",
        ),
        (PLAN + "{price: ▶{currency: USD}}}", "either 'amount' or 'tiers'", "mode: graduated"),
        (
            PLAN + '{price: {amount: "8", currency: USD, tiers: ▶{mode: volume, steps: [{amount: 1}]}}}}',
            "either 'amount' or 'tiers'",
            "mode: graduated",
        ),
        (TIERS.format("mode: ▶gradual, steps: [{amount: 1}]"), "'gradual' is not", "'graduated'"),
        (TIERS.format("mode: volume, steps: ▶[]"), "it is empty", "at least one"),
        (TIERS.format("mode: volume, steps: ▶[{up_to: 5, amount: 1}]"), "units after 5", "Leave 'up_to' out"),
        (
            TIERS.format("mode: volume, steps: ▶[{amount: 1}, {amount: 2}]"),
            "step 1 has no end",
            "every step but the last",
        ),
        (
            TIERS.format("mode: volume, steps: ▶[{up_to: 5, amount: 1}, {up_to: 5, amount: 2}, {amount: 3}]"),
            "step 2 ends at 5, and the one before it at 5",
            "ascending order",
        ),
        (TIERS.format("mode: volume, steps: [{▶upto: 5, amount: 1}]"), "no field 'upto'", "'up_to'"),
        (TIERS.format("mode: volume, steps: [{amount: ▶1.5}]"), "cannot be exact", "in quotes"),
        (
            PLAN + "{price: ▶{currency: USD, tiers: {mode: volume, steps: [{amount: 1, amounts: {a: 2}}]}}}}",
            "need each other",
            "'by' names",
        ),
        (
            PLAN + "{price: {currency: USD, by: context.model, amounts: ▶{a: 2}, "
            "tiers: {mode: volume, steps: [{amount: 1}]}}}}",
            "each step has its own 'amounts'",
            "into the steps",
        ),
        (PLAN + "{included: ▶0}}", "0 is less than 1", "1 or more"),
        (
            PLAN + "{limits: [{amount: 1, per: day, overage_price: ▶{amount: 1, currency: USD}}]}}",
            "limits that can be exceeded",
            "'on_exceeded: overage'",
        ),
        (
            PLAN + "{limits: [{amount: 1, per: term, on_exceeded: overage, overage_price: "
            "▶{amount: 1, currency: USD}}]}}",
            "which may never come",
            "'per: year' or shorter",
        ),
        (
            PLAN + '{limits: [{spend: "5.00 USD", per: day, on_exceeded: overage, overage_price: '
            "▶{amount: 1, currency: USD}}], price: {amount: 1, currency: USD}}}",
            "this limit counts money",
            "'amount'",
        ),
        ("kind: Plan\nname: p\nfee: ▶49\nfeatures: {editor: {}}\n", "49 is not an amount of money", "49.00 USD"),
        ('kind: Plan\nname: p\nfee: ▶"49"\nfeatures: {editor: {}}\n', "'49' is not an amount", "and a currency"),
        (PLAN + "{seats: ▶0}}", "0 is less than 1", "1 or more"),
        (PLAN + "{heartbeat: ▶60s}}", "'heartbeat' is for seats", "Add 'seats'"),
        (PLAN + "{seats: 1, heartbeat: ▶60}}", "60 is not a duration", "90s"),
        (PLAN + "{seats: 1, heartbeat: ▶2h}}", "longer than an hour", "1h or less"),
        ("kind: Role\nname: r\nactions: ▶[]\n", "needs 'actions' or 'includes'", "analyst"),
        ("kind: Role\nname: r\nactions: [▶'*.view']\n", "'*.view' is not a pattern", "prefix.*"),
        ("kind: Role\nname: r\nactions: ▶llm.complete\n", "'llm.complete' is not a list", "[one, two]"),
        ("kind: Policy\nname: p\nactions: ['*']\nrules: [{name: r, effect: ▶dny}]\n", "'dny' is not", "'deny'"),
        (
            "kind: Policy\nname: p\nactions: ['*']\nrules: [{name: r, effect: deny, when: ▶true}]\n",
            "not a text",
            "quotes",
        ),
        ("kind: Policy\nname: p\nactions: ['*']\nrules: [{name: r, effect: deny, when: ▶''}]\n", "empty", "Leave"),
        (
            "kind: Policy\nname: p\nactions: ['*']\nrules: [{name: r, effect: deny, approval: ▶finance}]\n",
            "only for rules that require approval",
            "require_approval",
        ),
        ("kind: Flag\nname: f\nfeature: editor\nrollout: {percent: ▶101}\n", "101 is more than 100", "100 or less"),
        ("kind: Flag\nname: f\nfeature: editor\nrollout: {by: ▶user}\n", "'user' is not possible", "subject, tenant"),
        (FLAG + "enabled: ▶maybe\n", "'maybe' is not true or false", ""),
        (FLAG + "starts: ▶2027-01-01\n", "'2027-01-01' is not an instant", "its offset"),
        (FLAG + "starts: ▶'2027-01-01T00:00:00.5Z'\n", "is not an instant", "to the second"),
        (FLAG + "starts: '2027-01-01T00:00:00Z'\nends: ▶'2027-01-01T00:00:00Z'\n", "ends before it starts", "later"),
        (
            FLAG + "schedule: ▶[{at: '2027-01-02T00:00:00Z', percent: 1}, {at: '2027-01-01T00:00:00Z', percent: 2}]\n",
            "step 2 is not later than the one before it",
            "ascending",
        ),
        (
            FLAG + "ends: '2027-01-01T00:00:00Z'\nschedule: ▶[{at: '2027-01-02T00:00:00Z', percent: 1}]\n",
            "step 1 comes when the flag has ended",
            "later",
        ),
        (FLAG + "schedule: [{at: '2027-01-02T00:00:00Z', percent: ▶-1}]\n", "-1 is less than 0", "0 or more"),
        (FLAG + "variants: {a: ▶half}\n", "'half' is not a whole number", ""),
        (FLAG + "variants: ▶{a: 0, b: 0}\n", "every variant has the weight 0", "Give one"),
        (FLAG + "variants: ▶{on: 1}\n", "cannot be called 'on'", "Rename"),
        (FLAG + "variants: {a: {value: ▶[1]}}\n", "cannot be a variant's value", "a mapping"),
        (FLAG + f"variants: {{a: {{value: ▶{'x' * 1_030}}}}}\n", "1,032 bytes as JSON", "Shorten"),
        (FLAG + "targeting: [{name: t, ▶serv: on, serve: on}]\n", "there is no field 'serv'", "'serve'"),
        ("kind: ApprovalChain\nname: c\nstages: [{approvers: [▶bob]}]\n", "'bob' is not an approver", "'user:…'"),
        (
            "kind: ApprovalChain\nname: c\nstages: [{approvers: [user:a], need: ▶2}]\n",
            "2 approvals are needed, and only 1 can approve",
            "need fewer",
        ),
        (
            "kind: ApprovalChain\nname: c\nstages: [▶{approvers: [user:a], escalate_after: 5m}]\n",
            "need each other",
            "Write both",
        ),
        (
            "kind: ApprovalChain\nname: c\n"
            "stages: [{approvers: [user:a], escalate_after: 5m, escalate_to: [user:b], deny_after: ▶5m}]\n",
            "'deny_after' is not later",
            "time to answer",
        ),
    ],
)
def test_refuses_at_its_place(text: str, message: str, fix: str) -> None:
    error = only_error(WORLD + text)
    assert message in error.message
    assert fix in error.fix


def test_reports_all_errors_of_a_document_at_once() -> None:
    result = validated("kind: Feature\nname: A\nunit: 1\ntitle: 2\ncolor: red\n")
    assert [(error.line, error.column) for error in result.errors] == [(2, 7), (3, 7), (4, 8), (5, 1)]


def test_a_wrong_item_does_not_make_its_list_look_empty() -> None:
    result = validated("kind: ApprovalChain\nname: c\nstages: [{approvers: [bob]}]\n")
    assert [error.path for error in result.errors] == ["ApprovalChain c: stages[0].approvers[0]"]


def test_a_flag_says_what_it_leaves_out() -> None:
    flags = [
        "schedule: [{at: '2027-01-15T09:00:00+01:00', percent: 50}]",
        "variants: {a: 50, b: {weight: 0, value: {x: 1}}, c: {value: no}}",
        "targeting: [{name: all, serve: on}]",
    ]
    read = [catalog_of(f"{{kind: Feature, name: editor}}\n---\n{FLAG}{flag}\n").flags["f"] for flag in flags]
    assert read == [
        Flag("f", "editor", 0.0, steps=(RolloutStep(1_800_000_000, 50.0),)),  # a schedule lets people in
        Flag("f", "editor", variants=(Variant("a", 50), Variant("b", 0, '{"x":1}'), Variant("c", 1, '"no"'))),
        Flag("f", "editor", targeting=(Target("all", "on"),)),
    ]


@pytest.mark.parametrize("level", ["logged", "synced", "shipped"])
def test_every_durability_is_taken(level: str) -> None:
    world = "{kind: Feature, name: f}\n---\n{kind: Action, name: a, feature: f, durability: "
    assert not validated(f"{world}{level}}}\n").errors
