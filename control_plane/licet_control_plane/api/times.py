"""Instants on the wire: RFC 3339 in UTC out; RFC 3339 or seconds since the Unix epoch in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final

from fastapi import Query

from licet_control_plane.api.problems import Problem

From = Annotated[
    str, Query(alias="from", description="From this instant on, RFC 3339 or seconds since 1970; empty for all there is")
]
To = Annotated[str, Query(description="Up to this instant, exclusive, RFC 3339 or seconds since 1970; empty for now")]

_US: Final = 1_000_000
_LAST_S: Final = 253_402_300_799  # the end of the year 9999


def format_us(at_us: int | None) -> str | None:
    """``2026-11-24T08:00:00Z``, with microseconds when there are any; ``None`` for ``None``."""
    if at_us is None:
        return None
    at = datetime.fromtimestamp(at_us // _US, UTC).replace(microsecond=at_us % _US)
    return at.isoformat().replace("+00:00", "Z")


def format_s(at_s: float | None) -> str | None:
    """``format_us`` for seconds."""
    return None if at_s is None else format_us(int(at_s * _US))


def parse_us(text: str, name: str) -> int:
    """Microseconds of an instant. One without an offset is UTC.

    Raises:
        Problem: 422, naming the field.
    """
    try:
        seconds = float(text)
    except ValueError:
        pass
    else:
        if 0 <= seconds <= _LAST_S:
            return int(seconds * _US)
        raise _not_a_time(text, name)
    try:
        at = datetime.fromisoformat(text)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise _not_a_time(text, name) from error
    if at.year < 1970:
        raise _not_a_time(text, name)
    return int((at.replace(microsecond=0) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * _US + at.microsecond


def parse_s(text: str, name: str) -> int:
    """``parse_us`` in whole seconds."""
    return parse_us(text, name) // _US


def _not_a_time(text: str, name: str) -> Problem:
    return Problem(
        422, f"{name}: {text!r} is not an instant.", "Give one such as 2026-11-24T08:00:00Z, or seconds since 1970."
    )
