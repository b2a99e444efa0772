"""Sends to webhooks what they are to be told: at least once, signed, for days, and none in another's way.

Any number of control planes may run it: whoever sends to a webhook says so in the database first, so that one does, and
what a control plane was sending when it died is sent again by the next. Messages of a webhook go one after the other,
the oldest first; after one that was not taken the webhook is left in peace for a while, and it comes again later.

Addresses are looked up and checked for each connection, and the connection is made to what was checked: a name that
meanwhile means something else leads nowhere. Redirects are not followed, and of an answer only the status is read.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import httpcore
import structlog
from sqlalchemy import Connection

from licet_control_plane.core.cloud_events import signed_headers
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.core.webhook_events import (
    CONTENT_TYPE,
    body_of,
    may_connect,
    retry_at_us,
    secret_of_webhook,
)
from licet_control_plane.redis_link import backoff_s
from licet_control_plane.store import access, webhooks
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.store.webhooks import Message, Webhook

LOOK_S: Final = 1.0
REQUEST_S_MAX: Final = 15.0
"""All of a request, from looking up the address to the status of the answer."""
QUIET_S_MAX: Final = 60.0
"""How long a webhook is left in peace after a failure, at most: one request a minute tells when it is back."""
DISABLE_AFTER_S: Final = 5 * 86_400
"""Without a single message taken. Longer than a message is tried for."""
SWEEP_S: Final = 3_600.0
BY: Final = "control-plane"
_US: Final = 1_000_000

log: Final = structlog.get_logger(__name__)


class AddressRefused(Exception):
    """The name leads to an address that nothing may be sent to."""


@dataclass(slots=True)
class WebhookCounts:
    """Since the start."""

    delivered: int = 0
    failures: int = 0
    disabled: int = 0


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that may be connected to, and no others. ``private``: also within one's own network."""

    def __init__(self, *, private: bool) -> None:
        self._private = private
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Look the name up, and connect to one of its addresses."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} cannot be looked up: {error}") from error
        addresses = dict.fromkeys(str(one[4][0]) for one in found)
        allowed = [one for one in addresses if may_connect(one, private=self._private)]
        if not allowed:
            raise AddressRefused(f"{host} leads to {', '.join(addresses)}, within a private network")
        for last, address in enumerate(allowed, 1 - len(allowed)):
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError:
                if last == 0:
                    raise
        raise AssertionError("there is a last address")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Never."""
        raise AddressRefused(path)

    async def sleep(self, seconds: float) -> None:
        """As asked."""
        await self._inner.sleep(seconds)


class WebhookSender:
    """``run`` is the task. ``wake`` lets it look at once."""

    def __init__(
        self,
        database: Database,
        *,
        deployment: str,
        ledger_key: LedgerKey,
        private: bool,
        now_s: Callable[[], float],
        wake: asyncio.Event,
    ) -> None:
        self.counts = WebhookCounts()
        self._database = database
        self._deployment = deployment
        self._ledger_key = ledger_key
        self._now_s = now_s
        self._wake = wake
        self._swept_at_s = 0.0
        self._network = CheckedNetwork(private=private)
        self._tls = ssl.create_default_context()

    async def run(self) -> None:
        """Send until cancelled."""
        failures = 0
        async with asyncio.TaskGroup() as sending:
            while True:
                try:
                    for webhook, messages in await self._claim():
                        sending.create_task(self._send_all(webhook, messages))
                    failures = 0
                except DatabaseUnavailable as error:
                    failures += 1
                    log.warning("webhooks wait for the database", reason=str(error))
                    await asyncio.sleep(backoff_s(failures))
                    continue
                self._wake.clear()
                try:
                    await asyncio.wait_for(self._wake.wait(), LOOK_S)
                except TimeoutError:
                    pass

    async def _claim(self) -> list[tuple[Webhook, list[Message]]]:
        now_s = self._now_s()
        now_us = int(now_s * _US)
        if now_s - self._swept_at_s > SWEEP_S:
            await self._database.write(webhooks.sweep, now_us=now_us)
            self._swept_at_s = now_s
        if not await self._database.read(webhooks.is_anything_due, now_us=now_us):
            return []
        return await self._database.write(webhooks.claim, now_us=now_us)

    async def _send_all(self, webhook: Webhook, messages: list[Message]) -> None:
        """Send until one is not taken. What a failing database keeps from being noted is sent again."""
        try:
            for message in messages:
                if not await self._send(webhook, message):
                    return
            await self._database.write(webhooks.busy, webhook.id, until_us=0)
            self._wake.set()  # there may be more
        except DatabaseUnavailable as error:
            log.warning("a delivery could not be noted", webhook=webhook.id, reason=str(error))

    async def _send(self, webhook: Webhook, message: Message) -> bool:
        status: int | None = None
        error = ""
        try:
            status = await self._post(webhook, message)
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, AddressRefused) as failure:
            error = f"{type(failure).__name__}: {failure}"
        except (TimeoutError, ssl.SSLError, OSError) as failure:
            error = f"{type(failure).__name__}: {failure}" if str(failure) else f"nothing within {REQUEST_S_MAX:g} s"
        except Exception as failure:  # supervised: whatever an address or its answer does is in nobody else's way
            log.exception("a webhook could not be sent to", webhook=webhook.id)
            error = f"{type(failure).__name__}: {failure}"
        now_us = int(self._now_s() * _US)
        attempts = message.attempts + 1
        if status is not None and HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            await self._database.write(
                webhooks.delivered, webhook.id, message.number, status=status, attempts=attempts, now_us=now_us
            )
            self.counts.delivered += 1
            return True
        self.counts.failures += 1
        why = error or f"it answered {status}"
        await self._database.write(
            self._note_failure, webhook, message, status=status, attempts=attempts, why=why, now_us=now_us
        )
        return False

    def _note_failure(
        self,
        connection: Connection,
        webhook: Webhook,
        message: Message,
        *,
        status: int | None,
        attempts: int,
        why: str,
        now_us: int,
    ) -> None:
        next_at_us = retry_at_us(attempts, now_us, random.random())
        quiet_s = min(QUIET_S_MAX, (next_at_us - now_us) / _US) if next_at_us else QUIET_S_MAX
        since_us = webhooks.failed(
            connection,
            webhook.id,
            message.number,
            next_at_us=next_at_us,
            status=status,
            attempts=attempts,
            error=why,
            now_us=now_us,
            quiet_until_us=now_us + int(quiet_s * _US),
        )
        if status == HTTPStatus.GONE:
            reason = "it answered 410: it does not want any more"
        elif now_us - since_us > DISABLE_AFTER_S * _US:
            reason = f"it took nothing for {DISABLE_AFTER_S // 86_400} days: {why}"
        else:
            return
        self.counts.disabled += 1
        log.warning("a webhook is disabled", webhook=webhook.id, reason=reason)
        webhooks.disable(connection, webhook.id, reason, now_us=now_us)
        access.record(
            connection,
            by=BY,
            action="webhook.disable",
            target=webhook.id,
            before={"disabled": False},
            after={"disabled": True, "why": reason},
            now_us=now_us,
        )

    async def _post(self, webhook: Webhook, message: Message) -> int:
        body = body_of(self._deployment, message.id, message.type, message.tenant, message.at_us, message.data)
        now_s = self._now_s()
        nonces = [webhook.nonce]
        if webhook.old_until_us is not None and now_s * _US < webhook.old_until_us:
            nonces.append(webhook.old_nonce)
        secrets = [secret_of_webhook(self._ledger_key, webhook.id, nonce) for nonce in nonces]
        headers = {**signed_headers(secrets, message.id, int(now_s), body), "content-type": CONTENT_TYPE}
        # A connection for each: events are few, and one that is kept would be checked once and used for days.
        async with (
            asyncio.timeout(REQUEST_S_MAX),
            httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._network) as pool,
            pool.stream("POST", webhook.url, headers=list(headers.items()), content=body) as answer,
        ):
            return int(answer.status)
