"""The book of reservations: what a hold takes of its quotas, what is certain, and what the log carries."""

from __future__ import annotations

import msgpack
import pytest

from licet.domain.ids import LimitKey
from licet.domain.money import NANOS, Price
from licet_sidecar.core import reservations
from licet_sidecar.core.inquiry import Inquiry, TimestampUs
from licet_sidecar.core.lease import Lease, Terms
from licet_sidecar.core.reservations import (
    OUTCOME_KEPT_MS,
    Hold,
    Outcome,
    Reservation,
    ReservationBook,
    ReservationState,
    from_wire,
    to_wire,
)

START, END = 1_788_220_800, 1_790_812_800
PRICE = Price(8 * NANOS, 1_000, "USD", "context.model", {"large": 80 * NANOS})


def lease(key: str = "reports:month", cap: int = 1_000) -> Lease:
    made = Lease(LimitKey(key), "", START, END, Terms(cap))
    made.cap = cap
    return made


def reservation(
    *holds: Hold, units: dict[str, int] | None = None, number: int = 1, expires_us: int = 10
) -> Reservation:
    made = Reservation(f"{number:032x}", Inquiry("acme", "report.export"), expires_us=expires_us, made_ms=100)
    made.units = units or {"reports": 10}
    made.meters = {"": "reports"}
    made.holds = holds
    for one in holds:
        one.lease.reserved += one.units
    return made


def taken(one: Reservation, **used: int) -> list[int]:
    return [units for _, units in one.shares(used)]


# Shares


def test_each_quota_of_a_feature_is_spent_by_what_was_used() -> None:
    one = reservation(
        Hold(lease(), "reports", "reports:month", 10), Hold(lease("reports:minute"), "reports", "reports:minute", 10)
    )
    assert taken(one, reports=7) == [7, 7]
    assert taken(one, reports=10) == [10, 10]
    assert taken(one, reports=11) == [10, 10]
    assert taken(one) == [0, 0]


def test_a_limit_and_its_top_up_are_spent_in_the_order_they_were_taken() -> None:
    one = reservation(
        Hold(lease(), "reports", "reports:month", 6), Hold(lease("reports:month+g1"), "reports", "reports:month", 4)
    )
    assert taken(one, reports=5) == [5, 0]
    assert taken(one, reports=7) == [6, 1]
    assert taken(one, reports=10) == [6, 4]


def test_a_budget_is_spent_by_the_price_that_held_when_it_was_reserved() -> None:
    budget = Hold(lease("reports:budget", 10**12), "reports", "reports:budget", 800_000_000, PRICE, "large")
    one = reservation(Hold(lease(), "reports", "reports:month", 10), budget)
    assert taken(one, reports=10) == [10, 800_000_000]
    assert taken(one, reports=4) == [4, 320_000_000]


@pytest.mark.parametrize("used", range(12))
def test_a_budget_never_spends_more_than_is_held_however_prices_round(used: int) -> None:
    price = Price(7, 3, "USD")
    held = price.charge_nanos(10)
    one = reservation(Hold(lease("reports:budget"), "reports", "reports:budget", held, price))
    assert taken(one, reports=used) == [price.charge_nanos(min(used, 10))]


def test_what_is_given_up_is_all_beyond_the_reservation() -> None:
    held = lease()
    one = reservation(Hold(held, "reports", "reports:month", 10))
    assert one.beyond({"reports": 12}) == {"reports": 2}
    ReservationBook().give_up_units(one)
    assert held.reserved == 0
    assert one.beyond({"reports": 12}) == {"reports": 12}
    assert one.used_units(None, {}) == {"reports": 10}


def test_the_part_beyond_is_asked_by_meter() -> None:
    one = reservation(units={"input": 5, "output": 5})
    one.meters = {"prompt": "input", "cached": "input", "answer": "output"}
    inquiry = one.inquiry_for({"input": 3})
    assert (inquiry.quantity, inquiry.quantities) == (None, {"prompt": 3})


# Rule 4


def test_units_are_certain_while_the_hold_lasts_or_once_a_later_call_was_answered() -> None:
    held = lease()
    held.hold_until_ms, held.asked_ms = 200, 100
    one = reservation(Hold(held, "reports", "reports:month", 10))
    assert one.is_certain(199)
    assert not one.is_certain(200)
    held.asked_ms = 101
    assert one.is_certain(200)


def test_it_is_noted_once_that_redis_counts_them() -> None:
    book, held = ReservationBook(), lease()
    one = reservation(Hold(held, "reports", "reports:month", 10))
    book.add(one)
    assert book.newly_reported() == []
    held.asked_ms = 101
    assert book.newly_reported() == [one]
    held.asked_ms = 0  # a restart begins so
    assert (book.newly_reported(), one.is_certain(10**9)) == ([], True)


# Expiry and outcomes


def test_each_is_due_once_the_earliest_first() -> None:
    book = ReservationBook()
    for number, expires_us in ((1, 30), (2, 10), (3, 20)):
        book.add(reservation(number=number, expires_us=expires_us))
    assert book.due(9, 10) == []
    assert [one.expires_us for one in book.due(25, 1)] == [10]
    assert [one.expires_us for one in book.due(25, 10)] == [20]
    assert book.due(25, 10) == []


def test_an_extended_one_is_due_later_and_one_that_settles_is_not_due() -> None:
    book = ReservationBook()
    one, other = reservation(number=1), reservation(number=2)
    book.add(one)
    book.add(other)
    book.expire_at(one, 50)
    other.settling = True
    assert book.due(49, 10) == []
    assert book.due(50, 10) == [one]


def test_extending_over_and_over_does_not_grow_the_book(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "_STALE_EXPIRIES_MAX", 10)
    book = ReservationBook()
    one = reservation()
    book.add(one)
    for expires_us in range(100, 200):
        book.expire_at(one, expires_us)
        assert len(book._expiries) <= 12
    assert book.due(199, 10) == [one]


def test_outcomes_are_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "OUTCOMES_MAX", 2)
    book = ReservationBook()
    for number in range(3):
        book.remember(f"{number}", Outcome("acme", ReservationState.CANCELED, b"", number))
    assert [book.find("acme", f"{number}") is not None for number in range(3)] == [False, True, True]
    assert book.outcomes_evicted == 1
    book.forget(OUTCOME_KEPT_MS + 1)
    assert [book.find("acme", f"{number}") is not None for number in (1, 2)] == [False, True]


def test_the_book_is_full_by_number_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    book = ReservationBook()
    one = reservation()
    one.size = 100
    book.add(one)
    assert not book.is_full
    monkeypatch.setattr(reservations, "OPEN_BYTES_MAX", 100)
    assert book.is_full
    book.settle(one, [], 0)
    assert not book.is_full


# In the log


def test_the_log_carries_everything() -> None:
    held = lease()
    one = reservation(Hold(held, "reports", "reports:month", 10), Hold(lease("gone:month"), "gone", "gone:month", 5))
    one.holds = (one.holds[0], one.holds[1]._replace(price=PRICE, by="large"))
    one.prices = (("reports", PRICE, "model"),)
    one.terms_s, one.commits_on_expiry, one.reported, one.degraded = 60, True, True, True
    one.effect, one.reason, one.rule = 1, 17, "rule"
    asked = one.inquiry
    asked.subject_type, asked.subject_id, asked.roles = "user", "ada", ("analyst",)
    asked.subject_attributes = {"since": TimestampUs(5), "level": 3}
    asked.context = {"at": TimestampUs(7), "n": 7, "tags": ["a"], "ratio": 0.5}
    wire = msgpack.unpackb(msgpack.packb(to_wire(one)))
    known = lease()
    again = from_wire(wire, lambda tenant, quota: known if quota == held.quota and tenant == "acme" else None, 500)
    assert msgpack.packb(to_wire(again)) == msgpack.packb(to_wire(one))
    assert (again.id, again.tenant, again.made_ms, again.size) == (one.id, "acme", 500, 0)
    assert type(again.context["at"]) is TimestampUs
    assert type(again.context["n"]) is int
    assert again.holds[0].lease is known
    assert known.reserved == 10
    gone = again.holds[1].lease
    assert (gone.quota, gone.cap, gone.reserved) == (f"gone:month:{START}", 5, 5)


def test_fields_that_a_newer_program_appended_are_ignored() -> None:
    one = reservation()
    again = from_wire([*to_wire(one), "new"], lambda *_: None, 0)
    assert to_wire(again) == to_wire(one)
