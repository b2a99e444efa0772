"""Seats in plain Python: what ``seats.lua`` promises, and a store over it.

Written from the script's header and from ``docs/adr/0014-seats.md``. It shares the mark with ``FakeRegisters``: the
same pair, phase, revision and amounts. Holders are never counted up and down, but counted when asked.

``without`` takes a rule out. The simulation must notice each.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from licet.domain.catalog import seats_key
from licet.wire.registers import Pair
from licet_sidecar.core.seats import (
    KEPT_MS,
    NOT_SAID,
    Result,
    Room,
    SeatAnswer,
    SeatAsk,
    SeatCall,
    SeatStatus,
    Verb,
    Who,
)
from tests.support.fake_lease_store import LEARNING, NEVER, OPEN, FakeMark, FakeRegisters

NOBODY: Final = "-"
SEVERAL: Final = "*"


class SeatRule(Enum):
    """What the script must do; each can be left out."""

    WITHIN_SEATS = auto()
    """Nobody new when all seats are taken."""
    CHECK_PAIR = auto()
    """A call under another pair than the mark's is ``STALE``."""
    ONLY_OPEN = auto()
    """Nothing new is given while learning."""
    ASSERT_ADDS = auto()
    """While learning an asserted seat is added, even past the number."""
    FENCE = auto()
    """A call about a holder that is older than the last one of the same sidecar changes nothing."""
    OWN_RELEASES_ONLY = auto()
    """A release removes only what its own sidecar answers for."""
    COUNT_MOVED = auto()
    """A released seat counts until the sidecar it moved from has heard of it."""
    DOUBT_UNASSERTED = auto()
    """Who was not asserted since the last loss has a seat only when there is one for each that counts."""
    MARKERS = auto()
    """A marker without its set is a loss."""


@dataclass(slots=True)
class FakeHolder:
    """One holder: when the hold ends, which sidecar answers for it and its last call, and where it moved from."""

    ends_ms: int
    owner: str
    op: tuple[int, int]
    who: Who
    moved_from: str = ""
    moved_op: tuple[int, int] = (0, 0)
    moved_ends_ms: int = 0
    pair: Pair = NEVER


@dataclass(slots=True)
class SeatContents:
    """All that is held, by (tenant, feature); ``markers`` likewise. A deep copy of it is a snapshot."""

    holders: dict[tuple[str, str], dict[str, FakeHolder]] = field(default_factory=dict)
    markers: dict[tuple[str, str], Pair] = field(default_factory=dict)


class FakeSeats:
    """The seats of one server, whose marks are in ``registers``."""

    def __init__(self, registers: FakeRegisters, *, without: SeatRule | None = None) -> None:
        self.registers = registers
        self.contents = SeatContents()
        self._without = without

    def holds(self, rule: SeatRule) -> bool:
        """Whether a rule is kept."""
        return rule is not self._without

    def lose_set(self, tenant: str, feature: str) -> None:
        """The set and its hash are gone; the marker is not."""
        self.contents.holders.pop((tenant, feature), None)

    def lose_mark(self, tenant: str) -> None:
        """The mark is gone, with the markers in it."""
        self.registers.lose_mark(tenant)
        self.contents.markers = {key: pair for key, pair in self.contents.markers.items() if key[0] != tenant}

    def wipe(self) -> None:
        """Everything is gone; the registers have their own ``wipe``."""
        self.contents = SeatContents()

    def snapshot(self) -> SeatContents:
        """For ``roll_back``."""
        return copy.deepcopy(self.contents)

    def roll_back(self, snapshot: SeatContents) -> None:
        """As a failover to a lagging replica does; the registers have their own."""
        self.contents = copy.deepcopy(snapshot)

    def live(self, tenant: str, feature: str) -> dict[str, FakeHolder]:
        """Holders that count now."""
        held = self.contents.holders.get((tenant, feature), {})
        return {holder: one for holder, one in held.items() if one.ends_ms > self.registers.now_ms}

    def call(self, sidecar: str, incarnation: int, call: SeatCall) -> SeatAnswer:
        """What the script does."""
        mark = self.registers.touch_mark(call.tenant)
        if mark is None:
            return SeatAnswer(SeatStatus.LEARN, incarnation, call.op, Pair(0, ""), "")
        if call.pair != mark.pair and self.holds(SeatRule.CHECK_PAIR):
            return SeatAnswer(SeatStatus.STALE, incarnation, call.op, mark.pair, mark.phase)
        features = list(dict.fromkeys(ask.feature for ask in call.asks))
        lost = {feature for feature in features if self._is_lost(call.tenant, feature, mark)}
        results = [
            (Result.LOST, NOT_SAID)
            if ask.feature in lost
            else self._ask(call, ask, mark, sidecar, (incarnation, call.op))
            for ask in call.asks
        ]
        room: dict[str, Room] = {}
        for feature in features:
            key = (call.tenant, feature)
            if feature not in lost and (key in self.contents.holders or key in self.contents.markers):
                self.contents.holders.setdefault(key, {})
                self.contents.markers[key] = mark.pair
            live = self.live(call.tenant, feature)
            ends_ms = min((one.ends_ms for one in live.values()), default=self.registers.now_ms)
            room[feature] = Room(
                mark.amounts.get(seats_key(feature), 0), len(live), max(0, ends_ms - self.registers.now_ms)
            )
        return SeatAnswer(SeatStatus.OK, incarnation, call.op, mark.pair, mark.phase, room, tuple(results))

    def _is_lost(self, tenant: str, feature: str, mark: FakeMark) -> bool:
        marker = self.contents.markers.get((tenant, feature))
        if marker is None or (tenant, feature) in self.contents.holders or not self.holds(SeatRule.MARKERS):
            return False
        return mark.phase == OPEN or marker == mark.pair

    def _ask(
        self, call: SeatCall, ask: SeatAsk, mark: FakeMark, sidecar: str, op: tuple[int, int]
    ) -> tuple[Result, Who]:
        one = self.live(call.tenant, ask.feature).get(ask.holder)
        result = self._decide(call, ask, mark, sidecar, op, one)
        now = self.contents.holders.get((call.tenant, ask.feature), {}).get(ask.holder) or one
        return result, now.who if now else NOT_SAID

    def _decide(
        self, call: SeatCall, ask: SeatAsk, mark: FakeMark, sidecar: str, op: tuple[int, int], one: FakeHolder | None
    ) -> Result:
        if one and one.owner == sidecar and op < one.op and self.holds(SeatRule.FENCE):
            return Result.FENCED
        if ask.verb is Verb.RELEASE:
            return self._release(call, ask, sidecar, op, one)
        is_open = mark.phase != LEARNING
        held = one is not None and one.owner != NOBODY
        renewing = ask.verb in (Verb.RENEW, Verb.ASSERT)
        seats = mark.amounts.get(seats_key(ask.feature), 0)
        taken = len(self.live(call.tenant, ask.feature))
        if ask.verb is Verb.ASSERT and not is_open and (held or self.holds(SeatRule.ASSERT_ADDS)):
            return self._hold(call, ask, sidecar, op, one)
        doubtful = (
            one is not None
            and one.pair != mark.pair
            and ask.verb is not Verb.ASSERT
            and not (is_open and taken <= seats)
            and self.holds(SeatRule.DOUBT_UNASSERTED)
        )
        if doubtful and not is_open:
            return Result.LEARNING
        if renewing and one is not None and one.owner != sidecar:
            return Result.MOVED
        if doubtful:
            return Result.GONE if renewing or ask.verb is Verb.TAKE else Result.FULL
        if ask.verb is Verb.LOOK and held:
            return Result.HELD
        if held or (one is not None and ask.verb is Verb.ACQUIRE):
            return self._hold(call, ask, sidecar, op, one)
        if not is_open and self.holds(SeatRule.ONLY_OPEN):
            return Result.LEARNING
        if renewing or ask.verb is Verb.TAKE:
            return Result.GONE
        if mark.revision < call.revision and ask.seats != seats:
            return Result.UNPUBLISHED
        full = taken >= seats and self.holds(SeatRule.WITHIN_SEATS)
        if full and one is None:
            return Result.FULL
        return Result.FREE if ask.verb is Verb.LOOK else self._hold(call, ask, sidecar, op, one)

    def _hold(self, call: SeatCall, ask: SeatAsk, sidecar: str, op: tuple[int, int], one: FakeHolder | None) -> Result:
        now_ms = self.registers.now_ms
        if one is None:
            one = FakeHolder(0, sidecar, op, NOT_SAID)
            self.contents.holders.setdefault((call.tenant, ask.feature), {})[ask.holder] = one
        if one.moved_ends_ms <= now_ms:
            one.moved_from = ""
        if one.owner not in (sidecar, NOBODY):
            if one.moved_from in ("", sidecar, one.owner):
                one.moved_from, one.moved_op = one.owner, one.op
            else:
                one.moved_from, one.moved_op = SEVERAL, (0, 0)
            one.moved_ends_ms = one.ends_ms
        elif one.moved_from == sidecar:
            one.moved_from = ""
        one.ends_ms = max(one.ends_ms, now_ms + KEPT_MS)
        one.owner, one.op, one.pair = sidecar, op, self.registers.contents.marks[call.tenant].pair
        if ask.who.heartbeat_ms:
            one.who = ask.who
        return Result.HELD

    def _release(
        self, call: SeatCall, ask: SeatAsk, sidecar: str, op: tuple[int, int], one: FakeHolder | None
    ) -> Result:
        if one is None:
            return Result.GONE
        if one.moved_ends_ms <= self.registers.now_ms:
            one.moved_from = ""
        if one.owner != sidecar and self.holds(SeatRule.OWN_RELEASES_ONLY):
            if one.moved_from != sidecar or one.moved_op >= op:
                return Result.MOVED
            one.moved_from = ""
            if one.owner != NOBODY:
                return Result.MOVED
        if one.moved_from and self.holds(SeatRule.COUNT_MOVED):
            one.owner, one.ends_ms = NOBODY, one.moved_ends_ms
        else:
            del self.contents.holders[call.tenant, ask.feature][ask.holder]
        return Result.RELEASED


class FakeSeatStore:
    """A ``SeatStore`` over ``FakeSeats``. ``down`` is raised by every call while set."""

    def __init__(self, seats: FakeSeats, *, sidecar: str, incarnation: int) -> None:
        self.seats = seats
        self.down: Exception | None = None
        self.calls = 0
        self._sidecar = sidecar
        self._incarnation = incarnation

    async def call(self, calls: Sequence[SeatCall]) -> list[SeatAnswer | Exception]:
        """See ``SeatStore``."""
        await asyncio.sleep(0)
        if self.down is not None:
            raise self.down
        self.calls += 1
        return [self.seats.call(self._sidecar, self._incarnation, call) for call in calls]
