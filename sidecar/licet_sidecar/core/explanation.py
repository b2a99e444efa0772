"""Every step of a decision and what was found there, also beyond the step that decided.

Looks at each step by itself, with the parts the engine decides with; the decision itself stays the engine's. A step
*objects* when it alone would not approve: the first that does is the one that decided, which a test holds true over
random bundles. Pure; takes nothing, and makes no lease.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, NamedTuple

from licet.domain.approvals import OVERRIDE_PREFIX, Override, OverrideEffect, RequestEntry
from licet.domain.catalog import AttributeValue, License, RuleEffect
from licet.domain.outcomes import Effect, Reason
from licet_sidecar.core.access_requests import key_for
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.denials import license_problem
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.flags import BoundFlag, Standing, Verdict, described, judge, standing_of
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.lease import Lease
from licet_sidecar.core.rulebook import BoundAction
from licet_sidecar.core.rules import Traced, bindings_of, trace_rules
from licet_sidecar.core.tenant import BoundLimit, Tenant, bind_action, prepare, scope_of


class StepName(StrEnum):
    """The steps, in the order in which they are taken."""

    OVERRIDE = "override"
    """Only there when an override applies."""
    LICENSE = "license"
    ACTION = "action"
    FRESHNESS = "freshness"
    ENTITLEMENT = "entitlement"
    FLAGS = "flags"
    ROLES = "roles"
    POLICIES = "policies"
    QUOTAS = "quotas"


class LimitSeen(NamedTuple):
    """A limit or a grant that applies. ``asked``: units, or nanos of a budget. ``lease`` is what is held here, if any.

    ``end`` is when the window ends, seconds since the Unix epoch.
    """

    limit: BoundLimit
    asked: int
    end: int
    lease: Lease | None


@dataclass(slots=True)
class Step:
    """One step. ``objects``: it alone would not approve. ``found``: sentences for people."""

    name: StepName
    objects: bool = False
    found: list[str] = field(default_factory=list)
    rules: list[Traced] = field(default_factory=list)
    limits: list[LimitSeen] = field(default_factory=list)


_DECIDES: Final[Mapping[Reason, StepName]] = {
    Reason.NO_LICENSE: StepName.LICENSE,
    Reason.LICENSE_EXPIRED: StepName.LICENSE,
    Reason.TENANT_SUSPENDED: StepName.LICENSE,
    Reason.UNKNOWN_ACTION: StepName.ACTION,
    Reason.STALE_POLICY: StepName.FRESHNESS,
    Reason.NOT_ENTITLED: StepName.ENTITLEMENT,
    Reason.FEATURE_OFF: StepName.FLAGS,
    Reason.ROLE_REQUIRED: StepName.ROLES,
    Reason.POLICY_DENIED: StepName.POLICIES,
    Reason.POLICY_ERROR: StepName.POLICIES,
}


def deciding_step(decision: Decision, steps: list[Step]) -> StepName | None:
    """The step that is why the decision is what it is; ``None`` when nothing stood in the way."""
    if decision.rule.startswith(OVERRIDE_PREFIX):
        return StepName.OVERRIDE
    if decision.effect is Effect.APPROVED and decision.reason is Reason.OK:
        return None
    known = _DECIDES.get(decision.reason)
    if known is not None:
        return known
    if decision.reason is Reason.APPROVAL_REQUIRED and any(
        traced.rule.name == decision.rule for step in steps for traced in step.rules
    ):
        return StepName.POLICIES
    # Degraded: a license that cannot be read, or quotas that cannot be leased.
    return (
        StepName.LICENSE if any(step.name is StepName.LICENSE and step.objects for step in steps) else StepName.QUOTAS
    )


def explain(engine: Engine, inquiry: Inquiry, decision: Decision, *, now_us: int) -> list[Step]:
    """The steps of ``decision``, which the engine has just made of ``inquiry``; up to where they can be looked at.

    ``now_us`` is the instant it was made for: microseconds since the Unix epoch.

    Raises:
        InvalidInquiry: the request does not fit the action it names.
    """
    rulebook = engine.rulebook
    assert rulebook is not None, "explain() before the first state was applied"
    tenant = engine.tenants.get(inquiry.tenant)
    bound = rulebook.action(inquiry.action)
    override = rulebook.override(inquiry.tenant, inquiry.subject_id, inquiry.action, now_us)
    steps = [_override(override)] if override is not None else []
    steps += [_license(tenant, inquiry, decision, now_us), _action(bound, inquiry), _freshness(engine, bound, now_us)]
    if tenant is None or bound is None:
        return steps
    if inquiry.prepared_for is not bound:
        prepare(bound, inquiry)
    plan = tenant.actions.get(inquiry.action) or bind_action(tenant, bound)
    steps += [_entitlement(tenant, bound), _flags(bound, tenant.license, inquiry, now_us), _roles(bound, inquiry)]
    steps.append(_policies(bound, tenant, inquiry, decision, now_us))
    limits = [*plan.limits, *_counted(tenant, inquiry, steps[-1].rules, now_us)]
    decided = deciding_step(decision, steps)
    steps.append(_quotas(engine, limits, plan.shadow_limits, inquiry, decision, decided, now_us))
    return steps


def _override(override: Override) -> Step:
    what = "is denied" if override.effect is OverrideEffect.DENY else "is allowed, whatever flags, roles and rules say"
    until = _instant(override.ends_us // 1_000_000)
    found = f"{override.action} {what} until {until}, by {override.rule} of {override.by}: {override.reason}."
    return Step(StepName.OVERRIDE, override.effect is OverrideEffect.DENY, [found])


def _license(tenant: Tenant | None, inquiry: Inquiry, decision: Decision, now_us: int) -> Step:
    if tenant is None:
        why = decision.message if decision.degraded else f"Tenant {inquiry.tenant} has no license."
        return Step(StepName.LICENSE, True, [why])
    license_ = tenant.license
    ends = f"until {_instant(license_.ends_s)}" if license_.ends_s else "open-ended"
    starts = f"from {_instant(license_.starts_s)}, " if license_.starts_s else ""
    addons = "".join(f" and {count} × {name}" for name, count in sorted(license_.addons.items()))
    found = [f"Plan {license_.plan}{addons}, {license_.status.value}, {starts}{ends}; revision {tenant.revision}."]
    problem = None if tenant.in_term(now_us) else license_problem(license_, now_us)
    if problem is not None:
        found.append(problem.message)
    elif tenant.ends_us <= now_us:
        found.append(f"Its term has ended; in its grace it answers until {_instant(license_.stops_s)}.")
    return Step(StepName.LICENSE, problem is not None, found)


def _action(bound: BoundAction | None, inquiry: Inquiry) -> Step:
    if bound is None:
        return Step(StepName.ACTION, True, [f"No action {inquiry.action} is published."])
    action = bound.action
    draws = ", ".join(f"{meter}: {feature}" if meter else feature for meter, feature in sorted(action.meters.items()))
    found = [f"It draws on {draws}."]
    if action.attributes:
        unsent = [name for name in action.attributes if name not in inquiry.context]
        if unsent:
            found.append(f"Not sent: {', '.join(f'context.{name}' for name in sorted(unsent))}.")
        unknown = sorted(inquiry.context.keys() - action.attributes.keys())
    else:
        unknown = sorted(inquiry.context)
    if unknown:
        found.append(f"Sent and not declared, so not looked at: {', '.join(f'context.{name}' for name in unknown)}.")
    return Step(StepName.ACTION, False, found)


def _freshness(engine: Engine, bound: BoundAction | None, now_us: int) -> Step:
    age_s = max(0, now_us - engine.as_of_us) / 1_000_000
    found = [f"Revision {engine.revision}, known to be current {age_s:,.1f} s ago."]
    stale = engine.is_stale(now_us)
    objects = stale and bound is not None and not engine.may_decide_stale(bound, now_us)
    if stale:
        mode = bound.action.on_unavailable.mode.value if bound else "deny"
        found.append(f"That is longer than staleness_max; the action says {mode} then.")
    return Step(StepName.FRESHNESS, objects, found)


def _entitlement(tenant: Tenant, bound: BoundAction) -> Step:
    step = Step(StepName.ENTITLEMENT)
    for feature in dict.fromkeys(bound.action.meters.values()):
        granted = tenant.entitlements.get(feature)
        if granted is None:
            step.objects = True
            step.found.append(f"Plan {tenant.license.plan} does not include {feature}.")
            continue
        limits = (
            f"{len(granted.limits)} limit{'' if len(granted.limits) == 1 else 's'}" if granted.limits else "no limit"
        )
        grants = f", {len(granted.grants)} grants" if granted.grants else ""
        step.found.append(f"The license includes {feature}, with {limits}{grants}.")
    return step


def _flags(bound: BoundAction, license_: License, inquiry: Inquiry, now_us: int) -> Step:
    step = Step(StepName.FLAGS)
    for flag, standing, verdict in judged_flags(bound, license_, inquiry, now_us):
        step.objects |= not verdict.is_on
        step.found += described(flag, standing, verdict, now_us)
    if not bound.flags:
        step.found.append("No flag is on its features.")
    return step


def judged_flags(
    bound: BoundAction, license_: License, inquiry: Inquiry, now_us: int
) -> Iterator[tuple[BoundFlag, Standing, Verdict]]:
    """What every flag on an action's features serves, also those after one that is off.

    The inquiry was prepared for ``bound``; ``now_us`` in microseconds since the Unix epoch.
    """
    for one in bound.flags:
        standing = standing_of(one.flag, inquiry.tenant if one.flag.by == "tenant" else inquiry.subject_id)
        yield one, standing, judge(one, standing, lambda v: bindings_of(v, bound, license_, inquiry, now_us), now_us)


def _roles(bound: BoundAction, inquiry: Inquiry) -> Step:
    if bound.roles is None:
        return Step(StepName.ROLES, False, ["No role names the action, so that none is needed."])
    has = sorted(bound.roles.intersection(inquiry.roles))
    needed = ", ".join(sorted(bound.roles))
    if has:
        return Step(StepName.ROLES, False, [f"It needs one of {needed}; the subject has {', '.join(has)}."])
    sent = f"has {', '.join(inquiry.roles)}" if inquiry.roles else "has none"
    return Step(StepName.ROLES, True, [f"It needs one of the roles {needed}; the subject {sent}."])


def _policies(bound: BoundAction, tenant: Tenant, inquiry: Inquiry, decision: Decision, now_us: int) -> Step:
    rules = trace_rules(bound, tenant.license, inquiry, now_us)
    step = Step(StepName.POLICIES, rules=rules)
    enforced = [traced for traced in rules if not traced.rule.shadow]
    exempt = {
        traced.rule.policy
        for traced in enforced
        if traced.matched and not traced.problem and traced.rule.effect is RuleEffect.ALLOW
    }
    for traced in enforced:
        rule = traced.rule
        if traced.problem:
            step.objects = True
            step.found.append(f"The condition of {rule.name} failed: {traced.problem}.")
        elif traced.matched and rule.effect is RuleEffect.DENY:
            step.objects = True
            step.found.append(f"Policy rule {rule.name} denies this.")
        elif traced.matched and rule.effect is RuleEffect.REQUIRE_APPROVAL:
            approval = tenant.requests.live(key_for(inquiry, rule.name), now_us)
            if rule.policy in exempt:
                step.found.append(f"Policy rule {rule.name} would require approval; its policy exempts this.")
            elif approval is not None:
                step.found.append(_lifted(rule.name, approval))
                if decision.effect is not Effect.APPROVED and decision.rule == rule.name:
                    step.objects = True
                    step.found.append("So many of these units are not left.")
            else:
                step.objects = True
                step.found.append(f"Policy rule {rule.name} requires approval.")
    if not step.found:
        count = len(enforced)
        step.found.append(
            f"{count} rule{'' if count == 1 else 's'}, and none objects." if count else "No rule applies."
        )
    return step


def _counted(tenant: Tenant, inquiry: Inquiry, rules: Sequence[Traced], now_us: int) -> list[BoundLimit]:
    """The units of approvals that lift a rule."""
    wanted = [one.rule.name for one in rules if one.matched and one.rule.effect is RuleEffect.REQUIRE_APPROVAL]
    approvals = [tenant.requests.live(key_for(inquiry, rule), now_us) for rule in wanted]
    return [tenant.counted(entry) for entry in approvals if entry is not None and entry.units]


def _lifted(rule: str, approval: RequestEntry) -> str:
    units = f" for {approval.units:,} units" if approval.units else ""
    until = _instant(approval.until_us // 1_000_000)
    return (
        f"Policy rule {rule} requires approval; {approval.by} approved it{units} until {until}, request {approval.id}."
    )


def _quotas(
    engine: Engine,
    limits: Sequence[BoundLimit],
    shadow_limits: Sequence[BoundLimit],
    inquiry: Inquiry,
    decision: Decision,
    decided: StepName | None,
    now_us: int,
) -> Step:
    step = Step(StepName.QUOTAS)
    now_s = now_us // 1_000_000
    held = engine.leases.tenants.get(inquiry.tenant)
    for limit in limits:
        asked = limit.quota_units(inquiry.units.get(limit.feature, 0), inquiry.declared)
        for pool in limit.pools or (limit,):
            if pool is not limit and not pool.is_in_force(now_s):
                continue
            window = pool.window_at(now_s)
            scope = _scope(limit, inquiry, inquiry.declared) if pool is limit else ""
            lease = held.leases.get((pool.key, scope)) if held else None
            if lease is not None and lease.start != window[0]:
                lease = None
            step.limits.append(LimitSeen(pool, asked, window[1], lease))
    step.found += [
        f"Limit {limit.key} is in shadow: it is counted, and answers as if it were absent." for limit in shadow_limits
    ]
    if not (limits or shadow_limits):
        step.found.append("No limit applies: the action is unmetered for this license.")
    if decided is StepName.QUOTAS:
        step.found += [decision.message] if decision.message else []
        step.objects = decision.effect is not Effect.APPROVED
    return step


def _scope(limit: BoundLimit, inquiry: Inquiry, context: Mapping[str, AttributeValue]) -> str:
    return scope_of(limit.scope, inquiry, context) if limit.scope else ""


def _instant(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat()
