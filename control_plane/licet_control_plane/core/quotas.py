"""One quota as an operator looks at it: what was used, what is leased, and who holds it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from licet.wire.registers import Register
from licet_control_plane.core.fleet import Sidecar
from licet_control_plane.core.reclaim import HolderState, holder_state


@dataclass(frozen=True, slots=True)
class HeldBy:
    """What one sidecar holds. ``state``: of the sidecar, or ``"sealed"``."""

    sidecar: str
    state: str
    register: Register
    last_heard_s: float | None

    @property
    def unspent(self) -> int:
        """Leased, and neither spent nor reserved as far as was reported."""
        return max(0, self.register.granted - self.register.used - self.register.reserved)


@dataclass(frozen=True, slots=True)
class QuotaView:
    """Units of the limit. ``sum = used + reserved + unspent``; what sidecars spent since their last report is in
    ``unspent``. ``folded``: the part of ``used`` that is in no register any more."""

    used: int
    reserved: int
    unspent: int
    unspent_dead: int
    folded: int
    sum: int
    holders: list[HeldBy]

    def remaining(self, amount: int) -> int:
        """What can still be leased."""
        return max(0, amount - self.sum)

    def overage(self, amount: int) -> int:
        """What was used beyond the limit: a soft limit, one that was lowered, or one learned after a loss. Units that
        are leased and may never be used are not."""
        return max(0, self.used - amount)


SEALED = "sealed"


def view(
    base: int, total: int, registers: Mapping[str, Register], fleet: Mapping[str, Sidecar], now_s: float
) -> QuotaView:
    """A quota's registers, with what is known of their sidecars; the largest holders first."""
    holders = [
        HeldBy(
            name,
            SEALED if register.sealed else holder_state(fleet.get(name), now_s).value,
            register,
            fleet[name].last_heard_s if name in fleet else None,
        )
        for name, register in registers.items()
    ]
    holders.sort(key=lambda one: (-one.register.granted, one.sidecar))
    dead = (HolderState.DEAD.value, HolderState.GONE.value, HolderState.UNKNOWN.value)
    return QuotaView(
        used=base + sum(one.register.used for one in holders),
        reserved=sum(one.register.reserved for one in holders),
        unspent=sum(one.unspent for one in holders),
        unspent_dead=sum(one.unspent for one in holders if one.state in dead),
        folded=base,
        sum=total,
        holders=holders,
    )
