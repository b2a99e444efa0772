"""When the units of a sidecar that will not come back may be taken, and how many of them are free. Pure.

A sidecar that stops in order returns what it holds. One that was killed leaves registers behind: what is unspent in
them stays counted as spent until its window ends, or until the register is sealed.
Source: ``docs/adr/0002-registers-not-tokens.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, Register
from licet_control_plane.core.fleet import LIVE_S_MAX, Sidecar

SILENT_S_MIN: Final = HOLD_S + HOLD_MARGIN_S
"""After this long without an answered call no sidecar spends what it held."""

TOMBSTONE_KEPT_S: Final = 3_600
"""How long a sealed register is remembered; at least a hold and its margin. Longer, because a tombstone also tells a
sidecar that was cut off through a whole learning phase."""

WATCHED_S_MIN: Final = 300.0
"""For the timer, silence counts only when somebody listened: after Redis or this server was away, all were silent."""


class HolderState(StrEnum):
    """Of a sidecar that has a register, as operators see it."""

    LIVE = "live"
    SILENT = "silent"
    DEAD = "dead"
    """Silent for so long that it spends nothing any more."""
    GONE = "gone"
    """It signed off, or was reclaimed."""
    UNKNOWN = "unknown"
    """Never heard of, or from before the database was restored."""


@dataclass(frozen=True, slots=True)
class Holding:
    """One register of a sidecar, and what the ledger knows that it spent. ``limit``: key; units of the limit."""

    tenant: str
    quota: str
    limit: str
    sidecar: str
    register: Register
    ledger_units: int

    @property
    def counted(self) -> int:
        """Units that stay counted when it is sealed."""
        return max(self.register.used + self.register.reserved, self.ledger_units)

    @property
    def freed(self) -> int:
        """Units that become free; negative when the ledger knows more was spent than was granted."""
        return self.register.granted - self.counted


def holder_state(sidecar: Sidecar | None, now_s: float) -> HolderState:
    """What a holder is at ``now_s``; ``None``: the registry does not have it."""
    if sidecar is None:
        return HolderState.UNKNOWN
    silent_s = now_s - sidecar.last_heard_s
    if sidecar.gone:
        return HolderState.GONE
    if silent_s >= SILENT_S_MIN:
        return HolderState.DEAD
    return HolderState.SILENT if silent_s > LIVE_S_MAX else HolderState.LIVE


def in_base(state: HolderState, register: Register | None) -> bool:
    """Whether what a sidecar spent of a quota is to be counted in the base, as of one that is no holder any more.

    ``register``: its own, if there is one. A dead sidecar without one lost it, and gets it back from the ledger: it was
    not folded, or it would be gone. The hash itself may have been made anew by others since.
    """
    if register is not None:
        return register.sealed
    return state in (HolderState.GONE, HolderState.UNKNOWN)


def reclaim_wait_s(sidecar: Sidecar | None, *, watched_s: float, now_s: float) -> float:
    """Seconds until a sidecar may be reclaimed; 0 for now.

    ``watched_s``: for how long heartbeats have been looked at without a pause; silence before that says nothing.
    One that signed off may be reclaimed at once.
    """
    if sidecar is not None and sidecar.gone:
        return 0.0
    silent_s = watched_s if sidecar is None else min(watched_s, now_s - sidecar.last_heard_s)
    return max(0.0, SILENT_S_MIN - silent_s)


def overdue(sidecars: Iterable[Sidecar], *, after_s: float, watched_s: float, now_s: float) -> list[str]:
    """Sidecars that the timer reclaims: silent for ``after_s`` or longer, and not gone; the longest silent first."""
    if watched_s < WATCHED_S_MIN:
        return []
    silent = [one for one in sidecars if not one.gone and now_s - one.last_heard_s >= max(after_s, SILENT_S_MIN)]
    return [one.heartbeat.sidecar for one in sorted(silent, key=lambda one: one.last_heard_s)]
