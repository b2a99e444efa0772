"""Invoices against an oracle that goes unit by unit, and what a reader of an invoice would work out by hand."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest

from licet.domain.catalog import Catalog, Entitlement, License, LicenseStatus, Limit, OnExceeded, Plan
from licet.domain.ids import LimitKey
from licet.domain.money import NANOS, Fee, Price, Step, TierMode, Tiers, minor_digits
from licet.domain.outcomes import Effect
from licet.domain.windows import Anchor, Period, Window, window_at
from licet.wire.usage import FLAG_OBSERVED, UsageEvent
from licet_control_plane.core.accounting import Account
from licet_control_plane.core.billing import Billed, Invoice, Terms, WindowSpend, invoice, window_spends
from tests.support.invoice_oracle import MINOR_DIGITS, Change, owed
from tests.support.usage import event

MONTH = window_at(Period.MONTH, 1_790_812_800)  # October 2026
HALF_CENT = 5_000_000
VALUES = ("", "large", "small")
CASES = 1_200


def invoiced(month: Window, changes: list[Change], events: list[UsageEvent]) -> Invoice:
    """The invoice of events, through the sums that the ledger keeps."""
    account = Account()
    account.add("s", events)
    billed = [
        Billed(feature, priced_as, revision, units)
        for (_, start, feature, priced_as, revision), (_, _, units, _) in account.billed.items()
        if start == month.start
    ]
    spends = window_spends(
        (quota.rpartition(":")[0].partition("@")[0], quota, units - account.observed.get((tenant, quota, sidecar), 0))
        for (tenant, quota, sidecar), units in account.spend.items()
    )
    terms = [Terms(one.revision, one.at_us, one.license, Catalog(plans=one.plans)) for one in changes]
    return invoice("acme", month, terms, billed, spends)


def lines_of(made: Invoice) -> list[tuple[str, str, str, str, Fraction]]:
    return sorted(
        (line.kind, line.name, line.priced_as, line.currency, Fraction(line.amount_nanos, NANOS)) for line in made.lines
    )


# Against the oracle


def some_price(rng: random.Random, currency: str) -> Price:
    def amount() -> int:
        return rng.choice((0, 1, rng.randrange(1, 8) * HALF_CENT, rng.randrange(10**9), 10**11))

    def amounts() -> dict[str, int]:
        return {value: amount() for value in VALUES[1:] if rng.random() < 0.7}

    by = rng.choice(("", "context.model"))
    listed = amounts() if by else {}
    tiers = None
    if rng.random() < 0.7:
        ends = sorted(rng.sample(range(1, 20), rng.randrange(4)))
        steps = [Step(end, amount(), rng.choice((0, 0, amount())), amounts() if by else {}) for end in (*ends, 0)]
        tiers = Tiers(rng.choice(tuple(TierMode)), tuple(steps))
        values = {value for step in steps for value in step.amounts_nanos}
        listed = {value: steps[0].amounts_nanos.get(value, steps[0].amount_nanos) for value in values}
    first = tiers.steps[0].amount_nanos if tiers else amount()
    return Price(first, rng.choice((1, 1, 3, 7, 1_000)), currency, by, listed, tiers)


def some_plans(rng: random.Random, currency: str) -> dict[str, Plan]:
    def fee() -> Fee | None:
        return rng.choice((None, Fee(rng.randrange(1, 100) * NANOS + rng.randrange(NANOS), currency)))

    def limits(feature: str) -> tuple[Limit, ...]:
        price = Price(rng.randrange(1, 9) * HALF_CENT, rng.choice((1, 3)), currency)
        per = rng.choice((Period.DAY, Period.WEEK, Period.MONTH))
        key = LimitKey(f"{feature}:{per.value}")
        return (Limit(key, rng.randrange(12), per, on_exceeded=OnExceeded.OVERAGE, overage_price=price),)

    def features(*, addon: bool) -> dict[str, Entitlement]:
        return {
            name: Entitlement(
                price=some_price(rng, currency) if rng.random() < (0.3 if addon else 0.8) else None,
                limits=limits(name),
                included=rng.choice((0, rng.randrange(15))),
            )
            for name in ("reports", "tokens")
            if rng.random() < 0.8
        }

    names = (("pro", False), ("basic", False), ("pack", True), ("boost", True))
    return {name: Plan(name, features(addon=addon), fee=fee()) for name, addon in names}


def some_changes(rng: random.Random) -> list[Change]:
    changes: list[Change] = []
    plans: dict[str, Plan] = {}
    at_us, revision = MONTH.start * 10**6 - rng.randrange(20) * 86_400 * 10**6, 0
    currency = rng.choice(tuple(MINOR_DIGITS))
    for number in range(rng.randrange(1, 5)):
        revision += rng.randrange(1, 3)
        if not number or rng.random() < 0.5:
            plans = some_plans(rng, currency)
        license_ = License(
            "acme",
            rng.choice(("pro", "pro", "basic")),
            rng.choice((LicenseStatus.ACTIVE, LicenseStatus.ACTIVE, LicenseStatus.SUSPENDED, LicenseStatus.CANCELED)),
            starts_s=rng.choice((0, MONTH.start + rng.randrange(10**6))),
            ends_s=rng.choice((0, MONTH.end - rng.randrange(10**6))),
            addons={name: rng.randrange(4) for name in ("pack", "boost") if rng.random() < 0.6},
        )
        changes.append(Change(revision, at_us, license_, plans))
        at_us += rng.randrange(1, 15 * 86_400 * 10**6)
    return changes


def some_events(rng: random.Random, changes: list[Change]) -> list[UsageEvent]:
    events = []
    for seq in range(1, rng.randrange(2, 14)):
        at_s = rng.randrange(MONTH.start - 9 * 86_400, MONTH.end + 86_400)
        units = {name: rng.randrange(9) for name in ("reports", "tokens") if rng.random() < 0.7}
        events.append(
            event(
                seq,
                at_us=at_s * 10**6 + rng.randrange(10**6),
                effect=rng.choice((Effect.APPROVED, Effect.APPROVED, Effect.APPROVED, Effect.DENIED)).value,
                flags=rng.choice((0, FLAG_OBSERVED)),  # an observed denial takes units, and none of them is owed
                revision=rng.randrange(changes[-1].revision + 2),
                units=units,
                priced_as={name: value for name in units if (value := rng.choice(VALUES))},
                spends=[
                    (f"{name}:{per.value}:{window_at(per, at_s).start}", count)
                    for name, count in units.items()
                    for per in (Period.DAY, Period.WEEK, Period.MONTH)
                ],
            )
        )
    return events


@pytest.mark.parametrize("first", range(0, CASES, 100))
def test_an_invoice_is_what_an_oracle_works_out_unit_by_unit(first: int) -> None:
    kinds: set[str] = set()
    for seed in range(first, first + 100):
        rng = random.Random(seed)
        changes = some_changes(rng)
        events = some_events(rng, changes)
        made = invoiced(MONTH, changes, events)
        assert lines_of(made) == owed(MONTH, changes, events), f"seed {seed}"
        kinds |= {line.kind for line in made.lines}
        kinds |= {line.tiers for line in made.lines}
    assert kinds == {"fee", "usage", "overage", "", "graduated", "volume"}


# By hand


def usage(price: Price, *units: int, included: int = 0, values: tuple[str, ...] = ("",)) -> list[tuple[int, str]]:
    """Billable units and amount of the lines of one month: ``units`` of each of ``values``."""
    plan = Plan("pro", {"reports": Entitlement(price, included=included)})
    terms = [Terms(1, 0, License("acme", "pro"), Catalog(plans={"pro": plan}))]
    billed = [Billed("reports", value, 1, count) for value, count in zip(values, units, strict=True)]
    return [
        (line.units - line.included, str(Fraction(line.amount_nanos, NANOS)))
        for line in invoice("acme", MONTH, terms, billed, []).lines
    ]


def tiered(mode: TierMode, *steps: Step, per_units: int = 1) -> Price:
    return Price(steps[0].amount_nanos, per_units, "USD", tiers=Tiers(mode, steps))


CENTS = NANOS // 100
STEPS = (Step(100, 10 * CENTS), Step(200, 8 * CENTS, flat_nanos=5 * NANOS), Step(0, 5 * CENTS))


@pytest.mark.parametrize(
    ("units", "amount"), [(100, "10"), (101, "377/25"), (150, "19"), (200, "23"), (201, "461/20"), (1_000, "63")]
)
def test_graduated_units_each_cost_what_their_step_says(units: int, amount: str) -> None:
    # 150 units: 100 at 0.10, 50 at 0.08, and 5.00 for having got beyond 100.
    assert usage(tiered(TierMode.GRADUATED, *STEPS), units) == [(units, amount)]


@pytest.mark.parametrize(("units", "amount"), [(100, "10"), (101, "327/25"), (200, "21"), (201, "201/20")])
def test_volume_units_all_cost_what_the_total_says(units: int, amount: str) -> None:
    # 101 units: all at 0.08, and 5.00.
    assert usage(tiered(TierMode.VOLUME, *STEPS), units) == [(units, amount)]


def test_included_units_come_off_before_tiers_and_off_the_dearest_first() -> None:
    assert usage(tiered(TierMode.GRADUATED, *STEPS), 150, included=50) == [(100, "10")]
    by_model = Price(10 * CENTS, 1, "USD", "context.model", {"large": 20 * CENTS})
    assert usage(by_model, 30, 40, included=50, values=("", "large")) == [(0, "0"), (20, "2")]


@pytest.mark.parametrize(
    ("currency", "thousandths", "amount"),
    [
        ("USD", 5, "0"),
        ("USD", 15, "1/50"),
        ("USD", 25, "1/50"),
        ("JPY", 500, "0"),
        ("JPY", 1_500, "2"),
        ("BHD", 5, "1/200"),
    ],
)
def test_a_line_is_rounded_half_to_even_to_the_smallest_unit_of_its_currency(
    currency: str, thousandths: int, amount: str
) -> None:
    assert usage(Price(NANOS // 1_000, 1, currency), thousandths) == [(thousandths, amount)]


def test_units_are_summed_before_they_are_rounded() -> None:
    third = Price(NANOS, 3, "USD")
    assert usage(third, 3_000_000) == [(3_000_000, "1000000")]
    assert third.cost_nanos(1) * 3_000_000 != 1_000_000 * NANOS


def test_units_keep_their_place_in_the_month_when_the_price_changes() -> None:
    def plans(amount_nanos: int) -> Catalog:
        price = tiered(TierMode.GRADUATED, Step(100, 10 * CENTS), Step(0, amount_nanos))
        return Catalog(plans={"pro": Plan("pro", {"reports": Entitlement(price)})})

    license_ = License("acme", "pro")
    terms = [Terms(1, 0, license_, plans(8 * CENTS)), Terms(5, 1, license_, plans(4 * CENTS))]
    billed = [Billed("reports", "", 1, 90), Billed("reports", "", 4, 20), Billed("reports", "", 5, 10)]
    lines = invoice("acme", MONTH, terms, billed, []).lines
    # 110 units at the first price: 100 and 10 beyond. The last ten lie beyond 100 too.
    assert [(line.revision, line.units, line.amount_nanos) for line in lines] == [
        (1, 110, 1_080 * CENTS),
        (5, 10, 40 * CENTS),
    ]


def test_units_without_a_known_price_are_named_and_not_billed() -> None:
    catalog = Catalog(plans={"pro": Plan("pro", {"reports": Entitlement(), "tokens": Entitlement(Price(1, 1, "USD"))})})
    terms = [Terms(3, 0, License("acme", "pro"), catalog)]
    billed = [Billed("reports", "", 3, 5), Billed("tokens", "", 2, 7), Billed("gone", "", 4, 1)]
    made = invoice("acme", MONTH, terms, billed, [])
    assert (made.lines, made.unpriced, made.totals) == ((), {"reports": 5, "tokens": 7, "gone": 1}, {})


def test_a_fee_is_owed_for_the_time_it_was_held() -> None:
    def plans(fee: int) -> Catalog:
        return Catalog(
            plans={"pro": Plan("pro", {}, fee=Fee(fee * NANOS, "USD")), "pack": Plan("pack", {}, fee=Fee(NANOS, "USD"))}
        )

    days = 86_400 * 10**6
    start_us = MONTH.start * 10**6
    terms = [
        Terms(1, 0, License("acme", "pro"), plans(31)),
        Terms(2, start_us + 10 * days, License("acme", "pro", addons={"pack": 3}), plans(31)),
        Terms(3, start_us + 21 * days, License("acme", "pro", addons={"pack": 3}), plans(62)),
    ]
    lines = invoice("acme", MONTH, terms, [], []).lines
    assert [(line.name, line.units, line.share.numerator // days, line.amount_nanos) for line in lines] == [
        ("pro", 1, 21, 21 * NANOS),
        ("pro", 1, 10, 20 * NANOS),
        ("pack", 3, 21, 203 * CENTS),  # 3 x 21/31
    ]


def overage_limit(amount: int, **changes: Any) -> Limit:
    price = Price(10 * CENTS, 1, "USD")
    fields: dict[str, Any] = {"on_exceeded": OnExceeded.OVERAGE, "overage_price": price}
    return Limit(LimitKey("reports:month"), amount, Period.MONTH, **{**fields, **changes})


def overage(terms: list[Terms], *spends: WindowSpend, month: Window = MONTH) -> list[int]:
    return [line.units for line in invoice("acme", month, terms, [], spends).lines]


def limited(revision: int, at_us: int, limit: Limit, **license_: Any) -> Terms:
    plan = Plan("pro", {"reports": Entitlement(limits=(limit,))})
    return Terms(revision, at_us, License("acme", "pro", **license_), Catalog(plans={"pro": plan}))


def test_overage_is_what_a_window_took_beyond_its_limit_however_events_were_marked() -> None:
    terms = [limited(1, 0, overage_limit(100))]
    spends = [WindowSpend("reports:month", MONTH.start, 130), WindowSpend("reports:month", MONTH.start, 90)]
    assert overage(terms, *spends) == [30]
    assert overage(terms, WindowSpend("reports:other", MONTH.start, 130)) == []


def test_a_window_that_spans_two_months_is_billed_where_it_ends() -> None:
    starts_s = MONTH.start + 14 * 86_400
    terms = [limited(1, 0, overage_limit(100, anchor=Anchor.LICENSE), starts_s=starts_s)]
    spend = WindowSpend("reports:month", starts_s, 130)
    following = window_at(Period.MONTH, MONTH.end)
    assert overage(terms, spend) == []
    assert overage(terms, spend, month=following) == [30]


def test_the_limit_of_a_window_is_the_last_one_it_had() -> None:
    later_us = MONTH.end * 10**6
    raised = limited(2, later_us - 1, overage_limit(120))
    after = limited(3, later_us, overage_limit(5))
    spend = WindowSpend("reports:month", MONTH.start, 130)
    assert overage([limited(1, 0, overage_limit(100)), raised, after], spend) == [10]
    gone = Terms(2, later_us - 1, License("acme", "free"), Catalog(plans={"free": Plan("free", {})}))
    assert overage([limited(1, 0, overage_limit(100)), gone], spend) == [30]


def test_the_oracle_knows_the_same_currencies() -> None:
    assert {currency: minor_digits(currency) for currency in MINOR_DIGITS} == MINOR_DIGITS
