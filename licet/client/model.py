"""What goes in and what comes out: the words of a check and of its decision, as plain immutable records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import IntEnum
from typing import Any

from licet.domain.flags import VALUE_KEY, VARIANT_KEY
from licet.domain.money import NANOS, format_nanos
from licet.domain.outcomes import Effect, Reason

ContextValue = str | int | float | bool | datetime | Sequence[str]
"""An attribute: an int is at most 64 bits, a ``datetime`` must know its zone, a sequence holds strings."""


class Semantics(IntEnum):
    """When a batch stops. Units taken by checks before the stop stay taken."""

    EXECUTE_ALL = 1
    DENY_ON_FIRST_DENY = 2
    PERMIT_ON_FIRST_PERMIT = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """Who acts: a user, a service or an agent. ``on_behalf_of`` is for the record and grants nothing."""

    id: str
    type: str = ""
    roles: Sequence[str] = ()
    attributes: Mapping[str, ContextValue] = field(default_factory=dict)
    on_behalf_of: str = ""


@dataclass(frozen=True, slots=True)
class Resource:
    """What the action is done to."""

    id: str
    type: str = ""
    attributes: Mapping[str, ContextValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """One question: may ``tenant`` do ``action``?

    ``quantity`` is in units of the action's one meter, 0 to 2^53 - 1; ``None`` means 1. ``quantities`` maps meters to
    units, for actions with several meters; give one or the other. A ``subject`` or ``resource`` that is a string is its
    id. Without an ``idempotency_key`` (at most 128 bytes) the client makes one. ``peek`` decides and takes nothing.
    """

    tenant: str
    action: str
    subject: Subject | str | None = None
    quantity: int | None = None
    quantities: Mapping[str, int] | None = None
    resource: Resource | str | None = None
    context: Mapping[str, ContextValue] | None = None
    idempotency_key: str | None = None
    peek: bool = False


class SeatState(IntEnum):
    """What became of a seat."""

    HELD = 1
    RELEASED = 2
    RECLAIMED = 3
    """The holder was silent for too long, or nobody could vouch for the seat any more."""
    UNKNOWN = 4


@dataclass(frozen=True, slots=True)
class Quota:
    """One quota as the sidecar saw it when it answered.

    ``limit`` and ``remaining`` are units, or of a budget in money billionths of ``currency`` (ISO 4217);
    ``limit_amount`` and ``remaining_amount`` are what people write. ``remaining`` is over all sidecars as last known,
    never exact while others spend, and 0 past a soft limit. ``window`` is ``"month"``, ``"minute"``, … and ends at
    ``resets_at``. Of a rate, ``window`` is ``"second"``, ``limit`` units a second, ``burst`` the most at once, and
    ``remaining`` what the sidecar has saved up of that.

    ``limit_key`` names the limit, as overrides and ``Decision.rule`` do. ``scope`` is what it is counted separately by,
    such as ``("subject",)``. ``grant_id`` is set for a top-up of the limit.
    """

    feature: str
    window: str
    limit: int
    remaining: int
    resets_at: datetime | None
    overage: bool
    currency: str = ""
    limit_key: str = ""
    scope: tuple[str, ...] = ()
    grant_id: str = ""
    burst: int = 0

    @property
    def limit_amount(self) -> Decimal:
        """``limit`` in units, or in whole units of the currency."""
        return Decimal(self.limit) / NANOS if self.currency else Decimal(self.limit)

    @property
    def remaining_amount(self) -> Decimal:
        """``remaining`` in units, or in whole units of the currency."""
        return Decimal(self.remaining) / NANOS if self.currency else Decimal(self.remaining)

    def __str__(self) -> str:
        """For people: ``reports:month: 3 of 10 left``."""
        name = self.limit_key or f"{self.feature}:{self.window}"
        grant = f" (grant {self.grant_id})" if self.grant_id else ""
        if self.window == "second":
            return f"{name}: {self.limit:,} a second, {self.remaining:,} of a burst of {self.burst:,} saved up"
        if self.currency:
            left = f"{format_nanos(self.remaining)} of {format_nanos(self.limit)} {self.currency} left"
        else:
            left = f"{self.remaining:,} of {self.limit:,} left"
        return f"{name}{grant}: {left}{', this is overage' if self.overage else ''}"


@dataclass(frozen=True, slots=True)
class Cost:
    """What the units cost, in billionths of ``currency`` (ISO 4217). For information: invoices count units."""

    amount_nanos: int
    currency: str

    @property
    def amount(self) -> Decimal:
        """The exact amount in whole units of the currency."""
        return Decimal(self.amount_nanos) / NANOS

    def __str__(self) -> str:
        return f"{format_nanos(self.amount_nanos)} {self.currency}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to one check.

    A decision is true exactly when it is ``APPROVED``, so that ``if client.check(...)`` does what it says: with the
    usual truth of an object a denial would pass that test. A ``PENDING`` decision is therefore false too.

    ``reason`` is stable, ``message`` is for people. ``rule`` names the policy rule, limit or flag that decided, or is
    empty. ``as_of`` says until when the state behind the answer is known to have been current; ``stale`` that this is
    too long ago, ``degraded`` that Redis could not be reached. ``retry_after`` is set for denials that time alone will
    change. ``decision_id`` is empty for a peek. ``fallback`` means that no sidecar answered and the caller's declared
    fallback did: then ``revision`` is 0, ``as_of`` is ``None``, and nothing was recorded.
    """

    effect: Effect
    reason: Reason
    message: str = ""
    rule: str = ""
    revision: int = 0
    as_of: datetime | None = None
    stale: bool = False
    degraded: bool = False
    quotas: tuple[Quota, ...] = ()
    cost: Cost | None = None
    retry_after: timedelta | None = None
    decision_id: str = ""
    access_request_id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    fallback: bool = False

    def variant(self, flag: str, default: str = "") -> str:
        """The variant of a feature that a flag serves; ``default`` when it serves none, or no sidecar answered."""
        return self.metadata.get(f"{VARIANT_KEY}{flag}", default)

    def variant_value(self, flag: str, default: Any = None) -> Any:
        """That variant's value: text, number, bool or a mapping, as the flag's document has it; else ``default``."""
        value = self.metadata.get(f"{VALUE_KEY}{flag}")
        return default if value is None else json.loads(value)

    @property
    def approved(self) -> bool:
        """Whether the action may go ahead."""
        return self.effect is Effect.APPROVED

    def __bool__(self) -> bool:
        return self.effect is Effect.APPROVED


@dataclass(frozen=True, slots=True)
class Seat:
    """The answer to a request for a seat. True exactly when its decision is ``APPROVED``.

    ``seat_id`` can be empty in an approval: the deployment only observes, or the sidecar, or the fallback, allows the
    action without a seat while none can be had. Then there is nothing to renew. ``seats`` says how many there are and
    ``taken`` how many are held, as last known.
    """

    decision: Decision
    seat_id: str = ""
    heartbeat: timedelta | None = None
    expires_at: datetime | None = None
    seats: int = 0
    taken: int = 0

    def __bool__(self) -> bool:
        return self.decision.approved


@dataclass(frozen=True, slots=True)
class SeatRenewal:
    """The answer to a heartbeat. True exactly when the seat is held.

    ``degraded``: Redis could not be asked; the seat is kept for as long as it is certain that nobody else has it.
    """

    state: SeatState
    expires_at: datetime | None = None
    degraded: bool = False

    def __bool__(self) -> bool:
        return self.state is SeatState.HELD
