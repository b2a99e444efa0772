"""An evaluator of decisions, written from the design: slow, obviously right, and sharing nothing with the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from licet.domain.catalog import (
    Action,
    Catalog,
    Enforcement,
    License,
    LicenseStatus,
    Limit,
    OnExceeded,
    RuleEffect,
    UnavailableMode,
)
from licet.domain.flags import Flag
from licet.domain.ids import LimitKey
from licet_sidecar.core.decision import Decision, LeaseWait
from licet_sidecar.core.inquiry import Inquiry
from tests.support.engine import NOW_US, STALENESS_US_MAX

CONDITIONS: Final = {  # source, and the same in Python over (request, units)
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
    content: Catalog,
    license_: License,
    request: Inquiry,
    free: dict[str, int],
    now_us: int,
    used: Mapping[str, int] = MappingProxyType({}),
) -> Answer:
    """The order of a decision, read from the design, with no cache and no cleverness.

    ``free`` and ``used`` say of each limit what is left and what was taken of it; ``used`` only matters for limits in
    shadow.
    """
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
    granted = slow_entitlements(content, license_)
    wanted = set(action.meters.values())
    if not wanted <= set(granted):
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
    answer = _after_flags(content, action, license_, request, units, free, used, now_s)
    return replace(answer, exposures=exposures)


def _after_flags(
    content: Catalog,
    action: Action,
    license_: License,
    request: Inquiry,
    units: dict[str, int],
    free: dict[str, int],
    used: Mapping[str, int],
    now_s: int,
) -> Answer:
    granted = slow_entitlements(content, license_)
    limits = _limits(content, license_)
    roles = {role.name for role in content.roles.values() if any(_names(p, action.name) for p in role.actions)}
    if roles and not roles & set(request.roles):
        return Answer("DENIED", "ROLE_REQUIRED")
    answer, policies_said = _policies(content, action, request, units)
    if answer is not None:
        answer.shadow = policies_said
        return answer
    shadow = policies_said
    spends: dict[str, int] = {}
    counted: dict[str, int] = {}
    for feature in dict.fromkeys(action.meters.values()):
        for key, amount in granted[feature].items():
            asked = units.get(feature, 0)
            limit = limits[key]
            if limit.enforcement is Enforcement.SHADOW and asked:
                counted[key] = asked
                if used[key] + asked > amount:
                    shadow += (f"{key}={limit.on_exceeded.value}",)
            if limit.enforcement is not Enforcement.ENFORCE:
                continue
            pools = [(0, 0, key, amount)] + [
                (grant.priority, grant.ends_s, f"{key}+{grant.id}", grant.amount)
                for grant in license_.grants
                if grant.limit == key and grant.starts_s <= now_s < grant.ends_s
            ]
            if asked and asked > sum(free[pool] for _, _, pool, _ in pools):
                if asked > sum(pool_amount for _, _, _, pool_amount in pools):
                    if limit.on_exceeded is OnExceeded.REQUIRE_APPROVAL:
                        return Answer("PENDING", "APPROVAL_REQUIRED", key, shadow=policies_said)
                    return Answer("DENIED", "QUOTA_EXHAUSTED", key, shadow=policies_said)
                spends[key] = -1
                continue
            for _, _, pool, _ in sorted(pools):
                spends[pool] = min(asked, free[pool])
                asked -= spends[pool]
    if -1 in spends.values():
        return Answer("WAIT", "", shadow=shadow)
    return Answer("APPROVED", "OK", "", spends, shadow, counted=counted)


def _limits(content: Catalog, license_: License) -> dict[str, Limit]:
    """Each limit by its key, as the first that has it says: the plan, then add-ons."""
    found: dict[str, Limit] = {}
    for name in (license_.plan, *sorted(license_.addons)):
        for entitlement in content.plans[name].features.values():
            for one in entitlement.limits:
                found.setdefault(one.key, one)
    return found


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


def slow_entitlements(content: Catalog, license_: License) -> dict[str, dict[str, int]]:
    """Amounts of a license's limits, by feature and key: the plan, then each add-on so many times, then overrides."""
    amounts: dict[str, dict[str, int]] = {}
    for feature, entitlement in content.plans[license_.plan].features.items():
        amounts[feature] = {one.key: one.amount for one in entitlement.limits}
    for name in sorted(license_.addons):
        for feature, entitlement in content.plans[name].features.items():
            is_new = feature not in amounts
            of_feature = amounts.setdefault(feature, {})
            for one in entitlement.limits:
                if is_new or one.key in of_feature:
                    of_feature[one.key] = of_feature.get(one.key, 0) + one.amount * license_.addons[name]
    return {
        feature: {key: license_.overrides.get(LimitKey(key), amount) for key, amount in of_feature.items()}
        for feature, of_feature in amounts.items()
    }


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
