"""``/v1/audit``: the audit trail, its signed head, and recounting it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.api.auth import TenantAsked, plane_of, storable, v1_router
from licet_control_plane.api.fields import Base64, Count, Instant, InstantUs, Sha256, said, sometimes, unchecked
from licet_control_plane.api.json_lines import JsonLines, lines_of
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.proof import PROGRESS_S
from licet_control_plane.api.times import From, To, format_us, parse_us
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


class EntryView(BaseModel):
    """An entry of the audit trail. Only describes: pages go out unchecked."""

    number: Annotated[int, said("Entries are numbered from 1, without a gap", minimum=1)]
    at: Instant
    by: str = said("Who: the name of an API key, a subject of the issuer, or a part of Licet")
    via: str = said("How they showed it: api-key, oidc, or system")
    credential: str | None = said("The id of the key, or the issuer; null for none")
    address: str | None = said("From where; null for none")
    request: str | None = said("The id of the request; null for none")
    action: str = said("Such as license.update")
    target: str = said("What it was done to")
    tenant: str | None = said("Whom it is about; null for all, or for none")
    before: Any = said("What was; as the action has it, null for nothing")
    after: Any = said("What is; as the action has it, null for nothing")
    hash: Annotated[Sha256, said("Of the entry and the hash before it")]


class EntryPage(BaseModel):
    """Entries of the audit trail."""

    items: list[EntryView] = said("The newest first; with `after`, the oldest first")
    next: int | None = said("The `before`, or `after`, of the next page; null on the last", minimum=1)


class SignedHead(BaseModel):
    """The end of the audit trail, signed. Only ``document`` counts: the rest is what it says."""

    kind: str = said("What the file is, for programs")
    number: Annotated[int, said("Of the newest entry", minimum=1)]
    hash: Annotated[Sha256, said("Of the newest entry")]
    deployment: str = said("Whose trail it is")
    at_us: InstantUs
    public_key: str = said("Whose signature it has: ed25519: and base64")
    document: Annotated[Base64, said("What is signed, with its signature")]


class EntriesDone(BaseModel):
    """How far it is."""

    done: Annotated[Count, said("Entries that were recounted")]
    of: Annotated[Count, said("How many there are")]


class FaultView(BaseModel):
    """The first thing that is not as it was recorded."""

    entry: int = said("The number of the entry", minimum=0)
    what: str = said("What is wrong with it")


class RecountView(BaseModel):
    """Whether the trail is what was recorded."""

    ok: bool = said("No fault was found")
    entries: Annotated[Count, said("That were recounted")]
    head: str = said("Hash of the last entry, in hex")
    heads: Annotated[Count, said("Signed ones that the trail was held to")]
    fault: FaultView | None = said("The first; null for none")


class RecountLine(BaseModel):
    """One of the three: how far it is, or at the end what came out, or why nothing did."""

    progress: EntriesDone = sometimes("Each half second")
    result: RecountView = sometimes("What came out")
    error: str = sometimes("Why it ended without a result")


@router.get("", response_model=EntryPage)
async def list_entries(
    request: Request,
    tenant: TenantAsked,
    by: str = "",
    action: str = "",
    target: str = "",
    from_: From = "",
    to: To = "",
    before: Annotated[int | None, Query(ge=1, le=_LAST)] = None,
    after: Annotated[int | None, Query(ge=0, le=_LAST)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100,
) -> Response:
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
    return unchecked({"items": shown, "next": shown[-1]["number"] if len(found) > limit else None})


@router.get("/head", response_model=SignedHead)
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


@router.post("/verify", response_class=JsonLines, responses=lines_of(RecountLine))
async def verify_audit(request: Request, body: RecountOrder) -> JsonLines:
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

    return JsonLines(lines())


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
