"""What a license grants: its plan, its add-ons and its overrides, merged into one entitlement for each feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from licet.domain.catalog import Catalog, Entitlement, Grant, License, Limit, seats_key
from licet.domain.ids import UNITS_MAX, LimitKey

RATE_SCALE: Final = 1_000
"""Shares of a rate are counted in thousandths of a unit a second: four sidecars can share one a second."""

RATE_MAX: Final = UNITS_MAX // RATE_SCALE
"""Most units a second, so that their thousandths are counted exactly."""


def entitlements_of(license_: License, catalog: Catalog) -> dict[str, Entitlement]:
    """Entitlements by feature. A plan the catalog does not have grants nothing.

    The plan's price and scope win; an add-on adds its amount, ``count`` times, to the limit of the same key, its seats
    to the seats, and its included units to the included ones. A feature that the plan grants without limits stays
    without. Overrides replace amounts last. Grants of a limit that is not there wait until it is.
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
    if license_.grants:
        merged = {feature: _topped_up(entitlement, license_.grants) for feature, entitlement in merged.items()}
    return merged


def limits_of(entitlements: Mapping[str, Entitlement]) -> dict[LimitKey, int]:
    """Amount of every limit, grant and number of seats by key: what is published to the tenant's mark in Redis.

    A rate is published in thousandths of a unit a second, because it is shared out among sidecars.
    """
    amounts: dict[LimitKey, int] = {}
    for feature, entitlement in entitlements.items():
        for limit in entitlement.limits:
            amounts[limit.key] = limit.amount * RATE_SCALE if limit.is_rate else limit.amount
        for grant in entitlement.grants:
            amounts[grant.key] = grant.amount
        if entitlement.seats:
            amounts[seats_key(feature)] = entitlement.seats
    return amounts


def _multiplied(entitlement: Entitlement, count: int) -> Entitlement:
    limits = tuple(_with_amount(limit, limit.amount * count) for limit in entitlement.limits)
    return replace(
        entitlement,
        limits=limits,
        seats=min(UNITS_MAX, entitlement.seats * count),
        included=min(UNITS_MAX, entitlement.included * count),
    )


def _added(own: Entitlement, extra: Entitlement) -> Entitlement:
    extra_amounts = {limit.key: limit.amount for limit in extra.limits}
    limits = tuple(_with_amount(limit, limit.amount + extra_amounts.get(limit.key, 0)) for limit in own.limits)
    return replace(
        own,
        limits=limits,
        seats=min(UNITS_MAX, own.seats + extra.seats),
        # A plan without seats has no heartbeat, and seats without one would never be reclaimed.
        heartbeat_s=own.heartbeat_s or extra.heartbeat_s,
        price=own.price or extra.price,
        included=min(UNITS_MAX, own.included + extra.included),
    )


def _overridden(entitlement: Entitlement, overrides: Mapping[str, int]) -> Entitlement:
    limits = tuple(_with_amount(limit, overrides.get(limit.key, limit.amount)) for limit in entitlement.limits)
    return replace(entitlement, limits=limits)


def _with_amount(limit: Limit, amount: int) -> Limit:
    """The limit with another amount, at most what can be counted."""
    return replace(limit, amount=min(RATE_MAX if limit.is_rate else UNITS_MAX, amount))


def _topped_up(entitlement: Entitlement, grants: Sequence[Grant]) -> Entitlement:
    keys = {limit.key for limit in entitlement.limits}
    mine = sorted(
        (grant for grant in grants if grant.limit in keys),
        key=lambda grant: (grant.priority, grant.ends_s, grant.id),
    )
    return replace(entitlement, grants=tuple(mine)) if mine else entitlement
