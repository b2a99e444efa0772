"""The decision: license and its term → action → entitlement → flags → roles → policies → quotas, all or none.

One plain synchronous function over in-memory state. It reads no clock, does no I/O and takes nothing: it answers with
a ``Decision`` whose spends the caller takes once the event is logged, or with a ``Wait`` that says what is missing.
Owned by one event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any, Final

from licet.domain.approvals import QUIET_US, Override, OverrideEffect, RequestEntry
from licet.domain.catalog import (
    AttributeValue,
    Enforcement,
    Entitlement,
    Grant,
    License,
    LicenseStatus,
    Limit,
    OnExceeded,
    UnavailableMode,
)
from licet.domain.entitlements import RATE_SCALE, entitlements_of
from licet.domain.flags import Variant
from licet.domain.ids import UNITS_MAX
from licet.domain.money import AMOUNT_NANOS_MAX, Price, format_nanos
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import FOREVER_S, Period, Window, window_of
from licet.wire.names import scope_digest, subject_value
from licet_sidecar.core.access_requests import NO_REQUESTS, RequestBook, TenantRequests, key_for
from licet_sidecar.core.flags import BoundFlag, Standing, denial_message, judge, retry_after_s, standing_of
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry, check_units, declared_context, meter_units
from licet_sidecar.core.leases import TOKENS_EACH, Kind, Lease, LeaseBook, RateShare, TenantLeases, Terms
from licet_sidecar.core.rulebook import BoundAction, Rulebook
from licet_sidecar.core.rules import approval_wanted, bindings_of, rule_on

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

_NEVER_US: Final = 2**63
_APPROVED: Final = Effect.APPROVED
_OK: Final = Reason.OK
_NOTHING: Final[dict[str, Any]] = {}


Prices = tuple[tuple[str, Price, str], ...]
"""Feature, price, and the attribute that picks the amount (empty for none)."""

Variants = tuple[tuple[str, Variant], ...]
"""A flag's name, and the variant that it serves."""


class Decision:
    """What was decided. ``units`` are the units asked, by feature; ``spends`` what is to be taken from which lease.

    ``effect`` and ``reason`` are the real decision; ``observed`` says that the caller is answered APPROVED anyway.
    """

    __slots__ = (
        "access_request_id",
        "context",
        "cost_nanos",
        "counted",
        "currency",
        "degraded",
        "effect",
        "exposures",
        "feature_costs",
        "grace_until_s",
        "message",
        "observed",
        "overage",
        "overridden",
        "priced_as",
        "prices",
        "rates",
        "reason",
        "retry_after_s",
        "rule",
        "shadow",
        "spends",
        "stale",
        "units",
        "variants",
    )

    def __init__(self, effect: Effect, reason: Reason, message: str = "", rule: str = "") -> None:
        self.effect = effect
        self.reason = reason
        self.message = message
        self.rule = rule
        self.units: Mapping[str, int] = _NOTHING
        self.cost_nanos = 0
        self.currency = ""
        self.feature_costs: Mapping[str, int] = _NOTHING
        """What each feature costs, when several do."""
        self.context: Mapping[str, AttributeValue] = _NOTHING
        """The declared attributes as they are recorded."""
        self.prices: Prices = ()
        """What the license says the action's features cost."""
        self.priced_as: Mapping[str, str] = _NOTHING
        """By feature, the value of its price's attribute, where that has a price of its own."""
        self.exposures: Mapping[str, str] = _NOTHING
        """The variant of each flag that was looked at; ``on`` or ``off`` where there is none."""
        self.variants: Variants = ()
        """Those of them that services are told."""
        self.spends: list[tuple[Lease, int]] = []
        self.counted: Sequence[tuple[Lease, int]] = ()
        """What is taken though no lease may cover it: of limits in shadow; in observe mode, of limits that denied."""
        self.rates: list[tuple[RateShare, int]] = []
        """What is to be taken from buckets; never given back, never recorded."""
        self.overage: Mapping[str, int] = _NOTHING
        """By quota, how much of a spend lies beyond a soft limit, as far as is known here."""
        self.shadow: Sequence[str] = ()
        self.retry_after_s: float = 0
        self.access_request_id = ""
        """The request that waits for people, that they denied, or whose approval allowed this."""
        self.overridden = False
        """Denied by an override, which also holds where everything else is only observed."""
        self.grace_until_s = 0
        """When the license, whose term has ended, stops answering; 0 in its term."""
        self.observed = False
        self.stale = False
        self.degraded = False


@dataclass(frozen=True, slots=True)
class LoadWait:
    """The tenant's license is not here: load it, then decide again."""

    tenant: str


@dataclass(frozen=True, slots=True)
class LeaseWait:
    """Leases ran dry: acquire, then decide again. ``needs`` are the units that must be free in each."""

    tenant: str
    needs: tuple[tuple[Lease, int], ...]


@dataclass(frozen=True, slots=True)
class BucketWait:
    """The share of a rate is new and its bucket still filling: decide again then."""

    wait_ms: int


class Obstacle(Enum):
    """What else keeps units from being taken at a rate."""

    NO_SHARE = auto()
    TOO_FAST = auto()


Wait = LoadWait | LeaseWait | BucketWait


class BoundLimit:
    """A limit of one of the action's features, or a grant of it, under a tenant's license."""

    __slots__ = (
        "_anchor",
        "_by",
        "_ends_s",
        "_per",
        "_price",
        "_starts_s",
        "feature",
        "is_rate",
        "key",
        "on_exceeded",
        "pools",
        "scope",
        "terms",
        "window",
    )

    def __init__(self, feature: str, limit: Limit, entitlement: Entitlement, license_: License) -> None:
        self.feature = feature
        self.key = limit.key
        self.scope = limit.scope
        self.on_exceeded = limit.on_exceeded
        self.is_rate = limit.is_rate
        is_soft = limit.on_exceeded is OnExceeded.OVERAGE or limit.enforcement is Enforcement.SHADOW
        soft = Kind.SOFT if is_soft else Kind.HARD
        self.terms = Terms(
            amount=limit.amount * RATE_SCALE if limit.is_rate else limit.amount,
            kind=Kind.RATE if limit.is_rate else soft,
            durable=limit.durable,
            burst=limit.burst or limit.amount,
            window=limit.per.value,
            currency=limit.currency,
            scope=limit.scope,
        )
        self._per = limit.per
        self._anchor = limit.anchor
        self._starts_s = license_.starts_s
        self._ends_s = license_.stops_s
        self._price = entitlement.price if limit.currency else None
        self._by = self._price.by.removeprefix("context.") if self._price else ""
        self.window = Window(0, 0)
        """The one that was asked about last."""
        self.pools: tuple[BoundLimit, ...] = ()
        """This limit and its grants in the order they are used; empty without grants."""

    @classmethod
    def with_grants(cls, feature: str, limit: Limit, entitlement: Entitlement, license_: License) -> BoundLimit:
        """The limit, and what the license's grants add to it."""
        own = cls(feature, limit, entitlement, license_)
        mine = [grant for grant in entitlement.grants if grant.limit == limit.key]
        if mine:
            pools = [(grant.priority, own._granted(limit, entitlement, grant)) for grant in mine]
            own.pools = tuple(pool for _, pool in sorted([(0, own), *pools], key=lambda pool: pool[0]))
        return own

    def _granted(self, limit: Limit, entitlement: Entitlement, grant: Grant) -> BoundLimit:
        alike = replace(
            limit, key=grant.key, amount=grant.amount, per=Period.TERM, scope=(), on_exceeded=OnExceeded.DENY
        )
        term = License("", "", starts_s=grant.starts_s, ends_s=grant.ends_s)
        pool = BoundLimit(self.feature, alike, entitlement, term)
        pool.terms = pool.terms._replace(window=limit.per.value, grant=grant.id)
        return pool

    @classmethod
    def of_approval(cls, entry: RequestEntry) -> BoundLimit:
        """The units that an approval is for, counted like those of any limit."""
        limit = Limit(entry.limit_key, entry.units, Period.TERM, on_exceeded=OnExceeded.REQUIRE_APPROVAL)
        ends_s = -(-entry.until_us // 1_000_000)
        term = License("", "", starts_s=entry.at_us // 1_000_000, ends_s=ends_s)
        return cls(entry.feature, limit, Entitlement(), term)

    def window_at(self, now_s: int) -> Window:
        """The window that holds ``now_s``."""
        window = self.window
        if not window[0] <= now_s < window[1]:
            window = self.window = window_of(
                self._per, self._anchor, now_s, starts_s=self._starts_s, ends_s=self._ends_s
            )
        return window

    def window_after(self, lease: Lease) -> Window | None:
        """The window that begins where the lease's ends; ``None`` when there is none."""
        if self._per in (Period.SECOND, Period.TERM):
            return None
        return window_of(self._per, self._anchor, lease.end, starts_s=self._starts_s, ends_s=self._ends_s)

    def is_in_force(self, now_s: int) -> bool:
        """Whether a grant has begun and not ended."""
        return self._per is not Period.TERM or self._starts_s <= now_s < (self._ends_s or now_s + 1)

    def quota_units(self, units: int, context: Mapping[str, AttributeValue]) -> int:
        """What ``units`` of the feature take from the quota: as many, or for a budget what they cost."""
        if self._price is None:
            return units
        by = context.get(self._by, "") if self._by else ""
        return self._price.charge_nanos(units, by if type(by) is str else str(by))


class TenantAction:
    """What the tenant's license says about one action: a denial, or its prices and limits."""

    __slots__ = ("action", "denial", "exposures", "limits", "open_flags", "prices", "shadow_limits", "variants")

    def __init__(self, action: BoundAction, denial: tuple[Reason, str, str] | None = None) -> None:
        self.action = action
        self.denial = denial
        self.exposures: dict[str, str] = {}
        """Of the flags that depend on nothing but the tenant, up to the first other one, what each serves."""
        self.variants: Variants = ()
        self.open_flags: tuple[tuple[BoundFlag, Standing | None], ...] = ()
        """The flags that are left for each check to judge; with where the tenant stands, for those by tenant."""
        self.prices: Prices = ()
        self.limits: tuple[BoundLimit, ...] = ()
        self.shadow_limits: tuple[BoundLimit, ...] = ()
        """Those that are only counted; they have no grants."""

    @property
    def all_limits(self) -> tuple[BoundLimit, ...]:
        """Those that bind, and those in shadow."""
        return self.limits + self.shadow_limits

    def denies_as(self, decision: Decision) -> bool:
        """Whether it is a limit that denied, or that nothing could be leased."""
        return decision.reason is Reason.DEGRADED_DENY or any(limit.key == decision.rule for limit in self.limits)


class Tenant:
    """A loaded license, and what follows from it under the present bundle."""

    __slots__ = (
        "_counted",
        "_from_us",
        "_until_us",
        "actions",
        "document",
        "ends_us",
        "entitlements",
        "generation",
        "held",
        "license",
        "requests",
        "revision",
        "rulebook",
    )

    def __init__(self, license_: License, *, generation: int, revision: int, document: bytes) -> None:
        self.license = license_
        self.generation = generation
        self.revision = revision
        self.document = document
        """The signed bytes, for the disk snapshot."""
        self.rulebook: Rulebook | None = None
        self.entitlements: dict[str, Entitlement] = {}
        self.actions: dict[str, TenantAction] = {}
        self.held: TenantLeases | None = None
        self.requests = TenantRequests(license_.requests) if license_.requests else NO_REQUESTS
        self._counted: dict[str, BoundLimit] = {}
        self._from_us = license_.starts_s * 1_000_000 if license_.status is LicenseStatus.ACTIVE else _NEVER_US
        self._until_us = license_.stops_s * 1_000_000 or _NEVER_US
        self.ends_us = license_.ends_s * 1_000_000 or _NEVER_US
        """From when on it only answers because it has grace."""

    def in_term(self, now_us: int) -> bool:
        """Whether the license is active, and its term or its grace covers the instant."""
        return self._from_us <= now_us < self._until_us

    def lifted(self, inquiry: Inquiry, rules: Sequence[str], now_us: int) -> tuple[str, list[tuple[str, RequestEntry]]]:
        """The first of ``rules`` that still wants an approval, empty when all have one; and the approvals, by rule."""
        approvals: list[tuple[str, RequestEntry]] = []
        for rule in rules:
            entry = self.requests.live(key_for(inquiry, rule), now_us)
            if entry is None:
                return rule, approvals
            approvals.append((rule, entry))
        return "", approvals

    def counted(self, entry: RequestEntry) -> BoundLimit:
        """The units of an approval that has some."""
        limit = self._counted.get(entry.id)
        if limit is None:
            limit = self._counted[entry.id] = BoundLimit.of_approval(entry)
        return limit


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
            decision = _denied_by(override, rulebook, inquiry)
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
            return _unknown_action(inquiry)
        decision = _unavailable(bound, "The tenant's license could not be read.")
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
                return license_problem(tenant.license, now_us) or _unknown_action(inquiry)
            plan = bind_action(tenant, bound)
            if len(tenant.actions) < BOUND_ACTIONS_MAX:
                tenant.actions[inquiry.action] = plan
        bound = plan.action
        if inquiry.prepared_for is not bound:
            prepare(bound, inquiry)
        units, context = inquiry.units, inquiry.declared

        decision = None if tenant.in_term(now_us) else license_problem(tenant.license, now_us)
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
            _note_approvals(decision, approvals)
        if lifted is not None and override is not None and decision.effect is _APPROVED:
            _note_override(decision, override, lifted)
        decision.units = units
        decision.context = bound.recorded(context) if bound.hides else context
        decision.shadow = shadow
        if exposures:
            decision.exposures, decision.variants = exposures, variants
        if tenant.ends_us <= now_us and tenant.in_term(now_us):
            in_grace(decision, tenant.license)
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
                    return _rate_limited(limit, lease, asked, boot_ms)
                continue
            if limit.terms.currency:
                asked = limit.quota_units(asked, context)
            if asked > UNITS_MAX:  # what it costs, say
                return _uncountable(limit, lease, asked, window, now_s)
            if limit.pools:
                needs = needs or []
                if not self._from_pools(limit, lease, asked, held, now_s, boot_ms, spends, needs):
                    return _exceeded(limit, lease, asked, window, now_s)
                if any(units > pool.countable for pool, units in needs):
                    return _uncountable(limit, lease, asked, window, now_s)
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
                    return _exceeded(limit, lease, asked, window, now_s)
                if asked > lease.countable:
                    return _uncountable(limit, lease, asked, window, now_s)
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


def _denied_by(override: Override, rulebook: Rulebook, inquiry: Inquiry) -> Decision:
    """Whoever the tenant is: its license is not looked at."""
    message = f"Denied by {override.rule} of {override.by}: {override.reason}."
    decision = Decision(Effect.DENIED, Reason.POLICY_DENIED, message, override.rule)
    decision.overridden = True
    bound = rulebook.action(inquiry.action)
    if bound is not None:
        prepare(bound, inquiry)
        decision.units, decision.context = inquiry.units, bound.recorded(inquiry.declared)
    return decision


def _note_override(decision: Decision, override: Override, lifted: Decision) -> None:
    """Says which override allowed it, and what would have been answered without."""
    said = f"Allowed by {override.rule} of {override.by}: {override.reason}. Otherwise: {lifted.message}"
    decision.rule, decision.message = override.rule, f"{said} {decision.message}".rstrip()


def _note_approvals(decision: Decision, approvals: Sequence[tuple[str, RequestEntry]]) -> None:
    """Says which approval allowed it; of one whose units do not suffice, that its rule wants another."""
    if decision.effect is _APPROVED:
        decision.access_request_id = approvals[0][1].id
        return
    for rule, entry in approvals:
        if entry.units and decision.rule == entry.limit_key:
            lease = decision.spends[0][0]
            left = min(lease.unused, lease.remaining + max(0, lease.free))
            decision.rule, decision.spends = rule, []
            decision.message = (
                f"{approval_wanted(rule)} Of the {entry.units:,} units that {entry.by} approved, {left:,} are left."
            )


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


def _exceeded(limit: BoundLimit, lease: Lease, asked: int, window: Window, now_s: int) -> Decision:
    left = min(lease.unused, lease.remaining + max(0, lease.free))
    currency = limit.terms.currency
    if currency:
        what = f"{format_nanos(asked)} {currency} of {limit.feature} were asked; the budget of"
        what += f" {format_nanos(lease.amount)} {currency} per {limit.terms.window} has {format_nanos(left)} left."
    else:
        what = f"{asked:,} units of {limit.feature} were asked; the limit of {lease.amount:,}"
        what += f" per {limit.terms.window} has {left:,} left."
    if limit.on_exceeded is OnExceeded.REQUIRE_APPROVAL:
        exceeded = Decision(Effect.PENDING, Reason.APPROVAL_REQUIRED, f"{what} More needs an approval.", limit.key)
    else:
        exceeded = Decision(Effect.DENIED, Reason.QUOTA_EXHAUSTED, what, limit.key)
        if window.end < FOREVER_S:
            exceeded.retry_after_s = window.end - now_s
    exceeded.spends = [(lease, 0)]
    return exceeded


def _uncountable(limit: BoundLimit, lease: Lease, asked: int, window: Window, now_s: int) -> Decision:
    """More than can be counted, which no limit is so soft as to allow."""
    currency = limit.terms.currency
    most = f"{format_nanos(UNITS_MAX)} {currency}" if currency else f"{UNITS_MAX:,} units"
    what = f"{format_nanos(asked)} {currency}" if currency else f"{asked:,} units"
    denied = Decision(
        Effect.DENIED,
        Reason.QUOTA_EXHAUSTED,
        f"{what} of {limit.feature} were asked; with them more than {most} would be counted per"
        f" {limit.terms.window}, which is the most there can be.",
        limit.key,
    )
    if window.end < FOREVER_S and asked <= UNITS_MAX:
        denied.retry_after_s = window.end - now_s
    denied.spends = [(lease, 0)]
    return denied


def _rate_limited(limit: BoundLimit, lease: Lease, asked: int, boot_ms: int) -> Decision:
    assert isinstance(lease, RateShare)
    rate, burst = limit.terms.amount // RATE_SCALE, limit.terms.burst
    what = f"{asked:,} units of {limit.feature} were asked; {rate:,} a second are allowed, {burst:,} at once"
    if asked > burst:
        what += ": so many can never be approved at once."
    elif not rate:
        what += ": none can be approved."
    else:
        saved = lease.level(boot_ms) // TOKENS_EACH
        what += f" after a pause, and {saved:,} are saved up here."
    limited = Decision(Effect.DENIED, Reason.RATE_LIMITED, what, limit.key)
    if asked <= burst and rate:
        wait_ms = lease.wait_ms(asked, boot_ms)
        limited.retry_after_s = 1 if wait_ms is None else wait_ms / 1_000
    limited.spends = [(lease, 0)]
    return limited


def add_cost(decision: Decision) -> None:
    """Adds what the units cost. One currency: the first; ``cost`` is for information, an invoice counts units.

    And which value picked the price of what is priced by an attribute, for the invoice.
    """
    costs: dict[str, int] = {}
    for feature, price, attribute in decision.prices:
        asked = decision.units.get(feature)
        if not asked:
            continue
        value = ""
        if attribute:
            by = decision.context.get(attribute, "")
            value = by if type(by) is str else str(by)
            if value in price.amounts_nanos:
                decision.priced_as = {**decision.priced_as, feature: value}
        if not costs or decision.currency == price.currency:
            nanos = price.cost_nanos(asked, value)
            costs[feature] = nanos if nanos <= AMOUNT_NANOS_MAX else AMOUNT_NANOS_MAX
            decision.currency = price.currency
    if costs:
        total = sum(costs.values())
        decision.cost_nanos = total if total <= AMOUNT_NANOS_MAX else AMOUNT_NANOS_MAX
        if len(costs) > 1:
            decision.feature_costs = costs


def bind_action(tenant: Tenant, bound: BoundAction) -> TenantAction:
    """What a tenant's license, bound to the present bundle, says about an action."""
    license_ = tenant.license
    plan = TenantAction(bound)
    features = tuple(dict.fromkeys(bound.action.meters.values()))
    missing = next((feature for feature in features if feature not in tenant.entitlements), None)
    if missing is not None:
        plan.denial = (Reason.NOT_ENTITLED, f"Plan {license_.plan} does not include {missing}.", "")
    else:
        _bind_flags(plan, license_.tenant)
    if plan.denial is None or plan.denial[0] is Reason.FEATURE_OFF:  # which an override may allow
        granted = [(feature, tenant.entitlements[feature]) for feature in features]
        plan.prices = tuple(
            (feature, entitlement.price, entitlement.price.by.removeprefix("context."))
            for feature, entitlement in granted
            if entitlement.price
        )
        plan.limits = tuple(
            BoundLimit.with_grants(feature, limit, entitlement, license_)
            for feature, entitlement in granted
            for limit in entitlement.limits
            if limit.enforcement is Enforcement.ENFORCE
        )
        plan.shadow_limits = tuple(
            BoundLimit(feature, limit, entitlement, license_)
            for feature, entitlement in granted
            for limit in entitlement.limits
            if limit.enforcement is Enforcement.SHADOW
        )
    return plan


def _bind_flags(plan: TenantAction, tenant: str) -> None:
    """Judges once and for all the flags that depend on nothing but the tenant, and leaves the rest to each check."""
    flags = plan.action.flags
    for position, bound in enumerate(flags):
        flag = bound.flag
        if flag.by != "tenant" or not flag.is_settled:
            plan.open_flags = tuple(
                (one, standing_of(one.flag, tenant) if one.flag.by == "tenant" else None) for one in flags[position:]
            )
            return
        verdict = judge(bound, standing_of(flag, tenant), lambda _: _NOTHING, 0)
        plan.exposures[flag.name] = verdict.served
        if not verdict.is_on:
            plan.denial = (Reason.FEATURE_OFF, denial_message(flag, verdict), flag.name)
            return
        if verdict.variant is not None:
            plan.variants = (*plan.variants, (flag.name, verdict.variant))


def license_problem(license_: License, now_us: int) -> Decision | None:
    """The denial by a license that is not in force; ``None`` when it is."""
    now_s = now_us // 1_000_000
    if license_.status is LicenseStatus.SUSPENDED:
        return Decision(Effect.DENIED, Reason.TENANT_SUSPENDED, f"The license of {license_.tenant} is suspended.")
    if license_.status is LicenseStatus.CANCELED:
        return Decision(Effect.DENIED, Reason.NO_LICENSE, f"The license of {license_.tenant} was canceled.")
    if now_s < license_.starts_s:
        starts = datetime.fromtimestamp(license_.starts_s, UTC).isoformat()
        problem = Decision(Effect.DENIED, Reason.NO_LICENSE, f"The license of {license_.tenant} starts at {starts}.")
        problem.retry_after_s = license_.starts_s - now_s
        return problem
    if license_.ends_s and now_s >= license_.stops_s:
        ended = datetime.fromtimestamp(license_.ends_s, UTC).isoformat()
        return Decision(Effect.DENIED, Reason.LICENSE_EXPIRED, f"The license of {license_.tenant} ended at {ended}.")
    return None


def in_grace(decision: Decision, license_: License) -> None:
    """Marks what a license answers although its term has ended."""
    decision.grace_until_s = license_.stops_s
    if not decision.message:
        ended, stops = (datetime.fromtimestamp(at, UTC).isoformat() for at in (license_.ends_s, license_.stops_s))
        decision.message = f"The license of {license_.tenant} ended at {ended} and answers until {stops}."


def _unknown_action(inquiry: Inquiry) -> Decision:
    return Decision(Effect.DENIED, Reason.UNKNOWN_ACTION, f"No action {inquiry.action} is published.")


def _unavailable(bound: BoundAction, why: str) -> Decision:
    if bound.action.on_unavailable.mode is UnavailableMode.ALLOW:
        decision = Decision(Effect.APPROVED, Reason.DEGRADED_ALLOW, f"{why} The action allows that.")
    else:
        decision = Decision(Effect.DENIED, Reason.DEGRADED_DENY, f"{why} The action denies then.")
    decision.degraded = True
    return decision


def prepare(bound: BoundAction, inquiry: Inquiry) -> None:
    """Reads the inquiry as the action declares it: units by feature, and declared attributes with their defaults.

    Raises:
        InvalidInquiry: the quantities do not fit the action's meters, or an attribute has the wrong type.
    """
    inquiry.units = _feature_units(bound, inquiry)
    inquiry.declared = declared_context(bound.action, inquiry) if bound.action.attributes else _NOTHING
    inquiry.prepared_for = bound


def _feature_units(bound: BoundAction, inquiry: Inquiry) -> dict[str, int]:
    only_meter = bound.only_meter
    if only_meter is not None and not inquiry.quantities:
        quantity = inquiry.quantity
        return {bound.action.meters[only_meter]: 1 if quantity is None else quantity}
    units: dict[str, int] = {}
    for meter, asked in meter_units(bound.action, only_meter, inquiry).items():
        feature = bound.action.meters[meter]
        units[feature] = check_units("quantities", units.get(feature, 0) + asked)
    return units


def scope_of(scope: Sequence[str], inquiry: Inquiry, context: Mapping[str, AttributeValue]) -> str:
    """Digest of the values a scope's paths have in an inquiry."""
    values = []
    for path in scope:
        if path == "subject":
            values.append(subject_value(inquiry.subject_type, inquiry.subject_id))
        else:
            values.append(str(context.get(path[8:], "")))  # "context.<attribute>"
    return scope_digest(tuple(values))


__all__ = ["Decision", "Engine", "InvalidInquiry", "LeaseWait", "LoadWait", "Tenant", "Wait", "add_cost", "prepare"]
