"""How often each of many sources did something lately, in bounded memory. Pure.

A bucket for each source holds ``burst`` and refills at ``per_s``; the source that was quiet for longest makes room
for a new one. So an attacker with more addresses than there are buckets is not slowed down by it, and costs no more
memory than one.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final

SOURCES_MAX: Final = 10_000
"""Buckets that are kept: a megabyte."""
_V6_PREFIX: Final = 64
"""Who has one IPv6 address has at least so many of its neighbors."""


class Attempts:
    """Counts for one kind of thing. Not shared between threads."""

    def __init__(self, *, burst: float, per_s: float, sources_max: int = SOURCES_MAX) -> None:
        self._burst = burst
        self._per_s = per_s
        self._sources_max = sources_max
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # source -> (left, as of)

    def __len__(self) -> int:
        return len(self._left)

    def wait_s(self, source: str, now_s: float) -> float:
        """How long until the source may do it again; 0 when it may now."""
        return max(0.0, (1.0 - self._at(source, now_s)) / self._per_s)

    def take(self, source: str, now_s: float) -> bool:
        """Count one. Whether there was room for it."""
        left = self._at(source, now_s)
        may = left >= 1.0
        self._left[source] = (left - 1.0 if may else left, now_s)
        self._left.move_to_end(source)
        if len(self._left) > self._sources_max:
            self._left.popitem(last=False)
        return may

    def _at(self, source: str, now_s: float) -> float:
        left, as_of_s = self._left.get(source, (self._burst, now_s))
        return min(self._burst, left + max(0.0, now_s - as_of_s) * self._per_s)


def source_of(address: str) -> str:
    """The source that an address stands for: itself, or of IPv6 its network."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    mapped = parsed.ipv4_mapped
    return str(mapped) if mapped else str(ipaddress.ip_network((parsed, _V6_PREFIX), strict=False))
