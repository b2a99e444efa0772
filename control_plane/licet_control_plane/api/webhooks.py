"""``/v1/webhooks``: where events of licenses and quotas are sent."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from typing import Annotated, Any, Final, Literal

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from sqlalchemy import Connection

from licet.domain.windows import Period
from licet_control_plane.api.auth import Caller, CallerAsked, plane_of, v1_router
from licet_control_plane.api.fields import By, Count, Instant, said
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.core.suggestion import did_you_mean
from licet_control_plane.core.webhook_events import (
    PERCENT_MAX,
    TEST,
    THRESHOLDS,
    TYPES,
    checked_url,
    secret_of_webhook,
    written_secret,
)
from licet_control_plane.store import access, webhooks
from licet_control_plane.store.webhooks import Delivery, Webhook

router = v1_router("/webhooks", tag="webhooks")

ALL: Final = "*"
OVERLAP_S: Final = 86_400
"""A day: long enough to give receivers the new secret by hand."""
OVERLAP_S_MAX: Final = 30 * 86_400
"""A month: a secret that two know for longer was not rotated."""
_TERMS: Final = frozenset({"url", "events", "thresholds", "shortest_window", "tenant"})


class NewWebhook(BaseModel):
    """``events``: types, or ``*`` for all. ``thresholds``: percentages of a quota; ``shortest_window``: only of windows
    that are at least so long. ``tenant``: only of this one."""

    model_config = ConfigDict(extra="forbid")

    url: str
    events: list[str] = Field([ALL], min_length=1, max_length=len(TYPES))
    thresholds: list[Annotated[StrictInt, Field(ge=1, le=PERCENT_MAX)]] = Field(list(THRESHOLDS), max_length=10)
    shortest_window: Literal["minute", "hour", "day", "week", "month", "year"] = "hour"
    tenant: str = Field("", max_length=128)


class WebhookView(BaseModel):
    """A webhook. ``waiting``: messages that were not delivered yet; ``dropped``: thresholds for which too many waited;
    ``failing_since``: from when on none was taken; ``old_secret_until``: when the secret before stops to sign too."""

    id: str = said("wh_ and 16 hex digits")
    url: str = said("Where events are sent")
    events: list[str] = said("Types that it is told of")
    thresholds: list[int] = said("Percentages of a quota that it is told of")
    shortest_window: str = said("Of windows that are shorter it is told no thresholds; a period such as hour")
    tenant: str = said("The only one it is told of; empty for all")
    created_at: Instant
    created_by: By
    disabled_at: Instant | None = said("Since when nothing is sent; null for never")
    disabled_why: str = said("Why not; empty while it is enabled")
    failing_since: Instant | None = said("Since when nothing was taken; null while it is")
    waiting: Annotated[Count, said("Messages that were not delivered yet")]
    dropped: Annotated[Count, said("Thresholds that it was not told, because too many messages waited")]
    old_secret_until: Instant | None = said("Until when the secret before the last rotation signs too; null for not")


class CreatedWebhook(WebhookView):
    """With the ``secret`` that signs its requests, which is not shown again."""

    secret: str = said("Signs its requests")


class SecretRotation(BaseModel):
    """``overlap_s``: for so long the secret that is replaced signs too; 0: it does not sign anything any more."""

    model_config = ConfigDict(extra="forbid")

    overlap_s: StrictInt = Field(OVERLAP_S, ge=0, le=OVERLAP_S_MAX)


class WebhookList(BaseModel):
    """All webhooks: there are few."""

    items: list[WebhookView] = said("The oldest first")
    next: None = Field(None, description="There is one page")


class DeliveryView(BaseModel):
    """A message, and what became of it: ``delivered``, ``waiting`` or ``failed``."""

    id: str = said("Of the message")
    type: str = said("Such as license.created")
    tenant: str = said("Whom it is about; empty for nobody in particular")
    at: Annotated[Instant, said("When it happened")]
    state: Literal["delivered", "waiting", "failed"] = said("Failed: it is not tried again by itself")
    attempts: Annotated[Count, said("How often it was sent")]
    next_at: Instant | None = said("When it is sent again; null for never")
    delivered_at: Instant | None = said("When it was taken; null for never")
    status: int | None = said("HTTP status of the last answer; null for none")
    error: str = said("Why it was not taken; empty for nothing")


class DeliveryPage(BaseModel):
    """The newest first. ``next`` is the ``before`` of the next page, ``null`` on the last."""

    items: list[DeliveryView] = said("The newest first")
    next: str | None = said("The `before` of the next page; null on the last")


class Redelivery(BaseModel):
    """``message``: the id of one; empty for all that failed for good."""

    model_config = ConfigDict(extra="forbid")

    message: str = Field("", max_length=64)


class Redelivered(BaseModel):
    """How many messages are sent again."""

    messages: Annotated[Count, said("That are sent again")]


@router.post("", status_code=201, response_model=CreatedWebhook)
async def create_webhook(request: Request, response: Response, body: NewWebhook, caller: CallerAsked) -> dict[str, Any]:
    """Send events to an address from now on. The answer has the secret, once."""
    plane = plane_of(request)
    url = checked_url(body.url, private=plane.config.webhooks_private)
    events = TYPES if ALL in body.events else tuple(dict.fromkeys(body.events))
    for event in events:
        if event not in TYPES:
            raise ChangeInvalid("events", f"there is no event {event!r}", did_you_mean(event, TYPES))
    now_us = plane.now_us()
    thresholds = tuple(sorted(set(body.thresholds)))
    made = Webhook(
        f"wh_{secrets.token_hex(8)}",
        url,
        events,
        thresholds,
        body.tenant,
        now_us,
        caller.name,
        shortest_window=Period(body.shortest_window),
        nonce=secrets.token_hex(16),
    )

    def add(connection: Connection) -> None:
        if not webhooks.add(connection, made):  # refused within the transaction, so that it commits nothing
            raise Problem(409, f"There are {webhooks.WEBHOOKS_MAX} webhooks.", "Delete one that is not needed.")
        _record(connection, caller, "webhook.create", made.id, None, _terms(made), now_us)

    await plane.database.write(add)
    response.headers["Location"] = f"/v1/webhooks/{made.id}"
    return _with_secret(plane, made)


@router.get("", response_model=WebhookList)
async def list_webhooks(request: Request) -> dict[str, Any]:
    """All webhooks, the oldest first."""
    return {"items": [described(one) for one in await plane_of(request).database.read(webhooks.every)]}


@router.get("/{webhook}", response_model=WebhookView)
async def get_webhook(request: Request, webhook: str) -> dict[str, Any]:
    """One webhook."""
    return described(await _found(plane_of(request), webhook))


@router.delete("/{webhook}", response_model=WebhookView)
async def delete_webhook(request: Request, webhook: str, caller: CallerAsked) -> dict[str, Any]:
    """Send nothing to it any more. What was waiting is dropped."""
    plane = plane_of(request)
    found = await _found(plane, webhook)
    now_us = plane.now_us()

    def remove(connection: Connection) -> None:
        webhooks.remove(connection, webhook)
        _record(connection, caller, "webhook.delete", webhook, _terms(found), None, now_us)

    await plane.database.write(remove)
    return described(found)


@router.post("/{webhook}/enable", response_model=WebhookView)
async def enable_webhook(request: Request, webhook: str, caller: CallerAsked) -> dict[str, Any]:
    """Send to a webhook again that was disabled; what waits comes first."""
    plane = plane_of(request)
    found = await _found(plane, webhook)
    now_us = plane.now_us()

    def enable(connection: Connection) -> None:
        webhooks.enable(connection, webhook)
        disabled = {"disabled": found.disabled_at_us is not None}
        _record(connection, caller, "webhook.enable", webhook, disabled, {"disabled": False}, now_us)

    await plane.database.write(enable)
    plane.webhook_wake.set()
    return described(await _found(plane, webhook))


@router.post("/{webhook}/secret", response_model=CreatedWebhook)
async def rotate_secret(request: Request, webhook: str, body: SecretRotation, caller: CallerAsked) -> dict[str, Any]:
    """Replace the secret of a webhook. The answer has the new one, once; for a while requests are signed with both."""
    plane = plane_of(request)
    now_us = plane.now_us()

    def rotate(connection: Connection) -> Webhook:
        rotated = webhooks.rotate_secret(
            connection, webhook, secrets.token_hex(16), overlap_s=body.overlap_s, now_us=now_us
        )
        if rotated is None:
            raise _unknown(webhook)
        after = {"old_secret_until": format_us(rotated.old_until_us)}
        _record(connection, caller, "webhook.rotate_secret", webhook, None, after, now_us)
        return rotated

    return _with_secret(plane, await plane.database.write(rotate))


@router.post("/{webhook}/test", response_model=WebhookView)
async def test_webhook(request: Request, webhook: str, caller: CallerAsked) -> dict[str, Any]:
    """Send it ``webhook.test`` now; its deliveries say how that went."""
    plane = plane_of(request)
    found = await _found(plane, webhook)
    if found.disabled_at_us is not None:
        raise Problem(409, f"The webhook is disabled: {found.disabled_why}.", "Enable it first.")
    now_us = plane.now_us()

    def send(connection: Connection) -> None:
        webhooks.announce(connection, TEST, found.tenant, {"webhook": webhook}, now_us=now_us, only=webhook)
        _record(connection, caller, "webhook.test", webhook, None, None, now_us)

    await plane.database.write(send)
    plane.webhook_wake.set()
    return described(await _found(plane, webhook))


@router.get("/{webhook}/deliveries", response_model=DeliveryPage)
async def list_deliveries(
    request: Request,
    webhook: str,
    before: Annotated[str, Query(pattern="^[0-9]{0,18}$")] = "",
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> dict[str, Any]:
    """What a webhook was told, and what it answered, of the last 30 days."""
    plane = plane_of(request)
    await _found(plane, webhook)
    page = await plane.database.read(webhooks.deliveries, webhook, before=int(before or 0), limit=limit + 1)
    following = str(page[limit - 1].message.number) if len(page) > limit else None
    return {"items": [_delivery(one) for one in page[:limit]], "next": following}


@router.post("/{webhook}/redeliver", response_model=Redelivered)
async def redeliver(request: Request, webhook: str, body: Redelivery, caller: CallerAsked) -> dict[str, Any]:
    """Send a message again, or all that failed for good."""
    plane = plane_of(request)
    await _found(plane, webhook)
    now_us = plane.now_us()

    def again(connection: Connection) -> int:
        messages = webhooks.again(connection, webhook, body.message, now_us=now_us)
        if body.message and not messages:
            fix = "Its deliveries list what it was told."
            raise Problem(404, f"The webhook was never told {body.message!r}.", fix)
        after = {"message": body.message, "messages": messages}
        _record(connection, caller, "webhook.redeliver", webhook, None, after, now_us)
        return messages

    count = await plane.database.write(again)
    plane.webhook_wake.set()
    return {"messages": count}


def described(webhook: Webhook) -> dict[str, Any]:
    """A webhook as the API shows it."""
    return {
        "id": webhook.id,
        "url": webhook.url,
        "events": list(webhook.events),
        "thresholds": list(webhook.thresholds),
        "shortest_window": webhook.shortest_window.value,
        "tenant": webhook.tenant,
        "created_at": format_us(webhook.created_at_us),
        "created_by": webhook.created_by,
        "disabled_at": format_us(webhook.disabled_at_us),
        "disabled_why": webhook.disabled_why,
        "failing_since": format_us(webhook.failing_since_us),
        "waiting": webhook.waiting,
        "dropped": webhook.dropped,
        "old_secret_until": format_us(webhook.old_until_us),
    }


def _delivery(one: Delivery) -> dict[str, Any]:
    message = one.message
    return {
        "id": message.id,
        "type": message.type,
        "tenant": message.tenant,
        "at": format_us(message.at_us),
        "state": one.state,
        "attempts": message.attempts,
        "next_at": format_us(one.next_at_us),
        "delivered_at": format_us(one.delivered_at_us),
        "status": one.status,
        "error": one.error,
    }


async def _found(plane: ControlPlane, webhook: str) -> Webhook:
    found = await plane.database.read(webhooks.get, webhook)
    if found is None:
        raise _unknown(webhook)
    return found


def _unknown(webhook: str) -> Problem:
    return Problem(404, f"There is no webhook {webhook!r}.", "GET /v1/webhooks lists them.", kind="webhook-unknown")


def _with_secret(plane: ControlPlane, webhook: Webhook) -> dict[str, Any]:
    secret = secret_of_webhook(plane.ledger_key, webhook.id, webhook.nonce)
    return {**described(webhook), "secret": written_secret(secret)}


def _terms(webhook: Webhook) -> dict[str, Any]:
    """What an operator set, for the audit trail."""
    return {name: value for name, value in asdict(webhook).items() if name in _TERMS}


def _record(
    connection: Connection, caller: Caller, action: str, target: str, before: Any, after: Any, now_us: int
) -> None:
    access.record(connection, by=caller.name, action=action, target=target, before=before, after=after, now_us=now_us)
