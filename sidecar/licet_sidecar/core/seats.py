"""Seats: which holders this sidecar answers for, and the calls by which it takes, keeps and gives back their seats.

A seat is named by its feature and its holder: one subject has one seat of a feature, whoever asks and wherever. Redis
counts the holders (``adapters/seats.lua``); the sidecar that a holder talks to answers its heartbeats from memory.
Rules; the simulation removes each of them in turn and must fail:

1. A sidecar answers for a seat only before ``hold_until_ms``: ``HOLD_S`` after it *sent* the last call about it that
   was answered ``HELD`` (boot-time clock). Redis counts the holder for ``HOLD_MARGIN_S`` longer than that.
2. It stops answering for a seat *before* the release is sent.
3. While learning it asserts only what it answers for. What it does not, others may have by now.
4. One call a tenant is under way at a time. A call that was not answered is not repeated: what it asked is asked again
   under a new number. Its late execution moves a seat here at worst, and a late release is fenced by its number.
5. A holder that was silent for two heartbeats loses its seat, and it is given back at once.

Owned by one event loop. No I/O, no clock: ``boot_ms`` is boot time in milliseconds.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NamedTuple

from licet.domain.ids import NAME_CHARS_MAX, NAME_PATTERN
from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, Pair
from licet_sidecar.core.lease import NO_PAIR

HOLD_MS: Final = HOLD_S * 1_000
KEPT_MS: Final = (HOLD_S + HOLD_MARGIN_S) * 1_000
"""How long Redis counts a holder from the last call about it."""

RENEW_MS: Final = HOLD_MS // 3
"""A seat is renewed in Redis at least this often, so that two lost calls in a row do not end its hold. Seats half as
old go along, so that those of a tenant, and of all tenants, are soon renewed together."""

HEARTBEATS_MISSED_MAX: Final = 2
"""Heartbeats a holder may miss. One is lost easily; after the second nobody is there."""

ASKS_PER_CALL_MAX: Final = 512
"""The script runs about 5 µs an ask, and blocks Redis meanwhile."""

ENDED_MAX: Final = 10_000
ENDED_KEPT_MS: Final = 600_000
"""How long, and for how many seats, it is remembered that they were released or reclaimed here."""

_SEAT_ID: Final = re.compile(rf"(?P<feature>{NAME_PATTERN.pattern}):(?P<holder>[0-9a-f]{{32}})")


class Who(NamedTuple):
    """Whose seat it is, and for which action: what events about it say. Heartbeat in milliseconds."""

    subject_type: str
    subject_id: str
    on_behalf_of: str
    action: str
    heartbeat_ms: int


NOT_SAID: Final = Who("", "", "", "", 0)
"""Where the holder's own word is not known: a call about it keeps what Redis knows."""


class Verb(Enum):
    """What is asked about a holder; see ``adapters/seats.lua``."""

    ACQUIRE = "acquire"
    RENEW = "renew"
    ASSERT = "assert"
    TAKE = "take"
    RELEASE = "release"
    LOOK = "look"


class Result(Enum):
    """What an ask came to; see ``adapters/seats.lua``."""

    HELD = auto()
    FREE = auto()
    FULL = auto()
    LEARNING = auto()
    UNPUBLISHED = auto()
    LOST = auto()
    GONE = auto()
    MOVED = auto()
    RELEASED = auto()
    FENCED = auto()


UNDECIDED: Final = frozenset({Result.LEARNING, Result.UNPUBLISHED, Result.LOST})
"""Results that say nothing of the seat: ask again soon."""


class SeatStatus(Enum):
    """First element of the script's answer."""

    OK = auto()
    LEARN = auto()
    STALE = auto()


Wish = tuple[str, Verb]
"""(seat id, verb): what somebody waits for."""


class SeatAsk(NamedTuple):
    """One ask of a call. ``seats`` is how many the feature has as far as is known here; it matters to ACQUIRE."""

    verb: Verb
    feature: str
    holder: str
    who: Who = NOT_SAID
    seats: int = 0

    @property
    def seat_id(self) -> str:
        """The seat it is about."""
        return f"{self.feature}:{self.holder}"

    @property
    def wish(self) -> Wish:
        """What those who want it wait for."""
        return (self.seat_id, self.verb)


@dataclass(frozen=True, slots=True)
class SeatCall:
    """One call of the script."""

    tenant: str
    op: int
    pair: Pair
    revision: int
    asks: tuple[SeatAsk, ...]
    sent_boot_ms: int


class Room(NamedTuple):
    """A feature's seats, how many are taken, and in how long (ms) the first of these holds ends by itself."""

    seats: int
    taken: int
    ends_in_ms: int = 0


@dataclass(frozen=True, slots=True)
class SeatAnswer:
    """An answer of the script. ``results`` in the order of the asks, each with whose seat Redis says it is."""

    status: SeatStatus
    incarnation: int
    op: int
    pair: Pair
    phase: str
    room: Mapping[str, Room] = field(default_factory=dict)
    results: tuple[tuple[Result, Who], ...] = ()


class Seat:
    """A seat this sidecar answers for, or did until its hold ended.

    ``heard_ms``: the holder's last heartbeat. ``asked_ms``: when the last answered call about it was sent; 0 when Redis
    may have lost that.
    ``lapses_ms``: when, unless a call is answered before, its holder counts as reclaimed; ``lapsed``: it does.
    """

    __slots__ = ("asked_ms", "feature", "heard_ms", "hold_until_ms", "holder", "lapsed", "lapses_ms", "tenant", "who")

    def __init__(self, tenant: str, feature: str, holder: str, who: Who, heard_ms: int) -> None:
        self.tenant = tenant
        self.feature = feature
        self.holder = holder
        self.who = who
        self.heard_ms = heard_ms
        self.asked_ms = 0
        self.hold_until_ms = 0
        self.lapses_ms = 0
        self.lapsed = False

    @property
    def id(self) -> str:
        """Names it within its tenant."""
        return f"{self.feature}:{self.holder}"

    @property
    def silent_ms(self) -> int:
        """When the holder counts as silent for too long."""
        return self.heard_ms + HEARTBEATS_MISSED_MAX * self.who.heartbeat_ms

    def __repr__(self) -> str:
        return f"Seat({self.tenant} {self.id} until={self.hold_until_ms}{' lapsed' if self.lapsed else ''})"


class Ending(Enum):
    """How a seat ended here."""

    RELEASED = auto()
    RECLAIMED = auto()


class ChangeKind(Enum):
    """What happened to a seat other than by its holder's own call."""

    TAKEN_OVER = auto()
    """This sidecar answers for it now; another one did."""
    REGAINED = auto()
    """It had lapsed, and Redis still had it."""
    RECLAIMED = auto()
    """Its holder was silent, or it could not be vouched for any more. It may be regained."""
    FORGOTTEN = auto()
    """Nothing more is known of it here."""


class Change(NamedTuple):
    """One of them, for the log."""

    kind: ChangeKind
    seat: Seat


@dataclass(slots=True)
class TenantSeats:
    """All about one tenant. ``seats`` by id; ``leaving``: until when (ms) the end of a seat is told to Redis;
    ``wanted``: what holders wait for; ``room`` by feature, as Redis last said.
    """

    tenant: str
    pair: Pair = NO_PAIR
    seats: dict[str, Seat] = field(default_factory=dict)
    leaving: dict[str, int] = field(default_factory=dict)
    wanted: dict[Wish, SeatAsk] = field(default_factory=dict)
    room: dict[str, Room] = field(default_factory=dict)
    outstanding: SeatCall | None = None
    doubted_op: int = 0
    """What calls up to this one said may be lost in Redis."""
    why: str = ""


class SeatEnd(NamedTuple):
    """What an answer came to: results (none when the call was turned away), changes for the log, and whether to call
    again at once.
    """

    results: Mapping[Wish, Result]
    changes: list[Change]
    again: bool = False


class SeatBook:
    """All seats of a sidecar, and the calls about them."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self._op = 0
        self.tenants: dict[str, TenantSeats] = {}
        self._ended: OrderedDict[tuple[str, str], tuple[Ending, int]] = OrderedDict()

    def of(self, tenant: str) -> TenantSeats:
        """The tenant's seats; made when there are none."""
        held = self.tenants.get(tenant)
        if held is None:
            held = self.tenants[tenant] = TenantSeats(tenant)
        return held

    def find(self, tenant: str, seat_id: str) -> Seat | None:
        """A seat known here, vouched for or not."""
        held = self.tenants.get(tenant)
        return held.seats.get(seat_id) if held else None

    @staticmethod
    def vouches(seat: Seat, boot_ms: int) -> bool:
        """Rule 1."""
        return boot_ms < seat.hold_until_ms

    def held(self, boot_ms: int) -> int:
        """Seats vouched for."""
        return sum(self.vouches(seat, boot_ms) for held in self.tenants.values() for seat in held.seats.values())

    def ended(self, tenant: str, seat_id: str) -> Ending | None:
        """How a seat that is not known here any more ended, if it ended here lately."""
        found = self._ended.get((tenant, seat_id))
        return found[0] if found else None

    # What holders do

    @staticmethod
    def want(held: TenantSeats, ask: SeatAsk) -> None:
        """Puts an ask in the next call."""
        held.wanted[ask.wish] = ask

    @staticmethod
    def hear(seat: Seat, boot_ms: int) -> None:
        """The holder's heartbeat."""
        seat.heard_ms = max(seat.heard_ms, boot_ms)

    def end(self, seat: Seat, ending: Ending, boot_ms: int) -> None:
        """The seat is not answered for from now on, and given back with the next call (rule 2)."""
        held = self.of(seat.tenant)
        held.seats.pop(seat.id, None)
        held.leaving[seat.id] = boot_ms + KEPT_MS
        self._remember(seat, ending, boot_ms)

    def restore(self, seat: Seat, boot_ms: int) -> None:
        """Takes up a seat of an earlier incarnation. It is vouched for once a call was answered."""
        seat.heard_ms = boot_ms
        seat.asked_ms = seat.hold_until_ms = 0
        seat.lapses_ms = boot_ms + HOLD_MS
        self.of(seat.tenant).seats[seat.id] = seat

    # Calls

    def begin_call(self, held: TenantSeats, *, revision: int, boot_ms: int) -> SeatCall | None:
        """The next call for a tenant: what holders wait for, what is given back, and what is old enough to be renewed.

        ``None`` when one is under way or there is nothing to say.
        """
        if held.outstanding is not None:
            return None
        asks: list[SeatAsk] = []
        for wish in list(held.wanted)[:ASKS_PER_CALL_MAX]:
            asks.append(held.wanted.pop(wish))
        said = {ask.seat_id for ask in asks}
        for seat_id in held.leaving:
            if len(asks) < ASKS_PER_CALL_MAX and seat_id not in said:
                feature, _, holder = seat_id.rpartition(":")
                asks.append(SeatAsk(Verb.RELEASE, feature, holder))
        before_ms = boot_ms - RENEW_MS // 2
        old = [seat for seat in held.seats.values() if seat.asked_ms <= before_ms and seat.id not in said]
        old.sort(key=lambda seat: seat.asked_ms)
        for seat in old[: max(0, ASKS_PER_CALL_MAX - len(asks))]:
            verb = Verb.ASSERT if self.vouches(seat, boot_ms) else Verb.RENEW  # rule 3
            asks.append(SeatAsk(verb, seat.feature, seat.holder, seat.who))
        if not asks:
            return None
        self._op += 1
        held.outstanding = SeatCall(held.tenant, self._op, held.pair, revision, tuple(asks), boot_ms)
        return held.outstanding

    def end_call(self, held: TenantSeats, call: SeatCall, answer: SeatAnswer, boot_ms: int) -> SeatEnd | None:
        """Takes an answer. ``None`` when it is not the answer to the call under way: it changes nothing (rule 4)."""
        if held.outstanding is not call or (answer.incarnation, answer.op) != (self.incarnation, call.op):
            return None
        held.outstanding = None
        if answer.status is not SeatStatus.OK:
            learned = answer.status is SeatStatus.STALE and answer.pair != held.pair
            if answer.status is SeatStatus.STALE:
                held.pair = answer.pair
            held.why = "learning" if answer.status is SeatStatus.STALE else "mark-missing"
            self._doubt(held)
            for ask in call.asks:
                if ask.verb in (Verb.ACQUIRE, Verb.TAKE, Verb.LOOK):
                    held.wanted.setdefault(ask.wish, ask)
            return SeatEnd({}, [], again=learned)
        held.room.update(answer.room)
        changes: list[Change] = []
        results: dict[Wish, Result] = {}
        held.why = ""
        for ask, (result, who) in zip(call.asks, answer.results, strict=True):
            results[ask.wish] = result
            if result is Result.LOST:
                held.why = "quota-lost"
            elif result is Result.UNPUBLISHED:
                held.why = "unpublished"
            if ask.verb is Verb.RELEASE:
                if result not in UNDECIDED:
                    held.leaving.pop(ask.seat_id, None)
            elif ask.verb is not Verb.LOOK:
                changes.extend(self._take_result(held, call, ask, result, who, boot_ms))
        return SeatEnd(results, changes)

    def abandon_call(self, held: TenantSeats, call: SeatCall) -> None:
        """The call was not answered, or refused without having been run: nothing is known of it (rule 4)."""
        if held.outstanding is call:
            held.outstanding = None

    def _take_result(
        self, held: TenantSeats, call: SeatCall, ask: SeatAsk, result: Result, who: Who, boot_ms: int
    ) -> list[Change]:
        seat = held.seats.get(ask.seat_id)
        if result is Result.HELD:
            if seat is None:
                if ask.verb in (Verb.RENEW, Verb.ASSERT):
                    return []  # it ended here meanwhile; its release is on its way
                seat = Seat(held.tenant, ask.feature, ask.holder, who, boot_ms)
                held.seats[seat.id] = seat
                change = Change(ChangeKind.TAKEN_OVER, seat)
            else:
                change = Change(ChangeKind.REGAINED, seat)
            seat.who = who if who.heartbeat_ms else seat.who
            if call.op > held.doubted_op:
                seat.asked_ms = call.sent_boot_ms
            seat.hold_until_ms = max(seat.hold_until_ms, call.sent_boot_ms + HOLD_MS)
            seat.lapses_ms = seat.hold_until_ms
            if ask.verb in (Verb.ACQUIRE, Verb.TAKE):
                self.hear(seat, boot_ms)
                held.leaving.pop(seat.id, None)
                self._ended.pop((held.tenant, seat.id), None)
            was_lapsed, seat.lapsed = seat.lapsed, False
            if ask.verb is Verb.ACQUIRE:
                return []  # the holder's own call records it
            return [change] if change.kind is ChangeKind.TAKEN_OVER or was_lapsed else []
        if seat is None or result not in (Result.GONE, Result.FULL, Result.MOVED):
            return []
        del held.seats[seat.id]
        if result is Result.MOVED:
            # Redis counts on this sidecar until it hears that it knows.
            held.leaving[seat.id] = boot_ms + KEPT_MS
            return [Change(ChangeKind.FORGOTTEN, seat)]
        self._remember(seat, Ending.RECLAIMED, boot_ms)
        return [Change(ChangeKind.FORGOTTEN if seat.lapsed else ChangeKind.RECLAIMED, seat)]

    # Upkeep

    def doubt(self) -> None:
        """Redis may have lost what was said until now: say it again."""
        for held in self.tenants.values():
            self._doubt(held)

    def unasserted(self, boot_ms: int) -> list[str]:
        """Tenants with a seat vouched for that no call begun after it was doubted was answered about.

        A call under way from before counts: its answer may still bring a seat that was lost since.
        """
        return [
            tenant
            for tenant, held in self.tenants.items()
            if (held.outstanding is not None and held.outstanding.op <= held.doubted_op)
            or any(not seat.asked_ms and self.vouches(seat, boot_ms) for seat in held.seats.values())
        ]

    def is_due(self, held: TenantSeats, boot_ms: int, *, age_ms: int = RENEW_MS) -> bool:
        """Whether a call should be made for the sake of seats last asked about ``age_ms`` ago, or of ended ones."""
        if held.leaving or held.wanted:
            return True
        before_ms = boot_ms - age_ms
        return any(seat.asked_ms <= before_ms for seat in held.seats.values())

    def tick(self, held: TenantSeats, boot_ms: int) -> list[Change]:
        """Takes seats back from silent holders (rule 5), and from those that cannot be vouched for any more."""
        changes: list[Change] = []
        for seat in list(held.seats.values()):
            if boot_ms >= seat.silent_ms:
                self.end(seat, Ending.RECLAIMED, boot_ms)
                changes.append(Change(ChangeKind.FORGOTTEN if seat.lapsed else ChangeKind.RECLAIMED, seat))
            elif boot_ms >= seat.lapses_ms and not seat.lapsed:
                seat.lapsed = True
                changes.append(Change(ChangeKind.RECLAIMED, seat))
        for seat_id, until_ms in list(held.leaving.items()):
            if boot_ms >= until_ms:
                del held.leaving[seat_id]  # Redis has let it go by itself
        return changes

    def tidy(self, boot_ms: int) -> None:
        """Forgets tenants about whom nothing is left to say, and how seats ended long ago."""
        for tenant, held in list(self.tenants.items()):
            if not (held.seats or held.leaving or held.wanted or held.outstanding):
                del self.tenants[tenant]
        while self._ended and next(iter(self._ended.values()))[1] + ENDED_KEPT_MS <= boot_ms:
            self._ended.popitem(last=False)

    def _doubt(self, held: TenantSeats) -> None:
        held.doubted_op = self._op
        for seat in held.seats.values():
            seat.asked_ms = 0

    def _remember(self, seat: Seat, ending: Ending, boot_ms: int) -> None:
        key = (seat.tenant, seat.id)
        self._ended[key] = (ending, boot_ms)
        self._ended.move_to_end(key)
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)


def holder_digest(subject_type: str, subject_id: str) -> str:
    """32 hex digits that stand for a subject. Length-prefixed, so that ("a", "bc") and ("ab", "c") differ."""
    joined = f"{len(subject_type)}:{subject_type}{len(subject_id)}:{subject_id}"
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def split_seat_id(seat_id: str) -> tuple[str, str] | None:
    """(feature, holder digest) of a seat's id; ``None`` when it cannot be one."""
    match = _SEAT_ID.fullmatch(seat_id)
    if match is None or len(match["feature"]) > NAME_CHARS_MAX:
        return None
    return match["feature"], match["holder"]
