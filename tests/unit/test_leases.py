"""The lease book: what it must not forget, and whom it must still tell."""

from __future__ import annotations

import pytest

from licet.domain.ids import LimitKey
from licet.wire.registers import WINDOW_GRACE_S, Pair
from licet_sidecar.core.lease import Lease, Terms
from licet_sidecar.core.leases import QUOTAS_PER_BULK_CALL_MAX, QUOTAS_PER_CALL_MAX, LeaseBook, TenantLeases
from licet_sidecar.core.settling import Granted, Outcome, SettleAnswer, SettleCall, Status

TENANT = "acme"
CALLS = LimitKey("calls:minute")
PAIR = Pair(1, "run1")
START_S = 1_800_000_000
BOOT_MS = 50_000


@pytest.fixture
def book() -> LeaseBook:
    return LeaseBook(1)


def answered(
    call: SettleCall, status: Status = Status.OK, *, about: int = -1, redis_s: float = START_S
) -> SettleAnswer:
    """Grants what was asked."""
    granted = tuple(
        Granted(ask.cap + ask.min, ask.min, ask.used, ask.amount, ask.cap + ask.min, ask.used, False)
        for ask in call.asks
    )
    ok = status is Status.OK
    return SettleAnswer(status, 1, call.op, PAIR, "open", int(redis_s * 1_000), granted if ok else (), about)


def leased(book: LeaseBook, units: int, *, window: int = 0, boot_ms: int = BOOT_MS) -> tuple[TenantLeases, Lease]:
    """A lease of a window of a minute, with so many units."""
    held = book.of(TENANT)
    start = START_S + 60 * window
    lease = book.lease(held, CALLS, "", start, start + 60, Terms(1_000), BOOT_MS)
    book.need(held, lease, units)
    call = begun(book, held, boot_ms=boot_ms)
    assert book.end_call(held, call, answered(call), boot_ms) is Outcome.SETTLED
    return held, lease


def begun(book: LeaseBook, held: TenantLeases, *, boot_ms: int = BOOT_MS) -> SettleCall:
    call = book.begin_call(held, revision=1, boot_ms=boot_ms)
    assert call is not None
    return call


def test_remembers_what_it_spent_when_the_wall_clock_steps_back_over_a_windows_end(book: LeaseBook) -> None:
    held, lease = leased(book, 10)
    book.spend(lease, 7, BOOT_MS)
    later = book.lease(held, CALLS, "", START_S + 60, START_S + 120, Terms(1_000), BOOT_MS)
    book.tick(held, START_S + 61, BOOT_MS + 5_000, 1.0)
    assert later is not lease
    assert book.lease(held, CALLS, "", START_S, START_S + 60, Terms(1_000), BOOT_MS) is lease
    assert lease.used == 7
    assert book.lease(held, CALLS, "", START_S + 60, START_S + 120, Terms(1_000), BOOT_MS).used == 0


def test_drops_an_ended_window_when_redis_takes_no_more_calls_for_it(book: LeaseBook) -> None:
    held, _ = leased(book, 10)
    open_ms = BOOT_MS + (60 + WINDOW_GRACE_S) * 1_000 - 1
    book.tick(held, START_S + 1_000, open_ms, 1.0)
    assert held.holds_units
    book.tick(held, START_S + 1_000, open_ms + 1, 1.0)
    assert not list(held.all())


def test_takes_up_the_leases_of_two_windows_after_a_restart() -> None:
    book = LeaseBook(2)
    for window, used in ((1, 1), (0, 7)):
        start = START_S + 60 * window
        lease = Lease(CALLS, "", start, start + 60, Terms(1_000))
        lease.cap, lease.used = 10, used
        book.restore(TENANT, lease, BOOT_MS)
    held = book.of(TENANT)
    assert book.lease(held, CALLS, "", START_S, START_S + 60, Terms(1_000), BOOT_MS).used == 7
    assert book.lease(held, CALLS, "", START_S + 60, START_S + 120, Terms(1_000), BOOT_MS).used == 1


def test_a_restored_lease_is_not_spent_before_a_call_was_answered() -> None:
    book = LeaseBook(2)
    lease = Lease(CALLS, "", START_S, START_S + 60, Terms(1_000))
    lease.cap = 10
    book.restore(TENANT, lease, BOOT_MS)
    assert not book.can_spend(lease, 1, BOOT_MS)
    call = begun(book, book.of(TENANT))
    answer = SettleAnswer(
        Status.OK, 2, call.op, PAIR, "open", START_S * 1_000, (Granted(10, 0, 0, 1_000, 10, 0, False),)
    )
    book.end_call(book.of(TENANT), call, answer, BOOT_MS)
    assert book.can_spend(lease, 1, BOOT_MS)


@pytest.mark.parametrize("status", [Status.CLOSED, Status.LEARN, Status.STALE, Status.UNPUBLISHED, Status.OUTDATED])
def test_says_what_it_holds_after_a_call_was_refused_that_may_have_been_granted_before(
    book: LeaseBook, status: Status
) -> None:
    # The first sending was granted and its answer lost; the second is refused, because another window of it closed.
    held, _ = leased(book, 1)
    later = book.lease(held, CALLS, "", START_S + 60, START_S + 120, Terms(1_000), BOOT_MS)
    book.need(held, later, 5)
    call = begun(book, held)
    about = next(position for position, ask in enumerate(call.asks) if ask.lease is not later)
    book.end_call(held, call, answered(call, status, about=about), BOOT_MS)
    assert later.cap == 0
    assert book.tick(held, START_S + 61, BOOT_MS + 1_000, 1.0), "a call is due"
    assert later in [ask.lease for ask in begun(book, held).asks]


def test_a_check_in_a_window_that_redis_has_closed_meets_the_clock(book: LeaseBook) -> None:
    held = book.of(TENANT)
    lease = book.lease(held, CALLS, "", START_S, START_S + 60, Terms(1_000), BOOT_MS)
    book.need(held, lease, 1)
    call = begun(book, held)
    answer = answered(call, Status.CLOSED, about=0, redis_s=START_S + 200)
    assert book.end_call(held, call, answer, BOOT_MS) is Outcome.CLOCK


def test_has_asserted_only_when_every_lease_was_answered_for(book: LeaseBook) -> None:
    held = book.of(TENANT)
    for number in range(QUOTAS_PER_CALL_MAX + 1):
        lease = Lease(LimitKey(f"calls:{number}"), "", START_S, START_S + 60, Terms(1_000))
        lease.cap = lease.used = 1
        book.restore(TENANT, lease, BOOT_MS)
    since_ms = BOOT_MS
    book.need(held, book.lease(held, CALLS, "", START_S, START_S + 60, Terms(1_000), BOOT_MS), 1)  # a check waits, too
    first = begun(book, held, boot_ms=BOOT_MS + 1)
    book.end_call(held, first, answered(first), BOOT_MS + 2)
    assert book.unasserted(since_ms, BOOT_MS + 2) == [TENANT], "one did not fit"
    second = begun(book, held, boot_ms=BOOT_MS + 3)
    book.end_call(held, second, answered(second), BOOT_MS + 4)
    assert book.unasserted(since_ms, BOOT_MS + 4) == []


def test_has_not_asserted_while_a_call_from_before_the_loss_is_unanswered(book: LeaseBook) -> None:
    held = book.of(TENANT)
    lease = book.lease(held, CALLS, "", START_S, START_S + 60, Terms(1_000), BOOT_MS)
    book.need(held, lease, 5)
    call = begun(book, held)
    assert book.unasserted(BOOT_MS, BOOT_MS) == [TENANT]
    book.end_call(held, call, answered(call, Status.STALE), BOOT_MS + 1)
    assert book.unasserted(BOOT_MS, BOOT_MS + 1) == [TENANT], "and what it may have been granted is to be said"


def test_has_not_asserted_while_an_ended_window_still_takes_calls(book: LeaseBook) -> None:
    held, lease = leased(book, 10)
    book.spend(lease, 10, BOOT_MS)
    leased(book, 1, window=1, boot_ms=BOOT_MS + 60_000)
    since_ms = BOOT_MS + 61_000
    assert book.unasserted(since_ms, BOOT_MS + 62_000) == [TENANT]
    call = book.begin_call(held, revision=1, boot_ms=BOOT_MS + 62_000, since_ms=since_ms)
    assert call is not None
    assert lease in [ask.lease for ask in call.asks]


def test_a_lease_that_was_forgotten_while_a_check_waited_comes_back(book: LeaseBook) -> None:
    held = book.of(TENANT)
    lease = book.lease(held, CALLS, "", START_S, START_S + 60, Terms(1_000), BOOT_MS)
    book.tick(held, START_S + 1, BOOT_MS, 1.0)
    assert not list(held.all())
    book.need(held, lease, 5)
    call = begun(book, held)
    book.end_call(held, call, answered(call), BOOT_MS)
    assert list(held.all()) == [lease], "else what was granted would be nobody's"
    book.lease(held, CALLS, "", START_S, START_S + 60, Terms(1_000), BOOT_MS)
    assert lease.cap == 5


def test_a_lease_that_took_the_place_of_a_forgotten_one_is_used(book: LeaseBook) -> None:
    held = book.of(TENANT)
    forgotten = book.lease(held, CALLS, "", START_S, START_S + 60, Terms(1_000), BOOT_MS)
    book.tick(held, START_S + 1, BOOT_MS, 1.0)
    _, lease = leased(book, 3)
    book.need(held, forgotten, 5)
    assert held.needs == {lease: 5}


@pytest.mark.parametrize("keep", ["cap", "used", "reserved", "unsure"])
def test_a_lease_of_which_anything_is_left_is_not_forgotten(book: LeaseBook, keep: str) -> None:
    held, lease = leased(book, 5)
    lease.cap = lease.used = 0
    setattr(lease, keep, 1)
    book.tick(held, START_S + 1, BOOT_MS + 600_000, 1.0)
    assert list(held.all()) == [lease]


def test_a_call_looks_only_at_what_it_may_speak_of(book: LeaseBook, monkeypatch: pytest.MonkeyPatch) -> None:
    held = book.of(TENANT)
    for number in range(5_000):
        lease = Lease(CALLS, f"{number:016x}", START_S, START_S + 60, Terms(1_000))
        lease.cap = 2
        book.restore(TENANT, lease, BOOT_MS)
    looked_at = 0
    is_sayable = book._is_sayable

    def counted(lease: Lease, boot_ms: int) -> bool:
        nonlocal looked_at
        looked_at += 1
        return is_sayable(lease, boot_ms)

    monkeypatch.setattr(book, "_is_sayable", counted)
    for _ in range(-(-5_000 // QUOTAS_PER_BULK_CALL_MAX)):
        call = begun(book, held)
        assert len(call.asks) <= QUOTAS_PER_BULK_CALL_MAX
        book.end_call(held, call, answered(call), BOOT_MS)
    assert not held.due
    assert book.answered_after_ms(BOOT_MS + 1) > 0
    assert looked_at < 3 * 5_000, "each lease a few times, and not all for each call"
    assert book.begin_call(held, revision=1, boot_ms=BOOT_MS + 1) is None
