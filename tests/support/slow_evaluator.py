"""An evaluator of decisions, written from the design: slow, obviously right, and sharing nothing with the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from licet.domain.catalog import Action, Catalog, Enforcement, License, LicenseStatus, RuleEffect, UnavailableMode
from licet.domain.ids import LimitKey
from licet_sidecar.core.engine import Decision, LeaseWait
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.rulebook import rollout_includes
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


def slow(content: Catalog, license_: License, request: Inquiry, free: dict[str, int], now_us: int) -> Answer:
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
    granted = slow_entitlements(content, license_)
    wanted = set(action.meters.values())
    if not wanted <= set(granted):
        return Answer("DENIED", "NOT_ENTITLED")
    flags = [content.flags[name] for name in sorted(content.flags) if content.flags[name].feature in wanted]
    for by, holder in (("tenant", request.tenant), ("subject", request.subject_id)):
        for flag in flags:
            if flag.by == by and not rollout_includes(flag, holder):
                return Answer("DENIED", "FEATURE_OFF", flag.name)
    roles = {role.name for role in content.roles.values() if any(_names(p, action.name) for p in role.actions)}
    if roles and not roles & set(request.roles):
        return Answer("DENIED", "ROLE_REQUIRED")
    units: dict[str, int] = {}
    for meter, asked in (request.quantities or {"": 1 if request.quantity is None else request.quantity}).items():
        units[action.meters[meter]] = units.get(action.meters[meter], 0) + asked
    answer, shadow = _policies(content, action, request, units)
    if answer is not None:
        answer.shadow = shadow
        return answer
    spends: dict[str, int] = {}
    for feature in dict.fromkeys(action.meters.values()):
        for key, amount in granted[feature].items():
            asked = units.get(feature, 0)
            pools = [(0, 0, key, amount)] + [
                (grant.priority, grant.ends_s, f"{key}+{grant.id}", grant.amount)
                for grant in license_.grants
                if grant.limit == key and grant.starts_s <= now_s < grant.ends_s
            ]
            if asked and asked > sum(free[pool] for _, _, pool, _ in pools):
                if asked > sum(pool_amount for _, _, _, pool_amount in pools):
                    return Answer("DENIED", "QUOTA_EXHAUSTED", key, shadow=shadow)
                spends[key] = -1
                continue
            for _, _, pool, _ in sorted(pools):
                spends[pool] = min(asked, free[pool])
                asked -= spends[pool]
    if -1 in spends.values():
        return Answer("WAIT", "", shadow=shadow)
    return Answer("APPROVED", "OK", "", spends, shadow)


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
    return Answer(outcome.effect.name, outcome.reason.name, outcome.rule, spends, tuple(outcome.shadow))
