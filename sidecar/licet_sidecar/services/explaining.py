"""``Explain`` and ``ListEntitlements``: what a check would be answered and why, and what a tenant may do now.

Neither takes units nor records anything, and neither counts as a check. Both may wait, within the caller's deadline:
for a license that is not here yet, and to hear what remains of quotas. Owned by one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from google.protobuf.message import DecodeError

from licet.domain.catalog import AttributeValue, Enforcement, Limit
from licet.domain.flags import OFF
from licet.domain.outcomes import Effect
from licet.v1 import approval_pb2 as pb
from licet_sidecar.clock import Clock
from licet_sidecar.core.decision import Decision, LeaseWait, LoadWait
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.explanation import LimitSeen, Step, deciding_step, explain, judged_flags
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry
from licet_sidecar.core.lease import Lease
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.rules import Traced
from licet_sidecar.core.tenant import BoundLimit, Tenant, prepare, scope_of
from licet_sidecar.ports import LinkDown, LinkRefused
from licet_sidecar.services.answers import Answers, quota_state, remaining_of
from licet_sidecar.services.approval import DEADLINE_SLACK_S, WAIT_S_MAX, Answer, ApprovalService, Malformed
from licet_sidecar.services.leasing import LeasingService
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.requests import parse_check
from licet_sidecar.services.syncing import SyncService

ACTIONS_MAX: Final = 1_000
"""Actions in one list: more are no page that a customer reads."""
ACTIONS_A_SLICE: Final = 20
"""Decided before others have their turn: half a millisecond."""
LIMITS_HEARD_MAX: Final = 64
"""Quotas asked about in one call to Redis, as in every other one."""
HEARD_KEPT_MS: Final = 1_000
"""How long what remained is believed without asking again."""
HEARING_ROUNDS_MAX: Final = 3
"""A first call may only learn the tenant's epoch."""
NEW_BUNDLES_MAX: Final = 3
"""Begun anew when a bundle comes meanwhile, so often at most: an answer never mixes two."""


class ExplainingService:
    """Explanations and lists of entitlements, without the transport."""

    def __init__(
        self,
        approval: ApprovalService,
        engine: Engine,
        clock: Clock,
        link: LinkState,
        leasing: LeasingService,
        sync: SyncService,
    ) -> None:
        self._approval = approval
        self._engine = engine
        self._clock = clock
        self._link = link
        self._leasing = leasing
        self._sync = sync
        self._answers = Answers(engine, link)

    def methods(self) -> dict[str, Callable[[bytes, float], Answer]]:
        """What it answers, by method of ``licet.v1.ApprovalService``."""
        return {"Explain": self.explain, "ListEntitlements": self.list_entitlements}

    # Explain

    def explain(self, data: bytes, timeout_s: float) -> Answer:
        """The decision a check would get, and its steps."""
        self._approval.require_ready()
        try:
            inquiry = parse_check(pb.ExplainRequest.FromString(data).check)
        except InvalidInquiry as error:
            raise Malformed(f"check.{error}") from error
        except DecodeError as error:
            raise Malformed(str(error)) from error
        inquiry.peek = True
        return self._explain(inquiry, timeout_s)

    async def _explain(self, inquiry: Inquiry, timeout_s: float) -> bytes:
        try:
            outcome = self._approval.decide(inquiry, patient=True)
            if not isinstance(outcome, Decision):
                outcome = await self._approval.decide_later(inquiry, outcome, timeout_s)
            # No await since it was decided: the steps are found in the same state.
            steps = explain(self._engine, inquiry, outcome, now_us=self._clock.now_us())
        except Malformed as error:
            raise Malformed(f"check.{error}") from error
        except InvalidInquiry as error:
            raise Malformed(f"check.{error}") from error
        response = pb.ExplainResponse(decision=pb.CheckResponse.FromString(self._answers.encode(outcome, "")))
        decided = deciding_step(outcome, steps)
        reached = True
        for step in steps:
            here = step.name is decided
            passed = pb.STEP_OUTCOME_PASSED if reached else pb.STEP_OUTCOME_NOT_REACHED
            response.steps.append(self._step(step, pb.STEP_OUTCOME_DECIDED if here else passed))
            reached &= not here
        return response.SerializeToString()

    def _step(self, step: Step, outcome: pb.StepOutcome.ValueType) -> pb.ExplainStep:
        return pb.ExplainStep(
            step=step.name.value,
            outcome=outcome,
            found=step.found,
            rules=[_rule(traced) for traced in step.rules],
            limits=[self._limit(seen) for seen in step.limits],
        )

    def _limit(self, seen: LimitSeen) -> pb.LimitTrace:
        limit, lease = seen.limit, seen.lease
        trace = pb.LimitTrace(
            limit=limit.key,
            asked=seen.asked,
            quota=quota_state(limit.terms, limit.key, seen.end),
            on_exceeded=limit.on_exceeded.value,
        )
        if lease is not None and (lease.heard_ms or lease.cap or limit.is_rate):
            trace.known = True
            trace.quota.remaining = remaining_of(lease)
        elif not limit.terms.amount:
            trace.known = True
        return trace

    # ListEntitlements

    def list_entitlements(self, data: bytes, timeout_s: float) -> Answer:
        """What a subject of a tenant may do now, and what remains."""
        self._approval.require_ready()
        try:
            request = pb.ListEntitlementsRequest.FromString(data)
            subject = request.subject if request.HasField("subject") else None
            # As a check of any action: the same fields, the same bounds.
            asked = parse_check(
                pb.CheckRequest(tenant=request.tenant, action="-", subject=subject, context=request.context)
            )
        except (InvalidInquiry, DecodeError) as error:
            raise Malformed(str(error)) from error
        return self._list(asked, timeout_s)

    async def _list(self, asked: Inquiry, timeout_s: float) -> bytes:
        deadline_ms = self._clock.boot_ms() + int(1_000 * min(WAIT_S_MAX, max(0.0, timeout_s - DEADLINE_SLACK_S)))
        await self._load(asked, deadline_ms)
        response = pb.ListEntitlementsResponse()
        for _ in range(NEW_BUNDLES_MAX):
            rulebook, tenant = self._engine.rulebook, self._engine.tenants.get(asked.tenant)
            assert rulebook is not None
            response = pb.ListEntitlementsResponse()
            if tenant is None:
                break
            if await self._describe(response, rulebook, tenant, asked, deadline_ms):
                break
        now_us = self._clock.now_us()
        response.revision = self._engine.revision
        response.as_of.FromMicroseconds(self._engine.as_of_us)
        response.stale = self._engine.is_stale(now_us)
        response.degraded = not self._link.up
        return response.SerializeToString()

    async def _load(self, asked: Inquiry, deadline_ms: int) -> None:
        """Loads the license, as far as it can be had; binds it to the present bundle."""
        while True:
            outcome = self._ask(asked, "-", patient=True)
            left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
            if not isinstance(outcome, LoadWait) or left_s <= 0:
                return
            try:
                await self._sync.load(asked.tenant, left_s)
            except (LinkDown, TimeoutError, ValueError):
                return

    async def _describe(
        self,
        response: pb.ListEntitlementsResponse,
        rulebook: Rulebook,
        tenant: Tenant,
        asked: Inquiry,
        deadline_ms: int,
    ) -> bool:
        """Fills the response. Whether all of it is of one bundle and one license."""
        self._ask(asked, "-", patient=False)  # binds the license to the bundle
        _describe_license(response.license, tenant, self._clock.now_us())
        limits = self._limits(tenant, asked)
        await self._hear(asked.tenant, [lease for _, lease in limits if lease is not None], deadline_ms)
        if not self._is_current(rulebook, tenant):
            return False
        for feature, granted in sorted(tenant.entitlements.items()):
            known = rulebook.catalog.features.get(feature)
            flags = self._flags(rulebook, tenant, feature, asked)
            response.entitlements.append(
                pb.EntitlementState(
                    feature=feature,
                    title=known.title if known else "",
                    unit=known.unit if known else "",
                    rolled_out=all(flag.variant != OFF for flag in flags),
                    flags=flags,
                    seats=granted.seats,
                    limits=[
                        self._limit(LimitSeen(limit, 0, limit.window[1], lease))
                        for limit, lease in limits
                        if limit.feature == feature
                    ],
                )
            )
        return await self._describe_actions(response, rulebook, tenant, asked)

    def _flags(self, rulebook: Rulebook, tenant: Tenant, feature: str, asked: Inquiry) -> list[pb.FlagState]:
        """What the flags on a feature serve; targeting is asked about the first action that draws on it."""
        bound = rulebook.action_on(feature)
        if bound is None:
            return []
        inquiry = _question(asked, bound.action.name, tuple(bound.action.meters))
        try:
            prepare(bound, inquiry)
        except InvalidInquiry:  # an attribute is of another type there
            inquiry.context = {}
            prepare(bound, inquiry)
        return [
            pb.FlagState(
                flag=one.flag.name, variant=verdict.served, value_json=verdict.variant.value if verdict.variant else ""
            )
            for one, _, verdict in judged_flags(bound, tenant.license, inquiry, self._clock.now_us())
            if one.flag.feature == feature
        ]

    async def _describe_actions(
        self, response: pb.ListEntitlementsResponse, rulebook: Rulebook, tenant: Tenant, asked: Inquiry
    ) -> bool:
        for name, action in sorted(rulebook.catalog.actions.items()):
            if not all(feature in tenant.entitlements for feature in action.meters.values()):
                continue
            if len(response.actions) == ACTIONS_MAX:
                response.actions_truncated = True
                break
            outcome = self._ask(asked, name, patient=False, meters=tuple(action.meters))
            if isinstance(outcome, Decision):
                effect = Effect.APPROVED if outcome.observed else outcome.effect
                response.actions.append(
                    pb.ActionState(
                        action=name,
                        effect=pb.Effect.ValueType(effect),
                        reason=pb.Reason.ValueType(outcome.reason),
                        message=outcome.message,
                        rule=outcome.rule,
                    )
                )
            if len(response.actions) % ACTIONS_A_SLICE == 0:
                await asyncio.sleep(0)
                if not self._is_current(rulebook, tenant):
                    return False
        return True

    def _ask(self, asked: Inquiry, action: str, *, patient: bool, meters: tuple[str, ...] = ("",)) -> object:
        """A decision up to the quotas, or a wait. Attributes of other actions, or of another type, are left out."""
        inquiry = _question(asked, action, meters)
        when = {"now_us": self._clock.now_us(), "boot_ms": self._clock.boot_ms()}
        try:
            return self._engine.decide_access(inquiry, **when, patient=patient)
        except InvalidInquiry as error:
            if not error.field.startswith("context."):
                raise
            inquiry.context = {}
            return self._engine.decide_access(inquiry, **when, patient=patient)

    def _limits(self, tenant: Tenant, asked: Inquiry) -> list[tuple[BoundLimit, Lease | None]]:
        """The limits and grants that concern the subject, with the lease that knows what remains, where there is one.

        A limit whose scope is an attribute that was not sent is left out: nobody can say whose it is.
        """
        book, now_s = self._engine.leases, self._clock.now_us() // 1_000_000
        held = book.of(tenant.license.tenant)
        found: list[tuple[BoundLimit, Lease | None]] = []
        for feature, granted in sorted(tenant.entitlements.items()):
            for limit in granted.limits:
                context = _scope_context(limit, asked)
                if limit.enforcement is not Enforcement.ENFORCE:
                    continue  # nothing that a customer is held to
                if context is None or ("subject" in limit.scope and not asked.subject_id):
                    continue
                own = BoundLimit.with_grants(feature, limit, granted, tenant.license)
                for pool in own.pools or (own,):
                    if pool is not own and not pool.is_in_force(now_s):
                        continue
                    start, end = pool.window_at(now_s)
                    scope = scope_of(pool.scope, asked, context) if pool.scope else ""
                    lease = held.leases.get((pool.key, scope))
                    if (lease is None or lease.start != start) and not pool.is_rate:
                        lease = book.lease(held, pool.key, scope, start, end, pool.terms, self._clock.boot_ms())
                    found.append((pool, lease))
        return found

    async def _hear(self, tenant: str, leases: list[Lease], deadline_ms: int) -> None:
        """Asks Redis what remains of these quotas, where that was not heard lately; takes nothing of them."""
        for _ in range(HEARING_ROUNDS_MAX):
            boot_ms = self._clock.boot_ms()
            unheard = [one for one in leases if not one.heard_ms or boot_ms - one.heard_ms > HEARD_KEPT_MS]
            left_s = (deadline_ms - boot_ms) / 1_000
            if not unheard or left_s <= 0:
                return
            try:
                await self._leasing.acquire(
                    LeaseWait(tenant, tuple((lease, 0) for lease in unheard[:LIMITS_HEARD_MAX])), left_s
                )
            except (LinkDown, LinkRefused, TimeoutError):
                return

    def _is_current(self, rulebook: Rulebook, tenant: Tenant) -> bool:
        engine = self._engine
        return engine.rulebook is rulebook and engine.tenants.get(tenant.license.tenant) is tenant


def _question(asked: Inquiry, action: str, meters: tuple[str, ...]) -> Inquiry:
    """A check of one unit of each meter of an action, by whom the list is for."""
    inquiry = Inquiry(asked.tenant, action)
    inquiry.subject_type, inquiry.subject_id = asked.subject_type, asked.subject_id
    inquiry.on_behalf_of, inquiry.roles = asked.on_behalf_of, asked.roles
    inquiry.subject_attributes, inquiry.context = asked.subject_attributes, asked.context
    inquiry.peek = True
    if meters != ("",):
        inquiry.quantities = dict.fromkeys(meters, 1)
    return inquiry


def _scope_context(limit: Limit, asked: Inquiry) -> dict[str, AttributeValue] | None:
    """The attributes that a scope reads; ``None`` when one was not sent."""
    names = [path.removeprefix("context.") for path in limit.scope if path != "subject"]
    if any(name not in asked.context for name in names):
        return None
    return {name: asked.context[name] for name in names}


def _describe_license(state: pb.LicenseState, tenant: Tenant, now_us: int) -> None:
    license_ = tenant.license
    state.plan, state.status = license_.plan, license_.status.value
    state.in_force = tenant.in_term(now_us)
    if license_.starts_s:
        state.starts_at.seconds = license_.starts_s
    if license_.ends_s:
        state.ends_at.seconds = license_.ends_s
    state.addons.update(license_.addons)


def _rule(traced: Traced) -> pb.RuleTrace:
    rule = traced.rule
    match = pb.RULE_MATCH_MATCHED if traced.matched else pb.RULE_MATCH_NOT_MATCHED
    return pb.RuleTrace(
        rule=rule.name,
        effect=rule.effect.value,
        condition=rule.condition.source if rule.condition else "",
        match=pb.RULE_MATCH_FAILED if traced.problem else match,
        problem=traced.problem,
        shadow=rule.shadow,
    )
