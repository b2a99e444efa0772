"""``/v1/tenants/{tenant}/invoices/{month}``: what a tenant owes for a month, and whether that can still change."""

from __future__ import annotations

import re
from typing import Any, Final

from fastapi import Request

from licet.domain.money import divide_half_even, format_minor, format_nanos
from licet.domain.windows import Period, Window, window_at
from licet.wire.usage import log_id
from licet_control_plane.api.auth import plane_of, v1_router
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


@router.get("/tenants/{tenant}/invoices/{month}")
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
