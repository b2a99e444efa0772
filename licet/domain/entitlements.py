"""What a license grants: its plan, its add-ons and its overrides, merged into one entitlement for each feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from licet.domain.catalog import Catalog, Entitlement, License, Limit
from licet.domain.ids import UNITS_MAX, LimitKey


def entitlements_of(license_: License, catalog: Catalog) -> dict[str, Entitlement]:
    """Entitlements by feature. A plan the catalog does not have grants nothing.

    The plan's price and scope win; an add-on adds its amount, ``count`` times, to the limit of the same key, and its
    seats to the seats. A feature that the plan grants without limits stays without. Overrides replace amounts last.
    """
    plan = catalog.plans.get(license_.plan)
    merged: dict[str, Entitlement] = dict(plan.features) if plan else {}
    for addon_name, count in sorted(license_.addons.items()):
        addon = catalog.plans.get(addon_name)
        if addon is None or count < 1:
            continue
        for feature, entitlement in addon.features.items():
            times = _multiplied(entitlement, count)
            merged[feature] = _added(merged[feature], times) if feature in merged else times
    if license_.overrides:
        merged = {feature: _overridden(entitlement, license_.overrides) for feature, entitlement in merged.items()}
    return merged


def limits_of(entitlements: Mapping[str, Entitlement]) -> dict[LimitKey, int]:
    """Amount of every limit by key: what the control plane publishes to the tenant's mark in Redis."""
    return {limit.key: limit.amount for entitlement in entitlements.values() for limit in entitlement.limits}


def _multiplied(entitlement: Entitlement, count: int) -> Entitlement:
    limits = tuple(replace(limit, amount=min(UNITS_MAX, limit.amount * count)) for limit in entitlement.limits)
    return replace(entitlement, limits=limits, seats=entitlement.seats * count)


def _added(own: Entitlement, extra: Entitlement) -> Entitlement:
    extra_amounts = {limit.key: limit.amount for limit in extra.limits}
    limits = tuple(
        replace(limit, amount=min(UNITS_MAX, limit.amount + extra_amounts.get(limit.key, 0))) for limit in own.limits
    )
    return replace(
        own,
        limits=limits,
        seats=own.seats + extra.seats,
        # A plan without seats has no heartbeat, and seats without one would never be reclaimed.
        heartbeat_s=own.heartbeat_s or extra.heartbeat_s,
        price=own.price or extra.price,
    )


def _overridden(entitlement: Entitlement, overrides: Mapping[str, int]) -> Entitlement:
    limits: tuple[Limit, ...] = tuple(
        replace(limit, amount=overrides.get(limit.key, limit.amount)) for limit in entitlement.limits
    )
    return replace(entitlement, limits=limits)
