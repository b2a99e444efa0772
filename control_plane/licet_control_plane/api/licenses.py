"""``/v1/licenses``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, StrictInt

from licet.domain.catalog import License, LicenseStatus
from licet_control_plane.api import grants
from licet_control_plane.api.amounts import Amount
from licet_control_plane.api.auth import Caller, TenantAsked, authenticate, plane_of, v1_router
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_s, format_us, parse_s
from licet_control_plane.changes import LicenseUnknown
from licet_control_plane.core.grants import shown_amount
from licet_control_plane.store import licenses
from licet_control_plane.store.licenses import StoredLicense

router = v1_router("/licenses")


class LicenseChange(BaseModel):
    """Fields to replace; one that is left out stays as it is. An override is units, or money for a budget."""

    model_config = ConfigDict(extra="forbid")

    plan: str | None = None
    status: LicenseStatus | None = None
    starts_at: str | None = None
    ends_at: str | None = None
    addons: dict[str, StrictInt] | None = None
    overrides: dict[str, Amount] | None = None

    def fields(self) -> dict[str, Any]:
        """The fields that were sent, as a license has them. ``null`` for a time means none."""
        sent: dict[str, Any] = {}
        for name in self.model_fields_set:
            value = getattr(self, name)
            match name:
                case "starts_at":
                    sent["starts_s"] = parse_s(value, name) if value else 0
                case "ends_at":
                    sent["ends_s"] = parse_s(value, name) if value else 0
                case "addons" | "overrides":
                    sent[name] = value or {}
                case "plan" | "status" if value is not None:
                    sent[name] = value
        return sent


class NewLicense(LicenseChange):
    """A license to create."""

    tenant: str
    plan: str

    def license(self) -> License:
        """As the domain has it."""
        terms = {name: value for name, value in self.fields().items() if name != "overrides"}
        return License(**{"tenant": self.tenant, **terms})


@router.post("", status_code=201)
async def create_license(
    request: Request, response: Response, body: NewLicense, caller: Annotated[Caller, Depends(authenticate)]
) -> dict[str, Any]:
    """Give a tenant its license."""
    plane = plane_of(request)
    caller.confine(body.tenant)
    stored = await plane.changes.create_license(body.license(), by=caller.name, overrides=body.overrides)
    response.headers["Location"] = f"/v1/licenses/{stored.license.tenant}"
    response.headers["ETag"] = _etag(stored)
    return described(stored, plane.now_s())


@router.get("")
async def list_licenses(
    request: Request,
    tenant: TenantAsked,
    plan: str = "",
    status: str = "",
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> dict[str, Any]:
    """Licenses by tenant; ``next`` is the ``after`` of the next page, ``null`` on the last."""
    plane = plane_of(request)
    page = await plane.database.read(
        licenses.page, tenant=tenant, plan=plan, status=status, after=after, limit=limit + 1
    )
    following = page[limit - 1].license.tenant if len(page) > limit else None
    return {"items": [described(stored, plane.now_s()) for stored in page[:limit]], "next": following}


@router.get("/{tenant}")
async def get_license(request: Request, response: Response, tenant: str) -> dict[str, Any]:
    """One tenant's license; its ETag goes into ``If-Match`` of a change."""
    plane = plane_of(request)
    stored = await plane.database.read(licenses.get, tenant)
    if stored is None:
        raise LicenseUnknown(tenant)
    response.headers["ETag"] = _etag(stored)
    return described(stored, plane.now_s())


@router.patch("/{tenant}")
async def update_license(
    request: Request,
    response: Response,
    tenant: str,
    body: LicenseChange,
    caller: Annotated[Caller, Depends(authenticate)],
    if_match: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    """Replace some fields."""
    plane = plane_of(request)
    stored = await plane.changes.update_license(
        tenant, body.fields(), if_revision=_revision_of(if_match), by=caller.name
    )
    response.headers["ETag"] = _etag(stored)
    return described(stored, plane.now_s())


def described(stored: StoredLicense, now_s: float) -> dict[str, Any]:
    """A license as the API shows it."""
    license_ = stored.license
    return {
        "tenant": license_.tenant,
        "plan": license_.plan,
        "status": license_.status.value,
        "starts_at": format_s(license_.starts_s or None),
        "ends_at": format_s(license_.ends_s or None),
        "addons": dict(license_.addons),
        "overrides": {key: shown_amount(amount, key) for key, amount in license_.overrides.items()},
        "grants": [grants.described(grant, now_s) for grant in license_.grants],
        "revision": stored.revision,
        "updated_at": format_us(stored.updated_at_us),
    }


def _etag(stored: StoredLicense) -> str:
    return f'"{stored.revision}"'


def _revision_of(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    tag = if_match.strip().removeprefix("W/").strip('"')
    if not tag.isdigit():
        raise Problem(412, f"If-Match {if_match!r} is not an ETag of a license.", "Send the ETag as it was given.")
    return int(tag)
