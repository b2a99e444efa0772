"""Work on the loop in slices, so that checks are answered in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Final

SLICE_S: Final = 0.001
"""How long checks wait for a slice, on top of one step of it; a check itself takes a twentieth of that."""


async def in_slices(steps: Iterator[None]) -> None:
    """Runs ``steps`` to their end; each should take well under a millisecond."""
    began_s = time.perf_counter()
    for _ in steps:
        if time.perf_counter() - began_s >= SLICE_S:
            await asyncio.sleep(0)
            began_s = time.perf_counter()
