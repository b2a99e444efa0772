"""The core of seats, rule by rule."""

from __future__ import annotations

import pytest

from licet.wire.registers import Pair
from licet_sidecar.core.seats import (
    ASKS_PER_CALL_MAX,
    ENDED_KEPT_MS,
    HOLD_MS,
    KEPT_MS,
    RENEW_MS,
    ChangeKind,
    Ending,
    Result,
    Seat,
    SeatAnswer,
    SeatAsk,
    SeatBook,
    SeatCall,
    SeatEnd,
    SeatStatus,
    TenantSeats,
    Verb,
    Who,
    holder_digest,
    split_seat_id,
)

NOW_MS = 1_000_000
HEARTBEAT_MS = 60_000
PAIR = Pair(1, "run")
WHO = Who("user", "ada", "", "editor.open", HEARTBEAT_MS)
ADA, BOB = holder_digest("user", "ada"), holder_digest("user", "bob")
SEAT_ID = f"editor:{ADA}"


def ok(call: SeatCall, *results: Result) -> SeatAnswer:
    return SeatAnswer(
        SeatStatus.OK, 1, call.op, PAIR, "open", {}, tuple((result, WHO) for result in results or [Result.HELD])
    )


def begun(book: SeatBook, held: TenantSeats, at_ms: int = NOW_MS) -> SeatCall:
    call = book.begin_call(held, revision=1, boot_ms=at_ms)
    assert call is not None
    return call


def ended(book: SeatBook, held: TenantSeats, call: SeatCall, answer: SeatAnswer, at_ms: int = NOW_MS) -> SeatEnd:
    end = book.end_call(held, call, answer, at_ms)
    assert end is not None
    return end


def acquired(book: SeatBook, *, sent_ms: int = NOW_MS, answered_ms: int = NOW_MS) -> tuple[TenantSeats, Seat]:
    held = book.of("acme")
    book.want(held, SeatAsk(Verb.ACQUIRE, "editor", ADA, WHO, 1))
    call = begun(book, held, sent_ms)
    ended(book, held, call, ok(call), answered_ms)
    return held, held.seats[SEAT_ID]


def test_answers_until_the_hold_is_over_counted_from_when_the_call_was_sent() -> None:
    book = SeatBook(1)
    _, seat = acquired(book, sent_ms=NOW_MS, answered_ms=NOW_MS + 900)
    assert book.vouches(seat, NOW_MS + HOLD_MS - 1)
    assert not book.vouches(seat, NOW_MS + HOLD_MS)
    assert book.held(NOW_MS) == 1


def test_a_release_ends_the_answering_before_it_is_sent() -> None:
    book = SeatBook(1)
    held, seat = acquired(book)
    book.end(seat, Ending.RELEASED, NOW_MS)
    assert book.find("acme", SEAT_ID) is None
    call = begun(book, held)
    assert [(ask.verb, ask.holder) for ask in call.asks] == [(Verb.RELEASE, ADA)]
    ended(book, held, call, ok(call, Result.RELEASED))
    assert not held.leaving
    assert book.ended("acme", SEAT_ID) is Ending.RELEASED


def test_an_answer_that_comes_after_the_end_brings_nothing_back() -> None:
    book = SeatBook(1)
    held, seat = acquired(book)
    renewal = begun(book, held, NOW_MS + RENEW_MS)
    book.end(seat, Ending.RELEASED, NOW_MS + RENEW_MS)
    assert ended(book, held, renewal, ok(renewal)).changes == []
    assert book.find("acme", SEAT_ID) is None
    assert begun(book, held, NOW_MS + RENEW_MS).asks[0].verb is Verb.RELEASE


def test_only_what_is_answered_for_is_asserted() -> None:
    book = SeatBook(1)
    held, _ = acquired(book)
    renewal = begun(book, held, NOW_MS + RENEW_MS)
    assert renewal.asks[0].verb is Verb.ASSERT
    book.abandon_call(held, renewal)
    assert begun(book, held, NOW_MS + HOLD_MS).asks[0].verb is Verb.RENEW
    restarted = SeatBook(2)
    restarted.restore(Seat("acme", "editor", ADA, WHO, NOW_MS), NOW_MS)
    assert begun(restarted, restarted.of("acme")).asks[0].verb is Verb.RENEW


def test_one_call_a_tenant_at_a_time_and_each_has_a_new_number() -> None:
    book = SeatBook(1)
    held, _ = acquired(book)
    first = begun(book, held, NOW_MS + RENEW_MS)
    assert book.begin_call(held, revision=1, boot_ms=NOW_MS + RENEW_MS) is None
    book.abandon_call(held, first)
    second = begun(book, held, NOW_MS + RENEW_MS)
    assert second.op == first.op + 1
    assert book.end_call(held, second, ok(first), NOW_MS) is None
    assert book.end_call(held, first, ok(first), NOW_MS) is None


def test_a_holder_that_is_silent_for_two_heartbeats_is_reclaimed_and_not_before() -> None:
    book = SeatBook(1)
    held, seat = acquired(book)
    seat.lapses_ms = NOW_MS + 10 * HEARTBEAT_MS
    assert book.tick(held, NOW_MS + 2 * HEARTBEAT_MS - 1) == []
    book.hear(seat, NOW_MS + HEARTBEAT_MS)
    assert book.tick(held, NOW_MS + 2 * HEARTBEAT_MS) == []
    (change,) = book.tick(held, NOW_MS + 3 * HEARTBEAT_MS)
    assert (change.kind, change.seat) == (ChangeKind.RECLAIMED, seat)
    assert SEAT_ID in held.leaving


def test_a_hold_that_lapses_is_reclaimed_once_and_may_be_regained() -> None:
    book = SeatBook(1)
    held, seat = acquired(book)
    assert [change.kind for change in book.tick(held, NOW_MS + HOLD_MS)] == [ChangeKind.RECLAIMED]
    assert book.tick(held, NOW_MS + HOLD_MS + 1) == []
    call = begun(book, held, NOW_MS + HOLD_MS)
    assert [change.kind for change in ended(book, held, call, ok(call)).changes] == [ChangeKind.REGAINED]
    assert book.vouches(seat, NOW_MS + HOLD_MS)


@pytest.mark.parametrize(
    ("result", "kind", "leaving"),
    [(Result.GONE, ChangeKind.RECLAIMED, False), (Result.MOVED, ChangeKind.FORGOTTEN, True)],
)
def test_a_seat_that_redis_does_not_have_here_is_forgotten(result: Result, kind: ChangeKind, leaving: bool) -> None:
    book = SeatBook(1)
    held, _ = acquired(book)
    call = begun(book, held, NOW_MS + RENEW_MS)
    assert [change.kind for change in ended(book, held, call, ok(call, result)).changes] == [kind]
    assert not held.seats
    assert (SEAT_ID in held.leaving) is leaving  # of a move Redis is told that it was heard of


@pytest.mark.parametrize("result", [Result.LEARNING, Result.UNPUBLISHED, Result.LOST, Result.FENCED])
def test_a_result_that_decides_nothing_changes_nothing(result: Result) -> None:
    book = SeatBook(1)
    held, seat = acquired(book)
    until_ms = seat.hold_until_ms
    call = begun(book, held, NOW_MS + RENEW_MS)
    assert ended(book, held, call, ok(call, result)).changes == []
    assert held.seats[SEAT_ID].hold_until_ms == until_ms


def test_a_call_that_is_turned_away_is_made_again_under_the_pair_that_was_told() -> None:
    book = SeatBook(1)
    held = book.of("acme")
    book.want(held, SeatAsk(Verb.ACQUIRE, "editor", ADA, WHO, 1))
    call = begun(book, held)
    assert ended(book, held, call, SeatAnswer(SeatStatus.STALE, 1, call.op, PAIR, "open")).again
    again = begun(book, held)
    assert (again.pair, again.asks) == (PAIR, call.asks)
    assert not ended(book, held, again, SeatAnswer(SeatStatus.STALE, 1, again.op, PAIR, "learning")).again
    assert held.why == "learning"


def test_what_is_doubted_is_unasserted_until_a_later_call_is_answered() -> None:
    book = SeatBook(1)
    held, _ = acquired(book)
    early = begun(book, held, NOW_MS + RENEW_MS)
    book.doubt()
    assert book.unasserted(NOW_MS) == ["acme"]
    ended(book, held, early, ok(early))
    assert book.unasserted(NOW_MS) == ["acme"]  # it may have been run before the loss
    later = begun(book, held)
    ended(book, held, later, ok(later))
    assert book.unasserted(NOW_MS) == []


def test_renewals_are_due_every_twenty_seconds_and_younger_seats_go_along() -> None:
    book = SeatBook(1)
    held, _ = acquired(book)
    book.want(held, SeatAsk(Verb.ACQUIRE, "editor", BOB, WHO, 2))
    call = begun(book, held, NOW_MS + RENEW_MS // 2 - 1)
    assert len(call.asks) == 1  # too young to go along
    ended(book, held, call, ok(call))
    assert not book.is_due(held, NOW_MS + RENEW_MS - 1)
    assert book.is_due(held, NOW_MS + RENEW_MS)
    assert len(begun(book, held, NOW_MS + RENEW_MS).asks) == 2


def test_a_call_has_a_bound_and_the_oldest_come_first() -> None:
    book = SeatBook(1)
    held = book.of("acme")
    for number in range(ASKS_PER_CALL_MAX + 5):
        seat = Seat("acme", "editor", holder_digest("", str(number)), WHO, NOW_MS)
        seat.asked_ms = number + 1
        held.seats[seat.id] = seat
    asks = begun(book, held).asks
    assert len(asks) == ASKS_PER_CALL_MAX
    assert asks[0].holder == holder_digest("", "0")


def test_what_is_over_is_forgotten_in_the_end() -> None:
    book = SeatBook(1)
    held, seat = acquired(book)
    book.end(seat, Ending.RELEASED, NOW_MS)
    book.tick(held, NOW_MS + KEPT_MS)  # Redis could not be told, and has let it go by itself
    book.tidy(NOW_MS + KEPT_MS)
    assert not book.tenants
    assert book.ended("acme", SEAT_ID) is Ending.RELEASED
    book.tidy(NOW_MS + ENDED_KEPT_MS)
    assert book.ended("acme", SEAT_ID) is None


def test_holders_with_like_names_differ_and_ids_tell_their_parts() -> None:
    assert holder_digest("a", "bc") != holder_digest("ab", "c")
    assert split_seat_id(f"llm.chat:{ADA}") == ("llm.chat", ADA)
    for wrong in ("", ADA, f":{ADA}", f"Editor:{ADA}", f"editor:{ADA[:-1]}", f"{'e' * 129}:{ADA}", f"editor:{ADA}\n"):
        assert split_seat_id(wrong) is None
