"""At most so many requests a second from one caller (an API key, or a subject of the issuer), or from one address that
has shown no admitted credential.

A bucket each, in memory, so of this control plane alone. What sidecars send on the second route is not counted: it is
the bill. Source: draft-ietf-httpapi-ratelimit-headers-10, for the headers that every answer carries.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from licet_control_plane.api.auth import Caller
from licet_control_plane.api.problems import response

BURST_S: Final = 2
"""Seconds' worth of requests that may come at once."""
CALLERS_MAX: Final = 10_000
"""Buckets, and keys that were admitted, that are remembered: a few megabytes. The least recent make room."""
NOT_COUNTED: Final = ("/v1/sidecar/", "/v1/usage/batches")


class Buckets:
    """A bucket for each caller. Pure but for what it remembers; ``now_s`` is a clock that never goes back."""

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.burst = max(1, math.ceil(per_s * BURST_S))
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, now_s: float) -> tuple[int, float]:
        """Requests that are left after this one, and the seconds to wait when there was none left, else 0."""
        level, at_s = self._levels.pop(caller, (float(self.burst), now_s))
        level = min(float(self.burst), level + (now_s - at_s) * self.per_s)
        is_admitted = level >= 1
        self._levels[caller] = (level - 1 if is_admitted else level, now_s)
        while len(self._levels) > CALLERS_MAX:
            self._levels.popitem(last=False)
        return (int(level - 1), 0.0) if is_admitted else (0, (1 - level) / self.per_s)


class RateLimit:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, per_s: float, now_s: Callable[[], float]) -> None:
        self._app = app
        self._buckets = Buckets(per_s)
        self._now_s = now_s
        self._admitted: OrderedDict[str, str] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 429."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith("/v1/") or path.startswith(NOT_COUNTED):
            await self._app(scope, receive, send)
            return
        # As ``auth`` reads it: written in other ways it is the same, or each would be one more that is not known yet.
        credential = Headers(scope=scope).get("authorization", "").partition(" ")[2].strip()
        key = hashlib.sha256(credential.encode()).hexdigest()
        # A made-up key must not get a bucket of its own.
        caller = self._admitted.get(key) or str((scope.get("client") or ("",))[0])
        state = scope.setdefault("state", {})
        left, wait_s = self._buckets.take(caller, self._now_s())
        burst = self._buckets.burst
        said = {
            "RateLimit-Policy": f'"key";q={burst};w={BURST_S}',
            "RateLimit": f'"key";r={left};t={math.ceil((burst - left) / self._buckets.per_s)}',
        }
        if wait_s:
            problem = response(
                429,
                f"More than {self._buckets.per_s:g} requests a second.",
                "Wait as long as Retry-After says, and send fewer.",
                headers={**said, "Retry-After": str(math.ceil(wait_s))},
            )
            await problem(scope, receive, send)
            return

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(said)
                who = state.get("caller")
                if isinstance(who, Caller):
                    self._remember(key, who.identity)
                elif message["status"] == HTTPStatus.UNAUTHORIZED:
                    self._admitted.pop(key, None)
            await send(message)

        await self._app(scope, receive, telling)

    def _remember(self, key: str, caller: str) -> None:
        self._admitted[key] = caller
        self._admitted.move_to_end(key)
        if len(self._admitted) > CALLERS_MAX:
            self._admitted.popitem(last=False)
