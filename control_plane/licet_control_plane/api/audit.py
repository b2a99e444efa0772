"""``/v1/audit``: the audit trail, its signed head, and recounting it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.api.auth import TenantAsked, plane_of, storable, v1_router
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.proof import JSON_LINES, PROGRESS_S
from licet_control_plane.api.times import format_us, parse_us
from licet_control_plane.audit_keeper import HeadUnreadable
from licet_control_plane.core.audit_chain import Entry
from licet_control_plane.store import audit_trail
from licet_control_plane.store.audit_trail import AuditFilter, Head, Recounted
from licet_control_plane.store.database import DatabaseUnavailable

router = v1_router("/audit", tag="audit")

PAGE_MAX: Final = 1_000
HEADS_MAX: Final = 100
"""That one recount is held to."""
_busy: Final = asyncio.Lock()
"""One recount at a time: it keeps one of the database's readers."""
_LAST: Final = 2**63 - 1


@router.get("")
async def list_entries(
    request: Request,
    tenant: TenantAsked,
    by: str = "",
    action: str = "",
    target: str = "",
    from_: Annotated[str, Query(alias="from")] = "",
    to: str = "",
    before: Annotated[int | None, Query(ge=1, le=_LAST)] = None,
    after: Annotated[int | None, Query(ge=0, le=_LAST)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100,
) -> dict[str, Any]:
    """Entries, the newest first; ``next`` is the ``before`` of the next page. With ``after``, the oldest first after
    that one, and ``next`` is the ``after`` of the next page. An ``action`` may end in ``*``."""
    if before is not None and after is not None:
        raise Problem(422, "before, after: one of the two.", "Leave one out.")
    which = AuditFilter(
        by=storable(by, "by"),
        action=storable(action, "action"),
        target=storable(target, "target"),
        tenant=tenant,
        from_us=parse_us(from_, "from") if from_ else 0,
        to_us=parse_us(to, "to") if to else None,
    )
    found = await plane_of(request).database.read(audit_trail.page, which, before=before, after=after, limit=limit + 1)
    shown = [described(entry, hash_) for entry, hash_ in found[:limit]]
    return {"items": shown, "next": shown[-1]["number"] if len(found) > limit else None}


@router.get("/head")
async def audit_head(request: Request) -> dict[str, Any]:
    """Number and hash of the newest entry, signed: whoever keeps it can hold the trail to it later."""
    plane = plane_of(request)
    try:
        head = await plane.audit.sign()
    except (HeadUnreadable, OSError) as error:
        raise _unreadable(error) from error
    if head is None:
        raise Problem(404, "The audit trail is empty.", "Ask again once something was changed.")
    return head.as_json(plane.public_key)


class RecountOrder(BaseModel):
    """``heads``: signed documents, base64. ``public_keys``: of whom else, besides the server, signatures count."""

    model_config = ConfigDict(extra="forbid")

    heads: Annotated[list[str], Field(max_length=HEADS_MAX)] = []
    public_keys: Annotated[list[str], Field(max_length=HEADS_MAX)] = []


@router.post("/verify")
async def verify_audit(request: Request, body: RecountOrder) -> StreamingResponse:
    """Recount every hash, and hold the trail to its signed heads. JSON Lines: ``progress`` (``done``, ``of``) each
    half second, then ``result`` or ``error``."""
    plane = plane_of(request)
    try:
        verifier = Verifier([*plane.key.public_keys, *body.public_keys])
        given = [Head.of(base64.b64decode(text, validate=True), verifier) for text in body.heads]
    except (VerificationError, binascii.Error, ValueError) as error:
        raise Problem(
            422, f"heads: {error}.", "Give the document of a head as it was signed, and the public key if that changed."
        ) from error
    if _busy.locked():
        raise Problem(409, "The audit trail is being recounted.", "Wait for it to end, and ask again.")

    async def lines() -> AsyncIterator[str]:
        async with _busy:
            loop = asyncio.get_running_loop()
            said_s = loop.time()
            total, _ = await plane.database.read(audit_trail.head)
            try:
                async for step in plane.audit.verify(given):
                    if isinstance(step, Recounted):
                        yield json.dumps({"result": step.as_json()}) + "\n"
                    elif loop.time() - said_s >= PROGRESS_S:
                        said_s = loop.time()
                        yield json.dumps({"progress": {"done": step, "of": total}}) + "\n"
            except (DatabaseUnavailable, HeadUnreadable, OSError) as error:
                yield json.dumps({"error": str(error)}) + "\n"

    return StreamingResponse(lines(), media_type=JSON_LINES)


def described(entry: Entry, hash_: bytes) -> dict[str, Any]:
    """An entry as the API shows it: ``before`` and ``after`` as values."""
    return {
        "number": entry.number,
        "at": format_us(entry.at_us),
        "by": entry.by,
        "via": entry.via,
        "credential": entry.credential or None,
        "address": entry.address or None,
        "request": entry.request or None,
        "action": entry.action,
        "target": entry.target,
        "tenant": entry.tenant or None,
        "before": _value(entry.before),
        "after": _value(entry.after),
        "hash": hash_.hex(),
    }


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # altered: `verify` says so


def _unreadable(error: Exception) -> Problem:
    return Problem(503, f"The audit trail's head cannot be signed and kept: {error}.", "Look at the state directory.")
