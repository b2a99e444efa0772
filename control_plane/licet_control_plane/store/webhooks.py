"""Webhooks, what they are told, and what became of it.

``announce`` is called in the transaction of what it tells: what was committed is told, at least once, and nothing else.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, delete, exists, func, insert, select, update

from licet.domain.windows import Period
from licet_control_plane.core.webhook_events import SHORTEST_WINDOW, THRESHOLD, is_told
from licet_control_plane.store.database import upsert
from licet_control_plane.store.schema import quota_notices, webhook_deliveries, webhook_messages, webhooks

WEBHOOKS_MAX: Final = 50
"""Each change of a license looks at all of them."""
KEPT_S: Final = 30 * 86_400
"""How long messages are kept, to be looked at and delivered again."""
THRESHOLDS_KEPT_S: Final = 86_400
"""How long thresholds are kept that were delivered: a limit of each subject can make thousands an hour."""
NOTICES_KEPT_S: Final = 86_400
"""How long after a window it is remembered what was told of it: longer than any two clocks differ."""
WAITING_MAX: Final = 10_000
"""Messages that wait for one webhook, some 10 MB. Beyond it a threshold is dropped; events of licenses never are."""
BUSY_S: Final = 60
"""After which a control plane that sends, and has not said anything, is taken for dead."""
MESSAGES_MAX: Final = 20
"""Of one webhook at a time."""
_US: Final = 1_000_000
_NO_OLD_SECRET: Final = {"old_nonce": None, "old_until": None}


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where events are sent. Times in microseconds; ``tenant`` empty for all. ``waiting``: messages to be delivered;
    ``dropped``: thresholds that found no room among them. Of windows shorter than ``shortest_window`` it is told none.
    ``nonce``: of its secret; until ``old_until_us`` that of ``old_nonce`` signs too.
    """

    id: str
    url: str
    events: tuple[str, ...]
    thresholds: tuple[int, ...]
    tenant: str
    created_at_us: int
    created_by: str
    disabled_at_us: int | None = None
    disabled_why: str = ""
    failing_since_us: int | None = None
    waiting: int = 0
    shortest_window: Period = SHORTEST_WINDOW
    dropped: int = 0
    nonce: str = ""
    old_nonce: str = ""
    old_until_us: int | None = None


@dataclass(frozen=True, slots=True)
class Reached:
    """A percentage of a quota that was reached. ``quota``: its name with that of its window, which ends at ``ends_s``
    and is one of ``per``; ``data`` is told of it."""

    quota: str
    percent: int
    per: Period
    ends_s: int
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """What happened, and how often it was told to a webhook in vain."""

    number: int
    id: str
    at_us: int
    type: str
    tenant: str
    data: dict[str, Any]
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message to a webhook: ``delivered``, ``waiting`` for its next attempt, or ``failed`` for good."""

    message: Message
    next_at_us: int | None
    delivered_at_us: int | None
    status: int | None
    error: str

    @property
    def state(self) -> str:
        """In a word."""
        if self.delivered_at_us is not None:
            return "delivered"
        return "failed" if self.next_at_us is None else "waiting"


def add(connection: Connection, webhook: Webhook) -> bool:
    """Add one; not when there are ``WEBHOOKS_MAX``."""
    if (connection.scalar(select(func.count()).select_from(webhooks)) or 0) >= WEBHOOKS_MAX:
        return False
    connection.execute(
        insert(webhooks).values(
            id=webhook.id,
            url=webhook.url,
            events=json.dumps(webhook.events),
            thresholds=json.dumps(webhook.thresholds),
            tenant=webhook.tenant,
            created_at=webhook.created_at_us,
            created_by=webhook.created_by,
            disabled_why="",
            busy_until=0,
            shortest_window=webhook.shortest_window.value,
            nonce=webhook.nonce,
        )
    )
    return True


def every(connection: Connection) -> list[Webhook]:
    """All of them, the oldest first."""
    waiting = (
        select(webhook_deliveries.c.webhook, func.count().label("waiting"))
        .where(webhook_deliveries.c.next_at.is_not(None))
        .group_by(webhook_deliveries.c.webhook)
        .subquery()
    )
    query = select(webhooks, func.coalesce(waiting.c.waiting, 0).label("waiting")).outerjoin(
        waiting, waiting.c.webhook == webhooks.c.id
    )
    return [
        _webhook(row, row.waiting) for row in connection.execute(query.order_by(webhooks.c.created_at, webhooks.c.id))
    ]


def get(connection: Connection, id_: str) -> Webhook | None:
    """One of them."""
    return next((webhook for webhook in every(connection) if webhook.id == id_), None)


def remove(connection: Connection, id_: str) -> None:
    """Take one away, with what was not delivered."""
    connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.webhook == id_))
    connection.execute(delete(webhooks).where(webhooks.c.id == id_))


def disable(connection: Connection, id_: str, why: str, *, now_us: int) -> None:
    """Send it nothing any more. What is waiting goes on waiting."""
    connection.execute(update(webhooks).where(webhooks.c.id == id_).values(disabled_at=now_us, disabled_why=why))


def enable(connection: Connection, id_: str) -> None:
    """Send to it again, from now on."""
    values = {"disabled_at": None, "disabled_why": "", "failing_since": None, "busy_until": 0}
    connection.execute(update(webhooks).where(webhooks.c.id == id_).values(**values))


def rotate_secret(connection: Connection, id_: str, nonce: str, *, overlap_s: int, now_us: int) -> Webhook | None:
    """Sign with the secret of another nonce, and for so long with the one before too; one that was before that is
    erased. The webhook; ``None`` when there is none."""
    if connection.scalar(select(webhooks.c.id).where(webhooks.c.id == id_).with_for_update()) is None:
        return None
    old = {"old_nonce": webhooks.c.nonce, "old_until": now_us + overlap_s * _US} if overlap_s else _NO_OLD_SECRET
    connection.execute(update(webhooks).where(webhooks.c.id == id_).values(nonce=nonce, **old))
    return get(connection, id_)


def announce(
    connection: Connection, type_: str, tenant: str, data: dict[str, Any], *, now_us: int, only: str = ""
) -> None:
    """Tell every webhook that wants to know, or ``only`` one. Nothing is written when there is none."""
    rows = connection.execute(select(webhooks).where(webhooks.c.disabled_at.is_(None))).all()
    wanting = [row.id for row in rows if (row.id == only if only else _wants(row, type_, tenant))]
    if wanting:
        _put(connection, wanting, type_, tenant, data, now_us)


def announce_thresholds(connection: Connection, tenant: str, reached: Sequence[Reached], *, now_us: int) -> int:
    """Tell of each percentage of a tenant's quotas, unless that was told of its window. How many messages were dropped,
    because ``WAITING_MAX`` wait for the webhook already: nobody is told of these later."""
    rows = connection.execute(select(webhooks).where(webhooks.c.disabled_at.is_(None)).order_by(webhooks.c.id)).all()
    rows = [row for row in rows if _wants(row, THRESHOLD, tenant)]
    room = {row.id: WAITING_MAX - _waiting(connection, row.id) for row in rows}
    dropped: Counter[str] = Counter()
    for one in reached:
        values = {"tenant": tenant, "quota": one.quota, "percent": one.percent, "ends_s": one.ends_s}
        statement = upsert(connection, quota_notices).values(**values).on_conflict_do_nothing()
        # Of an insert PostgreSQL's driver does not count the rows, but it says what it returns.
        if connection.execute(statement.returning(quota_notices.c.percent)).first() is None:
            continue
        wanting = [row.id for row in rows if _wants_threshold(row, one)]
        told = [id_ for id_ in wanting if room[id_] > 0]
        dropped.update(id_ for id_ in wanting if room[id_] <= 0)
        for id_ in told:
            room[id_] -= 1
        if told:
            _put(connection, told, THRESHOLD, tenant, {**one.data, "percent": one.percent}, now_us)
    for id_, count in sorted(dropped.items()):
        values = {"dropped": webhooks.c.dropped + count}
        connection.execute(update(webhooks).where(webhooks.c.id == id_).values(**values))
    return dropped.total()


def _put(
    connection: Connection, wanting: Sequence[str], type_: str, tenant: str, data: dict[str, Any], now_us: int
) -> None:
    message = {"id": f"msg_{secrets.token_hex(12)}", "at": now_us, "type": type_, "tenant": tenant}
    number = connection.execute(
        insert(webhook_messages).values(**message, data=json.dumps(data)).returning(webhook_messages.c.number)
    ).scalar_one()
    connection.execute(
        insert(webhook_deliveries),
        [{"webhook": id_, "message": number, "next_at": now_us, "attempts": 0, "error": ""} for id_ in wanting],
    )


def told_of(connection: Connection, tenant: str, *, now_s: int) -> dict[str, set[int]]:
    """The percentages that were told of a tenant's quotas whose windows are open."""
    told: dict[str, set[int]] = {}
    open_ones = (quota_notices.c.tenant == tenant, quota_notices.c.ends_s > now_s)
    for quota, percent in connection.execute(select(quota_notices.c.quota, quota_notices.c.percent).where(*open_ones)):
        told.setdefault(quota, set()).add(percent)
    return told


def thresholds_wanted(connection: Connection) -> frozenset[tuple[int, Period]]:
    """The percentages that some webhook wants to know of, each with the shortest window of which it does."""
    rows = connection.execute(select(webhooks).where(webhooks.c.disabled_at.is_(None)))
    return frozenset(
        (percent, Period(row.shortest_window))
        for row in rows
        if THRESHOLD in json.loads(row.events)
        for percent in json.loads(row.thresholds)
    )


def claim(connection: Connection, *, now_us: int) -> list[tuple[Webhook, list[Message]]]:
    """What is to be sent now, by webhook, the oldest first. Until it says what came of it, or for ``BUSY_S``, nobody
    else sends to these webhooks. Erases old secrets that are not used any more."""
    connection.execute(update(webhooks).where(webhooks.c.old_until <= now_us).values(**_NO_OLD_SECRET))
    free = select(webhooks).where(webhooks.c.disabled_at.is_(None), webhooks.c.busy_until <= now_us)
    claimed = []
    for row in connection.execute(free.with_for_update()).all():
        messages = [found for found, _ in _due(connection, row.id, now_us)]
        if messages:
            busy(connection, row.id, until_us=now_us + BUSY_S * _US)
            claimed.append((_webhook(row), messages))
    return claimed


def is_anything_due(connection: Connection, *, now_us: int) -> bool:
    """Whether ``claim`` would find something to be sent or erased."""
    if connection.scalar(select(webhooks.c.id).where(webhooks.c.old_until <= now_us).limit(1)) is not None:
        return True
    query = (
        select(webhooks.c.id)
        .join(webhook_deliveries, webhook_deliveries.c.webhook == webhooks.c.id)
        .where(
            webhooks.c.disabled_at.is_(None), webhooks.c.busy_until <= now_us, webhook_deliveries.c.next_at <= now_us
        )
    )
    return connection.execute(query.limit(1)).first() is not None


def busy(connection: Connection, id_: str, *, until_us: int) -> None:
    """Whoever sends to it goes on; 0: has ended."""
    connection.execute(update(webhooks).where(webhooks.c.id == id_).values(busy_until=until_us))


def delivered(connection: Connection, id_: str, number: int, *, status: int, attempts: int, now_us: int) -> None:
    """It was taken."""
    values = {"next_at": None, "delivered_at": now_us, "status": status, "attempts": attempts, "error": ""}
    _settle(connection, id_, number, values)
    connection.execute(
        update(webhooks).where(webhooks.c.id == id_).values(failing_since=None, busy_until=now_us + BUSY_S * _US)
    )


def failed(
    connection: Connection,
    id_: str,
    number: int,
    *,
    next_at_us: int | None,
    status: int | None,
    attempts: int,
    error: str,
    now_us: int,
    quiet_until_us: int,
) -> int:
    """It was not. Leaves the webhook in peace until ``quiet_until_us``. Since when nothing was taken, microseconds."""
    _settle(connection, id_, number, {"next_at": next_at_us, "status": status, "attempts": attempts, "error": error})
    since = connection.scalar(select(webhooks.c.failing_since).where(webhooks.c.id == id_)) or now_us
    connection.execute(
        update(webhooks).where(webhooks.c.id == id_).values(failing_since=since, busy_until=quiet_until_us)
    )
    return int(since)


def deliveries(connection: Connection, id_: str, *, before: int, limit: int) -> list[Delivery]:
    """What became of a webhook's messages, the newest first; with numbers below ``before`` (0: all)."""
    query = _joined(id_).order_by(webhook_messages.c.number.desc()).limit(limit)
    if before:
        query = query.where(webhook_messages.c.number < before)
    return [
        Delivery(_message(row), row.next_at, row.delivered_at, row.status, row.error)
        for row in connection.execute(query)
    ]


def again(connection: Connection, id_: str, message: str, *, now_us: int) -> int:
    """Send a message once more, or (``""``) all that failed for good. Returns how many."""
    numbers = select(webhook_messages.c.number).where(webhook_messages.c.id == message)
    which = (
        webhook_deliveries.c.message.in_(numbers)
        if message
        else and_(webhook_deliveries.c.next_at.is_(None), webhook_deliveries.c.delivered_at.is_(None))
    )
    values = {"next_at": now_us, "attempts": 0, "delivered_at": None}
    changed = connection.execute(
        update(webhook_deliveries).where(webhook_deliveries.c.webhook == id_, which).values(**values)
    )
    busy(connection, id_, until_us=0)  # whoever asks does not want to wait; what is being sent may come twice
    return int(changed.rowcount)


def sweep(connection: Connection, *, now_us: int) -> None:
    """Forget what is too old to be asked about."""
    is_old = (webhook_messages.c.type == THRESHOLD, webhook_messages.c.at < now_us - THRESHOLDS_KEPT_S * _US)
    thresholds = select(webhook_messages.c.number).where(*is_old)
    is_delivered = (webhook_deliveries.c.delivered_at.is_not(None), webhook_deliveries.c.next_at.is_(None))
    connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.message.in_(thresholds), *is_delivered))
    is_left = exists().where(webhook_deliveries.c.message == webhook_messages.c.number)
    connection.execute(delete(webhook_messages).where(*is_old, ~is_left))
    old = select(webhook_messages.c.number).where(webhook_messages.c.at < now_us - KEPT_S * _US)
    connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.message.in_(old)))
    connection.execute(delete(webhook_messages).where(webhook_messages.c.at < now_us - KEPT_S * _US))
    connection.execute(delete(quota_notices).where(quota_notices.c.ends_s < now_us // _US - NOTICES_KEPT_S))


def _due(connection: Connection, id_: str, now_us: int) -> Sequence[tuple[Message, int]]:
    query = _joined(id_).where(webhook_deliveries.c.next_at <= now_us).order_by(webhook_messages.c.number)
    return [(_message(row), row.attempts) for row in connection.execute(query.limit(MESSAGES_MAX))]


def _joined(id_: str) -> Any:
    return (
        select(webhook_messages, webhook_deliveries)
        .join(webhook_deliveries, webhook_deliveries.c.message == webhook_messages.c.number)
        .where(webhook_deliveries.c.webhook == id_)
    )


def _settle(connection: Connection, id_: str, number: int, values: dict[str, Any]) -> None:
    mine = (webhook_deliveries.c.webhook == id_, webhook_deliveries.c.message == number)
    connection.execute(update(webhook_deliveries).where(*mine).values(**values))


def _wants(row: Row[Any], type_: str, tenant: str) -> bool:
    return type_ in json.loads(row.events) and row.tenant in ("", tenant)


def _wants_threshold(row: Row[Any], reached: Reached) -> bool:
    return reached.percent in json.loads(row.thresholds) and is_told(reached.per, Period(row.shortest_window))


def _waiting(connection: Connection, id_: str) -> int:
    mine = (webhook_deliveries.c.webhook == id_, webhook_deliveries.c.next_at.is_not(None))
    return connection.scalar(select(func.count()).select_from(webhook_deliveries).where(*mine)) or 0


def _webhook(row: Row[Any], waiting: int = 0) -> Webhook:
    return Webhook(
        row.id,
        row.url,
        tuple(json.loads(row.events)),
        tuple(json.loads(row.thresholds)),
        row.tenant,
        row.created_at,
        row.created_by,
        row.disabled_at,
        row.disabled_why,
        row.failing_since,
        waiting,
        Period(row.shortest_window),
        row.dropped,
        row.nonce,
        row.old_nonce or "",
        row.old_until,
    )


def _message(row: Row[Any]) -> Message:
    return Message(row.number, row.id, row.at, row.type, row.tenant, json.loads(row.data), row.attempts)
