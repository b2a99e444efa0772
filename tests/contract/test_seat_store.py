"""What ``seats.lua`` promises, over the model and over real Lua on a real Valkey."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from licet.domain.catalog import seats_key
from licet.wire.registers import Pair
from licet_sidecar.core.seats import (
    KEPT_MS,
    NOT_SAID,
    Result,
    SeatAnswer,
    SeatAsk,
    SeatCall,
    SeatStatus,
    Verb,
    Who,
    holder_digest,
)
from tests.support.seat_backends import TENANT, FakeSeatBackend, RealSeatBackend, SeatBackend, real_seat_backend
from tests.support.valkey import ValkeyProcess

EDITOR = "editor"
REVISION = 7
ADA, BOB, EVE = (holder_digest("user", name) for name in ("ada", "bob", "eve"))
WHO = Who("user", "ad|a\x00ü", "", "editor.open", 60_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    process = ValkeyProcess(tmp_path_factory.mktemp("valkey"))
    process.start()
    yield process
    process.kill()


@pytest.fixture(params=["model", "valkey"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[SeatBackend]:
    if request.param == "model":
        yield FakeSeatBackend()
    else:
        async with real_seat_backend(request.getfixturevalue("server")) as real:
            yield real


@pytest.fixture
async def real(server: ValkeyProcess) -> AsyncIterator[RealSeatBackend]:
    async with real_seat_backend(server) as backend:
        yield backend


class Caller:
    """A sidecar that says exactly what a test tells it to."""

    def __init__(self, backend: SeatBackend, name: str = "one", incarnation: int = 1) -> None:
        self.backend = backend
        self.store = backend.store(name, incarnation)
        self.incarnation = incarnation
        self.op = 0

    async def call(self, *asks: SeatAsk, op: int = 0, pair: Pair | None = None, revision: int = REVISION) -> SeatAnswer:
        """One call under the mark's pair; ``op`` repeats an earlier one."""
        if pair is None:
            state = await self.backend.touch()
            pair = state[0] if state else Pair(0, "")
        self.op = max(self.op + 1, op)
        (answer,) = await self.store.call([SeatCall(TENANT, op or self.op, pair, revision, asks, 0)])
        if isinstance(answer, Exception):
            raise answer
        assert (answer.incarnation, answer.op) == (self.incarnation, op or self.op)
        return answer

    async def __call__(self, verb: Verb, holder: str = ADA, *, op: int = 0, seats: int = 2) -> Result:
        """One ask, and what it came to."""
        answer = await self.call(SeatAsk(verb, EDITOR, holder, WHO, seats), op=op)
        assert answer.status is SeatStatus.OK
        return answer.results[0][0]


async def opened(backend: SeatBackend, seats: int = 2, *, epoch: int = 1) -> Pair:
    """A mark that is open, with so many seats of the editor."""
    await backend.begin(epoch)
    state = await backend.touch()
    assert state is not None
    assert await backend.open(state[0], REVISION, {seats_key(EDITOR): seats})
    return state[0]


async def test_gives_as_many_seats_as_there_are(backend: SeatBackend) -> None:
    await opened(backend)
    one, two = Caller(backend), Caller(backend, "two")
    assert await one(Verb.ACQUIRE, ADA) is Result.HELD
    assert await two(Verb.ACQUIRE, BOB) is Result.HELD
    assert await one(Verb.ACQUIRE, EVE) is Result.FULL
    assert await backend.holders(EDITOR) == {ADA, BOB}


async def test_answers_with_seats_holders_and_the_first_end(backend: SeatBackend) -> None:
    await opened(backend)
    answer = await Caller(backend).call(SeatAsk(Verb.ACQUIRE, EDITOR, ADA, WHO, 2))
    room = answer.room[EDITOR]
    assert (room.seats, room.taken) == (2, 1)
    assert KEPT_MS - 5_000 < room.ends_in_ms <= KEPT_MS


async def test_many_asks_in_one_call_share_the_seats_in_their_order(backend: SeatBackend) -> None:
    await opened(backend)
    asks = [SeatAsk(Verb.ACQUIRE, EDITOR, holder, WHO, 2) for holder in (ADA, BOB, EVE, ADA)]
    answer = await Caller(backend).call(*asks, SeatAsk(Verb.ACQUIRE, "other", ADA, WHO))
    assert [result for result, _ in answer.results] == [
        Result.HELD, Result.HELD, Result.FULL, Result.HELD, Result.FULL,
    ]  # fmt: skip
    assert answer.room["other"].seats == 0


async def test_the_same_holder_has_one_seat_wherever_it_asks(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one, two = Caller(backend), Caller(backend, "two")
    assert await one(Verb.ACQUIRE) is Result.HELD
    assert await one(Verb.ACQUIRE) is Result.HELD
    assert await two(Verb.ACQUIRE) is Result.HELD
    assert await one(Verb.RENEW) is Result.MOVED
    assert await two(Verb.RENEW) is Result.HELD
    assert await backend.holders(EDITOR) == {ADA}


async def test_whose_a_seat_is_comes_with_it(backend: SeatBackend) -> None:
    await opened(backend)
    await Caller(backend)(Verb.ACQUIRE)
    answer = await Caller(backend, "two").call(SeatAsk(Verb.TAKE, EDITOR, ADA))
    assert answer.results == ((Result.HELD, WHO),)
    assert (await Caller(backend, "two").call(SeatAsk(Verb.TAKE, EDITOR, EVE))).results == ((Result.GONE, NOT_SAID),)


async def test_a_hold_that_is_not_renewed_ends_and_its_seat_is_free(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one, two = Caller(backend), Caller(backend, "two")
    await one(Verb.ACQUIRE, ADA)
    await backend.expire(EDITOR, ADA)
    assert await one(Verb.RENEW, ADA) is Result.GONE
    assert await one(Verb.ASSERT, ADA) is Result.GONE
    assert await two(Verb.ACQUIRE, BOB) is Result.HELD
    assert await one(Verb.ACQUIRE, ADA) is Result.FULL


async def test_a_renewal_lengthens_the_hold_and_an_older_one_does_not_shorten_it(backend: SeatBackend) -> None:
    await opened(backend)
    one = Caller(backend)
    await one(Verb.ACQUIRE)
    await backend.expire(EDITOR, ADA, in_ms=1_000)
    assert await one(Verb.RENEW) is Result.HELD
    assert await backend.ends_in_ms(EDITOR, ADA) > KEPT_MS - 5_000
    await backend.expire(EDITOR, ADA, in_ms=10 * KEPT_MS)
    assert await one(Verb.RENEW) is Result.HELD
    assert await backend.ends_in_ms(EDITOR, ADA) > 9 * KEPT_MS


async def test_release_frees_the_seat_at_once(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one = Caller(backend)
    await one(Verb.ACQUIRE, ADA)
    assert await one(Verb.RELEASE, ADA) is Result.RELEASED
    assert await one(Verb.RELEASE, ADA) is Result.GONE
    assert await one(Verb.RENEW, ADA) is Result.GONE
    assert await one(Verb.ACQUIRE, BOB) is Result.HELD


async def test_a_sidecar_releases_only_what_it_answers_for(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one, two = Caller(backend), Caller(backend, "two")
    await one(Verb.ACQUIRE)
    assert await two(Verb.RELEASE) is Result.MOVED
    assert await backend.holders(EDITOR) == {ADA}


async def test_a_late_release_does_not_take_a_seat_that_was_acquired_since(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one = Caller(backend)
    await one(Verb.ACQUIRE)  # 1
    await one(Verb.RELEASE)  # 2
    await one(Verb.ACQUIRE)  # 3
    assert await one(Verb.RELEASE, op=2) is Result.FENCED
    assert await one(Verb.RENEW, op=1) is Result.FENCED
    assert await backend.holders(EDITOR) == {ADA}
    assert await Caller(backend, incarnation=2)(Verb.RELEASE) is Result.RELEASED


async def test_a_released_seat_counts_until_the_sidecar_it_moved_from_has_heard(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one, two = Caller(backend), Caller(backend, "two")
    await one(Verb.ACQUIRE, ADA)
    assert await two(Verb.TAKE, ADA) is Result.HELD
    assert await two(Verb.RELEASE, ADA) is Result.RELEASED
    assert await two(Verb.ACQUIRE, BOB) is Result.FULL  # one may be telling ada at this moment that she holds it
    assert await two(Verb.TAKE, ADA) is Result.GONE
    assert await one(Verb.ASSERT, ADA) is Result.MOVED
    assert await one(Verb.RELEASE, ADA) is Result.RELEASED
    assert await two(Verb.ACQUIRE, BOB) is Result.HELD


async def test_the_holder_of_a_released_seat_that_counts_still_may_have_it_again(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one, two = Caller(backend), Caller(backend, "two")
    await one(Verb.ACQUIRE)
    await two(Verb.TAKE)
    await two(Verb.RELEASE)
    assert await two(Verb.LOOK) is Result.FREE
    assert await two(Verb.ACQUIRE) is Result.HELD
    assert await backend.holders(EDITOR) == {ADA}


async def test_a_moved_seat_is_free_at_once_when_the_other_sidecar_has_heard(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one, two = Caller(backend), Caller(backend, "two")
    await one(Verb.ACQUIRE, ADA)
    await two(Verb.TAKE, ADA)
    assert await one(Verb.RELEASE, ADA, op=1) is Result.MOVED  # from before it moved
    assert await one(Verb.RELEASE, ADA) is Result.MOVED
    assert await two(Verb.RELEASE, ADA) is Result.RELEASED
    assert await one(Verb.ACQUIRE, BOB) is Result.HELD


async def test_a_seat_that_moved_on_and_on_counts_until_the_last_hold_is_over(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one, two, three = Caller(backend), Caller(backend, "two"), Caller(backend, "three")
    await one(Verb.ACQUIRE, ADA)
    await two(Verb.TAKE, ADA)
    await three(Verb.TAKE, ADA)
    assert await one(Verb.RELEASE, ADA) is Result.MOVED
    assert await three(Verb.RELEASE, ADA) is Result.RELEASED
    assert await two(Verb.RELEASE, ADA) is Result.MOVED
    assert await three(Verb.ACQUIRE, BOB) is Result.FULL
    await backend.expire(EDITOR, ADA)
    assert await three(Verb.ACQUIRE, BOB) is Result.HELD


async def test_looking_writes_nothing(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one = Caller(backend)
    assert await one(Verb.LOOK, ADA) is Result.FREE
    assert await backend.holders(EDITOR) is None
    await one(Verb.ACQUIRE, ADA)
    assert await Caller(backend, "two")(Verb.LOOK, ADA) is Result.HELD
    assert await one(Verb.LOOK, BOB) is Result.FULL
    assert await one(Verb.RENEW, ADA) is Result.HELD


async def test_fewer_seats_leave_holders_theirs_and_admit_nobody(backend: SeatBackend) -> None:
    await opened(backend, 2)
    one = Caller(backend)
    await one(Verb.ACQUIRE, ADA)
    await one(Verb.ACQUIRE, BOB)
    await backend.publish(REVISION + 1, {seats_key(EDITOR): 1})
    assert await one(Verb.RENEW, BOB) is Result.HELD
    await one(Verb.RELEASE, ADA)
    assert await one(Verb.ACQUIRE, ADA) is Result.FULL
    await one(Verb.RELEASE, BOB)
    assert await one(Verb.ACQUIRE, ADA) is Result.HELD


async def test_no_seats_without_a_number_of_them(backend: SeatBackend) -> None:
    await opened(backend)
    await backend.publish(REVISION + 1, {})
    assert await Caller(backend)(Verb.ACQUIRE) is Result.FULL


async def test_nobody_new_while_the_mark_is_older_than_the_caller_and_says_otherwise(backend: SeatBackend) -> None:
    await opened(backend)
    one = Caller(backend)
    newer = SeatAsk(Verb.ACQUIRE, EDITOR, ADA, WHO, 1)
    assert (await one.call(newer, revision=REVISION + 1)).results[0][0] is Result.UNPUBLISHED
    assert (await one.call(newer._replace(seats=2), revision=REVISION + 1)).results[0][0] is Result.HELD
    assert (await one.call(newer, revision=REVISION + 1)).results[0][0] is Result.HELD  # has it already


async def test_a_call_under_another_pair_is_told_the_present_one(backend: SeatBackend) -> None:
    assert (await Caller(backend).call(SeatAsk(Verb.ACQUIRE, EDITOR, ADA))).status is SeatStatus.LEARN
    pair = await opened(backend)
    answer = await Caller(backend).call(SeatAsk(Verb.ACQUIRE, EDITOR, ADA), pair=Pair(0, ""))
    assert (answer.status, answer.pair, answer.phase) == (SeatStatus.STALE, pair, "open")


async def test_while_learning_only_what_is_asserted_is_held(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one = Caller(backend)
    await one(Verb.ACQUIRE, ADA)
    await backend.wipe()
    await backend.begin(2)
    assert await one(Verb.ACQUIRE, ADA) is Result.LEARNING
    assert await one(Verb.RENEW, ADA) is Result.LEARNING
    assert await one(Verb.TAKE, ADA) is Result.LEARNING
    assert await one(Verb.ASSERT, ADA) is Result.HELD
    assert await Caller(backend, "two")(Verb.ASSERT, BOB) is Result.HELD  # past the number
    assert await one(Verb.RENEW, ADA) is Result.HELD
    assert await one(Verb.ACQUIRE, EVE) is Result.LEARNING
    await opened(backend, 2, epoch=2)
    assert await one(Verb.ACQUIRE, EVE) is Result.FULL


async def test_another_run_of_the_server_begins_learning(backend: SeatBackend) -> None:
    before = await opened(backend, 2)
    one = Caller(backend)
    await one(Verb.ACQUIRE, ADA)
    await backend.restart()
    answer = await one.call(SeatAsk(Verb.ACQUIRE, EDITOR, BOB, WHO, 2), pair=before)
    assert (answer.status, answer.phase) == (SeatStatus.STALE, "learning")
    assert answer.pair != before
    assert await one(Verb.ACQUIRE, BOB) is Result.LEARNING
    for verb in (Verb.RENEW, Verb.TAKE, Verb.ACQUIRE, Verb.LOOK):
        assert await one(verb, ADA) is Result.LEARNING  # a failover may have brought her back
    assert await one(Verb.ASSERT, ADA) is Result.HELD
    assert await Caller(backend, "two")(Verb.TAKE, ADA) is Result.HELD


async def test_who_was_not_asserted_since_a_loss_counts_and_has_a_seat_only_if_there_is_one_for_each(
    backend: SeatBackend,
) -> None:
    await opened(backend, 1)
    one, two = Caller(backend), Caller(backend, "two")
    await one(Verb.ACQUIRE, ADA)
    await backend.restart()
    assert await two(Verb.ASSERT, BOB) is Result.HELD  # the server, say, is a replica that knows an older state
    await opened(backend, 1)
    for verb, result in (
        (Verb.RENEW, Result.GONE), (Verb.TAKE, Result.GONE), (Verb.ACQUIRE, Result.FULL), (Verb.LOOK, Result.FULL),
    ):  # fmt: skip
        assert await one(verb, ADA) is result
    assert await two(Verb.RELEASE, BOB) is Result.RELEASED
    assert await one(Verb.RENEW, ADA) is Result.HELD


async def test_a_set_that_is_missing_although_it_was_made_is_a_loss(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one = Caller(backend)
    await one(Verb.ACQUIRE, ADA)
    await backend.lose_set(EDITOR)
    for verb in Verb:
        assert await one(verb, BOB) is Result.LOST
    answer = await one.call(SeatAsk(Verb.RENEW, EDITOR, ADA, WHO), SeatAsk(Verb.TAKE, "other", ADA, WHO))
    assert [result for result, _ in answer.results] == [Result.LOST, Result.GONE]


async def test_a_lost_set_is_made_again_while_learning_but_only_once(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one = Caller(backend)
    await one(Verb.ACQUIRE, ADA)
    await backend.lose_set(EDITOR)
    await backend.relearn(1, 2)
    assert await one(Verb.ACQUIRE, BOB) is Result.LEARNING  # the set is there again, and empty
    assert await one(Verb.ASSERT, ADA) is Result.HELD
    await backend.lose_set(EDITOR)
    assert await one(Verb.ASSERT, ADA) is Result.LOST
    await backend.relearn(2, 3)
    assert await one(Verb.ASSERT, ADA) is Result.HELD
    await opened(backend, 1, epoch=3)
    assert await one(Verb.ACQUIRE, BOB) is Result.FULL


async def test_a_set_is_empty_after_its_last_holder_and_no_loss(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one = Caller(backend)
    await one(Verb.ACQUIRE, ADA)
    await one(Verb.RELEASE, ADA)
    assert await backend.holders(EDITOR) == set()
    assert await one(Verb.ACQUIRE, BOB) is Result.HELD


async def test_an_assertion_moves_the_seat_while_learning(backend: SeatBackend) -> None:
    await opened(backend, 1)
    one, two = Caller(backend), Caller(backend, "two")
    await one(Verb.ACQUIRE)
    await backend.restart()
    assert await two(Verb.ASSERT) is Result.HELD
    assert await two(Verb.RELEASE) is Result.RELEASED
    await opened(backend, 1)
    assert await two(Verb.ACQUIRE, BOB) is Result.FULL  # one has not said yet that it does not answer for ada


# Only the real one


async def test_scripts_that_were_flushed_are_sent_again(real: RealSeatBackend) -> None:
    await opened(real)
    one = Caller(real)
    await one(Verb.ACQUIRE)
    await real.forget_scripts()
    assert await one(Verb.RENEW) is Result.HELD


async def test_a_damaged_record_is_nobodys(real: RealSeatBackend) -> None:
    await opened(real, 1)
    await Caller(real)(Verb.ACQUIRE)
    await real.damage(EDITOR, ADA)
    two = Caller(real, "two")
    assert await two(Verb.RENEW) is Result.HELD
    assert await two(Verb.ACQUIRE, BOB) is Result.FULL


async def test_expired_holders_are_removed(real: RealSeatBackend) -> None:
    await opened(real, 2)
    one = Caller(real)
    await one(Verb.ACQUIRE, ADA)
    await real.expire(EDITOR, ADA)
    await one(Verb.ACQUIRE, BOB)
    assert await real.raw_members(EDITOR) == ({"*", BOB}, {BOB})
