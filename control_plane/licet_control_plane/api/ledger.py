"""``/v1/usage``: sums and tallies."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from licet.domain.money import format_nanos
from licet_control_plane.api.auth import plane_of
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us, parse_us
from licet_control_plane.core.suggestion import did_you_mean
from licet_control_plane.store import ledger_reports

router = APIRouter()

From = Annotated[str, Query(alias="from")]
To = Annotated[str, Query()]


@router.get("/usage/summary")
async def usage_summary(
    request: Request, tenant: str = "", from_: From = "", to: To = "", by: str = "tenant,feature,effect"
) -> dict[str, Any]:
    """Usage by hour, summed: whole hours that start in ``[from, to)``."""
    groups = [group.strip() for group in by.split(",") if group.strip()]
    for group in groups:
        if group not in ledger_reports.GROUPS:
            fix = did_you_mean(group, ledger_reports.GROUPS)
            raise Problem(422, f"by: usage is not summed by {group!r}.", fix)
    from_us, to_us = _interval(from_, to)
    usage = await plane_of(request).database.read(
        ledger_reports.summary, by=groups, tenant=tenant, from_us=from_us or 0, to_us=to_us
    )
    return {
        "items": [
            {
                **one.group,
                "events": one.events,
                "units": one.units,
                "cost": [
                    {"currency": currency, "amount": format_nanos(nanos)}
                    for currency, nanos in sorted(one.cost_nanos.items())
                ],
            }
            for one in usage
        ],
        "from": format_us(from_us),
        "to": format_us(to_us),
    }


@router.get("/usage/tally")
async def usage_tally(
    request: Request, tenant: str = "", idempotency_prefix: str = "", from_: From = "", to: To = ""
) -> dict[str, Any]:
    """What became of one workload: the events whose idempotency key starts with a prefix."""
    from_us, to_us = _interval(from_, to)
    tally = await plane_of(request).database.read(
        ledger_reports.tally,
        plane_of(request).ledger_key,
        tenant=tenant,
        idempotency_prefix=idempotency_prefix,
        from_us=from_us or 0,
        to_us=to_us,
    )
    return asdict(tally)


def _interval(from_: str, to: str) -> tuple[int | None, int | None]:
    return (parse_us(from_, "from") if from_ else None, parse_us(to, "to") if to else None)
