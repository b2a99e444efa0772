"""The engine against a slow evaluator that was written from the design, over random small catalogs and requests."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace
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
    Flag,
    License,
    LicenseStatus,
    OnExceeded,
    OnUnavailable,
    Plan,
    Policy,
    Role,
    Rule,
    RuleEffect,
    UnavailableMode,
)
from licet.domain.flags import RolloutStep, Target, Variant
from licet.domain.windows import Period, window_at
from licet_sidecar.core.engine import Decision, Engine, LeaseWait
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.leases import LeaseBook, Terms
from tests.support.engine import BOOT_MS, NOW_S, NOW_US, STALENESS_US_MAX, engine_with, grant
from tests.support.published import limit

FEATURES = ("f", "g")
ACTIONS = ("a.x", "a.y", "b")
CONDITIONS = {  # source, and the same in Python over (request, units)
    "": lambda request, units: True,
    "quantity > 3": lambda request, units: sum(units.values()) > 3,
    'context.region == "eu"': lambda request, units: request.context.get("region", "eu") == "eu",
    '"r1" in subject.roles': lambda request, units: "r1" in request.roles,
    "1 / (quantity - 2) > 0": lambda request, units: _divided(1, sum(units.values()) - 2) > 0,
}


def _divided(number: int, by: int) -> int:
    return int(number / by)  # CEL truncates, and fails for zero


@dataclass
class Answer:
    """What both must say. ``spends`` maps limit keys to units; ``None`` where nothing is to be taken."""

    effect: str
    reason: str
    rule: str = ""
    spends: dict[str, int] | None = None
    shadow: tuple[str, ...] = ()
    exposures: dict[str, str] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)


def slow(
    content: Catalog, license_: License, request: Inquiry, free: dict[str, int], used: dict[str, int], now_us: int
) -> Answer:
    """The order of a decision, read from the design, with no cache and no cleverness."""
    now_s = now_us // 1_000_000
    stale = now_us - NOW_US > STALENESS_US_MAX
    if license_.status is LicenseStatus.SUSPENDED:
        return Answer("DENIED", "TENANT_SUSPENDED")
    if license_.status is LicenseStatus.CANCELED or now_s < license_.starts_s:
        return Answer("DENIED", "NO_LICENSE")
    if license_.ends_s and license_.ends_s <= now_s:
        return Answer("DENIED", "LICENSE_EXPIRED")
    if request.action not in content.actions:
        return Answer("DENIED", "UNKNOWN_ACTION")
    action = content.actions[request.action]
    if stale and action.on_unavailable.mode is UnavailableMode.DENY:
        return Answer("DENIED", "STALE_POLICY")
    plan = content.plans[license_.plan]
    wanted = set(action.meters.values())
    if not wanted <= set(plan.features):
        return Answer("DENIED", "NOT_ENTITLED")
    units: dict[str, int] = {}
    for meter, asked in (request.quantities or {"": 1 if request.quantity is None else request.quantity}).items():
        units[action.meters[meter]] = units.get(action.meters[meter], 0) + asked
    flags = [content.flags[name] for name in sorted(content.flags) if content.flags[name].feature in wanted]
    exposures: dict[str, str] = {}
    for by in ("tenant", "subject"):
        for flag in flags:
            if flag.by == by:
                exposures[flag.name] = _served(flag, request, units, now_s)
                if exposures[flag.name] == "off":
                    return Answer("DENIED", "FEATURE_OFF", flag.name, exposures=exposures)
    answer = _after_flags(content, action, plan, license_, request, units, free, used)
    return replace(answer, exposures=exposures)


def _after_flags(
    content: Catalog,
    action: Action,
    plan: Plan,
    license_: License,
    request: Inquiry,
    units: dict[str, int],
    free: dict[str, int],
    used: dict[str, int],
) -> Answer:
    roles = {role.name for role in content.roles.values() if any(_names(p, action.name) for p in role.actions)}
    if roles and not roles & set(request.roles):
        return Answer("DENIED", "ROLE_REQUIRED")
    answer, shadow = _policies(content, action, request, units)
    policies_said = shadow
    if answer is not None:
        answer.shadow = shadow
        return answer
    spends: dict[str, int] = {}
    counted: dict[str, int] = {}
    for feature in dict.fromkeys(action.meters.values()):
        for one in plan.features[feature].limits:
            asked = units.get(feature, 0)
            amount = license_.overrides.get(one.key, one.amount)
            if one.enforcement is Enforcement.SHADOW and asked:
                counted[one.key] = asked
                if used[one.key] + asked > amount:
                    shadow += (f"{one.key}={one.on_exceeded.value}",)
            if one.enforcement is not Enforcement.ENFORCE:
                continue
            if asked > free[one.key] and asked:
                if asked > amount:
                    if one.on_exceeded is OnExceeded.REQUIRE_APPROVAL:
                        return Answer("PENDING", "APPROVAL_REQUIRED", one.key, shadow=policies_said)
                    return Answer("DENIED", "QUOTA_EXHAUSTED", one.key, shadow=policies_said)
                spends[one.key] = -1
            elif spends.get(one.key) != -1:
                spends[one.key] = asked
    if -1 in spends.values():
        return Answer("WAIT", "", shadow=shadow)
    return Answer("APPROVED", "OK", "", spends, shadow, counted=counted)


def _served(flag: Flag, request: Inquiry, units: dict[str, int], now_s: int) -> str:
    """What a flag serves, from its documentation."""
    holder = request.tenant if flag.by == "tenant" else request.subject_id
    if not flag.enabled or now_s < flag.starts_s or (flag.ends_s and flag.ends_s <= now_s):
        return "off"
    for target in flag.targeting:
        try:
            holds = CONDITIONS[target.when](request, units)
        except ZeroDivisionError:
            holds = target.serve == "off"
        if holds:
            return _variant(flag, holder) if target.serve == "on" else target.serve
    percent = [flag.percent, *(step.percent for step in flag.steps if step.at_s <= now_s)][-1]
    return _variant(flag, holder) if _hash(flag.name, holder) % 10_000 < percent * 100 else "off"


def _variant(flag: Flag, holder: str) -> str:
    """The higher u^(1/weight), the better: the same order as ln(u)/weight."""
    chances = {
        one.name: (((_hash(flag.name, one.name, holder) >> 11) + 0.5) / 2**53) ** (1 / one.weight)
        for one in flag.variants
        if one.weight
    }
    return max(chances, key=chances.__getitem__) if chances else "on"


def _hash(*names: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest(), "big")


def _names(pattern: str, action: str) -> bool:
    return pattern in ("*", action) or (pattern[-2:] == ".*" and action.startswith(pattern[:-1]))


def _policies(
    content: Catalog, action: Action, request: Inquiry, units: dict[str, int]
) -> tuple[Answer | None, tuple[str, ...]]:
    denials: list[tuple[str, str]] = []
    approvals: list[str] = []
    shadow: list[str] = []
    for name in sorted(content.policies):
        policy = content.policies[name]
        if policy.enforcement is Enforcement.OFF or not any(_names(p, action.name) for p in policy.actions):
            continue
        outcomes = []
        for rule in policy.rules:
            try:
                outcomes.append((rule, "yes" if CONDITIONS[rule.when](request, units) else "no"))
            except ZeroDivisionError:
                outcomes.append((rule, "error"))
        if policy.enforcement is Enforcement.SHADOW:
            shadow += [
                f"{name}/{rule.name}={'error' if said == 'error' else rule.effect.value}"
                for rule, said in outcomes
                if said != "no"
            ]
            continue
        for rule, said in outcomes:
            if said == "error":
                denials.append(("POLICY_ERROR", f"{name}/{rule.name}"))
            elif said == "yes" and rule.effect is RuleEffect.DENY:
                denials.append(("POLICY_DENIED", f"{name}/{rule.name}"))
        if not any(said == "yes" and rule.effect is RuleEffect.ALLOW for rule, said in outcomes):
            approvals += [
                f"{name}/{rule.name}"
                for rule, said in outcomes
                if said == "yes" and rule.effect is RuleEffect.REQUIRE_APPROVAL
            ]
    if denials:
        return Answer("DENIED", *denials[0]), tuple(shadow)
    if approvals:
        return Answer("PENDING", "APPROVAL_REQUIRED", approvals[0]), tuple(shadow)
    return None, tuple(shadow)


# What is drawn


def _some(rng: random.Random, choices: Any, most: int) -> list[Any]:
    return rng.sample(list(choices), rng.randint(0, min(most, len(choices))))


def draw_catalog(rng: random.Random) -> Catalog:
    actions = [
        Action(
            name,
            {"": rng.choice(FEATURES)}
            if rng.random() < 0.6
            else {"in": rng.choice(FEATURES), "out": rng.choice(FEATURES)},
            {"region": Attribute(AttributeType.STRING, "eu")},
            on_unavailable=OnUnavailable(rng.choice([UnavailableMode.DENY, UnavailableMode.ALLOW])),
        )
        for name in ACTIONS
    ]
    plan = Plan(
        "pro",
        {
            feature: Entitlement(
                limits=tuple(
                    replace(
                        limit(rng.randint(0, 8), period, feature=feature),
                        enforcement=rng.choice([Enforcement.ENFORCE, Enforcement.ENFORCE, *Enforcement]),
                        on_exceeded=rng.choice([OnExceeded.DENY, OnExceeded.DENY, OnExceeded.REQUIRE_APPROVAL]),
                    )
                    for period in _some(rng, (Period.MONTH, Period.MINUTE), 2)
                )
            )
            for feature in FEATURES
            if rng.random() < 0.85
        },
    )
    patterns = ("*", "a.*", "a.x", "b", "c.*")
    policies = [
        Policy(
            f"p{number}",
            tuple(_some(rng, patterns, 2)),
            tuple(
                Rule(f"r{position}", rng.choice(list(RuleEffect)), rng.choice(list(CONDITIONS)))
                for position in range(rng.randint(0, 3))
            ),
            rng.choice([Enforcement.ENFORCE, Enforcement.ENFORCE, Enforcement.SHADOW, Enforcement.OFF]),
        )
        for number in range(rng.randint(0, 3))
    ]
    roles = [Role(f"r{number}", tuple(_some(rng, patterns, 1))) for number in range(rng.randint(0, 2))]
    flags = [draw_flag(rng, f"flag{number}") for number in range(rng.randint(0, 3))]
    rng.shuffle(policies)
    return Catalog.of([*(Feature(name) for name in FEATURES), *actions, plan, *policies, *roles, *flags])


def draw_flag(rng: random.Random, name: str) -> Flag:
    plain = Flag(name, rng.choice(FEATURES), rng.choice([0.0, 50.0, 100.0, 100.0]), rng.choice(["tenant", "subject"]))
    if rng.random() < 0.3:
        return plain
    variants = [Variant(one, rng.choice([0, 1, 3])) for one in _some(rng, ("red", "green", "blue"), 3)]
    return replace(
        plain,
        enabled=rng.random() < 0.9,
        starts_s=rng.choice([0, 0, 0, NOW_S, NOW_S + 1]),
        ends_s=rng.choice([0, 0, 0, NOW_S + 1, NOW_S + 2]),
        steps=tuple(
            RolloutStep(NOW_S + later, rng.choice([20.0, 80.0, 100.0]))
            for later in sorted(_some(rng, (-9, 0, 1, 9), 3))
        ),
        variants=tuple(variants),
        targeting=tuple(
            Target(
                f"t{place}", rng.choice(["on", "off", "red" if any(v.name == "red" for v in variants) else "on"]), when
            )
            for place, when in enumerate(_some(rng, CONDITIONS, 2))
        ),
    )


def draw_license(rng: random.Random, content: Catalog) -> License:
    keys = [one.key for entitlement in content.plans["pro"].features.values() for one in entitlement.limits]
    return License(
        "acme",
        "pro",
        rng.choice([*[LicenseStatus.ACTIVE] * 8, LicenseStatus.SUSPENDED, LicenseStatus.CANCELED]),
        starts_s=rng.choice([0, 0, 0, NOW_S, NOW_S + 400]),
        ends_s=rng.choice([0, 0, 0, NOW_S, NOW_S + 1, NOW_S + 10_000]),
        overrides={key: rng.randint(0, 8) for key in _some(rng, keys, 1)},
    )


def draw_inquiry(rng: random.Random, content: Catalog) -> Inquiry:
    request = Inquiry("acme", rng.choice([*ACTIONS, *ACTIONS, "c"]))
    action = content.actions.get(request.action)
    if action is not None and "" not in action.meters:
        meters = _some(rng, action.meters, 2) or ["in"]
        request.quantities = {meter: rng.randint(0, 5) for meter in meters}
    elif rng.random() < 0.7:
        request.quantity = rng.randint(0, 6)
    request.roles = tuple(_some(rng, ("r0", "r1"), 2))
    request.subject_id = rng.choice(["ada", "bob"])
    if rng.random() < 0.5:
        request.context = {"region": rng.choice(["eu", "us"])}
    return request


def put_leases(
    rng: random.Random, engine: Engine, content: Catalog, now_us: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Random units in a lease of each limit; what is free, and what is used, by limit key."""
    free: dict[str, int] = {}
    used: dict[str, int] = {}
    held = engine.leases.of("acme")
    for entitlement in content.plans["pro"].features.values():
        for one in entitlement.limits:
            window = window_at(one.per, now_us // 1_000_000)
            lease = grant(
                engine.leases.lease(held, one.key, "", *window, Terms(one.amount), BOOT_MS), rng.randint(0, 8)
            )
            lease.used = rng.randint(0, lease.cap)
            used[one.key] = lease.used
            free[one.key] = (LeaseBook.can_spend(lease, 1, BOOT_MS) and lease.free) or 0
    return free, used


def said(outcome: Any) -> Answer:
    if isinstance(outcome, LeaseWait):
        return Answer("WAIT", "")
    assert isinstance(outcome, Decision)
    spends = {lease.limit_key: units for lease, units in outcome.spends} if outcome.effect.name == "APPROVED" else None
    return Answer(
        outcome.effect.name,
        outcome.reason.name,
        outcome.rule,
        spends,
        tuple(outcome.shadow),
        dict(outcome.exposures),
        {lease.limit_key: units for lease, units in outcome.counted},
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_engine_agrees_with_a_slow_evaluator(seed: int) -> None:
    rng = random.Random(seed)
    reasons: set[str] = set()
    for case in range(30):
        content = draw_catalog(rng)
        license_ = draw_license(rng, content)
        engine = engine_with(content, license_)
        for step in range(8):
            request = draw_inquiry(rng, content)
            now_us = NOW_US + rng.choice([0, 0, 0, 1_000_000, STALENESS_US_MAX + 1])
            free, used = put_leases(rng, engine, content, now_us)
            expected = slow(content, license_, request, free, used, now_us)
            found = said(engine.decide(request, now_us=now_us, boot_ms=BOOT_MS, patient=True))
            if expected.effect == "WAIT":
                found.shadow, found.exposures = expected.shadow, expected.exposures  # it is decided again
            assert found == expected, (seed, case, step, request.action, content, license_)
            reasons.add(f"{expected.effect}/{expected.reason}")
    assert len(reasons) >= 8, reasons  # or else nothing was compared
