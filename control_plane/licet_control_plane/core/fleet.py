"""What the control plane makes of the sidecars' heartbeats: who lives, and who has confirmed a revision. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from licet.wire.documents import Heartbeat

LIVE_S_MAX: Final = 5.0
"""Heartbeats come each second; five missed are a sidecar that is silent, not slow."""

_US: Final = 1_000_000

GONE_S_MIN: Final = 86_400.0
"""A sidecar silent for a day is not coming back; its unshipped log may, and its registers stay counted."""


SETTLED_S_MARGIN: Final = LIVE_S_MAX
"""How long before its arrival a heartbeat may have been sent, at most, so that its sidecar is still taken for live."""


class State(StrEnum):
    """Of a sidecar, as operators see it."""

    LIVE = "live"
    SILENT = "silent"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class LogMark:
    """A log ended at ``seq`` at ``at_s``, by the sidecar's clock and by this server's, whichever was earlier."""

    seq: int
    at_s: float


UNMARKED: Final = LogMark(0, 0.0)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A sidecar's newest heartbeat, and when it arrived by this server's clock. ``gone``: it deregistered itself.

    ``settled`` is the newest mark of this incarnation's log that its sidecar knows to be in the ledger, ``pending`` the
    next that will be. What is later than ``settled.at_s`` may still be on its way; what is earlier is not, unless the
    sidecar's clock is set back. Times of events say less: a clock may have been ahead, and was put right since.
    """

    heartbeat: Heartbeat
    last_heard_s: float
    gone: bool = False
    settled: LogMark = UNMARKED
    pending: LogMark | None = None

    def state(self, now_s: float) -> State:
        """Live, silent or gone at ``now_s``."""
        silent_s = now_s - self.last_heard_s
        if self.gone or silent_s >= GONE_S_MIN:
            return State.GONE
        return State.SILENT if silent_s > LIVE_S_MAX else State.LIVE

    def has_confirmed(self, generation: int, revision: int) -> bool:
        """Whether it acts on ``revision`` of ``generation``, or on a newer one."""
        return (self.heartbeat.generation, self.heartbeat.revision) >= (generation, revision)


def heard(before: Sidecar | None, heartbeat: Heartbeat, now_s: float) -> Sidecar:
    """The sidecar after a heartbeat that arrived at ``now_s``. ``before``: ``None`` when it was never heard of."""
    settled, pending = UNMARKED, None
    if before is not None and before.heartbeat.incarnation == heartbeat.incarnation:
        settled, pending = before.settled, before.pending
    mark = LogMark(heartbeat.log_last_seq, min(now_s - SETTLED_S_MARGIN, heartbeat.at_us / _US))
    # A busy log never ends where the ledger is; but the ledger gets to where it ended a moment ago.
    if pending is not None and heartbeat.log_acked_seq >= pending.seq:
        settled, pending = pending, None
    if heartbeat.log_acked_seq >= mark.seq:
        settled, pending = mark, None
    return Sidecar(heartbeat, now_s, gone=heartbeat.retired, settled=settled, pending=pending or mark)


def is_undrained(sidecar: Sidecar, watermark: int, *, at_s: float) -> bool:
    """Whether a sidecar may hold events of before ``at_s`` that are not in the ledger, which has its log up to
    ``watermark``. Of one that fell silent before, nobody knows how far its log goes; one that left said so.
    """
    if sidecar.gone:
        return watermark < sidecar.heartbeat.log_last_seq
    return sidecar.settled.at_s < at_s or watermark < sidecar.settled.seq


@dataclass(frozen=True, slots=True)
class Rollout:
    """How far a revision has come. ``silent`` sidecars answer ``stale`` by now, so nobody waits for them."""

    confirmed: list[Sidecar]
    waiting: list[Sidecar]
    silent: list[Sidecar]
    done: bool


def rollout(
    sidecars: Iterable[Sidecar],
    *,
    generation: int,
    revision: int,
    published: bool,
    staleness_s_max: float,
    looked_s: float,
    complete_since_s: float = -math.inf,
) -> Rollout:
    """Where ``revision`` stands with each sidecar that is not gone. A fleet of zero is done.

    Nobody is silent for longer than somebody listened: ``looked_s`` is when heartbeats were last looked at, and
    ``complete_since_s`` since when none of them can have been lost unseen.
    """
    confirmed: list[Sidecar] = []
    waiting: list[Sidecar] = []
    silent: list[Sidecar] = []
    for sidecar in sidecars:
        if sidecar.state(looked_s) is State.GONE:
            continue
        if sidecar.has_confirmed(generation, revision):
            confirmed.append(sidecar)
        elif looked_s - max(sidecar.last_heard_s, complete_since_s) > staleness_s_max:
            silent.append(sidecar)
        else:
            waiting.append(sidecar)
    return Rollout(confirmed, waiting, silent, done=published and not waiting)
