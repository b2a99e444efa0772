"""Makes the ledger's partitions ahead of time, on PostgreSQL. One task; any number of control planes may run it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from licet_control_plane.redis_link import backoff_s
from licet_control_plane.store import partitions
from licet_control_plane.store.database import Database, DatabaseUnavailable

LOOK_S: Final = 3_600.0
"""Partitions are wanted months ahead; looking each hour is looking often."""

log = structlog.get_logger(__name__)


class MonthKeeper:
    """``run`` is the task. ``trouble``: why partitions cannot be made; empty when all are there."""

    def __init__(self, database: Database, *, now_s: Callable[[], float]) -> None:
        self._database = database
        self._now_s = now_s
        self.trouble = ""

    async def run(self) -> None:
        """Look until cancelled."""
        failures = 0
        while True:
            try:
                await self.look()
                failures = 0
                self.trouble = ""
                await asyncio.sleep(LOOK_S)
            except DatabaseUnavailable as error:
                failures += 1
                if not self.trouble:
                    log.warning("partitions of the ledger are not made yet", reason=str(error))
                self.trouble = str(error)
                await asyncio.sleep(backoff_s(failures))

    async def look(self) -> None:
        """Make what is missing.

        Raises:
            DatabaseUnavailable: the database is away, or somebody reads what must be locked.
        """
        made = await self._database.write(partitions.ensure, now_us=int(self._now_s() * 1_000_000))
        if made:
            log.info("partitions of the ledger made", months=[str(month) for month in made])
