"""The decision: license and its term → action → entitlement → flags → roles → policies → quotas, all or none.

One plain synchronous function over in-memory state. It reads no clock, does no I/O and takes nothing: it answers with
a ``Decision`` whose spends the caller takes once the event is logged, or with a ``Wait`` that says what is missing.
Owned by one event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, Final

from licet.domain.approvals import QUIET_US, Override, OverrideEffect, RequestEntry
from licet.domain.catalog import AttributeValue, Entitlement, License, UnavailableMode
from licet.domain.entitlements import RATE_SCALE, entitlements_of
from licet.domain.ids import UNITS_MAX
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Window
from licet_sidecar.core import denials
from licet_sidecar.core.access_requests import RequestBook, key_for
from licet_sidecar.core.decision import BucketWait, Decision, LeaseWait, LoadWait, Variants, Wait, add_cost
from licet_sidecar.core.flags import denial_message, judge, retry_after_s, standing_of
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.lease import TOKENS_EACH, Kind, Lease, RateShare
from licet_sidecar.core.leases import LeaseBook, TenantLeases
from licet_sidecar.core.rulebook import BoundAction, Rulebook
from licet_sidecar.core.rules import approval_wanted, bindings_of, rule_on
from licet_sidecar.core.tenant import BoundLimit, Tenant, TenantAction, bind_action, prepare, scope_of

ABSENT_MS: Final = 30_000
"""How long "this tenant has no license" is believed without asking again; the change stream ends it sooner."""
ABSENT_TENANTS_MAX: Final = 10_000
BUCKET_WAIT_MS_MAX: Final = 1_000
BUCKET_YOUNG_MS: Final = 1_000
"""A check waits for the bucket of a share this young; later, an empty bucket means that too much is asked."""
EXHAUSTED_KEPT_MS: Final = 10_000
"""How long a pool of which nothing was left is taken for empty when there is another to take from."""
BOUND_ACTIONS_MAX: Final = 1_000
"""Actions remembered for each tenant; more than any catalog has, against callers that invent names."""
OVERRIDABLE: Final = frozenset(
    (Reason.FEATURE_OFF, Reason.ROLE_REQUIRED, Reason.POLICY_DENIED, Reason.POLICY_ERROR, Reason.APPROVAL_REQUIRED)
)
"""What an override can allow all the same: never what is not licensed, nor units beyond a limit."""
_APPROVED: Final = Effect.APPROVED
_OK: Final = Reason.OK
_NOTHING: Final[dict[str, Any]] = {}


class Obstacle(Enum):
    """What else keeps units from being taken at a rate."""

    NO_SHARE = auto()
    TOO_FAST = auto()


class Engine:
    """All state decisions are made from. Mutated only through its methods, each of which leaves it consistent."""

    def __init__(self, leases: LeaseBook, *, tenants_max: int, staleness_us_max: int) -> None:
        self.leases = leases
        self.rulebook: Rulebook | None = None
        self.as_of_us = 0
        self.revision = 0
        self.generation = 0
        self.tenants: OrderedDict[str, Tenant] = OrderedDict()
        self.tenants_max = tenants_max
        self.requests = RequestBook()
        self.targeting_failures = 0
        """How often the condition of a flag's targeting rule could not be evaluated."""
        self._staleness_us_max = staleness_us_max
        self._absent_until_ms: OrderedDict[str, int] = OrderedDict()

    # State

    def install_bundle(self, rulebook: Rulebook) -> None:
        """Puts a bundle in force. Tenants are bound to it when next asked about."""
        self.rulebook = rulebook

    def install_license(self, tenant: Tenant) -> list[str]:
        """Puts a license in force. Returns the tenants that had to make room for it, least recently asked first."""
        name = tenant.license.tenant
        self._absent_until_ms.pop(name, None)
        self.tenants[name] = tenant
        self.tenants.move_to_end(name)
        evicted: list[str] = []
        while len(self.tenants) > self.tenants_max:
            evicted.append(self.tenants.popitem(last=False)[0])
        return evicted

    def forget_license(self, tenant: str) -> None:
        """The license is not in force any more: ask again."""
        self.tenants.pop(tenant, None)

    def install_absence(self, tenant: str, boot_ms: int) -> None:
        """Remembers for a while that the tenant has no license."""
        self.tenants.pop(tenant, None)
        self._absent_until_ms[tenant] = boot_ms + ABSENT_MS
        self._absent_until_ms.move_to_end(tenant)
        if len(self._absent_until_ms) > ABSENT_TENANTS_MAX:
            self._absent_until_ms.popitem(last=False)

    def is_absent(self, tenant: str, boot_ms: int) -> bool:
        """Whether it is known, and was read lately, that the tenant has no license."""
        return boot_ms < self._absent_until_ms.get(tenant, 0)

    def forget_absence(self, tenant: str) -> None:
        """Something was published for the tenant: ask again."""
        self._absent_until_ms.pop(tenant, None)

    def forget_absences(self) -> None:
        """Changes may have been missed: believe no absence."""
        self._absent_until_ms.clear()

    def is_stale(self, now_us: int) -> bool:
        """Whether nothing has confirmed this state for longer than the staleness bound."""
        return now_us - self.as_of_us > self._staleness_us_max

    # Deciding

    def decide(self, inquiry: Inquiry, *, now_us: int, boot_ms: int, patient: bool) -> Decision | Wait:
        """Decides. With ``patient`` false nothing is waited for: the action's ``on_unavailable`` decides instead.

        The caller must hold a rulebook (be ready).

        Raises:
            InvalidInquiry: the request does not fit the action it names.
        """
        rulebook = self.rulebook
        assert rulebook is not None, "decide() before the first state was applied"
        tenant = self.tenants.get(inquiry.tenant)
        stale = now_us - self.as_of_us > self._staleness_us_max
        override: Override | None = None
        if rulebook.overrides:
            override = rulebook.override(inquiry.tenant, inquiry.subject_id, inquiry.action, now_us)
        decision: Decision | Wait
        if override is not None and override.effect is OverrideEffect.DENY:
            decision = denials.denied_by(override, rulebook, inquiry)
        elif tenant is None:
            decision = self._without_license(rulebook, inquiry, boot_ms, patient)
        else:
            self.tenants.move_to_end(inquiry.tenant)
            decision = self._with_license(rulebook, tenant, inquiry, now_us, boot_ms, patient, stale, override)
        if type(decision) is Decision:
            decision.stale = stale
            if rulebook.observe and decision.effect is not _APPROVED and not decision.overridden:
                decision.observed = True
            if decision.effect is Effect.PENDING and tenant is not None:
                decision = self._ask(tenant, inquiry, decision, now_us)
        return decision

    def _ask(self, tenant: Tenant, inquiry: Inquiry, decision: Decision, now_us: int) -> Decision:
        """The decision with the request that it waits for, or as people decided lately."""
        key = key_for(inquiry, decision.rule)
        records = not (inquiry.peek or decision.observed)
        asked = self.requests.ask(tenant.requests, inquiry.tenant, key, now_us, records=records)
        decision.access_request_id = asked.id
        if asked.is_full:
            decision.message += f" {inquiry.tenant} has as many open requests as it may have: none was made of this."
        denial = asked.denial
        if denial is not None:
            decision.effect = Effect.DENIED
            why = f": {denial.reason}" if denial.reason else ""
            decision.message += f" {denial.by} denied that{why}."
            decision.retry_after_s = max(1, (denial.at_us + QUIET_US - now_us) // 1_000_000)
        return decision

    def decide_access(self, inquiry: Inquiry, *, now_us: int, boot_ms: int, patient: bool) -> Decision | Wait:
        """As ``decide``, up to the quotas: what an approval then takes is not units, and costs nothing."""
        inquiry.access_only = True
        outcome = self.decide(inquiry, now_us=now_us, boot_ms=boot_ms, patient=patient)
        if type(outcome) is Decision:
            outcome.units = outcome.feature_costs = _NOTHING
            outcome.cost_nanos, outcome.currency = 0, ""
        return outcome

    def entitlement(self, tenant: str, feature: str) -> Entitlement | None:
        """What a tenant's license, as it was last decided on, grants of a feature."""
        known = self.tenants.get(tenant)
        return known.entitlements.get(feature) if known else None

    def _without_license(self, rulebook: Rulebook, inquiry: Inquiry, boot_ms: int, patient: bool) -> Decision | Wait:
        if self.is_absent(inquiry.tenant, boot_ms):
            return Decision(Effect.DENIED, Reason.NO_LICENSE, f"Tenant {inquiry.tenant} has no license.")
        if patient:
            return LoadWait(inquiry.tenant)
        bound = rulebook.action(inquiry.action)
        if bound is None:
            return denials.unknown_action(inquiry)
        decision = denials.unavailable(bound, "The tenant's license could not be read.")
        prepare(bound, inquiry)
        decision.units, decision.context = inquiry.units, bound.recorded(inquiry.declared)
        return decision

    def _with_license(
        self,
        rulebook: Rulebook,
        tenant: Tenant,
        inquiry: Inquiry,
        now_us: int,
        boot_ms: int,
        patient: bool,
        stale: bool,
        override: Override | None,
    ) -> Decision | Wait:
        if tenant.rulebook is not rulebook:
            is_bound = tenant.rulebook is not None and tenant.rulebook.has_actions_of(rulebook)
            tenant.rulebook = rulebook
            if not is_bound:
                tenant.entitlements = entitlements_of(tenant.license, rulebook.catalog)
                tenant.actions = {}
        plan = tenant.actions.get(inquiry.action)
        if plan is None:
            bound = rulebook.action(inquiry.action)
            if bound is None:
                return denials.license_problem(tenant.license, now_us) or denials.unknown_action(inquiry)
            plan = bind_action(tenant, bound)
            if len(tenant.actions) < BOUND_ACTIONS_MAX:
                tenant.actions[inquiry.action] = plan
        bound = plan.action
        if inquiry.prepared_for is not bound:
            prepare(bound, inquiry)
        units, context = inquiry.units, inquiry.declared

        decision = None if tenant.in_term(now_us) else denials.license_problem(tenant.license, now_us)
        if decision is None and stale and not self.may_decide_stale(bound, now_us):
            decision = Decision(
                Effect.DENIED,
                Reason.STALE_POLICY,
                "What this sidecar knows has not been confirmed for longer than its staleness_max.",
            )
        exposures: Mapping[str, str] = plan.exposures if decision is None else _NOTHING
        variants = plan.variants
        if decision is None and plan.denial is not None:
            reason, message, rule = plan.denial
            decision = Decision(Effect.DENIED, reason, message, rule)
        shadow: Sequence[str] = ()
        approvals: Sequence[tuple[str, RequestEntry]] = ()
        if decision is None and plan.open_flags:
            decision, exposures, variants = self._open_flags(plan, tenant.license, inquiry, now_us)
        if decision is None and bound.roles is not None:
            decision = self._role_denial(plan, inquiry)
        if decision is None and bound.rules:
            ruling = rule_on(bound, tenant.license, inquiry, now_us)
            shadow = ruling.shadow
            if ruling.approvals:
                rule, approvals = tenant.lifted(inquiry, ruling.approvals, now_us)
                if rule:
                    decision = Decision(ruling.effect or Effect.PENDING, ruling.reason, approval_wanted(rule), rule)
            elif ruling.effect is not None:
                decision = Decision(ruling.effect, ruling.reason, ruling.message, ruling.rule)
        lifted: Decision | None = None
        if override is not None and decision is not None and decision.reason in OVERRIDABLE:
            lifted, decision, approvals = decision, None, ()
        if decision is None and inquiry.access_only:
            decision = Decision(_APPROVED, _OK)
        if decision is None:
            limits = plan.limits
            if approvals:
                limits += tuple(tenant.counted(entry) for _, entry in approvals if entry.units)
            settled = self._quotas(plan, limits, tenant, inquiry, units, context, now_us, boot_ms, patient)
            if type(settled) is not Decision:
                return settled
            decision = settled
            if decision.effect is _APPROVED:
                if plan.shadow_limits:
                    exceeded, decision.counted = self._counting(plan.shadow_limits, inquiry, now_us, boot_ms)
                    shadow = (*shadow, *exceeded)
            elif rulebook.observe:  # it is done all the same
                decision.counted = self._counting(plan.all_limits, inquiry, now_us, boot_ms)[1]
        if approvals:
            denials.note_approvals(decision, approvals)
        if lifted is not None and override is not None and decision.effect is _APPROVED:
            denials.note_override(decision, override, lifted)
        decision.units = units
        decision.context = bound.recorded(context) if bound.hides else context
        decision.shadow = shadow
        if exposures:
            decision.exposures, decision.variants = exposures, variants
        if tenant.ends_us <= now_us and tenant.in_term(now_us):
            denials.in_grace(decision, tenant.license)
        if plan.prices and decision.effect is _APPROVED:  # what was not allowed costs nothing
            decision.prices = plan.prices
            add_cost(decision)
        return decision

    def _open_flags(
        self, plan: TenantAction, license_: License, inquiry: Inquiry, now_us: int
    ) -> tuple[Decision | None, Mapping[str, str], Variants]:
        """The denial of the first flag that is off, and what every flag that was looked at serves."""
        exposures, variants = dict(plan.exposures), plan.variants

        def bindings(variables: Iterable[str]) -> Mapping[str, Any]:
            return bindings_of(variables, plan.action, license_, inquiry, now_us)

        for bound, standing in plan.open_flags:
            flag = bound.flag
            if standing is None:
                standing = standing_of(flag, inquiry.subject_id)
            verdict = judge(bound, standing, bindings, now_us)
            self.targeting_failures += len(verdict.failed)
            exposures[flag.name] = verdict.served
            if not verdict.is_on:
                decision = Decision(Effect.DENIED, Reason.FEATURE_OFF, denial_message(flag, verdict), flag.name)
                decision.retry_after_s = retry_after_s(flag, standing, verdict, now_us)
                return decision, exposures, variants
            if verdict.variant is not None:
                variants = (*variants, (flag.name, verdict.variant))
        return None, exposures, variants

    @staticmethod
    def _role_denial(plan: TenantAction, inquiry: Inquiry) -> Decision | None:
        roles = plan.action.roles
        if roles is not None and roles.isdisjoint(inquiry.roles):
            needed = ", ".join(sorted(roles))
            return Decision(Effect.DENIED, Reason.ROLE_REQUIRED, f"{inquiry.action} needs one of the roles {needed}.")
        return None

    def _quotas(
        self,
        plan: TenantAction,
        limits: Sequence[BoundLimit],
        tenant: Tenant,
        inquiry: Inquiry,
        units: Mapping[str, int],
        context: Mapping[str, AttributeValue],
        now_us: int,
        boot_ms: int,
        patient: bool,
    ) -> Decision | Wait:
        decision = Decision(_APPROVED, _OK)
        if not limits:
            return decision
        held = tenant.held
        if held is None or self.leases.tenants.get(inquiry.tenant) is not held:
            held = tenant.held = self.leases.of(inquiry.tenant)
        now_s = now_us // 1_000_000
        needs: list[tuple[Lease, int]] | None = None
        leases, spends = held.leases, decision.spends
        for limit in limits:
            asked = units.get(limit.feature, 0)
            window = limit.window
            if not window[0] <= now_s < window[1]:
                window = limit.window_at(now_s)
            scope = scope_of(limit.scope, inquiry, context) if limit.scope else ""
            lease = leases.get((limit.key, scope))
            if lease is None or lease.start != window[0] or lease.terms is not limit.terms:
                lease = self.leases.lease(held, limit.key, scope, window[0], window[1], limit.terms, boot_ms)
            if limit.is_rate:
                obstacle = self._rate(limit, lease, asked, boot_ms, decision)
                if obstacle is Obstacle.NO_SHARE:
                    needs = [*(needs or ()), (lease, asked)]
                elif obstacle is not None:
                    if patient and type(obstacle) is BucketWait:
                        return obstacle
                    return denials.rate_limited(limit, lease, asked, boot_ms)
                continue
            if limit.terms.currency:
                asked = limit.quota_units(asked, context)
            if asked > UNITS_MAX:  # what it costs, say
                return denials.uncountable(limit, lease, asked, window, now_s)
            if limit.pools:
                needs = needs or []
                if not self._from_pools(limit, lease, asked, held, now_s, boot_ms, spends, needs):
                    return denials.exceeded(limit, lease, asked, window, now_s)
                if any(units > pool.countable for pool, units in needs):
                    return denials.uncountable(limit, lease, asked, window, now_s)
                if lease.over:
                    _mark_overage(decision, lease, boot_ms)
                continue
            spends.append((lease, asked))
            if lease.used + lease.reserved + asked > lease.cap or boot_ms >= lease.hold_until_ms:
                if asked == 0:
                    continue
                if lease.kind is not Kind.SOFT and (
                    self.leases.known_short(lease, asked, boot_ms) or asked > lease.amount
                ):
                    return denials.exceeded(limit, lease, asked, window, now_s)
                if asked > lease.countable:
                    return denials.uncountable(limit, lease, asked, window, now_s)
                lease.within = False
                needs = needs or []
                needs.append((lease, asked))
            elif lease.over and (beyond := lease.overage(asked)):
                decision.overage = {**decision.overage, lease.quota: beyond}
                decision.reason = Reason.OVERAGE
        if not needs:
            return decision
        if patient:
            return LeaseWait(inquiry.tenant, tuple(needs))
        return self._without_lease(plan.action, decision, needs, now_us, boot_ms)

    def counting_late(
        self, inquiry: Inquiry, decision: Decision, *, now_us: int, boot_ms: int
    ) -> Sequence[tuple[Lease, int]]:
        """What is to be counted of what was asked, when it was decided earlier and is done only now.

        Raises:
            InvalidInquiry: the request does not fit the action it names any more.
        """
        tenant = self.tenants.get(inquiry.tenant)
        plan = tenant.actions.get(inquiry.action) if tenant else None
        if plan is None:
            return ()
        limits = plan.shadow_limits
        if decision.effect is not _APPROVED:
            limits = plan.all_limits if decision.observed and plan.denies_as(decision) else ()
        if not limits:
            return ()
        prepare(plan.action, inquiry)
        return self._counting(limits, inquiry, now_us, boot_ms)[1]

    def _counting(
        self, limits: Iterable[BoundLimit], inquiry: Inquiry, now_us: int, boot_ms: int
    ) -> tuple[list[str], list[tuple[Lease, int]]]:
        """Which of the limits the inquiry exceeds, and what of each is to be counted. Nothing is waited for.

        Of a rate it is known only while a share of it is held.
        """
        held = self.leases.of(inquiry.tenant)
        exceeded: list[str] = []
        counted: list[tuple[Lease, int]] = []
        for limit in limits:
            asked = inquiry.units.get(limit.feature, 0)
            if not asked:
                continue
            scope = scope_of(limit.scope, inquiry, inquiry.declared) if limit.scope else ""
            window = limit.window_at(now_us // 1_000_000)
            lease = self.leases.lease(held, limit.key, scope, *window, limit.terms, boot_ms)
            if isinstance(lease, RateShare):
                is_known = boot_ms < lease.hold_until_ms and boot_ms - lease.since_ms >= BUCKET_YOUNG_MS
                is_exceeded = asked > lease.burst or (is_known and lease.level(boot_ms) < asked * TOKENS_EACH)
                counted.append((lease, asked))
            else:
                asked = limit.quota_units(asked, inquiry.declared)
                is_exceeded = asked > lease.unused
                if asked <= lease.countable:
                    counted.append((lease, asked))
            if is_exceeded:
                exceeded.append(f"{limit.key}={limit.on_exceeded.value}")
        return exceeded, counted

    def _rate(
        self, limit: BoundLimit, lease: Lease, asked: int, boot_ms: int, decision: Decision
    ) -> Obstacle | BucketWait | None:
        """What keeps ``asked`` from being taken out of the bucket; ``None`` when it is there."""
        assert isinstance(lease, RateShare)
        decision.rates.append((lease, asked))
        if not asked or lease.level(boot_ms) >= asked * TOKENS_EACH:
            return None
        if lease.amount and asked <= lease.burst and not self.leases.known_short(lease, asked, boot_ms):
            wait_ms = lease.wait_ms(asked, boot_ms) if boot_ms < lease.hold_until_ms else None
            if wait_ms is None:
                return Obstacle.NO_SHARE
            if wait_ms <= BUCKET_WAIT_MS_MAX and boot_ms - lease.since_ms < BUCKET_YOUNG_MS:
                return BucketWait(wait_ms)
        lease.refused(asked)
        return Obstacle.TOO_FAST

    def _from_pools(
        self,
        limit: BoundLimit,
        own: Lease,
        asked: int,
        held: TenantLeases,
        now_s: int,
        boot_ms: int,
        spends: list[tuple[Lease, int]],
        needs: list[tuple[Lease, int]],
    ) -> bool:
        """Spreads ``asked`` over a limit and its grants, each used up before the next. Whether there may be enough."""
        takes: dict[Lease, int] = {own: 0}
        rest = asked
        for pool in limit.pools:
            if pool is limit:
                lease = own
            elif pool.is_in_force(now_s):
                lease = self.leases.lease(held, pool.key, "", *pool.window_at(now_s), pool.terms, boot_ms)
            else:
                continue
            free = max(0, lease.free) if boot_ms < lease.hold_until_ms else 0
            if lease.kind is Kind.SOFT:  # what lies past its amount comes after the grants
                free = max(0, free - lease.over)
            takes[lease] = min(rest, free if rest <= free else free + _obtainable(lease, free, boot_ms))
            rest -= takes[lease]
            if not rest:
                break
        own.within = own.kind is Kind.SOFT and not rest
        if rest and own.kind is Kind.SOFT:
            takes[own] += rest
            rest = 0
        spends += [(lease, take) for lease, take in takes.items() if take or lease is own]
        needs += [(lease, take) for lease, take in takes.items() if not LeaseBook.can_spend(lease, take, boot_ms)]
        return not rest

    def _without_lease(
        self,
        bound: BoundAction,
        decision: Decision,
        needs: Sequence[tuple[Lease, int]],
        now_us: int,
        boot_ms: int,
    ) -> Decision:
        """Nothing can be leased: the action's ``on_unavailable`` decides. An approval takes what no lease covers."""
        on_unavailable = bound.action.on_unavailable
        why = "No lease could be had for a limit of this action."
        denial = ""
        match on_unavailable.mode:
            case UnavailableMode.ALLOW:
                how = "The action allows that."
                if not all(self._can_be_told(lease, units) for lease, units in needs):
                    denial = "The action allows that, but all sidecars together could take more than can be counted."
            case UnavailableMode.CAPPED:
                denial = self._beyond_cap(needs, on_unavailable.units_max, boot_ms)
                how = f"The action allows {on_unavailable.units_max:,} units of each quota then."
            case UnavailableMode.LAST_KNOWN:
                if now_us - self.as_of_us > on_unavailable.for_s_max * 1_000_000:
                    denial = "The action goes by what was last known of its quotas, and that was too long ago."
                elif not all(self._was_left(lease, units, now_us, boot_ms) for lease, units in needs):
                    denial = "The action goes by what was last known of its quotas, and of one so much was not left."
                how = "The action goes by what was last known of its quotas."
            case UnavailableMode.DENY:
                how, denial = "", "The action denies then."
        if denial:
            decision = Decision(Effect.DENIED, Reason.DEGRADED_DENY, f"{why} {denial}")
        else:
            decision.reason = Reason.DEGRADED_ALLOW
            decision.message = f"{why} {how}"
        decision.degraded = True
        return decision

    def _can_be_told(self, lease: Lease, units: int) -> bool:
        """Whether Redis can count ``units`` more, also if every other sidecar takes as many as this one may."""
        if isinstance(lease, RateShare):
            return True
        return lease.degraded + units <= (lease.countable + lease.degraded) // max(1, self.leases.live)

    @staticmethod
    def _beyond_cap(needs: Sequence[tuple[Lease, int]], units_max: int, boot_ms: int) -> str:
        """Why ``capped`` denies; empty when it does not. Of a rate it allows so many units in each second."""
        for lease, units in needs:
            if isinstance(lease, RateShare):
                if lease.spare_level(units_max * RATE_SCALE, units_max, boot_ms) < units * TOKENS_EACH:
                    return f"The action allows {units_max:,} units a second then, and more were asked."
            elif lease.degraded + units > units_max:
                return f"The action allows {units_max:,} units of each quota then, and {lease.degraded:,} were given."
        return ""

    def _was_left(self, lease: Lease, units: int, now_us: int, boot_ms: int) -> bool:
        """Whether ``units`` are left as far as was last known; of a rate, in this sidecar's part of it."""
        live = max(1, self.leases.live)
        if isinstance(lease, RateShare):
            if not lease.hold_until_ms:
                return False  # this process never had a share
            left = lease.spare_level(lease.amount // live, max(1, lease.burst // live), boot_ms)
            return units * TOKENS_EACH <= left
        if lease.is_heard_of:
            return units <= max(0, lease.free) + lease.remaining
        heard_us = now_us - 1_000 * (boot_ms - self.leases.heard_ms) if self.leases.heard_ms else self.as_of_us
        if lease.start * 1_000_000 < heard_us:
            return False  # others may have used all of it
        return units <= lease.amount // live - lease.used - lease.reserved  # it began since

    def may_decide_stale(self, bound: BoundAction, now_us: int) -> bool:
        """Whether the action is decided from a state that nothing confirmed for too long."""
        on_unavailable = bound.action.on_unavailable
        if on_unavailable.mode is UnavailableMode.LAST_KNOWN:
            return now_us - self.as_of_us <= on_unavailable.for_s_max * 1_000_000
        return on_unavailable.mode is not UnavailableMode.DENY

    def window_after(self, tenant: str, lease: Lease) -> Window | None:
        """The window after a lease's, of the limit it is leased from; ``None`` when there is none, or no such limit."""
        loaded = self.tenants.get(tenant)
        if loaded is None:
            return None
        for plan in loaded.actions.values():
            for limit in plan.all_limits:
                if limit.key == lease.limit_key:
                    return limit.window_after(lease)
        return None


def _mark_overage(decision: Decision, lease: Lease, boot_ms: int) -> None:
    """What a decision takes of a soft limit beside its grants may lie past its amount."""
    take = next(units for one, units in decision.spends if one is lease)
    if LeaseBook.can_spend(lease, take, boot_ms) and (beyond := lease.overage(take)):
        decision.overage = {**decision.overage, lease.quota: beyond}
        decision.reason = Reason.OVERAGE


def _obtainable(lease: Lease, free: int, boot_ms: int) -> int:
    """Units of a pool, beside the ``free`` ones, that others do not use, as last heard; all when nothing was lately."""
    if lease.kind is Kind.SOFT and lease.unused <= free:
        return 0  # others may hold some past the amount
    known = lease.remaining + lease.idle_elsewhere
    if boot_ms < lease.short_until_ms:
        return known
    if not known and lease.heard_ms and boot_ms - lease.heard_ms < EXHAUSTED_KEPT_MS:
        return 0
    return lease.amount
