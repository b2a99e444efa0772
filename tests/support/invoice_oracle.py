"""What a month costs, worked out slowly and in another way: unit by unit and event by event, in fractions.

Shares nothing with ``core.billing`` but the records that say what is sold; reads raw events, not sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from licet.domain.catalog import Entitlement, License, LicenseStatus, Plan
from licet.domain.money import Fee, Price, TierMode
from licet.domain.outcomes import Effect
from licet.domain.windows import Window, window_at
from licet.wire.usage import UsageEvent

MINOR_DIGITS = {"USD": 2, "JPY": 0, "BHD": 3}


@dataclass(frozen=True)
class Change:
    """A license and the plans, published at an instant (microseconds) under a revision."""

    revision: int
    at_us: int
    license: License
    plans: dict[str, Plan]


Owed = list[tuple[str, str, str, str, Fraction]]
"""Kind, name, value, currency and rounded amount of each line, sorted."""


def owed(month: Window, changes: Sequence[Change], events: Sequence[UsageEvent]) -> Owed:
    """Every line of the invoice."""
    lines = [*_fees(month, changes), *_usage(month, changes, events), *_overage(month, changes, events)]
    return sorted(
        (
            kind,
            name,
            value,
            currency,
            Fraction(round(amount * 10 ** MINOR_DIGITS[currency]), 10 ** MINOR_DIGITS[currency]),
        )
        for kind, name, value, currency, amount in lines
    )


def _dollars(nanos: int) -> Fraction:
    return Fraction(nanos, 10**9)


def _entitlement(change: Change, feature: str) -> tuple[Price | None, int]:
    """Price and included units of a feature."""
    own: Entitlement | None = change.plans[change.license.plan].features.get(feature)
    price, included = (own.price, own.included) if own else (None, 0)
    for name in sorted(change.license.addons):
        extra = change.plans[name].features.get(feature)
        if extra is not None and change.license.addons[name]:
            price = price or extra.price
            included += extra.included * change.license.addons[name]
    return price, included


def _fees(month: Window, changes: Sequence[Change]) -> Iterable[tuple[str, str, str, str, Fraction]]:
    edges = {month.start * 10**6, month.end * 10**6, *(change.at_us for change in changes)}
    edges |= {s * 10**6 for change in changes for s in (change.license.starts_s, change.license.ends_s)}
    inside = sorted(edge for edge in edges if month.start * 10**6 <= edge <= month.end * 10**6)
    held: dict[tuple[str, int, Fee], int] = {}
    for begin, end in pairwise(inside):
        known = [change for change in changes if change.at_us <= begin]
        if not known:
            continue
        license_, plans = known[-1].license, known[-1].plans
        in_term = license_.starts_s * 10**6 <= begin and (not license_.ends_s or end <= license_.ends_s * 10**6)
        if license_.status is LicenseStatus.CANCELED or not in_term:
            continue
        for name, count in [(license_.plan, 1), *license_.addons.items()]:
            if (fee := plans[name].fee) and count:
                held[name, count, fee] = held.get((name, count, fee), 0) + end - begin
    for (name, count, fee), time in held.items():
        share = Fraction(time, (month.end - month.start) * 10**6)
        yield "fee", name, "", fee.currency, _dollars(fee.amount_nanos) * count * share


def _usage(
    month: Window, changes: Sequence[Change], events: Sequence[UsageEvent]
) -> Iterable[tuple[str, str, str, str, Fraction]]:
    for feature in sorted({name for event in events for name in event.units}):
        # Units one by one, in the order they are counted: [terms, value], terms being a number that grows with changes.
        units: list[tuple[int, str]] = []
        sold: list[tuple[Price, int]] = []
        for event in sorted(events, key=lambda event: event.revision):
            if event.effect != Effect.APPROVED or not month.start * 10**6 <= event.at_us < month.end * 10**6:
                continue
            known = [change for change in changes if change.revision <= event.revision]
            price, included = _entitlement(known[-1], feature) if known else (None, 0)
            if price is None or not event.units.get(feature):
                continue
            if not sold or sold[-1] != (price, included):
                sold.append((price, included))
            units += [(len(sold) - 1, event.priced_as.get(feature, ""))] * event.units[feature]
        units.sort(key=lambda unit: (unit[0], -_listed(sold[unit[0]][0], unit[1]), unit[1]))
        free = 0
        paid: list[tuple[int, str]] = []
        lines: dict[tuple[int, str], Fraction] = {}
        for unit in units:
            lines.setdefault(unit, Fraction(0))
            if free < sold[unit[0]][1]:
                free += 1
            else:
                paid.append(unit)
        place: dict[str, int] = {}
        for terms, value in paid:
            place[value] = place.get(value, 0) + 1
            total = sum(one == value for _, one in paid)
            lines[terms, value] += _unit(sold[terms][0], value, place[value], total)
        for (terms, value), amount in lines.items():
            yield "usage", feature, value, sold[terms][0].currency, amount


def _listed(price: Price, value: str) -> int:
    first = price.tiers.steps[0] if price.tiers else None
    if first is not None:
        return first.amounts_nanos.get(value, first.amount_nanos)
    return price.amounts_nanos.get(value, price.amount_nanos)


def _unit(price: Price, value: str, place: int, total: int) -> Fraction:
    """What the ``place``-th unit of ``total`` costs, with its part of flat amounts."""
    if price.tiers is None:
        return _dollars(_listed(price, value)) / price.per_units
    volume = price.tiers.mode is TierMode.VOLUME
    floor = 0
    for step in price.tiers.steps:
        if not step.up_to or (total if volume else place) <= step.up_to:
            break
        floor = step.up_to
    each = _dollars(step.amounts_nanos.get(value, step.amount_nanos)) / price.per_units
    if volume:
        return each + _dollars(step.flat_nanos) / total
    return each + (_dollars(step.flat_nanos) if place == floor + 1 else 0)


def _overage(
    month: Window, changes: Sequence[Change], events: Sequence[UsageEvent]
) -> Iterable[tuple[str, str, str, str, Fraction]]:
    taken: dict[str, int] = {}
    for event in events:
        if event.effect == Effect.APPROVED:
            for quota, units in event.spends:
                taken[quota] = taken.get(quota, 0) + units
    lines: dict[tuple[str, int], Fraction] = {}
    prices: list[Price] = []
    for quota, units in taken.items():
        marker, _, start_text = quota.rpartition(":")
        key, start = marker.partition("@")[0], int(start_text)
        found = None
        for change in changes:
            # What has the feature, in the order it is merged: its first gives the limits, the others add to them.
            sold = [(change.plans[change.license.plan], 1)]
            sold += [(change.plans[name], count) for name, count in sorted(change.license.addons.items()) if count]
            having = [
                (plan.features[feature], count)
                for plan, count in sold
                if (feature := key.split(":")[0]) in plan.features
            ]
            for limit in having[0][0].limits if having else ():
                end = window_at(limit.per, start).end
                if limit.key == key and limit.overage_price and change.at_us < end * 10**6:
                    amounts = [
                        other.amount * count for one, count in having for other in one.limits if other.key == key
                    ]
                    found = (sum(amounts), limit.overage_price, end)
        if found is None or not month.start < found[2] <= month.end or units <= found[0]:
            continue
        amount, price, _ = found
        if price not in prices:
            prices.append(price)
        cost = _dollars(price.amount_nanos) * (units - amount) / price.per_units
        index = prices.index(price)
        lines[key, index] = lines.get((key, index), Fraction(0)) + cost
    for (key, index), cost in lines.items():
        yield "overage", key, "", prices[index].currency, cost
