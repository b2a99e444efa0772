"""``/v1/tenants/{tenant}/quotas`` and ``/v1/sidecars/{sidecar}/reclaim``: what is counted, who holds it, and taking it
back.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ConfigDict

from licet.domain.windows import FOREVER_S
from licet.wire.registers import parts_of_marker
from licet_control_plane.api.auth import Caller, authenticate, plane_of, v1_router
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


@router.get("/tenants/{tenant}/quotas")
async def list_quotas(
    request: Request,
    tenant: str,
    key: str = "",
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> dict[str, Any]:
    """Quotas of a tenant whose window takes calls, by name; ``key``: of one limit only, and of its grants."""
    plane = plane_of(request)
    stored = await plane.database.read(licenses.get, tenant)
    mark = (await plane.marks.read([tenant]))[tenant]
    if mark is None and stored is None:
        raise LicenseUnknown(tenant)
    if mark is None:
        return {
            "tenant": tenant,
            "phase": "missing",
            "since": None,
            "epoch": None,
            "items": [],
            "untouched": [],
            "next": None,
        }
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
    return {
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


def _is_of(limit_key: str, key: str) -> bool:
    """Whether it is the limit that was asked for (``""``: all), or a grant on top of it."""
    return not key or limit_key == key or limit_key.startswith(f"{key}+")


class ReclaimOrder(BaseModel):
    """``tenant``: of this one only. ``after``: the ``next`` of the last answer. ``dry_run``: only say what is there."""

    model_config = ConfigDict(extra="forbid")

    tenant: str | None = None
    after: str = ""
    dry_run: bool = False


@router.post("/sidecars/{sidecar}/reclaim")
async def reclaim(
    request: Request, sidecar: str, body: ReclaimOrder, caller: Annotated[Caller, Depends(authenticate)]
) -> dict[str, Any]:
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
