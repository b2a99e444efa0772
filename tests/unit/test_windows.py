"""Windows cut time into pieces without gaps and overlaps."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from licet.domain.windows import FOREVER_S, Anchor, Period, Window, period_of, window_at, window_of

YEAR_9999_S = 253_370_764_800

CALENDAR: Final = [period for period in Period if period not in (Period.SECOND, Period.TERM)]
periods = st.sampled_from(CALENDAR)
# From the first whole week on, so that no window begins before 1970.
instants = st.integers(min_value=4 * 86_400, max_value=YEAR_9999_S - 1)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@given(periods, instants)
def test_a_window_holds_its_instant(period: Period, instant_s: int) -> None:
    start, end = window_at(period, instant_s)
    assert start <= instant_s < end


@given(periods, instants)
def test_every_instant_of_a_window_has_that_window(period: Period, instant_s: int) -> None:
    window = window_at(period, instant_s)
    assert window_at(period, window.start) == window
    assert window_at(period, min(window.end, YEAR_9999_S) - 1) == window


@given(periods, st.integers(min_value=4 * 86_400, max_value=YEAR_9999_S - 400 * 86_400))
def test_the_next_window_begins_where_one_ends(period: Period, instant_s: int) -> None:
    window = window_at(period, instant_s)
    assert window_at(period, window.end).start == window.end


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        (Period.MINUTE, "2024-02-29T12:34:00", "2024-02-29T12:35:00"),
        (Period.HOUR, "2024-02-29T12:00:00", "2024-02-29T13:00:00"),
        (Period.DAY, "2024-02-29", "2024-03-01"),
        (Period.WEEK, "2024-02-26", "2024-03-04"),
        (Period.MONTH, "2024-02-01", "2024-03-01"),
        (Period.YEAR, "2024-01-01", "2025-01-01"),
    ],
)
def test_windows_follow_the_calendar_in_utc(period: Period, start: str, end: str) -> None:
    assert window_at(period, at("2024-02-29T12:34:56")) == (at(start), at(end))


def test_december_ends_with_the_year() -> None:
    assert window_at(Period.MONTH, at("2023-12-31T23:59:59")).end == at("2024-01-01")


@pytest.mark.parametrize("instant_s", [-1, YEAR_9999_S, 2**63])
@pytest.mark.parametrize("period", CALENDAR)
def test_refuses_instants_outside_the_calendar(period: Period, instant_s: int) -> None:
    with pytest.raises(ValueError, match="1970 and 9998"):
        window_at(period, instant_s)


@given(periods, instants)
def test_a_calendar_window_tells_its_period(period: Period, instant_s: int) -> None:
    assert period_of(*window_at(period, instant_s)) is period


def test_other_stretches_of_time_are_no_calendar_window() -> None:
    assert period_of(at("2024-01-15"), at("2024-02-15")) is None


def anchored(period: Period, instant_s: int, starts_s: int) -> Window:
    return window_of(period, Anchor.LICENSE, instant_s, starts_s=starts_s, ends_s=0)


DAY_S: Final = 86_400
starts = st.integers(min_value=1, max_value=at("2100-01-01"))
# Up to forty years after the license began, and so before it too, where nothing asks: no window begins before 1970.
lives = st.integers(min_value=0, max_value=40 * 366 * DAY_S)


@given(periods, starts, lives)
@example(Period.MONTH, at("2024-01-31T23:59:59"), 28 * DAY_S)
@example(Period.YEAR, at("2024-02-29"), 365 * DAY_S)
def test_an_anchored_window_holds_its_instant(period: Period, starts_s: int, after_s: int) -> None:
    start, end = anchored(period, starts_s + after_s, starts_s)
    assert starts_s <= start <= starts_s + after_s < end


@given(periods, starts, lives)
@example(Period.MONTH, at("2023-01-31T06:00:00"), 29 * DAY_S)
def test_anchored_windows_leave_no_gap_and_do_not_overlap(period: Period, starts_s: int, after_s: int) -> None:
    window = anchored(period, starts_s + after_s, starts_s)
    assert anchored(period, window.start, starts_s) == window
    assert anchored(period, window.end - 1, starts_s) == window
    assert anchored(period, window.end, starts_s).start == window.end


@given(periods, starts)
def test_the_first_anchored_window_begins_with_the_license(period: Period, starts_s: int) -> None:
    assert anchored(period, starts_s, starts_s).start == starts_s


@given(starts, lives)
def test_anchored_months_have_28_to_31_days_and_years_365_or_366(starts_s: int, after_s: int) -> None:
    month = anchored(Period.MONTH, starts_s + after_s, starts_s)
    assert (month.end - month.start) / DAY_S in (28, 29, 30, 31)
    year = anchored(Period.YEAR, starts_s + after_s, starts_s)
    assert (year.end - year.start) / DAY_S in (365, 366)


@given(starts, lives)
def test_an_anchored_month_begins_on_the_day_of_the_license_or_the_last_of_a_shorter_month(
    starts_s: int, after_s: int
) -> None:
    began = datetime.fromtimestamp(starts_s, UTC)
    start = datetime.fromtimestamp(anchored(Period.MONTH, starts_s + after_s, starts_s).start, UTC)
    assert start.time() == began.time()
    tomorrow = datetime.fromtimestamp(start.timestamp() + DAY_S, UTC)
    assert start.day == began.day or (start.day < began.day and tomorrow.day == 1)


def beginnings(period: Period, starts_at: str, count: int) -> list[str]:
    """Dates on which the first ``count`` windows begin."""
    found, instant_s = [], at(starts_at)
    for _ in range(count):
        window = anchored(period, instant_s, at(starts_at))
        found.append(datetime.fromtimestamp(window.start, UTC).date().isoformat())
        instant_s = window.end
    return found


@pytest.mark.parametrize(
    ("starts_at", "dates"),
    [
        ("2023-01-29", "2023-01-29 2023-02-28 2023-03-29 2023-04-29"),
        ("2024-01-29", "2024-01-29 2024-02-29 2024-03-29 2024-04-29"),
        ("2023-01-30", "2023-01-30 2023-02-28 2023-03-30 2023-04-30"),
        ("2024-01-30", "2024-01-30 2024-02-29 2024-03-30 2024-04-30"),
        ("2023-12-31", "2023-12-31 2024-01-31 2024-02-29 2024-03-31 2024-04-30 2024-05-31"),
        ("2099-12-31", "2099-12-31 2100-01-31 2100-02-28 2100-03-31"),  # 2100 is no leap year
    ],
)
def test_months_from_the_end_of_a_month_come_back_to_their_day(starts_at: str, dates: str) -> None:
    expected = dates.split()
    assert beginnings(Period.MONTH, starts_at, len(expected)) == expected


def test_years_from_a_leap_day_come_back_to_it() -> None:
    dates = ["2024-02-29", "2025-02-28", "2026-02-28", "2027-02-28", "2028-02-29"]
    assert beginnings(Period.YEAR, "2024-02-29", 5) == dates


@pytest.mark.parametrize("period", CALENDAR)
def test_an_instant_before_the_license_has_the_window_before_its_first(period: Period) -> None:
    starts_s = at("2024-03-31T12:34:56")
    window = anchored(period, starts_s - 1, starts_s)
    assert window.start < window.end == starts_s


@pytest.mark.parametrize("period", CALENDAR)
@pytest.mark.parametrize("starts_s", [0, at("2024-01-15T01:02:03")])
def test_calendar_windows_do_not_depend_on_the_license(period: Period, starts_s: int) -> None:
    instant_s = at("2026-11-24T08:00:00")
    window = window_of(period, Anchor.CALENDAR, instant_s, starts_s=starts_s, ends_s=0)
    assert window == window_at(period, instant_s)


@pytest.mark.parametrize("period", CALENDAR)
def test_a_license_without_a_start_has_the_windows_of_the_calendar(period: Period) -> None:
    assert anchored(period, at("2026-11-24T08:00:00"), 0) == window_at(period, at("2026-11-24T08:00:00"))


@pytest.mark.parametrize("anchor", Anchor)
@pytest.mark.parametrize("instant_s", [0, at("2026-11-24"), at("2400-01-01")])
def test_a_rate_has_one_window_that_never_ends(anchor: Anchor, instant_s: int) -> None:
    window = window_of(Period.SECOND, anchor, instant_s, starts_s=at("2026-01-01"), ends_s=at("2027-01-01"))
    assert window == (0, FOREVER_S)


@pytest.mark.parametrize("anchor", Anchor)
@pytest.mark.parametrize(
    ("starts_s", "ends_s", "window"),
    [(100, 200, (100, 200)), (100, 0, (100, FOREVER_S)), (0, 200, (0, 200)), (0, 0, (0, FOREVER_S))],
    ids=["bounded", "open end", "always until", "always"],
)
def test_the_window_of_a_term_is_the_term(anchor: Anchor, starts_s: int, ends_s: int, window: tuple[int, int]) -> None:
    assert window_of(Period.TERM, anchor, 150, starts_s=starts_s, ends_s=ends_s) == window


@pytest.mark.parametrize("period", [Period.SECOND, Period.TERM])
def test_rates_and_terms_are_no_periods_of_the_calendar(period: Period) -> None:
    with pytest.raises(ValueError, match="no period of the calendar"):
        window_at(period, at("2026-11-24"))


@pytest.mark.parametrize("instant_s", [-1, YEAR_9999_S])
@pytest.mark.parametrize("period", CALENDAR)
def test_refuses_instants_outside_the_calendar_for_anchored_windows_too(period: Period, instant_s: int) -> None:
    with pytest.raises(ValueError, match="1970 and 9998"):
        anchored(period, instant_s, at("2026-01-31"))
