"""When a tenant's quotas, lost or doubted, may grant leases again. Pure.

After Redis lost some of its state, what sidecars hold is known only to them: each asserts its registers under the
mark's new (epoch, run) and says so in its heartbeat. Leasing reopens once every sidecar that may still hold a lease
has done that, or once every such lease has expired by itself.
Source: Doorman's learning mode, one lease length long; here cut short by the assertions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, Pair

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


class Verdict(Enum):
    """Whether to open, and why."""

    WAIT = "wait"
    ALL_ASSERTED = "all asserted"
    HOLD_EXPIRED = "hold expired"


def may_open(
    mark: Pair, *, since_ms: int, learning_s: float, registry_s: float, holders: Iterable[Holder], now_s: float
) -> tuple[Verdict, list[str]]:
    """Whether the quotas of a mark may open, and the sidecars waited for.

    ``since_ms``, ``learning_s``: since when and how long the mark has been learning, by the Redis clock. The pair alone
    would not do: a control plane that was paused may begin this phase after a sidecar heard of its epoch.
    ``registry_s``: for how long the registry of sidecars is known to be complete (infinite when it was never lost); a
    younger registry may lack a sidecar, so only time helps. ``holders``: sidecars that have not deregistered; those
    silent for longer than a lease lives are not waited for.
    """
    if learning_s >= WAIT_S_MAX:
        return Verdict.HOLD_EXPIRED, []
    missing = sorted(
        holder.sidecar
        for holder in holders
        if now_s - holder.last_heard_s < WAIT_S_MAX
        and not (
            holder.asserted.epoch >= mark.epoch and holder.asserted.run == mark.run and holder.asserted_ms >= since_ms
        )
    )
    if missing or learning_s < WAIT_S_MIN or registry_s < WAIT_S_MAX:
        return Verdict.WAIT, missing
    return Verdict.ALL_ASSERTED, []
