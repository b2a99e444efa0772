"""The Merkle tree over the leaves of a block, whole or in part. Pure.

When some leaves are gone, the roots of the largest subtrees that are wholly gone stand for them (a *remnant*): with the
leaves that are there they give the root, and a remnant that was altered does not.
Source: RFC 6962, section 2.1; ``docs/adr/0028-what-leaves-the-ledger-is-in-its-chain.md``.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Final

EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
"""Of a tree without leaves."""

Span = tuple[int, int]
"""Leaves from one index up to another, which is not included; indexes start at 0."""


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes (``sealed_events.leaf_hash``), in order.

    Pairing neighbors level by level, an odd last one as it is, gives the tree of RFC 6962, which splits at the largest
    power of two.
    """
    if not leaves:
        return EMPTY_ROOT
    sha256 = hashlib.sha256
    level = list(leaves)
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        pairs = iter(level)
        level = [sha256(b"\1" + left + right).digest() for left, right in zip(pairs, pairs, strict=False)]
        level += odd
    return level[0]


def subtrees(count: int, gone: Sequence[Span]) -> list[Span]:
    """The largest subtrees of a tree over ``count`` leaves that are wholly in ``gone``, in order.

    ``gone`` are ascending spans that do not touch each other.
    """
    starts = [start for start, _ in gone]
    found: list[Span] = []

    def walk(start: int, end: int) -> None:
        index = bisect_right(starts, start) - 1
        if index >= 0 and end <= gone[index][1]:
            found.append((start, end))
            return
        touches = (index >= 0 and start < gone[index][1]) or (index + 1 < len(gone) and starts[index + 1] < end)
        if touches:
            middle = _split(start, end)
            walk(start, middle)
            walk(middle, end)

    if count:
        walk(0, count)
    return found


def hash_over(start: int, end: int, known: Mapping[Span, bytes]) -> bytes:
    """The root of the subtree over the leaves ``start`` to ``end``, from the roots that are known, of leaves or more.

    Raises:
        KeyError: a leaf in it is in none of them.
    """
    found = known.get((start, end))
    if found is not None:
        return found
    if end - start == 1:
        raise KeyError(start)
    middle = _split(start, end)
    return hashlib.sha256(b"\1" + hash_over(start, middle, known) + hash_over(middle, end, known)).digest()


def _split(start: int, end: int) -> int:
    """Where the tree over these leaves is divided."""
    return start + (1 << (end - start - 1).bit_length() - 1)
