"""Windows: the half-open interval ``[start, end)`` that a limit counts over.

Times are whole seconds since the Unix epoch, UTC. A window is named by its start. Windows follow the calendar, or are
counted from the start of the license (``Anchor.LICENSE``): months and years then begin on the license's day, or on the
last day of a shorter month, at the license's time of day.
"""

from __future__ import annotations

import calendar
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, NamedTuple


class Period(StrEnum):
    """The length of a window. A calendar week starts on Monday (ISO 8601).

    ``SECOND`` is a rate, units a second without end: it has no windows. ``TERM`` is the license's whole term.
    """

    SECOND = "second"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"
    TERM = "term"


class Anchor(StrEnum):
    """Where windows begin: with the calendar (UTC), or with the license."""

    CALENDAR = "calendar"
    LICENSE = "license"


class Window(NamedTuple):
    """``start <= t < end``, seconds since the Unix epoch."""

    start: int
    end: int


FOREVER_S: Final = 253_370_764_800
"""The end of what does not end: the last instant of the year 9998, as the calendar of 9999 has no year after it."""

_FIXED_SECONDS: Final = {Period.MINUTE: 60, Period.HOUR: 3_600, Period.DAY: 86_400, Period.WEEK: 7 * 86_400}
_FIRST_MONDAY: Final = 4 * 86_400  # 1970-01-05; the epoch was a Thursday
_CALENDAR_PERIODS: Final = (*_FIXED_SECONDS, Period.MONTH, Period.YEAR)


def window_of(period: Period, anchor: Anchor, at_s: int, *, starts_s: int, ends_s: int) -> Window:
    """The window that holds ``at_s`` under a license whose term is ``[starts_s, ends_s)``; ``ends_s`` 0 for open-ended.

    A rate has one window that never ends. A license without a start (0) has the calendar's windows.

    Raises:
        ValueError: ``at_s`` is negative or past the year 9998.
    """
    if period is Period.SECOND:
        return Window(0, FOREVER_S)
    if period is Period.TERM:
        return Window(starts_s, ends_s or FOREVER_S)
    if anchor is Anchor.LICENSE and starts_s:
        return _anchored(period, at_s, starts_s)
    return window_at(period, at_s)


def window_at(period: Period, at_s: int) -> Window:
    """The calendar window of ``period`` that holds the instant ``at_s`` (seconds since the Unix epoch, UTC).

    Raises:
        ValueError: ``at_s`` is negative or past the year 9998, or the period is none of the calendar's.
    """
    _verify(at_s)
    seconds = _FIXED_SECONDS.get(period)
    if seconds is not None:
        first = _FIRST_MONDAY if period is Period.WEEK else 0
        start = at_s - (at_s - first) % seconds
        return Window(start, start + seconds)
    at = datetime.fromtimestamp(at_s, UTC)
    if period is Period.YEAR:
        return Window(_epoch_s(at.year, 1), _epoch_s(at.year + 1, 1))
    if period is Period.MONTH:
        following = (at.year, at.month + 1) if at.month < 12 else (at.year + 1, 1)
        return Window(_epoch_s(at.year, at.month), _epoch_s(*following))
    raise ValueError(f"{period.value} is no period of the calendar")


def period_of(start_s: int, end_s: int) -> Period | None:
    """The period whose calendar window is exactly ``[start_s, end_s)``; ``None`` when there is none."""
    return next((period for period in _CALENDAR_PERIODS if window_at(period, start_s) == (start_s, end_s)), None)


def _anchored(period: Period, at_s: int, anchor_s: int) -> Window:
    _verify(at_s)
    seconds = _FIXED_SECONDS.get(period)
    if seconds is not None:
        start = at_s - (at_s - anchor_s) % seconds
        return Window(start, start + seconds)
    months_each = 12 if period is Period.YEAR else 1
    anchor = datetime.fromtimestamp(anchor_s, UTC)
    at = datetime.fromtimestamp(at_s, UTC)
    number = ((at.year - anchor.year) * 12 + at.month - anchor.month) // months_each
    if _months_after(anchor, number * months_each) > at_s:
        number -= 1
    return Window(_months_after(anchor, number * months_each), _months_after(anchor, (number + 1) * months_each))


def _months_after(anchor: datetime, months: int) -> int:
    """``months`` after the anchor, on its day or the last of a shorter month. Always counted from the anchor: from one
    window to the next, the 31st would become the 28th for good.
    """
    year, month0 = divmod(anchor.year * 12 + anchor.month - 1 + months, 12)
    day = min(anchor.day, calendar.monthrange(year, month0 + 1)[1])
    return calendar.timegm((year, month0 + 1, day, anchor.hour, anchor.minute, anchor.second))


def _verify(at_s: int) -> None:
    if not 0 <= at_s < FOREVER_S:
        raise ValueError(f"instant {at_s} is not between the years 1970 and 9998: give seconds since the Unix epoch")


def _epoch_s(year: int, month: int) -> int:
    return calendar.timegm((year, month, 1, 0, 0, 0))
