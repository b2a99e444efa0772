"""``/v1/status``, ``/v1/sidecars``, and what needs no key: ``/healthz``, ``/readyz``, ``/metrics``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from licet_control_plane.api.auth import plane_of, v1_router
from licet_control_plane.api.fields import Count, Generation, Instant, Revision, Seq, SidecarId, said, sometimes
from licet_control_plane.api.openapi import described_router
from licet_control_plane.api.times import format_us
from licet_control_plane.store import meta
from licet_control_plane.store.database import DatabaseUnavailable
from licet_control_plane.telemetry import CONTENT_TYPE

HEAD_AGE_S_MAX: Final = 10.0
"""Heads go out each second; ten missed, and sidecars will soon answer stale."""

open_router = described_router(tag="probes")
router = v1_router(tag="status")


class Alive(BaseModel):
    """The process serves."""

    status: Literal["ok"] = said("Whoever is answered this reached the process")


class ReadyCheck(BaseModel):
    """One thing that must work."""

    ok: bool = said("It works")
    state: str = sometimes("Of the publisher: publishing, standby and so on")
    revision: int = sometimes("Of the publisher: the newest that was published", minimum=0)
    reason: str = sometimes("Why it does not work")
    warning: str = sometimes("What is wrong although it works")
    fix: str = sometimes("What to do")


class Readiness(BaseModel):
    """Whether changes are published and usage is drained."""

    ready: bool = said("All of `checks` are ok")
    checks: dict[str, ReadyCheck] = said("By name: database, redis, publisher, drain")


class RedisView(BaseModel):
    """Redis."""

    connected: bool = said("It answers")
    run_id: str = said("Of the Redis process; empty while it was never reached")
    warning: str | None = said("What it may lose as it is configured; null for nothing")


class DrainView(BaseModel):
    """The usage streams."""

    backlog: Annotated[Count, said("Batches that wait in Redis")]
    held: Annotated[Count, said("Batches that stay there, as dead letters are full")]


class LedgerView(BaseModel):
    """What needs somebody to decide."""

    dead_letters: Annotated[Count, said("Batches that could not be recorded")]
    conflicts: Annotated[Count, said("Events that came again with other content")]


class PublisherView(BaseModel):
    """What publishes changes."""

    state: str = said("starting, publishing, standby, waiting or stopped")
    reason: str = said("Why it does not publish; empty when it does")
    fix: str = said("What to do; empty for nothing")


class LearningView(BaseModel):
    """Quotas that are learned again after a loss."""

    tenants: Annotated[Count, said("Whose quotas are learning")]
    waiting_for: list[SidecarId] = said("Sidecars that have not said what they hold")


class StatusView(BaseModel):
    """The deployment at a glance."""

    deployment: str = said("Its id")
    generation: Generation
    revision: Annotated[Revision, said("The newest that was published")]
    redis: RedisView
    epoch: int = said("Counts the losses of Redis", minimum=0)
    sidecars_live: Count
    drain: DrainView
    ledger: LedgerView
    publisher: PublisherView
    learning: LearningView


class SidecarView(BaseModel):
    """A sidecar as its last heartbeat said."""

    sidecar: SidecarId
    address: str = said("Where it serves decisions")
    hostname: str = said("Of its machine or pod")
    version: str = said("Of Licet")
    revision: Annotated[Revision, said("By which it decides")]
    generation: Generation
    as_of: Instant | None = said("How new what it knows is; null for never")
    ready: bool = said("It serves")
    draining: bool = said("It is about to end")
    last_heard_s: float = said("Seconds since the heartbeat", minimum=0)
    incarnation: int = said("Counts its starts with a new log", minimum=0)
    log_last_seq: Annotated[Seq, said("The last event in its log")]
    log_acked_seq: Annotated[Seq, said("The last that is acknowledged")]
    log_bytes: int = said("Bytes of its log on disk", minimum=0)
    tenants_held: Annotated[Count, said("Licenses that it keeps in memory")]
    state: Literal["live", "silent", "gone"] = said("Gone: it signed off, or was reclaimed")


class SidecarList(BaseModel):
    """Every sidecar that was ever heard of."""

    items: list[SidecarView] = said("By id")


@open_router.get("/healthz", response_model=Alive)
async def healthz() -> dict[str, str]:
    """The process serves."""
    return {"status": "ok"}


@open_router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(request: Request) -> JSONResponse:
    """Whether changes are published and usage is drained; if not, why not, and what to do."""
    plane = plane_of(request)
    status = plane.publisher.status
    checks: dict[str, dict[str, Any]] = {"database": {"ok": True}}
    try:
        await plane.database.read(meta.read)
    except DatabaseUnavailable as error:
        checks["database"] = {"ok": False, "reason": str(error)}
    checks["redis"] = {"ok": status.connected}
    if not status.connected:
        checks["redis"] |= {"reason": status.reason, "fix": status.fix}
    elif status.keeping.warning:
        checks["redis"] |= {"warning": status.keeping.warning}
    # One that stands by does all it is there for.
    publishing = status.state == "standby" or (
        status.state == "publishing" and plane.now_s() - status.heads_at_s < HEAD_AGE_S_MAX
    )
    checks["publisher"] = {"ok": publishing, "state": status.state, "revision": status.revision}
    if not publishing:
        reason = status.reason or "the last head is more than ten seconds old"
        checks["publisher"] |= {"reason": reason, "fix": status.fix}
    checks["drain"] = {"ok": not plane.drain.trouble}
    if plane.drain.trouble:
        checks["drain"] |= {"reason": next(iter(plane.drain.trouble.values()))}
    elif any(plane.drain.held.values()):
        checks["drain"] |= {
            "warning": "dead letters are full: batches that cannot be read stay in the usage streams",
            "fix": "Look at `licet usage dead-letters list`, then retry or drop.",
        }
    ready = all(check["ok"] for check in checks.values())
    return JSONResponse({"ready": ready, "checks": checks}, 200 if ready else 503)


@open_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(await asyncio.to_thread(plane_of(request).metrics.render), media_type=CONTENT_TYPE)


@router.get("/status", response_model=StatusView)
async def status(request: Request) -> dict[str, Any]:
    """The deployment at a glance."""
    plane = plane_of(request)
    row = await plane.database.read(meta.read)
    publisher = plane.publisher.status
    return {
        "deployment": row.deployment,
        "generation": row.generation,
        "revision": publisher.revision,
        "redis": {
            "connected": publisher.connected,
            "run_id": publisher.run_id,
            "warning": publisher.keeping.warning or None,
        },
        "epoch": row.epoch,
        "sidecars_live": plane.fleet.live_count(plane.now_s()),
        "drain": {"backlog": sum(plane.drain.backlog.values()), "held": sum(plane.drain.held.values())},
        "ledger": {"dead_letters": plane.drain.dead_letters.letters, "conflicts": plane.drain.conflicts_kept},
        "publisher": {"state": publisher.state, "reason": publisher.reason, "fix": publisher.fix},
        "learning": {"tenants": len(plane.quotas.learning), "waiting_for": publisher.waited_for},
    }


@router.get("/sidecars", response_model=SidecarList)
async def sidecars(request: Request) -> dict[str, Any]:
    """Every sidecar that was ever heard of, by id."""
    plane = plane_of(request)
    now_s = plane.now_s()
    items = []
    for name, sidecar in sorted(plane.fleet.sidecars.items()):
        beat = sidecar.heartbeat
        items.append(
            {
                "sidecar": name,
                "address": beat.address,
                "hostname": beat.hostname,
                "version": beat.version,
                "revision": beat.revision,
                "generation": beat.generation,
                "as_of": format_us(beat.as_of_us) if beat.as_of_us else None,
                "ready": beat.ready,
                "draining": beat.draining,
                "last_heard_s": round(now_s - sidecar.last_heard_s, 3),
                "incarnation": beat.incarnation,
                "log_last_seq": beat.log_last_seq,
                "log_acked_seq": beat.log_acked_seq,
                "log_bytes": beat.log_bytes,
                "tenants_held": beat.tenants_held,
                "state": sidecar.state(now_s).value,
            }
        )
    return {"items": items}
