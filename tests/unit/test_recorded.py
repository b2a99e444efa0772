"""Which sequence numbers are recorded, against a plain set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from licet_control_plane.core.recorded import RecordedSeqs, overlaps, without

spans = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 10)).map(lambda span: (span[0], span[0] + span[1])))


def numbers(recorded: RecordedSeqs) -> set[int]:
    above = {number for first, last in recorded.ranges for number in range(first, last + 1)}
    return set(range(1, recorded.watermark + 1)) | above


@given(spans)
def test_holds_exactly_what_was_added(added: list[tuple[int, int]]) -> None:
    recorded = RecordedSeqs()
    expected: set[int] = set()
    for first, last in added:
        watermark = recorded.watermark
        recorded.add(first, last)
        expected |= set(range(first, last + 1))
        assert recorded.watermark >= watermark
    assert numbers(recorded) == expected
    assert recorded.last == max(expected, default=0)
    assert recorded.watermark + 1 not in expected


@given(spans, st.integers(1, 60), st.integers(0, 20))
def test_missing_is_the_complement(added: list[tuple[int, int]], first: int, length: int) -> None:
    recorded = RecordedSeqs()
    for span in added:
        recorded.add(*span)
    missing = recorded.missing(first, first + length)
    found = [number for start, end in missing for number in range(start, end + 1)]
    assert found == sorted(set(range(first, first + length + 1)) - numbers(recorded))


@given(spans)
def test_ranges_are_ascending_apart_and_above_the_watermark(added: list[tuple[int, int]]) -> None:
    recorded = RecordedSeqs()
    for span in added:
        recorded.add(*span)
    end = recorded.watermark
    for first, last in recorded.ranges:
        assert end + 1 < first <= last
        end = last
    rebuilt = RecordedSeqs(recorded.watermark, recorded.ranges)
    assert (rebuilt.watermark, rebuilt.ranges) == (recorded.watermark, recorded.ranges)


def test_holes_lie_between_the_watermark_and_the_last() -> None:
    recorded = RecordedSeqs(5, [(8, 9), (12, 15)])
    assert recorded.holes() == [(6, 7), (10, 11)]


disjoint = st.sets(st.integers(1, 60)).map(
    lambda numbers: [(number, number) for number in sorted(numbers)]  # touching ranges are as good as one
)


@given(disjoint, st.integers(1, 60), st.integers(0, 20))
def test_what_overlaps_and_what_is_left_are_the_whole(ranges: list[tuple[int, int]], first: int, length: int) -> None:
    wide = [(one * 3, end * 3 + 1) for one, end in ranges]
    members = {number for one, end in wide for number in range(one, end + 1)}
    asked = set(range(first, first + length + 1))
    inside = [n for one, end in overlaps(wide, first, first + length) for n in range(one, end + 1)]
    outside = [n for one, end in without(wide, first, first + length) for n in range(one, end + 1)]
    assert inside == sorted(members & asked)
    assert outside == sorted(members - asked)
