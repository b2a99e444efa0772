"""``/v1/usage/dead-letters`` and ``/v1/usage/conflicts``: what the drain kept aside, and deciding about it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from fastapi import Query, Request
from pydantic import BaseModel
from sqlalchemy import Row

from licet.domain.outcomes import Effect, Reason
from licet.wire.envelope import EnvelopeError
from licet.wire.usage import UsageBatch, UsageEvent, unpack_event
from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.fields import Count, Instant, LogId, Seq, said, sometimes
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us
from licet_control_plane.drain.worker import NotRecordable
from licet_control_plane.store import conflicts, dead_letters
from licet_control_plane.store.conflicts import Conflict, ConflictKey

router = v1_router(tag="kept-aside")

EVENTS_SHOWN: Final = 20
"""Of a batch, to see what it is about; ``raw`` has all of it."""

Limit = Annotated[int, Query(ge=1, le=1_000)]


class LetterView(BaseModel):
    """A batch that could not be recorded."""

    number: Annotated[int, said("Of the dead letter, from 1", minimum=1)]
    reason: str = said("Why it could not be")
    log_id: LogId | None = said("Null when the batch cannot be read so far")
    first_seq: Seq | None = said("Its first event; null when that cannot be read")
    last_seq: Seq | None = said("Its last event; null when that cannot be read")
    shard: Annotated[int, said("The usage stream it came by, from 0", minimum=0)]
    entry: str = said("Its id in the stream; - when it came another way")
    bytes: Annotated[int, said("Its size in bytes", minimum=0)]
    digest: str = said("SHA-256 of its bytes, in hex")
    times: Annotated[Count, said("How often it came")]
    first_at: Annotated[Instant, said("When it came first")]
    last_at: Annotated[Instant, said("When it came last")]
    outcome: Literal["recorded", "dropped"] | None = said("What was decided; null while it waits")
    settled_at: Instant | None = said("When; null while it waits")
    settled_by: str | None = said("Who decided; null or empty while it waits")


class LetterPage(BaseModel):
    """Dead letters by number."""

    items: list[LetterView] = said("By number")
    next: int | None = said("The `after` of the next page; null on the last", minimum=1)


class OpenedLetter(LetterView):
    """With what can be read of it."""

    events: list[dict[str, Any]] = said(
        "The first 20 with the names of the wire, as far as they can be read: a field may hold anything, and what"
        " cannot be read is {unreadable: why}"
    )
    events_total: Annotated[Count, said("How many it holds; 0 when that cannot be read")]
    raw: str = sometimes("Its bytes, in base64; only with `raw=true`", contentEncoding="base64")


class RetriedLetter(BaseModel):
    """A dead letter that is recorded now."""

    number: Annotated[int, said("Of the dead letter", minimum=1)]
    outcome: Literal["recorded"] = said("What became of it")
    inserted: Annotated[Count, said("Events that are new in the ledger")]
    duplicates: Annotated[Count, said("Events that it had already")]
    conflicts: Annotated[Count, said("Events that it has with other content")]
    acknowledged: bool = said("The sidecar was told; if not, it sends it again, which changes nothing")


class DroppedLetter(BaseModel):
    """A dead letter that was given up."""

    number: Annotated[int, said("Of the dead letter", minimum=1)]
    outcome: Literal["dropped"] = said("What became of it")


class ConflictView(BaseModel):
    """An event that came again under its number with other content. What is shown of it is what came."""

    log_id: LogId
    seq: Seq
    digest: str = said("Of what came, in hex")
    came_at: Instant
    tenant: str = said("As it came")
    action: str = said("As it came")
    effect: str = said("As it came, such as APPROVED; a number that this version does not know")
    units: dict[str, Count] = said("By feature, as they came")


class ConflictPage(BaseModel):
    """Conflicts by log and number."""

    items: list[ConflictView] = said("By log and number")
    next: str | None = said("The `after` of the next page; null on the last")


class CameInstead(ConflictView):
    """A conflict with all that came."""

    event: dict[str, Any] = said("What came, with the names of the wire")
    differs: list[str] | None = said("Names of fields that differ from what is recorded; null when nothing is")


class OpenedConflict(BaseModel):
    """What is recorded under a number, and what came instead."""

    log_id: LogId
    seq: Seq
    recorded: dict[str, Any] | None = said("The event, with the names of the wire; null when it left the ledger")
    items: list[CameInstead] = said("All that came, by digest")


@router.get("/usage/dead-letters", response_model=LetterPage)
async def list_dead_letters(
    request: Request, after: int = 0, limit: Limit = 100, settled: bool = False
) -> dict[str, Any]:
    """Batches that could not be recorded, by number; with ``settled`` also those that were decided about."""
    rows = await plane_of(request).database.read(dead_letters.page, after=after, limit=limit + 1, settled=settled)
    page = rows[:limit]
    return {"items": [_letter(row) for row in page], "next": page[-1].number if len(rows) > limit else None}


@router.get("/usage/dead-letters/{number}", response_model=OpenedLetter, response_model_exclude_unset=True)
async def get_dead_letter(request: Request, number: int, raw: bool = False) -> dict[str, Any]:
    """One of them, and what can be read of it; ``raw``: also its bytes, base64."""
    row = await _found(request, number)
    shown = _letter(row) | {"events": [], "events_total": 0}
    if row.body is None:
        return shown
    body = bytes(row.body)
    events, total = _readable(body)
    shown |= {"events": events, "events_total": total}
    if raw:
        shown["raw"] = base64.b64encode(body).decode()
    return shown


@router.post("/usage/dead-letters/{number}/retry", response_model=RetriedLetter)
async def retry_dead_letter(request: Request, number: int, caller: CallerAsked) -> dict[str, Any]:
    """Record it now, by the same transaction as what comes by the stream."""
    plane = plane_of(request)
    row = await _waiting(request, number)
    try:
        done, told = await plane.workers[row.shard].retry(number, bytes(row.body), by=caller.name)
    except NotRecordable as error:
        raise Problem(
            409,
            f"Dead letter {number} still cannot be recorded: {error}.",
            "Upgrade the control plane if its sidecars are newer; otherwise keep a copy (?raw=true) and drop it.",
        ) from error
    await plane.workers[row.shard].count_kept()
    return {
        "number": number,
        "outcome": dead_letters.RECORDED,
        "inserted": done.inserted,
        "duplicates": done.duplicates,
        "conflicts": done.conflicts,
        "acknowledged": told,
    }


@router.delete("/usage/dead-letters/{number}", response_model=DroppedLetter)
async def drop_dead_letter(request: Request, number: int, caller: CallerAsked) -> dict[str, Any]:
    """Give it up: its bytes are discarded, its digest and reason stay; its events are declared lost."""
    plane = plane_of(request)
    row = await _waiting(request, number)
    await plane.workers[row.shard].drop(number, bytes(row.body), by=caller.name)
    return {"number": number, "outcome": dead_letters.DROPPED}


@router.get("/usage/conflicts", response_model=ConflictPage)
async def list_conflicts(request: Request, after: str = "", limit: Limit = 100) -> dict[str, Any]:
    """Events that came again under the same number with other content."""
    plane = plane_of(request)
    found = await plane.database.read(conflicts.page, plane.ledger_key, after=_conflict_key(after), limit=limit + 1)
    page = found[:limit]
    return {
        "items": [_conflict(one) for one in page],
        "next": ":".join(map(str, page[-1].key)) if len(found) > limit else None,
    }


@router.get("/usage/conflicts/{log_id}/{seq}", response_model=OpenedConflict)
async def get_conflict(request: Request, log_id: str, seq: int) -> dict[str, Any]:
    """What is recorded under a number, and what came instead."""
    plane = plane_of(request)
    recorded, found = await plane.database.read(conflicts.of, plane.ledger_key, log_id, seq)
    if not found:
        raise Problem(
            404, f"Nothing else came as event {seq} of log {log_id}.", "Look at `licet usage conflicts list`."
        )
    return {
        "log_id": log_id,
        "seq": seq,
        "recorded": None if recorded is None else _event(recorded),
        "items": [
            _conflict(one)
            | {"event": _event(one.came), "differs": conflicts.differences(recorded, one.came) if recorded else None}
            for one in found
        ],
    }


def _letter(row: Row[Any]) -> dict[str, Any]:
    return {
        "number": row.number,
        "reason": row.reason,
        "log_id": row.log_id or None,
        "first_seq": row.first_seq or None,
        "last_seq": row.last_seq or None,
        "shard": row.shard,
        "entry": row.entry,
        "bytes": row.bytes,
        "digest": row.digest,
        "times": row.times,
        "first_at": format_us(row.first_at),
        "last_at": format_us(row.last_at),
        "outcome": row.outcome or None,
        "settled_at": format_us(row.settled_at),
        "settled_by": row.settled_by,
    }


def _conflict(one: Conflict) -> dict[str, Any]:
    return {
        "log_id": one.log_id,
        "seq": one.key.seq,
        "digest": one.key.digest,
        "came_at": format_us(one.at_us),
        "tenant": one.came.tenant,
        "action": one.came.action,
        "effect": _name(Effect, one.came.effect),
        "units": one.came.units,
    }


def _event(event: UsageEvent) -> dict[str, Any]:
    shown: dict[str, Any] = _plain(event._asdict())
    shown["at"] = format_us(shown.pop("at_us"))
    shown["effect"], shown["reason"] = _name(Effect, event.effect), _name(Reason, event.reason)
    return shown


def _name(kind: type[Effect] | type[Reason], value: int) -> str:
    try:
        return kind(value).name
    except ValueError:  # a newer sidecar's
        return str(value)


def _readable(body: bytes) -> tuple[list[dict[str, Any]], int]:
    """The first events of a batch as far as they can be read, and how many it holds."""
    try:
        packed = UsageBatch.unpack(body).events
    except EnvelopeError:
        return [], 0
    shown: list[dict[str, Any]] = []
    for one in packed[:EVENTS_SHOWN]:
        try:
            shown.append(_plain(unpack_event(one)._asdict()))
        except EnvelopeError as error:
            shown.append({"unreadable": str(error)})
    return shown, len(packed)


def _plain(value: Any) -> Any:
    """As JSON can have it: in what could not be recorded, a field may be anything."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | str() | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes():
            return value.hex()
        case _:
            return str(value)


async def _found(request: Request, number: int) -> Row[Any]:
    row = await plane_of(request).database.read(dead_letters.get, number)
    if row is None:
        raise Problem(404, f"There is no dead letter {number}.", "Look at `licet usage dead-letters list --settled`.")
    return row


async def _waiting(request: Request, number: int) -> Row[Any]:
    row = await _found(request, number)
    if row.outcome:
        raise Problem(409, f"Dead letter {number} was {row.outcome} already.", "Nothing is left to be done about it.")
    return row


def _conflict_key(text: str) -> ConflictKey:
    if not text:
        return ConflictKey()
    log, _, rest = text.partition(":")
    seq, _, digest = rest.partition(":")
    if not (log.isdigit() and seq.isdigit()):
        raise Problem(422, f"after: {text!r} is not where a page ended.", "Give the `next` of the page before.")
    return ConflictKey(int(log), int(seq), digest)
