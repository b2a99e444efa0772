"""The engine against a slow evaluator that was written from the design, over random small catalogs and requests."""

from __future__ import annotations

import random
from dataclasses import replace
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
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.lease import Terms
from licet_sidecar.core.leases import LeaseBook
from tests.support.engine import BOOT_MS, NOW_S, NOW_US, STALENESS_US_MAX, engine_with, grant
from tests.support.published import limit
from tests.support.slow_evaluator import CONDITIONS, said, slow

FEATURES = ("f", "g")
ACTIONS = ("a.x", "a.y", "b")

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
            expected = slow(content, license_, request, free, now_us, used)
            found = said(engine.decide(request, now_us=now_us, boot_ms=BOOT_MS, patient=True))
            if expected.effect == "WAIT":
                found.shadow, found.exposures = expected.shadow, expected.exposures  # it is decided again
            assert found == expected, (seed, case, step, request.action, content, license_)
            reasons.add(f"{expected.effect}/{expected.reason}")
    assert len(reasons) >= 8, reasons  # or else nothing was compared
