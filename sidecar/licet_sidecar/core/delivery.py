"""How far one log has come on its way to the ledger: what to send next, again, and which acknowledgements count. Pure.

An event is delivered when an acknowledgement of the ledger covers it. Rules, in the order in which they were needed:

1. What was handed over counts as under way. When the watermark does not move for ``RESEND_AFTER_MS``, everything after
   it is sent again: a stream entry can be lost.
2. An acknowledgement of an earlier generation of the ledger counts no more, nor one of numbers that were never written,
   unless they were declared lost: whoever can write Redis can declare any, and must not make a log grow for ever.
3. A later generation was restored from a backup: it may have lost what it had acknowledged, and is taken at its word.
4. So is the first acknowledgement after a start, when it is below what was deleted: that was acknowledged once.
5. What the ledger was told is lost, and is not, was never acknowledged: whoever can write Redis can tell it so.
6. When a head speaks of a later generation of the ledger, all that the log holds is sent again, and the rest declared:
   a ledger that was restored from before a log began has nothing to say about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

RESEND_AFTER_MS: Final = 10_000
IN_FLIGHT_EVENTS_MAX: Final = 50_000
"""About 8 MB uncompressed, under 1 MB as it travels: what one sidecar may leave in Redis while the drain is away."""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What the ledger says of a log, its signature verified. ``lost``: ranges it has not, which were declared lost."""

    generation: int
    watermark: int
    lost: Sequence[tuple[int, int]] = field(default=())


@dataclass(slots=True)
class Delivery:
    """One log. ``acked``: the ledger has everything up to there. ``shipped``: handed over up to there, and not to be
    repeated yet. ``reached``: the highest number that was ever handed over. ``generation`` is the ledger's, 0 before
    its first acknowledgement; ``newest`` is the newest that was heard of.
    """

    acked: int
    shipped: int
    moved_ms: int
    reached: int = 0
    generation: int = 0
    newest: int = 0

    @classmethod
    def begun(cls, first_seq: int, boot_ms: int) -> Delivery:
        """Of a log whose oldest file begins at ``first_seq``: what was before it was acknowledged, or is lost."""
        return cls(first_seq - 1, first_seq - 1, boot_ms, first_seq - 1)

    def next_range(self, shipped: int, last_seq: int, in_flight_max: int = IN_FLIGHT_EVENTS_MAX) -> tuple[int, int]:
        """First and last number that may be sent when ``shipped`` were; none when the last is below the first."""
        if shipped - self.acked >= in_flight_max:
            return shipped + 1, shipped
        return shipped + 1, last_seq

    def handed_over(self, last_seq: int, boot_ms: int) -> None:
        """The other side has everything up to ``last_seq``."""
        if self.shipped <= self.acked:
            self.moved_ms = boot_ms  # nothing was under way: the wait for the watermark begins now
        self.shipped = max(self.shipped, last_seq)
        self.reached = max(self.reached, last_seq)

    def resend_if_stuck(self, boot_ms: int) -> int:
        """Takes what is under way for lost when the watermark has not moved for long; how many events that are."""
        if self.shipped <= self.acked or boot_ms - self.moved_ms <= RESEND_AFTER_MS:
            return 0
        again = self.shipped - self.acked
        self.shipped, self.moved_ms = self.acked, boot_ms
        return again

    def ledger_began(self, generation: int, boot_ms: int) -> None:
        """A head says that the ledger is at ``generation``."""
        if generation <= self.newest:
            return
        self.newest = generation
        if 0 < self.generation < generation:
            self.acked = self.shipped = 0
            self.moved_ms = boot_ms

    def acknowledged(self, ack: Acknowledgement, written: int, held: int | None, boot_ms: int) -> bool:
        """Takes an acknowledgement. ``written``: the log's last number. ``held``: the first number in ``ack.lost`` that
        the log still holds, if any. Whether it counts.
        """
        if ack.generation < max(self.generation, self.newest) or _recorded_beyond(ack, written):
            return False
        watermark = min(ack.watermark, written if held is None else held - 1)
        if ack.generation > self.generation:
            if self.generation or watermark < self.acked:
                self.acked = self.shipped = watermark
                self.moved_ms = boot_ms
            self.generation = ack.generation
        if watermark > self.acked:
            self.acked = watermark
            self.shipped = max(self.shipped, watermark)
            self.reached = max(self.reached, watermark)
            self.moved_ms = boot_ms
        return True


def _recorded_beyond(ack: Acknowledgement, written: int) -> bool:
    """Whether the ledger says that it has events that were never written."""
    at = written + 1
    for first, last in sorted(ack.lost):
        if first <= at <= last:
            at = last + 1
    return at <= ack.watermark
