"""Which grants a license can be given, and how amounts are written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest

from licet.domain.catalog import Grant, Limit, budget_key
from licet.domain.entitlements import RATE_MAX
from licet.domain.ids import UNITS_MAX, LimitKey
from licet.domain.money import NANOS
from licet.domain.windows import FOREVER_S, Period
from licet_control_plane.core.grants import (
    KEPT_S,
    LIVE_MAX,
    PRIORITY_MAX,
    GrantAsked,
    amount_of,
    grant_of,
    is_same,
    kept,
    shown_amount,
    state_of,
)
from licet_control_plane.core.refusal import ChangeInvalid

NOW_S: Final = 1_790_000_000
MONTHLY: Final = Limit(LimitKey("reports:month"), 10, Period.MONTH)
BUDGET: Final = Limit(
    budget_key(LimitKey("tokens:month@context.usd"), "USD"), NANOS, Period.MONTH, ("context.usd",), currency="USD"
)
RATE: Final = Limit(LimitKey("calls:second.rate"), 5, Period.SECOND)
LIMITS: Final[dict[str, Limit]] = {limit.key: limit for limit in (MONTHLY, BUDGET, RATE)}
ASKED: Final = GrantAsked("reports:month", 1_000, ends_s=NOW_S + 60)


def granted(asked: GrantAsked, existing: tuple[Grant, ...] = ()) -> Grant:
    return grant_of(asked, LIMITS, existing, id_="made-up", now_s=NOW_S)


def test_a_grant_starts_now_under_a_made_up_name_and_after_the_allowance() -> None:
    assert granted(ASKED) == Grant("made-up", MONTHLY.key, 1_000, NOW_S, NOW_S + 60, 100)


def test_a_grant_is_as_it_was_asked_for() -> None:
    asked = GrantAsked(BUDGET.key, "0.50 USD", "order-17", NOW_S + 10, lasts_s=20, priority=-3)
    assert granted(asked) == Grant("order-17", BUDGET.key, NANOS // 2, NOW_S + 10, NOW_S + 30, -3)


def test_a_grant_may_have_started_already() -> None:
    assert granted(replace(ASKED, starts_s=NOW_S - 60)).starts_s == NOW_S - 60


@pytest.mark.parametrize(
    ("change", "field", "message", "fix"),
    [
        ({"limit": "reports:mont"}, "limit", "no limit 'reports:mont'", "Did you mean 'reports:month'?"),
        ({"limit": RATE.key}, "limit", "'calls:second.rate' is a rate", "Override it"),
        ({"amount": 0}, "amount", "a grant of 0", "more than nothing"),
        ({"amount": -1}, "amount", "an amount of -1", f"0 to {UNITS_MAX}"),
        ({"amount": UNITS_MAX + 1}, "amount", "an amount of", f"0 to {UNITS_MAX}"),
        ({"amount": "5.00 USD"}, "amount", "'reports:month' counts whole units", f"0 to {UNITS_MAX}"),
        ({"limit": BUDGET.key, "amount": 5}, "amount", "5 is not money", "'50.00 USD'"),
        ({"limit": BUDGET.key, "amount": "5.00"}, "amount", "'5.00' is not an amount of money", "'50.00 USD'"),
        ({"limit": BUDGET.key, "amount": "5.00 EUR"}, "amount", "is not in USD", "'50.00 USD'"),
        ({"limit": BUDGET.key, "amount": "0.00 USD"}, "amount", "a grant of 0.00 USD", "more than nothing"),
        ({"limit": BUDGET.key, "amount": "9007199.254740992 USD"}, "amount", "more than 9007199.254740991", "50.00"),
        ({"id": "a b"}, "id", "'a b' cannot name a grant", "letters, digits"),
        ({"id": "a+b"}, "id", "'a+b' cannot name a grant", "letters, digits"),
        ({"id": "x" * 65}, "id", "cannot name a grant", "up to 64"),
        ({"id": "subject"}, "id", "'subject' cannot name a grant", "not 'subject'"),
        ({"priority": PRIORITY_MAX + 1}, "priority", "a priority of 1001", "-1000 to 1000"),
        ({"ends_s": None}, "expires_at", "either at an instant or after a time", "'expires_after_s'"),
        ({"lasts_s": 5}, "expires_at", "either at an instant or after a time", "'expires_after_s'"),
        ({"starts_s": NOW_S + 60}, "expires_at", "ends before it starts", "after it starts"),
        ({"ends_s": None, "lasts_s": 0}, "expires_after_s", "ends before it starts", "after it starts"),
        ({"starts_s": NOW_S - 9, "ends_s": NOW_S}, "expires_at", "has ended already", "in the future"),
        ({"ends_s": FOREVER_S + 1}, "expires_at", "after the year 9998", "sooner"),
    ],
)
def test_refuses_what_cannot_be_granted(change: dict[str, Any], field: str, message: str, fix: str) -> None:
    with pytest.raises(ChangeInvalid) as caught:
        granted(replace(ASKED, **change))
    assert caught.value.field == field
    assert message in str(caught.value)
    assert fix in caught.value.fix


def test_a_license_has_a_bounded_number_of_grants_that_have_not_ended() -> None:
    live = tuple(granted(replace(ASKED, id=f"g{number}")) for number in range(LIVE_MAX))
    with pytest.raises(ChangeInvalid, match="64 grants that have not ended"):
        granted(ASKED, live)
    assert granted(ASKED, (*live[1:], replace(live[0], ends_s=NOW_S)))


def test_asking_again_for_what_was_granted_is_the_same() -> None:
    grant = granted(replace(ASKED, id="g"))
    assert is_same(grant, replace(ASKED, id="g"))
    assert is_same(grant, replace(ASKED, id="g", starts_s=NOW_S))
    assert is_same(grant, replace(ASKED, id="g", ends_s=None, lasts_s=60))
    money = granted(GrantAsked(BUDGET.key, "5 USD", "m", ends_s=NOW_S + 60))
    assert is_same(money, GrantAsked(BUDGET.key, "5.00 USD", "m", ends_s=NOW_S + 60))


@pytest.mark.parametrize(
    "change",
    [
        {"limit": "reports:day"},
        {"amount": 999},
        {"amount": "1000.00 USD"},
        {"starts_s": NOW_S - 1},
        {"ends_s": NOW_S + 61},
        {"ends_s": None, "lasts_s": 59},
        {"priority": 99},
    ],
)
def test_asking_for_something_else_under_the_same_name_is_not_the_same(change: dict[str, Any]) -> None:
    assert not is_same(granted(ASKED), replace(ASKED, **change))


def test_money_in_another_currency_or_none_is_not_the_same() -> None:
    money = granted(GrantAsked(BUDGET.key, "5.00 USD", "m", ends_s=NOW_S + 60))
    for amount in ("5.00 EUR", "5.00", 5 * NANOS):
        assert not is_same(money, GrantAsked(BUDGET.key, amount, "m", ends_s=NOW_S + 60))


def test_a_grant_is_kept_for_thirty_days_after_its_end() -> None:
    grant = granted(ASKED)
    assert kept((grant,), grant.ends_s + KEPT_S - 1) == (grant,)
    assert kept((grant,), grant.ends_s + KEPT_S) == ()


def test_a_grant_says_whether_it_can_be_used() -> None:
    grant = Grant("g", MONTHLY.key, 1, 100, 200)
    assert [state_of(grant, now_s) for now_s in (99, 100, 199.9, 200)] == ["scheduled", "live", "live", "expired"]


@pytest.mark.parametrize(("limit", "written"), [(MONTHLY, 0), (MONTHLY, UNITS_MAX), (BUDGET, "0.25 USD"), (RATE, 7)])
def test_an_amount_is_shown_as_it_is_written(limit: Limit, written: int | str) -> None:
    assert shown_amount(amount_of(written, limit, "overrides"), limit.key) == written


def test_a_rate_is_at_most_what_can_be_shared_out() -> None:
    assert amount_of(RATE_MAX, RATE, "overrides") == RATE_MAX
    with pytest.raises(ChangeInvalid, match="whole units"):
        amount_of(RATE_MAX + 1, RATE, "overrides")
