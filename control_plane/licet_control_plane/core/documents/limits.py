"""A limit as people write it: in units, in money, or as a rate; and which of its fields go together."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field, StrictBool, ValidationInfo, field_validator

from licet.domain.catalog import Enforcement, Limit, OnExceeded, budget_key, rate_key
from licet.domain.entitlements import RATE_MAX
from licet.domain.ids import LimitKey
from licet.domain.money import Price
from licet.domain.windows import Anchor, Period
from licet_control_plane.core.documents.model import Source, one_of
from licet_control_plane.core.documents.scalars import (
    Budget,
    Currency,
    LimitName,
    Nanos,
    PositiveUnits,
    ScopePath,
    Units,
    refused,
)

SCOPE_MAX: Final = 4


class OveragePriceSource(Source):
    """``{amount: "0.10", per_units: 1, currency: USD}``."""

    amount: Nanos
    per_units: PositiveUnits = 1
    currency: Currency

    def to_domain(self) -> Price:
        """The record both programs act on."""
        return Price(self.amount, self.per_units, self.currency)


class LimitSource(Source):
    """``{amount: 200_000, per: minute, scope: [subject]}``, or ``{spend: "500.00 USD", per: month}``.

    ``per`` comes first, because what the other fields may be depends on it.
    """

    model_config = one_of("amount", "spend")

    per: Period
    amount: Units | None = None
    spend: Budget | None = None
    scope: Annotated[tuple[ScopePath, ...], Field(max_length=SCOPE_MAX)] = ()
    name: LimitName | None = None
    anchor: Anchor = Anchor.CALENDAR
    on_exceeded: OnExceeded = OnExceeded.DENY
    burst: PositiveUnits | None = None
    durable: StrictBool = False
    overage_price: OveragePriceSource | None = None
    enforcement: Enforcement = Enforcement.ENFORCE

    @field_validator("amount")
    @classmethod
    def _rate_can_be_shared_out(cls, amount: int | None, info: ValidationInfo) -> int | None:
        if amount is not None and amount > RATE_MAX and _is_rate(info):
            raise refused(f"{amount} units a second are more than {RATE_MAX}", f"Write {RATE_MAX} or less.")
        return amount

    @field_validator("spend", mode="wrap")
    @classmethod
    def _one_way_to_say_it(cls, value: Any, handler: Any, info: ValidationInfo) -> tuple[int, str] | None:
        spend: tuple[int, str] | None = None if value is None else handler(value)
        if "amount" in info.data and (spend is None) == (info.data["amount"] is None):
            raise refused(
                "a limit needs either 'amount' or 'spend'",
                "Write 'amount: 1_000' to limit units, or 'spend: \"500.00 USD\"' to limit what they cost.",
            )
        if spend is not None and _is_rate(info):
            raise refused(
                "a limit per second counts units and not money",
                "Write 'per: minute' or longer, or 'amount' instead of 'spend'.",
            )
        return spend

    @field_validator("scope")
    @classmethod
    def _scope_without_repeats(cls, scope: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(scope)) < len(scope):
            raise refused("the scope names a path twice", "Remove one of them.")
        # Sorted, because the order means nothing and must not open a fresh quota when it changes.
        return tuple(sorted(scope))

    @field_validator("anchor")
    @classmethod
    def _anchor_belongs_to_windows(cls, anchor: Anchor, info: ValidationInfo) -> Anchor:
        per = info.data.get("per")
        if anchor is Anchor.LICENSE and per in (Period.SECOND, Period.TERM):
            why = "a rate has no windows" if per is Period.SECOND else "a term is the license's already"
            raise refused(f"'anchor: license' means nothing with 'per: {per.value}': {why}", "Remove 'anchor'.")
        return anchor

    @field_validator("on_exceeded")
    @classmethod
    def _rates_are_hard(cls, on_exceeded: OnExceeded, info: ValidationInfo) -> OnExceeded:
        if on_exceeded is not OnExceeded.DENY and _is_rate(info):
            raise refused(
                f"a limit per second cannot have 'on_exceeded: {on_exceeded.value}'",
                "Write 'deny', which answers RATE_LIMITED, or 'per: minute' or longer.",
            )
        return on_exceeded

    @field_validator("burst")
    @classmethod
    def _burst_belongs_to_rates(cls, burst: int | None, info: ValidationInfo) -> int | None:
        if burst is None:
            return None
        if "per" in info.data and not _is_rate(info):
            raise refused("'burst' is only for 'per: second'", "Write 'per: second', or remove 'burst'.")
        if burst > RATE_MAX:
            raise refused(f"a burst of {burst} units is more than {RATE_MAX}", f"Write {RATE_MAX} or less.")
        return burst

    @field_validator("durable")
    @classmethod
    def _durable_belongs_to_windows(cls, durable: bool, info: ValidationInfo) -> bool:
        if durable and _is_rate(info):
            raise refused("a limit per second cannot be durable: its shares expire by themselves", "Remove 'durable'.")
        return durable

    @field_validator("overage_price")
    @classmethod
    def _overage_can_be_counted(
        cls, overage_price: OveragePriceSource | None, info: ValidationInfo
    ) -> OveragePriceSource | None:
        if overage_price is None:
            return None
        if "on_exceeded" in info.data and info.data["on_exceeded"] is not OnExceeded.OVERAGE:
            raise refused(
                "'overage_price' is only for limits that can be exceeded",
                "Write 'on_exceeded: overage', or remove 'overage_price'.",
            )
        if info.data.get("spend") is not None:
            raise refused(
                "'overage_price' is a price of units, and this limit counts money",
                "Limit units with 'amount', or remove 'overage_price'.",
            )
        if info.data.get("per") is Period.TERM:
            raise refused(
                "the overage of a term is known only at its end, which may never come",
                "Write 'per: year' or shorter, or remove 'overage_price'.",
            )
        return overage_price

    def to_domain(self, feature: str) -> Limit:
        """The record both programs act on, its key made from ``feature``."""
        derived = f"{self.per.value}@{'+'.join(self.scope)}" if self.scope else self.per.value
        key = LimitKey(f"{feature}:{self.name or derived}")
        amount, currency = self.spend or (self.amount or 0, "")
        if currency:
            key = budget_key(key, currency)
        elif self.per is Period.SECOND:
            key = rate_key(key)
        return Limit(
            key=key,
            amount=amount,
            per=self.per,
            scope=self.scope,
            on_exceeded=self.on_exceeded,
            anchor=self.anchor,
            currency=currency,
            burst=self.burst or 0,
            durable=self.durable,
            overage_price=self.overage_price.to_domain() if self.overage_price else None,
            enforcement=self.enforcement,
        )


def _is_rate(info: ValidationInfo) -> bool:
    return info.data.get("per") is Period.SECOND
