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
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.services.tally import Tally

ANSWERS_MAX: Final = 32_768
"""About 16 MB. At 2,000 calls a second the last 16 seconds: retries come within one."""
KEPT_MS: Final = 600_000

RESERVE: Final = b"\0"
"""Begins what is kept of the request of a ``Reserve``. No encoded ``CheckRequest`` begins so: there is no field 0."""

KEY_REUSED: Final = (
    "idempotency_key: it was used for another request; use a new key for each action, and the same one only to"
    " repeat it"
)

Key = tuple[str, str, str]


def key_of(inquiry: Inquiry) -> Key | None:
    """What a repeat of the call is recognized by; ``None`` when it cannot be, or takes nothing."""
    if not inquiry.idempotency_key or inquiry.peek:
        return None
    return (inquiry.tenant, inquiry.action, inquiry.idempotency_key)


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
            if not event.idempotency_key or event.kind not in (usage.EventKind.CHECK, usage.EventKind.RESERVE):
                continue  # who asks for a seat again gets the one it has
            key = (event.tenant, event.action, event.idempotency_key)
            response = answer_of(prefix, event)
            if event.kind == usage.EventKind.RESERVE:
                reserved = pb.ReserveResponse(decision=response)
                if event.expires_us:
                    reserved.reservation_id = response.decision_id
                    reserved.expires_at.FromMicroseconds(event.expires_us)
                self.remember(key, RESERVE, reserved.SerializeToString(), boot_ms)
            else:
                self.remember(key, b"", response.SerializeToString(), boot_ms)


def answer_of(prefix: bytes, event: usage.UsageEvent) -> pb.CheckResponse:
    """The answer that an event was recorded with; without message, quotas and metadata."""
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
    return response
