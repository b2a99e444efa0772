"""Refuses bodies that are too large before they are read."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from licet_control_plane.api.problems import response

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
"""Ten thousand policies of a kilobyte and a half."""


class _TooLarge(Exception):
    pass


class BodyLimit:
    """ASGI middleware. Counts what arrives, since a length that was declared need not be true."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
            await _refuse(scope, receive, send)
            return
        received = 0
        started = False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > BODY_BYTES_MAX:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if received > BODY_BYTES_MAX:
                return  # whatever the application made of the body that was cut short
            started = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooLarge:
            pass
        if received > BODY_BYTES_MAX and not started:
            await _refuse(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    detail = f"The body is larger than {BODY_BYTES_MAX // 1024 // 1024} MiB."
    await response(413, detail, "Push fewer documents in one bundle.")(scope, receive, send)
