"""``Idempotency-Key``: a POST that is sent again with the same key is done once, and answered the same.

Source: draft-ietf-httpapi-idempotency-key-header, ADR 0037. The same key with another request is 422; while the first
is being done, 409. Answers are kept for a day, for each caller apart (a key, or a subject of the issuer), who is asked
for a credential that is still good. What was refused (4xx) or failed (5xx) is not kept: sent again it is done anew. But
a refusal that comes after a commit is, as doing it anew would change something twice. See ``store/idempotency.py`` for
crashes in between.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Final

import structlog
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from licet_control_plane.api.auth import identified
from licet_control_plane.api.problems import RETRY_AFTER_S, Problem, response
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.store import idempotency
from licet_control_plane.store.database import DatabaseUnavailable, with_each_commit
from licet_control_plane.store.idempotency import Answer, Standing

log: Final = structlog.get_logger(__name__)

HEADER: Final = "idempotency-key"
REPLAYED: Final = "idempotency-replayed"
KEY_CHARACTERS_MAX: Final = 255
ANSWER_BYTES_MAX: Final = 256 * 1024
"""Answers of changes are a few kilobytes; one that is larger is not kept, and cannot be had again."""
KEPT_HEADERS: Final = ("content-type", "etag", "location")
NOT_LOOKED_AT: Final = frozenset(
    {
        "/v1/api-keys",
        "/v1/audit/verify",
        "/v1/bundles/diff",
        "/v1/ledger/reconcile",
        "/v1/ledger/verify",
        "/v1/sidecar/snapshot",
        "/v1/usage/batches",
    }
)
"""POSTs that change nothing, or say by themselves which they are: a key is not looked at. Their answers can be long.
Nor of one that makes an API key, which has a name to be unique by: its answer is nowhere to be kept."""
_SECRET: Final = re.compile(r"/v1/webhooks(/[^/]+/secret)?")
"""POSTs that are done once, and whose answers hold a secret, which is nowhere to be kept."""


class Idempotency:
    """ASGI middleware. Sees the whole body, so it belongs behind the limit of its size."""

    def __init__(self, app: ASGIApp, plane: ControlPlane) -> None:
        self._app = app
        self._plane = plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer for it."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        key = headers.get(HEADER)
        credential = headers.get("authorization", "")
        if key is None or not credential or scope["method"] != "POST" or not _is_change(scope["path"]):
            await self._app(scope, receive, send)
            return
        key = key.strip().strip('"')
        if not 0 < len(key) <= KEY_CHARACTERS_MAX or not key.isascii() or not key.isprintable():
            fix = f"Send 1 to {KEY_CHARACTERS_MAX} printable ASCII characters, such as a random UUID."
            problem = response(400, "Idempotency-Key cannot be used.", fix, kind="idempotency-key")
            await problem(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            return
        try:
            who = await identified(Request(scope))
        except Problem:
            await self._app(scope, _again(body), send)  # which says so, and notes it in the audit trail
            return
        except DatabaseUnavailable as error:
            await _unavailable(error)(scope, receive, send)
            return
        caller = hashlib.sha256(who.identity.encode()).hexdigest()
        target = f"{scope['path']}?{scope['query_string'].decode('latin-1')}"
        request = hashlib.sha256(target.encode() + b"\n" + body).hexdigest()
        write = self._plane.database.write
        now_us = self._plane.now_us()
        try:
            found = await write(idempotency.begin, caller, key, request, now_us=now_us)
        except DatabaseUnavailable as error:
            await _unavailable(error)(scope, receive, send)
            return
        if found is not Standing.NEW:
            await _answered(found)(scope, receive, send)
            return

        async def settle(answer: Answer) -> None:
            is_refusal = answer.status >= HTTPStatus.BAD_REQUEST
            if _SECRET.fullmatch(scope["path"]) and not is_refusal:
                answer = _without_secret()
            try:
                if not is_refusal or not await write(idempotency.forget, caller, key, begun_us=now_us):
                    await write(idempotency.keep, caller, key, answer, begun_us=now_us)
            except DatabaseUnavailable as error:  # it was done all the same, and is answered
                log.warning("an answer could not be kept", reason=str(error))

        sent = _Sent(send, settle)
        try:
            with with_each_commit(partial(idempotency.commit, caller=caller, key=key, begun_us=now_us)):
                await self._app(scope, _again(body), sent)
        finally:
            if not sent.is_settled:
                await write(idempotency.forget, caller, key, begun_us=now_us)


def _is_change(path: str) -> bool:
    return path.startswith("/v1/") and path not in NOT_LOOKED_AT and not path.endswith("/subjects/export")


def _unavailable(error: DatabaseUnavailable) -> Response:
    return response(503, f"{error}.", "Try again; nothing was changed.", headers={"Retry-After": RETRY_AFTER_S})


def _answered(found: Answer | Standing) -> Response:
    if isinstance(found, Answer):
        return Response(found.body, found.status, {**found.headers, REPLAYED: "true"})
    if found is Standing.OTHER:
        return response(
            422,
            "The Idempotency-Key was sent with another request.",
            "Use a new key for each thing that is to be done.",
            kind="idempotency-key-reused",
        )
    if found is Standing.RUNNING:
        return response(
            409,
            "The request with this Idempotency-Key is being done.",
            "Send it again a little later: it is answered as the first one.",
            headers={"Retry-After": "1"},
            kind="idempotency-running",
        )
    return response(
        409,
        "The request with this Idempotency-Key was done, and its answer was lost.",
        "Read what it changed; do not send it with a new key.",
        kind="idempotency-lost",
    )


def _without_secret() -> Answer:
    told = response(
        409,
        "The request with this Idempotency-Key was done; its answer held a secret, which is shown once.",
        "If you do not have the secret, rotate it, with a new key.",
        kind="idempotency-lost",
    )
    return Answer(told.status_code, {"content-type": told.headers["content-type"]}, bytes(told.body))


class _Sent:
    """Passes an answer on, and has it settled first: whoever has it finds it again, whatever dies then; and whoever was
    refused can send the request again at once."""

    def __init__(self, send: Send, settle: Callable[[Answer], Awaitable[None]]) -> None:
        self.is_settled = False
        self._send = send
        self._settle = settle
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = Headers(raw=message["headers"])
            self._headers = {name: headers[name] for name in KEPT_HEADERS if name in headers}
        elif message["type"] == "http.response.body":
            if len(self._body) <= ANSWER_BYTES_MAX:
                self._body += message.get("body", b"")
            is_answer = self._status < HTTPStatus.INTERNAL_SERVER_ERROR and len(self._body) <= ANSWER_BYTES_MAX
            if not message.get("more_body", False) and is_answer:
                with with_each_commit(None):
                    await self._settle(Answer(self._status, self._headers, bytes(self._body)))
                self.is_settled = True
        await self._send(message)


async def _body(receive: Receive) -> bytes | None:
    """The whole body; ``None`` when the client went away."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes) -> Receive:
    """A body that was read, to be read again."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return receive
