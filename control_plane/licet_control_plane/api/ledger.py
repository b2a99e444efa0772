"""``/v1/usage/tally``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Query, Request
from pydantic import BaseModel

from licet_control_plane.api.auth import TenantAsked, plane_of, v1_router
from licet_control_plane.api.fields import Count, Units, said
from licet_control_plane.api.times import parse_us
from licet_control_plane.store import ledger_reports

router = v1_router(tag="ledger")

From = Annotated[str, Query(alias="from")]
To = Annotated[str, Query()]


class TallyView(BaseModel):
    """What became of one workload."""

    events: Count
    approved: Count
    denied: dict[str, Count] = said("By reason")
    pending: Count
    units_approved: Units
    units_by_feature: dict[str, Units] = said("Of approved events")


@router.get("/usage/tally", response_model=TallyView)
async def usage_tally(
    request: Request, tenant: TenantAsked, idempotency_prefix: str = "", from_: From = "", to: To = ""
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
