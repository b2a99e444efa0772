"""An invoice: what a tenant owes for one calendar month (UTC), from fees, billed units and overage. Pure.

What holds when a plan, a price or the license changes within the month:
- units are priced by the revision each event was decided under, which names both the license and the plans;
- units of a month are counted on through such changes, in the order of the revisions: tiers and included units do not
  begin anew, and each unit pays what its place in the month costs under the terms it was decided under;
- fees are owed for the time they were held, to the microsecond.

Amounts are exact fractions of nanos until the end of a line, and rounded there once, half to even, to the smallest
unit of the currency.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final, NamedTuple

from licet.domain.catalog import Catalog, Enforcement, Entitlement, License, LicenseStatus, Limit
from licet.domain.entitlements import entitlements_of
from licet.domain.money import NANOS, Fee, Price, TierMode, Tiers, divide_half_even, minor_digits
from licet.domain.windows import Period, Window, window_of
from licet_control_plane.core.accounting import window_start_of

_US: Final = 1_000_000
OVERAGE_WINDOW_S_MAX: Final = 366 * 86_400
"""The longest window whose overage has a price: a year."""


class Ratio(NamedTuple):
    """An exact amount of nanos: ``numerator / denominator``, the denominator positive."""

    numerator: int
    denominator: int

    def plus(self, other: Ratio) -> Ratio:
        """The exact sum."""
        if self.denominator == other.denominator:
            return Ratio(self.numerator + other.numerator, self.denominator)
        return Ratio(
            self.numerator * other.denominator + other.numerator * self.denominator,
            self.denominator * other.denominator,
        )


NOTHING: Final = Ratio(0, 1)
WHOLE: Final = Ratio(1, 1)


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds from a revision on: ``license`` (``None`` before the first) under ``catalog``, which need hold only
    the plans that the license names. ``at_us``: when it was published.
    """

    revision: int
    at_us: int
    license: License | None
    catalog: Catalog

    def entitlements(self) -> Mapping[str, Entitlement]:
        """By feature; a license that does not stand grants nothing."""
        return entitlements_of(self.license, self.catalog) if self.license else {}


class Billed(NamedTuple):
    """Units of a feature that were decided under one revision; see ``store.schema.billed``."""

    feature: str
    priced_as: str
    revision: int
    units: int


class WindowSpend(NamedTuple):
    """What was taken from one quota, over all sidecars: ``limit`` is its key, ``start`` that of its window."""

    limit: str
    start: int
    units: int


@dataclass(frozen=True, slots=True)
class Charge:
    """A part of a line: ``units`` at ``amount_nanos`` for every ``per_units``, and ``flat_nanos`` once."""

    units: int
    amount_nanos: int
    flat_nanos: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """One line. ``kind``: ``fee``, ``usage`` or ``overage``; ``name``: the plan, the feature or the limit's key.

    ``units`` were used, ``included`` of them cost nothing. ``exact`` is the amount in nanos before it was rounded to
    ``amount_nanos``. For a fee, ``units`` is how many times the plan is held, and ``share`` for how much of the month.
    """

    kind: str
    name: str
    currency: str
    exact: Ratio
    units: int = 0
    included: int = 0
    priced_as: str = ""
    per_units: int = 1
    tiers: str = ""
    charges: tuple[Charge, ...] = ()
    share: Ratio = WHOLE
    revision: int = 0
    """The first revision of those that these terms held under."""

    @property
    def amount_nanos(self) -> int:
        """Rounded to the smallest unit of the currency, half to even."""
        minor_nanos: int = NANOS // 10 ** minor_digits(self.currency)
        return divide_half_even(self.exact.numerator, self.exact.denominator * minor_nanos) * minor_nanos


@dataclass(frozen=True, slots=True)
class Invoice:
    """``unpriced``: approved units by feature that no price was known for. ``totals``: nanos by currency."""

    tenant: str
    month: Window
    lines: tuple[Line, ...]
    unpriced: Mapping[str, int]

    @property
    def totals(self) -> dict[str, int]:
        """The sums of the lines as they are rounded."""
        totals: dict[str, int] = {}
        for line in self.lines:
            totals[line.currency] = totals.get(line.currency, 0) + line.amount_nanos
        return dict(sorted(totals.items()))


def invoice(
    tenant: str, month: Window, terms: Sequence[Terms], billed: Iterable[Billed], spends: Iterable[WindowSpend]
) -> Invoice:
    """The invoice of a month.

    Args:
        terms: by revision, ascending, from those in force when the month and the oldest window of ``spends`` began and
            when the oldest of ``billed`` was decided.
        billed: of the month.
        spends: of every quota whose window ends in the month, at least of limits with a price of overage.
    """
    usage, unpriced = _usage(terms, billed)
    lines = (*_fees(month, terms), *usage, *_overage(month, terms, spends))
    return Invoice(tenant, month, lines, unpriced)


# Fees


def _fees(month: Window, terms: Sequence[Terms]) -> Iterator[Line]:
    """A line for each fee, and each number of times it was held."""
    held: dict[tuple[int, str, int, Fee], int] = {}
    for one, begin_us, end_us in _in_force(month, terms):
        license_ = one.license
        if license_ is None or license_.status is LicenseStatus.CANCELED:
            continue
        begin_us = max(begin_us, license_.starts_s * _US)
        # Held through its grace, too: it answers, and a renewal within it leaves no gap.
        end_us = min(end_us, license_.stops_s * _US) if license_.ends_s else end_us
        if begin_us >= end_us:
            continue
        addons = [(1, name, count) for name, count in sorted(license_.addons.items()) if count > 0]
        for order, name, count in [(0, license_.plan, 1), *addons]:
            plan = one.catalog.plans.get(name)
            if plan and plan.fee:
                key = (order, name, count, plan.fee)
                held[key] = held.get(key, 0) + end_us - begin_us
    month_us = (month.end - month.start) * _US
    for (_, name, count, fee), time_us in sorted(held.items(), key=lambda item: item[0][:3]):
        exact = Ratio(fee.amount_nanos * count * time_us, month_us)
        charge = Charge(count, fee.amount_nanos)
        share = Ratio(time_us, month_us)
        yield Line("fee", name, fee.currency, exact, units=count, charges=(charge,), share=share)


def _in_force(month: Window, terms: Sequence[Terms]) -> Iterator[tuple[Terms, int, int]]:
    """Terms, and from when to when of the month they held, in microseconds. The last hold to the month's end."""
    ends_us = [*(one.at_us for one in terms[1:]), month.end * _US]
    for one, end_us in zip(terms, ends_us, strict=True):
        begin_us, end_us = max(one.at_us, month.start * _US), min(end_us, month.end * _US)
        if begin_us < end_us:
            yield one, begin_us, end_us


# Usage


@dataclass(frozen=True, slots=True)
class _Segment:
    """Units of a feature, by the value that picked their price, under the same price and included units."""

    price: Price
    included: int
    revision: int
    units: Mapping[str, int]


def _usage(terms: Sequence[Terms], billed: Iterable[Billed]) -> tuple[list[Line], dict[str, int]]:
    lines: list[Line] = []
    unpriced: dict[str, int] = {}
    rows = sorted(billed, key=lambda row: (row.feature, row.revision))
    by_revision = _entitlements_by_revision(terms, {row.revision for row in rows})
    for feature, of_feature in groupby(rows, key=lambda row: row.feature):
        segments: list[_Segment] = []
        for row in of_feature:
            entitlement = by_revision[row.revision].get(feature)
            if entitlement is None or entitlement.price is None:
                unpriced[feature] = unpriced.get(feature, 0) + row.units
                continue
            last = segments[-1] if segments else None
            if last is None or (last.price, last.included) != (entitlement.price, entitlement.included):
                segments.append(last := _Segment(entitlement.price, entitlement.included, row.revision, {}))
            units = {**last.units, row.priced_as: last.units.get(row.priced_as, 0) + row.units}
            segments[-1] = replace(last, units=units)
        lines += _priced(feature, segments)
    return lines, unpriced


def _entitlements_by_revision(terms: Sequence[Terms], revisions: Iterable[int]) -> dict[int, Mapping[str, Entitlement]]:
    """What the tenant was entitled to under each revision; nothing, before the first terms."""
    starts = [one.revision for one in terms]
    known: dict[int, Mapping[str, Entitlement]] = {0: {}}
    found: dict[int, Mapping[str, Entitlement]] = {}
    for revision in revisions:
        position = bisect_right(starts, revision)
        if position not in known:
            known[position] = terms[position - 1].entitlements()
        found[revision] = known[position]
    return found


def _priced(feature: str, segments: Sequence[_Segment]) -> Iterator[Line]:
    """A line for each segment and value."""
    shares = list(_billable(segments))
    totals: dict[str, int] = {}
    for _, value, _, billable in shares:
        totals[value] = totals.get(value, 0) + billable
    reached: dict[str, int] = {}
    for segment, value, units, billable in shares:
        price = segment.price
        before = reached.get(value, 0)
        reached[value] = before + billable
        if price.tiers is None:
            amount_nanos = price.amounts_nanos.get(value, price.amount_nanos)
            charges: tuple[Charge, ...] = (Charge(billable, amount_nanos),) if billable else ()
            exact = Ratio(billable * amount_nanos, price.per_units)
        elif price.tiers.mode is TierMode.GRADUATED:
            charges = tuple(_graduated(price.tiers, value, before, before + billable))
            exact = Ratio(
                sum(one.units * one.amount_nanos + one.flat_nanos * price.per_units for one in charges),
                price.per_units,
            )
        else:
            charges, exact = _volume(price, price.tiers, value, billable, totals[value])
        yield Line(
            "usage",
            feature,
            price.currency,
            exact,
            units=units,
            included=units - billable,
            priced_as=value,
            per_units=price.per_units,
            tiers=price.tiers.mode.value if price.tiers else "",
            charges=charges,
            revision=segment.revision,
        )


def _billable(segments: Sequence[_Segment]) -> Iterator[tuple[_Segment, str, int, int]]:
    """Segment, value, units, and those of them that are not included.

    Included units are of the feature as a whole; among units with different prices the dearest are taken first.
    """
    included = 0
    for segment in segments:
        price = segment.price
        dearest_first = sorted(
            (-price.amounts_nanos.get(value, price.amount_nanos), value, units)
            for value, units in segment.units.items()
        )
        for _, value, units in dearest_first:
            free = min(units, max(0, segment.included - included))
            included += free
            yield segment, value, units, units - free


def _graduated(tiers: Tiers, value: str, before: int, after: int) -> Iterator[Charge]:
    """What units ``before + 1`` to ``after`` of the month cost, by step."""
    floor = 0
    for step in tiers.steps:
        units = max(0, (min(after, step.up_to) if step.up_to else after) - max(before, floor))
        if units:
            yield Charge(
                units, step.amounts_nanos.get(value, step.amount_nanos), step.flat_nanos if before <= floor else 0
            )
        floor = step.up_to


def _volume(price: Price, tiers: Tiers, value: str, units: int, total: int) -> tuple[tuple[Charge, ...], Ratio]:
    """What ``units`` of the month's ``total`` cost; of the flat amount, as large a part as they are of the total."""
    if not units:
        return (), NOTHING
    step = next(step for step in tiers.steps if not step.up_to or total <= step.up_to)
    amount_nanos = step.amounts_nanos.get(value, step.amount_nanos)
    exact = Ratio(units * amount_nanos, price.per_units).plus(Ratio(units * step.flat_nanos, total))
    return (Charge(units, amount_nanos, step.flat_nanos),), exact


# Overage


def _overage(month: Window, terms: Sequence[Terms], spends: Iterable[WindowSpend]) -> Iterator[Line]:
    """A line for each limit and price. The overage of a window is billed in the month that the window ends in."""
    sums: dict[tuple[str, int, int, str], int] = {}
    limits = [(one, _priced_limits(one)) for one in terms]
    keys = {key for _, priced in limits for key in priced}
    for spend in spends:
        if spend.limit not in keys:
            continue
        limit, end = _limit_of_window(spend, limits)
        if (
            limit is None
            or limit.overage_price is None
            or limit.enforcement is not Enforcement.ENFORCE
            or not month.start < end <= month.end
        ):
            continue
        if (over := spend.units - limit.amount) > 0:
            price = limit.overage_price
            key = (spend.limit, price.amount_nanos, price.per_units, price.currency)
            sums[key] = sums.get(key, 0) + over
    for (name, amount_nanos, per_units, currency), units in sorted(sums.items()):
        exact = Ratio(units * amount_nanos, per_units)
        charges = (Charge(units, amount_nanos),)
        yield Line("overage", name, currency, exact, units=units, per_units=per_units, charges=charges)


def priced_limits(terms: Sequence[Terms]) -> dict[str, Limit]:
    """Every limit whose overage has a price, by key; as it was last."""
    return {key: limit for one in terms for key, limit in _priced_limits(one).items()}


def _priced_limits(terms: Terms) -> dict[str, Limit]:
    return {
        limit.key: limit
        for entitlement in terms.entitlements().values()
        for limit in entitlement.limits
        if limit.overage_price
    }


def _limit_of_window(
    spend: WindowSpend, limits: Sequence[tuple[Terms, Mapping[str, Limit]]]
) -> tuple[Limit | None, int]:
    """The limit as it was last while the window was open, and when the window ended."""
    found: Limit | None = None
    end = 0
    for one, priced in limits:
        limit = priced.get(spend.limit)
        if limit is None or one.license is None:
            continue
        try:
            window = window_of(
                limit.per, limit.anchor, spend.start, starts_s=one.license.starts_s, ends_s=one.license.stops_s
            )
        except ValueError:
            continue
        # Another start: that of the license, and with it the windows, were moved.
        if window.start == spend.start and one.at_us < window.end * _US:
            found, end = limit, window.end
    return found, end


def window_spends(rows: Iterable[tuple[str, str, int]]) -> list[WindowSpend]:
    """From limit key, quota and units of each sidecar, the sum of each quota."""
    sums: dict[tuple[str, str], int] = {}
    for limit, quota, units in rows:
        sums[limit, quota] = sums.get((limit, quota), 0) + units
    return [WindowSpend(limit, window_start_of(quota), units) for (limit, quota), units in sorted(sums.items())]


def longest_window_s(limits: Iterable[Limit]) -> int:
    """A bound on how long windows of these limits are."""
    return max((_WINDOW_S_MAX.get(limit.per, OVERAGE_WINDOW_S_MAX) for limit in limits), default=0)


_WINDOW_S_MAX: Final = {
    Period.MINUTE: 60,
    Period.HOUR: 3_600,
    Period.DAY: 86_400,
    Period.WEEK: 7 * 86_400,
    Period.MONTH: 31 * 86_400,
}

__all__ = ["Billed", "Charge", "Invoice", "Line", "Ratio", "Terms", "WindowSpend", "invoice"]
