"""``/v1/tenants/{tenant}/invoices/{month}``: what a tenant owes for a month, and whether that can still change."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from fastapi import Request
from pydantic import BaseModel, Field

from licet.domain.money import divide_half_even, format_minor, format_nanos
from licet.domain.windows import Period, Window, window_at
from licet.wire.usage import log_id
from licet_control_plane.api.auth import plane_of, v1_router
from licet_control_plane.api.fields import (
    Currency,
    Instant,
    LogId,
    MoneyText,
    MonthName,
    Seq,
    SidecarId,
    Tenant,
    Units,
    said,
    sometimes,
)
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_s, parse_s
from licet_control_plane.changes import LicenseUnknown
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.billing import Line
from licet_control_plane.core.fleet import LIVE_S_MAX, is_undrained
from licet_control_plane.store import billing, reconciling

router = v1_router(tag="invoices")

NAMED_MAX: Final = 100
"""Sidecars and gaps that an answer names; their number is said in full."""
_MONTH: Final = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])")
_US: Final = 1_000_000


class NumbersMissing(BaseModel):
    """Events that a sidecar numbered and the ledger does not have."""

    log_id: LogId
    from_seq: Annotated[Seq, said("The first of them")]
    to_seq: Annotated[Seq, said("The last of them")]


class ProvisionalView(BaseModel):
    """Why an invoice may still change."""

    why: Literal["month_open", "sidecars_undrained", "gaps"] = said("For programs")
    detail: str = said("For people")
    sidecars: list[SidecarId] = sometimes("Of sidecars_undrained: the first 100")
    gaps: list[NumbersMissing] = sometimes("Of gaps: the first 100")


class ChargeView(BaseModel):
    """Units at one price."""

    units: Units
    amount: Annotated[MoneyText, said("For every `per_units`, exact")]
    flat: Annotated[MoneyText, said("Owed once for the tier, exact")]


class LineView(BaseModel):
    """A line of an invoice."""

    kind: Literal["fee", "usage", "overage"] = said("What it is owed for")
    name: str = said("The plan, the feature, or the key of the limit")
    priced_as: str = said("The value of the attribute that picked the price; empty for none")
    units: Units
    included: Annotated[Units, said("Of them free")]
    per_units: int = said("For how many units a price is", minimum=0)
    tiers: str = said("graduated or volume; empty for one price")
    charges: list[ChargeView] = said("By tier")
    share_of_month: float = said("How much of the month it covers", minimum=0, maximum=1)
    since_revision: int = said("The revision whose prices it has", minimum=0)
    currency: Currency
    unrounded: Annotated[MoneyText, said("To a billionth of the currency")]
    amount: Annotated[MoneyText, said("In the smallest units of the currency, half to even")]


class UnpricedView(BaseModel):
    """Units that nothing has a price for."""

    feature: str = said("The feature")
    units: Units


class TotalView(BaseModel):
    """What is owed in one currency."""

    currency: Currency
    amount: Annotated[MoneyText, said("The sum of the lines as they are rounded")]


class InvoiceView(BaseModel):
    """What a tenant owes for a month."""

    tenant: Tenant
    month: MonthName
    from_: Instant = Field(alias="from", description="When the month begins")
    to: Annotated[Instant, said("When it ends, exclusive")]
    provisional: list[ProvisionalView] = said("What can still change it; empty when it is final")
    lines: list[LineView] = said("Fees first")
    unpriced: list[UnpricedView] = said("What was used and has no price, by feature")
    totals: list[TotalView] = said("By currency")


@router.get("/tenants/{tenant}/invoices/{month}", response_model=InvoiceView, response_model_exclude_unset=True)
async def invoice(request: Request, tenant: str, month: str) -> dict[str, Any]:
    """The invoice of a month, ``2026-10``, from the units in the ledger; ``provisional`` says what can change it."""
    plane = plane_of(request)
    period = month_of(month)
    made = await plane.database.read(billing.invoice_of, tenant, period)
    if made is None:
        raise LicenseUnknown(tenant)
    return {
        "tenant": tenant,
        "month": month,
        "from": format_s(period.start),
        "to": format_s(period.end),
        "provisional": await _provisional(plane, period),
        "lines": [described(line) for line in made.lines],
        "unpriced": [{"feature": feature, "units": units} for feature, units in sorted(made.unpriced.items())],
        "totals": [
            {"currency": currency, "amount": format_minor(nanos, currency)} for currency, nanos in made.totals.items()
        ],
    }


def month_of(text: str) -> Window:
    """The month of ``2026-10``.

    Raises:
        Problem: 422, it is none.
    """
    if _MONTH.fullmatch(text) is None:
        raise Problem(422, f"month: {text!r} is not a month.", "Write it as 2026-10.")
    return window_at(Period.MONTH, parse_s(f"{text}-01", "month"))


def described(line: Line) -> dict[str, Any]:
    """A line as the API shows it. Money is text: a number in JSON may be read as a float."""
    unrounded = divide_half_even(line.exact.numerator, line.exact.denominator)
    return {
        "kind": line.kind,
        "name": line.name,
        "priced_as": line.priced_as,
        "units": line.units,
        "included": line.included,
        "per_units": line.per_units,
        "tiers": line.tiers,
        "charges": [
            {
                "units": one.units,
                "amount": format_nanos(one.amount_nanos),
                "flat": format_nanos(one.flat_nanos),
            }
            for one in line.charges
        ],
        "share_of_month": round(line.share.numerator / line.share.denominator, 6),
        "since_revision": line.revision,
        "currency": line.currency,
        "unrounded": format_nanos(unrounded),
        "amount": format_minor(line.amount_nanos, line.currency),
    }


async def _provisional(plane: ControlPlane, month: Window) -> list[dict[str, Any]]:
    """Why the invoice may still change; empty when it is final."""
    reasons: list[dict[str, Any]] = []
    now_s = plane.now_s()
    if now_s < month.end:
        reasons.append({"why": "month_open", "detail": f"The month ends at {format_s(month.end)}."})
    logs = {log_id(one.heartbeat.sidecar, one.heartbeat.incarnation): one for one in plane.fleet.sidecars.values()}
    watermarks = await plane.database.read(reconciling.watermarks, list(logs))
    late = sorted(
        one.heartbeat.sidecar
        for name, one in logs.items()
        if is_undrained(one, watermarks.get(name, 0), at_s=min(month.end, now_s - 2 * LIVE_S_MAX))
    )
    if late:
        reasons.append(
            {
                "why": "sidecars_undrained",
                "detail": f"{len(late)} sidecars may hold events of the month that are not in the ledger yet.",
                "sidecars": late[:NAMED_MAX],
            }
        )
    gaps = await plane.database.read(billing.missing, since_us=month.start * _US)
    if gaps:
        reasons.append(
            {
                "why": "gaps",
                "detail": f"{len(gaps)} ranges of events that sidecars numbered are not in the ledger.",
                "gaps": [
                    {"log_id": one.log_id, "from_seq": one.from_seq, "to_seq": one.to_seq} for one in gaps[:NAMED_MAX]
                ],
            }
        )
    return reasons
