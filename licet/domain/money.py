"""Money as exact integers: billionths ("nanos") of a currency unit, so that no float ever touches a bill."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from licet.domain.ids import UNITS_MAX

NANOS: Final = 1_000_000_000
AMOUNT_NANOS_MAX: Final = 2**63 - 1
BUDGET_NANOS_MAX: Final = UNITS_MAX
"""Largest budget, 9,007,199.254740991: it is counted as units are, in nanos."""

_MONEY: Final = re.compile(r"(\S+) +([A-Z]{3})")
_DECIMAL: Final = re.compile(r"[0-9]+(\.[0-9]+)?")
_NANOS_DIGITS: Final = 9
_WHOLE_DIGITS_MAX: Final = 10  # AMOUNT_NANOS_MAX is 9_223_372_036 and a fraction


_MINOR_DIGITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI", "VND"), 0),
    **dict.fromkeys(("VUV", "XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(("CLF", "UYW"), 4),
}
"""Decimal places of the currencies that have not two. Source: ISO 4217, list one."""


class TierMode(StrEnum):
    """How the steps of a tiered price are read."""

    GRADUATED = "graduated"
    """Each unit costs what the step it falls into says."""
    VOLUME = "volume"
    """Every unit costs what the step that the month's total falls into says."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a tiered price: units up to and with the ``up_to``-th of the month; 0 for the last, without an end.

    ``amount_nanos`` for every ``per_units`` units of the price; ``amounts_nanos`` by value of its attribute.
    ``flat_nanos`` is owed once for a month that reaches the step.
    """

    up_to: int
    amount_nanos: int
    flat_nanos: int = 0
    amounts_nanos: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tiers:
    """Steps in ascending order; only the last has no end."""

    mode: TierMode
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Fee:
    """A fixed amount a month, whatever is used."""

    amount_nanos: int
    currency: str


@dataclass(frozen=True, slots=True)
class Price:
    """What units of a feature cost: ``amount_nanos`` of ``currency`` for every ``per_units`` units.

    ``by`` names the attribute (``context.model``) whose value picks the amount from ``amounts_nanos``; a value that
    is not listed pays ``amount_nanos``. With ``tiers`` these are the amounts of the first step: a single decision does
    not know how many units the month has, so what it shows, and what a budget is charged, goes by that step.
    """

    amount_nanos: int
    per_units: int
    currency: str
    by: str = ""
    amounts_nanos: Mapping[str, int] = field(default_factory=dict)
    tiers: Tiers | None = None

    def cost_nanos(self, units: int, by_value: str = "") -> int:
        """Cost of ``units`` in nanos of ``currency``, rounded half to even.

        For information: an invoice is computed from summed units, never by adding rounded costs.
        """
        amount_nanos = self.amounts_nanos.get(by_value, self.amount_nanos)
        return divide_half_even(units * amount_nanos, self.per_units)

    def charge_nanos(self, units: int, by_value: str = "") -> int:
        """What ``units`` take from a budget: their cost in nanos, rounded up, so that a sum of charges is never less
        than the exact cost of the units together.
        """
        amount_nanos = self.amounts_nanos.get(by_value, self.amount_nanos)
        return -(-units * amount_nanos // self.per_units)


def minor_digits(currency: str) -> int:
    """Decimal places of the smallest unit that an invoice in ``currency`` is written in: 2 for USD, 0 for JPY."""
    return _MINOR_DIGITS.get(currency, 2)


def divide_half_even(numerator: int, denominator: int) -> int:
    """``numerator / denominator`` for a positive denominator, rounded half to even, exactly."""
    quotient, rest = divmod(numerator, denominator)
    doubled = 2 * rest
    if doubled > denominator or (doubled == denominator and quotient & 1):
        return quotient + 1
    return quotient


def parse_nanos(text: str) -> int:
    """Nanos of a decimal such as ``"8.00"``.

    Raises:
        ValueError: not a plain decimal, negative, finer than a billionth, or too large.
    """
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"{text!r} is not a plain, non-negative decimal number such as '8.00'")
    whole, _, fraction = text.partition(".")
    # In digits, not with Decimal, whose context would round a long fraction before it could be refused.
    if len(fraction.rstrip("0")) > _NANOS_DIGITS:
        raise ValueError(f"{text!r} has more than nine decimal places")
    if len(whole.lstrip("0")) > _WHOLE_DIGITS_MAX:
        raise ValueError(f"{text!r} is too large")
    nanos = int(whole) * NANOS + int(fraction[:_NANOS_DIGITS].ljust(_NANOS_DIGITS, "0"))
    if nanos > AMOUNT_NANOS_MAX:
        raise ValueError(f"{text!r} is too large")
    return nanos


def parse_budget(text: str) -> tuple[int, str]:
    """Nanos and currency of a budget such as ``"500.00 USD"``.

    Raises:
        ValueError: it has another form, or is more than ``BUDGET_NANOS_MAX``.
    """
    nanos, currency = parse_money(text)
    if nanos > BUDGET_NANOS_MAX:
        raise ValueError(f"{text!r} is more than {format_nanos(BUDGET_NANOS_MAX)}, the largest budget that is counted")
    return nanos, currency


def parse_money(text: str) -> tuple[int, str]:
    """Nanos and currency of an amount such as ``"49.00 USD"``, at most ``AMOUNT_NANOS_MAX``.

    Raises:
        ValueError: it has another form, or is too large.
    """
    match = _MONEY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not an amount of money such as '500.00 USD'")
    return parse_nanos(match[1]), match[2]


def format_budget(amount_nanos: int, currency: str) -> str:
    """``500.00 USD``: what ``parse_budget`` reads."""
    return f"{format_nanos(amount_nanos)} {currency}"


def format_nanos(amount_nanos: int) -> str:
    """The shortest exact decimal, with at least two places: ``8.00``, ``0.000012``."""
    sign, amount_nanos = ("-", -amount_nanos) if amount_nanos < 0 else ("", amount_nanos)
    whole, nanos = divmod(amount_nanos, NANOS)
    return f"{sign}{whole}.{f'{nanos:09d}'.rstrip('0').ljust(2, '0')}"


def format_minor(amount_nanos: int, currency: str) -> str:
    """An amount that is a whole number of the currency's smallest units, as people write it: ``12.30``, ``500``."""
    digits = minor_digits(currency)
    sign, amount_nanos = ("-", -amount_nanos) if amount_nanos < 0 else ("", amount_nanos)
    whole, nanos = divmod(amount_nanos, NANOS)
    return f"{sign}{whole}.{nanos:09d}"[: digits - _NANOS_DIGITS] if digits else f"{sign}{whole}"
