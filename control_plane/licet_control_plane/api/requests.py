"""An id for each request: the one that came, or a new one. It is answered, and stands in the audit trail."""

from __future__ import annotations

import re
import secrets
from typing import Final

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "X-Request-Id"
_PATTERN: Final = re.compile(r"[0-9A-Za-z._-]{1,64}")


class RequestIds:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        came = Headers(scope=scope).get(HEADER, "")
        id_ = came if _PATTERN.fullmatch(came) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = id_

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = id_
            await send(message)

        await self._app(scope, receive, named)


def request_id(request: Request) -> str:
    """The id of a request."""
    id_: str = request.state.request_id
    return id_
