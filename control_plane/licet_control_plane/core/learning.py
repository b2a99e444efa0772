"""When a tenant's quotas, lost or doubted, may grant leases again. Pure.

After Redis lost some of its state, what sidecars hold is known only to them: each asserts its registers under the
mark's new (epoch, run) and says so in its heartbeat. Leasing reopens once every sidecar that may still hold a lease
has done that, or once every such lease has expired by itself.
Source: Doorman's learning mode, one lease length long; here cut short by the assertions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, Pair, Register
from licet_control_plane.core.reclaim import HolderState, in_base

WAIT_S_MAX: Final = HOLD_S + HOLD_MARGIN_S
"""After this long no sidecar can spend a lease it did not renew, whoever it is."""

WAIT_S_MIN: Final = 2
"""Two heartbeats: a sidecar that started just before the loss, and is in no registry, shows itself in that time."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A sidecar that may hold leases. ``last_heard_s`` is on the clock of ``now_s``; everything it held then was
    answered for under ``asserted`` or a later pair, and after ``asserted_ms``, on the Redis clock.
    """

    sidecar: str
    last_heard_s: float
    asserted: Pair
    asserted_ms: int


def has_said(holder: Holder, mark: Pair, since_ms: int) -> bool:
    """Whether a sidecar has told Redis everything it holds since the mark began to learn (``since_ms``).

    The pair alone would not do: a control plane that was paused may begin this phase after a sidecar heard of its
    epoch.
    """
    return holder.asserted.epoch >= mark.epoch and holder.asserted.run == mark.run and holder.asserted_ms >= since_ms


class Verdict(Enum):
    """Whether to open, and why."""

    WAIT = "wait"
    ALL_ASSERTED = "all asserted"
    HOLD_EXPIRED = "hold expired"


def may_open(
    mark: Pair, *, since_ms: int, learning_s: float, registry_s: float, holders: Iterable[Holder], now_s: float
) -> tuple[Verdict, list[str]]:
    """Whether the quotas of a mark may open, and the sidecars waited for.

    ``since_ms``, ``learning_s``: since when and how long the mark has been learning, by the Redis clock.
    ``registry_s``: for how long the registry of sidecars is known to be complete (infinite when it was never lost); a
    younger registry may lack a sidecar, so only time helps. ``holders``: sidecars that have not deregistered; those
    silent for longer than a lease lives are not waited for.
    """
    if learning_s >= WAIT_S_MAX:
        return Verdict.HOLD_EXPIRED, []
    missing = sorted(
        holder.sidecar
        for holder in holders
        if now_s - holder.last_heard_s < WAIT_S_MAX and not has_said(holder, mark, since_ms)
    )
    if missing or learning_s < WAIT_S_MIN or registry_s < WAIT_S_MAX:
        return Verdict.WAIT, missing
    return Verdict.ALL_ASSERTED, []


@dataclass(frozen=True, slots=True)
class Corrections:
    """What to put right in one quota before it opens, in units.

    ``spent``: what the ledger knows that a sidecar spent, by sidecar. ``base``: what those that are gone spent, at
    least; a base cannot be told apart any more. ``releases``: sidecars that hold nothing of what is registered for
    them.
    """

    spent: Mapping[str, int]
    base: int
    releases: tuple[str, ...]


def corrections(
    registers: Mapping[str, Register],
    spent: Mapping[str, int],
    *,
    pair: Pair,
    said: Collection[str],
    state_of: Callable[[str], HolderState],
) -> Corrections:
    """Compares the registers of a quota with what the ledger and its sidecars say.

    ``spent``: units by the ledger, by sidecar. ``said``: sidecars that have told Redis everything they hold
    (``has_said``) in this phase, whose mark has ``pair``.
    """
    own: dict[str, int] = {}
    base = 0
    for sidecar in {**spent, **registers}:
        register = registers.get(sidecar)
        units = spent.get(sidecar, 0)
        if in_base(state_of(sidecar), register):
            base += max(units, register.folded if register else 0)
        elif units:
            own[sidecar] = units
    releases = (
        sidecar
        for sidecar, register in registers.items()
        if sidecar in said and register.pair != pair and not register.sealed and register.granted > register.used
    )
    return Corrections(own, base, tuple(releases))
