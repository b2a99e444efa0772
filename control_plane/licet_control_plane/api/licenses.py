"""``/v1/licenses``."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import Annotated, Any, Final, Literal

from fastapi import Depends, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from licet.domain.catalog import License, LicenseStatus
from licet.domain.windows import Period
from licet_control_plane.api import grants
from licet_control_plane.api.amounts import Amount
from licet_control_plane.api.auth import CallerAsked, TenantAsked, plane_of, v1_router
from licet_control_plane.api.fields import Count, Instant, Revision, Tenant, said
from licet_control_plane.api.grants import GrantView
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_s, format_us, parse_s
from licet_control_plane.changes import OUTCOMES, ImportRefused, LicenseUnknown, Step
from licet_control_plane.core.grants import shown_amount, state_of
from licet_control_plane.core.license_version import TERMS_DIGITS, SeenLicense, terms_digest
from licet_control_plane.core.lifecycle import GRACE_S_MAX, Stage, stage_of, with_fields
from licet_control_plane.store import licenses
from licet_control_plane.store.licenses import StoredLicense

IMPORTED_MAX: Final = 500
"""Licenses of one import: they are written in one transaction, in which nobody else writes."""

_IF_MATCH: Final = "Only when nobody edited the license since it had one of these ETags; `*`: only when there is one"
_TAG: Final = re.compile(
    rf'(?:W/)?"(?P<revision>[0-9]{{1,18}})(-(?P<terms>[0-9a-f]{{{TERMS_DIGITS}}}))?(-[0-9a-f]{{8}})?"'
)
"""An ETag of a license, see ``etag_of``; or the revision alone, which every answer has."""

router = v1_router("/licenses", tag="licenses")


class LicenseChange(BaseModel):
    """Fields to replace; one that is left out stays as it is. An override is units, or money for a budget."""

    model_config = ConfigDict(extra="forbid")

    plan: str | None = None
    status: LicenseStatus | None = None
    starts_at: str | None = None
    ends_at: str | None = None
    addons: dict[str, StrictInt] | None = None
    overrides: dict[str, Amount] | None = None
    grace_s: StrictInt | None = Field(None, ge=0, le=GRACE_S_MAX)
    renewal_period: Literal["day", "week", "month", "year"] | None = None
    auto_renew: StrictBool | None = None

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
                case "renewal_period":
                    sent["period"] = None if value is None else Period(value)
                case "auto_renew":
                    sent["auto"] = bool(value)
                case "grace_s":
                    sent[name] = value or 0
                case "plan" | "status" if value is not None:
                    sent[name] = value
        return sent


class NewLicense(LicenseChange):
    """A license to create."""

    tenant: str
    plan: str

    def license(self, now_s: float) -> License:
        """As the domain has it."""
        return with_fields(License(self.tenant, self.plan), self.fields(), now_s)


class WholeLicense(LicenseChange):
    """All of a license. What is left out is as in a new one; but ``status`` and ``ends_at``, which move by themselves,
    stay as they are. Grants stay."""

    plan: str

    def fields(self) -> dict[str, Any]:
        """Every field that is replaced."""
        new = {"starts_s": 0, "addons": {}, "overrides": {}, "grace_s": 0, "period": None, "auto": False}
        return {**new, **super().fields()}


class LicenseToImport(WholeLicense):
    """A tenant and its license."""

    tenant: str


class LicensesToImport(BaseModel):
    """Each tenant once. ``dry_run``: everything is checked, and nothing changed."""

    model_config = ConfigDict(extra="forbid")

    licenses: list[LicenseToImport] = Field(min_length=1, max_length=IMPORTED_MAX)
    dry_run: StrictBool = False


class LicenseImported(BaseModel):
    """What became of one. With ``dry_run`` ``revision`` is one that it does not get."""

    tenant: Tenant
    outcome: Literal["created", "changed", "unchanged"] = said("What became of it, or would")
    revision: Annotated[Revision, said("Of the license now")]


class LicensesImported(BaseModel):
    """All of them, how many were what, and the newest revision."""

    items: list[LicenseImported] = said("In the order in which they were sent")
    created: Count
    changed: Count
    unchanged: Count
    revision: Annotated[Revision, said("The newest of them")]
    dry_run: bool = said("Nothing was changed")


class PlannedView(BaseModel):
    """A change of plan that is to come."""

    plan: str = said("The plan that it will have")
    at: Instant


class LicenseView(BaseModel):
    """A license. ``stage`` follows from its status, its term and the clock; ``revision`` published it."""

    tenant: Tenant
    plan: str = said("The name of its plan")
    status: LicenseStatus = said("As it was set")
    stage: Stage = said("Where it is in its life, by the clock of the server")
    starts_at: Instant | None = said("When the term begins; null for always")
    ends_at: Instant | None = said("When the term ends, exclusive; null for never")
    grace_s: int = said("Seconds after the end in which it goes on answering", minimum=0, maximum=GRACE_S_MAX)
    grace_ends_at: Instant | None = said("When it stops answering; null without grace")
    renewal_period: Literal["day", "week", "month", "year"] | None = said("By which it is renewed; null for none")
    auto_renew: bool = said("It is renewed by itself, an hour before its end")
    cancels: bool = said("It ends with its term, without renewal and grace")
    planned: PlannedView | None = said("A change of plan that is to come; null for none")
    addons: dict[str, Annotated[Count, said("How often it is held")]] = said("Add-on plans by name")
    overrides: dict[str, Amount] = said("Amounts of limits by key instead of the plan's: units, or money for a budget")
    grants: list[GrantView] = said("With those that ended lately")
    revision: Revision
    updated_at: Annotated[Instant, said("When it was last changed")]


class LicensePage(BaseModel):
    """Licenses by tenant. ``next`` is the ``after`` of the next page, ``null`` on the last."""

    items: list[LicenseView] = said("By tenant")
    next: str | None = said("The `after` of the next page; null on the last")


class LicenseEdit:
    """What every change of one license has: who makes it, of which state, and where the answer's ETag goes. A
    dependency of routes with ``{tenant}``."""

    def __init__(
        self,
        request: Request,
        response: Response,
        tenant: str,
        caller: CallerAsked,
        if_match: Annotated[str | None, Header(description=_IF_MATCH)] = None,
    ) -> None:
        self.changes = plane_of(request).changes
        self.now_s = plane_of(request).now_s
        self.tenant = tenant
        self.by = caller.name
        self.seen = seen_of(if_match)
        self.must_exist = if_match is not None
        self._response = response

    async def alter(self, step: Step, *, action: str) -> dict[str, Any]:
        """Take the license one step on, and answer with what it is then.

        Raises:
            LicenseUnknown, RevisionMoved, ChangeInvalid: as ``Changes.alter_license``; and whatever ``step`` raises.
        """
        return self.answer(
            await self.changes.alter_license(self.tenant, step, action=action, if_seen=self.seen, by=self.by)
        )

    def answer(self, stored: StoredLicense) -> dict[str, Any]:
        """The license as the API shows it, with its ETag."""
        now_s = self.now_s()
        self._response.headers["ETag"] = etag_of(stored, now_s)
        return described(stored, now_s)


Edit = Annotated[LicenseEdit, Depends()]


@router.post("", status_code=201, response_model=LicenseView)
async def create_license(request: Request, response: Response, body: NewLicense, caller: CallerAsked) -> dict[str, Any]:
    """Give a tenant its license."""
    plane = plane_of(request)
    caller.confine(body.tenant)
    stored = await plane.changes.create_license(body.license(plane.now_s()), by=caller.name, overrides=body.overrides)
    response.headers["Location"] = f"/v1/licenses/{stored.license.tenant}"
    response.headers["ETag"] = etag_of(stored, plane.now_s())
    return described(stored, plane.now_s())


@router.get("", response_model=LicensePage)
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


@router.post("/import", response_model=LicensesImported)
async def import_licenses(request: Request, body: LicensesToImport, caller: CallerAsked) -> dict[str, Any]:
    """Make many licenses what the body says, all or none: each as ``PUT /v1/licenses/{tenant}`` would."""
    plane = plane_of(request)
    for row in body.licenses:
        caller.confine(row.tenant)
    rows = [(row.tenant, row.fields()) for row in body.licenses]
    try:
        imported = await plane.changes.import_licenses(rows, dry_run=body.dry_run, by=caller.name)
    except ImportRefused as refused:
        errors = [
            {"file": "", "line": 0, "column": 0, "path": f"licenses.{one.place}.{one.field}"}
            | {"message": one.message, "fix": one.fix, "tenant": rows[one.place][0]}
            for one in refused.refusals
        ]
        first = refused.refusals[0]
        raise Problem(
            422,
            f"{len(errors)} of {len(rows)} licenses cannot be, so nothing was changed. The first: "
            f"{rows[first.place][0]}: {first.message}.",
            first.fix,
            errors=errors,
        ) from refused
    counts = Counter(one.outcome for one in imported)
    return {
        "items": [{"tenant": one.tenant, "outcome": one.outcome, "revision": one.revision} for one in imported],
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "revision": max(one.revision for one in imported),
        "dry_run": body.dry_run,
    }


@router.get("/{tenant}", response_model=LicenseView)
async def get_license(request: Request, response: Response, tenant: str) -> dict[str, Any]:
    """One tenant's license; its ETag goes into ``If-Match`` of a change."""
    plane = plane_of(request)
    stored = await plane.database.read(licenses.get, tenant)
    if stored is None:
        raise LicenseUnknown(tenant)
    response.headers["ETag"] = etag_of(stored, plane.now_s())
    return described(stored, plane.now_s())


@router.put("/{tenant}", response_model=LicenseView, responses={201: {"model": LicenseView}})
async def put_license(
    response: Response, body: WholeLicense, edit: Edit, if_none_match: Annotated[str | None, Header()] = None
) -> dict[str, Any]:
    """Make a tenant's license what the body says: 201 when it is new. ``If-None-Match: *``: only then."""
    stored, new = await edit.changes.put_license(
        edit.tenant,
        body.fields(),
        if_seen=edit.seen,
        must_exist=edit.must_exist,
        only_new=if_none_match is not None and if_none_match.strip() == "*",
        by=edit.by,
    )
    response.status_code = 201 if new else 200
    return edit.answer(stored)


@router.patch("/{tenant}", response_model=LicenseView)
async def update_license(body: LicenseChange, edit: Edit) -> dict[str, Any]:
    """Replace some fields."""
    return edit.answer(await edit.changes.update_license(edit.tenant, body.fields(), if_seen=edit.seen, by=edit.by))


def described(stored: StoredLicense, now_s: float) -> dict[str, Any]:
    """A license as the API shows it."""
    license_ = stored.license
    return {
        "tenant": license_.tenant,
        "plan": license_.plan,
        "status": license_.status.value,
        "stage": stage_of(license_, now_s).value,
        "starts_at": format_s(license_.starts_s or None),
        "ends_at": format_s(license_.ends_s or None),
        "grace_s": license_.grace_s,
        "grace_ends_at": format_s(license_.stops_s) if license_.stops_s > license_.ends_s else None,
        "renewal_period": license_.renewal.period.value if license_.renewal else None,
        "auto_renew": license_.renews_itself,
        "cancels": license_.cancels,
        "planned": {"plan": license_.planned.plan, "at": format_s(license_.planned.at_s)} if license_.planned else None,
        "addons": dict(license_.addons),
        "overrides": {key: shown_amount(amount, key) for key, amount in license_.overrides.items()},
        "grants": [grants.described(grant, now_s) for grant in license_.grants],
        "revision": stored.revision,
        "updated_at": format_us(stored.updated_at_us),
    }


def etag_of(stored: StoredLicense, now_s: float) -> str:
    """The ETag of a license: its revision, a digest of its terms, and one of what in it follows from the clock."""
    clocked = [stage_of(stored.license, now_s).value, *(state_of(grant, now_s) for grant in stored.license.grants)]
    digest = hashlib.sha256(",".join(clocked).encode()).hexdigest()[:8]
    return f'"{stored.revision}-{terms_digest(stored.license)}-{digest}"'


def seen_of(if_match: str | None) -> tuple[SeenLicense, ...] | None:
    """The states of a license that ``If-Match`` asks for; ``None`` for any. A tag that is none of a license matches
    nothing.

    Source: RFC 9110, 13.1.1; but weak ones match too, as what compresses answers makes them of ours.
    """
    if if_match is None or if_match.strip() == "*":
        return None
    found = (_TAG.fullmatch(tag.strip()) for tag in if_match.split(","))
    # The part of the clock does not count: whoever changes a license need not know that meanwhile, say, a grant ended.
    return tuple(SeenLicense(int(tag["revision"]), tag["terms"] or "") for tag in found if tag)
