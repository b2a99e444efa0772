"""The one place that reads clocks. See ``docs/adr/0004-clocks.md``."""

from __future__ import annotations

import time
from typing import Final, Protocol

_BOOT_CLOCK: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Wall time for windows, terms and records; boot time for holds and deadlines."""

    def now_us(self) -> int:
        """Microseconds since the Unix epoch, UTC. May step."""

    def boot_ms(self) -> int:
        """Milliseconds since boot. Never steps back, and goes on while the machine sleeps."""


class SystemClock:
    """The machine's clocks."""

    def now_us(self) -> int:
        """See ``Clock``."""
        return time.time_ns() // 1_000

    def boot_ms(self) -> int:
        """See ``Clock``."""
        return time.clock_gettime_ns(_BOOT_CLOCK) // 1_000_000
