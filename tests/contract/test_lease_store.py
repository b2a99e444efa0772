"""What ``settle`` and the publisher's scripts promise, over the model and over real Lua on a real Valkey.

After every call the registers are looked at: sum = base + Σ g, used = base + Σ (u + h), u + h ≤ g, and a grant only
within the amount.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from licet.domain.ids import LimitKey
from licet.domain.windows import FOREVER_S
from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, QUOTA_KEPT_S, WINDOW_GRACE_S, Pair
from licet_sidecar.core.lease import Kind, Lease, RateShare, Terms
from licet_sidecar.core.settling import Ask, Granted, SettleAnswer, SettleCall, Status
from licet_sidecar.ports import CallRefused
from tests.support.control_plane import WAIT_S_MAX
from tests.support.lease_backends import TENANT, Backend, FakeBackend, RealBackend, real_backend
from tests.support.valkey import ValkeyProcess

CALLS = LimitKey("calls:monthly")
SEATS = LimitKey("seats:monthly")
UNITS_MAX = 2**53 - 1
REVISION = 7


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    process = ValkeyProcess(tmp_path_factory.mktemp("valkey"))
    process.start()
    yield process
    process.kill()


@pytest.fixture(params=["model", "valkey"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    if request.param == "model":
        yield FakeBackend()
    else:
        async with real_backend(request.getfixturevalue("server")) as real:
            yield real


@pytest.fixture
async def real(server: ValkeyProcess) -> AsyncIterator[RealBackend]:
    async with real_backend(server) as backend:
        yield backend


class Caller:
    """A sidecar that says exactly what a test tells it to."""

    def __init__(self, backend: Backend, name: str = "one", incarnation: int = 1) -> None:
        self.backend = backend
        self.name = name
        self.incarnation = incarnation
        self.op = 0
        self.pair = Pair(0, "")
        self.live = 1
        self.store = backend.store(name, incarnation)

    async def __call__(
        self, *asks: Ask, op: int = 0, revision: int = REVISION, pair: Pair | None = None, retiring: bool = False
    ) -> SettleAnswer:
        """One call under the mark's pair; ``op`` repeats an earlier one."""
        if pair is None:
            state = await self.backend.touch()
            pair = state[0] if state else Pair(0, "")
        self.op = op or self.op + 1
        (answer,) = await self.send(SettleCall(TENANT, self.op, pair, revision, asks, 0, retiring=retiring))
        if isinstance(answer, Exception):
            raise answer
        assert (answer.incarnation, answer.op) == (self.incarnation, self.op)
        return answer

    async def send(self, *calls: SettleCall) -> list[SettleAnswer | Exception]:
        """Calls as they are, and a look at the registers afterwards."""
        answers = await self.store.settle(calls, self.live)
        for call, answer in zip(calls, answers, strict=True):
            await self._look(call, answer)
        return answers

    async def _look(self, call: SettleCall, answer: SettleAnswer | Exception) -> None:
        for position, ask in enumerate(call.asks):
            quota = await self.backend.quota(ask.lease)
            if quota is None:
                continue
            held = quota.registers.values()
            assert quota.sum == quota.base + sum(one.granted for one in held)
            assert quota.used == quota.base + sum(one.used + one.reserved for one in held)
            assert all(one.used + one.reserved <= one.granted for one in held)
            if isinstance(answer, SettleAnswer) and answer.granted and not call.retiring:
                granted = answer.granted[position]
                assert (granted.sum, granted.used) == (quota.sum, quota.used)
                assert (granted.g, granted.u) == (quota.registers[self.name].granted, quota.registers[self.name].used)
                assert granted.d == 0 or granted.sum <= granted.amount or ask.kind is Kind.SOFT


def ask(lease: Lease, *, cap: int = 0, used: int = 0, reserved: int = 0, want: int = 0, min: int = 0) -> Ask:  # noqa: A002  # as in Ask
    return Ask(lease, cap, used, reserved, max(want, min), min, lease.amount)


async def month(backend: Backend, limit: LimitKey = CALLS, amount: int = 100, scope: str = "") -> Lease:
    now_s = await backend.now_s()
    return Lease(limit, scope, now_s - 86_400, now_s + 86_400, Terms(amount))


async def opened(backend: Backend, *leases: Lease, epoch: int = 1) -> Pair:
    """A mark that is open, with the amounts of these leases."""
    await backend.begin(epoch)
    state = await backend.touch()
    assert state is not None
    assert await backend.open(state[0], REVISION, {lease.limit_key: lease.amount for lease in leases}, [])
    return state[0]


# The mark


async def test_without_a_mark_the_answer_is_learn(backend: Backend) -> None:
    lease = await month(backend)
    answer = await Caller(backend)(ask(lease, min=1))
    assert (answer.status, answer.about) == (Status.LEARN, -1)
    assert await backend.quota(lease) is None


async def test_a_begun_mark_learns_and_grants_nothing(backend: Backend) -> None:
    lease = await month(backend)
    assert await backend.begin(3)
    assert not await backend.begin(4), "there is one already"
    answer = await Caller(backend)(ask(lease, min=1))
    assert (answer.status, answer.phase, answer.pair.epoch) == (Status.OK, "learning", 3)
    assert answer.granted[0].d == 0


async def test_a_call_under_another_pair_is_stale_and_is_told_the_pair(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    for wrong in (Pair(pair.epoch + 1, pair.run), Pair(pair.epoch, "other"), Pair(0, "")):
        answer = await Caller(backend)(ask(lease, min=1), pair=wrong)
        assert (answer.status, answer.pair) == (Status.STALE, pair)
    assert await backend.quota(lease) is None


async def test_a_restarted_server_learns_before_it_grants(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    one = Caller(backend)
    assert (await one(ask(lease, min=10))).granted[0].g >= 10
    await backend.restart()
    answer = await one(ask(lease, cap=10, min=1), pair=pair)
    assert (answer.status, answer.phase) == (Status.STALE, "learning")
    assert answer.pair.epoch == pair.epoch
    assert answer.pair.run != pair.run
    answer = await one(ask(lease, cap=10, used=4, min=1))
    assert (answer.status, answer.phase, answer.granted[0].g, answer.granted[0].d) == (Status.OK, "learning", 10, 0)


async def test_touch_puts_the_mark_of_a_restarted_server_in_learning(backend: Backend) -> None:
    pair = await opened(backend)
    assert await backend.touch() == (pair, True)
    await backend.restart()
    state = await backend.touch()
    assert state is not None
    assert not state[1]
    assert state[0].run != pair.run


async def test_a_mark_older_than_the_callers_revision_grants_nothing(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    raised = Lease(lease.limit_key, "", lease.start, lease.end, Terms(200))
    answer = await Caller(backend)(ask(raised, min=1), revision=REVISION + 1)
    assert (answer.status, answer.about) == (Status.UNPUBLISHED, 0)
    assert await backend.quota(lease) is None


async def test_a_newer_revision_with_the_same_amount_is_no_obstacle(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    assert (await Caller(backend)(ask(lease, min=1), revision=REVISION + 1)).granted[0].d >= 1


async def test_a_return_needs_no_published_limits(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=10))
    raised = Lease(lease.limit_key, "", lease.start, lease.end, Terms(200))
    answer = await one(ask(raised, cap=3, used=3), revision=REVISION + 1)
    assert (answer.status, answer.granted[0].g) == (Status.OK, 3)


async def test_what_is_held_can_be_asserted_before_limits_are_published(backend: Backend) -> None:
    # A check waits (min > 0) while a mark without limits learns. Were this refused, the sidecar could not say what it
    # holds before leasing reopens, and its units would be granted to others.
    lease = await month(backend)
    await backend.begin(1)
    answer = await Caller(backend)(ask(lease, cap=60, used=50, min=20))
    assert (answer.status, answer.granted[0].g, answer.granted[0].d) == (Status.OK, 60, 0)


async def test_a_limit_that_is_not_published_grants_nothing(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend)
    answer = await Caller(backend)(ask(lease, min=1))
    assert (answer.status, answer.granted[0].d, answer.granted[0].amount) == (Status.OK, 0, 0)


@pytest.mark.parametrize("asked", [{"min": 1, "want": 1}, {"want": 5}], ids=["needed", "refilled"])
async def test_a_limit_that_newer_ones_replaced_is_not_taken_for_one_that_is_used_up(
    backend: Backend, asked: dict[str, int]
) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=10))
    await backend.publish_limits(REVISION + 1, {LimitKey("other:month"): 1})
    answer = await one(ask(lease, cap=10, used=10, **asked))
    assert (answer.status, answer.about) == (Status.OUTDATED, 0)
    assert (await one(ask(lease, cap=10, used=10))).status is Status.OK, "what is held can be said"
    told = await one(ask(lease, cap=10, used=10, **asked), revision=REVISION + 1)
    assert (told.status, told.granted[0].d) == (Status.OK, 0), "whoever knows the newer ones is told that there is none"


async def test_the_repeat_of_a_call_whose_limit_was_replaced_meanwhile_says_so_too(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    first = await one(ask(lease, min=10))
    assert first.granted[0].d >= 10
    await backend.publish_limits(REVISION + 1, {LimitKey("other:month"): 1})
    # What it was granted is found by the next call, as after any answer that was lost.
    assert (await one(ask(lease, min=10), op=first.op)).status is Status.OUTDATED


# Windows


async def test_a_window_past_its_grace_is_closed(backend: Backend) -> None:
    now_s = await backend.now_s()
    over = Lease(CALLS, "", now_s - 3_600, now_s - WINDOW_GRACE_S - 1, Terms(100))
    running = await month(backend, SEATS)
    await opened(backend, over, running)
    answer = await Caller(backend)(ask(running, min=1), ask(over, cap=3, used=3))
    assert (answer.status, answer.about) == (Status.CLOSED, 1)
    assert await backend.quota(over) is None
    assert await backend.quota(running) is None, "all or nothing"


async def test_a_window_within_its_grace_takes_calls(backend: Backend) -> None:
    now_s = await backend.now_s()
    lease = Lease(CALLS, "", now_s - 3_600, now_s - WINDOW_GRACE_S + 20, Terms(100))
    await opened(backend, lease)
    assert (await Caller(backend)(ask(lease, min=1))).status is Status.OK


async def test_a_window_that_begins_later_is_early(backend: Backend) -> None:
    now_s = await backend.now_s()
    lease = Lease(CALLS, "", now_s + WINDOW_GRACE_S + 20, now_s + 3_600, Terms(100))
    await opened(backend, lease)
    answer = await Caller(backend)(ask(lease, min=1))
    assert (answer.status, answer.about) == (Status.EARLY, 0)


async def test_two_windows_are_open_around_a_windows_end_and_each_counts_for_itself(backend: Backend) -> None:
    now_s = await backend.now_s()
    old = Lease(CALLS, "", now_s - 3_600, now_s + 5, Terms(100))
    new = Lease(CALLS, "", now_s + 5, now_s + 3_600, Terms(100))
    await opened(backend, old)
    one, two = Caller(backend), Caller(backend, "two")
    assert (await one(ask(old, min=50))).granted[0].g == 50
    assert (await two(ask(new, min=50))).granted[0].g == 50
    assert (await one(ask(old, cap=50, min=50))).granted[0].g == 100
    assert (await one(ask(new, min=50))).granted[0].g == 50
    mark = await backend.mark()
    assert mark is not None
    assert mark.markers["calls:monthly"][:3] == (new.start, new.end, old.start)


async def test_the_older_of_two_windows_is_made_after_the_newer(backend: Backend) -> None:
    now_s = await backend.now_s()
    old = Lease(CALLS, "", now_s - 3_600, now_s + 5, Terms(100))
    new = Lease(CALLS, "", now_s + 5, now_s + 3_600, Terms(100))
    await opened(backend, old)
    one = Caller(backend)
    await one(ask(new, min=1))
    assert (await one(ask(old, min=1))).granted[0].d >= 1
    await backend.lose_quota(old)
    answer = await one(ask(old, cap=1, used=1))
    assert (answer.status, answer.about) == (Status.LEARN, 0)


async def test_a_quota_hash_goes_away_an_hour_after_its_grace(real: RealBackend) -> None:
    lease = await month(real)
    await opened(real, lease)
    await Caller(real)(ask(lease, min=1))
    assert await real.expires_s(lease) == lease.end + WINDOW_GRACE_S + QUOTA_KEPT_S


# Fencing and repeats


async def test_a_repeated_call_is_answered_alike(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    first = await one(ask(lease, min=10))
    again = await one(ask(lease, min=10), op=first.op)
    assert again.granted == first.granted
    quota = await backend.quota(lease)
    assert quota is not None
    assert quota.sum == first.granted[0].g


async def test_an_older_call_is_fenced(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=10))
    await one(ask(lease, cap=0))
    answer = await one(ask(lease, min=10), op=1)
    assert (answer.status, answer.about) == (Status.FENCED, 0)
    quota = await backend.quota(lease)
    assert quota is not None
    assert quota.sum == 0


async def test_a_newer_incarnation_fences_the_older_whatever_its_numbers(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    old, new = Caller(backend), Caller(backend, incarnation=2)
    old.op = 50
    await old(ask(lease, min=10))
    assert (await new(ask(lease, cap=10))).status is Status.OK
    assert (await old(ask(lease, min=10))).status is Status.FENCED


async def test_a_sealed_register_refuses_its_sidecar(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=10))
    await backend.seal(lease, "one")
    assert (await one(ask(lease, cap=10))).status is Status.SEALED
    assert (await Caller(backend, "two")(ask(lease, min=10))).granted[0].g >= 10


async def test_an_older_return_does_not_undo_a_later_grant(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, cap=0, used=0))
    await one(ask(lease, min=20))
    assert (await one(ask(lease, cap=0), op=1)).status is Status.FENCED
    quota = await backend.quota(lease)
    assert quota is not None
    assert quota.sum == 20


# Moving units


async def test_a_lost_reply_is_adopted_and_nothing_more_granted(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=30))
    answer = await one(ask(lease, min=10))  # it does not know of the 30
    assert (answer.granted[0].g, answer.granted[0].d) == (30, 0)


async def test_a_return_lowers_to_what_is_kept_and_never_below_what_is_spent(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=30))
    assert (await one(ask(lease, cap=20, used=5, reserved=5))).granted[0].g == 20
    assert (await one(ask(lease, cap=0, used=5, reserved=5))).granted[0].g == 10
    assert (await one(ask(lease, cap=0, used=6))).granted[0].g == 6


async def test_a_cancelled_reservation_frees_its_units(backend: Backend) -> None:
    lease = await month(backend, amount=10)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=10))
    assert (await one(ask(lease, cap=10, reserved=10))).granted[0].used == 10
    assert (await one(ask(lease, cap=0))).granted[0].sum == 0
    assert (await Caller(backend, "two")(ask(lease, min=10))).granted[0].g == 10


async def test_what_was_reported_as_spent_stays_spent(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=30))
    await one(ask(lease, cap=30, used=12))
    answer = await one(ask(lease, cap=0, used=0))
    assert (answer.granted[0].g, answer.granted[0].u) == (12, 12)


async def test_a_grant_is_at_least_the_minimum_and_shared_fairly(backend: Backend) -> None:
    lease = await month(backend, amount=6_400)
    await opened(backend, lease)
    one = Caller(backend)
    one.live = 4
    assert (await one(ask(lease, want=1, min=1))).granted[0].d == 25, "far from the limit: remaining / (64 · live)"
    answer = await one(ask(lease, cap=25, want=6_000, min=1))
    assert answer.granted[0].d == (6_400 - 25) // 8, "never more than remaining / (2 · live) ahead of need"
    g = answer.granted[0].g
    answer = await one(ask(lease, cap=g, want=6_400 - g, min=6_400 - g))
    assert answer.granted[0].g == 6_400, "but all of what a check needs"


async def test_no_live_sidecar_counts_as_one(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    one.live = 0
    assert (await one(ask(lease, want=100, min=1))).granted[0].d == 50


async def test_the_last_unit_can_be_had_and_not_one_more(backend: Backend) -> None:
    lease = await month(backend, amount=3)
    await opened(backend, lease)
    one, two = Caller(backend), Caller(backend, "two")
    assert (await one(ask(lease, min=2))).granted[0].g == 2
    assert (await two(ask(lease, min=2))).granted[0].d == 0
    assert (await two(ask(lease, min=1))).granted[0].d == 1
    assert (await two(ask(lease, cap=1, want=1))).granted[0].d == 0


async def test_who_falls_short_sets_wanted_which_tells_the_holders(backend: Backend) -> None:
    lease = await month(backend, amount=10)
    await opened(backend, lease)
    one, two = Caller(backend), Caller(backend, "two")
    assert not (await one(ask(lease, min=10))).granted[0].wanted
    assert (await two(ask(lease, min=1))).granted[0].wanted
    assert (await one(ask(lease, cap=10))).granted[0].wanted


async def test_a_refill_that_finds_nothing_wants_nothing_of_others(backend: Backend) -> None:
    lease = await month(backend, amount=10)
    await opened(backend, lease)
    await Caller(backend)(ask(lease, min=10))
    assert not (await Caller(backend, "two")(ask(lease, want=5))).granted[0].wanted


async def test_several_quotas_are_granted_all_or_none(backend: Backend) -> None:
    plenty, scarce = await month(backend), await month(backend, SEATS, amount=1)
    await opened(backend, plenty, scarce)
    one = Caller(backend)
    answer = await one(ask(plenty, min=10), ask(scarce, min=2))
    assert [granted.d for granted in answer.granted] == [0, 0]
    assert [granted.wanted for granted in answer.granted] == [False, True]
    answer = await one(ask(plenty, min=10), ask(scarce, min=1))
    assert [granted.d for granted in answer.granted] == [10, 1]


async def test_a_call_about_several_quotas_is_refused_as_a_whole(backend: Backend) -> None:
    first, lost = await month(backend), await month(backend, SEATS)
    await opened(backend, first, lost)
    one = Caller(backend)
    await one(ask(first, min=5), ask(lost, min=5))
    await backend.lose_quota(lost)
    answer = await one(ask(first, cap=0), ask(lost, cap=5))
    assert (answer.status, answer.about) == (Status.LEARN, 1)
    quota = await backend.quota(first)
    assert quota is not None
    assert quota.sum == 5, "the return of the other quota must not have happened"


async def test_scopes_of_a_limit_count_apart(backend: Backend) -> None:
    ann, bob = await month(backend, scope="aaaa", amount=5), await month(backend, scope="bbbb", amount=5)
    await opened(backend, ann)
    answer = await Caller(backend)(ask(ann, min=5), ask(bob, min=5))
    assert [granted.g for granted in answer.granted] == [5, 5]


async def test_a_lowered_limit_grants_nothing_until_enough_came_back(backend: Backend) -> None:
    lease = await month(backend, amount=100)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=80))
    assert await backend.publish_limits(REVISION + 1, {CALLS: 50})
    two = Caller(backend, "two")
    assert (await two(ask(lease, min=1))).granted[0].d == 0
    assert (await one(ask(lease, cap=45, used=45))).granted[0].g == 45
    assert (await two(ask(lease, min=5))).granted[0].d == 5


async def test_older_limits_do_not_replace_newer_ones(backend: Backend) -> None:
    await opened(backend)
    await backend.publish_limits(REVISION + 2, {CALLS: 50})
    await backend.publish_limits(REVISION + 1, {CALLS: 500})
    mark = await backend.mark()
    assert mark is not None
    assert (mark.revision, mark.amounts) == (REVISION + 2, {CALLS: 50})


async def test_limits_cannot_be_published_without_a_mark(backend: Backend) -> None:
    assert not await backend.publish_limits(REVISION, {CALLS: 50})
    assert await backend.mark() is None


# Loss


async def test_a_stale_register_asserts_exactly_even_past_the_limit_and_is_granted_nothing(backend: Backend) -> None:
    lease = await month(backend, amount=10)
    await opened(backend, lease)
    one, two = Caller(backend), Caller(backend, "two")
    await one(ask(lease, min=8))
    before = await backend.snapshot()
    await two(ask(lease, min=2))
    await backend.roll_back(before)
    state = await backend.touch()
    assert state is not None
    assert await backend.open(state[0], REVISION, {CALLS: 10}, [lease])  # nobody waited for two
    three = Caller(backend, "three")
    assert (await three(ask(lease, min=2))).granted[0].d == 2
    answer = await two(ask(lease, cap=2, used=1, min=5))
    assert (answer.granted[0].g, answer.granted[0].d, answer.granted[0].sum) == (2, 0, 12)
    answer = await one(ask(lease, cap=3, used=3))
    assert (answer.granted[0].g, answer.granted[0].sum) == (3, 7), "a resurrected grant is taken down to what is held"


async def test_a_lost_quota_hash_is_a_loss_and_never_new(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    await Caller(backend)(ask(lease, min=60))
    await backend.lose_quota(lease)
    answer = await Caller(backend, "two")(ask(lease, min=60))
    assert (answer.status, answer.about) == (Status.LEARN, 0)
    assert await backend.quota(lease) is None


async def test_after_relearning_a_lost_quota_is_asserted_and_reopened(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    one, two = Caller(backend), Caller(backend, "two")
    await one(ask(lease, min=60))
    await backend.lose_quota(lease)
    assert await backend.relearn(pair.epoch, 9)
    assert not await backend.relearn(pair.epoch, 10), "it is at 9 now"
    assert not await backend.relearn(9, 9), "an epoch only grows"
    assert (await one(ask(lease, cap=60), pair=pair)).status is Status.STALE
    assert (await one(ask(lease, cap=60, used=10))).granted[0].g == 60
    assert (await two(ask(lease, min=1))).granted[0].d == 0
    assert await backend.open(Pair(9, pair.run), REVISION, {CALLS: 100}, [lease])
    assert (await two(ask(lease, min=40))).granted[0].d == 40
    assert (await two(ask(lease, cap=40, min=1))).granted[0].d == 0


async def test_a_quota_nobody_asserted_is_made_empty_by_opening(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    await Caller(backend)(ask(lease, min=60))
    await backend.lose_quota(lease)
    await backend.relearn(pair.epoch, 9)
    assert await backend.open(Pair(9, pair.run), REVISION, {CALLS: 100}, [lease])
    assert (await Caller(backend, "two")(ask(lease, min=100))).granted[0].d == 100


async def test_a_lost_mark_is_begun_under_a_new_epoch_and_old_registers_assert(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=60))
    await backend.lose_mark()
    assert (await one(ask(lease, cap=60))).status is Status.LEARN
    assert await backend.begin(2)
    quota = await backend.quota(lease)
    assert quota is not None
    assert not quota.registers["one"].asserted
    assert (await one(ask(lease, cap=50, used=10))).granted[0].g == 50
    quota = await backend.quota(lease)
    assert quota is not None
    assert quota.registers["one"].asserted


async def test_what_is_lost_while_it_is_learned_is_learned_again(backend: Backend) -> None:
    # Whoever said what it holds will not say it again in this phase: opening would give its units away.
    kept, lost = await month(backend), await month(backend, SEATS)
    await backend.begin(1)
    one = Caller(backend)
    asks = (ask(kept, cap=7, used=2), ask(lost, cap=9, used=4))
    first = await one(*asks)
    await backend.lose_quota(lost)
    again = await one(*asks, op=first.op)
    assert (again.status, again.about) == (Status.LEARN, 1)
    assert (await Caller(backend, "two")(ask(lost))).status is Status.LEARN
    state = await backend.touch()
    assert state is not None
    assert not await backend.open(state[0], 1, {CALLS: 100, SEATS: 100}, [kept, lost])
    assert await backend.relearn(1, 2)
    said = await one(*asks)
    assert [granted.g for granted in said.granted] == [7, 9]
    state = await backend.touch()
    assert state is not None
    assert await backend.open(state[0], 1, {CALLS: 100, SEATS: 100}, [kept, lost])


async def test_the_ledger_fills_registers_that_did_not_assert_themselves(backend: Backend) -> None:
    lease = await month(backend)
    await backend.begin(1)
    state = await backend.touch()
    assert state is not None
    one = Caller(backend)
    await one(ask(lease, cap=10, used=5))
    assert not await backend.fill(state[0], lease, "one", 8), "it knows better"
    assert await backend.fill(state[0], lease, "dead", 8)
    assert not await backend.fill(state[0], lease, "dead", 7), "not below what is there"
    assert not await backend.fill(Pair(state[0].epoch + 1, state[0].run), lease, "dead", 9), "another pair"
    quota = await backend.quota(lease)
    assert quota is not None
    assert (quota.sum, quota.used) == (18, 13)
    assert (quota.registers["dead"].granted, quota.registers["dead"].asserted) == (8, False)
    assert await backend.open(state[0], REVISION, {CALLS: 100}, [lease])
    assert not await backend.fill(state[0], lease, "dead", 50), "not while open"


async def test_a_filled_register_is_replaced_by_what_its_sidecar_says(backend: Backend) -> None:
    lease = await month(backend)
    await backend.begin(1)
    state = await backend.touch()
    assert state is not None
    await backend.fill(state[0], lease, "one", 8)
    answer = await Caller(backend)(ask(lease, cap=30, used=12))
    assert (answer.granted[0].g, answer.granted[0].u) == (30, 12)


async def test_a_fill_leaves_a_marker_so_that_its_hash_can_be_missed(backend: Backend) -> None:
    lease = await month(backend)
    await backend.begin(1)
    state = await backend.touch()
    assert state is not None
    await backend.fill(state[0], lease, "dead", 8)
    assert await backend.open(state[0], REVISION, {CALLS: 100}, [lease])
    await backend.lose_quota(lease)
    assert (await Caller(backend)(ask(lease, min=1))).status is Status.LEARN


async def test_a_fill_keeps_units_that_a_register_holds_unspent(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    await Caller(backend)(ask(lease, min=30))
    await backend.relearn(pair.epoch, 2)
    assert await backend.fill(Pair(2, pair.run), lease, "one", 8)
    quota = await backend.quota(lease)
    assert quota is not None
    assert (quota.sum, quota.used) == (30, 8)


async def test_what_nobody_holds_of_a_register_is_freed_while_learning(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    await Caller(backend)(ask(lease, min=30))
    await Caller(backend, "two")(ask(lease, min=5))
    assert not await backend.release(pair, lease, "one"), "not while open"
    await backend.relearn(pair.epoch, 2)
    pair = Pair(2, pair.run)
    assert await backend.fill(pair, lease, "one", 8)
    assert not await backend.release(Pair(3, pair.run), lease, "one"), "another pair"
    assert await backend.release(pair, lease, "one")
    assert not await backend.release(pair, lease, "one"), "once"
    assert not await backend.release(pair, lease, "nobody")
    await Caller(backend, "two", 2)(ask(lease, cap=4, used=1))
    assert not await backend.release(pair, lease, "two"), "it said what it holds"
    quota = await backend.quota(lease)
    assert quota is not None
    assert (quota.sum, quota.used) == (12, 9)


async def test_a_closed_window_is_not_filled(backend: Backend) -> None:
    now_s = await backend.now_s()
    over = Lease(CALLS, "", now_s - 3_600, now_s - WINDOW_GRACE_S - 1, Terms(100))
    await backend.begin(1)
    state = await backend.touch()
    assert state is not None
    assert not await backend.fill(state[0], over, "dead", 8)


async def test_opening_late_under_an_old_pair_changes_nothing(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    await backend.relearn(pair.epoch, 2)
    assert not await backend.open(pair, REVISION, {CALLS: 500}, [lease])
    await backend.restart()
    assert not await backend.open(Pair(2, pair.run), REVISION, {CALLS: 500}, [lease]), "another server"
    mark = await backend.mark()
    assert mark is not None
    assert (mark.phase, mark.amounts) == ("learning", {CALLS: 100})


async def test_opening_twice_changes_nothing(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    assert not await backend.open(pair, REVISION + 1, {CALLS: 500}, [])


async def test_opening_does_not_bring_back_older_limits(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    await backend.relearn(pair.epoch, 2)
    await backend.publish_limits(REVISION + 1, {CALLS: 5})
    assert not await backend.open(Pair(2, pair.run), REVISION, {CALLS: 100}, [lease])
    assert await backend.open(Pair(2, pair.run), REVISION + 1, {CALLS: 5}, [lease])


async def test_a_wiped_server_learns_everything_anew(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=10))
    await backend.wipe()
    assert (await one(ask(lease, cap=10))).status is Status.LEARN
    assert await backend.begin(2)
    assert (await one(ask(lease, cap=10, used=3))).granted[0].g == 10


# Amounts


async def test_units_reach_to_the_last_one_a_double_can_count(backend: Backend) -> None:
    lease = await month(backend, amount=UNITS_MAX)
    await opened(backend, lease)
    one = Caller(backend)
    answer = await one(ask(lease, min=UNITS_MAX))
    assert answer.granted[0] == Granted(UNITS_MAX, UNITS_MAX, 0, UNITS_MAX, UNITS_MAX, 0, False)
    answer = await one(ask(lease, cap=UNITS_MAX, used=UNITS_MAX - 1))
    assert answer.granted[0] == Granted(UNITS_MAX, 0, UNITS_MAX - 1, UNITS_MAX, UNITS_MAX, UNITS_MAX - 1, False)
    assert (await Caller(backend, "two")(ask(lease, min=1))).granted[0].d == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"cap": 2**53},
        {"cap": -1},
        {"used": 1.5},
        {"reserved": 2**53 + 1},
        {"min": 0.25},
        {"want": 2**60},
        {"cap": UNITS_MAX, "used": UNITS_MAX, "reserved": 1},
    ],
)
async def test_amounts_that_are_no_units_are_refused_and_change_nothing(backend: Backend, bad: dict[str, int]) -> None:
    good, lease = await month(backend, SEATS), await month(backend)
    pair = await opened(backend, good, lease)
    one = Caller(backend)
    await one(ask(good, min=5), ask(lease, min=5))
    before = [await backend.quota(good), await backend.quota(lease)]
    call = SettleCall(TENANT, 99, pair, REVISION, (ask(good, cap=0), ask(lease, **bad)), 0)
    (answer,) = await one.send(call)
    assert isinstance(answer, CallRefused)
    assert "integers" in str(answer)
    assert [await backend.quota(good), await backend.quota(lease)] == before


async def test_a_sum_that_doubles_cannot_count_is_refused(backend: Backend) -> None:
    lease = await month(backend, amount=UNITS_MAX)
    pair = await opened(backend, lease)
    one, two = Caller(backend), Caller(backend, "two")
    await one(ask(lease, cap=UNITS_MAX - 5, used=1))
    assert (await two(ask(lease, cap=5))).granted[0].sum == UNITS_MAX
    (answer,) = await two.send(SettleCall(TENANT, 9, pair, REVISION, (ask(lease, cap=6),), 0))
    assert isinstance(answer, CallRefused)
    assert (await one(ask(lease, cap=1, used=1))).granted[0].sum == 6, "a return gets through"


async def test_a_soft_limit_leases_as_far_as_doubles_count(backend: Backend) -> None:
    now_s = await backend.now_s()
    lease = Lease(CALLS, "", now_s - 86_400, now_s + 86_400, Terms(UNITS_MAX, Kind.SOFT))
    await opened(backend, lease)
    one, used = Caller(backend), UNITS_MAX - 5

    def soft(cap: int, want: int, least: int) -> Ask:
        return Ask(lease, cap, min(cap, used), 0, want, least, UNITS_MAX, Kind.SOFT)

    assert (await one(soft(0, used, used))).granted[0].g == used
    assert (await one(soft(used, 100, 5))).granted[0].g == UNITS_MAX, "ahead of need, only what there is room for"
    short = (await one(soft(UNITS_MAX, 100, 1))).granted[0]
    assert (short.g, short.d, short.u) == (UNITS_MAX, 0, used), "short, as a hard limit is at its amount"
    kept = (await one(soft(UNITS_MAX, 100, 0))).granted[0]
    assert (kept.g, kept.d, kept.u) == (UNITS_MAX, 0, used), "and reports get through"


async def test_a_soft_limit_is_leased_past_its_amount_only_for_a_check_that_needs_it(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    assert (await one(softly(ask(lease, want=60, min=60)))).granted[0].g == 60
    ahead = (await one(softly(ask(lease, cap=60, used=60, want=90)))).granted[0]
    assert (ahead.d, ahead.sum) == (20, 80), "half of what remains, as of a hard limit"
    assert (await one(softly(ask(lease, cap=80, used=80, want=90, min=20)))).granted[0].d == 20
    assert (await one(softly(ask(lease, cap=100, used=100, want=90)))).granted[0].d == 0
    needed = (await one(softly(ask(lease, cap=100, used=100, want=90, min=1)))).granted[0]
    assert (needed.d, needed.sum) == (90, 190)


async def test_one_bad_call_of_several_does_not_spoil_the_others(backend: Backend) -> None:
    lease = await month(backend)
    pair = await opened(backend, lease)
    one = Caller(backend)
    bad = SettleCall(TENANT, 1, pair, REVISION, (ask(lease, cap=-1),), 0)
    good = SettleCall(TENANT, 2, pair, REVISION, (ask(lease, min=5),), 0)
    answers = await one.send(bad, good)
    assert isinstance(answers[0], CallRefused)
    assert isinstance(answers[1], SettleAnswer)
    assert answers[1].granted[0].g == 5


async def test_a_damaged_register_is_refused_by_name(real: RealBackend) -> None:
    lease = await month(real)
    pair = await opened(real, lease)
    one = Caller(real)
    await one(ask(lease, min=5))
    await real.damage(lease, "one")
    (answer,) = await one.store.settle([SettleCall(TENANT, 2, pair, REVISION, (ask(lease, min=5),), 0)], 1)
    assert isinstance(answer, CallRefused)
    assert "damaged" in str(answer)


# Transport


@pytest.mark.parametrize("calls", [1, 2, 300])
async def test_scripts_that_were_flushed_are_loaded_again(backend: Backend, calls: int) -> None:
    lease = await month(backend, amount=UNITS_MAX)
    pair = await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=1))
    await backend.forget_scripts()
    answers = await one.store.settle(
        [SettleCall(TENANT, op, pair, REVISION, (ask(lease, cap=1, used=1),), 0) for op in range(2, 2 + calls)], 1
    )
    assert [answer.op for answer in answers if isinstance(answer, SettleAnswer)] == list(range(2, 2 + calls))


async def test_nothing_to_settle_is_no_call(backend: Backend) -> None:
    assert await backend.store("one", 1).settle([], 1) == []


async def test_others_hear_a_recall_and_the_caller_does_not(backend: Backend) -> None:
    one, two = backend.store("one", 1), backend.store("two", 1)

    async def heard_by(store: object) -> tuple[str, list[str]]:
        async for recall in two.recalls() if store is two else one.recalls():
            return recall
        raise AssertionError("the channel ended")

    async with asyncio.timeout(WAIT_S_MAX):
        listening = [asyncio.create_task(heard_by(two)), asyncio.create_task(heard_by(one))]
        while not listening[0].done():
            await one.recall(TENANT, ["calls:monthly:0", "seats:monthly:0"])
            await asyncio.sleep(0.01)
        assert listening[0].result() == (TENANT, ["calls:monthly:0", "seats:monthly:0"])
        assert not listening[1].done()
        listening[1].cancel()
        await asyncio.gather(*listening, return_exceptions=True)


async def test_markers_of_older_programs_are_understood(real: RealBackend) -> None:
    # They had three fields, without what was said in learning.
    lease = await month(real)
    await opened(real, lease)
    await Caller(real)(ask(lease, min=5))
    await real.write_marker(lease, f"{lease.start}|{lease.end}|0")
    assert (await Caller(real, "two")(ask(lease, min=5))).granted[0].d >= 5
    await real.restart()
    state = await real.touch()
    assert state is not None
    assert not state[1]
    assert await real.fill(state[0], lease, "dead", 3)
    assert (await Caller(real, "three")(ask(lease, cap=2, used=1))).granted[0].g == 2
    await real.lose_quota(lease)
    assert not await real.open(state[0], 1, {CALLS: 100}, [lease])


# Soft limits


def softly(one: Ask) -> Ask:
    return one._replace(kind=Kind.SOFT)


async def test_a_soft_limit_is_leased_past_its_amount(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    first = (await one(softly(ask(lease, min=90)))).granted[0]
    assert (first.d, first.sum, first.wanted) == (90, 90, False)
    second = (await one(softly(ask(lease, cap=90, used=90, min=40)))).granted[0]
    assert (second.d, second.sum, second.amount) == (40, 130, 100)
    assert (await Caller(backend, "two")(ask(lease, min=1))).granted[0].d == 0, "hard, for whoever takes it so"


# Rates


async def share(backend: Backend) -> RateShare:
    terms = Terms(10_000, Kind.RATE, burst=10)
    return RateShare(LimitKey("calls:second.rate"), "", 0, FOREVER_S, terms)


def of_rate(lease: RateShare, *, cap: int = 0, want: int = 0, least: int = 0, known: bool = False) -> Ask:
    return Ask(lease, cap, 0, 0, max(want, least), least, lease.amount, Kind.RATE, known)


async def test_shares_never_sum_to_more_than_the_rate(backend: Backend) -> None:
    rate = await share(backend)
    await opened(backend, rate)
    one, two = Caller(backend), Caller(backend, "two")
    assert (await one(of_rate(rate, want=7_000, least=1_000))).granted[0].g == 7_000
    second = (await two(of_rate(rate, want=7_000, least=1_000))).granted[0]
    assert (second.g, second.sum, second.wanted) == (3_000, 10_000, True)
    third = (await Caller(backend, "three")(of_rate(rate, want=2_000, least=1_000))).granted[0]
    assert (third.g, third.wanted) == (0, True)
    assert (await one(of_rate(rate, cap=2_000, known=True))).granted[0].sum == 5_000
    assert (await two(of_rate(rate, cap=3_000, want=4_000, known=True))).granted[0].g == 7_000


async def test_a_share_that_ended_is_taken_back_and_not_raised_again(backend: Backend) -> None:
    rate = await share(backend)
    await opened(backend, rate)
    one, two = Caller(backend), Caller(backend, "two")
    await one(of_rate(rate, want=9_000, least=9_000))
    await backend.age(rate, "one", HOLD_S + HOLD_MARGIN_S + 1)
    assert (await two(of_rate(rate, want=8_000, least=8_000))).granted[0].g == 8_000
    late = (await one(of_rate(rate, cap=9_000, known=True))).granted[0]
    assert (late.g, late.sum) == (0, 8_000)


async def test_a_live_share_is_not_taken_back(backend: Backend) -> None:
    rate = await share(backend)
    await opened(backend, rate)
    await Caller(backend)(of_rate(rate, want=9_000, least=9_000))
    await backend.age(rate, "one", HOLD_S)
    assert (await Caller(backend, "two")(of_rate(rate, want=8_000, least=8_000))).granted[0].g == 0


# Retiring, and what is left of a register


async def test_what_a_retired_sidecar_spent_is_counted_in_the_base(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=40))
    before = await one(ask(lease, cap=25, used=25))
    final = await one(ask(lease, cap=25, used=25)._replace(known=True), retiring=True)
    assert final.status is Status.OK
    quota = await backend.quota(lease)
    assert quota is not None
    assert (quota.base, quota.sum, quota.used) == (25, 25, 25)
    assert (await one(ask(lease, cap=25, used=25)._replace(known=True), op=final.op, retiring=True)).status is Status.OK
    # An earlier call that arrives late brings nothing back.
    assert (await one(ask(lease, cap=25, used=25), op=before.op)).status is Status.SEALED
    assert await backend.quota(lease) == quota
    assert (await Caller(backend, "two")(ask(lease, min=75))).granted[0].d == 75


async def test_a_reservation_keeps_its_register_when_the_sidecar_retires(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=10))
    await one(ask(lease, cap=7, used=3, reserved=4)._replace(known=True), retiring=True)
    quota = await backend.quota(lease)
    assert quota is not None
    assert (quota.base, quota.registers["one"].granted, quota.registers["one"].reserved) == (0, 7, 4)


async def test_a_register_that_must_be_there_was_sealed(backend: Backend) -> None:
    lease = await month(backend)
    await opened(backend, lease)
    one = Caller(backend)
    await one(ask(lease, min=10))
    await backend.fold(lease, "one", 4)  # and its tombstone was swept
    assert (await one(ask(lease, cap=4, used=4)._replace(known=True))).status is Status.SEALED
    quota = await backend.quota(lease)
    assert quota is not None
    assert quota.sum == 4, "not counted twice"
