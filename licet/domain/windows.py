"""Calendar windows in UTC: the half-open interval ``[start, end)`` a limit counts over.

Times are whole seconds since the Unix epoch. A window is named by its start.
"""

from __future__ import annotations

import calendar
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple


class Period(StrEnum):
    """The length of a calendar window. A week starts on Monday (ISO 8601)."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"


class Window(NamedTuple):
    """``start <= t < end``, seconds since the Unix epoch."""

    start: int
    end: int


_FIXED_SECONDS = {Period.MINUTE: 60, Period.HOUR: 3_600, Period.DAY: 86_400}
_WEEK_SECONDS = 7 * 86_400
_FIRST_MONDAY = 4 * 86_400  # 1970-01-05; the epoch was a Thursday
_YEAR_9999_S = 253_370_764_800  # the end of a window in 9999 would be past the last date there is


def window_at(period: Period, at_s: int) -> Window:
    """The window of ``period`` that holds the instant ``at_s`` (seconds since the Unix epoch, UTC).

    Raises:
        ValueError: ``at_s`` is negative or past the year 9998.
    """
    if not 0 <= at_s < _YEAR_9999_S:
        raise ValueError(f"instant {at_s} is not between the years 1970 and 9998: give seconds since the Unix epoch")
    seconds = _FIXED_SECONDS.get(period)
    if seconds is not None:
        start = at_s - at_s % seconds
        return Window(start, start + seconds)
    if period is Period.WEEK:
        start = at_s - (at_s - _FIRST_MONDAY) % _WEEK_SECONDS
        return Window(start, start + _WEEK_SECONDS)
    at = datetime.fromtimestamp(at_s, UTC)
    if period is Period.YEAR:
        return Window(_epoch_s(at.year, 1), _epoch_s(at.year + 1, 1))
    following = (at.year, at.month + 1) if at.month < 12 else (at.year + 1, 1)
    return Window(_epoch_s(at.year, at.month), _epoch_s(*following))


def period_of(start_s: int, end_s: int) -> Period | None:
    """The period whose window is exactly ``[start_s, end_s)``; ``None`` when there is none."""
    return next((period for period in Period if window_at(period, start_s) == (start_s, end_s)), None)


def _epoch_s(year: int, month: int) -> int:
    return calendar.timegm((year, month, 1, 0, 0, 0))
