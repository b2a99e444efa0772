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
from licet_sidecar.clock import Clock
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.services.tally import Tally

ANSWERS_MAX: Final = 32_768
"""About 16 MB. At 2,000 calls a second the last 16 seconds: retries come within one."""
KEPT_MS: Final = 600_000

Key = tuple[str, str, str]


class RecentAnswers:
    """Owned by one event loop."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._answers: dict[Key, tuple[int, bytes, int]] = {}
        self._order: deque[Key] = deque()  # oldest first: deleting a dict's first key over and over is quadratic
        self._under_way: dict[Key, tuple[int, asyncio.Task[bytes]]] = {}

    def find(self, key: Key) -> tuple[int, bytes | Awaitable[bytes]] | None:
        """(fingerprint of the request, its answer) when the key was used; a fingerprint 0 fits any request."""
        answered = self._answers.get(key)
        if answered is not None:
            return answered[0], answered[1]
        under_way = self._under_way.get(key)
        if under_way is not None:
            return under_way[0], asyncio.shield(under_way[1])
        return None

    def remember(self, key: Key, print_: int, response: bytes, boot_ms: int) -> None:
        """Keeps an answer."""
        if key not in self._answers:
            self._order.append(key)
        self._answers[key] = (print_, response, boot_ms)
        if len(self._order) > ANSWERS_MAX:
            del self._answers[self._order.popleft()]
            self._tally.idempotent_evicted += 1

    def join(self, key: Key, print_: int, waiting: Coroutine[Any, Any, bytes], clock: Clock) -> Awaitable[bytes]:
        """Runs a decision that has to wait as a task that repeated calls join; a caller that leaves does not end it."""
        task = asyncio.get_running_loop().create_task(waiting, name="check")
        self._under_way[key] = (print_, task)

        def done(finished: asyncio.Task[bytes]) -> None:
            self._under_way.pop(key, None)
            if not finished.cancelled() and finished.exception() is None:
                self.remember(key, print_, finished.result(), clock.boot_ms())

        task.add_done_callback(done)
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
            if not event.idempotency_key:
                continue
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
            self.remember(key, 0, response.SerializeToString(), boot_ms)


def fingerprint(inquiry: Inquiry) -> int:
    """Tells whether a repeated key comes with the same request. Not 0; only meaningful within one process."""
    return (
        hash(
            (
                inquiry.quantity,
                inquiry.subject_id,
                inquiry.resource_id,
                frozenset(inquiry.quantities.items()) if inquiry.quantities else 0,
                len(inquiry.context),
                *(str(inquiry.context[name]) for name in sorted(inquiry.context)),
            )
        )
        or 1
    )
