"""``/v1/decisions``: what was recorded, one by one."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Query, Request, Response
from pydantic import BaseModel

from licet.wire.usage import FLAG_DEGRADED, FLAG_OBSERVED, FLAG_STALE
from licet_control_plane.api.auth import TenantAsked, plane_of, v1_router
from licet_control_plane.api.events import EventFacts
from licet_control_plane.api.fields import Currency, InstantUs, said, sometimes, unchecked
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import parse_us
from licet_control_plane.core.event_view import event_json
from licet_control_plane.store import decisions
from licet_control_plane.store.decisions import Cursor
from licet_control_plane.store.event_reports import Recorded

router = v1_router(tag="decisions")

PAGE_MAX: Final = 5_000
_LAST_US: Final = 253_402_300_799_000_000


class NanosView(BaseModel):
    """Money."""

    amount_nanos: int = said("Billionths of the currency", minimum=0)
    currency: Currency


class DecisionView(EventFacts):
    """A recorded decision."""

    cost: NanosView | None = said("Null when nothing has a price")
    at_us: InstantUs
    stale: bool = said("Decided by what was older than it should be")
    degraded: bool = said("Decided without Redis, by the action's `on_unavailable`")
    observed: bool = said("Answered APPROVED all the same, in observe mode")


class DecisionPage(BaseModel):
    """Recorded decisions, by tenant and then by time."""

    items: list[DecisionView] = said("May be empty on a page that is not the last")
    next: str | None = said("The `after` of the next page; null on the last")
    total: int = sometimes("How many there are; only on the first page", minimum=0)


@router.get("/decisions", response_model=DecisionPage)
async def list_decisions(
    request: Request,
    tenant: TenantAsked,
    from_: Annotated[str, Query(alias="from")] = "0",
    to: str = "",
    after: Annotated[str, Query(max_length=256)] = "",
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 1_000,
) -> Response:
    """Recorded decisions, by tenant and then by time. A page may be empty: go on while there is a ``next``.

    The first page says how many there are in all. Roles and attributes of subjects are not recorded.
    """
    from_us, to_us = parse_us(from_, "from"), parse_us(to, "to") if to else _LAST_US
    cursor = _cursor(after)
    plane = plane_of(request)
    database = plane.database
    found, next_ = await database.read(
        decisions.page, plane.ledger_key, from_us=from_us, to_us=to_us, tenant=tenant, after=cursor, limit=limit
    )
    body: dict[str, Any] = {
        "items": [_described(one) for one in found],
        "next": f"{next_.at_us}:{next_.log}:{next_.seq}:{next_.tenant}" if next_ else None,
    }
    if cursor is None:
        body["total"] = await database.read(decisions.count, from_us=from_us, to_us=to_us, tenant=tenant)
    return unchecked(body)


def _cursor(text: str) -> Cursor | None:
    if not text:
        return None
    *digits, tenant = text.split(":", 3)
    if len(digits) == 3 and tenant and all(one.isascii() and one.isdecimal() for one in digits):
        at_us, log, seq = map(int, digits)
        if max(at_us, log, seq) < 2**63:
            return Cursor(tenant, at_us, log, seq)
    raise Problem(422, f"after: {text!r} is no cursor.", "Send the 'next' of the page before.")


def _described(recorded: Recorded) -> dict[str, Any]:
    event = recorded.event
    return event_json(recorded.log_id, recorded.decision_prefix, event) | {
        "at_us": event.at_us,
        "cost": {"amount_nanos": event.cost_nanos, "currency": event.currency} if event.currency else None,
        "stale": bool(event.flags & FLAG_STALE),
        "degraded": bool(event.flags & FLAG_DEGRADED),
        "observed": bool(event.flags & FLAG_OBSERVED),
    }
