"""Reservations: units held for actions under way, whose real quantity is known when they end.

Rules:

1. ``lease.reserved`` is the sum of what open reservations hold of that lease, so that ``used + reserved <= cap`` covers
   them like what was spent. Units are held in state and in the log before the caller is answered.
2. A reservation is settled once: committed, canceled or expired. The outcome is remembered for ``OUTCOME_KEPT_MS``, and
   whoever settles again gets it again.
3. A commit is spent in the window that was reserved in, however late it comes. What exceeds the reservation is no part
   of it: that is decided as a new check, in the window of that moment.
4. Units that Redis was never told of (no call begun after the reservation was answered) are certain only while the
   lease's hold lasts: after that the register may have been sealed without them, and others may have them. Units that
   Redis was told of stay counted there, so they are certain for as long as the reservation is open.

A quota of units is spent by the unit. A budget in money is spent by the price that held when it was reserved, which
never costs more for fewer units.

Owned by one event loop. No I/O, no clock: ``now_us`` is wall time (microseconds since the Unix epoch, for expiry, which
outlives the process), ``boot_ms`` boot time (milliseconds, for holds and for how long outcomes are kept).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from enum import IntEnum
from typing import Any, Final, NamedTuple

from licet.domain.catalog import Action, AttributeValue
from licet.domain.ids import NAME_CHARS_MAX, LimitKey
from licet.domain.money import Price
from licet.wire.registers import quota_name
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry, TimestampUs, check_units, meter_units
from licet_sidecar.core.lease import Lease, Terms

EXPIRES_AFTER_S_MIN: Final = 1
EXPIRES_AFTER_S_MAX: Final = 7 * 86_400

OPEN_MAX: Final = 100_000
"""Open reservations of one sidecar. About 100 MB, and 100 ms to write all of them at the head of a new segment."""
OPEN_BYTES_MAX: Final = 32 * 1024 * 1024
"""The same, as they are logged: their attributes can be large."""

OUTCOME_KEPT_MS: Final = 600_000
OUTCOMES_MAX: Final = 65_536
"""About 30 MB. At 100 settled a second all of ten minutes; beyond, the oldest are forgotten, and that is counted."""

_STALE_EXPIRIES_MAX: Final = 1_000


class ReservationState(IntEnum):
    """Numbers are those of ``licet.v1``."""

    HELD = 1
    COMMITTED = 2
    CANCELED = 3
    EXPIRED = 4
    UNKNOWN = 5


class Hold(NamedTuple):
    """What a reservation holds of one lease: ``units`` of the quota, held for units of ``feature``.

    ``limit`` is what the quota counts for; a limit and its top-ups share it. ``price`` is set for a budget in money,
    whose units are nanos, and ``by`` is the attribute value that picks its amount.
    """

    lease: Lease
    feature: str
    limit: str
    units: int
    price: Price | None = None
    by: str = ""

    def quota_units(self, feature_units: int) -> int:
        """What so many units of the feature take of the limit."""
        return feature_units if self.price is None else self.price.charge_nanos(feature_units, self.by)


class Reservation:
    """One open reservation of ``units``, by feature. They are not held any more once ``given_up`` (rule 4).

    ``effect``, ``reason``, ``rule``, ``degraded`` and ``observed`` are of the decision that made it, ``prices`` and
    ``meters`` what its action and license said then. ``terms_s`` is how long an extension lasts that names no time.
    ``settling`` is true while a commit waits for what exceeds it: it does not expire then.
    """

    __slots__ = (
        "commits_on_expiry",
        "degraded",
        "effect",
        "expires_us",
        "exposures",
        "given_up",
        "hidden",
        "holds",
        "id",
        "inquiry",
        "made_ms",
        "meters",
        "observed",
        "prices",
        "reason",
        "reported",
        "rule",
        "settling",
        "size",
        "terms_s",
        "units",
        "values_lost",
    )

    def __init__(self, id_: str, inquiry: Inquiry, *, expires_us: int, made_ms: int) -> None:
        self.id = id_
        self.inquiry = inquiry
        """What was asked; its context holds what the action declares, and nothing else."""
        self.hidden: Mapping[str, AttributeValue] = {}
        """What is recorded instead of attributes whose value is not."""
        self.values_lost = False
        """Whether their values went with an earlier process."""
        self.expires_us = expires_us
        self.made_ms = made_ms
        self.units: Mapping[str, int] = {}
        self.holds: tuple[Hold, ...] = ()
        self.meters: Mapping[str, str] = {}
        self.prices: tuple[tuple[str, Price, str], ...] = ()
        self.exposures: Mapping[str, str] = {}
        self.terms_s = 0
        self.commits_on_expiry = False
        self.effect = 0
        self.reason = 0
        self.rule = ""
        self.degraded = False
        self.observed = False
        self.given_up = False
        self.reported = False
        """Whether Redis is known to count what is held. Once true it stays so."""
        self.settling = False
        self.size = 0
        """Bytes of its record in the log."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.inquiry.tenant

    @property
    def context(self) -> Mapping[str, AttributeValue]:
        """The attributes that the action declares, as they are recorded."""
        return {**self.inquiry.context, **self.hidden} if self.hidden else self.inquiry.context

    def used_units(self, quantity: int | None, quantities: Mapping[str, int]) -> dict[str, int]:
        """Units by feature that a commit names; all that is held when it names none.

        Raises:
            InvalidInquiry: they do not fit the meters that were reserved.
        """
        if quantity is None and not quantities:
            return dict(self.units)
        asked = Inquiry(self.tenant, self.inquiry.action)
        asked.quantity = None if quantity is None else check_units("quantity", quantity)
        asked.quantities = {
            meter: check_units(f"quantities[{meter[:NAME_CHARS_MAX]!r}]", n) for meter, n in quantities.items()
        }
        meters = tuple(self.meters)
        units: dict[str, int] = dict.fromkeys(self.units, 0)
        by_meter = meter_units(Action(self.inquiry.action, self.meters), meters[0] if len(meters) == 1 else None, asked)
        for meter, count in by_meter.items():
            feature = self.meters[meter]
            units[feature] = check_units("quantities", units.get(feature, 0) + count)
        return units

    def beyond(self, used: Mapping[str, int]) -> dict[str, int]:
        """What ``used`` exceeds the reservation by, by feature; only features that do."""
        held = {} if self.given_up else self.units
        return {
            feature: units - held.get(feature, 0) for feature, units in used.items() if units > held.get(feature, 0)
        }

    def within(self, used: Mapping[str, int]) -> dict[str, int]:
        """What of ``used`` the reservation covers, by feature."""
        held = {} if self.given_up else self.units
        return {feature: min(units, held.get(feature, 0)) for feature, units in used.items()}

    def inquiry_for(self, extra: Mapping[str, int]) -> Inquiry:
        """The same question about other units, by feature."""
        inquiry = Inquiry(self.tenant, self.inquiry.action)
        for name in _INQUIRY_FIELDS:
            setattr(inquiry, name, getattr(self.inquiry, name))
        if len(self.meters) == 1:
            inquiry.quantity = sum(extra.values())
        else:
            first_meters = {feature: meter for meter, feature in reversed(tuple(self.meters.items()))}
            inquiry.quantities = {first_meters[feature]: units for feature, units in extra.items()}
        return inquiry

    def shares(self, used: Mapping[str, int]) -> list[tuple[Hold, int]]:
        """What of each hold is spent when so many units of each feature were used, at most what is held."""
        left: dict[str, int] = {}
        shares: list[tuple[Hold, int]] = []
        for hold in self.holds:
            if hold.limit not in left:
                count = min(used.get(hold.feature, 0), self.units.get(hold.feature, 0))
                left[hold.limit] = hold.quota_units(count)
            share = min(hold.units, left[hold.limit])
            left[hold.limit] -= share
            shares.append((hold, share))
        return shares

    def is_certain(self, boot_ms: int) -> bool:
        """Rule 4: whether what is held can be spent without asking."""
        return self.reported or all(
            hold.lease.asked_ms > self.made_ms or boot_ms < hold.lease.hold_until_ms for hold in self.holds
        )


class Outcome(NamedTuple):
    """How a reservation was settled. ``answer`` is the encoded answer to the commit, empty for other outcomes."""

    tenant: str
    state: ReservationState
    answer: bytes
    settled_ms: int
    action: str = ""


class ReservationBook:
    """All open reservations of a sidecar, and the outcomes of those settled lately."""

    def __init__(self) -> None:
        self._open: dict[str, Reservation] = {}
        self._unreported: dict[str, Reservation] = {}
        self._expiries: list[tuple[int, str]] = []
        self._outcomes: dict[str, Outcome] = {}
        self._order: deque[str] = deque()
        self._open_bytes = 0
        self.outcomes_evicted = 0

    @property
    def open_count(self) -> int:
        """Open reservations. While there are any, this sidecar's registers must be kept."""
        return len(self._open)

    @property
    def is_full(self) -> bool:
        """Whether no more reservations are taken."""
        return len(self._open) >= OPEN_MAX or self._open_bytes >= OPEN_BYTES_MAX

    def all(self) -> Iterable[Reservation]:
        """Every open reservation."""
        return self._open.values()

    def find(self, tenant: str, id_: str) -> Reservation | Outcome | None:
        """The tenant's open reservation, or how it was settled; ``None`` for another tenant's, and when unknown."""
        found: Reservation | Outcome | None = self._open.get(id_) or self._outcomes.get(id_)
        return found if found is not None and found.tenant == tenant else None

    # Life of a reservation

    def add(self, reservation: Reservation) -> None:
        """Takes up a reservation whose units are held already."""
        self._open[reservation.id] = reservation
        self._open_bytes += reservation.size
        if not reservation.reported:
            self._unreported[reservation.id] = reservation
        self.expire_at(reservation, reservation.expires_us)

    def expire_at(self, reservation: Reservation, expires_us: int) -> None:
        """Sets when it expires, also again after ``due`` returned it and it could not be settled."""
        reservation.expires_us = expires_us
        heapq.heappush(self._expiries, (expires_us, reservation.id))
        if len(self._expiries) > 2 * len(self._open) + _STALE_EXPIRIES_MAX:
            self._expiries = [(one.expires_us, one.id) for one in self._open.values()]
            heapq.heapify(self._expiries)

    def due(self, now_us: int, at_most: int) -> list[Reservation]:
        """Reservations that expired, the earliest first; each is returned once."""
        found: dict[str, Reservation] = {}
        while self._expiries and self._expiries[0][0] <= now_us and len(found) < at_most:
            expires_us, id_ = heapq.heappop(self._expiries)
            reservation = self._open.get(id_)
            if reservation is not None and reservation.expires_us == expires_us and not reservation.settling:
                found[id_] = reservation
        return list(found.values())

    def settle(self, reservation: Reservation, shares: Iterable[tuple[Hold, int]], boot_ms: int) -> None:
        """Spends ``shares`` and frees the rest. The caller has logged it, and remembers the outcome."""
        for one, share in shares:
            unhold(one.lease, one.units)
            one.lease.used += share
            one.lease.spent_ms = boot_ms
        del self._open[reservation.id]
        self._open_bytes -= reservation.size
        self._unreported.pop(reservation.id, None)

    def give_up_units(self, reservation: Reservation) -> None:
        """Rule 4: what it holds is not certain any more. It stays open and holds nothing."""
        release(reservation.holds)
        reservation.holds, reservation.given_up = (), True
        self._unreported.pop(reservation.id, None)

    def newly_reported(self) -> list[Reservation]:
        """Those that Redis counts since the last time this was asked."""
        found = [
            reservation
            for reservation in self._unreported.values()
            if all(hold.lease.asked_ms > reservation.made_ms for hold in reservation.holds)
        ]
        for reservation in found:
            reservation.reported = True
            del self._unreported[reservation.id]
        return found

    # Outcomes

    def remember(self, id_: str, outcome: Outcome) -> None:
        """Keeps an outcome for whoever settles again."""
        if id_ not in self._outcomes:
            self._order.append(id_)
        self._outcomes[id_] = outcome
        if len(self._order) > OUTCOMES_MAX:
            del self._outcomes[self._order.popleft()]
            self.outcomes_evicted += 1

    def forget(self, boot_ms: int) -> None:
        """Forgets outcomes that are older than ``OUTCOME_KEPT_MS``."""
        before_ms = boot_ms - OUTCOME_KEPT_MS
        while self._order and self._outcomes[self._order[0]].settled_ms <= before_ms:
            del self._outcomes[self._order.popleft()]


def hold(lease: Lease, units: int, boot_ms: int) -> bool:
    """Reserves ``units`` as ``LeaseBook.spend`` spends them. Whether a refill is due."""
    lease.reserved += units
    lease.spent_lately += units
    lease.spent_ms = boot_ms
    return lease.free < lease.low_water


def unhold(lease: Lease, units: int) -> None:
    """Gives back what ``hold`` took."""
    lease.reserved -= units


def release(holds: Iterable[Hold]) -> None:
    """Frees everything that is held."""
    for one in holds:
        unhold(one.lease, one.units)


# In the log

_INQUIRY_FIELDS: Final = (
    "subject_type",
    "subject_id",
    "on_behalf_of",
    "roles",
    "subject_attributes",
    "resource_type",
    "resource_id",
    "resource_attributes",
    "context",
)
_MAPPINGS: Final = ("subject_attributes", "resource_attributes", "context")


_HOLDS: Final = 5
_COMMITS_ON_EXPIRY: Final = 10
_GIVEN_UP: Final = 17
"""Positions of fields below."""


def to_wire(reservation: Reservation) -> list[Any]:
    """The reservation as primitives that msgpack can carry. Append at the end; never reorder."""
    inquiry = reservation.inquiry
    return [
        reservation.id,
        inquiry.tenant,
        inquiry.action,
        [
            _values_to_wire(getattr(inquiry, name), reservation.hidden if name == "context" else ())
            if name in _MAPPINGS
            else getattr(inquiry, name)
            for name in _INQUIRY_FIELDS
        ],
        dict(reservation.units),
        [
            [
                *(one.lease.limit_key, one.lease.scope, one.lease.start, one.lease.end, one.lease.amount),
                *(one.feature, one.limit, one.units, _price_to_wire(one.price), one.by),
            ]
            for one in reservation.holds
        ],
        dict(reservation.meters),
        [[feature, _price_to_wire(price), attribute] for feature, price, attribute in reservation.prices],
        reservation.expires_us,
        reservation.terms_s,
        reservation.commits_on_expiry,
        int(reservation.effect),
        int(reservation.reason),
        reservation.rule,
        reservation.degraded,
        reservation.observed,
        reservation.reported,
        reservation.given_up,
        dict(reservation.exposures),
        dict(reservation.hidden),
    ]


def held_in(wire: list[Any]) -> list[tuple[tuple[str, str], int]]:
    """((tenant, quota), units) of what a reservation on the wire holds."""
    return [((wire[1], quota_name(key, scope, start)), units) for key, scope, start, *_, units, _, _ in wire[5]]


def orphaned(wire: list[Any], *, doubted: bool) -> list[Any]:
    """A reservation of another id, as ``to_wire`` wrote it, for whoever goes on in its place.

    Its leases are not ours: what they held may be in others' hands, so that it is given up (rule 4), and a commit
    decides anew. When it is ``doubted`` whether it is still open, or open here alone, it does not commit by itself.
    """
    wire = list(wire)
    wire[_HOLDS], wire[_GIVEN_UP] = [], True
    if doubted:
        wire[_COMMITS_ON_EXPIRY] = False
    return wire


LeaseOf = Callable[[str, str], Lease | None]
"""(tenant, quota) to the lease that is held of it."""


def from_wire(wire: list[Any], lease_of: LeaseOf, boot_ms: int) -> Reservation:
    """The inverse of ``to_wire``: a reservation of an earlier process, its units held again.

    A lease that is not there any more (its window ended long ago) is made from what the reservation says of it.
    """
    (id_, tenant, action, asked, units, holds, meters, prices, expires_us, terms_s, commits, *rest) = wire
    effect, reason, rule, degraded, observed, reported, given_up, *later = rest
    inquiry = Inquiry(tenant, action)
    for name, value in zip(_INQUIRY_FIELDS, asked, strict=False):
        setattr(inquiry, name, _values_from_wire(value) if name in _MAPPINGS else value)
    reservation = Reservation(id_, inquiry, expires_us=expires_us, made_ms=boot_ms)
    held: list[Hold] = []
    for limit_key, scope, start, end, amount, feature, limit, count, price, by in holds:
        lease = Lease(LimitKey(limit_key), scope, start, end, Terms(amount))
        known = lease_of(tenant, lease.quota)
        if known is None:
            lease.cap = count
        else:
            lease = known
        lease.reserved += count
        held.append(Hold(lease, feature, limit, count, Price(*price) if price else None, by))
    reservation.holds, reservation.units, reservation.meters = tuple(held), units, meters
    reservation.prices = tuple((feature, Price(*price), attribute) for feature, price, attribute in prices)
    reservation.terms_s, reservation.commits_on_expiry = terms_s, commits
    reservation.effect, reservation.reason, reservation.rule = effect, reason, rule
    reservation.degraded, reservation.observed = degraded, observed
    reservation.reported, reservation.given_up = reported, given_up
    reservation.exposures = later[0] if later else {}
    reservation.hidden = later[1] if len(later) > 1 else {}
    reservation.values_lost = bool(reservation.hidden)
    return reservation


def _price_to_wire(price: Price | None) -> list[Any] | None:
    if price is None:
        return None
    return [price.amount_nanos, price.per_units, price.currency, price.by, dict(price.amounts_nanos)]


def _values_to_wire(values: Mapping[str, Any], without: Container[str] = ()) -> dict[str, Any]:
    # Integers and timestamps are told apart by type, which msgpack does not carry.
    return {
        name: {"us": int(value)} if type(value) is TimestampUs else value
        for name, value in values.items()
        if name not in without
    }


def _values_from_wire(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: TimestampUs(value["us"]) if type(value) is dict else value for name, value in values.items()}


__all__ = ["Hold", "InvalidInquiry", "Outcome", "Reservation", "ReservationBook", "ReservationState"]
