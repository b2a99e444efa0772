"""``/v1/access-requests``: what people are asked to approve, and what they say.

A request is made by a sidecar, whose decision it is about; here it is read and decided. Deciding is idempotent: the
same person saying the same again gets the same answer.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from licet.domain.approvals import TEXT_CHARS_MAX, RequestState
from licet_control_plane.access_desk import RequestUnknown, principal
from licet_control_plane.api.amounts import Amount
from licet_control_plane.api.auth import CallerAsked, TenantAsked, plane_of, v1_router
from licet_control_plane.api.fields import Count, Instant, Revision, Tenant, said
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us
from licet_control_plane.core import access_requests as core
from licet_control_plane.core.access_requests import AccessRequest, Terms
from licet_control_plane.store import access_requests as store
from licet_control_plane.store.access_requests import Cursor, StoredRequest

PAGE_MAX: Final = 500
EXPIRES_AFTER_S_DEFAULT: Final = 3_600

_ID: Final = re.compile(r"[0-9A-Za-z]{32}")
_DIGITS: Final = re.compile(r"[0-9]{1,18}")

router = v1_router("/access-requests", tag="access-requests")


class Approval(BaseModel):
    """A yes. The clock of ``expires_after_s`` starts with the last one that is needed. ``units``: in all, absent for
    any number; where a budget is exceeded, money such as ``"50.00 USD"``."""

    model_config = ConfigDict(extra="forbid")

    expires_after_s: StrictInt
    units: Amount | None = None
    reason: Annotated[str, Field(max_length=TEXT_CHARS_MAX)] = ""

    def terms(self) -> Terms:
        """As the core has them."""
        if isinstance(self.units, str):
            return Terms(self.expires_after_s, money=self.units)
        if self.units is not None and self.units < 1:
            raise Problem(422, f"units: an approval for {self.units} units.", "Give at least 1, or none at all.")
        return Terms(self.expires_after_s, self.units or 0)


class Reason(BaseModel):
    """Why: whoever asked is told."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, Field(min_length=1, max_length=TEXT_CHARS_MAX)]


class SubjectView(BaseModel):
    """Who asked; all empty once the subject was erased."""

    type: str = said("Such as user")
    id: str = said("As the service calls them")
    on_behalf_of: str = said("For whom they act; empty for themselves")


class ResourceView(BaseModel):
    """What it is about; empty for nothing in particular."""

    type: str = said("Such as report")
    id: str = said("As the service calls it")


class StageView(BaseModel):
    """The stage of its chain that a request is in."""

    number: Annotated[int, said("From 1", minimum=1)]
    of: Annotated[int, said("How many stages there are", minimum=1)]
    approvers: list[str] = said("user:…, group:… or role:…; empty for whoever may decide at all")
    need: Annotated[int, said("How many different people must say yes", minimum=1)]
    approved_by: list[str] = said("Who did, in this stage")


class AccessRequestView(BaseModel):
    """An access request."""

    id: str = said("32 characters")
    tenant: Tenant
    subject: SubjectView
    action: str = said("What it is asked for")
    rule: str = said("What wants an approval: policy/rule, or the key of a limit")
    units_asked: dict[str, Count] = said("By feature")
    resource: ResourceView
    justification: str = said("Of whoever asks")
    state: RequestState = said("Approved also when the approval has ended since: see `live`")
    live: bool = said("The approval is in force")
    asked_at: Instant
    expires_at: Annotated[Instant, said("When it expires unless it is decided")]
    chain: str = said("The approval chain; empty for none")
    stage: StageView | None = said("Who decides now; null when nothing is pending")
    decided_by: str = said("Whose decision ended it; empty for nobody's")
    decided_at: Instant | None = said("When that was; null for never")
    reason: str = said("What whoever decided says")
    ends_at: Instant | None = said("The first instant after the approval; null for none")
    units: Amount | None = said("What the approval is for in all: units, money for a budget; null for any number")
    revision: Annotated[Revision, said("Of the license that last told sidecars of it")]


class AccessRequestPage(BaseModel):
    """Access requests, the last asked first."""

    items: list[AccessRequestView] = said("The last asked first")
    next_cursor: str | None = said("The `cursor` of the next page; null on the last")


def known_id(request_id: str) -> str:
    """The id in an address.

    Raises:
        RequestUnknown: nothing can have it.
    """
    if not _ID.fullmatch(request_id):
        raise RequestUnknown(request_id)
    return request_id


async def asked_for(
    request: Request, request_id: Annotated[str, Depends(known_id)], caller: CallerAsked
) -> StoredRequest:
    """The request in an address.

    Raises:
        RequestUnknown: there is none, or it is of a tenant that the caller does not reach.
    """
    found = await plane_of(request).database.read(store.get, request_id)
    if found is None or caller.tenant not in ("", found.request.tenant):
        raise RequestUnknown(request_id)
    return found


class DecidedCase:
    """What every decision has: the request it is about, and who decides. A dependency of routes with
    ``{request_id}``."""

    def __init__(
        self, request: Request, found: Annotated[StoredRequest, Depends(asked_for)], caller: CallerAsked
    ) -> None:
        plane = plane_of(request)
        self.desk = plane.access_desk
        self.id = found.request.id
        self.by = principal(caller.name, caller.role.value, caller.tenant, plane.config.approver_groups)
        self._now_us = plane.now_us

    def answer(self, made: StoredRequest) -> dict[str, Any]:
        """The request as it is now."""
        return described(made, self._now_us())


Case = Annotated[DecidedCase, Depends()]


@router.get("", response_model=AccessRequestPage)
async def list_requests(
    request: Request,
    tenant: TenantAsked,
    state: Annotated[RequestState | None, Query()] = None,
    cursor: Annotated[str, Query(max_length=64)] = "",
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100,
) -> dict[str, Any]:
    """Requests, the last asked first; of one tenant, or in one state."""
    plane = plane_of(request)
    now_us = plane.now_us()
    found = await plane.database.read(
        store.page,
        tenant=tenant,
        state=state.value if state else "",
        after=_cursor(cursor),
        limit=limit,
        now_us=now_us,
    )
    last = found[-1].request if len(found) == limit else None
    return {
        "items": [described(one, now_us) for one in found],
        "next_cursor": f"{last.asked_at}-{last.id}" if last else None,
    }


@router.get("/{request_id}", response_model=AccessRequestView)
async def get_request(request: Request, found: Annotated[StoredRequest, Depends(asked_for)]) -> dict[str, Any]:
    """One request."""
    return described(found, plane_of(request).now_us())


@router.post("/{request_id}/approve", response_model=AccessRequestView)
async def approve(body: Approval, case: Case) -> dict[str, Any]:
    """Say yes. Nobody approves their own request."""
    return case.answer(await case.desk.approve(case.id, case.by, body.terms(), body.reason))


@router.post("/{request_id}/deny", response_model=AccessRequestView)
async def deny(body: Reason, case: Case) -> dict[str, Any]:
    """Say no: one is enough."""
    return case.answer(await case.desk.deny(case.id, case.by, body.reason))


@router.post("/{request_id}/revoke", response_model=AccessRequestView)
async def revoke(body: Reason, case: Case) -> dict[str, Any]:
    """Take an approval back. What was used under it stays used."""
    return case.answer(await case.desk.revoke(case.id, case.by, body.reason))


def described(stored: StoredRequest, now_us: int) -> dict[str, Any]:
    """A request as the API shows it."""
    one = core.expired(stored.request, now_us)
    return {
        "id": one.id,
        "tenant": one.tenant,
        "subject": {"type": one.subject_type, "id": one.subject_id, "on_behalf_of": one.on_behalf_of},
        "action": one.action,
        "rule": one.rule,
        "units_asked": dict(one.units),
        "resource": {"type": one.resource_type, "id": one.resource_id},
        "justification": one.justification,
        "state": one.state.value,
        "live": one.state is RequestState.APPROVED and now_us < one.ends_at,
        "asked_at": format_us(one.asked_at),
        "expires_at": format_us(one.expires_at),
        "chain": one.chain,
        "stage": _stage(one) if one.state is RequestState.PENDING else None,
        "decided_by": one.decided_by,
        "decided_at": format_us(one.changed_at) if one.decided_by else None,
        "reason": one.reason,
        "ends_at": format_us(one.ends_at) if one.ends_at else None,
        "units": one.money_approved or one.units_approved or None,
        "revision": stored.revision,
    }


def _stage(one: AccessRequest) -> dict[str, Any]:
    stage = one.now_stage
    return {
        "number": one.stage + 1,
        "of": len(one.stages),
        "approvers": list(stage.approvers),
        "need": stage.need,
        "approved_by": list(one.votes),
    }


def _cursor(text: str) -> Cursor | None:
    if not text:
        return None
    at, _, id_ = text.partition("-")
    if not _DIGITS.fullmatch(at) or not _ID.fullmatch(id_):
        raise Problem(422, f"cursor: {text!r} is not one.", "Use the next_cursor of the page before.")
    return Cursor(int(at), id_)
