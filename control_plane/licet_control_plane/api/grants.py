"""``/v1/licenses/{tenant}/grants``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, StrictInt

from licet.domain.catalog import Grant
from licet_control_plane.api.amounts import Amount
from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.fields import Instant, Revision, Tenant, said
from licet_control_plane.api.times import format_s, parse_s
from licet_control_plane.changes import LicenseUnknown
from licet_control_plane.core.grants import PRIORITY_DEFAULT, GrantAsked, shown_amount, state_of
from licet_control_plane.store import licenses

router = v1_router("/licenses/{tenant}/grants", tag="grants")


class NewGrant(BaseModel):
    """A grant to add: an amount of one limit, until ``expires_at`` or for ``expires_after_s`` from its start."""

    model_config = ConfigDict(extra="forbid")

    limit: str
    amount: Amount
    id: str = ""
    starts_at: str | None = None
    expires_at: str | None = None
    expires_after_s: StrictInt | None = None
    priority: StrictInt = PRIORITY_DEFAULT

    def asked(self) -> GrantAsked:
        """As the core has it."""
        return GrantAsked(
            limit=self.limit,
            amount=self.amount,
            id=self.id,
            starts_s=None if self.starts_at is None else parse_s(self.starts_at, "starts_at"),
            ends_s=None if self.expires_at is None else parse_s(self.expires_at, "expires_at"),
            lasts_s=self.expires_after_s,
            priority=self.priority,
        )


class GrantView(BaseModel):
    """An amount on top of a limit, for a time."""

    id: str = said("Unique in its license")
    limit: str = said("The key of the limit, such as reports:monthly")
    amount: Amount = said("Units, or money for a budget")
    starts_at: Instant
    expires_at: Annotated[Instant, said("From then on it adds nothing")]
    priority: int = said("The lowest is used first")
    state: Literal["scheduled", "live", "expired"] = said("By the clock of the server")


class OfTenant(BaseModel):
    """Whose it is: first in an answer."""

    tenant: Tenant


class AddedGrant(GrantView, OfTenant):
    """A grant of a tenant."""

    revision: Annotated[Revision, said("Of the license with it")]


class GrantList(BaseModel):
    """The grants of a license, with those that ended lately."""

    items: list[GrantView] = said("In the order in which they were added")
    revision: Annotated[Revision, said("Of the license")]


class RevokedGrant(BaseModel):
    """A grant that was taken away."""

    tenant: Tenant
    id: str = said("Of the grant")
    revision: Annotated[Revision, said("Of the license without it")]


@router.post("", status_code=201, response_model=AddedGrant, responses={200: {"model": AddedGrant}})
async def add_grant(
    request: Request, response: Response, tenant: str, body: NewGrant, caller: CallerAsked
) -> dict[str, Any]:
    """Add a grant; 200 when it is there already, by its ``id``."""
    plane = plane_of(request)
    stored, grant, new = await plane.changes.add_grant(tenant, body.asked(), by=caller.name)
    if not new:
        response.status_code = 200
    return {"tenant": tenant, **described(grant, plane.now_s()), "revision": stored.revision}


@router.get("", response_model=GrantList)
async def list_grants(request: Request, tenant: str) -> dict[str, Any]:
    """The grants of a license, with those that ended lately."""
    plane = plane_of(request)
    stored = await plane.database.read(licenses.get, tenant)
    if stored is None:
        raise LicenseUnknown(tenant)
    now_s = plane.now_s()
    return {"items": [described(grant, now_s) for grant in stored.license.grants], "revision": stored.revision}


@router.delete("/{grant_id}", response_model=RevokedGrant)
async def revoke_grant(request: Request, tenant: str, grant_id: str, caller: CallerAsked) -> dict[str, Any]:
    """Take a grant away. What was used of it stays used."""
    stored = await plane_of(request).changes.revoke_grant(tenant, grant_id, by=caller.name)
    return {"tenant": tenant, "id": grant_id, "revision": stored.revision}


def described(grant: Grant, now_s: float) -> dict[str, Any]:
    """A grant as the API shows it."""
    return {
        "id": grant.id,
        "limit": grant.limit,
        "amount": shown_amount(grant.amount, grant.limit),
        "starts_at": format_s(grant.starts_s),
        "expires_at": format_s(grant.ends_s),
        "priority": grant.priority,
        "state": state_of(grant, now_s),
    }
