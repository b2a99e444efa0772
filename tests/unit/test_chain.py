"""Merkle trees and the chain of blocks."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet_control_plane.core.chain import (
    Block,
    erased_of,
    genesis,
    hash_of,
    next_block,
    ranges_of,
)
from licet_control_plane.core.merkle import EMPTY_ROOT, root_of

GOLDEN: Final = "a7766db283240017ebb4d01fd10eb04c8d0b86fba62bf09a75ae267e9c3aee9f"
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
    )
    return made._replace(**changes)


def test_a_block_says_what_it_was_made_of() -> None:
    made = block()
    assert (made.events, made.first_at, made.last_at) == (3, 3, 4)
    assert ranges_of(made) == [("a:1", 1, 2), ("b:1", 9, 9)]
    assert erased_of(made) == [7, 8]
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
