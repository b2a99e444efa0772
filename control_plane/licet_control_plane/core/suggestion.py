"""Did you mean. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

_LISTED_MAX: Final = 8
"""More names than this help nobody; the message says how many there are."""


def did_you_mean(wrong: str, names: Iterable[str]) -> str:
    """A sentence that names what was probably meant, or what there is."""
    known = sorted(names)
    if close := difflib.get_close_matches(wrong, known, n=1):
        return f"Did you mean {close[0]!r}?"
    if not known:
        return "There are none yet."
    listed = ", ".join(known[:_LISTED_MAX])
    rest = len(known) - _LISTED_MAX
    return f"There are: {listed} and {rest} more." if rest > 0 else f"There are: {listed}."
