"""What a license grants once plan, add-ons and overrides are put together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.catalog import Catalog, Entitlement, Grant, License, Limit, Plan, seats_key
from licet.domain.entitlements import RATE_MAX, RATE_SCALE, entitlements_of, limits_of
from licet.domain.ids import UNITS_MAX, LimitKey
from licet.domain.money import Price
from licet.domain.windows import Period

MONTHLY = LimitKey("tokens:month")
DAILY = LimitKey("tokens:day")
SEATS = seats_key("editor")
PRICE = Price(1, 1, "USD")
OTHER_PRICE = Price(2, 1, "USD")


def monthly(amount: int) -> Limit:
    return Limit(MONTHLY, amount, Period.MONTH)


CATALOG = Catalog.of(
    [
        Plan(
            "pro",
            {
                "tokens": Entitlement(PRICE, (monthly(1_000), Limit(DAILY, 100, Period.DAY))),
                "reports": Entitlement(),
            },
        ),
        Plan(
            "pack",
            {"tokens": Entitlement(OTHER_PRICE, (monthly(500),)), "editor": Entitlement(seats=3, heartbeat_s=60)},
        ),
        Plan("metered-reports", {"reports": Entitlement(limits=(Limit(LimitKey("reports:month"), 5, Period.MONTH),))}),
        Plan("seats-for-reports", {"reports": Entitlement(seats=2, heartbeat_s=30)}),
    ]
)


def test_a_license_grants_the_features_of_its_plan() -> None:
    assert entitlements_of(License("acme", "pro"), CATALOG) == CATALOG.plans["pro"].features


def test_a_plan_that_is_not_there_grants_nothing() -> None:
    assert entitlements_of(License("acme", "gone", addons={"gone-too": 1}), CATALOG) == {}


def test_an_addon_adds_its_amount_to_the_limit_of_the_same_key_only() -> None:
    granted = entitlements_of(License("acme", "pro", addons={"pack": 2}), CATALOG)
    assert limits_of(granted) == {MONTHLY: 2_000, DAILY: 100, SEATS: 6}


def test_included_units_are_added_as_often_as_an_addon_is_held() -> None:
    plans = [
        Plan("pro", {"tokens": Entitlement(PRICE, included=100)}),
        Plan("pack", {"tokens": Entitlement(included=10), "reports": Entitlement(OTHER_PRICE, included=3)}),
    ]
    granted = entitlements_of(License("acme", "pro", addons={"pack": 4}), Catalog.of(plans))
    assert granted == {
        "tokens": Entitlement(PRICE, included=140),
        "reports": Entitlement(OTHER_PRICE, included=12),
    }


def test_an_addon_brings_features_the_plan_lacks_as_many_times_as_bought() -> None:
    granted = entitlements_of(License("acme", "pro", addons={"pack": 2}), CATALOG)
    assert granted["editor"] == Entitlement(seats=6, heartbeat_s=60)


def test_the_price_of_the_plan_wins() -> None:
    assert entitlements_of(License("acme", "pro", addons={"pack": 1}), CATALOG)["tokens"].price == PRICE


def test_a_feature_without_limits_stays_without() -> None:
    assert entitlements_of(License("acme", "pro", addons={"metered-reports": 1}), CATALOG)["reports"].limits == ()


def test_seats_that_an_addon_brings_come_with_its_heartbeat() -> None:
    reports = entitlements_of(License("acme", "pro", addons={"seats-for-reports": 1}), CATALOG)["reports"]
    assert (reports.seats, reports.heartbeat_s) == (2, 30)


def test_an_addon_bought_no_times_adds_nothing() -> None:
    assert entitlements_of(License("acme", "pro", addons={"pack": 0}), CATALOG) == CATALOG.plans["pro"].features


def test_an_override_replaces_the_amount_that_plan_and_addons_came_to() -> None:
    license_ = License("acme", "pro", addons={"pack": 2}, overrides={MONTHLY: 7, "elsewhere:month": 9})
    assert limits_of(entitlements_of(license_, CATALOG)) == {MONTHLY: 7, DAILY: 100, SEATS: 6}


def grant(name: str, limit: LimitKey = MONTHLY, *, priority: int = 100, ends_s: int = 200) -> Grant:
    return Grant(name, limit, 50, 100, ends_s, priority)


def test_grants_are_used_by_priority_then_by_their_end() -> None:
    grants = (
        grant("late", ends_s=300),
        grant("b"),
        grant("a"),
        grant("first", priority=-1),
        grant("last", priority=101),
    )
    granted = entitlements_of(License("acme", "pro", grants=grants), CATALOG)
    assert [one.id for one in granted["tokens"].grants] == ["first", "a", "b", "late", "last"]
    assert granted["reports"].grants == ()


def test_a_grant_is_published_beside_its_limit_and_never_added_to_it() -> None:
    license_ = License("acme", "pro", overrides={DAILY: 7}, grants=(grant("g"), grant("h", DAILY)))
    assert limits_of(entitlements_of(license_, CATALOG)) == {
        MONTHLY: 1_000,
        DAILY: 7,
        LimitKey("tokens:month+g"): 50,
        LimitKey("tokens:day+h"): 50,
    }


def test_a_grant_of_a_limit_that_is_not_there_waits_until_it_is() -> None:
    waiting = (grant("w", LimitKey("reports:month")),)
    assert entitlements_of(License("acme", "pro", grants=waiting), CATALOG) == CATALOG.plans["pro"].features
    with_limit = License("acme", "metered-reports", grants=waiting)
    assert entitlements_of(with_limit, CATALOG)["reports"].grants == waiting


def test_a_rate_is_published_in_thousandths_with_addons_and_overrides_in_units() -> None:
    rate = Limit(LimitKey("calls:second.rate"), 3, Period.SECOND, burst=10)
    catalog = Catalog.of([Plan("fast", {"calls": Entitlement(limits=(rate,))})])
    assert limits_of(entitlements_of(License("acme", "fast"), catalog)) == {rate.key: 3 * RATE_SCALE}
    more = License("acme", "fast", addons={"fast": 2})
    assert limits_of(entitlements_of(more, catalog)) == {rate.key: 9 * RATE_SCALE}
    other = License("acme", "fast", overrides={rate.key: 5})
    assert limits_of(entitlements_of(other, catalog)) == {rate.key: 5 * RATE_SCALE}


@pytest.mark.parametrize("count", [1, 2])
def test_a_rate_never_exceeds_what_can_be_shared_out(count: int) -> None:
    rate = Limit(LimitKey("calls:second.rate"), RATE_MAX - 1, Period.SECOND)
    catalog = Catalog.of([Plan("fast", {"calls": Entitlement(limits=(rate,))}), Plan("own", {"calls": Entitlement()})])
    for plan in ("fast", "own"):
        granted = entitlements_of(License("acme", plan, addons={"fast": count}), catalog)
        for limit in granted["calls"].limits:
            assert limit.amount == RATE_MAX
        assert all(amount <= UNITS_MAX for amount in limits_of(granted).values())


def test_a_feature_without_seats_publishes_no_number_of_them() -> None:
    assert limits_of(entitlements_of(License("acme", "metered-reports"), CATALOG)) == {LimitKey("reports:month"): 5}


@given(
    st.integers(min_value=0, max_value=UNITS_MAX), st.integers(min_value=0, max_value=UNITS_MAX), st.integers(1, 10**9)
)
def test_amounts_never_exceed_what_redis_counts_exactly(own: int, extra: int, count: int) -> None:
    catalog = Catalog.of(
        [
            Plan("own", {"tokens": Entitlement(limits=(monthly(own),))}),
            Plan("extra", {"tokens": Entitlement(limits=(monthly(extra),))}),
        ]
    )
    granted = limits_of(entitlements_of(License("acme", "own", addons={"extra": count}), catalog))
    assert granted[MONTHLY] == min(UNITS_MAX, own + min(UNITS_MAX, extra * count))
