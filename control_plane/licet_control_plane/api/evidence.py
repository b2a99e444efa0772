"""``/v1/audit/evidence``: one signed archive of an interval, for an auditor."""

from __future__ import annotations

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import IO, Annotated, Any, Final

from fastapi import Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from licet_control_plane import evidence
from licet_control_plane.api.auth import plane_of, v1_router
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.proof import verify_ledger
from licet_control_plane.api.times import format_us, parse_us
from licet_control_plane.audit_keeper import HeadUnreadable
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.audit_chain import GENESIS
from licet_control_plane.evidence import Interval
from licet_control_plane.store import audit_trail, bundles, checkpoints
from licet_control_plane.store.audit_trail import Recounted

router = v1_router("/audit", tag="evidence")

MEMORY_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of an archive that is being made; what is more is in a temporary file."""
PIECE: Final = 256 * 1024
_busy: Final = asyncio.Lock()
"""One archive at a time: each recounts everything."""


@router.get("/evidence", response_class=StreamingResponse, responses={200: {"content": {"application/zip": {}}}})
async def audit_evidence(
    request: Request,
    from_: Annotated[str, Query(alias="from")],
    to: str,
) -> StreamingResponse:
    """Rules in force, changes, approvals, signed heads and what recounting found, of ``[from, to)``: a signed zip."""
    plane = plane_of(request)
    from_us, to_us = parse_us(from_, "from"), parse_us(to, "to")
    if from_us >= to_us:
        raise Problem(422, "to: it is not later than from.", "Give the beginning first.")
    if _busy.locked():
        raise Problem(409, "Evidence is being put together.", "Wait for it to end, and ask again.")
    async with _busy:
        ledger = await verify_ledger(request, quick=True)
        try:
            trail = await _recounted(plane)
        except (HeadUnreadable, OSError) as error:
            raise Problem(503, f"The audit trail cannot be recounted: {error}.", "Run licet audit verify.") from error
        file: IO[bytes] = tempfile.SpooledTemporaryFile(MEMORY_BYTES_MAX)  # noqa: SIM115  # what streams it closes it
        try:
            await plane.database.read(_written, plane, file, from_us, to_us, trail, ledger)
        except BaseException:
            file.close()
            raise

    async def pieces() -> AsyncIterator[bytes]:
        with file:
            file.seek(0)
            while piece := await asyncio.to_thread(file.read, PIECE):
                yield piece

    name = f"evidence-{(format_us(from_us) or '')[:10]}-{(format_us(to_us) or '')[:10]}.zip"
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(pieces(), media_type="application/zip", headers=disposition)


async def _recounted(plane: ControlPlane) -> dict[str, Any]:
    await plane.audit.keep()
    async for step in plane.audit.verify([]):
        if isinstance(step, Recounted):
            return step.as_json()
    raise AssertionError("a recount ends with what it found")


def _written(
    connection: Connection,
    plane: ControlPlane,
    file: IO[bytes],
    from_us: int,
    to_us: int,
    trail: dict[str, Any],
    ledger: dict[str, Any],
) -> None:
    first, last = audit_trail.span(connection, from_us=from_us, to_us=to_us)
    interval = Interval(from_us, to_us, first, last, audit_trail.hash_at(connection, first - 1) or GENESIS)
    signed, checkpoint = audit_trail.newest_signed(connection), checkpoints.newest(connection)
    evidence.write(
        file,
        deployment=plane.deployment,
        interval=interval,
        rules=_rules(connection, from_us, to_us),
        changes=audit_trail.numbered(connection, first, last),
        heads={
            "public_key": plane.public_key,
            "audit": {"head": _text(signed), "verified": trail},
            "ledger": {"checkpoint": _text(checkpoint.document if checkpoint else None), "verified": ledger},
        },
        sign=plane.key.sign,
    )


def _rules(connection: Connection, from_us: int, to_us: int) -> Iterator[dict[str, Any]]:
    """The bundle in force at the beginning, and those that were pushed in the interval."""
    for revision in bundles.in_force(connection, from_us=from_us, to_us=to_us):
        found = bundles.at(connection, revision)
        assert found is not None
        origin = bundles.origins(connection, [revision])[revision]
        yield {
            "revision": revision,
            "generation": origin.generation,
            "at": format_us(origin.at_us),
            "by": origin.by,
            "message": found.message,
            "observe": found.observe,
            "digest": found.digest,
            "published_at": format_us(origin.published_at_us),
            "documents": [{"kind": kind, "name": name, "sha256": digest} for kind, name, digest in found.documents],
            "files": [{"path": path, "content": content} for path, content in bundles.files(connection, revision)],
        }


def _text(document: bytes | None) -> str | None:
    return None if document is None else base64.b64encode(document).decode()
