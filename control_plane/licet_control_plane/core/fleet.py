"""What the control plane makes of the sidecars' heartbeats: who lives, and who has confirmed a revision. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from licet.wire.documents import Heartbeat

LIVE_S_MAX: Final = 5.0
"""Heartbeats come each second; five missed are a sidecar that is silent, not slow."""

GONE_S_MIN: Final = 86_400.0
"""A sidecar silent for a day is not coming back; its unshipped log may, and its registers stay counted."""


class State(StrEnum):
    """Of a sidecar, as operators see it."""

    LIVE = "live"
    SILENT = "silent"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A sidecar's newest heartbeat, and when it arrived by this server's clock. ``gone``: it deregistered itself."""

    heartbeat: Heartbeat
    last_heard_s: float
    gone: bool = False

    def state(self, now_s: float) -> State:
        """Live, silent or gone at ``now_s``."""
        silent_s = now_s - self.last_heard_s
        if self.gone or silent_s >= GONE_S_MIN:
            return State.GONE
        return State.SILENT if silent_s > LIVE_S_MAX else State.LIVE

    def has_confirmed(self, generation: int, revision: int) -> bool:
        """Whether it acts on ``revision`` of ``generation``, or on a newer one."""
        return (self.heartbeat.generation, self.heartbeat.revision) >= (generation, revision)


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
    now_s: float,
) -> Rollout:
    """Where ``revision`` stands with each sidecar that is not gone. A fleet of zero is done."""
    confirmed: list[Sidecar] = []
    waiting: list[Sidecar] = []
    silent: list[Sidecar] = []
    for sidecar in sidecars:
        if sidecar.state(now_s) is State.GONE:
            continue
        if sidecar.has_confirmed(generation, revision):
            confirmed.append(sidecar)
        elif now_s - sidecar.last_heard_s > staleness_s_max:
            silent.append(sidecar)
        else:
            waiting.append(sidecar)
    return Rollout(confirmed, waiting, silent, done=published and not waiting)
