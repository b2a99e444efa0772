"""A call that moves units between a sidecar and Redis, and what is answered. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from licet.wire.registers import Pair
from licet_sidecar.core.lease import Kind, Lease


class Ask(NamedTuple):
    """One quota in a call, as it was when the call was made. ``want`` and ``min`` 0: report, or return.

    ``known``: a call about it was answered under this pair, so there must be a register.
    """

    lease: Lease
    cap: int
    used: int
    reserved: int
    want: int
    min: int
    amount: int
    kind: Kind = Kind.HARD
    known: bool = False


@dataclass(frozen=True, slots=True)
class SettleCall:
    """A call to the settle script. Sent again verbatim until it is answered.

    ``durable``: what it grants must be on disk and on replicas before the answer counts. ``retiring``: the registers
    become part of their quotas' base, because this sidecar's id is used no more.
    """

    tenant: str
    op: int
    pair: Pair
    revision: int
    asks: tuple[Ask, ...]
    sent_boot_ms: int
    durable: bool = False
    retiring: bool = False


class Status(Enum):
    """First element of the script's answer."""

    OK = auto()
    LEARN = auto()
    STALE = auto()
    UNPUBLISHED = auto()
    OUTDATED = auto()
    CLOSED = auto()
    EARLY = auto()
    SEALED = auto()
    FENCED = auto()


class Granted(NamedTuple):
    """One quota in an answer: the register's g and u, what this call added, the limit, the sums over all sidecars."""

    g: int
    d: int
    u: int
    amount: int
    sum: int
    used: int
    wanted: bool


@dataclass(frozen=True, slots=True)
class SettleAnswer:
    """An answer of the settle script. ``about`` is the position in ``asks`` a refusal is about, or -1."""

    status: Status
    incarnation: int
    op: int
    pair: Pair
    phase: str
    redis_ms: int
    granted: tuple[Granted, ...] = ()
    about: int = -1


class Outcome(Enum):
    """What an answer means for the checks that wait, and for the shell."""

    SETTLED = auto()
    """Decide again."""
    AGAIN = auto()
    """Nothing was granted yet, because this call asserted or learned the pair: call again at once."""
    RECALL = auto()
    """Others hold units idle: ask them to return some, then call again."""
    ASK_CONTROL_PLANE = auto()
    """The tenant's mark is missing, old or learning: ask the control plane, and call again shortly."""
    SYNC = auto()
    """The limit was replaced or removed, which this sidecar has not heard yet: decide again when it has."""
    CLOCK = auto()
    """This machine's clock and Redis' differ by more than the grace: nothing can be leased in that window."""
    REPLACED = auto()
    """This sidecar's registers were sealed, or a newer incarnation is at work: it must take a new id."""
