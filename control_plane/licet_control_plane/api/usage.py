"""``/v1/usage``: sums, the largest, what was denied, and the events one by one."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Any, Final, TypeVar

import msgpack
from fastapi import Query, Request, Response
from pydantic import BaseModel, Field

from licet.domain.money import format_nanos
from licet.domain.outcomes import Effect, Reason
from licet_control_plane.api.auth import TenantAsked, plane_of, v1_router
from licet_control_plane.api.events import EventView, Money
from licet_control_plane.api.fields import Count, Currency, Instant, MoneyText, Units, said, sometimes, unchecked
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import From, To, format_s, format_us, parse_us
from licet_control_plane.core.event_view import event_json
from licet_control_plane.core.suggestion import did_you_mean
from licet_control_plane.store import event_reports, usage_reports
from licet_control_plane.store.event_reports import EventFilter, Place, Recorded
from licet_control_plane.store.usage_reports import Interval, Order, Usage

router = v1_router("/usage", tag="usage")

E = TypeVar("E", bound=IntEnum)

GROUPS_PAGE_MAX: Final = 10_000
EVENTS_PAGE_MAX: Final = 5_000
"""A few megabytes of JSON."""
PLACE_BYTES_MAX: Final = 1024 * 1024
NAMED_MAX: Final = 12
"""Values that are named when another was sent."""


class UsageView(BaseModel):
    """One group of events: of what it is grouped by, it has the fields that were asked for."""

    tenant: str = sometimes("The tenant")
    feature: str = sometimes("The feature; empty for the cost of an action with several meters")
    action: str = sometimes("The action")
    effect: str = sometimes("APPROVED, DENIED or PENDING")
    reason: str = sometimes("Such as QUOTA_EXHAUSTED")
    flag: str = sometimes("The feature flag")
    variant: str = sometimes("The variant of the flag that applied")
    hour: str = sometimes("When the hour (UTC) begins", format="date-time")
    day: str = sometimes("When the day (UTC) begins", format="date-time")
    month: str = sometimes("When the month (UTC) begins", format="date-time")
    events: Count
    units: Annotated[Units, said("Of the feature; of what was denied, those that were asked")]
    cost: list[Money] = said("By currency; not a bill, which is an invoice")


class UsageSummary(BaseModel):
    """Sums over whole hours."""

    items: list[UsageView] = said("By group")
    from_: Instant | None = Field(alias="from", description="From where on was summed; null for all there is")
    to: Instant | None = said("Up to where, exclusive; null for now")
    next: str | None = said("The `after` of the next page; null on the last")


class RankCost(BaseModel):
    """What the units of one cost."""

    currency: Currency
    amount: MoneyText


class UsageRank(BaseModel):
    """One of the largest. Of tenant, feature and action it has what was asked for."""

    tenant: str = sometimes("The tenant")
    feature: str = sometimes("The feature")
    action: str = sometimes("The action")
    events: Count
    units: Units
    denials: Annotated[Count, said("Events that were denied")]
    cost: RankCost | None = said("In one currency; null when nothing has a price, or in several")


class UsageTop(BaseModel):
    """The largest."""

    by: str = said("tenant, feature or action")
    order: Order = said("By what they are ranked")
    items: list[UsageRank] = said("The largest first")


class DemandView(BaseModel):
    """Demand that was denied."""

    feature: str = said("The feature; empty for none")
    action: str = said("The action")
    reason: str = said("Why, such as QUOTA_EXHAUSTED")
    events: Count
    units: Annotated[Units, said("That were asked")]
    tenants: Annotated[Count, said("How many different ones asked")]
    subjects: Annotated[Count, said("How many different ones asked")]


class DeniedPage(BaseModel):
    """Demand that was denied."""

    items: list[DemandView] = said("The most frequent first")
    next: int | None = said("The `after` of the next page; null on the last", minimum=1)


class EventPage(BaseModel):
    """Events one by one."""

    items: list[EventView] = said("May be empty on a page that is not the last")
    next: str | None = said("The `after` of the next page; null on the last")


class EventTail(BaseModel):
    """The newest events."""

    items: list[EventView] = said("The oldest first")
    next: str = said("As `after`: those that are recorded from here on")


@router.get("/summary", response_model=UsageSummary)
async def usage_summary(
    request: Request,
    tenant: TenantAsked,
    from_: From = "",
    to: To = "",
    by: str = "tenant,feature,effect",
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=GROUPS_PAGE_MAX)] = 1_000,
) -> Response:
    """Usage summed over whole hours that start in ``[from, to)``, a page of groups at a time."""
    groups = list(dict.fromkeys(group.strip() for group in by.split(",") if group.strip()))
    for group in groups:
        _known(group, usage_reports.GROUPS, "by")
    if "variant" in groups and "flag" not in groups:
        raise Problem(422, "by: a variant is one of a flag.", "Ask by flag,variant.")
    interval = interval_of(from_, to)
    usage, rest = await plane_of(request).database.read(
        usage_reports.summary,
        by=groups,
        tenant=tenant,
        interval=interval,
        after=_place(after, groups),
        limit=limit,
    )
    return unchecked(
        {
            "items": [_usage(one) for one in usage],
            "from": format_us(interval.from_us or None),
            "to": format_us(interval.to_us),
            "next": json.dumps(rest) if rest else None,
        }
    )


@router.get("/top", response_model=UsageTop, response_model_exclude_unset=True)
async def usage_top(
    request: Request,
    tenant: TenantAsked,
    by: str = "tenant",
    order: str = Order.UNITS.value,
    from_: From = "",
    to: To = "",
    currency: str = "",
    limit: Annotated[int, Query(ge=1, le=1_000)] = 10,
) -> dict[str, Any]:
    """The largest tenants, features or actions: by units, cost, events or denials."""
    _known(by, usage_reports.TOP_GROUPS, "by")
    _known(order, [one.value for one in Order], "order")
    interval = interval_of(from_, to)
    database = plane_of(request).database
    if not currency:
        used = await database.read(usage_reports.currencies, tenant=tenant, interval=interval)
        if len(used) > 1 and order == Order.COST:
            raise Problem(422, f"currency: there are costs in {', '.join(used)}.", "Say which one to rank by.")
        currency = used[0] if len(used) == 1 else ""
    ranked = await database.read(
        usage_reports.top,
        by=by,
        order=Order(order),
        tenant=tenant,
        interval=interval,
        currency=currency,
        limit=limit,
    )
    return {
        "by": by,
        "order": order,
        "items": [
            {
                by: one.name,
                "events": one.events,
                "units": one.units,
                "denials": one.denials,
                "cost": {"currency": one.currency, "amount": format_nanos(one.cost_nanos)} if one.currency else None,
            }
            for one in ranked
        ],
    }


@router.get("/denied", response_model=DeniedPage)
async def usage_denied(
    request: Request,
    tenant: TenantAsked,
    from_: From = "",
    to: To = "",
    reason: str = "",
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> dict[str, Any]:
    """Demand that was turned away, the most frequent first; ``reason``: of these instead, separated by commas."""
    asked = [one.strip() for one in reason.split(",") if one.strip()]
    reasons = [_parsed(one, Reason, "reason") for one in asked] or list(usage_reports.DEMAND)
    interval = interval_of(from_, to)
    found = await plane_of(request).database.read(
        usage_reports.denied, reasons=reasons, tenant=tenant, interval=interval
    )
    rest = after + limit
    return {
        "items": [
            {
                "feature": one.feature,
                "action": one.action,
                "reason": one.reason,
                "events": one.events,
                "units": one.units,
                "tenants": one.tenants,
                "subjects": one.subjects,
            }
            for one in found[after:rest]
        ],
        "next": rest if rest < len(found) else None,
    }


@router.get("/events", response_model=EventPage)
async def usage_events(
    request: Request,
    tenant: str = "",
    action: str = "",
    effect: str = "",
    reason: str = "",
    from_: From = "",
    to: To = "",
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=EVENTS_PAGE_MAX)] = 1_000,
) -> Response:
    """Events one by one, in pages that follow on each other by ``next``. A page may have no items and still a next."""
    which = _filter(tenant, action, effect, reason, from_, to)
    plane = plane_of(request)
    database = plane.database
    if after:
        try:
            place = Place.parse(after)
        except ValueError as error:
            raise _no_place(after) from error
    else:
        place = await database.read(event_reports.begin)
    found, rest = await database.read(event_reports.page, plane.ledger_key, which, place, limit=limit)
    return unchecked(
        {
            "items": _events(found),
            "next": str(rest) if rest else None,
        }
    )


@router.get("/tail", response_model=EventTail)
async def usage_tail(
    request: Request,
    tenant: str = "",
    action: str = "",
    effect: str = "",
    reason: str = "",
    after: str = "",
    limit: Annotated[int, Query(ge=0, le=EVENTS_PAGE_MAX)] = 20,
) -> Response:
    """The newest events, oldest first; with the ``next`` of an answer as ``after``, those recorded since."""
    which = _filter(tenant, action, effect, reason, "", "")
    plane = plane_of(request)
    database = plane.database
    if after:
        ends = _unpacked(after)
        found, ends = await database.read(event_reports.following, plane.ledger_key, which, ends, limit=limit)
    else:
        found, ends = await database.read(event_reports.newest, plane.ledger_key, which, limit=limit)
    return unchecked({"items": _events(found), "next": _packed(ends)})


def interval_of(from_: str, to: str) -> Interval:
    """The interval of two instants, empty for no bound.

    Raises:
        Problem: 422, one is not an instant.
    """
    return Interval(parse_us(from_, "from") if from_ else 0, parse_us(to, "to") if to else None)


def _filter(tenant: str, action: str, effect: str, reason: str, from_: str, to: str) -> EventFilter:
    return EventFilter(
        tenant=tenant,
        action=action,
        effect=_parsed(effect, Effect, "effect").value if effect else 0,
        reason=_parsed(reason, Reason, "reason").value if reason else 0,
        interval=interval_of(from_, to),
    )


def _parsed(text: str, kind: type[E], name: str) -> E:
    _known(text.upper(), [one.name for one in kind], name)
    return kind[text.upper()]


def _known(text: str, known: Sequence[str], name: str) -> None:
    if text not in known:
        fix = f"Write one of {', '.join(known)}." if len(known) <= NAMED_MAX else did_you_mean(text, known)
        raise Problem(422, f"{name}: {text!r} is not possible here.", fix)


def _place(after: str, groups: list[str]) -> list[Any]:
    if not after:
        return []
    try:
        place = json.loads(after)
    except ValueError:
        place = None
    if not isinstance(place, list) or len(place) != len(groups):
        raise Problem(422, f"after: {after!r} is not a place in these sums.", "Send the 'next' of a page.")
    if not all(isinstance(one, str | int) for one in place):
        raise Problem(422, f"after: {after!r} is not a place in these sums.", "Send the 'next' of a page.")
    return place


def _packed(ends: event_reports.Ends) -> str:
    """Short, as there may be a thousand logs, and it travels in an address."""
    return base64.urlsafe_b64encode(zlib.compress(msgpack.packb(dict(ends)))).decode()


def _unpacked(after: str) -> event_reports.Ends:
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.urlsafe_b64decode(after), PLACE_BYTES_MAX)
        ends = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, zlib.error, msgpack.UnpackException) as error:
        raise _no_place(after) from error
    if not isinstance(ends, dict) or not all(isinstance(one, int) for pair in ends.items() for one in pair):
        raise _no_place(after)
    return ends


def _no_place(after: str) -> Problem:
    return Problem(422, f"after: {after!r} is not a place in the events.", "Send the 'next' of a page.")


def _usage(one: Usage) -> dict[str, Any]:
    return {
        **{name: format_s(int(value)) if name in usage_reports.TIMES else value for name, value in one.group.items()},
        "events": one.events,
        "units": one.units,
        "cost": [
            {"currency": currency, "amount": format_nanos(nanos)} for currency, nanos in sorted(one.cost_nanos.items())
        ],
    }


def _events(found: Sequence[Recorded]) -> list[dict[str, Any]]:
    return [event_json(one.log_id, one.decision_prefix, one.event) for one in found]
