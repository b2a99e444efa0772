"""``/v1/tenants/{tenant}/subjects/export`` and ``…/erase``: what the ledger holds about somebody.

The subject is in the body, not in the address: addresses end up in the logs of whatever is on the way.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.events import EventView
from licet_control_plane.api.fields import Count, Tenant, said, sometimes
from licet_control_plane.api.json_lines import JsonLines, lines_of
from licet_control_plane.archive.files import ArchiveDamaged, ArchiveUnavailable
from licet_control_plane.archive.follower import Archive
from licet_control_plane.core.event_view import event_json
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import access, access_requests, ledger
from licet_control_plane.store.database import DatabaseUnavailable

router = v1_router(tag="subjects")

PAGE_EVENTS: Final = 1_000
NAME_CHARS_MAX: Final = 4_096


class SubjectName(BaseModel):
    """Somebody, as usage events name them."""

    model_config = ConfigDict(extra="forbid")

    type: Annotated[str, Field(max_length=NAME_CHARS_MAX)]
    id: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]


class ExportedEvent(EventView):
    """An event about somebody."""

    conflict: bool = said("It came again under a number that was recorded otherwise, and is in no sum")


class ErasedView(BaseModel):
    """What was destroyed."""

    tenant: Tenant
    subjects: list[int] = said("Numbers under which the ledger knew them")
    events: Annotated[Count, said("That said who it was")]
    archive: str = sometimes("`erased`, or `waits:` and why; left out without an archive")


@router.post("/tenants/{tenant}/subjects/export", response_class=JsonLines, responses=lines_of(ExportedEvent))
async def export_subject(request: Request, tenant: str, body: SubjectName) -> JsonLines:
    """Every event about somebody, those in which others acted on their behalf included, as JSON Lines by time."""
    plane = plane_of(request)

    async def lines() -> AsyncIterator[str]:
        after: ledger.Cursor | None = None
        while True:
            page, after = await plane.database.read(
                ledger.events_about, plane.ledger_key, tenant, body.type, body.id, after=after, limit=PAGE_EVENTS
            )
            yield "".join(
                json.dumps(event_json(one.log_id, one.decision_prefix, one.event) | {"conflict": one.conflict}) + "\n"
                for one in page
            )
            if after is None:
                return

    return JsonLines(lines())


@router.post("/tenants/{tenant}/subjects/erase", response_model=ErasedView, response_model_exclude_unset=True)
async def erase_subject(request: Request, tenant: str, body: SubjectName, caller: CallerAsked) -> dict[str, Any]:
    """Destroy what the ledger holds about somebody. What was used stays counted and billed; who it was is gone."""
    plane = plane_of(request)
    erased = await plane.database.write(_erase, plane.ledger_key, tenant, body, by=caller.name, now_us=plane.now_us())
    await plane.database.shred()
    answer: dict[str, Any] = {"tenant": tenant, "subjects": erased.numbers, "events": erased.events}
    if plane.archive is not None:
        answer["archive"] = await _erased_in_archive(plane.archive)
    return answer


async def _erased_in_archive(archive: Archive) -> str:
    """Whether the archive's copies of the keys are destroyed already; if not, that is done before anything else is
    archived."""
    try:
        await archive.catch_up(ledger.WHOLE_LEDGER_SHARD)
    except (ArchiveDamaged, ArchiveUnavailable, DatabaseUnavailable) as error:
        return f"waits: {error}"
    return "erased"


def _erase(
    connection: Connection, ledger_key: LedgerKey, tenant: str, whom: SubjectName, *, by: str, now_us: int
) -> ledger.Erased:
    erased = ledger.erase(connection, ledger_key, tenant, whom.type, whom.id, now_us=now_us)
    access_requests.erase_subject(connection, tenant, whom.type, whom.id)
    # The audit trail says that it was done, and keeps only the numbers: a name there would outlive the erasure.
    access.record(
        connection,
        by=by,
        action="subject.erase",
        target=tenant,
        before={"subjects": erased.numbers, "events": erased.events},
        after={},
        now_us=now_us,
    )
    return erased
