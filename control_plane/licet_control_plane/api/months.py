"""``/v1/ledger/months``: closed months are exported and dropped; and ``/v1/ledger/restored``."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import time
import zlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.fields import Count, Generation, Instant, MonthName, Sha256, said
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.store import access, exports, meta, retention
from licet_control_plane.store.exports import Export, Ranges
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.retention import MonthRefused
from licet_control_plane.store.schema import events

router = v1_router(tag="months")

GZIP: Final = "application/gzip"
FORMAT: Final = "licet-ledger-month/1"
PAGE_ROWS: Final = 5_000
DROP_S_MAX: Final = 5.0
"""For one request; the answer says whether more is to be dropped."""
_GZIP: Final = 16 + zlib.MAX_WBITS


class MonthView(BaseModel):
    """A month of the ledger."""

    month: MonthName
    events: Annotated[Count, said("In the ledger")]
    closed: bool = said("It ended more than 7 days ago")
    exported_at: Instant | None = said("When the newest export arrived; null for none")
    exported: Annotated[Count, said("Events of the newest export")]
    sha256: Sha256 | None = said("Of the newest export; null for none")
    dropped: Annotated[Count, said("Events that left the ledger")]
    dropped_at: Instant | None = said("When the last did; null for none")


class MonthList(BaseModel):
    """Every month with events, or that had them."""

    items: list[MonthView] = said("The newest first")


class ConfirmedExport(BaseModel):
    """An export that arrived."""

    month: MonthName
    events: Count
    sha256: Annotated[Sha256, said("Of its lines but the last")]


class DroppedMonth(BaseModel):
    """A month of which something left the ledger."""

    month: MonthName
    done: bool = said("Nothing is left to be dropped; if not, ask again")
    events: Annotated[Count, said("That this request dropped; once it is done, that were dropped in all")]


class RestoredLedger(BaseModel):
    """The ledger after a restore."""

    ledger_generation: Generation


@router.get("/ledger/months", response_model=MonthList)
async def list_months(request: Request) -> dict[str, Any]:
    """Every month with events, or that had them, newest first."""
    plane = plane_of(request)
    found = await plane.database.read(retention.months, now_us=plane.now_us())
    return {
        "items": [
            {
                "month": str(one.month),
                "events": one.events,
                "closed": one.closed,
                "exported_at": format_us(one.exported_at_us),
                "exported": one.exported,
                "sha256": one.sha256 or None,
                "dropped": one.dropped,
                "dropped_at": format_us(one.dropped_at_us),
            }
            for one in found
        ]
    }


@router.get("/ledger/months/{month}/export", response_class=StreamingResponse, responses={200: {"content": {GZIP: {}}}})
async def export_month(request: Request, month: str) -> StreamingResponse:
    """A closed month as gzipped JSON Lines: a header, the logs, the events, and a signed end, to be posted back.

    Events are as the table has them; bytes are in base64. A file without its end is not whole.
    """
    plane = plane_of(request)
    wanted = _month(month)
    if not retention.is_closed(wanted, plane.now_us()):
        raise _refused(MonthRefused(f"{wanted} is not closed", "A month is closed 7 days after its end (UTC)."))
    return StreamingResponse(
        _compressed(_lines(plane, wanted)),
        media_type=GZIP,
        headers={"Content-Disposition": f'attachment; filename="ledger-{wanted}.jsonl.gz"'},
    )


class ExportEnd(BaseModel):
    """``signed``: of the last line of an export, as it is there."""

    model_config = ConfigDict(extra="forbid")

    signed: str


@router.post("/ledger/months/{month}/exports", response_model=ConfirmedExport)
async def confirm_export(request: Request, month: str, body: ExportEnd, caller: CallerAsked) -> dict[str, Any]:
    """An export has arrived, whole, and is kept. Only then may the month be dropped."""
    plane = plane_of(request)
    wanted = _month(month)
    try:
        export = Export.of(base64.b64decode(body.signed, validate=True), str(wanted), _verifier(plane))
    except (VerificationError, binascii.Error, ValueError) as error:
        raise Problem(422, f"signed: {error}.", "Send `signed` of the export's last line.") from error
    if export.deployment != plane.deployment:
        raise Problem(422, "signed: it is the export of another deployment.", "Send that of this one.")
    try:
        await plane.database.write(retention.record_export, export, by=caller.name, now_us=plane.now_us())
    except MonthRefused as error:
        raise _refused(error) from error
    return {"month": str(wanted), "events": export.events, "sha256": export.sha256}


@router.post("/ledger/months/{month}/drop", response_model=DroppedMonth)
async def drop_month(request: Request, month: str, caller: CallerAsked) -> dict[str, Any]:
    """Drop what the newest export of a closed month holds. Ask again until it is ``done``; each answer says how many
    events this request dropped."""
    plane = plane_of(request)
    wanted = _month(month)
    now_us = plane.now_us()
    database = plane.database
    _behind(plane)
    until_s = time.monotonic() + DROP_S_MAX
    gone = 0
    try:
        parts = await database.write(retention.begin, wanted, _verifier(plane), now_us=now_us)
        await database.write(retention.drop_partition, wanted, now_us=now_us)
        for some in _batches(parts):
            gone += await database.write(retention.drop_part, wanted, some, now_us=now_us)
            if time.monotonic() >= until_s and some[-1] != parts[-1]:
                return {"month": str(wanted), "done": False, "events": gone}
        total = await database.write(retention.finish, wanted, by=caller.name, now_us=now_us)
    except MonthRefused as error:
        raise _refused(error) from error
    return {"month": str(wanted), "done": True, "events": total}


@router.post("/ledger/restored", response_model=RestoredLedger)
async def ledger_restored(request: Request, caller: CallerAsked) -> dict[str, Any]:
    """The database was restored from a backup: sidecars send again what they hold, and declare the rest lost."""
    plane = plane_of(request)
    generation = await plane.database.write(_start_ledger_generation, by=caller.name, now_us=plane.now_us())
    return {"ledger_generation": generation}


def _start_ledger_generation(connection: Connection, *, by: str, now_us: int) -> int:
    generation = meta.start_ledger_generation(connection)
    access.record(
        connection,
        by=by,
        action="ledger.restored",
        target=f"ledger generation {generation}",
        before={"ledger_generation": generation - 1},
        after={"ledger_generation": generation},
        now_us=now_us,
    )
    return generation


def _batches(parts: list[retention.Range]) -> list[list[retention.Range]]:
    """Parts that go together in one transaction: small ones share it."""
    batches: list[list[retention.Range]] = []
    room = 0
    for part in parts:
        size = part[2] - part[1] + 1
        if size > room:
            batches.append([])
            room = retention.PART_SEQS
        batches[-1].append(part)
        room -= size
    return batches


async def _lines(plane: ControlPlane, month: Month) -> AsyncIterator[str]:
    about = await plane.database.read(meta.read)
    columns = [column.name for column in events.columns]
    digest = hashlib.sha256()

    def line(value: Any) -> str:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n"
        digest.update(text.encode())
        return text

    yield line(
        {
            "format": FORMAT,
            "deployment": about.deployment,
            "ledger_generation": about.ledger_generation,
            "month": str(month),
            "columns": columns,
        }
    )
    known = await plane.database.read(retention.log_ids)
    ranges = Ranges()
    count = 0
    after = (0, 0)
    named: set[int] = set()
    while page := await plane.database.read(retention.page, month, after=after, limit=PAGE_ROWS):
        if any(row.log not in known for row in page):  # of a log that was met since
            known = await plane.database.read(retention.log_ids)
        for row in page:
            ranges.add(known[row.log], row.seq)
        if new := {row.log for row in page} - named:
            named |= new
            yield line({"logs": {str(number): known[number] for number in sorted(new)}})
        yield "".join([line([_json(value) for value in row]) for row in page])
        count += len(page)
        after = (page[-1].log, page[-1].seq)
    export = Export.signed(
        plane.key,
        deployment=about.deployment,
        generation=about.ledger_generation,
        month=month,
        events=count,
        sha256=digest.hexdigest(),
        ranges=ranges,
        straddling=await plane.database.read(exports.straddling, month),
    )
    end = {"events": count, "sha256": export.sha256, "signed": base64.b64encode(export.document).decode()}
    yield json.dumps(end, separators=(",", ":")) + "\n"


async def _compressed(lines: AsyncIterator[str]) -> AsyncIterator[bytes]:
    compressor = zlib.compressobj(wbits=_GZIP)
    async for text in lines:
        yield await asyncio.to_thread(compressor.compress, text.encode())
    yield compressor.flush()


def _json(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes | memoryview) else value


def _behind(plane: ControlPlane) -> None:
    """Refuses while the archive, or the receiver of events, lacks anything that the ledger has, or may lack it."""
    archive, sender = plane.archive, plane.sender
    if archive is not None and (not archive.counts.lag or any(archive.counts.lag.values())):
        raise Problem(409, "The archive does not have everything yet.", "See licet_archive_lag_blocks; then try again.")
    if sender is not None and (not sender.counts.lag_blocks or any(sender.counts.lag_blocks.values())):
        raise Problem(
            409, "The receiver of events does not have everything yet.", "See licet_events_lag_blocks; then try again."
        )


def _verifier(plane: ControlPlane) -> Verifier:
    return plane.key.verifier()


def _month(text: str) -> Month:
    try:
        return Month.parse(text)
    except ValueError as error:
        raise Problem(422, f"month: {error}.", "Write it as 2026-05.") from error


def _refused(error: MonthRefused) -> Problem:
    return Problem(409, f"{error}.", error.fix)
