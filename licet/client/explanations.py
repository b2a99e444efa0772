"""Why a decision is what it is, and what a tenant may do now: the records, and their messages. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from licet.client.messages import check_request, decision_of, effect_of, quota_of, reason_of
from licet.client.model import Check, ContextValue, Decision, Quota, Subject
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb


@dataclass(frozen=True, slots=True)
class RuleTrace:
    """One policy rule that applies. ``match`` is ``MATCHED``, ``NOT_MATCHED`` or ``FAILED``, then with a ``problem``.

    ``rule`` is ``policy/rule``; ``condition`` is CEL, empty when it always matches; ``shadow``: it is only recorded.
    """

    rule: str
    effect: str
    condition: str
    match: str
    problem: str
    shadow: bool


@dataclass(frozen=True, slots=True)
class LimitTrace:
    """One limit or grant that applies. ``quota`` holds units, or billionths of ``currency``.

    ``asked`` is what the check would take; ``quota.remaining`` says something only when ``known``.
    """

    limit: str
    asked: int
    quota: Quota
    known: bool
    on_exceeded: str
    currency: str = ""


@dataclass(frozen=True, slots=True)
class ExplainStep:
    """One step of a decision. ``outcome`` is ``PASSED``, ``DECIDED`` or ``NOT_REACHED``; ``found`` is for people."""

    step: str
    outcome: str
    found: tuple[str, ...]
    rules: tuple[RuleTrace, ...] = ()
    limits: tuple[LimitTrace, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decision that a check would get, and its steps in the order in which they are taken."""

    decision: Decision
    steps: tuple[ExplainStep, ...]


@dataclass(frozen=True, slots=True)
class FlagState:
    """What a flag serves: the variant's name, or ``on`` where it has none, or ``off``; and the variant's value."""

    flag: str
    variant: str
    value: Any = None


@dataclass(frozen=True, slots=True)
class Entitlement:
    """A feature as the license grants it. ``rolled_out`` is false while a flag leaves the tenant or subject out."""

    feature: str
    title: str
    unit: str
    rolled_out: bool
    seats: int
    limits: tuple[LimitTrace, ...]
    flags: tuple[FlagState, ...] = ()


@dataclass(frozen=True, slots=True)
class ActionState:
    """How a check of an action would be answered before its quotas are looked at."""

    action: str
    effect: Effect
    reason: Reason
    message: str
    rule: str


@dataclass(frozen=True, slots=True)
class Entitlements:
    """What a tenant's subject may do now. Without a license ``plan`` and ``status`` are empty.

    ``actions_truncated``: there are more than the 1,000 that are listed.
    """

    plan: str
    status: str
    in_force: bool
    starts_at: datetime | None
    ends_at: datetime | None
    addons: Mapping[str, int]
    entitlements: tuple[Entitlement, ...]
    actions: tuple[ActionState, ...]
    actions_truncated: bool
    revision: int
    as_of: datetime | None
    stale: bool
    degraded: bool


def explain_request(check: Check) -> pb.ExplainRequest:
    """The message for ``check``.

    Raises:
        InvalidRequest: as ``check_request``.
    """
    return pb.ExplainRequest(check=check_request(check))


def explanation_of(response: pb.ExplainResponse) -> Explanation:
    """The explanation a response carries.

    Raises:
        SidecarError: as ``decision_of``.
    """
    return Explanation(decision_of(response.decision), tuple(_step(step) for step in response.steps))


def entitlements_request(
    tenant: str, subject: Subject | str | None, context: Mapping[str, ContextValue] | None
) -> pb.ListEntitlementsRequest:
    """The message that asks what a tenant's subject may do.

    Raises:
        InvalidRequest: a value has the wrong type.
    """
    # As a check carries them, so that they are verified the same way; the action is left out again.
    check = check_request(Check(tenant, "", subject=subject, context=context, idempotency_key="-"))
    request = pb.ListEntitlementsRequest(tenant=check.tenant)
    if check.HasField("subject"):
        request.subject.CopyFrom(check.subject)
    for name in check.context:
        request.context[name].CopyFrom(check.context[name])
    return request


def entitlements_of(response: pb.ListEntitlementsResponse) -> Entitlements:
    """The entitlements a response carries.

    Raises:
        SidecarError: as ``decision_of``.
    """
    license_ = response.license
    return Entitlements(
        plan=license_.plan,
        status=license_.status,
        in_force=license_.in_force,
        starts_at=_instant(license_.starts_at.seconds) if license_.HasField("starts_at") else None,
        ends_at=_instant(license_.ends_at.seconds) if license_.HasField("ends_at") else None,
        addons=dict(license_.addons),
        entitlements=tuple(
            Entitlement(
                one.feature,
                one.title,
                one.unit,
                one.rolled_out,
                one.seats,
                tuple(_limit(limit) for limit in one.limits),
                tuple(
                    FlagState(flag.flag, flag.variant, json.loads(flag.value_json) if flag.value_json else None)
                    for flag in one.flags
                ),
            )
            for one in response.entitlements
        ),
        actions=tuple(
            ActionState(one.action, effect_of(one.effect), reason_of(one.reason), one.message, one.rule)
            for one in response.actions
        ),
        actions_truncated=response.actions_truncated,
        revision=response.revision,
        as_of=response.as_of.ToDatetime(UTC) if response.HasField("as_of") else None,
        stale=response.stale,
        degraded=response.degraded,
    )


def _step(step: pb.ExplainStep) -> ExplainStep:
    return ExplainStep(
        step=step.step,
        outcome=pb.StepOutcome.Name(step.outcome).removeprefix("STEP_OUTCOME_"),
        found=tuple(step.found),
        rules=tuple(
            RuleTrace(
                rule.rule,
                rule.effect,
                rule.condition,
                pb.RuleMatch.Name(rule.match).removeprefix("RULE_MATCH_"),
                rule.problem,
                rule.shadow,
            )
            for rule in step.rules
        ),
        limits=tuple(_limit(limit) for limit in step.limits),
    )


def _limit(limit: pb.LimitTrace) -> LimitTrace:
    return LimitTrace(
        limit.limit, limit.asked, quota_of(limit.quota), limit.known, limit.on_exceeded, limit.quota.currency
    )


def _instant(at_s: int) -> datetime:
    return datetime.fromtimestamp(at_s, UTC)
