"""ETags of what is read, and 304 for whoever has it already (``If-None-Match``)."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DIGITS: Final = 32


class ConditionalGet:
    """ASGI middleware. An answer that comes in one piece gets a digest of it as its ETag, unless it has one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer if it is not what the caller has."""
        if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("if-none-match", "")
        start: Message | None = None

        async def tagged(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.OK:
                start = message
                return
            if start is None:
                await send(message)
                return
            head, start = start, None
            headers = MutableHeaders(scope=head)
            if "etag" not in headers and not message.get("more_body", False):
                headers["etag"] = f'"{hashlib.sha256(message.get("body", b"")).hexdigest()[:_DIGITS]}"'
            if asked and "etag" in headers and _matches(asked, headers["etag"]):
                for name in ("content-length", "content-type"):
                    del headers[name]
                await send({**head, "status": HTTPStatus.NOT_MODIFIED.value})
                await send({"type": "http.response.body", "body": b""})
                return
            await send(head)
            await send(message)

        await self._app(scope, receive, tagged)


def _matches(asked: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in asked.split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags
