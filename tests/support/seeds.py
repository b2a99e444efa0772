"""Which seeds the simulations run: ``LICET_SIM_SEEDS`` of them (100), or just ``LICET_SIM_SEED``."""

from __future__ import annotations

import os
from typing import Final

COUNT: Final = int(os.environ.get("LICET_SIM_SEEDS", "100"))
ONLY: Final = os.environ.get("LICET_SIM_SEED", "")


def batches(each: int, *, share: int = 1) -> list[range]:
    """Ranges of at most ``each`` seeds, of one of ``share`` equal parts of them all."""
    if ONLY:
        return [range(int(ONLY), int(ONLY) + 1)]
    count = max(1, COUNT // share)
    return [range(start, min(count, start + each)) for start in range(0, count, each)]
