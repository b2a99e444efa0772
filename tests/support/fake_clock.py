"""A clock that moves only when a test says so."""

from __future__ import annotations

from typing import Final

START_US: Final = 1_790_000_000_000_000
"""2026-09-21T14:13:20Z: twenty seconds into a minute, ten days before the end of a month."""


class FakeClock:
    """A ``Clock``."""

    def __init__(self, at_us: int = START_US) -> None:
        self.us = at_us
        self.ms = 1_000_000

    def now_us(self) -> int:
        """See ``Clock``."""
        return self.us

    def boot_ms(self) -> int:
        """See ``Clock``."""
        return self.ms

    def advance(self, seconds: float) -> None:
        """Both clocks, as time does."""
        self.us += round(seconds * 1_000_000)
        self.ms += round(seconds * 1_000)

    def step(self, seconds: float) -> None:
        """Only the wall clock, as an administrator does."""
        self.us += round(seconds * 1_000_000)
