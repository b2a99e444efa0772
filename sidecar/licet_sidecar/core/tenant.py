"""A license as a sidecar decides by it: what it says under the present bundle of each action, and its limits. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from licet.domain.approvals import RequestEntry
from licet.domain.catalog import (
    AttributeValue,
    Enforcement,
    Entitlement,
    Grant,
    License,
    LicenseStatus,
    Limit,
    OnExceeded,
)
from licet.domain.entitlements import RATE_SCALE
from licet.domain.outcomes import Reason
from licet.domain.windows import Period, Window, window_of
from licet.wire.names import scope_digest, subject_value
from licet_sidecar.core.access_requests import NO_REQUESTS, TenantRequests, key_for
from licet_sidecar.core.decision import Decision, Prices, Variants
from licet_sidecar.core.flags import BoundFlag, Standing, denial_message, judge, standing_of
from licet_sidecar.core.inquiry import Inquiry, check_units, declared_context, meter_units
from licet_sidecar.core.lease import Kind, Lease, Terms
from licet_sidecar.core.leases import TenantLeases
from licet_sidecar.core.rulebook import BoundAction, Rulebook

_NEVER_US: Final = 2**63

_NOTHING: Final[dict[str, Any]] = {}


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
