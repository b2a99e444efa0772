"""Written documents, compiled, published and decided by, against a slow reading of the same documents.

Plans that extend plans, roles that include roles, wildcards, add-ons, overrides and grants: read here from the plain
values, straight from what ``docs/documents.md`` says. ``make differential CASES=100000`` compares more than the suite.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any, Final

import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Document,
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
from licet.domain.catalog_wire import document_from_wire, document_to_wire
from licet.domain.ids import LimitKey
from licet.domain.windows import Period
from licet_control_plane.core.documents import SourceFile, Validated, validate
from licet_control_plane.core.documents.writing import write_files
from licet_sidecar.core.decision import LeaseWait
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry
from tests.support.engine import BOOT_MS, NOW_S, NOW_US, engine_with, grant
from tests.support.slow_evaluator import CONDITIONS, Answer, said, slow, slow_entitlements

CASES: Final = int(os.environ.get("LICET_DIFFERENTIAL_CASES") or 2_000)
SEEDS: Final = 20
REQUESTS: Final = 20
"""Asked of each bundle: compiling one costs as much as that many decisions."""

LEASES_MAX: Final = 20
"""More than the limits and grants of an action."""

FEATURES: Final = ("f", "g", "h.i")
ACTIONS: Final = ("a.x", "a.y.z", "a.y", "ab", "b")
PATTERNS: Final = ("*", "a.*", "a.y.*", "a.x", "ab", "b", "c.*")
ROLES: Final = ("r0", "r1", "r2", "r3")

Written = dict[str, Any]


def some(rng: random.Random, choices: Any, least: int, most: int) -> list[Any]:
    return rng.sample(list(choices), rng.randint(least, min(most, len(choices))))


def draw(rng: random.Random) -> list[Written]:
    """Documents as a YAML reader would give them, in any order."""
    documents: list[Written] = [{"kind": "Feature", "name": name} for name in FEATURES]
    documents += [
        {
            "kind": "Action",
            "name": name,
            "attributes": {"region": {"type": "string", "default": "eu"}},
            **(
                {"feature": rng.choice(FEATURES)}
                if rng.random() < 0.6
                else {"meters": {"in": rng.choice(FEATURES), "out": rng.choice(FEATURES)}}
            ),
        }
        for name in ACTIONS
    ]
    plans: dict[str, Written] = {}
    for number in range(rng.randint(1, 5)):
        plan = draw_plan(rng, f"p{number}", plans)
        plans[plan["name"]] = plan
    roles = [
        {"kind": "Role", "name": name, "includes": some(rng, ROLES[:place], 0, 2), "actions": some(rng, PATTERNS, 1, 2)}
        for place, name in enumerate(ROLES[: rng.choice([0, 0, 2, 4])])
    ]
    policies = [
        {
            "kind": "Policy",
            "name": f"p{number}",
            "enforcement": rng.choice(["enforce", "enforce", "shadow", "off"]),
            "actions": some(rng, PATTERNS, 1, 2),
            "rules": [
                {"name": f"r{place}", "effect": rng.choice(list(RuleEffect)).value}
                | ({"when": when} if (when := rng.choice(list(CONDITIONS))) else {})
                for place in range(rng.randint(1, 3))
            ],
        }
        for number in range(rng.choice([0, 0, 1, 3]))
    ]
    documents += [*plans.values(), *roles, *policies]
    rng.shuffle(documents)
    return documents


def draw_plan(rng: random.Random, name: str, above: dict[str, Written]) -> Written:
    plan: Written = {"kind": "Plan", "name": name, "features": {}}
    if above and rng.random() < 0.7:
        plan["extends"] = rng.choice(list(above))
        base = whole(plan["extends"], above)
        keys = [key for one in base.values() for key in one["limits"]]
        if rng.random() < 0.5:
            plan["without"] = some(rng, keys, 0, 2)
            plan["without"] += [
                one for one in some(rng, base, 0, 1) if not any(key.startswith(f"{one}:") for key in plan["without"])
            ]
    for feature in some(rng, FEATURES, 0 if "extends" in plan else 2, 3):
        plan["features"][feature] = {
            "limits": [
                {"amount": rng.randint(0, 6), "per": "month"} | ({"name": limit} if limit != "month" else {})
                for limit in some(rng, ("month", "low", "high"), 0, 2)
            ],
            **({"included": rng.randint(1, 9)} if rng.random() < 0.3 else {}),
            **({"seats": rng.randint(1, 9)} if rng.random() < 0.3 else {}),
        }
    return plan


# The slow reading


def whole(name: str, plans: dict[str, Written]) -> dict[str, Written]:
    """The features of a plan, with what it takes over: field by field, limits by their key."""
    plan = plans[name]
    features: dict[str, Written] = {}
    if "extends" in plan:
        for feature, one in whole(plan["extends"], plans).items():
            features[feature] = {**one, "limits": dict(one["limits"])}
    for removed in plan.get("without", ()):
        if ":" in removed:
            del features[removed.partition(":")[0]]["limits"][removed]
        else:
            del features[removed]
    for feature, one in plan["features"].items():
        mine = features.setdefault(feature, {"limits": {}})
        for limit in one["limits"]:
            mine["limits"][f"{feature}:{limit.get('name', limit['per'])}"] = limit["amount"]
        mine.update({field: value for field, value in one.items() if field != "limits"})
    return features


def allowed(name: str, roles: dict[str, Written]) -> set[str]:
    """The patterns of a role and of those it includes."""
    return set(roles[name]["actions"]).union(*(allowed(one, roles) for one in roles[name]["includes"]))


def slowly_compiled(documents: list[Written]) -> Catalog:
    by_kind: dict[str, dict[str, Written]] = {}
    for one in documents:
        by_kind.setdefault(one["kind"], {})[one["name"]] = one
    plans, roles = by_kind["Plan"], by_kind.get("Role", {})
    made: list[Document] = [Feature(name) for name in FEATURES]
    made += [
        Action(
            one["name"], one.get("meters") or {"": one["feature"]}, {"region": Attribute(AttributeType.STRING, "eu")}
        )
        for one in by_kind["Action"].values()
    ]
    for name in plans:
        features = {
            feature: Entitlement(
                limits=tuple(Limit(LimitKey(key), amount, Period.MONTH) for key, amount in one["limits"].items()),
                seats=one.get("seats", 0),
                heartbeat_s=60 if one.get("seats") else 0,
                included=one.get("included", 0),
            )
            for feature, one in whole(name, plans).items()
        }
        made.append(Plan(name, features))
    made += [Role(name, tuple(sorted(allowed(name, roles)))) for name in roles]
    made += [
        Policy(
            one["name"],
            tuple(one["actions"]),
            tuple(Rule(rule["name"], RuleEffect(rule["effect"]), rule.get("when", "")) for rule in one["rules"]),
            Enforcement(one["enforcement"]),
        )
        for one in by_kind.get("Policy", {}).values()
    ]
    return Catalog.of(made)


# What is asked


def draw_license(rng: random.Random, content: Catalog) -> License:
    plan = rng.choice(list(content.plans))
    addons = {name: rng.randint(1, 3) for name in some(rng, content.plans, 0, 2)}
    plain = License("acme", plan, addons=addons)
    keys = [key for one in slow_entitlements(content, plain).values() for key in one]
    grants = tuple(
        Grant(
            f"g{number}",
            LimitKey(rng.choice(keys)),
            rng.randint(1, 6),
            starts_s=NOW_S + rng.choice([-50, -50, 50]),
            ends_s=NOW_S + rng.choice([100, 100, 200]),
            priority=rng.choice([100, 100, -1, 50]),
        )
        for number in range(rng.randint(0, 2) if keys else 0)
    )
    overrides = {LimitKey(key): rng.randint(0, 9) for key in some(rng, keys, 0, 1)}
    return License("acme", plan, addons=addons, overrides=overrides, grants=grants)


def draw_inquiry(rng: random.Random, content: Catalog) -> Inquiry:
    request = Inquiry("acme", rng.choice([*ACTIONS, *ACTIONS, "a"]))
    action = content.actions.get(request.action)
    if action is not None and "" not in action.meters:
        request.quantities = {meter: rng.randint(0, 7) for meter in some(rng, action.meters, 1, 2)}
    elif rng.random() < 0.7:
        request.quantity = rng.randint(0, 12)
    request.roles = tuple(some(rng, (*ROLES, *ROLES[:2], "nobody"), 0, 3))
    if rng.random() < 0.5:
        request.context = {"region": rng.choice(["eu", "us"])}
    return request


def compiled(documents: list[Written]) -> Validated:
    found = validate([SourceFile("all.yaml", "\n---\n".join(json.dumps(one) for one in documents))])
    assert found.errors == (), [str(error) for error in found.errors]
    return found


def engine_of(catalog: Catalog, license_: License) -> Engine:
    """What a sidecar has of it, after it was published."""
    return engine_with(Catalog.of(document_from_wire(document_to_wire(one)) for one in catalog.documents()), license_)


def answered(engine: Engine, request: Inquiry, free: dict[str, int]) -> Answer:
    """The answer, with everything leased that it asks for: a pool is asked for only when those before it are empty."""
    for _ in range(LEASES_MAX):
        outcome = engine.decide(request, now_us=NOW_US, boot_ms=BOOT_MS, patient=True)
        if not isinstance(outcome, LeaseWait):
            break
        for lease in engine.leases.of(request.tenant).all():
            grant(lease, free[lease.limit_key])
            lease.heard_ms, lease.short_until_ms = BOOT_MS, BOOT_MS + 1  # and that is all there is
    return said(outcome)


def without_zeros(answer: Answer) -> Answer:
    """What takes nothing of a pool may say so or leave it out."""
    if answer.spends is not None:
        answer.spends = {key: units for key, units in answer.spends.items() if units}
    return answer


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_was_compiled_decides_as_the_documents_say(seed: int) -> None:
    rng = random.Random(seed)
    reasons: set[str] = set()
    for _ in range(CASES // SEEDS // REQUESTS):
        documents = draw(rng)
        found = compiled(documents)
        assert found.catalog is not None
        expected_catalog = slowly_compiled(documents)
        assert found.catalog.plans == expected_catalog.plans
        assert validate(write_files(found.catalog)).catalog == found.catalog
        idle = {f"{one.path}" for one in found.warnings if one.code in ("shadowed-rule", "never-true")}
        for _ in range(REQUESTS):
            license_ = draw_license(rng, expected_catalog)
            request = draw_inquiry(rng, expected_catalog)
            free = {
                key: amount
                for one in slow_entitlements(expected_catalog, license_).values()
                for key, amount in one.items()
            }
            free |= {grant.key: grant.amount for grant in license_.grants}
            expected = without_zeros(slow(expected_catalog, license_, request, free, NOW_US))
            answer = without_zeros(answered(engine_of(found.catalog, license_), request, free))
            assert answer == expected, (seed, documents, license_, request.action)
            assert answer.reason == "POLICY_ERROR" or _place_of(answer.rule, documents) not in idle
            reasons.add(expected.reason)
    assert len(reasons) >= 5, reasons  # or else nothing was compared


def _place_of(rule: str, documents: list[Written]) -> str:
    """Where the rule of a decision stands, as a warning names it; empty when it is no rule of a policy."""
    policy, _, name = rule.partition("/")
    for one in documents:
        if one["kind"] == "Policy" and one["name"] == policy:
            return f"Policy {policy}: rules[{[rule['name'] for rule in one['rules']].index(name)}]"
    return ""
