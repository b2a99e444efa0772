"""Merkle trees and the chain of blocks."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet_control_plane.core.chain import (
    Block,
    Drop,
    Lost,
    MetLog,
    drops_of,
    erased_of,
    genesis,
    hash_of,
    logs_of,
    lost_of,
    next_block,
    positions,
    ranges_of,
)
from licet_control_plane.core.merkle import EMPTY_ROOT, hash_over, root_of, subtrees
from licet_control_plane.core.recorded import RecordedSeqs

GOLDEN: Final = "00b44532bf94330f08903bf65119e0708f3a10fa669e893ed42c05e80b37eef8"
MET: Final = MetLog("b:1", "b", 1, 0, 0, b"prefix00")
leaves = st.lists(st.binary(min_size=32, max_size=32), max_size=70)


def tree(hashes: list[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, over hashes of leaves, as it is written there."""
    if not hashes:
        return hashlib.sha256().digest()
    if len(hashes) == 1:
        return hashes[0]
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    return hashlib.sha256(b"\x01" + tree(hashes[:split]) + tree(hashes[split:])).digest()


@given(leaves)
def test_the_root_is_that_of_rfc_6962(hashes: list[bytes]) -> None:
    assert root_of(hashes) == tree(hashes)


@given(leaves.filter(bool), st.data())
def test_the_root_tells_a_leaf_that_changed_moved_or_left(hashes: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(hashes) - 1))
    whole = root_of(hashes)
    assert root_of([*hashes[:index], hashlib.sha256(hashes[index]).digest(), *hashes[index + 1 :]]) != whole
    assert root_of(hashes[:index] + hashes[index + 1 :]) != whole
    assert root_of([*hashes, hashes[index]]) != whole
    other = data.draw(st.integers(0, len(hashes) - 1))
    swapped = list(hashes)
    swapped[index], swapped[other] = swapped[other], swapped[index]
    assert (root_of(swapped) == whole) is (swapped == hashes)


@given(leaves.filter(bool), st.data())
def test_the_root_follows_from_the_leaves_that_are_here_and_the_subtrees_of_those_that_are_not(
    hashes: list[bytes], data: st.DataObject
) -> None:
    gone = sorted(data.draw(st.sets(st.integers(0, len(hashes) - 1))))
    spans: list[tuple[int, int]] = []
    for index in gone:
        if spans and spans[-1][1] == index:
            spans[-1] = (spans[-1][0], index + 1)
        else:
            spans.append((index, index + 1))
    kept = subtrees(len(hashes), spans)
    assert [index for start, end in kept for index in range(start, end)] == gone
    known = {(at, at + 1): leaf for at, leaf in enumerate(hashes) if at not in gone}
    known |= {(start, end): tree(hashes[start:end]) for start, end in kept}
    assert hash_over(0, len(hashes), known) == tree(hashes)
    if kept:
        first = kept[0]
        with pytest.raises(KeyError):
            hash_over(0, len(hashes), {span: one for span, one in known.items() if span != first})


@given(
    st.lists(st.tuples(st.sampled_from(["a:1", "b:1"]), st.integers(1, 9), st.integers(0, 5)), max_size=6), st.data()
)
def test_positions_are_those_of_the_numbers_among_the_leaves(
    runs: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    ranges = [(log_id, first, first + more) for log_id, first, more in runs]
    wanted = data.draw(st.sets(st.integers(1, 14)))
    numbers = {"a:1": RecordedSeqs(0, [(seq, seq) for seq in wanted])}
    flat = [(log_id, seq) for log_id, first, last in ranges for seq in range(first, last + 1)]
    found = positions(ranges, numbers)
    assert [at for start, end in found for at in range(start, end)] == [
        at for at, (log_id, seq) in enumerate(flat) if log_id == "a:1" and seq in wanted
    ]
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(found)), "none touches the next"


def test_the_root_over_nothing() -> None:
    assert root_of([]) == EMPTY_ROOT


def block(**changes: Any) -> Block:
    made = next_block(
        genesis("d", 0),
        0,
        1,
        generation=2,
        at=5,
        ranges=[("a:1", 1, 2), ("b:1", 9, 9)],
        leaves=[b"1" * 32, b"2" * 32, b"3" * 32],
        span=(3, 4),
        erased=[7, 8],
        logs=[MET],
        lost=[Lost("a:1", 3, 4, "damaged")],
        dropped=[Drop("2026-05", b"e" * 32, b"s" * 32, False)],
    )
    return made._replace(**changes)


def test_a_block_says_what_it_was_made_of() -> None:
    made = block()
    assert (made.events, made.first_at, made.last_at) == (3, 3, 4)
    assert ranges_of(made) == [("a:1", 1, 2), ("b:1", 9, 9)]
    assert erased_of(made) == [7, 8]
    assert logs_of(made) == [MET]
    assert lost_of(made) == [Lost("a:1", 3, 4, "damaged")]
    assert drops_of(made) == [Drop("2026-05", b"e" * 32, b"s" * 32, False)]
    assert hash_of(made) == made.hash


@pytest.mark.parametrize("name", [name for name in Block._fields if name != "hash"])
def test_the_hash_covers_every_field(name: str) -> None:
    made = block()
    old = getattr(made, name)
    assert hash_of(made._replace(**{name: old + (b"x" if isinstance(old, bytes) else 1)})) != made.hash


def test_chains_of_other_shards_and_deployments_begin_elsewhere() -> None:
    assert len({genesis("d", 0), genesis("d", 1), genesis("e", 0), genesis("d/0", 1)}) == 4


def test_golden_hashes() -> None:
    assert block().hash.hex() == GOLDEN


@pytest.mark.parametrize("ranges", [b"", b"\xc1", b"\x05", b"\x91\x05", b"\x91\x92\x01\x02"])
def test_ranges_that_cannot_be_read_are_refused(ranges: bytes) -> None:
    with pytest.raises(ValueError):
        ranges_of(block(ranges=ranges))


@pytest.mark.parametrize("erased", [b"", b"\xc1", b"\x05", b"\x91\x90"])
def test_erased_subjects_that_cannot_be_read_are_refused(erased: bytes) -> None:
    with pytest.raises(ValueError):
        erased_of(block(erased=erased))


@pytest.mark.parametrize("read", [logs_of, lost_of, drops_of])
@pytest.mark.parametrize("packed", [b"", b"\xc1", b"\x05", b"\x91\x05", b"\x91\x92\x01\x02"])
def test_what_else_a_block_says_is_refused_when_it_cannot_be_read(read: Any, packed: bytes) -> None:
    with pytest.raises(ValueError):
        read(block(logs=packed, lost=packed, dropped=packed))
