"""The layout of quota registers in Redis, as both programs and the scripts read it.

*The mark*, hash ``licet:{tenant}:limits``:

===================================  =================================================================================
field                                value
===================================  =================================================================================
``epoch``                            integer, allocated in the database; grows with every loss of this tenant's state
``run``                              run id of the Redis server the mark was last used on
``phase``                            ``learning`` or ``open``
``since``                            milliseconds, Redis clock, when the present phase began
``revision``                         revision the limits below were published with
``l|<limit key>``                    amount of a limit, ``<feature>:<name>``
``m|<limit key>[@<scope digest>]``   marker: ``<start>|<end>|<previous start>``, seconds: the newest window a quota hash
                                     was made for, and the start of the one before it (0 for none)
``l|<feature>#seats``                number of seats
``s|<feature>``                      marker: ``<epoch>|<run>`` under which the feature's seats were made or last used
===================================  =================================================================================

*A quota*, hash ``licet:{tenant}:q:<limit key>[@<scope digest>]:<window start>``:

===================  =================================================================================================
field                value
===================  =================================================================================================
``base``             units of registers that were folded away
``sum``              ``base`` + Σ g of all registers
``used``             ``base`` + Σ (u + h) of all registers, as last reported
``wanted``           milliseconds, Redis clock, until when idle holders are asked to return units
``r|<sidecar>``      ``g|u|h|incarnation|op|epoch|run|time|sealed|d``: one register; d is the last call's grant
===================  =================================================================================================

*Seats of a feature*, sorted set ``licet:{tenant}:seats:<feature>``: holder digest, and when its hold ends, in
milliseconds, Redis clock; and the member ``*`` without end, so that a set that was made is never missing. Beside it the
hash ``licet:{tenant}:seats:<feature>#holders``: holder digest, and
``sidecar|incarnation|op|from|incarnation|op|ends|epoch|run|who``: the sidecar that answers for the seat (``-`` once
released) and its call that last touched it; the sidecar that the seat moved from, that one's last call, and until when
(ms) it may not have heard; the pair it was last held under; and whose the seat is (opaque).

Invariants after every script: ``sum = base + Σ g``, ``used = base + Σ (u + h)``, ``u + h ≤ g``; a grant implies
``sum ≤ amount``. Numbers are decimal integers below 2^53.
Source: ``docs/adr/0002-registers-not-tokens.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

HOLD_S: Final = 60
"""How long a sidecar may spend a lease after it *sent* its last answered call (boot-time clock)."""

HOLD_MARGIN_S: Final = 15
"""Added wherever somebody waits for a hold to end: covers clocks that run at different speeds, and paused processes."""

WINDOW_GRACE_S: Final = 30
"""How long after its end a window still takes calls, for sidecars whose clock is slow."""

QUOTA_KEPT_S: Final = 3_600
"""How long a quota hash outlives its window's grace, to be looked at; it holds nothing the ledger does not."""

LIMIT_FIELD: Final = "l|"
MARKER_FIELD: Final = "m|"
REGISTER_FIELD: Final = "r|"
SEATS_FIELD: Final = "s|"
SEATS_SENTINEL: Final = "*"
"""Member of every set of seats, with the score +inf."""


class Pair(NamedTuple):
    """What a register was asserted under: an epoch of the database and a run of the Redis server."""

    epoch: int
    run: str


class Marker(NamedTuple):
    """The newest window a quota hash was made for, and the start of the one before (0 for none), in seconds."""

    start: int
    end: int
    previous_start: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A tenant's mark, parsed."""

    pair: Pair
    phase: str
    since_ms: int
    revision: int
    amounts: Mapping[str, int]
    markers: Mapping[str, Marker]

    @property
    def is_open(self) -> bool:
        """Whether leases are granted."""
        return self.phase == "open"


@dataclass(frozen=True, slots=True)
class Register:
    """What one quota knows of one sidecar. ``granted``, ``used``, ``reserved`` in units; ``time_ms`` Redis clock."""

    granted: int
    used: int
    reserved: int
    incarnation: int
    op: int
    pair: Pair
    time_ms: int
    sealed: bool


def quota_name(limit_key: str, scope: str, window_start: int) -> str:
    """``<limit key>[@<scope digest>]:<window start>``: names a quota within its tenant, in Redis and in events."""
    return f"{limit_key}@{scope}:{window_start}" if scope else f"{limit_key}:{window_start}"


def marker_name(limit_key: str, scope: str) -> str:
    """The part of a marker's field after ``m|``."""
    return f"{limit_key}@{scope}" if scope else limit_key


def parse_mark(fields: Mapping[bytes, bytes]) -> Mark | None:
    """The mark of an ``HGETALL``; ``None`` when there is none.

    Raises:
        ValueError: a field is not of its form; someone else wrote it.
    """
    if b"epoch" not in fields:
        return None
    amounts: dict[str, int] = {}
    markers: dict[str, Marker] = {}
    for raw_name, raw_value in fields.items():
        name = raw_name.decode()
        if name.startswith(LIMIT_FIELD):
            amounts[name[2:]] = int(raw_value)
        elif name.startswith(MARKER_FIELD):
            start, end, previous_start = raw_value.split(b"|")
            markers[name[2:]] = Marker(int(start), int(end), int(previous_start))
    return Mark(
        pair=Pair(int(fields[b"epoch"]), fields[b"run"].decode()),
        phase=fields[b"phase"].decode(),
        since_ms=int(fields[b"since"]),
        revision=int(fields[b"revision"]),
        amounts=amounts,
        markers=markers,
    )


def parse_register(value: bytes) -> Register:
    """One register's field.

    Raises:
        ValueError: not of its form; someone else wrote it.
    """
    granted, used, reserved, incarnation, op, epoch, run, time_ms, sealed, _ = value.decode().split("|")
    return Register(
        granted=int(granted),
        used=int(used),
        reserved=int(reserved),
        incarnation=int(incarnation),
        op=int(op),
        pair=Pair(int(epoch), run),
        time_ms=int(time_ms),
        sealed=sealed == "1",
    )
