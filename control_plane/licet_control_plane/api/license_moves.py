"""``/v1/licenses/{tenant}/suspend`` and the other moves of a license. What is so already stays as it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from licet.domain.catalog import License, PlannedPlan
from licet.domain.windows import Period, window_at
from licet_control_plane.api.auth import v1_router
from licet_control_plane.api.licenses import Edit, LicenseView
from licet_control_plane.api.times import parse_s
from licet_control_plane.core.lifecycle import PERIODS_MAX, Move, check_move, moved, renewed
from licet_control_plane.core.refusal import ChangeInvalid

router = v1_router("/licenses/{tenant}", tag="license-moves")

NOW: Final = "now"
TERM_END: Final = "term_end"
MONTH_END: Final = "month_end"


class Cancellation(BaseModel):
    """``term_end``: it answers until its term ends, is not renewed, and has no grace."""

    model_config = ConfigDict(extra="forbid")

    at: Literal["now", "term_end"] = "now"


class RenewalOrder(BaseModel):
    """By how many of its periods the term becomes longer."""

    model_config = ConfigDict(extra="forbid")

    periods: StrictInt = Field(1, ge=1, le=PERIODS_MAX)


class PlanChange(BaseModel):
    """``at``: ``now``, ``term_end``, ``month_end`` (of the calendar month, UTC), or an instant in the future."""

    model_config = ConfigDict(extra="forbid")

    plan: str
    at: str = NOW


@router.post("/suspend", response_model=LicenseView)
async def suspend_license(edit: Edit) -> dict[str, Any]:
    """Deny everything with ``TENANT_SUSPENDED`` until it is resumed."""
    return await edit.alter(partial(_moved, move=Move.SUSPEND), action="license.suspend")


@router.post("/resume", response_model=LicenseView)
async def resume_license(edit: Edit) -> dict[str, Any]:
    """End a suspension; of a license that is active, take back that it is canceled at the end of its term."""
    return await edit.alter(partial(_moved, move=Move.RESUME), action="license.resume")


@router.post("/cancel", response_model=LicenseView)
async def cancel_license(body: Cancellation, edit: Edit) -> dict[str, Any]:
    """End a license, now or with its term."""
    move = Move.CANCEL if body.at == NOW else Move.CANCEL_AT_END
    return await edit.alter(partial(_moved, move=move), action="license.cancel")


@router.post("/renew", response_model=LicenseView)
async def renew_license(body: RenewalOrder, edit: Edit) -> dict[str, Any]:
    """Make the term longer. Not idempotent by itself: send an ``Idempotency-Key`` or ``If-Match``."""
    return await edit.alter(partial(_renewed, periods=body.periods), action="license.renew")


@router.post("/change-plan", response_model=LicenseView)
async def change_plan(body: PlanChange, edit: Edit) -> dict[str, Any]:
    """Move a license to another plan, now or later. A later change replaces one that was planned."""
    at_s = parse_s(body.at, "at") if body.at not in (NOW, TERM_END, MONTH_END) else None
    return await edit.alter(partial(_changed, plan=body.plan, at=body.at, at_s=at_s), action="license.change_plan")


def _moved(license_: License, now_s: float, *, move: Move) -> License:
    return moved(license_, move, now_s)


def _renewed(license_: License, now_s: float, *, periods: int) -> License:
    return renewed(license_, now_s, periods)


def _changed(license_: License, now_s: float, *, plan: str, at: str, at_s: int | None) -> License:
    check_move(license_, Move.CHANGE, now_s)
    if at == NOW:
        return replace(license_, plan=plan, planned=None)
    if at == TERM_END:
        at_s = license_.ends_s
        if not at_s:
            raise ChangeInvalid("at", "the license has no end", "Use now, month_end or an instant.")
    elif at == MONTH_END:
        at_s = window_at(Period.MONTH, int(now_s)).end
    assert at_s is not None
    if at_s <= now_s:
        raise ChangeInvalid("at", "that is not in the future", "Use now, or a later instant.")
    return replace(license_, planned=PlannedPlan(plan, at_s))
