"""``/v1/ledger/verify``, ``…/checkpoint`` and ``…/reconcile``: what shows that the ledger is what was recorded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Generator
from dataclasses import asdict
from typing import Annotated, Any, Final

import structlog
from fastapi import Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.api.auth import plane_of, v1_router
from licet_control_plane.api.problems import Problem
from licet_control_plane.archive.files import ArchiveUnavailable
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.reconciling import Place, Sides, meaning
from licet_control_plane.reconciliation import Reconciled, Reconciliation
from licet_control_plane.redis_link import RedisRefused, RedisUnavailable
from licet_control_plane.store.checkpoints import Checkpoint
from licet_control_plane.store.database import DatabaseUnavailable
from licet_control_plane.store.verification import Progress, Verification, verify

router = v1_router(tag="proof")
log: Final = structlog.get_logger(__name__)

JSON_LINES: Final = "application/jsonl"
PROGRESS_S: Final = 0.5
CHECKPOINTS_MAX: Final = 100
"""That one verification is held to."""
PROCESSES: Final = 2
"""Of a verification: the drain wants processors too, and each takes some 60 MB of what the container has."""
_busy: Final = asyncio.Lock()
"""One verification at a time."""


class VerifyOrder(BaseModel):
    """``checkpoints``: signed documents, base64. ``public_keys``: of whom else, besides the server, signatures count.
    ``quick``: leave personal parts closed."""

    model_config = ConfigDict(extra="forbid")

    checkpoints: Annotated[list[str], Field(max_length=CHECKPOINTS_MAX)] = []
    public_keys: Annotated[list[str], Field(max_length=CHECKPOINTS_MAX)] = []
    quick: bool = False


@router.get("/ledger/verify")
async def verify_ledger(request: Request, quick: Annotated[bool, Query()] = False) -> dict[str, Any]:
    """Recount the whole ledger, and say what came out."""
    answer: dict[str, Any] = {}
    async for line in _verified(plane_of(request), VerifyOrder(quick=quick), []):
        answer = line
    if "result" not in answer:
        raise Problem(503, f"The ledger could not be read: {answer.get('error')}.", "Look at the database; ask again.")
    result: dict[str, Any] = answer["result"]
    return result


@router.post("/ledger/verify")
async def verify_ledger_with_progress(request: Request, body: VerifyOrder) -> StreamingResponse:
    """The same as JSON Lines: ``progress`` (``done``, ``of``) each half second, then ``result`` or ``error``."""
    plane = plane_of(request)
    given = _given(plane, body)
    if _busy.locked():
        raise Problem(409, "The ledger is being verified.", "Wait for it to end, and ask again.")

    async def lines() -> AsyncIterator[str]:
        async for line in _verified(plane, body, given):
            yield json.dumps(line) + "\n"

    return StreamingResponse(lines(), media_type=JSON_LINES)


class ReconcileOrder(BaseModel):
    """``tenant``: only the quotas of this one, and no archive."""

    model_config = ConfigDict(extra="forbid")

    tenant: str = ""


@router.post("/ledger/reconcile")
async def reconcile_ledger(request: Request, body: ReconcileOrder) -> StreamingResponse:
    """Compare the ledger with quota registers, sidecars' logs and the archive. JSON Lines: ``progress`` (``doing``,
    ``done``), then ``result`` or ``error``."""
    plane = plane_of(request)
    run = Reconciliation(
        plane.database,
        plane.marks,
        plane.registers,
        plane.fleet,
        archive=plane.config.archive_dir,
        deployment=plane.deployment,
        now_s=plane.now_s,
    )

    async def lines() -> AsyncIterator[str]:
        try:
            async for step in run.steps(tenant=body.tenant):
                line = {"result": _reconciled(step)} if isinstance(step, Reconciled) else {"progress": asdict(step)}
                yield json.dumps(line) + "\n"
        except (RedisUnavailable, RedisRefused, DatabaseUnavailable, ArchiveUnavailable) as error:
            yield json.dumps({"error": str(error)}) + "\n"

    return StreamingResponse(lines(), media_type=JSON_LINES)


def _reconciled(done: Reconciled) -> dict[str, Any]:
    return {
        "ok": done.ok,
        "tenants": done.tenants,
        "quotas": done.quotas,
        "differences": [_difference(place, sides) for place, sides in sorted(done.differences.items())],
        "in_flight": [_difference(place, sides) for place, sides in sorted(done.moving.items())],
        "learning": done.learning,
        "logs": [log._asdict() | {"what": what} for log, what in done.logs],
        "archive": None if done.archive is None else [asdict(one) for one in done.archive],
    }


def _difference(place: Place, sides: Sides) -> dict[str, Any]:
    return {
        "tenant": place.tenant,
        "quota": place.quota,
        "sidecar": place.holder or None,
        "register": sides.register,
        "ledger": sides.ledger,
        "difference": sides.register - sides.ledger,
        "what": meaning(sides),
    }


@router.get("/ledger/checkpoint")
async def checkpoint(request: Request) -> dict[str, Any]:
    """The heads of all chains, signed: the newest checkpoint, made now if anything was recorded since the last."""
    plane = plane_of(request)
    made = await plane.checkpointer.make()
    if made is None:
        raise Problem(404, "The ledger is empty: there is nothing to sign.", "Ask again once usage is recorded.")
    return made.as_json(plane.public_key)


def _given(plane: ControlPlane, body: VerifyOrder) -> list[Checkpoint]:
    given: list[Checkpoint] = []
    try:
        verifier = Verifier([*plane.key.public_keys, *body.public_keys])
    except ValueError as error:
        raise Problem(422, f"public_keys: {error}.", "Give keys as ed25519:<base64>, as in public-key.txt.") from error
    for text in body.checkpoints:
        try:
            given.append(Checkpoint.of(base64.b64decode(text, validate=True), verifier))
        except (VerificationError, binascii.Error) as error:
            raise Problem(
                422,
                f"checkpoints: {error}.",
                "Give the document of a checkpoint as it was made, and the public key if that was changed since.",
            ) from error
    return given


async def _verified(plane: ControlPlane, order: VerifyOrder, given: list[Checkpoint]) -> AsyncIterator[dict[str, Any]]:
    """Progress, then the result or an error."""
    async with _busy:
        steps = verify(
            plane.config.database,
            None if order.quick else plane.ledger_key,
            Verifier([*plane.key.public_keys, *order.public_keys]),
            given=given,
            processes=PROCESSES,
        )
        loop = asyncio.get_running_loop()
        said_s = 0.0
        try:
            while True:
                step = await asyncio.to_thread(_next, steps)
                if isinstance(step, Verification):
                    yield {"result": step.as_json()}
                    return
                if step is None:
                    return
                if loop.time() - said_s >= PROGRESS_S:
                    said_s = loop.time()
                    yield {"progress": step._asdict()}
        except (SQLAlchemyError, OSError) as error:
            log.error("the ledger could not be verified", reason=str(error))
            yield {"error": f"{type(error).__name__}: {error}"}
        finally:
            # Also when nobody listens any more: the processes must not go on by themselves.
            await asyncio.shield(asyncio.to_thread(_end, steps))


def _next(steps: Generator[Progress | Verification, None, None]) -> Progress | Verification | None:
    return next(steps, None)


def _end(steps: Generator[Progress | Verification, None, None]) -> None:
    """Close ``steps``, once the step that is under way in another thread has ended."""
    while True:
        try:
            steps.close()
            return
        except ValueError:  # it is being executed
            time.sleep(0.05)
