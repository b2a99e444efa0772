"""The decision: license and its term → action → entitlement → flags → roles → policies → quotas, all or none.

One plain synchronous function over in-memory state. It reads no clock, does no I/O and takes nothing: it answers with
a ``Decision`` whose spends the caller takes once the event is logged, or with a ``Wait`` that says what is missing.
Owned by one event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from licet.domain.catalog import (
    AttributeValue,
    Entitlement,
    License,
    LicenseStatus,
    Limit,
    UnavailableMode,
)
from licet.domain.entitlements import entitlements_of
from licet.domain.money import AMOUNT_NANOS_MAX, Price
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Period, Window, window_at
from licet.wire.names import scope_digest
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry, check_units, declared_context, meter_units
from licet_sidecar.core.leases import Lease, LeaseBook, TenantLeases
from licet_sidecar.core.rulebook import BoundAction, Rulebook, rollout_includes
from licet_sidecar.core.rules import rule_on

ABSENT_MS: Final = 30_000
"""How long "this tenant has no license" is believed without asking again; the change stream ends it sooner."""
ABSENT_TENANTS_MAX: Final = 10_000
BOUND_ACTIONS_MAX: Final = 1_000
"""Actions remembered for each tenant; more than any catalog has, against callers that invent names."""


_NEVER_US: Final = 2**63
_APPROVED: Final = Effect.APPROVED
_OK: Final = Reason.OK
_NOTHING: Final[dict[str, Any]] = {}


class Decision:
    """What was decided. ``units`` are the units asked, by feature; ``spends`` what is to be taken from which lease.

    ``effect`` and ``reason`` are the real decision; ``observed`` says that the caller is answered APPROVED anyway.
    """

    __slots__ = (
        "context",
        "cost_nanos",
        "currency",
        "degraded",
        "effect",
        "feature_costs",
        "message",
        "observed",
        "reason",
        "retry_after_s",
        "rule",
        "shadow",
        "spends",
        "stale",
        "units",
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
        self.spends: list[tuple[Lease, int]] = []
        self.shadow: Sequence[str] = ()
        self.retry_after_s = 0
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


Wait = LoadWait | LeaseWait


class BoundLimit:
    """A limit of one of the action's features."""

    __slots__ = ("amount", "feature", "key", "per", "scope")

    def __init__(self, feature: str, limit: Limit) -> None:
        self.feature = feature
        self.key = limit.key
        self.amount = limit.amount
        self.per = limit.per
        self.scope = limit.scope


class TenantAction:
    """What the tenant's license says about one action: a denial, or its prices and limits."""

    __slots__ = ("action", "denial", "limits", "prices", "subject_flags")

    def __init__(self, action: BoundAction, denial: tuple[Reason, str, str] | None) -> None:
        self.action = action
        self.denial = denial
        self.prices: tuple[tuple[str, Price, str], ...] = ()
        """Feature, price, and the attribute that picks the amount (empty for none)."""
        self.limits: tuple[BoundLimit, ...] = ()
        self.subject_flags = tuple(flag for flag in action.flags if flag.by == "subject")


class Tenant:
    """A loaded license, and what follows from it under the present bundle."""

    __slots__ = (
        "_from_us",
        "_until_us",
        "actions",
        "document",
        "entitlements",
        "generation",
        "held",
        "license",
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
        self._from_us = license_.starts_s * 1_000_000 if license_.status is LicenseStatus.ACTIVE else _NEVER_US
        self._until_us = license_.ends_s * 1_000_000 or _NEVER_US

    def in_term(self, now_us: int) -> bool:
        """Whether the license is active and its term covers the instant."""
        return self._from_us <= now_us < self._until_us


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
        self._staleness_us_max = staleness_us_max
        self._absent_until_ms: OrderedDict[str, int] = OrderedDict()
        self._windows: dict[Period, Window] = {}

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

    def install_absence(self, tenant: str, boot_ms: int) -> None:
        """Remembers for a while that the tenant has no license."""
        self.tenants.pop(tenant, None)
        self._absent_until_ms[tenant] = boot_ms + ABSENT_MS
        self._absent_until_ms.move_to_end(tenant)
        if len(self._absent_until_ms) > ABSENT_TENANTS_MAX:
            self._absent_until_ms.popitem(last=False)

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
        if tenant is None:
            decision = self._without_license(rulebook, inquiry, boot_ms, patient)
        else:
            self.tenants.move_to_end(inquiry.tenant)
            decision = self._with_license(rulebook, tenant, inquiry, now_us, boot_ms, patient, stale)
        if type(decision) is Decision:
            decision.stale = stale
            if rulebook.observe and decision.effect is not _APPROVED:
                decision.observed = True
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
        absent_until_ms = self._absent_until_ms.get(inquiry.tenant)
        if absent_until_ms is not None and boot_ms < absent_until_ms:
            return Decision(Effect.DENIED, Reason.NO_LICENSE, f"Tenant {inquiry.tenant} has no license.")
        if patient:
            return LoadWait(inquiry.tenant)
        bound = rulebook.action(inquiry.action)
        if bound is None:
            return _unknown_action(inquiry)
        decision = _unavailable(bound, "The tenant's license could not be read.")
        prepare(bound, inquiry)
        decision.units, decision.context = inquiry.units, inquiry.declared
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
    ) -> Decision | Wait:
        if tenant.rulebook is not rulebook:
            tenant.rulebook = rulebook
            tenant.entitlements = entitlements_of(tenant.license, rulebook.catalog)
            tenant.actions = {}
        plan = tenant.actions.get(inquiry.action)
        if plan is None:
            bound = rulebook.action(inquiry.action)
            if bound is None:
                return _license_problem(tenant.license, now_us) or _unknown_action(inquiry)
            plan = _bind_action(tenant, bound)
            if len(tenant.actions) < BOUND_ACTIONS_MAX:
                tenant.actions[inquiry.action] = plan
        bound = plan.action
        if inquiry.prepared_for is not bound:
            prepare(bound, inquiry)
        units, context = inquiry.units, inquiry.declared

        decision = None if tenant.in_term(now_us) else _license_problem(tenant.license, now_us)
        if decision is None and stale and bound.action.on_unavailable.mode is UnavailableMode.DENY:
            decision = Decision(
                Effect.DENIED,
                Reason.STALE_POLICY,
                "What this sidecar knows has not been confirmed for longer than its staleness_max.",
            )
        if decision is None and plan.denial is not None:
            reason, message, rule = plan.denial
            decision = Decision(Effect.DENIED, reason, message, rule)
        shadow: Sequence[str] = ()
        if decision is None and (plan.subject_flags or bound.roles is not None):
            decision = self._subject_denial(plan, inquiry)
        if decision is None and bound.rules:
            ruling = rule_on(bound, tenant.license, inquiry, now_us)
            shadow = ruling.shadow
            if ruling.effect is not None:
                decision = Decision(ruling.effect, ruling.reason, ruling.message, ruling.rule)
        if decision is None and inquiry.access_only:
            decision = Decision(_APPROVED, _OK)
        if decision is None:
            settled = self._quotas(plan, tenant, inquiry, units, context, now_us, boot_ms, patient)
            if type(settled) is not Decision:
                return settled
            decision = settled
        decision.units = units
        decision.context = context
        decision.shadow = shadow
        if plan.prices and decision.effect is _APPROVED:  # what was not allowed costs nothing
            _price(decision, plan)
        return decision

    @staticmethod
    def _subject_denial(plan: TenantAction, inquiry: Inquiry) -> Decision | None:
        for flag in plan.subject_flags:
            if not rollout_includes(flag, inquiry.subject_id):
                return Decision(
                    Effect.DENIED, Reason.FEATURE_OFF, f"{flag.feature} is not rolled out to this subject.", flag.name
                )
        roles = plan.action.roles
        if roles is not None and roles.isdisjoint(inquiry.roles):
            needed = ", ".join(sorted(roles))
            return Decision(Effect.DENIED, Reason.ROLE_REQUIRED, f"{inquiry.action} needs one of the roles {needed}.")
        return None

    def _quotas(
        self,
        plan: TenantAction,
        tenant: Tenant,
        inquiry: Inquiry,
        units: Mapping[str, int],
        context: Mapping[str, AttributeValue],
        now_us: int,
        boot_ms: int,
        patient: bool,
    ) -> Decision | Wait:
        decision = Decision(_APPROVED, _OK)
        if not plan.limits:
            return decision
        held = tenant.held
        if held is None or self.leases.tenants.get(inquiry.tenant) is not held:
            held = tenant.held = self.leases.of(inquiry.tenant)
        now_s = now_us // 1_000_000
        needs: list[tuple[Lease, int]] | None = None
        windows, leases, spends = self._windows, held.leases, decision.spends
        for limit in plan.limits:
            asked = units.get(limit.feature, 0)
            window = windows.get(limit.per)
            if window is None or not window[0] <= now_s < window[1]:
                window = windows[limit.per] = window_at(limit.per, now_s)
            scope = _scope_of(limit.scope, inquiry, context) if limit.scope else ""
            lease = leases.get((limit.key, scope))
            if lease is None or lease.start != window[0]:
                lease = self.leases.lease(held, limit.key, scope, window[0], window[1], limit.amount)
            else:
                lease.amount = limit.amount
            spends.append((lease, asked))
            if lease.used + lease.reserved + asked > lease.cap or boot_ms >= lease.hold_until_ms:
                if asked == 0:
                    continue
                if self.leases.known_short(lease, asked, boot_ms) or asked > limit.amount:
                    denial = Decision(
                        Effect.DENIED,
                        Reason.QUOTA_EXHAUSTED,
                        f"{asked:,} units of {limit.feature} were asked; the limit of {limit.amount:,}"
                        f" per {limit.per} has {lease.remaining + max(0, lease.free):,} left.",
                        limit.key,
                    )
                    denial.retry_after_s = window[1] - now_s
                    denial.spends = [(lease, 0)]
                    return denial
                needs = needs or []
                needs.append((lease, asked))
        if needs is None:
            return decision
        if patient:
            return LeaseWait(inquiry.tenant, tuple(needs))
        return _unavailable(plan.action, "No lease could be had for a limit of this action.")


def _price(decision: Decision, plan: TenantAction) -> None:
    """Adds what the units cost. One currency: the first; ``cost`` is for information, an invoice counts units."""
    costs: dict[str, int] = {}
    for feature, price, attribute in plan.prices:
        asked = decision.units.get(feature)
        if asked and (not costs or decision.currency == price.currency):
            by = decision.context.get(attribute, "") if attribute else ""
            nanos = price.cost_nanos(asked, by if type(by) is str else str(by))
            costs[feature] = nanos if nanos <= AMOUNT_NANOS_MAX else AMOUNT_NANOS_MAX
            decision.currency = price.currency
    if costs:
        total = sum(costs.values())
        decision.cost_nanos = total if total <= AMOUNT_NANOS_MAX else AMOUNT_NANOS_MAX
        if len(costs) > 1:
            decision.feature_costs = costs


def _bind_action(tenant: Tenant, bound: BoundAction) -> TenantAction:
    license_ = tenant.license
    features = tuple(dict.fromkeys(bound.action.meters.values()))
    denial: tuple[Reason, str, str] | None = None
    for feature in features:
        if feature not in tenant.entitlements:
            denial = (Reason.NOT_ENTITLED, f"Plan {license_.plan} does not include {feature}.", "")
            break
    else:
        for flag in bound.flags:
            if flag.by == "tenant" and not rollout_includes(flag, license_.tenant):
                denial = (Reason.FEATURE_OFF, f"{flag.feature} is not rolled out to this tenant.", flag.name)
                break
    plan = TenantAction(bound, denial)
    if denial is None:
        granted = [(feature, tenant.entitlements[feature]) for feature in features]
        plan.prices = tuple(
            (feature, entitlement.price, entitlement.price.by.removeprefix("context."))
            for feature, entitlement in granted
            if entitlement.price
        )
        plan.limits = tuple(
            BoundLimit(feature, limit) for feature, entitlement in granted for limit in entitlement.limits
        )
    return plan


def _license_problem(license_: License, now_us: int) -> Decision | None:
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
    if license_.ends_s and now_s >= license_.ends_s:
        ended = datetime.fromtimestamp(license_.ends_s, UTC).isoformat()
        return Decision(Effect.DENIED, Reason.LICENSE_EXPIRED, f"The license of {license_.tenant} ended at {ended}.")
    return None


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


def _scope_of(scope: Sequence[str], inquiry: Inquiry, context: Mapping[str, AttributeValue]) -> str:
    values = []
    for path in scope:
        if path == "subject":
            values.append(f"{inquiry.subject_type}/{inquiry.subject_id}")
        else:
            values.append(str(context.get(path[8:], "")))  # "context.<attribute>"
    return scope_digest(tuple(values))


__all__ = ["Decision", "Engine", "InvalidInquiry", "LeaseWait", "LoadWait", "Tenant", "Wait", "prepare"]
