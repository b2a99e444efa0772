"""Collects what sidecars ask in ``licet:asks``; the publisher answers.

One task. It waits in a blocking read, so that a check that stands still for a missing mark is answered at once.
"""

from __future__ import annotations

import asyncio
from typing import Final

from licet.domain.ids import TENANT_PATTERN
from licet.wire.names import RedisNames
from licet_control_plane.redis_link import BLOCK_MS, Redis, RedisRefused, RedisUnavailable, backoff_s, redis_errors

ASKS_MAX: Final = 10_000
"""Tenants waiting for an answer. More are dropped: a sidecar that gets none asks again."""
READ_MAX: Final = 1_000


class AsksReader:
    """``waiting``: tenant to its newest reason, in the order first asked. ``dropped`` counts those without room.

    It collects only while ``wanted`` is set: what it reads, nobody else answers.
    """

    def __init__(self, redis: Redis, names: RedisNames, wake: asyncio.Event) -> None:
        self._redis = redis
        self._names = names
        self._wake = wake
        self.waiting: dict[str, str] = {}
        self.dropped = 0
        self.wanted = asyncio.Event()

    def take(self, count: int) -> dict[str, str]:
        """Remove and return up to ``count`` asks, oldest first."""
        return {tenant: self.waiting.pop(tenant) for tenant in list(self.waiting)[:count]}

    async def run(self) -> None:
        """Collect until cancelled."""
        last = "0"
        failures = 0
        while True:
            await self.wanted.wait()
            try:
                last = await self._read(last)
                failures = 0
            except (RedisUnavailable, RedisRefused):
                # The publisher, on the same server, reports it; this task only waits for better times.
                failures += 1
                last = "0"  # another server numbers its entries anew
                await asyncio.sleep(backoff_s(failures))

    async def _read(self, last: str) -> str:
        stream = self._names.asks()
        with redis_errors():
            answer = await self._redis.xread({stream: last}, count=READ_MAX, block=BLOCK_MS)
        if not answer:
            # After a wipe the stream's ids may start lower than the last one read.
            return "0"
        entries = answer[0][1]
        for _, fields in entries:
            tenant = fields.get(b"tenant", b"").decode(errors="replace")
            if not TENANT_PATTERN.fullmatch(tenant):
                continue
            if len(self.waiting) >= ASKS_MAX and tenant not in self.waiting:
                self.dropped += 1
                continue
            self.waiting[tenant] = fields.get(b"why", b"").decode(errors="replace")
        self._wake.set()
        newest: str = entries[-1][0].decode()
        with redis_errors():
            # Only what was read: an entry that arrived meanwhile stays.
            await self._redis.xdel(stream, *(entry for entry, _ in entries))
        return newest
