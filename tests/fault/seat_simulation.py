"""Many sidecars' seats under a seeded scheduler: real cores over the model of the script, faults, and a fake clock.

After every step: the holders that sidecars answer for, all sidecars together, are never more than there were seats
at any time. At the end, when everybody has been silent for long enough, every seat can be had again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from licet.domain.catalog import seats_key
from licet.domain.ids import LimitKey
from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, Pair
from licet_sidecar.core.lease import NO_PAIR
from licet_sidecar.core.seats import (
    Ending,
    Result,
    Seat,
    SeatAnswer,
    SeatAsk,
    SeatBook,
    SeatCall,
    TenantSeats,
    Verb,
    Who,
    holder_digest,
)
from tests.support.fake_lease_store import LEARNING, FakeRegisters
from tests.support.fake_seat_store import FakeSeats, SeatRule

TENANT: Final = "acme"
FEATURE: Final = "editor"
KEY: Final[LimitKey] = seats_key(FEATURE)
HEARTBEAT_MS: Final = 20_000
HOLDERS: Final = [f"user-{number}" for number in range(5)]
STEPS: Final = 600
WEIGHTS: Final = [(losses, crashes) for losses in (0, 0.3, 1, 3) for crashes in (0, 1, 4)]
"""How often things are lost in Redis, and how often sidecars crash or are cut off."""
SILENT_MS: Final = (HOLD_S + HOLD_MARGIN_S) * 1_000


class Violation(AssertionError):
    """A promise was broken. The message says which, and by which seed."""


@dataclass(slots=True)
class SimulatedSidecar:
    """One sidecar: its core, what its log holds, and what the control plane last heard of it."""

    name: str
    book: SeatBook
    incarnation: int = 1
    alive: bool = True
    cut_off: bool = False
    durable: dict[str, Seat] = field(default_factory=dict)
    to_assert: Pair | None = None
    asserted: Pair = NO_PAIR
    heard_asserted: Pair = NO_PAIR
    heard_ms: int = 0

    @property
    def held(self) -> TenantSeats:
        """Its seats of the tenant."""
        return self.book.of(TENANT)


class SeatSimulation:
    """One history. ``rule`` takes one of the script's rules out; ``book`` makes the cores."""

    def __init__(
        self,
        seed: int,
        *,
        without: SeatRule | None = None,
        book: Callable[[int], SeatBook] = SeatBook,
        weights: tuple[float, float] | None = None,
    ) -> None:
        self.chance = random.Random(seed)
        self.seed = seed
        self.make_book = book
        self.boot_ms = 1_000_000
        self.registers = FakeRegisters(now_ms=1_790_000_000_000, run_id="run1")
        self.seats = FakeSeats(self.registers, without=without)
        self.sidecars = [
            SimulatedSidecar(name, book(1)) for name in ("one", "two", "three")[: self.chance.choice((2, 3))]
        ]
        self.holders = HOLDERS[: self.chance.choice((3, 5))]
        self.late: list[tuple[SimulatedSidecar, int, SeatCall]] = []
        self.snapshot: tuple[object, object] | None = None
        self.number = self.chance.randint(1, 2)
        self.pause_ms = self.chance.choice((2_000, 20_000, 60_000))
        self.weights = self.chance.choice(WEIGHTS) if weights is None else weights
        self.late_weight = self.chance.choice((3, 20))
        self.lost_share = self.chance.choice((0.02, 0.1, 0.25))
        self.number_max = self.number
        self.revision = 1
        self.epoch = 1
        self.runs = 1
        self.trace: list[str] = []
        self.granted = 0
        self.registers.begin(TENANT, self.epoch)
        self.registers.open(TENANT, self._mark_pair(), self.revision, {KEY: self.number})

    def run(self) -> None:
        """The whole history.

        Raises:
            Violation: a promise was broken.
        """
        losses, crashes = self.weights
        steps: list[tuple[Callable[[], None], float]] = [
            (self.pass_time, 25),
            (self.acquire, 40),
            (self.heartbeat, 50),
            (self.release, self.chance.choice((2, 12))),
            (self.upkeep, 60),
            (self.execute_late, self.late_weight),
            (self.look_after_marks, 25),
            (self.crash, crashes),
            (self.start_again, crashes),
            (self.cut_off, crashes),
            (self.restart_redis, losses),
            (self.wipe_redis, losses),
            (self.take_snapshot, losses),
            (self.roll_back, losses),
            (self.lose_set, losses),
            (self.lose_mark, losses),
            (self.change_number, 2),
        ]
        actions, weights = zip(*steps, strict=True)
        for _ in range(STEPS):
            (action,) = self.chance.choices(actions, weights)
            action()
            self.check()
        self.heal()

    # What is promised

    def check(self) -> None:
        """Never more holders than seats."""
        vouched = self.vouched()
        if len(vouched) > self.number_max:
            raise Violation(
                f"seed {self.seed}: {len(vouched)} holders of {self.number_max} seats\n" + "\n".join(self.trace[-40:])
            )

    def vouched(self) -> set[str]:
        """Holders that some sidecar answers for at this moment."""
        return {
            seat.holder
            for sidecar in self.sidecars
            if sidecar.alive
            for seat in sidecar.held.seats.values()
            if sidecar.book.vouches(seat, self.boot_ms)
        }

    def heal(self) -> None:
        """Everything works again and everybody is silent: in the end every seat can be had."""
        self.trace.append("heal")
        self.late.clear()
        for sidecar in self.sidecars:
            sidecar.cut_off = False
            if not sidecar.alive:
                self._start(sidecar)
        for _ in range(40):
            self._advance(5_000)
            for sidecar in self.sidecars:
                self._upkeep(sidecar, lossy=False)
            self.look_after_marks()
            self.check()
        live = self.seats.live(TENANT, FEATURE)
        if live:
            raise Violation(f"seed {self.seed}: stranded {live}\n" + "\n".join(self.trace[-40:]))
        for number in range(self.number):
            sidecar = self.chance.choice(self.sidecars)
            self._acquire(sidecar, f"new-{number}", lossy=False)
            if not sidecar.book.find(TENANT, f"{FEATURE}:{holder_digest('', f'new-{number}')}"):
                raise Violation(f"seed {self.seed}: a free seat cannot be had\n" + "\n".join(self.trace[-40:]))

    # What happens

    def pass_time(self) -> None:
        """Some of it."""
        self._advance(self.chance.choice((200, 1_000, 5_000, 12_000, self.pause_ms)))

    def acquire(self) -> None:
        """Somebody asks a sidecar for a seat."""
        sidecar = self._some_alive()
        if sidecar is not None:
            self._acquire(sidecar, self.chance.choice(self.holders))

    def heartbeat(self) -> None:
        """A holder is heard of, mostly where it is known."""
        sidecar = self._some_alive()
        if sidecar is None:
            return
        who = self.chance.choice(self.holders)
        if sidecar.held.seats and self.chance.random() < 0.8:
            who = self.chance.choice(list(sidecar.held.seats.values())).who.subject_id
        seat = sidecar.book.find(TENANT, self._seat_id(who))
        if seat is not None and sidecar.book.vouches(seat, self.boot_ms):
            sidecar.book.hear(seat, self.boot_ms)
        elif sidecar.book.ended(TENANT, self._seat_id(who)) is None:
            sidecar.book.want(sidecar.held, SeatAsk(Verb.TAKE, FEATURE, holder_digest("", who)))
            self._call(sidecar)
            self.trace.append(f"{sidecar.name} take {who} {self._known(sidecar, who)}")

    def release(self) -> None:
        """A holder is done."""
        sidecar = self._some_alive()
        if sidecar is not None and sidecar.held.seats:
            seat = self.chance.choice(list(sidecar.held.seats.values()))
            self.trace.append(f"{sidecar.name} release {seat.who.subject_id}")
            self._end(sidecar, seat)
            if self.chance.random() < 0.7:
                self._call(sidecar)

    def upkeep(self) -> None:
        """A sidecar's round."""
        sidecar = self._some_alive()
        if sidecar is not None:
            self._upkeep(sidecar)

    def execute_late(self) -> None:
        """A call arrives long after it was sent, or once more; nobody waits for its answer."""
        if self.late:
            sidecar, incarnation, call = self.late.pop(self.chance.randrange(len(self.late)))
            asks = [(ask.verb.name, ask.holder[:4]) for ask in call.asks]
            self.trace.append(f"late {sidecar.name} op {call.op} {asks}")
            self.seats.call(sidecar.name, incarnation, call)

    def crash(self) -> None:
        """SIGKILL."""
        sidecar = self._some_alive()
        if sidecar is not None:
            self._hear(sidecar)
            sidecar.alive = False
            self.trace.append(f"{sidecar.name} crash")

    def start_again(self) -> None:
        """With what its log holds."""
        dead = [sidecar for sidecar in self.sidecars if not sidecar.alive]
        if dead:
            self._start(self.chance.choice(dead))

    def cut_off(self) -> None:
        """A sidecar is cut off from Redis, or that ends."""
        sidecar = self.chance.choice(self.sidecars)
        self._hear(sidecar)
        sidecar.cut_off = not sidecar.cut_off
        self.trace.append(f"{sidecar.name} cut off: {sidecar.cut_off}")

    def restart_redis(self) -> None:
        """With its contents."""
        self.registers.restart(self._next_run())
        self.trace.append("restart")

    def wipe_redis(self) -> None:
        """Without."""
        self.registers.wipe(self._next_run())
        self.seats.wipe()
        self.trace.append("wipe")

    def take_snapshot(self) -> None:
        """What a replica holds that falls behind from now on."""
        self.snapshot = (self.registers.snapshot(), self.seats.snapshot())

    def roll_back(self) -> None:
        """Failover to it."""
        if self.snapshot is not None:
            registers, seats = self.snapshot
            self.registers.roll_back(registers, self._next_run())  # type: ignore[arg-type]  # what snapshot() gave
            self.seats.roll_back(seats)  # type: ignore[arg-type]  # likewise
            self.trace.append("roll back")

    def lose_set(self) -> None:
        """The set alone, while everything else stays."""
        self.seats.lose_set(TENANT, FEATURE)
        self.trace.append("lose set")

    def lose_mark(self) -> None:
        """The mark alone."""
        self.seats.lose_mark(TENANT)
        self.trace.append("lose mark")

    def change_number(self) -> None:
        """More seats, or fewer: holders keep theirs."""
        self.change_number_to(self.chance.randint(1, 3))

    def change_number_to(self, number: int) -> None:
        """The plan changes."""
        self.number = number
        self.number_max = max(self.number_max, self.number)
        self.revision += 1
        self.registers.publish_limits(TENANT, self.revision, {KEY: self.number})
        self.trace.append(f"number {self.number}")

    def look_after_marks(self) -> None:
        """The control plane's round: makes a lost mark, relearns a lost set, opens when everybody has asserted."""
        mark = self.registers.touch_mark(TENANT)
        if mark is None:
            self.epoch += 1
            self.registers.begin(TENANT, self.epoch)
            self.trace.append(f"begin {self.epoch}")
        elif mark.pair.epoch > self.epoch:
            self.epoch = mark.pair.epoch
        lost = (TENANT, FEATURE) in self.seats.contents.markers and (
            (TENANT, FEATURE) not in self.seats.contents.holders
        )
        mark = self.registers.touch_mark(TENANT)
        assert mark is not None
        relearn = lost and (mark.phase != LEARNING or self.seats.contents.markers[TENANT, FEATURE] == mark.pair)
        if relearn or mark.pair.epoch < self.epoch:
            self.epoch += 1
            self.registers.relearn(TENANT, mark.pair.epoch, self.epoch)
            self.trace.append(f"relearn {self.epoch}")
        pair = self._mark_pair()
        for sidecar in self.sidecars:
            self._hear(sidecar)
            if sidecar.alive and not sidecar.cut_off and pair not in (sidecar.asserted, sidecar.to_assert):
                sidecar.to_assert = pair
                sidecar.book.doubt()
        mark = self.registers.touch_mark(TENANT)
        assert mark is not None
        waited = self.registers.now_ms - mark.since_ms >= SILENT_MS
        all_asserted = all(
            sidecar.heard_asserted == pair or sidecar.heard_ms + SILENT_MS <= self.boot_ms for sidecar in self.sidecars
        )
        if mark.phase == LEARNING and (waited or all_asserted):
            if lost and (TENANT, FEATURE) not in self.seats.contents.holders:
                self.seats.contents.holders[TENANT, FEATURE] = {}  # as open.lua does for what a marker promises
            self.registers.open(TENANT, pair, self.revision, {KEY: self.number})
            self.trace.append(f"open {pair}")

    # Step by step, and without losses

    def acquire_at(self, sidecar: SimulatedSidecar, who: str) -> None:
        """Somebody asks."""
        self._acquire(sidecar, who, lossy=False)

    def upkeep_of(self, sidecar: SimulatedSidecar) -> None:
        """One round."""
        self._upkeep(sidecar, lossy=False)

    def start(self, sidecar: SimulatedSidecar) -> None:
        """With what its log holds."""
        self._start(sidecar)

    def let_pass(self, ms: int) -> None:
        """Time."""
        self._advance(ms)

    # Inside

    def _hear(self, sidecar: SimulatedSidecar) -> None:
        """The control plane hears each second of whoever can be heard: at least whenever that changes."""
        if sidecar.alive and not sidecar.cut_off:
            sidecar.heard_ms, sidecar.heard_asserted = self.boot_ms, sidecar.asserted

    def _advance(self, ms: int) -> None:
        self.boot_ms += ms
        self.registers.now_ms += ms

    def _some_alive(self) -> SimulatedSidecar | None:
        alive = [sidecar for sidecar in self.sidecars if sidecar.alive]
        return self.chance.choice(alive) if alive else None

    def _acquire(self, sidecar: SimulatedSidecar, who: str, *, lossy: bool = True) -> None:
        ask = SeatAsk(
            Verb.ACQUIRE, FEATURE, holder_digest("", who), Who("", who, "", "editor.open", HEARTBEAT_MS), self.number
        )
        sidecar.book.want(sidecar.held, ask)
        for _ in range(1 if lossy else 3):
            self._call(sidecar, lossy=lossy)
        sidecar.held.wanted.clear()
        self.trace.append(f"{sidecar.name} acquire {who} {self._known(sidecar, who)}")

    def _upkeep(self, sidecar: SimulatedSidecar, *, lossy: bool = True) -> None:
        for change in sidecar.book.tick(sidecar.held, self.boot_ms):
            if sidecar.book.find(TENANT, change.seat.id) is None:
                sidecar.durable.pop(change.seat.id, None)
            self.trace.append(f"{sidecar.name} {change.kind.name} {change.seat.who.subject_id}")
        asserting = sidecar.to_assert
        if asserting is not None or sidecar.book.is_due(sidecar.held, self.boot_ms):
            self._call(sidecar, lossy=lossy)
        if asserting is not None and not sidecar.book.unasserted(self.boot_ms):
            sidecar.asserted, sidecar.to_assert = asserting, None
            self.trace.append(f"{sidecar.name} asserted {asserting}")

    def _call(self, sidecar: SimulatedSidecar, *, lossy: bool = True) -> None:
        call = sidecar.book.begin_call(sidecar.held, revision=self.revision, boot_ms=self.boot_ms)
        if call is None:
            return
        fate = self.chance.random() if lossy else 1.0
        if sidecar.cut_off or fate < self.lost_share:  # lost, or under way for longer than anybody waits
            if not sidecar.cut_off:
                self.late.append((sidecar, sidecar.incarnation, call))
            sidecar.book.abandon_call(sidecar.held, call)
            return
        answer = self.seats.call(sidecar.name, sidecar.incarnation, call)
        if lossy and self.chance.random() < 0.3:
            self._advance(self.chance.choice((10, 500, 3_000)))
        if fate < 2 * self.lost_share:  # the answer is lost
            sidecar.book.abandon_call(sidecar.held, call)
            return
        if fate < 3 * self.lost_share:
            self.late.append((sidecar, sidecar.incarnation, call))
        self._take(sidecar, call, answer)

    def _take(self, sidecar: SimulatedSidecar, call: SeatCall, answer: SeatAnswer) -> None:
        end = sidecar.book.end_call(sidecar.held, call, answer, self.boot_ms)
        assert end is not None
        for ask in call.asks:
            if ask.verb is Verb.ACQUIRE and end.results.get(ask.wish) is Result.HELD:
                self.granted += 1
        sidecar.durable = {seat.id: seat for seat in sidecar.held.seats.values() if not seat.lapsed}

    def _end(self, sidecar: SimulatedSidecar, seat: Seat) -> None:
        sidecar.book.end(seat, Ending.RELEASED, self.boot_ms)
        sidecar.durable.pop(seat.id, None)

    def _start(self, sidecar: SimulatedSidecar) -> None:
        sidecar.incarnation += 1
        sidecar.book = self.make_book(sidecar.incarnation)
        for seat in sidecar.durable.values():
            sidecar.book.restore(Seat(TENANT, FEATURE, seat.holder, seat.who, self.boot_ms), self.boot_ms)
        sidecar.alive, sidecar.to_assert, sidecar.asserted = True, None, NO_PAIR
        self._hear(sidecar)
        self.trace.append(f"{sidecar.name} start with {[seat.who.subject_id for seat in sidecar.durable.values()]}")

    def _known(self, sidecar: SimulatedSidecar, who: str) -> str:
        return repr(sidecar.book.find(TENANT, self._seat_id(who)))

    def _seat_id(self, who: str) -> str:
        return f"{FEATURE}:{holder_digest('', who)}"

    def _mark_pair(self) -> Pair:
        mark = self.registers.touch_mark(TENANT)
        assert mark is not None
        return mark.pair

    def _next_run(self) -> str:
        self.runs += 1
        return f"run{self.runs}"
