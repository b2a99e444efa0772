"""Says when a quota reaches a percentage that a webhook wants to know of, once for each window.

It goes by what the ledger has: the sums that are written with the events. So it is as late as usage is drained, some
seconds, and says nothing that is not on the bill. Looked at are tenants with usage in this hour or the last, and now
and then all: usage that was kept while nobody drained is of hours that are over. And limits in units and money; a rate
has nothing to be used up. Any number of control planes may run it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from sqlalchemy import Connection, func, select

from licet.domain.catalog import Catalog
from licet.domain.entitlements import entitlements_of
from licet.domain.windows import FOREVER_S, Period, Window, window_of
from licet.wire.registers import parts_of_marker
from licet_control_plane.catalogs import Catalogs
from licet_control_plane.core.grants import shown_amount
from licet_control_plane.core.webhook_events import crossed, instant_of, is_told
from licet_control_plane.redis_link import backoff_s
from licet_control_plane.store import licenses, webhooks
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.store.schema import licenses as licenses_table
from licet_control_plane.store.schema import register_spend, rollups
from licet_control_plane.store.webhooks import Reached

LOOK_S: Final = 5.0
TENANTS_MAX: Final = 200
"""Of one look, some 100 ms of reading; the next goes on behind them."""
ALL_EVERY_S: Final = 600.0
"""How long after an outage late usage is noticed. 100,000 tenants are looked at in less than a minute."""
NOTICES_MAX: Final = 100
"""Of one transaction, some 50 ms: a limit of each subject can be reached by thousands at once, and others write too."""
_HOUR_S: Final = 3_600

log: Final = structlog.get_logger(__name__)


class QuotaWatcher:
    """``run`` is the task."""

    def __init__(self, database: Database, catalogs: Catalogs, *, now_s: Callable[[], float]) -> None:
        self._database = database
        self._catalogs = catalogs
        self._now_s = now_s
        self._after = ""
        self._looks_at_all = False
        self._all_at_s = -ALL_EVERY_S
        self.dropped = 0
        """Messages that found no room since the start."""

    async def run(self) -> None:
        """Look until cancelled."""
        failures = 0
        while True:
            try:
                more = await self.look()
                failures = 0
            except DatabaseUnavailable as error:
                failures += 1
                log.warning("quotas are not watched", reason=str(error))
                await asyncio.sleep(backoff_s(failures))
                continue
            if not more:
                await asyncio.sleep(LOOK_S)

    async def look(self) -> bool:
        """Look at the next tenants. Whether there are more behind them.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        wanted = await self._database.read(webhooks.thresholds_wanted)
        if not wanted:
            return False
        now_s = int(self._now_s())
        catalog = await self._catalogs.current()
        if not self._after:
            self._looks_at_all = now_s - self._all_at_s >= ALL_EVERY_S
            self._all_at_s = now_s if self._looks_at_all else self._all_at_s
        if self._looks_at_all:
            tenants = await self._database.read(_licensed, self._after)
        else:
            tenants = await self._database.read(_with_usage, now_s, self._after)
        for tenant in tenants:
            reached = await self._database.read(_reached, tenant, catalog, wanted, now_s)
            for first in range(0, len(reached), NOTICES_MAX):
                some = reached[first : first + NOTICES_MAX]
                self.dropped += await self._database.write(_announce, tenant, some, now_s)
        self._after = tenants[-1] if len(tenants) == TENANTS_MAX else ""
        return bool(self._after)


def _licensed(connection: Connection, after: str) -> list[str]:
    """All tenants, by name."""
    query = select(licenses_table.c.tenant).where(licenses_table.c.tenant > after)
    return list(connection.scalars(query.order_by(licenses_table.c.tenant).limit(TENANTS_MAX)))


def _with_usage(connection: Connection, now_s: int, after: str) -> list[str]:
    """Tenants with usage lately, by name."""
    since = now_s - now_s % _HOUR_S - _HOUR_S
    query = select(rollups.c.tenant).where(rollups.c.hour >= since, rollups.c.tenant > after)
    return list(connection.scalars(query.distinct().order_by(rollups.c.tenant).limit(TENANTS_MAX)))


def _announce(connection: Connection, tenant: str, reached: Sequence[Reached], now_s: int) -> int:
    # What somebody else told meanwhile is not told again.
    return webhooks.announce_thresholds(connection, tenant, reached, now_us=now_s * 1_000_000)


def _reached(
    connection: Connection, tenant: str, catalog: Catalog, wanted: frozenset[tuple[int, Period]], now_s: int
) -> list[Reached]:
    """What was reached of the windows that are open, and not told yet. ``wanted``: percentages, and of which windows:
    ``webhooks.thresholds_wanted``."""
    stored = licenses.get(connection, tenant)
    if stored is None:
        return []
    license_ = stored.license
    limits = {
        limit.key: (
            limit,
            window_of(limit.per, limit.anchor, now_s, starts_s=license_.starts_s, ends_s=license_.stops_s),
        )
        for entitlement in entitlements_of(license_, catalog).values()
        for limit in entitlement.limits
        if not limit.is_rate and any(is_told(limit.per, shortest) for _, shortest in wanted)
    }
    starts = {window.start for _, window in limits.values()}
    rows = connection.execute(
        select(register_spend.c.quota, func.sum(register_spend.c.units).label("units"))
        .where(register_spend.c.tenant == tenant, register_spend.c.window_start.in_(starts))
        .group_by(register_spend.c.quota)
    )
    told = webhooks.told_of(connection, tenant, now_s=now_s)
    reached: list[Reached] = []
    for quota, total in rows:
        name, _, start = quota.rpartition(":")
        key, digest = parts_of_marker(name)
        found = limits.get(key)
        if found is None or found[1].start != int(start):
            continue
        limit, window = found
        data = {
            "tenant": tenant,
            "limit": key,
            "per": limit.per.value,
            "scope": digest,
            "used": shown_amount(int(total), key),
            "amount": shown_amount(limit.amount, key),
            "window": _window(window),
        }
        percents = frozenset(percent for percent, shortest in wanted if is_told(limit.per, shortest))
        untold = percents - told.get(quota, set())
        reached += [
            Reached(quota, percent, limit.per, window.end, data)
            for percent in crossed(int(total), limit.amount, untold)
        ]
    return reached


def _window(window: Window) -> dict[str, str | None]:
    ends = None if window.end >= FOREVER_S else instant_of(window.end)
    return {"starts_at": instant_of(window.start), "ends_at": ends}
