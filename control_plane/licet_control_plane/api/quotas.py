"""``/v1/tenants/{tenant}/quotas`` and ``/v1/sidecars/{sidecar}/reclaim``: what is counted, who holds it, and taking it
back.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict

from licet.domain.windows import FOREVER_S
from licet.wire.registers import parts_of_marker
from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.fields import Instant, SidecarId, Tenant, said, sometimes, unchecked
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_s
from licet_control_plane.changes import LicenseUnknown
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.counting import Counting, Kind, limit_key_of, limits_by_key, scope_values
from licet_control_plane.core.fleet import Sidecar
from licet_control_plane.core.quotas import QuotaView, view
from licet_control_plane.core.reclaim import SILENT_S_MIN, reclaim_wait_s
from licet_control_plane.core.suggestion import did_you_mean
from licet_control_plane.publisher.marks import quotas_to_keep
from licet_control_plane.publisher.reclaim import Outcome, Reclaimed
from licet_control_plane.publisher.registers import SealStatus
from licet_control_plane.store import ledger, licenses

router = v1_router(tag="quotas")

RECLAIM_S_MAX: Final = 5.0
"""For one request; the answer says where to go on."""
OUTCOMES_MAX: Final = 1_000
"""Registers in one answer, about; a page that was begun is finished."""
SCOPE_EVENTS_MAX: Final = 2_000
"""Newest events that are looked through for what a scope digest stands for: some 30 ms."""
SIDECAR_PREFIX_MIN: Final = 8


class QuotaWindow(BaseModel):
    """The time in which a quota counts."""

    per: str | None = said("minute, hour, day, week, month, year or term; null when no limit of that key is known")
    starts_at: Instant | None = said("When it begins")
    ends_at: Instant | None = said("When it ends; null for never, or when that is not known")


class HolderView(BaseModel):
    """What one sidecar holds of a quota. Units as those of the quota."""

    sidecar: SidecarId
    state: Literal["live", "silent", "dead", "gone", "unknown", "sealed"] = said("Of the sidecar, or of its register")
    silent_s: float | None = said("Seconds since it was heard of; null for never")
    granted: int = said("What it was leased in all")
    used: int = said("What it said that it used")
    reserved: int = said("What it said that reservations hold")
    unspent: int = said("Granted, and neither used nor reserved")
    last_call_at: Instant | None = said("When it last asked Redis; null for never")


class QuotaShown(BaseModel):
    """What is counted in one window of a limit or of a grant. Units of the feature; of a budget nanos of its currency,
    of a rate thousandths of a unit a second."""

    quota: str = said("Its name")
    limit: str = said("The key of the limit, or with +id of a grant on top of it")
    kind: Kind = said("What the numbers count")
    currency: str = said("Of a budget; empty for units and rates")
    scope: str = said("Digest of what it is counted apart for; empty for a limit without a scope")
    scope_values: dict[str, str] | None = said("What the digest stands for; null when that is not known")
    window: QuotaWindow
    lost: bool = said("Redis has nothing of it")
    amount: int | None = said("Of the limit; null when it is not published any more", minimum=0)
    used: int = said("What is used, as far as sidecars said")
    reserved: int = said("What reservations hold, as far as sidecars said")
    leased: int = said("What sidecars hold, and have not said that they used or reserved")
    remaining: int = said("What can still be leased")
    overage: int = said("What was used beyond the limit")
    leased_by_dead: int = said("Of `leased`: by sidecars that will not come back")
    folded: int = said("Of `used`: what is in no register any more")
    holders: list[HolderView] = said("The largest first")


class UntouchedLimit(BaseModel):
    """A limit of which nothing is counted now."""

    limit: str = said("Its key")
    amount: int = said("Of the limit")


class QuotaPage(BaseModel):
    """Quotas of a tenant."""

    tenant: Tenant
    phase: str = said("open; learning, after a loss; or missing, before the first publication")
    since: Instant | None = said("Since when it is in that phase; null while it is missing")
    epoch: int | None = said("Counts the losses of Redis; null while it is missing", minimum=0)
    revision: int = sometimes("Of the limits that are counted by; left out while they are missing", minimum=0)
    items: list[QuotaShown] = said("By name")
    untouched: list[UntouchedLimit] = said("Limits of which nothing is counted now, by key")
    next: str | None = said("The `after` of the next page; null on the last")


class OutcomeView(BaseModel):
    """What became of one register. Units as those of its quota."""

    tenant: Tenant
    quota: str = said("Its name")
    limit: str = said("The key of the limit or grant")
    status: Literal["would_seal", "sealed", "already", "none", "learning", "stale", "live"] = said(
        "Only what is `sealed` was taken back; `would_seal` on a dry run"
    )
    granted: int = said("What it was leased in all")
    used: int = said("What it said that it used")
    reserved: int = said("What it said that reservations hold")
    in_ledger: int = said("What the ledger has of it")
    counted: int = said("What goes on counting as used")
    freed: int = said("What can be leased again, or could")


class ReclaimedView(BaseModel):
    """What was taken back from a sidecar, or with ``dry_run`` would be."""

    sidecar: SidecarId
    dry_run: bool = said("Nothing was changed")
    wait_s: int = said("Seconds until it can be reclaimed; 0 for now", minimum=0)
    why_not: str = said("Why it must be waited for; empty for nothing")
    items: list[OutcomeView] = said("A register each")
    skipped: list[Tenant] = said("Tenants whose quotas are learning or lost: ask about them again")
    next: str | None = said("The `after` of the next request; null when everything was looked at")


@router.get("/tenants/{tenant}/quotas", response_model=QuotaPage)
async def list_quotas(
    request: Request,
    tenant: str,
    key: str = "",
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> Response:
    """Quotas of a tenant whose window takes calls, by name; ``key``: of one limit only, and of its grants."""
    plane = plane_of(request)
    stored = await plane.database.read(licenses.get, tenant)
    mark = (await plane.marks.read([tenant]))[tenant]
    if mark is None and stored is None:
        raise LicenseUnknown(tenant)
    if mark is None:
        return unchecked(
            {
                "tenant": tenant,
                "phase": "missing",
                "since": None,
                "epoch": None,
                "items": [],
                "untouched": [],
                "next": None,
            }
        )
    catalog = plane.publisher.catalog
    counting = Counting(stored.license if stored else None, catalog, limits_by_key(catalog))
    redis_now_s = await plane.registers.now_s()
    kept = {one.name: one for one in quotas_to_keep(mark, redis_now_s)}
    open_now = {name: one for name, one in kept.items() if _is_of(limit_key_of(one.marker), key)}
    if key and not open_now and not any(_is_of(name, key) for name in mark.amounts):
        names = {name for name in mark.amounts if "#" not in name}
        names |= {limit_key_of(one.marker) for one in kept.values()}
        raise Problem(400, f"{tenant} has no limit {key!r}.", did_you_mean(key, names))
    rest = sorted(name for name in open_now if name > after)
    page = rest[:limit]
    states = await plane.registers.read([(tenant, name) for name in page])
    scopes = await _scopes(plane, tenant, page, counting)
    items: list[dict[str, Any]] = []
    now_s = plane.now_s()
    touched = {limit_key_of(one.marker) for one in open_now.values()}
    for name, state in zip(page, states, strict=True):
        marker_name, start = open_now[name].marker, open_now[name].window_start
        limit_key, digest = parts_of_marker(marker_name)
        window = counting.window(limit_key, start, mark.markers.get(marker_name))
        seen = (
            view(state.base, state.sum, state.registers, plane.fleet.sidecars, now_s)
            if state
            else view(0, 0, {}, {}, now_s)
        )
        limit_ = counting.limit(limit_key)
        items.append(
            {
                "quota": name,
                "limit": limit_key,
                "kind": (counting.kind(limit_key) or Kind.UNITS).value,
                "currency": limit_.currency if limit_ else "",
                "scope": digest,
                "scope_values": scopes.get(digest) if digest else {},
                "window": {
                    "per": limit_.per.value if limit_ and "+" not in limit_key else None,
                    "starts_at": format_s(start),
                    "ends_at": None if window is None or window.end >= FOREVER_S else format_s(window.end),
                },
                "lost": state is None,
                **_counted(seen, mark.amounts.get(limit_key), now_s),
            }
        )
    return unchecked(
        {
            "tenant": tenant,
            "phase": mark.phase,
            "since": format_s(mark.since_ms / 1_000),
            "epoch": mark.pair.epoch,
            "revision": mark.revision,
            "items": items,
            "untouched": [
                {"limit": name, "amount": amount}
                for name, amount in sorted(mark.amounts.items())
                if name not in touched and "#" not in name and _is_of(name, key)
            ],
            "next": page[-1] if len(rest) > len(page) else None,
        }
    )


def _is_of(limit_key: str, key: str) -> bool:
    """Whether it is the limit that was asked for (``""``: all), or a grant on top of it."""
    return not key or limit_key == key or limit_key.startswith(f"{key}+")


class ReclaimOrder(BaseModel):
    """``tenant``: of this one only. ``after``: the ``next`` of the last answer. ``dry_run``: only say what is there."""

    model_config = ConfigDict(extra="forbid")

    tenant: str | None = None
    after: str = ""
    dry_run: bool = False


@router.post("/sidecars/{sidecar}/reclaim", response_model=ReclaimedView)
async def reclaim(request: Request, sidecar: str, body: ReclaimOrder, caller: CallerAsked) -> dict[str, Any]:
    """Take back what a sidecar that will not come back holds. Ask again with ``after`` while there is a ``next``."""
    plane = plane_of(request)
    name = _resolved(plane, sidecar)
    known = plane.fleet.sidecars.get(name)
    now_s = plane.now_s()
    wait_s = math.ceil(reclaim_wait_s(known, watched_s=plane.fleet.watched_s(now_s), now_s=now_s))
    why_not = _why_not(known, plane.fleet.watched_s(now_s), now_s) if wait_s else ""
    if wait_s and not body.dry_run:
        raise Problem(
            409,
            f"Sidecar {name} cannot be reclaimed yet: {why_not}.",
            f"If it is dead, ask again in {wait_s} s. If not, stop it: one that ends in order returns all by itself.",
        )
    catalog = plane.publisher.catalog
    if body.tenant is not None:
        if await plane.database.read(licenses.get, body.tenant) is None:
            raise LicenseUnknown(body.tenant)
        done = await plane.reclaimer.reclaim([name], [body.tenant], catalog, by=caller.name, dry_run=body.dry_run)
    else:
        done = await _pages(plane, name, body, by=caller.name)
        if not body.after and done.after is None and done.complete and not body.dry_run:
            await plane.fleet.retire([name], plane.now_s())
    if body.tenant is not None and body.tenant in done.skipped and not body.dry_run:
        raise Problem(
            409,
            f"The quotas of {body.tenant} are learning.",
            "Ask again in a minute: `licet status` shows who they wait for.",
        )
    return {
        "sidecar": name,
        "dry_run": body.dry_run,
        "wait_s": wait_s,
        "why_not": why_not,
        "items": [_outcome(outcome) for outcome in done.outcomes],
        "skipped": done.skipped,
        "next": done.after,
    }


def _why_not(known: Sidecar | None, watched_s: float, now_s: float) -> str:
    """Why a sidecar may still spend what it holds."""
    if known is not None and now_s - known.last_heard_s < SILENT_S_MIN:
        return f"it was heard of {now_s - known.last_heard_s:.0f} s ago, and may still spend what it holds"
    return (
        f"nobody listened until {watched_s:.0f} s ago, as Redis or the control plane was away, so that it may have been"
        f" alive meanwhile; it must be silent for {SILENT_S_MIN} s while somebody listens"
    )


async def _pages(plane: ControlPlane, sidecar: str, body: ReclaimOrder, *, by: str) -> Reclaimed:
    until_s = plane.now_s() + RECLAIM_S_MAX
    done = Reclaimed(after=body.after)
    while done.after is not None and len(done.outcomes) < OUTCOMES_MAX:
        page = await plane.reclaimer.page(
            [sidecar], plane.publisher.catalog, after=done.after, by=by, dry_run=body.dry_run
        )
        done.outcomes += page.outcomes
        done.skipped += page.skipped
        done.after = page.after
        if plane.now_s() >= until_s:
            break
    return done


async def _scopes(plane: ControlPlane, tenant: str, names: list[str], counting: Counting) -> dict[str, dict[str, str]]:
    """What the digests of these quotas stand for, as far as the newest events tell."""
    markers = (parts_of_marker(name.rpartition(":")[0]) for name in names)
    scoped = (key for key, digest in markers if digest)
    scopes = {limit.scope for key in scoped if (limit := counting.limit(key)) is not None}
    if not scopes:
        return {}
    events = await plane.database.read(
        ledger.newest_events, tenant, ledger_key=plane.ledger_key, limit=SCOPE_EVENTS_MAX
    )
    return scope_values(scopes, events)


def _resolved(plane: ControlPlane, given: str) -> str:
    """The full id of a sidecar that the registry knows; a unique beginning will do, as lists show only that."""
    if given in plane.fleet.sidecars or len(given) == 32:
        return given
    found = [name for name in plane.fleet.sidecars if name.startswith(given)]
    if len(given) < SIDECAR_PREFIX_MIN or len(found) > 1:
        raise Problem(
            422,
            f"{given!r} is not the id of one sidecar.",
            "Give all 32 digits: `licet sidecar list --json` shows them.",
        )
    if not found:
        raise Problem(404, f"No sidecar {given} was ever heard of.", "Look at `licet sidecar list`.")
    return found[0]


def _counted(seen: QuotaView, amount: int | None, now_s: float) -> dict[str, Any]:
    return {
        "amount": amount,
        "used": seen.used,
        "reserved": seen.reserved,
        "leased": seen.unspent,
        "remaining": seen.remaining(amount or 0),
        "overage": seen.overage(amount) if amount is not None else 0,
        "leased_by_dead": seen.unspent_dead,
        "folded": seen.folded,
        "holders": [
            {
                "sidecar": one.sidecar,
                "state": one.state,
                "silent_s": None if one.last_heard_s is None else round(now_s - one.last_heard_s, 3),
                "granted": one.register.granted,
                "used": one.register.used,
                "reserved": one.register.reserved,
                "unspent": one.unspent,
                "last_call_at": format_s(one.register.time_ms / 1_000) if one.register.time_ms else None,
            }
            for one in seen.holders
        ],
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    holding, sealed = outcome.holding, outcome.sealed
    status = "would_seal" if sealed is None else sealed.status.value.lower()
    is_sealed = sealed is not None and sealed.status is SealStatus.SEALED
    return {
        "tenant": holding.tenant,
        "quota": holding.quota,
        "limit": holding.limit,
        "status": status,
        "granted": sealed.granted if sealed and is_sealed else holding.register.granted,
        "used": sealed.used if sealed and is_sealed else holding.register.used,
        "reserved": sealed.reserved if sealed and is_sealed else holding.register.reserved,
        "in_ledger": holding.ledger_units,
        "counted": sealed.counted if sealed and is_sealed else holding.counted,
        "freed": outcome.freed,
    }
