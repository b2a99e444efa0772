"""Moves usage events from the log to the ledger's doorstep, and keeps them until the ledger has them.

Only synced events are shipped. When to ship again, and what an acknowledgement is worth, is ``core.delivery``'s to say.
What the log holds no more is declared lost, in the batch that goes on behind it. Redis is protected: at most
``IN_FLIGHT_EVENTS_MAX`` events of a log are under way, and none are added while the streams or the memory of Redis are
over their bounds, or it said that it is full; the rest waits in the log.

Concurrency: one event loop. Handing over is done by one at a time, under a lock; the log is read in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from licet.wire import documents
from licet.wire.documents import AckPayload
from licet.wire.signing import VerificationError, Verifier
from licet.wire.usage import (
    BATCH_BYTES_MAX,
    BATCH_EVENTS_MAX,
    LOST_RANGES_MAX,
    LostRange,
    UsageBatch,
    event_seq,
    log_id,
)
from licet_sidecar.adapters.usage_log import LogHeader, UsageLog, UsageLogError
from licet_sidecar.clock import Clock
from licet_sidecar.core.delivery import IN_FLIGHT_EVENTS_MAX, RESEND_AFTER_MS, Acknowledgement, Delivery
from licet_sidecar.logs import Logger
from licet_sidecar.ports import LinkFull, PulseReport
from licet_sidecar.services.tally import Tally

BATCHES_PER_PULSE_MAX: Final = 4
BACKLOG_BATCHES_MAX: Final = 1_000
"""Of one shard, beyond which sidecars keep their usage: a quarter of an hour of a sidecar's, at 100 KB each 100 MB."""
MEMORY_SHARE_MAX: Final = 0.85
"""Of ``maxmemory``, beyond which usage is kept: quotas need the rest, and Redis with nothing left refuses both."""
FULL_S: Final = (1, 2, 4, 8, 16, 30)
"""How long nothing is sent after Redis said that it is full: time and again."""

_T = TypeVar("_T")


class NotShipped(Exception):
    """Redis did not take the events in time; they stay in the log. The message says why."""


@dataclass(slots=True)
class _Log:
    """One log under way; ``last_seq`` is what may be sent of it, ``written`` what it holds."""

    header: LogHeader
    delivery: Delivery
    last_seq: int
    written: int


class ShippingService:
    """Chooses what to ship, and takes acknowledgements."""

    def __init__(
        self,
        log: UsageLog,
        verifier: Verifier,
        clock: Clock,
        tally: Tally,
        *,
        backlog_batches_max: int = BACKLOG_BATCHES_MAX,
        memory_share_max: float = MEMORY_SHARE_MAX,
    ) -> None:
        self._log = log
        self._verifier = verifier
        self._clock = clock
        self._tally = tally
        self._backlog_batches_max = backlog_batches_max
        self._memory_share_max = memory_share_max
        self._logger = Logger("shipping")
        self._logs: dict[str, _Log] = {}
        self._proposed: list[tuple[_Log, int, int]] = []  # (log, last number, how many before it are declared lost)
        self._handing_over = asyncio.Lock()
        self._waiters: list[tuple[str, int, asyncio.Future[None]]] = []
        self._full_times = 0
        self._full_until_ms = 0
        self._unreadable: set[str] = set()
        self._contested: set[str] = set()
        self.urgent = asyncio.Event()
        """Set when somebody waits for what is to be shipped."""
        self.backlog_batches = 0
        self.memory_share = 0.0
        self.held_back = ""
        """Why nothing is handed to Redis now; empty when something may be."""

    @property
    def acked_seq(self) -> int:
        """Watermark of this incarnation's log."""
        return self._acked_of(self._log.header)

    @property
    def unacked_events(self) -> int:
        """Events the ledger has not acknowledged, over all logs."""
        return sum(max(0, last_seq - self._acked_of(header)) for header, last_seq in self._log.logs())

    def logs(self) -> list[str]:
        """Ids of logs whose acknowledgements are wanted."""
        return [log_id(header.sidecar, header.incarnation) for header, _ in self._log.logs()]

    # Handing over

    async def hand_over(self, send: Callable[[list[bytes]], Awaitable[_T]], *, to_redis: bool = True) -> _T:
        """Sends what is due with ``send``, which returns when the other side has it; what ``send`` returned.

        Raises:
            Exception: what ``send`` raised; then nothing counts as handed over.
        """
        async with self._handing_over:
            batches = await self.next_batches(to_redis=to_redis)
            try:
                result = await send(batches)
            except LinkFull:
                self._full_until_ms = self._clock.boot_ms() + 1_000 * FULL_S[min(self._full_times, len(FULL_S) - 1)]
                self._full_times += 1
                self._tally.shipping_full += 1
                self._fail_waiters("Redis is full")
                raise
            except BaseException as error:
                self._fail_waiters(str(error))
                raise
            if batches:
                self._full_times = 0
            self.handed_over()
            return result

    def start_over(self) -> None:
        """Takes all that is under way for lost: it goes another way now, and the ledger takes each event once."""
        for one in self._logs.values():
            one.delivery.shipped = one.delivery.acked

    async def next_batches(self, *, to_redis: bool = True) -> list[bytes]:
        """Batches to hand over now; ``handed_over`` tells that they arrived."""
        self._proposed = []
        batches: list[bytes] = []
        if self._log.last_seq > self._log.synced_seq:
            try:
                await asyncio.to_thread(self._log.sync)
            except UsageLogError as error:
                self._tally.log_failures += 1
                self._logger.error("events cannot be shipped before they are on disk", error=str(error))
                return []
        if to_redis and self._is_held_back():
            return []
        for header, last_seq in self._log.logs():
            one = self._of(header, last_seq)
            self._tally.events_resent += one.delivery.resend_if_stuck(self._clock.boot_ms())
            shipped = one.delivery.shipped
            while len(batches) < BATCHES_PER_PULSE_MAX:
                first, last = one.delivery.next_range(shipped, one.last_seq, IN_FLIGHT_EVENTS_MAX)
                if first > last:
                    break
                batch = await self._next_batch(header, first, last)
                if batch is None:
                    break
                packed, shipped, lost = batch
                batches.append(packed)
                self._proposed.append((one, shipped, lost))
        self._tell_damage()
        return batches

    def handed_over(self) -> None:
        """The proposed batches were accepted."""
        boot_ms = self._clock.boot_ms()
        for one, shipped, lost in self._proposed:
            if shipped > one.delivery.reached:
                self._tally.events_declared_lost += lost
            one.delivery.handed_over(shipped, boot_ms)
            self._tally.batches_shipped += 1
        if self._waiters:
            self._resolve_waiters(went_on=bool(self._proposed))
        self._proposed = []

    async def shipped(self, log: str, seq: int) -> None:
        """Waits until Redis has event ``seq`` of a log.

        Raises:
            NotShipped: it cannot be, for now.
        """
        if self.has_shipped(log, seq):
            return
        if self.held_back:
            raise NotShipped(self.held_back)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((log, seq, waiter))
        self.urgent.set()
        try:
            await waiter
        finally:
            self._waiters = [one for one in self._waiters if one[2] is not waiter]

    def has_shipped(self, log: str, seq: int) -> bool:
        """Whether Redis, or the ledger, has event ``seq`` of a log."""
        one = self._logs.get(log)
        return one is not None and one.delivery.reached >= seq

    def _resolve_waiters(self, *, went_on: bool) -> None:
        waiting = False
        for log, seq, waiter in self._waiters:
            if waiter.done():
                continue
            if self.has_shipped(log, seq):
                waiter.set_result(None)
            elif self.held_back:
                waiter.set_exception(NotShipped(self.held_back))
            else:
                waiting = True
        if waiting and went_on:
            self.urgent.set()  # there was more than one handing over takes

    def _fail_waiters(self, why: str) -> None:
        for _, _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(NotShipped(why))

    def _is_held_back(self) -> bool:
        before = self.held_back
        if self._clock.boot_ms() < self._full_until_ms:
            self.held_back = "Redis is full"
        elif self.backlog_batches >= self._backlog_batches_max:
            self.held_back = f"{self.backlog_batches:,} batches wait in Redis for the control plane"
        elif self.memory_share >= self._memory_share_max:
            self.held_back = f"Redis has used {self.memory_share:.0%} of its memory"
        else:
            self.held_back = ""
        if self.held_back and not before:
            self._logger.warning("usage stays in the log for now", because=self.held_back)
        return bool(self.held_back)

    # Acknowledgements

    def ledger_began(self, generation: int) -> None:
        """A signed head tells the ledger's generation."""
        boot_ms = self._clock.boot_ms()
        for header, _ in self._log.logs():
            one = self._logs.get(log_id(header.sidecar, header.incarnation))
            if one is not None:
                one.delivery.ledger_began(generation, boot_ms)

    def take_report(self, report: PulseReport) -> None:
        """How full Redis is, and the acknowledgements."""
        self.backlog_batches, self.memory_share = report.backlog_batches, report.memory_share
        self.take_acks(report)

    def take_acks(self, report: PulseReport) -> None:
        """Believes acknowledgements that the control plane signed for exactly these logs, and frees what they cover."""
        boot_ms = self._clock.boot_ms()
        for log, data in report.acks.items():
            one = self._logs.get(log)
            if one is None:
                continue
            try:
                statement = self._verifier.verify(data, kind=documents.ACK, key=log)
                lost = AckPayload.from_payload(statement.payload).lost
            except (VerificationError, TypeError, ValueError, AttributeError) as error:
                self._tally.documents_rejected += 1
                self._logger.error("an acknowledgement was not believed; its events are kept", error=str(error))
                continue
            header, delivery = one.header, one.delivery
            held = self._log.first_held(header.sidecar, header.incarnation, lost) if lost else None
            if held is None:
                self._contested.discard(log)
            elif log not in self._contested:
                self._contested.add(log)
                self._tally.acks_contested += 1
                self._logger.error(
                    "the ledger was told that events are lost which are not; they are kept and sent",
                    log=log,
                    first=held,
                    fix="Something else writes the usage streams: look at who has access to Redis.",
                )
            written = max(one.written, self._log.last_seq if header is self._log.header else 0)
            ack = Acknowledgement(statement.generation, statement.revision, lost)
            if delivery.acknowledged(ack, written, held, boot_ms):
                self._log.release(header.sidecar, header.incarnation, delivery.acked, boot_ms / 1e3)

    # Inside

    def _of(self, header: LogHeader, written: int) -> _Log:
        log = log_id(header.sidecar, header.incarnation)
        one = self._logs.get(log)
        if one is None:
            one = _Log(header, Delivery.begun(header.first_seq, self._clock.boot_ms()), 0, 0)
            self._logs[log] = one
        mine = header.incarnation == self._log.header.incarnation and header.sidecar == self._log.header.sidecar
        one.last_seq = self._log.synced_seq if mine else written
        one.written = written
        return one

    def _acked_of(self, header: LogHeader) -> int:
        one = self._logs.get(log_id(header.sidecar, header.incarnation))
        return one.delivery.acked if one else header.first_seq - 1

    async def _next_batch(self, header: LogHeader, first_seq: int, last_seq: int) -> tuple[bytes, int, int] | None:
        log = log_id(header.sidecar, header.incarnation)
        try:
            batch = await asyncio.to_thread(self._read_batch, header, first_seq, last_seq)
        except OSError as error:
            batch, why = None, str(error)
        else:
            why = "events that should be there are not"
        if batch is not None:
            self._unreadable.discard(log)
        elif log not in self._unreadable:
            self._unreadable.add(log)
            self._logger.error("the usage log cannot be read; trying again", log=log, from_seq=first_seq, error=why)
        return batch

    def _read_batch(self, header: LogHeader, first_seq: int, last_seq: int) -> tuple[bytes, int, int] | None:
        """The next batch, packed, how far it goes, and how many events it declares lost; ``None`` when what is missing
        is not known to be lost.
        """
        events = self._log.read_events(
            header.sidecar,
            header.incarnation,
            first_seq,
            last_seq,
            events_max=BATCH_EVENTS_MAX,
            bytes_max=BATCH_BYTES_MAX,
        )
        begins = event_seq(events[0]) if events else last_seq + 1
        lost: list[LostRange] = []
        if begins > first_seq:
            lost = self._log.lost(header.sidecar, header.incarnation, first_seq, begins - 1)
            if sum(one.last_seq - one.first_seq + 1 for one in lost) != begins - first_seq:
                return None
            if len(lost) > LOST_RANGES_MAX:
                lost, events = lost[:LOST_RANGES_MAX], []
                begins = lost[-1].last_seq + 1
        batch = UsageBatch(
            header.sidecar,
            header.incarnation,
            header.previous_incarnation,
            header.previous_last_seq,
            header.decision_prefix,
            begins,
            begins + len(events) - 1,
            tuple(events),
            tuple(lost),
        )
        return batch.pack(), batch.last_seq, sum(one.last_seq - one.first_seq + 1 for one in lost)

    def _tell_damage(self) -> None:
        for said in self._log.found_damaged():
            self._logger.error("the usage log is damaged", what=said)


__all__ = ["IN_FLIGHT_EVENTS_MAX", "RESEND_AFTER_MS", "NotShipped", "ShippingService"]
