"""The life of a license: what each move makes of it, and what is due when."""

from __future__ import annotations

import calendar
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.catalog import License, LicenseStatus, PlannedPlan, Renewal
from licet.domain.catalog_wire import license_from_wire, license_to_wire
from licet.domain.windows import Period
from licet_control_plane.core.lifecycle import (
    MOVES,
    NO_NOTICES,
    RENEW_AHEAD_S,
    SAME,
    Due,
    Move,
    MoveRefused,
    No,
    Notices,
    Stage,
    check_move,
    moved,
    next_due,
    renewed,
    renewed_by_itself,
    stage_of,
    with_fields,
    with_renewal,
)
from licet_control_plane.core.refusal import ChangeInvalid


def at(text: str) -> int:
    year, month, day = map(int, text.split("-"))
    return calendar.timegm((year, month, day, 0, 0, 0))


START, END, GRACE_S = at("2027-01-31"), at("2027-02-28"), 7 * 86_400
NOTICE_S = 3 * 86_400
TERM = License("acme", "pro", starts_s=START, ends_s=END, grace_s=GRACE_S)
MONTHLY = with_renewal(TERM, Period.MONTH, auto=True)
IN = {
    Stage.SCHEDULED: (TERM, START - 1),
    Stage.ACTIVE: (TERM, END - 1),
    Stage.GRACE: (TERM, END),
    Stage.EXPIRED: (TERM, END + GRACE_S),
    Stage.SUSPENDED: (replace(TERM, status=LicenseStatus.SUSPENDED), END - 1),
    Stage.CANCELED: (replace(TERM, status=LicenseStatus.CANCELED), END - 1),
}


def _due(license_: License, notices: Notices = NO_NOTICES) -> tuple[int, Due] | None:
    return next_due(license_, notices, notice_s=NOTICE_S)


def test_the_table_answers_every_move_from_every_stage() -> None:
    assert set(MOVES) == set(Stage)
    assert all(set(moves) == set(Move) for moves in MOVES.values())


@pytest.mark.parametrize("stage", Stage)
def test_a_license_is_in_the_stage_that_its_status_and_term_say(stage: Stage) -> None:
    assert stage_of(*IN[stage]) is stage


@pytest.mark.parametrize("move", Move)
@pytest.mark.parametrize("stage", Stage)
def test_a_move_leads_where_the_table_says_or_says_why_not(stage: Stage, move: Move) -> None:
    license_, now_s = IN[stage]
    outcome = MOVES[stage][move]
    if isinstance(outcome, No):
        with pytest.raises(MoveRefused) as refused:
            check_move(license_, move, now_s)
        assert (refused.value.stage, str(refused.value), refused.value.fix) == (stage, outcome.why, outcome.fix)
        assert outcome.fix.endswith(".")
    elif move not in (Move.RENEW, Move.CHANGE):
        after = moved(license_, move, now_s)
        assert (after == license_) == (outcome is SAME)
        if outcome is not SAME:
            assert stage_of(after, now_s) is outcome


@pytest.mark.parametrize("move", [Move.SUSPEND, Move.RESUME, Move.CANCEL, Move.CANCEL_AT_END])
def test_a_move_that_was_made_can_be_repeated(move: Move) -> None:
    license_ = TERM if move is not Move.RESUME else replace(TERM, status=LicenseStatus.SUSPENDED)
    once = moved(license_, move, END - 1)
    assert moved(once, move, END - 1) == once


def test_months_of_any_length_keep_the_day_that_the_license_started_on() -> None:
    license_ = with_renewal(License("acme", "pro", starts_s=START), Period.MONTH, auto=True)
    ends = [license_.ends_s]
    for _ in range(13):
        license_ = renewed_by_itself(license_)
        ends.append(license_.ends_s)
    days = [datetime.fromtimestamp(end, UTC).day for end in ends]
    assert days == [28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 29, 31]  # February of 2028 has a 29th


def test_an_end_that_does_not_fit_the_start_is_what_periods_are_counted_from() -> None:
    license_ = with_renewal(replace(TERM, ends_s=at("2027-03-31")), Period.MONTH, auto=False)
    odd = with_renewal(replace(TERM, starts_s=at("2027-01-15"), ends_s=at("2027-01-31")), Period.MONTH, auto=False)
    assert license_.renewal == Renewal(Period.MONTH, START, False)
    assert odd.renewal == Renewal(Period.MONTH, at("2027-01-31"), False)
    assert renewed(renewed(odd, START), START).ends_s == at("2027-03-31")


@given(
    start=st.integers(86_400, at("2200-01-01")),
    period=st.sampled_from([Period.DAY, Period.WEEK, Period.MONTH, Period.YEAR]),
    periods=st.integers(1, 40),
)
def test_renewing_once_by_several_periods_is_renewing_several_times(start: int, period: Period, periods: int) -> None:
    license_ = with_renewal(License("acme", "pro", starts_s=start), period, auto=False)
    one_by_one = license_
    for _ in range(periods):
        longer = renewed(one_by_one, start)
        assert longer.ends_s > one_by_one.ends_s
        one_by_one = longer
    assert renewed(license_, start, periods) == one_by_one


def test_a_license_that_ended_long_ago_is_not_renewed_into_the_past() -> None:
    with pytest.raises(ChangeInvalid, match="would still have ended"):
        renewed(MONTHLY, at("2027-06-01"))
    assert renewed(MONTHLY, at("2027-06-01"), 4).ends_s == at("2027-06-30")


def test_fields_that_say_what_is_so_already_change_nothing_after_a_renewal() -> None:
    whole = {"starts_s": START, "grace_s": GRACE_S, "period": Period.MONTH, "auto": True, "addons": {}}
    first = with_fields(License("acme", "pro"), whole, START)
    later = renewed_by_itself(renewed_by_itself(first))
    assert with_fields(later, whole, START) == later


def test_a_plan_that_is_changed_by_hand_replaces_the_one_that_was_planned() -> None:
    planned = replace(TERM, planned=PlannedPlan("big", END))
    assert with_fields(planned, {"plan": "small"}, START).planned is None
    assert with_fields(planned, {"grace_s": 0}, START).planned == planned.planned


def test_a_canceled_license_changes_only_once_it_is_brought_back() -> None:
    gone = replace(TERM, status=LicenseStatus.CANCELED)
    with pytest.raises(MoveRefused):
        with_fields(gone, {"plan": "small"}, START)
    back = with_fields(gone, {"plan": "small", "status": LicenseStatus.ACTIVE}, START)
    assert (back.plan, back.status) == ("small", LicenseStatus.ACTIVE)


def test_a_license_that_ended_too_long_ago_does_not_renew_itself_up_to_today() -> None:
    daily = {"ends_s": START, "period": Period.DAY, "auto": True}
    new = License("acme", "pro")
    assert with_fields(new, daily, START + 120 * 86_400 - 1).renewal
    with pytest.raises(ChangeInvalid, match="more than 120 times"):
        with_fields(new, daily, START + 120 * 86_400)
    by_hand = with_fields(new, {**daily, "auto": False}, START + 400 * 86_400)
    with pytest.raises(ChangeInvalid, match="more than 120 times"):
        with_fields(by_hand, {"auto": True}, START + 400 * 86_400)
    # What nobody renewed while all control planes were away can still be changed.
    away = with_fields(new, daily, START)
    assert with_fields(away, {"plan": "big"}, START + 400 * 86_400).plan == "big"


def test_a_grace_that_would_end_after_the_calendar_is_refused() -> None:
    late = at("9998-12-25")
    with pytest.raises(ChangeInvalid, match="9998"):
        with_fields(License("acme", "pro"), {"ends_s": late, "grace_s": 366 * 86_400}, START)
    with pytest.raises(ChangeInvalid, match="9998"):
        with_fields(replace(TERM, ends_s=at("9999-12-31"), grace_s=0), {"grace_s": 86_400}, START)
    daily = with_renewal(replace(TERM, ends_s=late, grace_s=5 * 86_400), Period.DAY, auto=True)
    with pytest.raises(ChangeInvalid, match="9998"):
        renewed(daily, START, periods=2)
    assert with_fields(License("acme", "pro"), {"ends_s": at("9999-12-31")}, START).ends_s == at("9999-12-31")


def test_canceling_at_the_end_stops_renewals_and_grace_and_can_be_taken_back() -> None:
    ends = moved(MONTHLY, Move.CANCEL_AT_END, START)
    assert (ends.stops_s, stage_of(ends, END)) == (END, Stage.EXPIRED)
    assert _due(ends) == (END - NOTICE_S, Due.SAY_EXPIRING)
    assert _due(ends, Notices(END)) == (END, Due.CANCEL)
    stays = moved(ends, Move.RESUME, START)
    assert stays.stops_s == END + GRACE_S
    with pytest.raises(ChangeInvalid, match="no end"):
        moved(License("acme", "pro"), Move.CANCEL_AT_END, START)


@pytest.mark.parametrize("auto", [True, False])
def test_a_license_that_is_resumed_before_its_end_renews_itself_if_it_did(auto: bool) -> None:
    license_ = with_renewal(TERM, Period.MONTH, auto=auto)
    ends = moved(moved(license_, Move.CANCEL_AT_END, START), Move.CANCEL_AT_END, START)
    assert not ends.renews_itself
    assert moved(with_fields(ends, {"plan": "big"}, START), Move.RESUME, START).renews_itself is auto
    assert not moved(with_fields(ends, {"auto": False}, START), Move.RESUME, START).renews_itself
    assert not renewed(ends, START).renews_itself
    with pytest.raises(ChangeInvalid, match="canceled at the end"):
        with_fields(ends, {"auto": True}, START)


def test_a_suspended_license_that_is_resumed_stays_canceled_at_its_end() -> None:
    suspended = moved(moved(MONTHLY, Move.CANCEL_AT_END, START), Move.SUSPEND, START)
    assert moved(suspended, Move.RESUME, START).cancels


def test_what_is_due_comes_in_order_and_a_plan_before_a_renewal() -> None:
    assert _due(License("acme", "pro")) is None
    assert _due(MONTHLY) == (END - RENEW_AHEAD_S, Due.RENEW)
    same_time = replace(MONTHLY, planned=PlannedPlan("big", END - RENEW_AHEAD_S))
    assert _due(same_time) == (END - RENEW_AHEAD_S, Due.CHANGE_PLAN)
    assert _due(replace(MONTHLY, status=LicenseStatus.CANCELED)) is None


def test_the_end_of_a_term_is_announced_and_said_once_and_again_for_another_end() -> None:
    assert _due(TERM) == (END - NOTICE_S, Due.SAY_EXPIRING)
    assert _due(TERM, Notices(END)) == (END + GRACE_S, Due.SAY_EXPIRED)
    assert _due(TERM, Notices(END, END)) is None
    assert _due(TERM, Notices(0, END)) is None
    longer = replace(TERM, ends_s=END + 86_400)
    assert _due(longer, Notices(END, END)) == (longer.ends_s - NOTICE_S, Due.SAY_EXPIRING)


def test_what_renews_is_on_the_wire_and_a_plain_license_is_as_it_was() -> None:
    full = replace(MONTHLY, cancels=True, planned=PlannedPlan("big", END))
    assert license_from_wire(license_to_wire(full)) == full
    assert set(license_to_wire(License("acme", "pro"))).isdisjoint({"grace_s", "cancels", "renewal", "planned"})
