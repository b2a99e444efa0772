"""Where answers are in the log: a property against an obvious model, and what finds room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet_sidecar.adapters.usage_log import POSITION_BITS
from licet_sidecar.services import answer_index
from licet_sidecar.services.answer_index import BUCKET_BITS, AnswerIndex

BUCKETS = 1 << BUCKET_BITS
STEPS = BUCKETS // answer_index.SWEPT_AT_ONCE

hashes = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    # The same bucket, and bytes that a search finds across two entries.
    st.builds(lambda high, low: (high << BUCKET_BITS) | low, st.integers(0, 3), st.integers(0, 1)),
    st.just(0),
)


def position(ordinal: int, offset: int = 0) -> int:
    return ordinal << POSITION_BITS | offset


def swept(index: AnswerIndex, ordinals: list[int]) -> int:
    return sum(index.sweep(ordinals) for _ in range(STEPS))


@given(
    st.lists(hashes, max_size=40),
    st.lists(st.tuples(hashes, st.integers(0, 2**32 - 1)), max_size=40),
    st.sets(st.integers(1, 4)),
)
def test_finds_exactly_what_was_noted_and_kept_newest_first(
    older: list[int], newer: list[tuple[int, int]], kept: set[int]
) -> None:
    index = AnswerIndex()
    model: list[tuple[int, int]] = []
    for number, (hashed, offset) in enumerate(newer):
        model.append((hashed, position(2 + number // 10, offset)))
        index.add(*model[-1])
    # What a start looks at in the background comes in front.
    before = [(hashed, position(1, number)) for number, hashed in enumerate(older)]
    for _ in index.add_older(b"".join(AnswerIndex.packed(*entry) for entry in before)):
        pass
    model = before + model
    assert swept(index, [1, 2, 3, 4, 5]) == 0
    assert index.entries == len(model)
    swept(index, sorted(kept))
    # Only what is older than everything kept goes: segments are deleted oldest first, all but those of another id.
    for hashed in {hashed for hashed, _ in model}:
        expected = [where for one, where in reversed(model) if one == hashed]
        found = index.positions(hashed)
        assert found == expected[: len(found)]
        assert {where for where in expected if where >> POSITION_BITS in kept} <= set(found)
        assert index.knows(hashed) or not found
    assert index.entries <= len(model)
    if not kept:
        assert index.entries == 0


def test_nothing_is_found_before_anything_is_noted() -> None:
    index = AnswerIndex()
    assert not index.knows(0)
    assert index.positions(0) == []
    assert index.sweep([]) == 0


def test_what_is_too_much_goes_oldest_segment_first_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_index, "ENTRIES_MAX", 25)
    index = AnswerIndex()
    for ordinal in (1, 2, 3):
        for number in range(10):
            index.add(1_000 * ordinal + number, position(ordinal, number))
    assert swept(index, [1, 2, 3]) == 0, "now it knows how many there are"
    assert swept(index, [1, 2, 3]) == 10
    assert swept(index, [1, 2, 3]) == 0
    assert index.entries == 20
    assert [index.knows(1_000 * ordinal) for ordinal in (1, 2, 3)] == [False, True, True]


def test_an_empty_index_is_small_and_a_full_one_takes_about_twenty_bytes_an_entry() -> None:
    index = AnswerIndex()
    assert index.size_bytes < 200_000
    for number in range(200_000):
        index.add(hash(("acme", number)), position(1, number))
    assert index.size_bytes / 200_000 < 30
