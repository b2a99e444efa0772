"""Sends usage events to one address: in order within a shard, at least once, and never in the drain's way.

One task a shard. It reads what comes next from the ledger, posts it, and notes in the database how far it is once the
receiver has answered 2xx: after a restart, or days without a receiver, it goes on from there. A request that is sent
again has the same ``webhook-id`` and the same events, read again: of who was erased meanwhile it says nothing any more.
After a restart it may be cut otherwise, and the ids of events are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import httpx
import structlog

from licet.wire.names import USAGE_SHARDS
from licet_control_plane.core.cloud_events import body_of, cloud_event, signed_headers
from licet_control_plane.core.sealed_events import Damaged
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.redis_link import backoff_s
from licet_control_plane.store import meta, sinks
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.store.sinks import EventsGone, NextEvent, Place

NAME: Final = "cloudevents"
EVENTS_MAX: Final = 500
"""Of one request: some 500 KB."""
POLL_S: Final = 1.0
"""How long an event may lie in the ledger before it is looked for."""
REQUEST_S_MAX: Final = 15.0
RETRY_S_MAX: Final = 60.0
"""Longest wait between attempts; also when the receiver asks for a longer one."""
_BACKOFF_FACTOR: Final = 6
"""Ten seconds for Redis are a minute for somebody else's server."""

log: Final = structlog.get_logger(__name__)


class NotTaken(Exception):
    """The receiver did not take a request. ``retry_after_s``: when it says to try again, 0 when it does not."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class SinkCounts:
    """Since the start. ``lag_blocks`` and ``oldest_at`` (microseconds) are by shard; ``trouble`` why one waits."""

    events: int = 0
    requests: int = 0
    failures: int = 0
    lag_blocks: dict[int, int] = field(default_factory=dict)
    oldest_at: dict[int, int] = field(default_factory=dict)
    trouble: dict[int, str] = field(default_factory=dict)


class _Request(NamedTuple):
    """How the events from ``place`` on were cut. What is in them is read for each attempt: it may be erased."""

    place: Place
    events: int
    id: str


class EventSender:
    """``run`` is the task of one shard; ``close`` lets the connections go."""

    def __init__(
        self,
        database: Database,
        *,
        url: str,
        secret: bytes,
        deployment: str,
        ledger_key: LedgerKey | None,
        now_s: Callable[[], float],
    ) -> None:
        """``ledger_key``: to send what is personal, too; ``None`` not to."""
        self.counts = SinkCounts()
        self.shards: Final = range(USAGE_SHARDS)
        self._database = database
        self._url = url
        self._secret = secret
        self._deployment = deployment
        self._ledger_key = ledger_key
        self._now_s = now_s
        self._requests: dict[int, _Request] = {}
        """By shard, what was not taken yet."""
        self._http = httpx.AsyncClient(timeout=REQUEST_S_MAX, follow_redirects=False)

    async def run(self, shard: int) -> None:
        """Send until cancelled, through everything that passes by itself."""
        failures = 0
        counts = self.counts
        while True:
            try:
                moved = await self._step(shard)
            except (NotTaken, DatabaseUnavailable, EventsGone, Damaged) as error:
                failures += 1
                counts.failures += 1
                if shard not in counts.trouble:
                    log.warning("usage events are not taken", shard=shard, reason=str(error))
                counts.trouble[shard] = str(error)
                asked_s = error.retry_after_s if isinstance(error, NotTaken) else 0.0
                await asyncio.sleep(min(RETRY_S_MAX, max(asked_s, _BACKOFF_FACTOR * backoff_s(failures))))
                continue
            failures = 0
            if counts.trouble.pop(shard, None) is not None:
                log.info("usage events are taken again", shard=shard)
            if not moved:
                await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Let the connections go; the tasks have ended."""
        await self._http.aclose()

    async def _step(self, shard: int) -> bool:
        """Send what comes next. Whether there was anything."""
        place = await self._database.read(sinks.place_of, NAME, shard)
        behind = await self._database.read(sinks.backlog, shard, place)
        self.counts.lag_blocks[shard] = behind.blocks
        if behind.oldest_at is None:
            self.counts.oldest_at.pop(shard, None)
            return False
        self.counts.oldest_at[shard] = behind.oldest_at
        request = self._requests.get(shard)
        if request is not None and request.place != place:
            request = None
        found, after = await self._database.read(
            sinks.events_from,
            shard,
            place,
            limit=request.events if request else EVENTS_MAX,
            ledger_key=self._ledger_key,
        )
        if request is None:
            about = await self._database.read(meta.read)
            where = f"{place.block}.{place.events}-{after.block}.{after.events}"
            id_ = f"{self._deployment}-{about.ledger_generation}-{shard}-{where}"
            request = self._requests[shard] = _Request(place, len(found), id_)
        if found:
            await self._post(request.id, await asyncio.to_thread(self._body, found))
        await self._database.write(sinks.move, NAME, shard, after, now_us=int(self._now_s() * 1_000_000))
        del self._requests[shard]
        self.counts.events += len(found)
        return after != place

    async def _post(self, id_: str, body: bytes) -> None:
        headers = signed_headers((self._secret,), id_, int(self._now_s()), body)
        try:
            answer = await self._http.post(self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise NotTaken(f"the receiver cannot be reached: {type(error).__name__}: {error}") from error
        if not answer.is_success:
            asked_s = 0.0
            with contextlib.suppress(ValueError):  # a date is not looked at: the next attempt comes soon enough
                asked_s = float(answer.headers.get("retry-after", 0))
            raise NotTaken(f"the receiver answered {answer.status_code}", asked_s)
        self.counts.requests += 1

    def _body(self, found: list[NextEvent]) -> bytes:
        personal = self._ledger_key is not None
        return body_of(
            cloud_event(self._deployment, one.log_id, one.decision_prefix, one.event, personal=personal)
            for one in found
        )
