"""Money is exact: what is written is what is billed, to the billionth."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.money import (
    AMOUNT_NANOS_MAX,
    BUDGET_NANOS_MAX,
    NANOS,
    Price,
    divide_half_even,
    format_budget,
    format_minor,
    format_nanos,
    parse_budget,
    parse_nanos,
)


@given(st.integers(min_value=0, max_value=AMOUNT_NANOS_MAX))
def test_an_amount_survives_being_written(amount_nanos: int) -> None:
    assert parse_nanos(format_nanos(amount_nanos)) == amount_nanos


@pytest.mark.parametrize(
    ("text", "amount_nanos"),
    [("8.00", 8 * NANOS), ("8", 8 * NANOS), ("0.000000001", 1), ("0.60", 600_000_000), ("007.10", 7_100_000_000)],
)
def test_reads_plain_decimals(text: str, amount_nanos: int) -> None:
    assert parse_nanos(text) == amount_nanos


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0.0000000001", "nine decimal places"),
        ("1.0000000000000000000000000000001", "nine decimal places"),
        ("9223372036.854775808", "too large"),
        ("99999999999", "too large"),
        *(
            (text, "not a plain")
            for text in ("", "-1", "+1", " 1", "1e3", "1_000", "1,5", ".5", "5.", "NaN", "Infinity", "٣")
        ),
    ],
)
def test_refuses_what_it_cannot_keep_exactly(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_nanos(text)


@pytest.mark.parametrize(("amount_nanos", "text"), [(0, "0.00"), (-500_000_000, "-0.50"), (12_000, "0.000012")])
def test_writes_the_shortest_exact_decimal(amount_nanos: int, text: str) -> None:
    assert format_nanos(amount_nanos) == text


@given(st.integers(min_value=-(2**70), max_value=2**70), st.integers(min_value=1, max_value=2**53))
def test_divides_to_the_nearest_and_ties_to_even(numerator: int, denominator: int) -> None:
    assert divide_half_even(numerator, denominator) == round(Fraction(numerator, denominator))


def test_a_listed_value_has_its_own_price_and_every_other_the_default() -> None:
    price = Price(8 * NANOS, 1_000_000, "USD", "context.model", {"small": 600_000_000})
    assert price.cost_nanos(1_000_000, "small") == 600_000_000
    assert price.cost_nanos(1_000_000, "unheard-of") == 8 * NANOS
    assert price.cost_nanos(500_000) == 4 * NANOS


@given(st.integers(min_value=0, max_value=BUDGET_NANOS_MAX), st.sampled_from(["USD", "EUR"]))
def test_a_budget_survives_being_written(amount_nanos: int, currency: str) -> None:
    assert parse_budget(format_budget(amount_nanos, currency)) == (amount_nanos, currency)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("9007199.254740992 USD", "more than 9007199.254740991"),
        ("-1 USD", "not a plain"),
        ("1e3 USD", "not a plain"),
        *((text, "not an amount of money") for text in ("", "5", "USD", "5 usd", "5USD", "5 USDT", "USD 5", "5 USD 5")),
    ],
)
def test_refuses_what_is_no_budget(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_budget(text)


@pytest.mark.parametrize(
    ("amount_nanos", "currency", "text"),
    [
        (12_300_000_000, "USD", "12.30"),
        (0, "USD", "0.00"),
        (500 * NANOS, "JPY", "500"),
        (1_234_000_000, "BHD", "1.234"),
        (-10_000_000, "USD", "-0.01"),
    ],
)
def test_writes_an_invoiced_amount_with_the_places_of_its_currency(amount_nanos: int, currency: str, text: str) -> None:
    assert format_minor(amount_nanos, currency) == text
