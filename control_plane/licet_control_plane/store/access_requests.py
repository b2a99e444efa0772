"""Access requests, one row each, from the event that asked to the end.

A row comes from the ledger transaction that records the event (``note_asked``), so that none is lost and none made
twice; it waits there, without a state, until the access desk opens it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, delete, func, or_, select, tuple_, update

from licet.domain.approvals import TEXT_CHARS_MAX, RequestState, request_key
from licet.domain.catalog import ApprovalStage
from licet.domain.outcomes import Effect
from licet.wire.usage import FLAG_OBSERVED, EventKind, UsageEvent
from licet_control_plane.core.access_requests import AccessRequest
from licet_control_plane.core.accounting import storable
from licet_control_plane.store.database import upsert
from licet_control_plane.store.schema import access_requests as table

ASKED: Final = ""
"""State of a row that nobody has opened yet."""
NAME_CHARS_MAX: Final = 128
NOTED_MAX: Final = 1_000
"""New requests of one ledger transaction. Who asks again asks for those that are left out again, too."""
ASKED_MAX: Final = 10_000
"""Rows that wait to be opened. The desk opens hundreds at a time; more are a flood, and left out likewise."""
KEPT_US: Final = 400 * 86_400 * 1_000_000
"""How long a closed request is kept: longer than a year, for who looks back over one. The audit trail keeps more."""


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A request, and the revision of the license that told sidecars of it last."""

    request: AccessRequest
    revision: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page of requests ended."""

    asked_at: int
    id: str


def note_asked(connection: Connection, events: Iterable[UsageEvent]) -> int:
    """Make a row of each request that ``events`` ask for and that there is none of; how many. May be repeated."""
    asked: dict[str, UsageEvent] = {}
    for event in events:
        if (
            event.access_request_id
            and event.effect == Effect.PENDING
            and not event.flags & FLAG_OBSERVED
            and _is_plausible(event)
        ):
            first = asked.setdefault(event.access_request_id, event)
            if event.justification and not first.justification:
                asked[event.access_request_id] = event._replace(at_us=first.at_us)
            if len(asked) > NOTED_MAX:
                asked.popitem()
    if not asked:
        return 0
    known = set(connection.scalars(select(table.c.id).where(table.c.id.in_(list(asked)))))
    for id_ in known:
        if text := asked[id_].justification:
            mine = and_(table.c.id == id_, table.c.justification == "", table.c.state.in_((ASKED, "pending")))
            connection.execute(update(table).where(mine).values(justification=storable(text[:TEXT_CHARS_MAX])))
    new = [event for id_, event in asked.items() if id_ not in known]
    if not new:
        return 0
    waiting = connection.scalar(select(func.count()).select_from(table).where(table.c.state == ASKED)) or 0
    new = new[: max(0, ASKED_MAX - waiting)]
    for event in new:
        connection.execute(upsert(connection, table).values(_asked_row(event)).on_conflict_do_nothing())
    return len(new)


def asked(connection: Connection, limit: int) -> list[AccessRequest]:
    """Those that wait to be opened, the first asked first."""
    rows = connection.execute(select(table).where(table.c.state == ASKED).order_by(table.c.asked_at).limit(limit))
    return [_request(row) for row in rows]


def due(connection: Connection, now_us: int, limit: int) -> list[AccessRequest]:
    """Pending ones whose time is over."""
    over = and_(table.c.state == RequestState.PENDING.value, table.c.expires_at <= now_us)
    return [_request(row) for row in connection.execute(select(table).where(over).limit(limit))]


def get(connection: Connection, id_: str) -> StoredRequest | None:
    """One that was opened."""
    row = connection.execute(select(table).where(table.c.id == id_, table.c.state != ASKED)).first()
    return StoredRequest(_request(row), row.revision) if row else None


def page(
    connection: Connection, *, tenant: str, state: str, after: Cursor | None, limit: int, now_us: int
) -> list[StoredRequest]:
    """Those that were opened, the last asked first; of one tenant, and in one state, where these are not empty."""
    query = select(table).where(table.c.state != ASKED).order_by(table.c.asked_at.desc(), table.c.id.desc())
    if tenant:
        query = query.where(table.c.tenant == tenant)
    if state == RequestState.PENDING.value:
        query = query.where(table.c.state == state, table.c.expires_at > now_us)
    elif state == RequestState.EXPIRED.value:
        late = and_(table.c.state == RequestState.PENDING.value, table.c.expires_at <= now_us)
        query = query.where(or_(table.c.state == state, late))
    elif state:
        query = query.where(table.c.state == state)
    if after is not None:
        query = query.where(tuple_(table.c.asked_at, table.c.id) < (after.asked_at, after.id))
    return [StoredRequest(_request(row), row.revision) for row in connection.execute(query.limit(limit))]


def save(connection: Connection, request: AccessRequest, *, revision: int | None = None) -> None:
    """Replace what is known of a request that has a row; ``revision`` when sidecars are told."""
    values = _row(request)
    if revision is not None:
        values["revision"] = revision
    connection.execute(update(table).where(table.c.id == request.id).values(values))


def drop(connection: Connection, ids: Sequence[str]) -> None:
    """Forget some that were never opened."""
    connection.execute(delete(table).where(table.c.id.in_(ids), table.c.state == ASKED))


def forget_old(connection: Connection, now_us: int) -> None:
    """Forget those that nobody has asked about for longer than a year."""
    over = table.c.state.not_in((ASKED, RequestState.PENDING.value))
    connection.execute(delete(table).where(table.c.asked_at < now_us - KEPT_US, table.c.ends_at < now_us, over))


def erase_subject(connection: Connection, tenant: str, subject_type: str, subject_id: str) -> None:
    """Blank what says who asked, in requests of somebody and in those made on their behalf; none stays pending."""
    mine = or_(
        and_(table.c.subject_type == storable(subject_type), table.c.subject_id == storable(subject_id)),
        table.c.on_behalf_of == storable(subject_id),
    )
    blank = {"subject_type": "", "subject_id": "", "on_behalf_of": "", "resource": '["",""]', "justification": ""}
    pending = table.c.state == RequestState.PENDING.value
    whose = and_(table.c.tenant == tenant, mine)
    connection.execute(delete(table).where(whose, table.c.state == ASKED))
    connection.execute(update(table).where(whose, pending).values(state=RequestState.EXPIRED.value))
    connection.execute(update(table).where(whose).values(**blank))


def _is_plausible(event: UsageEvent) -> bool:
    """Whether the id is a request's, and the names fit: whoever can write the usage stream can write anything."""
    id_ = event.access_request_id
    return (
        len(id_) == 32 and id_.isalnum() and len(event.action) <= NAME_CHARS_MAX and len(event.tenant) <= NAME_CHARS_MAX
    )


def _asked_row(event: UsageEvent) -> dict[str, Any]:
    subject = (event.subject_type, event.subject_id)
    held = event.kind in (EventKind.RESERVE, EventKind.REQUEST_ACCESS)
    asked = AccessRequest(
        id=event.access_request_id,
        key=request_key(event.tenant, subject, event.on_behalf_of, event.action, event.rule),
        tenant=event.tenant,
        subject_type=event.subject_type,
        subject_id=event.subject_id,
        on_behalf_of=event.on_behalf_of,
        action=event.action,
        rule=event.rule,
        asked_at=event.at_us,
        units=dict(event.units_held if held else event.units),
        resource_type=event.resource_type,
        resource_id=event.resource_id,
        justification=event.justification[:TEXT_CHARS_MAX],
    )
    return _row(asked) | {"id": asked.id, "state": ASKED, "revision": 0}


def _row(request: AccessRequest) -> dict[str, Any]:
    return {
        "key": request.key,
        "tenant": request.tenant,
        "subject_type": storable(request.subject_type),
        "subject_id": storable(request.subject_id),
        "on_behalf_of": storable(request.on_behalf_of),
        "resource": json.dumps([request.resource_type, request.resource_id]),
        "justification": storable(request.justification),
        "action": storable(request.action),
        "rule": storable(request.rule),
        "units": json.dumps(dict(request.units)),
        "asked_at": request.asked_at,
        "chain": request.chain,
        "stages": json.dumps(
            [[list(one.approvers), one.need, one.escalate_after_s, list(one.escalate_to), one.deny_after_s]
             for one in request.stages]
        ),
        "stage": request.stage,
        "votes": json.dumps(request.votes),
        "state": request.state.value,
        "changed_at": request.changed_at,
        "expires_at": request.expires_at,
        "ends_at": request.ends_at,
        "units_approved": request.units_approved,
        "money_approved": request.money_approved,
        "decided_by": request.decided_by,
        "reason": request.reason,
    }  # fmt: skip


def _request(row: Row[Any]) -> AccessRequest:
    resource_type, resource_id = json.loads(row.resource)
    return AccessRequest(
        id=row.id,
        key=row.key,
        tenant=row.tenant,
        subject_type=row.subject_type,
        subject_id=row.subject_id,
        on_behalf_of=row.on_behalf_of,
        action=row.action,
        rule=row.rule,
        asked_at=row.asked_at,
        units=json.loads(row.units),
        resource_type=resource_type,
        resource_id=resource_id,
        justification=row.justification,
        chain=row.chain,
        stages=tuple(
            ApprovalStage(tuple(approvers), need, escalate_after_s, tuple(escalate_to), deny_after_s)
            for approvers, need, escalate_after_s, escalate_to, deny_after_s in json.loads(row.stages)
        ),
        stage=row.stage,
        votes=tuple(json.loads(row.votes)),
        state=RequestState(row.state or RequestState.PENDING),
        changed_at=row.changed_at,
        expires_at=row.expires_at,
        ends_at=row.ends_at,
        units_approved=row.units_approved,
        money_approved=row.money_approved,
        decided_by=row.decided_by,
        reason=row.reason,
    )
