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
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.api.auth import plane_of, v1_router
from licet_control_plane.api.fields import (
    Base64,
    Count,
    Generation,
    Instant,
    LogId,
    Seq,
    Sha256,
    SidecarId,
    said,
    sometimes,
)
from licet_control_plane.api.json_lines import JsonLines, lines_of
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


class LogView(BaseModel):
    """A log as the ledger has it."""

    log_id: LogId
    sidecar: SidecarId
    incarnation: int = said("Counts the starts with a new log, from 1", minimum=0)
    watermark: Annotated[Seq, said("Everything up to this number is recorded or declared lost")]
    events: Annotated[Count, said("In the ledger")]


class GapView(BaseModel):
    """Events that a sidecar numbered and the ledger does not have."""

    log_id: LogId
    from_seq: Annotated[Seq, said("The first of them")]
    to_seq: Annotated[Seq, said("The last of them")]
    why: str = said("What is known of it")


class FindingView(BaseModel):
    """Something that is not as it was recorded."""

    shard: int | None = said("Of the chain, from 0; null when it is about none in particular")
    block: int = said("From 1; 0 when it is about none")
    log_id: str = said("The log; empty when it is about none")
    seq: int = said("The event; 0 when it is about none")
    kind: str = said("What kind of fault, for programs")
    what: str = said("What is wrong")


class ChainHead(BaseModel):
    """The end of one chain."""

    shard: Annotated[int, said("Which chain, from 0", minimum=0)]
    block: Annotated[int, said("Its last block, from 1", minimum=0)]
    hash: Annotated[Sha256, said("Of that block")]


class VerificationView(BaseModel):
    """Whether the ledger is whole."""

    ok: bool = said("Nothing is missing, altered, contested, or billed otherwise than recorded")
    events: Count
    blocks: Count
    logs: list[LogView] = said("Every log")
    gaps: list[GapView] = said("Events that are missing, and were not declared lost")
    lost: list[GapView] = said("Events that their sidecar declared lost")
    dropped: dict[str, Count] = said("By month: events that left the ledger as signed exports say")
    conflicts: Annotated[Count, said("Events that came again with other content")]
    rollups_match: bool = said("Every sum is that of its events")
    findings: list[FindingView] = said("The first of them, by shard and block")
    findings_total: Annotated[Count, said("How many there are")]
    heads: list[ChainHead] = said("The ends of all chains")
    erased_events: Annotated[Count, said("Whose personal part was erased")]
    erased_subjects: Count
    opened: bool = said("Personal parts were opened too")
    checkpoints: Annotated[Count, said("Signed ones that the chains were held to")]


class EventsDone(BaseModel):
    """How far it is."""

    done: Annotated[Count, said("Events that were looked at")]
    of: Annotated[Count, said("How many there are")]


class VerificationLine(BaseModel):
    """One of the three: how far it is, or at the end what came out, or why nothing did."""

    progress: EventsDone = sometimes("Each half second")
    result: VerificationView = sometimes("What came out")
    error: str = sometimes("Why it ended without a result")


class CheckpointView(BaseModel):
    """The heads of all chains, signed. Only ``document`` counts: the rest is what it says."""

    kind: str = said("What the file is, for programs")
    number: Annotated[int, said("Checkpoints are numbered from 1", minimum=1)]
    deployment: str = said("Whose ledger it is")
    generation: Generation
    at: Instant
    heads: list[ChainHead] = said("The ends of all chains")
    public_key: str = said("Whose signature it has: ed25519: and base64")
    document: Annotated[Base64, said("What is signed, with its signature")]


class QuotaDifference(BaseModel):
    """A number that is kept twice and differs, in units of the limit."""

    tenant: str = said("The tenant")
    quota: str = said("The name of the quota")
    sidecar: SidecarId | None = said("Who holds it; null for what is in no register any more")
    register_: int = Field(
        alias="register",
        description="Units by the register in Redis: of used and granted, whichever is closer",
    )
    ledger: int = said("Units by the ledger")
    difference: int = said("`register` less `ledger`")
    what: str = said("What that means")


class LogDifference(BaseModel):
    """A log that the sidecar and the ledger do not have alike."""

    log_id: LogId
    last_seq: Annotated[Seq, said("The last event, by the sidecar")]
    acked_seq: Annotated[Seq, said("The last that the ledger acknowledged, by the sidecar")]
    watermark: Annotated[Seq, said("Up to where the ledger has everything")]
    what: str = said("What that means")


class ArchiveDifferenceView(BaseModel):
    """Something that the archive and the ledger do not have in common."""

    shard: Annotated[int, said("Of the chain, from 0", minimum=0)]
    log_id: str = said("The log; empty when it is about the whole shard")
    what: str = said("What differs")


class ReconciledView(BaseModel):
    """What ledger, registers, logs and archive say of the same usage."""

    ok: bool = said("Nothing differs that should not")
    tenants: Annotated[Count, said("That were looked at")]
    quotas: Annotated[Count, said("That were looked at")]
    differences: list[QuotaDifference] = said("Those that count, by tenant and quota")
    in_flight: list[QuotaDifference] = said("Those that may only be on their way")
    learning: list[str] = said("Tenants whose quotas are learning, and cannot be compared")
    logs: list[LogDifference] = said("Logs that differ")
    archive: list[ArchiveDifferenceView] | None = said("What it lacks or has otherwise; null when none was read")


class ReconciliationProgress(BaseModel):
    """How far it is."""

    doing: str = said("What is looked at now")
    done: Annotated[Count, said("Tenants, or archived events, that were")]


class ReconciliationLine(BaseModel):
    """One of the three: how far it is, or at the end what came out, or why nothing did."""

    progress: ReconciliationProgress = sometimes("While it goes on")
    result: ReconciledView = sometimes("What came out")
    error: str = sometimes("Why it ended without a result")


@router.get("/ledger/verify", response_model=VerificationView)
async def verify_ledger(request: Request, quick: Annotated[bool, Query()] = False) -> dict[str, Any]:
    """Recount the whole ledger, and say what came out."""
    answer: dict[str, Any] = {}
    async for line in _verified(plane_of(request), VerifyOrder(quick=quick), []):
        answer = line
    if "result" not in answer:
        raise Problem(503, f"The ledger could not be read: {answer.get('error')}.", "Look at the database; ask again.")
    result: dict[str, Any] = answer["result"]
    return result


@router.post("/ledger/verify", response_class=JsonLines, responses=lines_of(VerificationLine))
async def verify_ledger_with_progress(request: Request, body: VerifyOrder) -> JsonLines:
    """The same as JSON Lines: ``progress`` (``done``, ``of``) each half second, then ``result`` or ``error``."""
    plane = plane_of(request)
    given = _given(plane, body)
    if _busy.locked():
        raise Problem(409, "The ledger is being verified.", "Wait for it to end, and ask again.")

    async def lines() -> AsyncIterator[str]:
        async for line in _verified(plane, body, given):
            yield json.dumps(line) + "\n"

    return JsonLines(lines())


class ReconcileOrder(BaseModel):
    """``tenant``: only the quotas of this one, and no archive."""

    model_config = ConfigDict(extra="forbid")

    tenant: str = ""


@router.post("/ledger/reconcile", response_class=JsonLines, responses=lines_of(ReconciliationLine))
async def reconcile_ledger(request: Request, body: ReconcileOrder) -> JsonLines:
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

    return JsonLines(lines())


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


@router.get("/ledger/checkpoint", response_model=CheckpointView)
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
