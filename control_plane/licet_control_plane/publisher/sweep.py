"""Forgets, in the background, what quotas leave behind: markers of windows that are long over, old tombstones, rates
that nobody has a share of. Part of the publisher's task; goes around all tenants, a page at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from licet.domain.catalog import Catalog
from licet.wire.registers import QUOTA_KEPT_S, WINDOW_GRACE_S, Marker
from licet_control_plane.core.counting import Counting, Kind, limit_key_of, limits_by_key
from licet_control_plane.publisher.registers import RedisRegisters
from licet_control_plane.store import licenses, marks
from licet_control_plane.store.database import Database

ROUND_S_MIN: Final = 3_600.0
"""From the start of one round to that of the next: what is swept was over for an hour anyway."""
PAGE: Final = 100
"""Marks of which a part is looked at in one step."""
LONG_WINDOW_S: Final = 86_400
"""Quotas of shorter windows go soon, with their tombstones."""
MOVABLE_KEPT_S: Final = 366 * 86_400
"""Without its marker, the window of a term or a grant that is prolonged after its end would begin again at zero."""
_OVER_S_MIN: Final = WINDOW_GRACE_S + QUOTA_KEPT_S
_CHUNK: Final = 500


class Sweeper:
    """``markers_removed``, ``registers_removed``, ``rates_removed``: since the start."""

    def __init__(self, database: Database, registers: RedisRegisters) -> None:
        self._database = database
        self._registers = registers
        self.markers_removed = 0
        self.registers_removed = 0
        self.rates_removed = 0
        self._page_after = ""
        self._round_s: float | None = None
        self._unread: deque[tuple[str, int]] = deque()

    async def step(self, catalog: Catalog, now_s: float) -> bool:
        """One step. Returns whether there is more to do at once."""
        if not self._unread:
            if not self._page_after:
                if self._round_s is not None and now_s - self._round_s < ROUND_S_MIN:
                    return False
                self._round_s = now_s
            tenants = await self._database.read(marks.page, after=self._page_after, limit=PAGE)
            self._page_after = tenants[-1] if len(tenants) == PAGE else ""
            self._unread.extend((tenant, 0) for tenant in tenants)
        parts = [self._unread.popleft() for _ in range(min(PAGE, len(self._unread)))]
        if parts:
            await self._sweep(parts, catalog)
        return bool(self._unread or self._page_after)

    async def _sweep(self, parts: Sequence[tuple[str, int]], catalog: Catalog) -> None:
        now_s = await self._registers.now_s()
        read = await self._registers.markers(parts)
        found = await self._database.read(licenses.of_tenants, [tenant for tenant, _ in parts])
        of_plans = limits_by_key(catalog)
        over: dict[str, dict[str, Marker]] = {}
        long: list[tuple[str, str, str]] = []
        for (tenant, _), part in zip(parts, read, strict=True):
            if part.cursor:
                self._unread.append((tenant, part.cursor))
            if not part.markers:
                continue
            counting = Counting(found[tenant].license if tenant in found else None, catalog, of_plans)
            for name, marker in part.markers.items():
                limit = limit_key_of(name)
                over_s = now_s - marker.end
                if over_s >= _OVER_S_MIN:
                    if counting.ends_for_good(limit) or over_s >= MOVABLE_KEPT_S:
                        over.setdefault(tenant, {})[name] = marker
                elif marker.end - marker.start >= LONG_WINDOW_S:
                    rate = name if counting.kind(limit) is Kind.RATE else ""
                    long.append((tenant, f"{name}:{marker.start}", rate))
        self.markers_removed += await self._registers.sweep_markers(over)
        for start in range(0, len(long), _CHUNK):
            removed, rates = await self._registers.sweep_quotas(long[start : start + _CHUNK])
            self.registers_removed += removed
            self.rates_removed += rates
