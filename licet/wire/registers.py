"""The layout of quota registers in Redis, as both programs and the scripts read it.

*The mark*, hash ``licet:{tenant}:limits``:

===================================  =================================================================================
field                                value
===================================  =================================================================================
``epoch``                            integer, allocated in the database; grows with every loss of this tenant's state
``run``                              the run (``run_of``) of the Redis server the mark was last used on
``phase``                            ``learning`` or ``open``
``since``                            milliseconds, Redis clock, when the present phase began
``revision``                         revision the limits below were published with
``l|<limit key>``                    amount of a limit, ``<feature>:<name>``; of a grant, ``<limit key>+<grant id>``; of
                                     seats, ``<feature>#seats``. A rate in thousandths of a unit a second
``m|<limit key>[@<scope digest>]``   marker: ``<start>|<end>|<previous start>|<said>|<previous said>``: the newest
                                     window a hash was made for and the start of the one before it (0 for none), in
                                     seconds; and of each the ``since`` of the learning phase in which something was
                                     last said into it (0 for none)
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
``r|<sidecar>``      ``g|u|h|incarnation|op|epoch|run|time|sealed|d``: one register; d is the last call's grant,
                     of a sealed one what became part of ``base``
===================  =================================================================================================

Invariants after every script: ``sum = base + Σ g``, ``used = base + Σ (u + h)``, ``u + h ≤ g``; a grant of a hard limit
implies ``sum ≤ amount``. Numbers are decimal integers below 2^53.

Of a *rate* the registers hold shares, in thousandths of a unit a second: ``g`` is the share, ``u`` and ``h`` are 0, and
the window is all of time. A share is over, and counts for nobody, ``HOLD_S`` + ``HOLD_MARGIN_S`` after its last call.

*Seats of a feature*, sorted set ``licet:{tenant}:seats:<feature>``: holder digest, and when its hold ends, in
milliseconds, Redis clock; and the member ``*`` without end, so that a set that was made is never missing. Beside it the
hash ``licet:{tenant}:seats:<feature>#holders``: holder digest, and
``sidecar|incarnation|op|from|incarnation|op|ends|epoch|run|who``: the sidecar that answers for the seat (``-`` once
released) and its call that last touched it; the sidecar that the seat moved from, that one's last call, and until when
(ms) it may not have heard; the pair it was last held under; and whose the seat is (opaque).
Source: ``docs/adr/0002-registers-not-tokens.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from licet.domain.ids import LimitKey

HOLD_S: Final = 60
"""How long a sidecar may spend a lease after it *sent* its last answered call (boot-time clock)."""

HOLD_MARGIN_S: Final = 15
"""Added wherever somebody waits for a hold to end: covers clocks that run at different speeds, and paused processes."""

WINDOW_GRACE_S: Final = 30
"""How long after its end a window still takes calls, for sidecars whose clock is slow."""

QUOTA_KEPT_S: Final = 3_600
"""How long a quota hash outlives its window's grace, to be looked at; it holds nothing the ledger does not."""

_DIGEST: Final = re.compile(r"[0-9a-f]{16}")
LIMIT_FIELD: Final = "l|"
MARKER_FIELD: Final = "m|"
REGISTER_FIELD: Final = "r|"
SEATS_FIELD: Final = "s|"
SEATS_SENTINEL: Final = "*"
"""Member of every set of seats, with the score +inf."""


RUN_SECTIONS: Final = ("server", "replication")
"""Sections of ``INFO`` that ``run_of`` reads."""

RUN_ID_CHARS: Final = 20

SERVER_RUN_LUA: Final = f"""
local function server_run()
  local info = redis.call('INFO', 'server', 'replication')
  return string.sub(string.match(info, 'run_id:(%w+)'), 1, {RUN_ID_CHARS})
    .. string.sub(string.match(info, 'master_replid:(%w+)'), 1, {RUN_ID_CHARS})
end
"""
"""Put before every script that needs to know the run of the server it runs on: ``run_of``, in Lua."""


def run_of(info: Mapping[str, Any]) -> str:
    """The run of a server, from ``RUN_SECTIONS`` of its ``INFO``: no two phases in which one server took writes have
    the same.

    Its run id is new with every start of the process; its replication id with every promotion, which the run id of a
    server that was a replica for a while does not tell.
    """
    parts = (info.get("run_id", ""), info.get("master_replid", ""))
    return "".join((part.decode() if isinstance(part, bytes) else str(part))[:RUN_ID_CHARS] for part in parts)


class Pair(NamedTuple):
    """What a register was asserted under: an epoch of the database and a run of the Redis server."""

    epoch: int
    run: str


class Marker(NamedTuple):
    """The newest window a quota hash was made for, and the start of the one before (0 for none), in seconds.

    ``said_ms`` and ``previous_said_ms``: ``since`` of the learning phase in which something was last said into them.
    """

    start: int
    end: int
    previous_start: int
    said_ms: int = 0
    previous_said_ms: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A tenant's mark, parsed."""

    pair: Pair
    phase: str
    since_ms: int
    revision: int
    amounts: Mapping[str, int]
    markers: Mapping[str, Marker]
    seats: frozenset[str] = frozenset()
    """Features that a set of seats was made for."""

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
    folded: int = 0
    """Of one that is sealed: what of it became part of the base."""


def quota_name(limit_key: str, scope: str, window_start: int) -> str:
    """``<limit key>[@<scope digest>]:<window start>``: names a quota within its tenant, in Redis and in events."""
    return f"{limit_key}@{scope}:{window_start}" if scope else f"{limit_key}:{window_start}"


def marker_name(limit_key: str, scope: str) -> str:
    """The part of a marker's field after ``m|``."""
    return f"{limit_key}@{scope}" if scope else limit_key


def parts_of_marker(name: str) -> tuple[LimitKey, str]:
    """(limit key, scope digest) of ``marker_name``. A limit key may hold an ``@`` itself: ``reports:day@subject``."""
    key, _, scope = name.rpartition("@")
    return (LimitKey(key), scope) if key and _DIGEST.fullmatch(scope) else (LimitKey(name), "")


def parse_mark(fields: Mapping[bytes, bytes]) -> Mark | None:
    """The mark of an ``HGETALL``; ``None`` when there is none.

    Raises:
        ValueError: a field is not of its form; someone else wrote it.
    """
    if b"epoch" not in fields:
        return None
    amounts: dict[str, int] = {}
    markers: dict[str, Marker] = {}
    seats: list[str] = []
    for raw_name, raw_value in fields.items():
        name = raw_name.decode()
        if name.startswith(LIMIT_FIELD):
            amounts[name[2:]] = int(raw_value)
        elif name.startswith(MARKER_FIELD):
            markers[name[2:]] = Marker(*map(int, raw_value.split(b"|")))
        elif name.startswith(SEATS_FIELD):
            seats.append(name[2:])
    return Mark(
        pair=Pair(int(fields[b"epoch"]), fields[b"run"].decode()),
        phase=fields[b"phase"].decode(),
        since_ms=int(fields[b"since"]),
        revision=int(fields[b"revision"]),
        amounts=amounts,
        markers=markers,
        seats=frozenset(seats),
    )


def parse_register(value: bytes) -> Register:
    """One register's field.

    Raises:
        ValueError: not of its form; someone else wrote it.
    """
    granted, used, reserved, incarnation, op, epoch, run, time_ms, sealed, d = value.decode().split("|")
    return Register(
        granted=int(granted),
        used=int(used),
        reserved=int(reserved),
        incarnation=int(incarnation),
        op=int(op),
        pair=Pair(int(epoch), run),
        time_ms=int(time_ms),
        sealed=sealed == "1",
        folded=int(d) if sealed == "1" else 0,
    )
