"""``/v1/overrides``: break glass."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from licet.domain.approvals import OverrideEffect
from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.fields import By, Instant, Revision, said
from licet_control_plane.api.times import format_us
from licet_control_plane.override_desk import OverrideAsked, OverrideUnknown
from licet_control_plane.store import overrides
from licet_control_plane.store.overrides import StoredOverride

LIST_MAX: Final = 500

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")

router = v1_router("/overrides", tag="overrides")


class NewOverride(BaseModel):
    """An override, from now on. ``action`` is a name, ``prefix.*`` or ``*``; without ``tenant`` it is for all of them,
    without ``subject`` for every one. ``id`` makes a repeat change nothing."""

    model_config = ConfigDict(extra="forbid")

    action: str
    effect: str
    expires_after_s: StrictInt
    reason: str
    tenant: str = ""
    subject: str = ""
    id: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_-]{0,31})?$")] = ""


class OverrideView(BaseModel):
    """A break-glass override."""

    id: str = said("Given, or made up")
    action: str = said("A name, prefix.* or *")
    effect: OverrideEffect = said("What is answered instead of deciding")
    tenant: str = said("Empty for all")
    subject: str = said("The id of the only one; empty for all")
    reason: str = said("Why it was set")
    set_by: By
    set_at: Instant
    expires_at: Annotated[Instant, said("From then on it is over")]
    state: Literal["live", "expired", "cleared"] = said("By the clock of the server")
    cleared_by: str = said("Who ended it before its time; empty for nobody")
    cleared_at: Instant | None = said("When that was; null for never")


class ChangedOverride(OverrideView):
    """With what publishes it."""

    revision: Annotated[Revision, said("With which sidecars know of it")]


class OverrideList(BaseModel):
    """Overrides, those that are over included."""

    items: list[OverrideView] = said("The last set first")


@router.post("", status_code=201, response_model=ChangedOverride, responses={200: {"model": ChangedOverride}})
async def set_override(request: Request, response: Response, body: NewOverride, caller: CallerAsked) -> dict[str, Any]:
    """Put an override in force; 200 when it is there already, by its ``id``."""
    plane = plane_of(request)
    asked = OverrideAsked(
        body.action, body.effect, body.expires_after_s, body.reason, body.tenant, body.subject, body.id
    )
    stored, revision, new = await plane.override_desk.set(asked, by=caller.name)
    if not new:
        response.status_code = 200
    return {**described(stored, plane.now_us()), "revision": revision}


@router.get("", response_model=OverrideList)
async def list_overrides(request: Request, limit: Annotated[int, Query(ge=1, le=LIST_MAX)] = 100) -> dict[str, Any]:
    """Overrides, the last set first, those that are over included."""
    plane = plane_of(request)
    now_us = plane.now_us()
    found = await plane.database.read(overrides.newest, limit)
    return {"items": [described(one, now_us) for one in found]}


@router.delete("/{override_id}", response_model=ChangedOverride)
async def clear_override(request: Request, override_id: str, caller: CallerAsked) -> dict[str, Any]:
    """End an override now."""
    plane = plane_of(request)
    if not _ID.fullmatch(override_id):
        raise OverrideUnknown(override_id)
    stored, revision = await plane.override_desk.clear(override_id, by=caller.name)
    return {**described(stored, plane.now_us()), "revision": revision}


def described(stored: StoredOverride, now_us: int) -> dict[str, Any]:
    """An override as the API shows it."""
    one = stored.override
    over = "cleared" if stored.cleared_at_us else "expired" if now_us >= one.ends_us else "live"
    return {
        "id": one.id,
        "action": one.action,
        "effect": one.effect.value,
        "tenant": one.tenant,
        "subject": one.subject,
        "reason": one.reason,
        "set_by": one.by,
        "set_at": format_us(stored.set_at_us),
        "expires_at": format_us(one.ends_us),
        "state": over,
        "cleared_by": stored.cleared_by,
        "cleared_at": format_us(stored.cleared_at_us) if stored.cleared_at_us else None,
    }
