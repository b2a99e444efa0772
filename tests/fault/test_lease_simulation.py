"""The promises about quotas under every fault at once, and the proof that each rule of the protocol is needed.

``LICET_SIM_SEEDS`` says how many histories to run (``make sim SEEDS=1000``; ``make sim SEED=7`` runs one again). A
failure names its seed and the shortest set of faults that still shows it, with the end of its trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import pytest

from licet.wire.registers import Pair
from licet_control_plane.core.learning import WAIT_S_MAX, corrections
from licet_control_plane.core.reclaim import HolderState
from licet_sidecar.core.lease import Lease, Terms
from licet_sidecar.core.leases import LeaseBook, TenantLeases
from licet_sidecar.core.settling import Outcome, SettleAnswer, SettleCall
from tests.fault.lease_simulation import LIMITS, START_MS, TENANT, Faults, Violation, World, registers_of
from tests.support.fake_lease_store import FakeRegisters, Rule
from tests.support.seeds import batches

SEEDS_EACH: Final = 20
ABLATION_SEEDS: Final = 300
"""As many as fit in a test's time."""
TRACE_LINES: Final = 60

NO_FAULTS: Final = Faults(**{one.name: False for one in fields(Faults)})
LOSSES: Final = replace(NO_FAULTS, network=True, crashes=True, partitions=True, losses=True)
FAMILIES: Final = {
    "some": None,
    "all": Faults(),
    "nothing-lost": Faults(losses=False, partial_losses=False),
    "losses": LOSSES,
    "no-faults": NO_FAULTS,
}


def fails(seed: int, faults: Faults | None, **ablation: Any) -> tuple[str, World] | None:
    """What a history breaks, and the world it broke in."""
    world = World(seed, faults, **ablation)
    try:
        world.run()
    except Violation as violation:
        return str(violation), world
    return None


def shrunk(seed: int, faults: Faults | None) -> tuple[str, World]:
    """The same seed with as few kinds of faults as still break something."""
    found = fails(seed, faults)
    assert found is not None
    for one in fields(Faults):
        simpler = replace(found[1].may, **{one.name: False})
        if simpler != found[1].may and (again := fails(seed, simpler)) is not None:
            found = again
    return found


def histories() -> Iterator[Any]:
    for name, faults in FAMILIES.items():
        for seeds in batches(SEEDS_EACH, share=len(FAMILIES)):
            yield pytest.param(faults, seeds, id=f"{name}-{seeds.start}")


@pytest.mark.parametrize(("faults", "seeds"), list(histories()))
def test_quotas_are_neither_overspent_nor_stranded(faults: Faults | None, seeds: range) -> None:
    for seed in seeds:
        if fails(seed, faults) is not None:
            violation, world = shrunk(seed, faults)
            trace = "\n".join(world.trace[-TRACE_LINES:])
            pytest.fail(f"seed {seed}, {world.may}: {violation}\n{trace}", pytrace=False)


@pytest.mark.parametrize(
    ("family", "seed"),
    [("all", 2772), ("some", 3592), ("some", 4088), ("all", 4926), ("all", 5082), ("nothing-lost", 889)],
)
def test_histories_that_broke_a_promise_once(family: str, seed: int) -> None:
    # A dead sidecar's spend was taken for counted in a base that others had begun after a loss. The one before the last
    # loses a mark, and then a hash that the new mark had no marker for. In the last, a sealed sidecar is back too late.
    assert fails(seed, FAMILIES[family]) is None


def test_a_history_follows_from_its_seed() -> None:
    first, second = World(5), World(5)
    first.run()
    second.run()
    assert first.trace == second.trace


def test_histories_are_busy() -> None:
    # A simulation in which nothing happens proves nothing.
    traces = [line for seed in range(20) for line in _told(seed)]
    for word, least in {
        ": True": 80,
        "OK open": 300,
        "OK learning": 100,
        "STALE": 50,
        "FENCED": 10,
        "opened": 5,
    }.items():
        assert sum(word in line for line in traces) >= least, word


def _told(seed: int) -> list[str]:
    world = World(seed)
    world.run()
    return world.trace[: world.trace.index(next(line for line in world.trace if "quiet" in line))]


# Ablations: without the rule, something breaks


class SpendsPastItsCap(LeaseBook):
    """Without rule 1, first half."""

    @staticmethod
    def can_spend(lease: Lease, units: int, boot_ms: int) -> bool:
        return units == 0 or boot_ms < lease.hold_until_ms


class SpendsPastItsHold(LeaseBook):
    """Without rule 1, second half."""

    @staticmethod
    def can_spend(lease: Lease, units: int, boot_ms: int) -> bool:
        return lease.used + lease.reserved + units <= lease.cap


class TakesAnyAnswer(LeaseBook):
    """Without rules 2 and 4: whatever answer comes is taken for the one that is waited for."""

    def end_call(self, held: TenantLeases, call: SettleCall, answer: SettleAnswer, boot_ms: int) -> Outcome | None:
        if len(answer.granted) == len(call.asks):
            answer = replace(answer, incarnation=self.incarnation, op=call.op)
        return super().end_call(held, call, answer, boot_ms)


class AssertsNothing(LeaseBook):
    """Without rule 5: a loss is taken note of, and not answered."""

    def unasserted(self, since_ms: int, boot_ms: int) -> list[str]:
        return []


class ForgetsEndedWindows(LeaseBook):
    """Without rule 6."""

    def lease(self, held: TenantLeases, *arguments: Any) -> Lease:
        lease = super().lease(held, *arguments)
        for other in list(held.others.values()):
            if other.limit_key == lease.limit_key and other.start < lease.start:
                self._drop(held, other)
        return lease


class KeepsWhatItMayNotSpend(LeaseBook):
    """Without rule 7: a lease whose hold has ended is said again as it was."""

    def begin_call(self, held: TenantLeases, **arguments: Any) -> SettleCall | None:
        holds = [(lease, lease.hold_until_ms) for lease in held.all() if lease.cap]
        for lease, _ in holds:
            lease.hold_until_ms = 2**60
        try:
            return super().begin_call(held, **arguments)
        finally:
            for lease, until_ms in holds:
                lease.hold_until_ms = until_ms


class TrustsUnansweredCalls(LeaseBook):
    """What a call that was refused, or lost with a crash, may have been granted is never asked about."""

    def begin_call(self, held: TenantLeases, **arguments: Any) -> SettleCall | None:
        call = super().begin_call(held, **arguments)
        for lease in held.all():
            lease.unsure = False
        return call

    def restore(self, tenant: str, lease: Lease, boot_ms: int) -> None:
        super().restore(tenant, lease, boot_ms)
        lease.unsure = False


@dataclass(frozen=True, slots=True)
class Ablation:
    """What takes a rule out, the faults that need it, and the seed to begin with: the first that showed it, when this
    was written. When the simulation changed meanwhile, the search goes on from there.
    """

    first_seed: int
    without: dict[str, Any]
    faults: Faults | None = None

    def breaks(self) -> bool:
        seeds = range(self.first_seed, self.first_seed + ABLATION_SEEDS)
        return any(fails(seed, self.faults, **self.without) is not None for seed in seeds)


SIDECAR_RULES: Final = {
    "1-cap": Ablation(0, {"book": SpendsPastItsCap}),
    "1-hold": Ablation(9, {"book": SpendsPastItsHold}),
    "2-only-its-answer": Ablation(3, {"book": TakesAnyAnswer}),
    "3-log-before-return": Ablation(530, {"log_before_return": False}),
    "4-verbatim": Ablation(13, {"verbatim": False}),
    "5-assert": Ablation(257, {"book": AssertsNothing}),
    "6-remember": Ablation(741, {"book": ForgetsEndedWindows}),
    "unsure": Ablation(480, {"book": TrustsUnansweredCalls}),
    "control-plane-waits": Ablation(3, {"hasty": True}),
}

SCRIPT_RULES: Final = {
    Rule.LEARN_ON_NEW_RUN: 10,
    Rule.CHECK_PAIR: 3,
    Rule.UNPUBLISHED: 1011,
    Rule.OUTDATED: 2,
    Rule.MARKERS: 8,
    Rule.CLOSE: 14,
    Rule.SAID: 62,
    Rule.FENCE: 9,
    Rule.REPEAT: 138,
    Rule.ASSERT_EXACTLY: 88,
    Rule.FLOOR: 55,
    Rule.ONLY_OPEN: 4,
    Rule.WITHIN_AMOUNT: 0,
    Rule.ALL_OR_NOTHING: 0,
    Rule.OPEN_SAME_PAIR: 409,
    Rule.OPEN_NOT_OLDER: 352,
    Rule.OPEN_SAID: 64,
    Rule.FILL_SAID: 409,
    Rule.FILL_UNASSERTED: 8,
    Rule.SEAL_LATE: 15,
    Rule.SEAL_FLOOR: 503,
}
"""First seeds."""

SECOND_LINE: Final = {
    Rule.ADOPT: "an answer is taken only by the call it answers, so what a lost reply granted is nobody's",
    Rule.REMEMBER_SPENT: "a sidecar forgets nothing while its window takes calls (rule 6)",
    Rule.RELEASE: "histories in which nobody else would give the units back are rare",
    Rule.KNOWN: "who was silent for so long gives up what it held (rule 7), so that units are only counted twice",
}
"""Rules that no random history breaks without, and why: other rules hold alone. Each has a history of its own below,
in which the other rule is missing or does not help."""

NEVER_NEEDED: Final = {
    Rule.ASSERT_GRANTS_NOTHING: "what is asserted is in the sum before anything is granted, and nothing is granted"
    " while others may not have asserted: the next call is granted the same",
}
"""Kept, as it costs a call after a loss and nothing else. The contract suite holds the script to it."""


class Played:
    """One limit of 10 units, and sidecars that call one at a time."""

    def __init__(self, without: frozenset[Rule]) -> None:
        self.registers = FakeRegisters(now_ms=START_MS, without=without)
        run = self.registers.begin(TENANT, 1)
        assert run is not None
        assert self.registers.open(TENANT, Pair(1, run), 1, {LIMITS[1]: 10})

    @staticmethod
    def lease(book: LeaseBook) -> Lease:
        return book.lease(book.of(TENANT), LIMITS[1], "", 0, 2 * START_MS // 1_000, Terms(10), 0)

    def begun(self, book: LeaseBook, need: int) -> SettleCall:
        """A call for ``need`` more units."""
        lease = self.lease(book)
        book.need(book.of(TENANT), lease, lease.free + need)
        call = book.begin_call(book.of(TENANT), revision=1, boot_ms=0)
        assert call is not None
        return call

    def answer(self, book: LeaseBook, call: SettleCall) -> SettleAnswer:
        return self.registers.settle("one", book.incarnation, call, 2)

    def take(self, book: LeaseBook, call: SettleCall, answer: SettleAnswer) -> None:
        book.end_call(book.of(TENANT), call, answer, 0)

    def acquire(self, book: LeaseBook, need: int) -> None:
        """Until ``need`` units are free, or there are no more."""
        for _ in range(4):  # the first may learn the pair; one may be told what is registered
            if self.lease(book).free < need:
                call = self.begun(book, need - self.lease(book).free)
                self.take(book, call, self.answer(book, call))

    @property
    def registered(self) -> int:
        (quota,) = self.registers.contents.quotas.values()
        return quota.registers["one"].g


@pytest.mark.parametrize("without", [frozenset(), frozenset({Rule.ADOPT})])
def test_who_takes_an_earlier_answer_for_its_own_holds_what_is_registered(without: frozenset[Rule]) -> None:
    played, book = Played(without), TakesAnyAnswer(1)
    played.acquire(book, 1)
    lost = played.begun(book, 6)
    late = played.answer(book, lost)
    book.abandon_call(book.of(TENANT), lost)
    book.of(TENANT).needs.clear()
    call = played.begun(book, 1)
    played.answer(book, call)
    played.take(book, call, late)
    assert played.lease(book).cap == 7
    assert (played.registered >= 7) is not bool(without)


@pytest.mark.parametrize("without", [frozenset(), frozenset({Rule.REMEMBER_SPENT})])
def test_who_forgot_what_it_spent_cannot_spend_it_again(without: frozenset[Rule]) -> None:
    played, book = Played(without), LeaseBook(1)
    played.acquire(book, 8)
    book.spend(played.lease(book), 8, 0)
    call = played.begun(book, 1)
    played.take(book, call, played.answer(book, call))
    restarted = LeaseBook(2)
    played.acquire(restarted, 10)
    assert (played.lease(restarted).free <= 2) is not bool(without)


@pytest.mark.parametrize(("book", "spendable"), [(LeaseBook, 0), (KeepsWhatItMayNotSpend, 8)])
def test_who_was_away_while_others_learned_gives_up_what_it_held(book: type[LeaseBook], spendable: int) -> None:
    # Rule 7, as a history of its own: random ones hardly ever let the others use up everything in between.
    limit, start, end = LIMITS[1], 0, 2 * START_MS // 1_000
    registers = FakeRegisters(now_ms=START_MS)

    def settle(one: LeaseBook, name: str, boot_ms: int) -> None:
        for _ in range(4):
            held = one.of(TENANT)
            call = held.outstanding or one.begin_call(held, revision=1, boot_ms=boot_ms)
            if call is not None:
                one.end_call(held, call, registers.settle(name, 1, call, 2), boot_ms)

    def leased(one: LeaseBook, name: str, units: int, boot_ms: int) -> Lease:
        lease = one.lease(one.of(TENANT), limit, "", start, end, terms, boot_ms)
        while lease.cap < units:
            one.need(one.of(TENANT), lease, units)
            settle(one, name, boot_ms)
        return lease

    terms = Terms(10)
    run = registers.begin(TENANT, 1)
    assert run is not None
    assert registers.open(TENANT, Pair(1, run), 1, {limit: 10})
    away, here = book(1), LeaseBook(1)
    lost = leased(away, "away", 8, 0)
    assert lost.cap == 8
    registers.wipe("run2")
    registers.now_ms += 1_000 * WAIT_S_MAX
    run = registers.begin(TENANT, 2)
    assert run is not None
    assert registers.open(TENANT, Pair(2, run), 1, {limit: 10})
    boot_ms = 1_000 * WAIT_S_MAX
    others = leased(here, "here", 10, boot_ms)
    here.spend(others, 10, boot_ms)
    settle(away, "away", boot_ms)
    assert lost.hold_until_ms > boot_ms
    assert lost.free == spendable


@pytest.mark.parametrize(("without", "spendable"), [(frozenset(), 10), (frozenset({Rule.RELEASE}), 2)])
def test_what_came_back_with_an_older_state_and_nobody_holds_is_free(without: frozenset[Rule], spendable: int) -> None:
    limit, start, end = LIMITS[1], 0, 2 * START_MS // 1_000
    registers = FakeRegisters(now_ms=START_MS, without=without)
    run = registers.begin(TENANT, 1)
    assert run is not None
    assert registers.open(TENANT, Pair(1, run), 1, {limit: 10})

    def settle(book: LeaseBook, name: str, *, need: int = 0) -> None:
        held = book.of(TENANT)
        for _ in range(3):  # the first call may learn the pair, and grants nothing
            if need > lease(book).free:
                book.need(held, lease(book), need)
            call = book.begin_call(held, revision=1, boot_ms=0, giving_back=not need)
            if call is not None:
                book.end_call(held, call, registers.settle(name, 1, call, 2), 0)

    def lease(book: LeaseBook) -> Lease:
        return book.lease(book.of(TENANT), limit, "", start, end, Terms(10), 0)

    idle, busy = LeaseBook(1), LeaseBook(1)
    settle(idle, "idle", need=8)
    assert lease(idle).cap == 8
    snapshot = registers.snapshot()
    settle(idle, "idle")
    assert lease(idle).cap == 0
    idle.forget(TENANT)  # it holds and spent nothing
    registers.roll_back(snapshot, "run2")
    state = registers.touch_mark(TENANT)
    assert state is not None
    assert idle.unasserted(0, 1) == [], "it has nothing to say"
    quota = lease(busy).quota
    found = registers_of(registers.contents.quotas[(TENANT, quota)])
    right = corrections(found, {}, pair=state.pair, said={"idle"}, state_of=lambda _: HolderState.LIVE)
    for name in right.releases:
        registers.release(TENANT, state.pair, quota, name)
    assert registers.open(TENANT, state.pair, 1, {limit: 10})
    for _ in range(10):
        settle(busy, "busy", need=1)
        if busy.can_spend(lease(busy), 1, 0):
            busy.spend(lease(busy), 1, 0)
    assert lease(busy).used == spendable


@pytest.mark.parametrize("rule", SIDECAR_RULES)
def test_each_rule_of_the_sidecar_is_needed(rule: str) -> None:
    assert SIDECAR_RULES[rule].breaks(), f"nothing broke without {rule}"


@pytest.mark.parametrize("rule", SCRIPT_RULES, ids=lambda rule: rule.name)
def test_each_rule_of_the_scripts_is_needed(rule: Rule) -> None:
    ablation = Ablation(SCRIPT_RULES[rule], {"without": frozenset({rule})})
    assert ablation.breaks(), f"nothing broke without {rule.name}"


def test_no_rule_is_left_out() -> None:
    of_rates = {Rule.SHARES_END, Rule.SWEEP_LATE}  # test_rate_simulation.py
    assert {*SCRIPT_RULES, *SECOND_LINE, *NEVER_NEEDED, *of_rates} == {*Rule}
