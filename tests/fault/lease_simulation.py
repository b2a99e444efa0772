"""A seeded simulation of sidecars, a control plane and a Redis that share quotas, and of what can go wrong.

Real: ``LeaseBook`` and ``may_open``. Modeled: the scripts (``FakeRegisters``), what the sidecar's shell keeps on disk,
a network that drops, repeats, delays and reorders, clocks, crashes, and a control plane that may stop anywhere and go
on later, beside another one. After every step the promises are checked; at the end, whether every unit that no dead
sidecar holds can be spent.

*What is checked.* ``held`` of a sidecar: what it spent of a quota (by its log) and what it may still spend, counting
answers under way to it. A *gap* is by how much ``held`` exceeds its register. While nothing acknowledged is lost there
is no gap, ever. After a loss, gaps may be left when leasing reopens, but only of sidecars that did not assert
themselves; from then on they only shrink, and the units approved never exceed amount + gaps at reopening.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Final

from licet.domain.ids import LimitKey
from licet.wire.registers import HOLD_S, QUOTA_KEPT_S, WINDOW_GRACE_S, Mark, Marker, Pair, Register
from licet_control_plane.core.learning import (
    WAIT_S_MAX,
    Corrections,
    Holder,
    Verdict,
    corrections,
    has_said,
    may_open,
)
from licet_control_plane.core.reclaim import HolderState
from licet_control_plane.publisher.marks import quotas_to_keep
from licet_sidecar.core.lease import Lease, Terms
from licet_sidecar.core.leases import LeaseBook, TenantLeases
from licet_sidecar.core.settling import Outcome, SettleAnswer, SettleCall, Status
from tests.support.fake_lease_store import OPEN, Contents, FakeMark, FakeQuota, FakeRegisters, Rule

TENANT: Final = "acme"
START_MS: Final = 1_800_000_000_000
WINDOW_S: Final = {
    LimitKey("calls:short"): 120,
    LimitKey("calls:long"): 100_000_000,
    LimitKey("seats:long"): 100_000_000,
}
LIMITS: Final = tuple(WINDOW_S)
SIDECARS_MAX: Final = 8
"""With those that came after retired and replaced ones."""
PREFETCH_AHEAD_S: Final = 5
TICK_MS: Final = 1_000
QUIESCE_ROUNDS_MAX: Final = 400
STEPS: Final = 500
REFUSED_MAX: Final = 60
"""Refused checks, half a second apart, until units that were not called back count as stranded: a holder that nobody
reminds (its reservation was cancelled, so Redis takes the units for used) says so with its next keepalive, in 20 s."""


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What may go wrong in a run: chances for each step. Families are run apart and together."""

    network: bool = True
    crashes: bool = True
    partitions: bool = True
    clocks: bool = True
    limits: bool = True
    restarts: bool = True
    losses: bool = True
    partial_losses: bool = True
    disks: bool = True
    churn: bool = True
    seals: bool = True

    @classmethod
    def some(cls, seed: int) -> Faults:
        """Some of them: what is rare beside everything else shows when only a few things go wrong."""
        chance = random.Random(f"faults {seed}")
        return cls(**{one.name: chance.random() < 0.6 for one in fields(cls)})


@dataclass(slots=True)
class Logged:
    """What the log says of one lease."""

    limit: LimitKey
    start: int
    end: int
    amount: int
    cap: int
    used: int


@dataclass(slots=True)
class Reservation:
    """Units held for an action under way. ``reported`` once Redis answered a call that said so."""

    quota: str
    units: int
    made_boot_ms: int
    lease: Lease
    reported: bool = False


@dataclass(slots=True)
class Message:
    """A call on its way to Redis, or an answer on its way back."""

    sidecar: str
    incarnation: int
    call: SettleCall
    answer: SettleAnswer | None = None


class Sidecar:
    """One sidecar: its process (``book``), and what survives it (``log``)."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.skew_ms = 0
        self.boot_offset_ms = world.random.randrange(10**9)
        self.log: dict[str, Logged] = {}
        self.incarnation = 0
        self.running = False
        self.dead = False
        self.retiring = False
        self.retired = False
        self.cut_until_ms = 0
        self.reserved: list[Reservation] = []
        self.revision = world.revision
        self.amounts = dict(world.amounts)
        self.start()

    # Clocks

    @property
    def now_s(self) -> int:
        return (self.world.now_ms + self.skew_ms) // 1_000

    @property
    def boot_ms(self) -> int:
        return self.world.now_ms + self.boot_offset_ms

    @property
    def connected(self) -> bool:
        return self.running and self.world.now_ms >= self.cut_until_ms

    @property
    def held(self) -> TenantLeases:
        return self.book.of(TENANT)

    # Process

    def start(self) -> None:
        self.incarnation += 1
        self.book = self.world.new_book(self.incarnation)
        self.running = True
        self.asserted = Pair(0, "")
        self.to_assert: Pair | None = None
        self.to_assert_since_ms = 0
        self.ticked_ms = self.boot_ms
        self.retiring = False
        for key in [key for key in self.world.answered_until_ms if key[0] == self.name]:
            del self.world.answered_until_ms[key]
        kept = {quota: one for quota, one in self.log.items() if one.end + QUOTA_KEPT_S > self.now_s}
        for one in kept.values():
            lease = Lease(one.limit, "", one.start, one.end, Terms(one.amount))
            lease.cap, lease.used = one.cap, one.used
            self.book.restore(TENANT, lease, self.boot_ms)
        self.reserved = [one for one in self.reserved if one.quota in kept]
        for reservation in self.reserved:
            reservation.reported = False
            reservation.lease = next(lease for lease in self.held.all() if lease.quota == reservation.quota)
            reservation.lease.reserved += reservation.units
        self.log = {lease.quota: _logged(lease) for lease in self.held.all()}

    def crash(self) -> None:
        self.running = False

    # Checks

    def check(self, asks: dict[LimitKey, int], *, reserve: bool = False, die_at_log: bool = False) -> bool | None:
        """Decides as the engine does: true or false, or ``None`` when leases are needed (and now called for)."""
        if self.retiring:
            return False
        leases = [(self.lease(limit), units) for limit, units in asks.items()]
        needs = []
        for lease, units in leases:
            if not self.book.can_spend(lease, units, self.boot_ms):
                if units > lease.amount or self.book.known_short(lease, units, self.boot_ms):
                    return False
                needs.append((lease, units))
        if needs:
            for lease, units in needs:
                self.book.need(self.held, lease, units)
            self.call()
            return None
        for lease, units in leases:
            if reserve:
                if not self.write([] if lease.logged else [lease]):
                    return False
                lease.reserved += units
                self.reserved.append(Reservation(lease.quota, units, self.boot_ms, lease))
            else:
                self.spend(lease, units, die_at_log=die_at_log)
        if die_at_log:
            self.crash()
        return True

    def spend(self, lease: Lease, units: int, *, die_at_log: bool = False, committed: bool = False) -> None:
        """Logs, then spends. The log is what counts: a call that crashed before its answer may be recorded too."""
        self.world.spent(self, lease, units, committed=committed)
        logged = self.log.get(lease.quota)
        if logged is not None:
            logged.used += units
        if not die_at_log:
            self.book.spend(lease, units, self.boot_ms)

    def settle_reservation(self) -> None:
        """Commits one, wholly or in part, or cancels it. What Redis was never told of lasts as long as its lease."""
        if not self.reserved:
            return
        reservation = self.reserved.pop(self.world.random.randrange(len(self.reserved)))
        lease = reservation.lease
        lease.reserved -= reservation.units
        lease.unsure = True
        used = self.world.random.choice([0, reservation.units, self.world.random.randint(0, reservation.units)])
        if used and (reservation.reported or self.boot_ms < lease.hold_until_ms):
            self.spend(lease, used, committed=True)

    def retire(self) -> None:
        """One step of an orderly stop: give back, make sure that the id is never used again, give up registers."""
        self.retiring = True
        if self.retired and self.book.is_told(self.held, self.boot_ms):
            self.gone("has retired")
            return
        if not self.retired and self.book.has_returned(self.held, self.boot_ms):
            self.retired = not self.reserved
        self.held.needs.clear()
        self.call(giving_back=True, retiring=self.retired)

    def gone(self, why: str) -> None:
        self.world.note(f"{self.name} {why}")
        self.running = False
        self.dead = True
        self.retired = True
        self.reserved.clear()
        self.world.add_sidecar()

    def terms(self, limit: LimitKey) -> Terms:
        return Terms(self.amounts.get(limit, 0))

    def lease(self, limit: LimitKey) -> Lease:
        start, end = window(limit, self.now_s)
        return self.book.lease(self.held, limit, "", start, end, self.terms(limit), self.boot_ms)

    # Calls

    def call(self, *, giving_back: bool = False, retiring: bool = False) -> None:
        """Sends the outstanding call again, or the next one."""
        held = self.held
        call = held.outstanding
        if call is None:
            caps = {lease: lease.cap for lease in held.all()}
            call = self.book.begin_call(
                held,
                revision=self.revision,
                boot_ms=self.boot_ms,
                giving_back=giving_back,
                retiring=retiring,
                since_ms=-1 if self.to_assert is None else self.to_assert_since_ms,
            )
            if call is None:
                return
            if self.world.log_before_return:
                self.write([ask.lease for ask in call.asks if ask.cap < caps.get(ask.lease, 0) or not ask.lease.logged])
        if self.world.verbatim:
            self.world.send(Message(self.name, self.incarnation, call))
        else:
            self.world.send(Message(self.name, self.incarnation, self.world.altered(self, call)))

    def take(self, answer: SettleAnswer) -> Outcome | None:
        """An answer arrived, maybe not the one that is waited for."""
        call = self.held.outstanding
        if call is None:
            return None
        caps = {ask.lease: ask.lease.cap for ask in call.asks}
        outcome = self.book.end_call(self.held, call, answer, self.boot_ms)
        if outcome is not None and answer.status is Status.OK:
            told = {ask.lease.quota for ask in call.asks}
            for reservation in self.reserved:
                reservation.reported |= reservation.quota in told and reservation.made_boot_ms < call.sent_boot_ms
        if not (self.world.may.disks and self.world.random.random() < 0.1):  # else the disk was full at that moment
            self.write([lease for lease, cap in caps.items() if lease.cap != cap])
        if self.retiring and outcome in (Outcome.AGAIN, Outcome.RECALL):
            return outcome  # goes on with its next step
        if outcome is Outcome.AGAIN:
            self.call()
        elif outcome is Outcome.RECALL:
            for other in self.world.sidecars.values():
                if other is not self and other.connected and self.world.arrives():
                    other.recalled({ask.lease.quota for ask in call.asks if ask.min})
            for ask in call.asks:
                ask.lease.short_until_ms = 0
        elif outcome is Outcome.ASK_CONTROL_PLANE:
            self.world.asked.add(self.held.why)
        elif outcome is Outcome.REPLACED:
            if answer.status is not Status.SEALED or self.name not in self.world.sealed:
                raise Violation(f"{self.name} was fenced off from its own registers")
            self.gone("was sealed, and takes a new id")
        return outcome

    def write(self, leases: list[Lease]) -> bool:
        for lease in leases:
            self.log[lease.quota] = _logged(lease)
            lease.logged = True
        return True

    def recalled(self, quotas: set[str]) -> None:
        if self.retiring:
            return
        for lease in self.held.all():
            if lease.quota in quotas and lease.free > 0:
                lease.wanted = True
        self.call()

    def upkeep(self) -> None:
        """What the shell does each tenth of a second, and once a second."""
        if self.retiring:
            self.retire()
            return
        if self.boot_ms - self.ticked_ms >= TICK_MS:
            elapsed_s = (self.boot_ms - self.ticked_ms) / 1_000
            self.ticked_ms = self.boot_ms
            for lease in list(self.held.leases.values()):
                if lease.end - PREFETCH_AHEAD_S <= self.now_s < lease.end and lease.rate > 0:
                    self.book.prefetch(self.held, lease, *window(lease.limit_key, lease.end))
            if self.book.tick(self.held, self.now_s, self.boot_ms, elapsed_s) or self.held.outstanding:
                self.call()
        if self.to_assert is not None:
            if self.book.unasserted(self.to_assert_since_ms, self.boot_ms):
                self.call()
            else:
                self.asserted, self.to_assert = self.to_assert, None

    def head(self, pair: Pair, live: int) -> None:
        self.book.live = live
        if pair != self.asserted and pair != self.to_assert:
            self.to_assert, self.to_assert_since_ms = pair, self.boot_ms


class ControlPlane:
    """One control plane. ``work`` is what it is doing; it may stop between any two steps of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.work: Iterator[None] | None = None
        self.learning_seen = False

    def step(self) -> None:
        if self.work is None:
            self.work = self.look()
        try:
            next(self.work)
        except StopIteration:
            self.work = None

    def publish(self) -> Generator[None]:
        world = self.world
        revision, amounts = world.revision, dict(world.amounts)
        yield
        if world.registers.publish_limits(TENANT, revision, amounts) == "NOMARK":
            yield
            yield from self.begin()

    def begin(self) -> Generator[None]:
        epoch = self.world.allocate_epoch()
        yield
        self.world.registers.begin(TENANT, epoch)

    def look(self) -> Generator[None]:
        """One round of the publisher: limits, what sidecars asked, opening, a head."""
        world = self.world
        registers = world.registers
        yield from self.publish()
        why = set(world.asked)
        world.asked.clear()
        mark = registers.touch_mark(TENANT)
        yield
        if mark is None:
            yield from self.begin()
        elif "quota-lost" in why:
            epoch = world.allocate_epoch()
            yield
            registers.relearn(TENANT, mark.pair.epoch, epoch)
        yield
        yield from self.open()
        yield
        world.head()

    def open(self) -> Generator[None]:
        world, registers = self.world, self.world.registers
        revision, amounts = world.revision, dict(world.amounts)
        state = registers.touch_mark(TENANT)
        if state is None or state.phase == OPEN:
            return
        yield
        verdict, _ = may_open(
            state.pair,
            since_ms=state.since_ms,
            learning_s=(registers.now_ms - state.since_ms) / 1_000,
            registry_s=1e9,
            holders=list(world.holders.values()),
            now_s=world.now_ms / 1_000,
        )
        if verdict is Verdict.WAIT and not world.hasty:
            return
        excused = world.excused(state)
        yield
        spent = {key: units for key, units in world.ledger.items() if units}
        said = {name for name, one in world.holders.items() if has_said(one, state.pair, state.since_ms)}
        yield
        counted_in_base: set[tuple[str, str]] = set()
        by_sidecar: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (quota, sidecar), units in spent.items():
            by_sidecar[quota][sidecar] = units
        right: dict[str, Corrections] = {}
        for quota in {**by_sidecar, **{name: {} for _, name in registers.contents.quotas}}:
            right[quota] = corrections(
                registers_of(registers.contents.quotas.get((TENANT, quota))),
                by_sidecar[quota],
                pair=state.pair,
                said=said,
                state_of=world.state_of,
            )
            counted_in_base |= {(quota, name) for name in by_sidecar[quota] if name not in right[quota].spent}
        yield
        for quota, one in right.items():
            limit, _, start = quota.rpartition(":")
            lease_window = Marker(int(start), int(start) + WINDOW_S[LimitKey(limit)], 0)
            for sidecar, units in one.spent.items():
                registers.fill(TENANT, state.pair, sidecar, units, quota, limit, lease_window)
            if one.base:
                registers.fill_base(TENANT, state.pair, one.base, quota, limit, lease_window)
        yield
        for quota, one in right.items():
            for sidecar in one.releases:
                if registers.release(TENANT, state.pair, quota, sidecar):
                    world.note(f"what {sidecar} does not hold of {quota} is freed")
        yield
        mark = registers.contents.marks.get(TENANT)
        if mark is None:
            return
        whole = Mark(mark.pair, mark.phase, mark.since_ms, mark.revision, mark.amounts, dict(mark.markers))
        keep = quotas_to_keep(whole, registers.now_ms / 1_000)
        yield
        before = registers.touch_mark(TENANT)
        opened = registers.open(TENANT, state.pair, revision, amounts, keep)
        if opened and before is not None:
            world.opened(verdict, before, revision, spent, excused, counted_in_base)
        elif opened is None and before is not None:
            epoch = world.allocate_epoch()
            yield
            registers.relearn(TENANT, before.pair.epoch, epoch)


@dataclass
class World:
    """Everything, and the seeded choice of what happens next."""

    seed: int
    faults: Faults | None = None
    without: frozenset[Rule] = frozenset()
    book: type[LeaseBook] = LeaseBook
    log_before_return: bool = True
    verbatim: bool = True
    hasty: bool = False
    trace: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.may = self.faults or Faults.some(self.seed)
        self.now_ms = START_MS + self.random.randrange(240_000)
        self.registers = FakeRegisters(now_ms=self.now_ms, without=self.without)
        self.runs = 1
        self.revision = 1
        self.epoch = 0
        self.amounts = {limit: self.random.choice([3, 10, 40]) for limit in LIMITS}
        self.asked: set[str] = set()
        self.network: list[Message] = []
        self.holders: dict[str, Holder] = {}
        self.ledger: dict[tuple[str, str], int] = {}
        self.snapshots: list[Contents] = []
        self.spent_units: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.answered_until_ms: dict[tuple[str, str], int] = {}
        self.lost = False
        self.allowance: dict[tuple[str, str], int] = {}
        self.sealed: set[str] = set()
        self.based: dict[tuple[str, str], int] = {}
        """What the last opening counted in a base, of a sidecar that was taken for dead."""
        self.unsealable: defaultdict[str, int] = defaultdict(int)
        """By quota: what sealed sidecars had spent, and neither Redis nor the ledger knew."""
        self.sealed_reserved: defaultdict[str, int] = defaultdict(int)
        """By quota: what they had reserved, and not spent."""
        self.swept: defaultdict[str, dict[str, int]] = defaultdict(dict)
        """By quota and sidecar: what is in the base of a sealed register that nothing is known of any more."""
        self.high: defaultdict[str, int] = defaultdict(int)
        self.quiet = False
        self.control_planes = [ControlPlane(self), ControlPlane(self)]
        self.sidecars: dict[str, Sidecar] = {}
        for _ in range(self.random.randint(2, 4)):
            self.add_sidecar()
        if self.may.clocks:
            for sidecar in list(self.sidecars.values()):
                sidecar.skew_ms = self.random.randint(-4_000, 4_000)
        self.heartbeats()
        if self.random.random() < 0.8:  # else the first mark is made under way
            run = self.registers.begin(TENANT, self.allocate_epoch())
            assert run is not None
            self.registers.open(TENANT, Pair(1, run), self.revision, self.amounts)

    def add_sidecar(self) -> None:
        name = f"s{len(self.sidecars)}"
        if len(self.sidecars) < SIDECARS_MAX:
            self.sidecars[name] = Sidecar(self, name)
            self.heartbeats()

    def gone(self) -> set[str]:
        """Sidecars that retired, or were sealed and know it: they never come back."""
        return {name for name, one in self.sidecars.items() if one.retired and not one.running}

    def state_of(self, name: str) -> HolderState:
        """What the control plane makes of a sidecar."""
        if name in self.gone() or name in self.sealed:
            return HolderState.GONE
        silent_s = self.now_ms / 1_000 - self.holders[name].last_heard_s
        return HolderState.DEAD if silent_s >= WAIT_S_MAX else HolderState.LIVE

    def retired(self) -> set[str]:
        """Sidecars whose registers are, or are becoming, part of the base."""
        return {name for name, one in self.sidecars.items() if one.retired} | self.sealed

    def new_book(self, incarnation: int) -> LeaseBook:
        return self.book(incarnation)

    # Running

    def run(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            self.step()
            self.check()
        self.quiesce()

    def step(self) -> None:
        self.registers.now_ms = self.now_ms
        choices = [
            (40, self.do_deliver),
            (16, self.do_check),
            (14, self.do_upkeep),
            (14, self.do_control_plane),
            (9, self.do_time),
            (3, self.do_resend),
            (2, self.do_ship),
            (2, self.do_reservation),
            (2, self.do_sync),
        ]
        if self.may.crashes:
            choices.append((1.5, self.do_crash))
        if self.may.partitions:
            choices.append((0.5, self.do_cut))
        if self.may.clocks:
            choices.append((2, self.do_clock))
        if self.may.limits:
            choices.append((1, self.do_limits))
        if self.may.restarts:
            choices.append((0.4, self.do_restart))
        if self.may.churn:
            choices.append((0.4, self.do_retire))
        if self.may.seals:
            choices.append((0.5, self.do_seal))
            choices.append((0.5, self.do_forget))
        if self.may.losses or self.may.partial_losses:
            choices.append((0.5, self.do_lose))
            choices.append((0.5, self.do_snapshot))
        weights, actions = zip(*choices, strict=True)
        self.random.choices(actions, weights)[0]()

    def note(self, what: str) -> None:
        self.trace.append(f"{(self.now_ms - START_MS) / 1_000:9.3f} {what}")

    def pick(self) -> Sidecar:
        return self.random.choice(list(self.sidecars.values()))

    # Steps

    def do_time(self) -> None:
        self.advance(self.random.choices([10, 300, 1_000, 5_000, 20_000, 61_000], [3, 5, 8, 3, 1, 0.3])[0])

    def advance(self, ms: int) -> None:
        self.now_ms += ms
        self.registers.now_ms = self.now_ms
        self.heartbeats()

    def heartbeats(self) -> None:
        for sidecar in list(self.sidecars.values()):
            if sidecar.connected:
                sidecar.book.heard(self.registers.now_ms, sidecar.boot_ms)
                after_ms = sidecar.book.answered_after_ms(sidecar.boot_ms)
                self.holders[sidecar.name] = Holder(sidecar.name, self.now_ms / 1_000, sidecar.asserted, after_ms)

    def do_check(self) -> None:
        sidecar = self.pick()
        if not sidecar.running:
            return
        limits = self.random.sample(LIMITS, self.random.choice([1, 1, 2, 3]))
        asks = {limit: self.random.choice([1, 1, 1, 2, 4]) for limit in limits}
        reserve = self.random.random() < 0.1
        die = self.may.crashes and not reserve and self.random.random() < 0.02
        answer = sidecar.check(asks, reserve=reserve, die_at_log=die)
        if answer is None and self.random.random() < 0.6:
            self.hurry(sidecar)
            answer = sidecar.check(asks, reserve=reserve, die_at_log=die) if sidecar.running else None
        self.note(f"{sidecar.name} checks {asks}: {answer}{' reserved' if reserve else ''}{' and dies' if die else ''}")

    def do_reservation(self) -> None:
        sidecar = self.pick()
        if sidecar.running:
            sidecar.settle_reservation()

    def do_upkeep(self) -> None:
        sidecar = self.pick()
        if sidecar.running:
            sidecar.upkeep()
            if self.random.random() < 0.1:
                self.note(f"{sidecar.name} gives back")
                sidecar.call(giving_back=True)

    def do_resend(self) -> None:
        sidecar = self.pick()
        if sidecar.running and sidecar.held.outstanding is not None:
            sidecar.call()

    def do_sync(self) -> None:
        sidecar = self.pick()
        sidecar.revision, sidecar.amounts = self.revision, dict(self.amounts)

    def do_ship(self) -> None:
        """The ledger learns what a sidecar logged, perhaps only a part."""
        for (quota, sidecar), units in self.spent_units.items():
            if self.random.random() < 0.5 and not self.sidecars[sidecar].dead:
                known = self.ledger.get((quota, sidecar), 0)
                self.ledger[(quota, sidecar)] = self.random.randint(known, units)

    def do_control_plane(self) -> None:
        control_plane = self.random.choices(self.control_planes, [5, 1])[0]
        for _ in range(self.random.randint(1, 8)):
            control_plane.step()

    def do_crash(self) -> None:
        sidecar = self.pick()
        if sidecar.running and self.random.random() < 0.5:
            sidecar.crash()
            if sidecar.retired:
                sidecar.gone("dies after it gave its id up")
                return
            sidecar.dead = self.random.random() < 0.15 and sum(s.dead for s in self.sidecars.values()) < 1
            self.note(f"{sidecar.name} {'dies' if sidecar.dead else 'crashes'}")
        elif not sidecar.running and not sidecar.dead:
            sidecar.start()
            self.note(f"{sidecar.name} starts: {list(sidecar.held.all())}")

    def do_retire(self) -> None:
        sidecar = self.pick()
        if sidecar.running and not sidecar.reserved and len(self.sidecars) < SIDECARS_MAX:
            self.note(f"{sidecar.name} retires")
            sidecar.retire()

    def do_seal(self) -> None:
        """An operator takes a silent sidecar for dead. What it spent and nobody knows of is the operator's risk."""
        sidecar = self.pick()
        mark = self.registers.contents.marks.get(TENANT)
        if mark is None:
            return
        for (_, quota), found in list(self.registers.contents.quotas.items()):
            register = found.registers.get(sidecar.name)
            units = self.ledger.get((quota, sidecar.name), 0)
            if register is None or self.closed(quota):
                continue
            floor = max(register.u + register.h, units)
            if self.registers.seal(TENANT, mark.pair, quota, sidecar.name, units):
                self.note(f"{sidecar.name} is sealed in {quota} with {floor}")
                self.sealed.add(sidecar.name)
                spent = self.spent_units.get((quota, sidecar.name), 0)
                self.unsealable[quota] += max(0, spent - floor)
                self.sealed_reserved[quota] += max(0, floor - spent)

    def do_forget(self) -> None:
        """Tombstones older than any call that is still under way are swept."""
        for (_, quota), found in self.registers.contents.quotas.items():
            old = [one for one in found.registers.values() if one.sealed and self.now_ms - one.time_ms > 75_000]
            if old and len(old) == sum(one.sealed for one in found.registers.values()):
                self.note(f"tombstones of {quota} are swept")
                self.swept[quota] |= {name: one.d for name, one in found.registers.items() if one.sealed}
                self.registers.forget_sealed(TENANT, quota)

    def do_cut(self) -> None:
        sidecar = self.pick()
        sidecar.cut_until_ms = self.now_ms + self.random.choice([2_000, 30_000, 120_000])
        self.note(f"{sidecar.name} is cut off")

    def do_clock(self) -> None:
        sidecar = self.pick()
        sidecar.skew_ms = self.random.randint(-4_000, 4_000)
        self.note(f"{sidecar.name}'s clock is {sidecar.skew_ms} ms off")

    def do_limits(self) -> None:
        self.revision += 1
        limit, amount = self.random.choice(LIMITS), self.random.choice([0, 3, 10, 40])
        if amount == 0 and self.revision % 2:
            self.amounts.pop(limit, None)
        else:
            self.amounts[limit] = amount
        self.note(f"limits {self.amounts}")

    def do_restart(self) -> None:
        self.runs += 1
        self.registers.restart(f"run{self.runs}")
        self.note(f"Redis restarts: run{self.runs}")

    def do_snapshot(self) -> None:
        self.snapshots = [*self.snapshots[-2:], self.registers.snapshot()]

    def do_lose(self) -> None:
        kind = self.random.choice(["wipe", "roll back", "quota", "quota", "mark"])
        whole = kind in ("wipe", "roll back")
        if not (self.may.losses if whole else self.may.partial_losses):
            return
        self.runs += 1
        run = f"run{self.runs}"
        if kind == "wipe":
            self.registers.wipe(run)
        elif kind == "roll back":
            if not self.snapshots:
                return
            self.registers.roll_back(self.random.choice(self.snapshots), run)
        elif kind == "mark":
            self.registers.lose_mark(TENANT)
        elif self.registers.contents.quotas:
            _, quota = self.random.choice(list(self.registers.contents.quotas))
            self.excuse_unmarked(quota)
            self.registers.lose_quota(TENANT, quota)
            kind = f"loses {quota}"
        self.lost = True
        self.note(f"Redis {kind} ({run})")

    def excuse_unmarked(self, quota: str) -> None:
        """A hash is about to be lost that its mark, lost before and made anew, has no marker for: that cannot be
        noticed. What it knew of sidecars that said nothing since leasing reopened is within the stated bound.
        """
        mark = self.registers.contents.marks.get(TENANT)
        limit, _, start = quota.rpartition(":")
        marker = mark.markers.get(limit) if mark else None
        if mark is None or mark.phase != OPEN or (marker and int(start) in (marker.start, marker.previous_start)):
            return
        for name, register in self.registers.contents.quotas[(TENANT, quota)].registers.items():
            if register.pair != mark.pair and not register.sealed:
                self.allowance[(name, quota)] = max(register.g, self.held_units(self.sidecars[name], quota))

    # Network

    def arrives(self) -> bool:
        return self.quiet or not self.may.network or self.random.random() < 0.8

    def send(self, message: Message) -> None:
        if not self.sidecars[message.sidecar].connected:
            return
        if self.arrives():
            self.network.append(message)
            if not self.quiet and self.may.network and self.random.random() < 0.1:
                self.network.append(message)

    def do_deliver(self) -> None:
        if not self.network:
            return
        position = self.random.randrange(len(self.network)) if self.may.network else 0
        self.deliver(self.network.pop(position))

    def deliver(self, message: Message) -> None:
        sidecar = self.sidecars[message.sidecar]
        if message.answer is None:
            repeated = self.has_seen(message)
            answer = self.registers.settle(message.sidecar, message.incarnation, message.call, sidecar.book.live)
            self.note(f"{message.sidecar}/{message.incarnation} settles {_told(message.call, answer)}")
            if not repeated:
                self.granted(message.call, answer)
            self.network_add_answer(replace(message, answer=answer))
        elif sidecar.connected:
            call = sidecar.held.outstanding
            until_ms = call.sent_boot_ms + 1_000 * HOLD_S if call else 0
            outcome = sidecar.take(message.answer)
            if outcome is not None and message.answer.status is Status.OK and call is not None:
                for ask in call.asks:
                    self.answered_until_ms[(sidecar.name, ask.lease.quota)] = until_ms

    def hurry(self, sidecar: Sidecar) -> None:
        """What is under way to and from one sidecar arrives at once, mostly."""
        for _ in range(4):
            mine = [message for message in self.network if message.sidecar == sidecar.name]
            if mine:
                self.network.remove(mine[-1])
                self.deliver(mine[-1])

    def has_seen(self, message: Message) -> bool:
        """Whether a register has this very call already: what its answer grants was granted before."""
        if Rule.REPEAT in self.without:
            return False
        quotas = [self.registers.contents.quotas.get((TENANT, ask.lease.quota)) for ask in message.call.asks]
        registers = [quota.registers.get(message.sidecar) for quota in quotas if quota is not None]
        return any(one and (one.incarnation, one.op) == (message.incarnation, message.call.op) for one in registers)

    def network_add_answer(self, message: Message) -> None:
        if self.sidecars[message.sidecar].connected and self.arrives():
            self.network.append(message)

    def altered(self, sidecar: Sidecar, call: SettleCall) -> SettleCall:
        """For the ablation of verbatim repeats: the same number, and what is true now."""
        asks = tuple(
            ask._replace(cap=ask.lease.cap, used=ask.lease.used, reserved=ask.lease.reserved) for ask in call.asks
        )
        return replace(call, asks=asks)

    # The control plane's world

    def allocate_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def head(self) -> None:
        pair = Pair(self.epoch, self.registers.run_id)
        for sidecar in list(self.sidecars.values()):
            if sidecar.connected and self.arrives():
                sidecar.head(pair, max(1, sum(one.connected for one in self.sidecars.values())))

    def excused(self, learning: FakeMark) -> set[str]:
        """Sidecars that need not be waited for: what they may still hold, they may not spend."""
        over = (self.now_ms - learning.since_ms) / 1_000 >= WAIT_S_MAX
        return {
            name for name, one in self.holders.items() if over or self.now_ms / 1_000 - one.last_heard_s >= WAIT_S_MAX
        }

    def opened(
        self,
        verdict: Verdict,
        learning: FakeMark,
        revision: int,
        filled: dict[tuple[str, str], int],
        excused: set[str],
        in_base: set[tuple[str, str]],
    ) -> None:
        """Leasing reopened: who may have been left out?"""
        if revision < learning.revision:
            raise Violation(f"opening took limits back from revision {learning.revision} to {revision}")
        self.allowance = {}
        self.based = {key: filled[key] for key in in_base}
        for quota, gap in self.base_gaps().items():
            if not self.lost:
                raise Violation(f"opened ({verdict.value}) with {gap} of {quota} missing in the base")
            self.allowance[("base", quota)] = gap
        for name, sidecar in self.sidecars.items():
            if name in self.retired():
                continue
            holder = self.holders[name]
            said = holder.asserted.epoch >= learning.pair.epoch and holder.asserted.run == learning.pair.run
            for quota in self.quotas_of(sidecar):
                counted = self.based.get((quota, name), 0)
                gap = self.held_units(sidecar, quota) - max(counted, self.registered(sidecar, quota))
                if gap <= 0 or self.closed(quota):
                    continue
                missing = f"opened ({verdict.value}) with {gap} of {quota} missing for {name}"
                if not self.lost:
                    raise Violation(f"{missing}, and nothing was lost")
                if said and sidecar.running:
                    raise Violation(f"{missing}, which asserted")
                if not said and name not in excused:
                    raise Violation(f"{missing}, which was not waited for")
                if max(counted, self.registered(sidecar, quota)) < filled.get((quota, name), 0):
                    raise Violation(f"{missing}, though the ledger knew better")
                self.allowance[(name, quota)] = gap
        self.note(f"opened ({verdict.value}), missing {self.allowance}")

    # Checks

    def spent(self, sidecar: Sidecar, lease: Lease, units: int, *, committed: bool) -> None:
        until_ms = self.answered_until_ms.get((sidecar.name, lease.quota), 0)
        if sidecar.boot_ms >= until_ms and not committed:
            raise Violation(f"{sidecar.name} spends {units} of {lease.quota} past its hold")
        self.spent_units[(lease.quota, sidecar.name)] += units

    def quotas_of(self, sidecar: Sidecar) -> set[str]:
        quotas = {quota for quota, name in self.spent_units if name == sidecar.name}
        if sidecar.running:
            quotas |= {lease.quota for lease in sidecar.held.all()}
        return quotas | set(sidecar.log)

    def base_gaps(self) -> dict[str, int]:
        """By quota, what sidecars that are gone spent and that is counted nowhere."""
        gone = self.retired()
        spent: defaultdict[str, int] = defaultdict(int)
        for (quota, name), units in self.spent_units.items():
            if name in gone:
                spent[quota] += units
        gaps = {}
        for quota, units in spent.items():
            found = self.registers.contents.quotas.get((TENANT, quota))
            counted = (found.base + sum(found.registers[n].g for n in gone & {*found.registers})) if found else 0
            if units > counted + self.unsealable[quota] and not self.closed(quota):
                gaps[quota] = units - counted - self.unsealable[quota]
        return gaps

    def held_units(self, sidecar: Sidecar, quota: str) -> int:
        """What a sidecar spent and reserved of a quota and may still spend, with every answer under way to it."""
        spent = self.spent_units.get((quota, sidecar.name), 0)
        spent += sum(one.units for one in sidecar.reserved if one.quota == quota)
        lease = next((one for one in sidecar.held.all() if one.quota == quota), None)
        if not sidecar.running or lease is None:
            return spent
        free = lease.free if sidecar.boot_ms < lease.hold_until_ms else 0
        call = sidecar.held.outstanding
        for message in self.network:
            answer = message.answer
            if call is None or answer is None or message.sidecar != sidecar.name or not answer.granted:
                continue
            over = sidecar.boot_ms >= call.sent_boot_ms + 1_000 * HOLD_S
            if (answer.incarnation, answer.op) == (sidecar.incarnation, call.op) and not over:
                for ask, granted in zip(message.call.asks, answer.granted, strict=True):
                    if ask.lease is lease:
                        used = max(lease.used, lease.used + granted.u - ask.used)
                        free = max(free, granted.g - used - lease.reserved)
        return spent + max(0, free)

    def registered(self, sidecar: Sidecar, quota: str) -> int:
        held = self.registers.contents.quotas.get((TENANT, quota))
        register = held.registers.get(sidecar.name) if held else None
        return register.g if register else 0

    def taken(self, quota: str) -> int:
        """Units of a quota that nobody may have any more."""
        spent = {name: self.spent_units.get((quota, name), 0) for name in self.sidecars}
        dead = {name: self.registered(one, quota) for name, one in self.sidecars.items() if one.dead or one.retired}
        held_by_dead = sum(max(0, registered - spent[name]) for name, registered in dead.items())
        if not self.lost:
            return sum(spent.values()) + held_by_dead + self.sealed_reserved[quota]
        # What is counted twice after a loss is not missed here: the base does not tell whose units it holds.
        found = self.registers.contents.quotas.get((TENANT, quota))
        counted = sum(units for name, units in spent.items() if name not in dead)
        return counted + sum(dead.values()) + (found.base if found else 0)

    def counted_twice(self, quota: str) -> int:
        """At most so many units of sealed sidecars that asserted themselves in a learning phase after their tombstones
        were gone: stranded until the window ends, as the documents say."""
        found = self.registers.contents.quotas.get((TENANT, quota))
        return sum(units for name, units in self.swept[quota].items() if found and name in found.registers)

    def closed(self, quota: str) -> bool:
        limit, _, start = quota.rpartition(":")
        return self.now_ms // 1_000 >= int(start) + WINDOW_S[LimitKey(limit)] + WINDOW_GRACE_S

    def granted(self, call: SettleCall, answer: SettleAnswer) -> None:
        """A call was answered: what it was granted, it must have been entitled to, and denied for a reason."""
        if answer.status is not Status.OK:
            return
        mark = self.registers.contents.marks[TENANT]
        for ask, granted in zip(call.asks, answer.granted, strict=True):
            quota = ask.lease.quota
            amount = mark.amounts.get(ask.lease.limit_key, 0)
            replaced = mark.revision > call.revision and ask.lease.limit_key not in mark.amounts
            if replaced and ask.min and mark.phase == OPEN:
                raise Violation(f"{quota} was found used up, and its limit was replaced, which the caller cannot know")
            if not any(one.d for one in answer.granted):
                continue
            if granted.d < ask.min:
                raise Violation(f"{quota} was granted nothing, and other quotas of the same call were")
            if not granted.d:
                continue
            if self.closed(quota):
                raise Violation(f"{granted.d} of {quota} were granted after its window")
            if call.revision > mark.revision and ask.amount != amount:
                raise Violation(f"{granted.d} of {quota} were granted by a limit the caller knew to be replaced")
            allowed = self.unsealable[quota]
            allowed += sum(gap for (_, missing), gap in self.allowance.items() if missing == quota)
            self.high[quota] = max(self.high[quota], amount + allowed)

    def check(self) -> None:
        """After every step."""
        approved: defaultdict[str, int] = defaultdict(int)
        for (quota, _), units in self.spent_units.items():
            approved[quota] += units
        for quota, units in approved.items():
            if units > self.high[quota]:
                raise Violation(f"P1: {units} of {quota} were approved, at most {self.high[quota]} may be")
        for (_, quota), held in self.registers.contents.quotas.items():
            for name, register in held.registers.items():
                if register.u + register.h > register.g:
                    raise Violation(f"{name} has u + h > g in {quota}: {register}")
        mark = self.registers.contents.marks.get(TENANT)
        trusted = mark is not None and mark.phase == OPEN and mark.pair.run == self.registers.run_id
        for quota, gap in self.base_gaps().items():
            if not self.lost:
                raise Violation(f"{gap} of {quota} are missing in the base, and nothing was lost")
        for name, sidecar in self.sidecars.items():
            if name in self.retired():
                continue
            for quota in self.quotas_of(sidecar):
                counted = max(self.based.get((quota, name), 0), self.registered(sidecar, quota))
                gap = self.held_units(sidecar, quota) - counted
                if gap <= 0 or self.closed(quota):
                    continue
                if not self.lost:
                    raise Violation(f"{name} holds {gap} of {quota} more than is registered, and nothing was lost")
                present = (TENANT, quota) in self.registers.contents.quotas
                if trusted and present and gap > self.allowance.get((name, quota), 0):
                    raise Violation(f"{name} holds {gap} of {quota} more than is registered, while open")

    # The end

    def quiesce(self) -> None:
        """No more faults: whatever no dead sidecar holds can be spent by whoever asks, and not a unit more."""
        self.quiet = True
        self.note("--- quiet ---")
        for sidecar in list(self.sidecars.values()):
            sidecar.skew_ms = sidecar.cut_until_ms = 0
            if not sidecar.running and not sidecar.dead:
                sidecar.start()
            sidecar.revision, sidecar.amounts = self.revision, dict(self.amounts)
            if sidecar.running:
                for reservation in sidecar.reserved:
                    reservation.lease.reserved -= reservation.units
                    reservation.lease.unsure = True
                sidecar.reserved.clear()
        self.reopen()
        for limit in LIMITS:
            self.into_window()
            if alive := self.alive():
                self.spend_all(self.random.choice(alive), limit)

    def alive(self) -> list[Sidecar]:
        return [sidecar for sidecar in self.sidecars.values() if sidecar.running and not sidecar.retiring]

    def reopen(self) -> None:
        """Until leasing is open with the newest limits, and everybody has asserted."""
        for round_ in range(QUIESCE_ROUNDS_MAX):
            self.settle_down()
            mark = self.registers.contents.marks.get(TENANT)
            unasserted = any(one.running and one.to_assert is not None for one in self.sidecars.values())
            is_open = mark is not None and mark.phase == OPEN and mark.revision == self.revision
            if is_open and not unasserted and round_ > 3:
                return
        raise Violation("P2: leasing did not reopen")

    def settle_down(self) -> None:
        self.advance(500)
        for control_plane in self.control_planes:
            control_plane.step()
        for sidecar in list(self.sidecars.values()):
            if sidecar.running:
                sidecar.upkeep()
        self.drain()
        self.check()

    def drain(self) -> None:
        for _ in range(10_000):
            if not self.network:
                return
            self.deliver(self.network.pop(0))
        raise Violation("calls without end")

    def into_window(self) -> None:
        """Far enough from every window's end for what follows."""
        while True:
            left_s = min(window(limit, self.now_ms // 1_000)[1] - self.now_ms // 1_000 for limit in LIMITS)
            if left_s > 100:
                return
            self.settle_down()

    def spend_all(self, sidecar: Sidecar, limit: LimitKey) -> None:
        quota = f"{limit}:{window(limit, self.now_ms // 1_000)[0]}"
        amount = self.amounts.get(limit, 0)
        taken = self.taken(quota)
        twice = self.counted_twice(quota)
        expected = max(0, amount - taken - twice)
        # A limit that was lowered meanwhile leaves what was leased before.
        expected = max(expected, sidecar.lease(limit).free)
        had = 0
        refused = 0
        while refused < REFUSED_MAX:
            if not sidecar.running:  # sealed meanwhile, and learns it only now
                if alive := self.alive():
                    self.spend_all(self.random.choice(alive), limit)
                return
            size = min(5, expected - had) if expected - had > 0 else 1
            answer = sidecar.check({limit: size})
            if answer:
                had += size
                refused = 0
            else:
                refused += 1
                self.settle_down()
            if self.registers.contents.marks[TENANT].phase != OPEN:
                # A hash was lost that nobody had missed until now.
                self.reopen()
                self.into_window()
                self.spend_all(sidecar, limit)
                return
        missing = sum(gap for (_, one), gap in self.allowance.items() if one == quota) + self.unsealable[quota]
        if not expected <= had <= expected + twice + missing:
            raise Violation(f"P2: {sidecar.name} could spend {had} of {quota}, expected {expected} (of {amount})")


def registers_of(found: FakeQuota | None) -> dict[str, Register]:
    """The registers of a quota, as the control plane reads them."""
    return {
        name: Register(
            one.g, one.u, one.h, one.incarnation, one.op, one.pair, one.time_ms, one.sealed, one.d if one.sealed else 0
        )
        for name, one in (found.registers if found else {}).items()
    }


def window(limit: LimitKey, at_s: int) -> tuple[int, int]:
    """The window that holds an instant."""
    length = WINDOW_S[limit]
    start = at_s - at_s % length
    return start, start + length


def _logged(lease: Lease) -> Logged:
    return Logged(lease.limit_key, lease.start, lease.end, lease.amount, lease.cap, lease.used)


def _told(call: SettleCall, answer: SettleAnswer) -> str:
    asks = " ".join(
        f"{ask.lease.quota}[cap={ask.cap} u={ask.used} h={ask.reserved} want={ask.want} min={ask.min}]"
        for ask in call.asks
    )
    granted = " ".join(f"(g={one.g} d={one.d} sum={one.sum}/{one.amount})" for one in answer.granted)
    return (
        f"op {call.op} under {call.pair.epoch}/{call.pair.run}: {asks} -> {answer.status.name} {answer.phase} {granted}"
    )
