"""Answers already given, by (tenant, action, idempotency key), so that a repeated call takes nothing twice.

Kept for ten minutes, at most ``ANSWERS_MAX`` of them: the oldest go first, and that is counted. A call that is still
being decided is joined. After a restart the answers of the latest events in the log are known again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Coroutine
from typing import Any, Final

from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet_sidecar.services.tally import Tally

ANSWERS_MAX: Final = 32_768
"""About 16 MB. At 2,000 calls a second the last 16 seconds: retries come within one."""
KEPT_MS: Final = 600_000

Key = tuple[str, str, str]


class RecentAnswers:
    """Owned by one event loop."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._answers: dict[Key, tuple[bytes, bytes, int]] = {}
        self._order: deque[Key] = deque()  # oldest first: deleting a dict's first key over and over is quadratic
        self._under_way: dict[Key, tuple[bytes, asyncio.Task[bytes]]] = {}

    def find(self, key: Key) -> tuple[bytes, bytes | Awaitable[bytes]] | None:
        """(encoded request, its answer) when the key was used; the request is empty when it is not known any more."""
        answered = self._answers.get(key)
        if answered is not None:
            return answered[0], answered[1]
        under_way = self._under_way.get(key)
        if under_way is not None:
            return under_way[0], asyncio.shield(under_way[1])
        return None

    def remember(self, key: Key, request: bytes, response: bytes, boot_ms: int) -> None:
        """Keeps an answer."""
        if key not in self._answers:
            self._order.append(key)
        self._answers[key] = (request, response, boot_ms)
        if len(self._order) > ANSWERS_MAX:
            del self._answers[self._order.popleft()]
            self._tally.idempotent_evicted += 1

    def join(self, key: Key, request: bytes, waiting: Coroutine[Any, Any, bytes]) -> Awaitable[bytes]:
        """Runs a decision that has to wait as a task that repeated calls join; a caller that leaves does not end it."""
        task = asyncio.get_running_loop().create_task(waiting, name="check")
        self._under_way[key] = (request, task)
        task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return asyncio.shield(task)

    def expire(self, boot_ms: int) -> None:
        """Forgets what is older than ``KEPT_MS``."""
        before_ms = boot_ms - KEPT_MS
        while self._order and self._answers[self._order[0]][2] <= before_ms:
            del self._answers[self._order.popleft()]

    def recover(self, events: list[tuple[bytes, bytes]], boot_ms: int) -> None:
        """Takes up (decision prefix, packed event) pairs from the log of an earlier incarnation, oldest first."""
        for prefix, data in events:
            event = usage.unpack_event(data)
            if not event.idempotency_key or event.kind != usage.EventKind.CHECK:
                continue  # who asks for a seat again gets the one it has
            observed = event.flags & usage.FLAG_OBSERVED
            response = pb.CheckResponse(
                decision_id=usage.decision_id(prefix, event.seq),
                effect=int(Effect.APPROVED) if observed else event.effect,  # type: ignore[arg-type]  # same numbers
                reason=int(Reason(event.reason)),  # type: ignore[arg-type]  # same numbers
                rule=event.rule,
                revision=event.revision,
                stale=bool(event.flags & usage.FLAG_STALE),
                degraded=bool(event.flags & usage.FLAG_DEGRADED),
            )
            response.as_of.seconds = event.at_us // 1_000_000
            if event.cost_nanos:
                response.cost.amount_nanos = event.cost_nanos
                response.cost.currency = event.currency
            key = (event.tenant, event.action, event.idempotency_key)
            self.remember(key, b"", response.SerializeToString(), boot_ms)
