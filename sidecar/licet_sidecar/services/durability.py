"""Answers that wait until their event is as safe as the action asks: ``synced`` or ``shipped``.

An answer at ``logged`` does not come here. The others are decided, taken and logged as every answer is, and then wait:
for one ``fdatasync`` together with all that wait at that moment, or until Redis has acknowledged the batch with the
event. When it does not come in time, what was decided stays decided: the units are taken and the event is in the log,
which goes on trying. What the caller is told then is the action's ``on_unavailable`` to say. Who repeats the call with
the same idempotency key waits for the same event again.

Concurrency: one event loop. The sync runs in a thread; those that come while it runs wait for the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from licet.domain.catalog import Durability, UnavailableMode
from licet.domain.outcomes import Reason
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet_sidecar.adapters.usage_log import LogHeader, UsageLog, UsageLogError
from licet_sidecar.core.engine import Engine
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.shipping import NotShipped, ShippingService
from licet_sidecar.services.tally import Tally

WAIT_S_MAX: Final = 2.0
"""Longest an answer waits for its event to be safe, whatever its deadline: as long as for a lease."""
DEADLINE_SLACK_S: Final = 0.02
"""Kept back from a caller's deadline, so that the answer still arrives."""
RETRY_AFTER_S: Final = 1

_PREFIX_DIGITS: Final = 16
_REASONS: Final = {Durability.SYNCED: Reason.USAGE_LOG_FULL, Durability.SHIPPED: Reason.DEGRADED_DENY}
_Message = TypeVar("_Message", pb.ReserveResponse, pb.CommitReservationResponse, pb.AcquireSeatResponse)

Answer = bytes | Awaitable[bytes]


class DurabilityGate:
    """Holds encoded answers back until they may leave."""

    def __init__(self, engine: Engine, log: UsageLog, shipping: ShippingService, link: LinkState, tally: Tally) -> None:
        self._engine = engine
        self._log = log
        self._shipping = shipping
        self._link = link
        self._tally = tally
        self._prefix = log.header.decision_prefix.hex()
        self._syncing: asyncio.Task[int] | None = None

    def check(self, answer: Answer, action: str, timeout_s: float) -> Answer:
        """The encoded ``CheckResponse``, now or when it may leave."""
        level = self._level(action)
        if level is None:
            return answer
        if not isinstance(answer, bytes):
            return self._awaited(answer, lambda known, left_s: self.check(known, action, left_s), timeout_s)
        return self._held(pb.CheckResponse.FromString(answer), answer, action, level, timeout_s)

    def batch(self, answers: list[bytes], actions: Sequence[str], timeout_s: float) -> Awaitable[list[bytes]] | None:
        """Encoded ``CheckResponse``s, when all of them may leave; ``None`` when they may now."""
        if self._engine.rulebook is None or not self._engine.rulebook.levels:
            return None
        later = [self.check(answer, action, timeout_s) for answer, action in zip(answers, actions, strict=True)]
        if all(isinstance(one, bytes) for one in later):
            return None
        return _all(later)

    def message(self, kind: type[_Message], answer: Answer, action: str, timeout_s: float) -> Answer:
        """The same for an encoded message with a ``decision``. A commit cannot be taken back: it only says that its
        event is not safe yet.
        """
        level = self._level(action)
        if level is None:
            return answer
        if not isinstance(answer, bytes):
            return self._awaited(answer, lambda known, left_s: self.message(kind, known, action, left_s), timeout_s)
        response = kind.FromString(answer)
        return self._held(response.decision, answer, action, level, timeout_s, response)

    # Inside

    @staticmethod
    async def _awaited(answer: Awaitable[bytes], hold: Callable[[bytes, float], Answer], timeout_s: float) -> bytes:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        return await _one(hold(await answer, timeout_s - (loop.time() - started_s)))

    def _level(self, action: str) -> Durability | None:
        rulebook = self._engine.rulebook
        return rulebook.levels.get(action) if rulebook is not None and rulebook.levels else None

    def _held(
        self,
        decision: pb.CheckResponse,
        answer: bytes,
        action: str,
        level: Durability,
        timeout_s: float,
        whole: pb.ReserveResponse | pb.CommitReservationResponse | pb.AcquireSeatResponse | None = None,
    ) -> Answer:
        if not decision.decision_id:
            return answer  # a peek, or not logged: there is nothing to wait for
        header, seq = self._event_of(decision.decision_id)
        if header is None or self._is_reached(level, header, seq):
            return answer

        async def later() -> bytes:
            self._tally.durability_waits += 1
            why = await self._reach(level, header, seq, timeout_s)
            if not why:
                return answer
            self._tally.durability_missed += 1
            self._weaken(decision, action, level, why, final=isinstance(whole, pb.CommitReservationResponse))
            if isinstance(whole, pb.ReserveResponse | pb.AcquireSeatResponse) and not decision.decision_id:
                # without what only an approval has
                return bytes(type(whole)(decision=decision).SerializeToString())
            return bytes((decision if whole is None else whole).SerializeToString())

        return later()

    def _event_of(self, decision_id: str) -> tuple[LogHeader | None, int]:
        """Whose event it is; no header when its log is gone, and was acknowledged then."""
        prefix, seq = decision_id[:_PREFIX_DIGITS], int(decision_id[_PREFIX_DIGITS:], 16)
        if prefix == self._prefix:
            return self._log.header, seq
        found = (header for header, _ in self._log.logs() if header.decision_prefix.hex() == prefix)
        return next(found, None), seq

    def _is_reached(self, level: Durability, header: LogHeader, seq: int) -> bool:
        if level is Durability.SHIPPED:
            return self._shipping.has_shipped(usage.log_id(header.sidecar, header.incarnation), seq)
        # Logs of earlier incarnations were synced when they were recovered.
        return header.decision_prefix != self._log.header.decision_prefix or seq <= self._log.synced_seq

    async def _reach(self, level: Durability, header: LogHeader, seq: int, timeout_s: float) -> str:
        """Waits; why it was in vain, empty when it was not."""
        if level is Durability.SHIPPED and not self._link.up:
            return self._link.trouble
        try:
            async with asyncio.timeout(min(WAIT_S_MAX, max(0.0, timeout_s - DEADLINE_SLACK_S))):
                if level is Durability.SHIPPED:
                    await self._shipping.shipped(usage.log_id(header.sidecar, header.incarnation), seq)
                else:
                    await self._synced(seq)
        except TimeoutError:
            return "it was not in time"
        except (NotShipped, UsageLogError) as error:
            return str(error)
        return ""

    async def _synced(self, seq: int) -> None:
        while self._log.synced_seq < seq:
            # Done, and its callback not called yet: to wait for that would return at once, and let nothing else run.
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.get_running_loop().create_task(
                    asyncio.to_thread(self._log.sync), name="sync log"
                )
                self._syncing.add_done_callback(self._ended)
            await asyncio.shield(self._syncing)

    def _ended(self, task: asyncio.Task[int]) -> None:
        if self._syncing is task:
            self._syncing = None
        if not task.cancelled() and task.exception() is not None:
            self._tally.log_failures += 1

    def _weaken(self, decision: pb.CheckResponse, action: str, level: Durability, why: str, *, final: bool) -> None:
        """What the caller is told of a decision that is recorded, and not as safe as it should be."""
        decision.degraded = True
        said = f"Recorded as {decision.decision_id}, and not {level.value} yet: {why}."
        rulebook = self._engine.rulebook
        bound = rulebook.action(action) if rulebook else None
        allowed = bound is not None and bound.action.on_unavailable.mode is UnavailableMode.ALLOW
        observed = rulebook is not None and rulebook.observe
        if final or allowed or observed or decision.effect != pb.EFFECT_APPROVED:
            decision.message = f"{decision.message} {said}".strip()
            return
        decision.effect = pb.EFFECT_DENIED
        decision.reason = pb.Reason.ValueType(_REASONS[level])
        decision.message = f"{said} Repeat the call with the same idempotency key to be answered when it is."
        decision.retry_after.seconds = RETRY_AFTER_S
        decision.ClearField("decision_id")
        decision.ClearField("rule")
        decision.ClearField("cost")


async def _all(answers: Sequence[Answer]) -> list[bytes]:
    # Together: each has its own deadline, and they wait for the same sync.
    return list(await asyncio.gather(*(_one(answer) for answer in answers)))


async def _one(answer: Answer) -> bytes:
    return answer if isinstance(answer, bytes) else await answer
