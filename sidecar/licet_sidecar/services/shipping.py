"""Moves usage events from the log to the ledger's doorstep, and keeps them until the ledger has them.

Only synced events are shipped. An event counts as delivered when a *signed* acknowledgement of the ledger covers it;
when the watermark does not move for ``RESEND_AFTER_MS``, or the ledger began a new generation, everything after the
watermark is shipped again. At most ``IN_FLIGHT_EVENTS_MAX`` events are under way, which bounds what Redis has to
hold; the rest waits in the log.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from licet.wire import documents
from licet.wire.signing import VerificationError, Verifier
from licet.wire.usage import BATCH_BYTES_MAX, BATCH_EVENTS_MAX, UsageBatch, event_seq, log_id
from licet_sidecar.adapters.usage_log import LogHeader, UsageLog, UsageLogError
from licet_sidecar.clock import Clock
from licet_sidecar.logs import Logger
from licet_sidecar.ports import PulseReport
from licet_sidecar.services.tally import Tally

RESEND_AFTER_MS: Final = 10_000
IN_FLIGHT_EVENTS_MAX: Final = 50_000
"""About 8 MB uncompressed, under 1 MB as it travels: what one sidecar may leave in Redis while the drain is away."""
BATCHES_PER_PULSE_MAX: Final = 4


@dataclass(slots=True)
class Delivery:
    """How far one log has come. ``generation`` is the ledger's, 0 before its first acknowledgement."""

    header: LogHeader
    last_seq: int
    shipped: int = 0
    acked: int = 0
    generation: int = 0
    moved_ms: int = 0


class ShippingService:
    """Chooses what to ship, and takes acknowledgements."""

    def __init__(self, log: UsageLog, verifier: Verifier, clock: Clock, tally: Tally) -> None:
        self._log = log
        self._verifier = verifier
        self._clock = clock
        self._tally = tally
        self._logger = Logger("shipping")
        self._deliveries: dict[str, Delivery] = {}
        self._proposed: list[tuple[Delivery, int]] = []

    @property
    def acked_seq(self) -> int:
        """Watermark of this incarnation's log."""
        delivery = self._deliveries.get(log_id(self._log.header.sidecar, self._log.header.incarnation))
        return delivery.acked if delivery else 0

    @property
    def unacked_events(self) -> int:
        """Events the ledger has not acknowledged, over all logs."""
        return sum(max(0, last_seq - self._acked_of(header)) for header, last_seq in self._log.logs())

    def logs(self) -> list[str]:
        """Ids of logs whose acknowledgements are wanted."""
        return [log_id(header.sidecar, header.incarnation) for header, _ in self._log.logs()]

    async def next_batches(self) -> list[bytes]:
        """Batches to hand over with the next pulse; ``handed_over`` tells that they arrived."""
        self._proposed = []
        batches: list[bytes] = []
        if self._log.last_seq > self._log.synced_seq:
            try:
                await asyncio.to_thread(self._log.sync)
            except UsageLogError as error:
                self._tally.log_failures += 1
                self._logger.error("events cannot be shipped before they are on disk", error=str(error))
                return []
        for header, last_seq in self._log.logs():
            delivery = self._delivery(header, last_seq)
            mine = header.incarnation == self._log.header.incarnation and header.sidecar == self._log.header.sidecar
            delivery.last_seq = self._log.synced_seq if mine else last_seq
            self._resend_if_stuck(delivery)
            shipped = delivery.shipped
            while len(batches) < BATCHES_PER_PULSE_MAX and shipped < delivery.last_seq:
                if shipped - delivery.acked >= IN_FLIGHT_EVENTS_MAX:
                    break
                batch = await asyncio.to_thread(self._read_batch, header, shipped + 1, delivery.last_seq)
                if batch is None:
                    break
                packed, shipped = batch
                batches.append(packed)
                self._proposed.append((delivery, shipped))
        return batches

    def handed_over(self) -> None:
        """The proposed batches were accepted."""
        boot_ms = self._clock.boot_ms()
        for delivery, shipped in self._proposed:
            if delivery.shipped <= delivery.acked:
                delivery.moved_ms = boot_ms  # nothing was under way: the wait for the watermark begins now
            delivery.shipped = max(delivery.shipped, shipped)
            self._tally.batches_shipped += 1
        self._proposed = []

    def take_acks(self, report: PulseReport) -> None:
        """Believes acknowledgements that the control plane signed for exactly these logs, and frees what they cover."""
        boot_ms = self._clock.boot_ms()
        for log, data in report.acks.items():
            delivery = self._deliveries.get(log)
            if delivery is None:
                continue
            try:
                statement = self._verifier.verify(data, kind=documents.ACK, key=log)
            except VerificationError as error:
                self._tally.documents_rejected += 1
                self._logger.error("an acknowledgement was not believed; its events are kept", error=str(error))
                continue
            generation, watermark = statement.version
            if generation < delivery.generation or watermark > max(delivery.last_seq, self._log.last_seq):
                continue
            if generation > delivery.generation:
                # The ledger was restored from a backup: it may have lost what it had acknowledged.
                if delivery.generation:
                    delivery.acked = delivery.shipped = watermark
                delivery.generation = generation
            if watermark > delivery.acked:
                delivery.acked = watermark
                delivery.shipped = max(delivery.shipped, watermark)
                delivery.moved_ms = boot_ms
            self._log.release(delivery.header.sidecar, delivery.header.incarnation, delivery.acked, boot_ms / 1e3)

    def _delivery(self, header: LogHeader, last_seq: int) -> Delivery:
        log = log_id(header.sidecar, header.incarnation)
        delivery = self._deliveries.get(log)
        if delivery is None:
            delivery = self._deliveries[log] = Delivery(header, last_seq, moved_ms=self._clock.boot_ms())
            delivery.shipped = delivery.acked = header.first_seq - 1
        return delivery

    def _acked_of(self, header: LogHeader) -> int:
        delivery = self._deliveries.get(log_id(header.sidecar, header.incarnation))
        return delivery.acked if delivery else header.first_seq - 1

    def _resend_if_stuck(self, delivery: Delivery) -> None:
        boot_ms = self._clock.boot_ms()
        if delivery.shipped > delivery.acked and boot_ms - delivery.moved_ms > RESEND_AFTER_MS:
            self._tally.events_resent += delivery.shipped - delivery.acked
            delivery.shipped = delivery.acked
            delivery.moved_ms = boot_ms

    def _read_batch(self, header: LogHeader, first_seq: int, last_seq: int) -> tuple[bytes, int] | None:
        events = self._log.read_events(
            header.sidecar,
            header.incarnation,
            first_seq,
            last_seq,
            events_max=BATCH_EVENTS_MAX,
            bytes_max=BATCH_BYTES_MAX,
        )
        if not events:
            return None
        first_seq = event_seq(events[0])  # later than what was asked for, where events are gone
        shipped = first_seq + len(events) - 1
        batch = UsageBatch(
            header.sidecar,
            header.incarnation,
            header.previous_incarnation,
            header.previous_last_seq,
            header.decision_prefix,
            first_seq,
            shipped,
            tuple(events),
        )
        return batch.pack(), shipped
