"""Which numbers of one log are in the ledger: a watermark, ranges above it, and what is declared lost. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gap:
    """Why numbers are declared lost, and when (microseconds since the Unix epoch)."""

    reason: str
    at: int


class RecordedSeqs:
    """Everything up to ``watermark``, and the disjoint, non-touching, ascending ``ranges`` above it, bounds included.

    A log starts at 1; a watermark of 0 means that nothing is recorded contiguously.
    """

    def __init__(self, watermark: int = 0, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.watermark = watermark
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in sorted(ranges):
            self.add(first, last)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Recorded above the watermark, out of order."""
        return list(zip(self._firsts, self._lasts, strict=True))

    @property
    def last(self) -> int:
        """The highest recorded number, 0 for none."""
        return self._lasts[-1] if self._lasts else self.watermark

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of ``first…last`` that are not recorded, ascending."""
        start = max(first, self.watermark + 1)
        gaps: list[tuple[int, int]] = []
        for index in range(bisect_left(self._lasts, start), len(self._lasts)):
            if start > last or self._firsts[index] > last:
                break
            if self._firsts[index] > start:
                gaps.append((start, self._firsts[index] - 1))
            start = self._lasts[index] + 1
        if start <= last:
            gaps.append((start, last))
        return gaps

    def holes(self) -> list[tuple[int, int]]:
        """The numbers between the watermark and the highest recorded one that are not recorded."""
        return self.missing(self.watermark + 1, self.last)

    def add(self, first: int, last: int) -> None:
        """Record ``first…last``; any part of it may be recorded already."""
        if last <= self.watermark:
            return
        start = bisect_left(self._lasts, first - 1)  # the first range that touches or overlaps
        end = bisect_right(self._firsts, last + 1)
        if start < end:
            first = min(first, self._firsts[start])
            last = max(last, self._lasts[end - 1])
        self._firsts[start:end] = [first]
        self._lasts[start:end] = [last]
        if self._firsts[0] <= self.watermark + 1:
            self.watermark = self._lasts[0]
            del self._firsts[0], self._lasts[0]


class LogNumbers:
    """What the ledger has of one log, and what it was told it will not get: both count as recorded.

    Rules: what is recorded cannot be declared lost; what is declared lost and comes after all is taken, once.
    """

    def __init__(self, recorded: RecordedSeqs, gaps: Mapping[tuple[int, int], Gap] | None = None) -> None:
        self.recorded = recorded
        self.gaps = dict(gaps or {})
        self.gaps_changed = False

    def declare(self, first: int, last: int, gap: Gap) -> list[tuple[int, int]]:
        """Take ``first…last`` for lost, as far as it is not recorded; the parts that were taken, ascending."""
        parts = self.recorded.missing(first, last)
        for start, end in parts:
            self.recorded.add(start, end)
            self.gaps[start, end] = gap
            self.gaps_changed = True
        return parts

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of ``first…last`` whose events the ledger does not have, ascending."""
        missing = self.recorded.missing(first, last)
        return sorted([*missing, *overlaps(self.gaps, first, last)]) if self.gaps else missing

    def add(self, first: int, last: int) -> None:
        """The events ``first…last``, which were missing, are there."""
        self.recorded.add(first, last)
        for one in [gap for gap in self.gaps if overlaps([gap], first, last)]:
            gap = self.gaps.pop(one)
            self.gaps |= dict.fromkeys(without([one], first, last), gap)
            self.gaps_changed = True


def overlaps(ranges: Iterable[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """The parts of ``first…last`` that lie in disjoint ``ranges``, ascending; bounds included."""
    return [(max(first, one), min(last, end)) for one, end in sorted(ranges) if one <= last and first <= end]


def without(ranges: Iterable[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Disjoint ``ranges`` without the numbers ``first…last``, ascending; bounds included."""
    rest: list[tuple[int, int]] = []
    for one, end in sorted(ranges):
        if end < first or last < one:
            rest.append((one, end))
            continue
        if one < first:
            rest.append((one, first - 1))
        if last < end:
            rest.append((last + 1, end))
    return rest
