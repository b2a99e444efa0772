"""``/v1/plans`` and ``/v1/tenants/{tenant}/entitlements``: what is sold, and what a tenant has of it.

Made for pages that customers see: titles, units and amounts as they are written, and how much of each limit is left as
far as the control plane knows. What sidecars took in the last second or two may not be counted yet.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request
from pydantic import BaseModel

from licet.domain.catalog import Catalog, Entitlement, License, Limit, Plan
from licet.domain.entitlements import entitlements_of
from licet.domain.money import Price, format_budget, format_nanos
from licet.domain.windows import FOREVER_S, window_of
from licet_control_plane.api.amounts import Amount
from licet_control_plane.api.auth import plane_of, v1_router
from licet_control_plane.api.fields import Count, Currency, Instant, MoneyText, Tenant, Units, said
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_s
from licet_control_plane.changes import LicenseUnknown
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.grants import shown_amount
from licet_control_plane.core.lifecycle import Stage, stage_of
from licet_control_plane.core.suggestion import did_you_mean
from licet_control_plane.publisher.registers import QuotaState
from licet_control_plane.redis_link import RedisRefused, RedisUnavailable
from licet_control_plane.store import licenses

router = v1_router(tag="plans")


class PriceView(BaseModel):
    """``amount`` for every ``per_units``, of the first tier; ``amounts`` by the value of the attribute ``by``."""

    amount: Annotated[MoneyText, said("For every `per_units`, of the first tier")]
    per_units: int = said("For how many units a price is", minimum=1)
    currency: Currency
    by: str = said("The attribute that picks the price; empty for none")
    amounts: dict[str, MoneyText] = said("Prices by the value of that attribute")
    tiered: bool = said("There are further tiers")


class LimitView(BaseModel):
    """A limit: ``amount`` in each ``per``; of a budget, money. ``scope``: what it is counted apart for."""

    limit: str = said("Its key, such as reports:monthly")
    amount: Amount = said("In each `per`: units, or money for a budget")
    per: str = said("second, minute, hour, day, week, month, year or term")
    scope: list[str] = said("What it is counted apart for, such as subject; empty for the tenant")
    on_exceeded: str = said("deny, overage or require_approval")
    anchor: str = said("What windows begin with: calendar (UTC) or license")


class LimitLeft(LimitView):
    """A limit of a tenant. ``used`` and ``remaining`` are ``null`` when they are not known here: of a rate, of a limit
    with a scope, and while Redis does not serve. ``granted``: what grants add now."""

    used: Amount | None = said("Units, or money for a budget; null when it is not known")
    remaining: Amount | None = said("What is left of the limit and its grants; null when it is not known")
    granted: Amount = said("What grants add now")
    resets_at: Instant | None = said("When it counts anew; null for never, and for a rate")


class SoldFeature(BaseModel):
    """What plans and licenses say of a feature. ``seats`` 0: not by seat. ``included``: free units a month."""

    feature: str = said("Its name")
    title: str = said("For people; empty for none")
    unit: str = said("What is counted")
    seats: int = said("How many; 0: not by seat", minimum=0)
    included: Annotated[Units, said("Free in each month")]
    price: PriceView | None = said("Null for none")


class FeatureView(SoldFeature):
    """A feature as a plan sells it."""

    limits: list[LimitView] = said("All of them")


class PlanView(BaseModel):
    """A plan. ``fee`` is owed a month, such as ``49 USD``."""

    plan: str = said("Its name")
    title: str = said("For people; empty for none")
    fee: str | None = said("Owed a month, such as 49 USD; null for none")
    features: list[FeatureView] = said("By name")


class PlanPage(BaseModel):
    """Plans by name. ``next`` is the ``after`` of the next page, ``null`` on the last."""

    items: list[PlanView] = said("By name")
    next: str | None = said("The `after` of the next page; null on the last")


class EntitledFeature(SoldFeature):
    """A feature that a license grants."""

    limits: list[LimitLeft] = said("All of them, with what is left")


class EntitlementsView(BaseModel):
    """What a tenant has. ``in_force``: whether it answers now, in its term or its grace."""

    tenant: Tenant
    plan: str = said("The name of its plan")
    plan_title: str = said("For people; empty for none")
    addons: dict[str, Annotated[Count, said("How often it is held")]] = said("Add-on plans by name")
    stage: Stage = said("Where the license is in its life")
    in_force: bool = said("It answers now")
    starts_at: Instant | None = said("When the term begins; null for always")
    ends_at: Instant | None = said("When the term ends; null for never")
    grace_ends_at: Instant | None = said("When it stops answering; null without grace")
    auto_renew: bool = said("It is renewed by itself")
    as_of: Annotated[Instant, said("When this was so")]
    quotas_known: bool = said("False while Redis does not serve")
    features: list[EntitledFeature] = said("By name")


@router.get("/plans", response_model=PlanPage)
async def list_plans(
    request: Request, after: str = "", limit: Annotated[int, Query(ge=1, le=1_000)] = 100
) -> dict[str, Any]:
    """The plans of the bundle in force, by name."""
    catalog = await plane_of(request).catalogs.current()
    names = sorted(name for name in catalog.plans if name > after)
    items = [_plan(catalog.plans[name], catalog) for name in names[:limit]]
    return {"items": items, "next": names[limit - 1] if len(names) > limit else None}


@router.get("/plans/{plan}", response_model=PlanView)
async def get_plan(request: Request, plan: str) -> dict[str, Any]:
    """One plan of the bundle in force."""
    catalog = await plane_of(request).catalogs.current()
    found = catalog.plans.get(plan)
    if found is None:
        raise Problem(404, f"There is no plan {plan!r}.", did_you_mean(plan, catalog.plans), kind="plan-unknown")
    return _plan(found, catalog)


@router.get("/tenants/{tenant}/entitlements", response_model=EntitlementsView)
async def get_entitlements(request: Request, tenant: str) -> dict[str, Any]:
    """What a tenant may use now, and what is left of it."""
    plane = plane_of(request)
    stored = await plane.database.read(licenses.get, tenant)
    if stored is None:
        raise LicenseUnknown(tenant)
    license_, catalog, now_s = stored.license, await plane.catalogs.current(), plane.now_s()
    granted = entitlements_of(license_, catalog)
    names = _quota_names(license_, granted, int(now_s))
    states, known = await _states(plane, tenant, list(names.values()))
    plan = catalog.plans.get(license_.plan)
    stage = stage_of(license_, now_s)
    return {
        "tenant": tenant,
        "plan": license_.plan,
        "plan_title": plan.title if plan else "",
        "addons": dict(license_.addons),
        "stage": stage,
        "in_force": stage in (Stage.ACTIVE, Stage.GRACE),
        "starts_at": format_s(license_.starts_s or None),
        "ends_at": format_s(license_.ends_s or None),
        "grace_ends_at": format_s(license_.stops_s) if license_.stops_s > license_.ends_s else None,
        "auto_renew": license_.renews_itself,
        "as_of": format_s(now_s),
        "quotas_known": known,
        "features": [
            {
                **_feature(name, entitlement, catalog),
                "limits": [
                    _left(limit, entitlement, license_, names, states if known else None, int(now_s))
                    for limit in entitlement.limits
                ],
            }
            for name, entitlement in sorted(granted.items())
        ],
    }


async def _states(plane: ControlPlane, tenant: str, names: list[str]) -> tuple[dict[str, QuotaState | None], bool]:
    """The registers of quotas by name, and whether they could be read."""
    try:
        states = await plane.registers.read([(tenant, name) for name in names])
    except (RedisUnavailable, RedisRefused):
        return {}, False
    return dict(zip(names, states, strict=True)), True


def _quota_names(license_: License, granted: dict[str, Entitlement], now_s: int) -> dict[str, str]:
    """The name of the quota that counts now, by the key of the limit or grant; of those that have just one."""
    names: dict[str, str] = {}
    for entitlement in granted.values():
        for limit in entitlement.limits:
            if not limit.scope and not limit.is_rate:
                names[limit.key] = f"{limit.key}:{_window(limit, license_, now_s)[0]}"
        for grant in entitlement.grants:
            if grant.starts_s <= now_s < grant.ends_s:
                names[grant.key] = f"{grant.key}:{grant.starts_s}"
    return names


def _window(limit: Limit, license_: License, now_s: int) -> tuple[int, int]:
    return window_of(limit.per, limit.anchor, now_s, starts_s=license_.starts_s, ends_s=license_.stops_s)


def _left(
    limit: Limit,
    entitlement: Entitlement,
    license_: License,
    names: dict[str, str],
    states: dict[str, QuotaState | None] | None,
    now_s: int,
) -> dict[str, Any]:
    grants = [grant for grant in entitlement.grants if grant.limit == limit.key and grant.key in names]
    added = sum(grant.amount for grant in grants)
    used: int | None = None
    if states is not None and limit.key in names:
        pools = (limit.key, *(grant.key for grant in grants))
        used = sum(_used(states[names[key]]) for key in pools)
    end = FOREVER_S if limit.is_rate else _window(limit, license_, now_s)[1]
    return {
        **_limit(limit),
        "used": None if used is None else shown_amount(used, limit.key),
        "remaining": None if used is None else shown_amount(max(0, limit.amount + added - used), limit.key),
        "granted": shown_amount(added, limit.key),
        "resets_at": format_s(end) if end < FOREVER_S else None,
    }


def _used(state: QuotaState | None) -> int:
    """Spent or reserved; what sidecars hold and have not spent is left."""
    return 0 if state is None else state.base + sum(one.used + one.reserved for one in state.registers.values())


def _plan(plan: Plan, catalog: Catalog) -> dict[str, Any]:
    return {
        "plan": plan.name,
        "title": plan.title,
        "fee": format_budget(plan.fee.amount_nanos, plan.fee.currency) if plan.fee else None,
        "features": [
            {**_feature(name, entitlement, catalog), "limits": [_limit(limit) for limit in entitlement.limits]}
            for name, entitlement in sorted(plan.features.items())
        ],
    }


def _feature(name: str, entitlement: Entitlement, catalog: Catalog) -> dict[str, Any]:
    feature = catalog.features.get(name)
    return {
        "feature": name,
        "title": feature.title if feature else "",
        "unit": feature.unit if feature else "unit",
        "seats": entitlement.seats,
        "included": entitlement.included,
        "price": _price(entitlement.price) if entitlement.price else None,
    }


def _limit(limit: Limit) -> dict[str, Any]:
    return {
        "limit": limit.key,
        "amount": shown_amount(limit.amount, limit.key),
        "per": limit.per.value,
        "scope": list(limit.scope),
        "on_exceeded": limit.on_exceeded.value,
        "anchor": limit.anchor.value,
    }


def _price(price: Price) -> dict[str, Any]:
    return {
        "amount": format_nanos(price.amount_nanos),
        "per_units": price.per_units,
        "currency": price.currency,
        "by": price.by,
        "amounts": {value: format_nanos(nanos) for value, nanos in price.amounts_nanos.items()},
        "tiered": price.tiers is not None,
    }
