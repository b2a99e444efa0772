"""Windows cut time into pieces without gaps and overlaps."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.windows import Period, window_at

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
