"""``/v1/usage/tally``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from licet_control_plane.api.auth import TenantAsked, plane_of, v1_router
from licet_control_plane.api.fields import Count, Units, said
from licet_control_plane.api.times import From, To
from licet_control_plane.api.usage import interval_of
from licet_control_plane.store import ledger_reports

router = v1_router(tag="ledger")


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
    interval = interval_of(from_, to)
    tally = await plane_of(request).database.read(
        ledger_reports.tally,
        plane_of(request).ledger_key,
        tenant=tenant,
        idempotency_prefix=idempotency_prefix,
        from_us=interval.from_us,
        to_us=interval.to_us,
    )
    return asdict(tally)
