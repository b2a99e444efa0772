"""What the ledger, the registers of quotas and the logs of sidecars say of the same usage, side by side. Pure.

They are seldom equal. A sidecar says what it spent when it refills or keeps its lease, up to a minute later, and until
then may spend what it was granted: what the ledger has must lie between what the register says was *used* and what was
*granted*. And events are in the ledger when their batch is. So a difference counts only when it *settled*: two looks
found the same numbers on both sides, and no sidecar that has to do with it had anything unacknowledged at either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

from licet.wire.registers import Register

FOLDED: Final = ""
"""The holder of what is in no register any more: units of sidecars that left or were sealed."""


class Place(NamedTuple):
    """One number that is kept twice. ``holder``: a sidecar, or ``FOLDED``."""

    tenant: str
    quota: str
    holder: str


class Sides(NamedTuple):
    """What each side says of it, in units of the limit; of a register, whichever of used and granted is closer."""

    register: int
    ledger: int


class LogSides(NamedTuple):
    """A sidecar's log as it says itself, and as the ledger has it."""

    log_id: str
    last_seq: int
    acked_seq: int
    watermark: int


def differences(
    tenant: str, quota: str, base: int, registers: Mapping[str, Register], ledger: Mapping[str, int]
) -> dict[Place, Sides]:
    """Where a quota's registers and the ledger differ."""
    live = {sidecar: register for sidecar, register in registers.items() if not register.sealed}
    sides: dict[str, Sides] = {}
    for sidecar, register in live.items():
        units = ledger.get(sidecar, 0)
        sides[sidecar] = Sides(min(max(units, register.used), max(register.granted, register.used)), units)
    sides[FOLDED] = Sides(base, sum(units for sidecar, units in ledger.items() if sidecar not in live))
    return {Place(tenant, quota, holder): both for holder, both in sides.items() if both.register != both.ledger}


def settled(
    before: Mapping[Place, Sides], after: Mapping[Place, Sides], busy: Collection[str]
) -> tuple[dict[Place, Sides], dict[Place, Sides]]:
    """Differences of the second look that count, and those that may only be on their way.

    ``busy`` are sidecars that had something unacknowledged at either look. What is folded is on its way while any is.
    """
    counts: dict[Place, Sides] = {}
    moving: dict[Place, Sides] = {}
    for place, sides in after.items():
        is_busy = bool(busy) if place.holder == FOLDED else place.holder in busy
        target = counts if before.get(place) == sides and not is_busy else moving
        target[place] = sides
    return counts, moving


def is_forgotten(log: LogSides) -> bool:
    """Whether the ledger lacks what it once acknowledged, by a heartbeat that is older than the look at the ledger."""
    return log.acked_seq > log.watermark


def is_rolled_back(log: LogSides) -> bool:
    """Whether the log lacks what the ledger has, by a heartbeat that is newer than the look at the ledger."""
    return log.last_seq < log.watermark


def meaning(sides: Sides) -> str:
    """A difference in words."""
    if sides.register > sides.ledger:
        return "counted against the limit, and not in the ledger: not shipped yet, lost, or reserved by a dead sidecar"
    return "in the ledger, and not counted against the limit: the quota may be overspent by so much"


def total(differing: Iterable[Sides]) -> int:
    """Units by which sides differ, all together."""
    return sum(abs(sides.register - sides.ledger) for sides in differing)
