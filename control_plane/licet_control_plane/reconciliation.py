"""Reconciling a running deployment: ledger against registers, logs and archive. Changes nothing.

Looks at every tenant once; at those that differ again, a few seconds later, until what is on its way has arrived.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from licet.wire.usage import log_id
from licet_control_plane.archive.comparing import ArchiveDifference, compare
from licet_control_plane.core import reconciling
from licet_control_plane.core.fleet import State
from licet_control_plane.core.reconciling import LogSides, Place, Sides
from licet_control_plane.publisher.fleet import Fleet
from licet_control_plane.publisher.marks import RedisMarks, quotas_to_keep
from licet_control_plane.publisher.registers import RedisRegisters
from licet_control_plane.store import marks as stored_marks
from licet_control_plane.store import reconciling as stored
from licet_control_plane.store.database import Database

TENANTS_PAGE: Final = 200
QUOTAS_PAGE: Final = 200
LOOK_S: Final = 3.0
"""Between two looks: heartbeats come each second, spends are said twice a second, a batch is drained in one."""
LOOKS_MAX: Final = 5
FORGOTTEN: Final = "the sidecar was told of more than the ledger has: the ledger was restored, or lost what it had"
ROLLED_BACK: Final = "the ledger has more than the log: its state directory was rolled back or copied"


@dataclass(frozen=True, slots=True)
class Progress:
    """What is looked at now, and how many tenants or archived events were."""

    doing: str
    done: int


@dataclass(slots=True)
class Reconciled:
    """``differences`` count; ``moving`` may only be on their way."""

    tenants: int = 0
    quotas: int = 0
    differences: dict[Place, Sides] = field(default_factory=dict)
    moving: dict[Place, Sides] = field(default_factory=dict)
    learning: list[str] = field(default_factory=list)
    logs: list[tuple[LogSides, str]] = field(default_factory=list)
    archive: list[ArchiveDifference] | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing differs that should not."""
        return not (self.differences or self.logs or self.archive)


class Reconciliation:
    """One run. ``steps`` gives what was done so far, then the result."""

    def __init__(
        self,
        database: Database,
        marks: RedisMarks,
        registers: RedisRegisters,
        fleet: Fleet,
        *,
        archive: Path | None,
        deployment: str,
        now_s: Callable[[], float],
    ) -> None:
        self._database = database
        self._marks = marks
        self._registers = registers
        self._fleet = fleet
        self._archive = archive
        self._deployment = deployment
        self._now_s = now_s
        self._done = Reconciled()

    async def steps(self, *, tenant: str = "") -> AsyncIterator[Progress | Reconciled]:
        """Look at everything, or at one tenant and no archive.

        Raises:
            RedisUnavailable, RedisRefused, DatabaseUnavailable, ArchiveUnavailable: it cannot be read now.
        """
        done = self._done
        found: dict[Place, Sides] = {}
        busy = self._busy()
        after = ""
        while page := await self._page(tenant, after):
            for one in page:
                found |= await self._look(one, first=True)
            done.tenants += len(page)
            yield Progress("quotas", done.tenants)
            if tenant:
                break
            after = page[-1]
        for _ in range(LOOKS_MAX):
            if not found:
                break
            await asyncio.sleep(LOOK_S)
            again: dict[Place, Sides] = {}
            for one in sorted({place.tenant for place in found}):
                again |= await self._look(one, first=False)
            now_busy = self._busy()
            done.differences, done.moving = reconciling.settled(found, again, busy | now_busy)
            found, busy = again, now_busy
            yield Progress("what differs", len(found))
            if not done.moving:
                break
        await self._look_at_logs()
        if self._archive is not None and not tenant:
            done.archive = []
            events = 0
            compared = compare(self._database, self._archive, self._deployment)
            while (shard := await asyncio.to_thread(next, compared, None)) is not None:
                done.archive += shard.differences
                events += shard.events
                yield Progress("archived events", events)
        yield done

    async def _page(self, tenant: str, after: str) -> list[str]:
        return [tenant] if tenant else await self._database.read(stored_marks.page, after=after, limit=TENANTS_PAGE)

    async def _look(self, tenant: str, *, first: bool) -> dict[Place, Sides]:
        mark = (await self._marks.read([tenant]))[tenant]
        if mark is None or not mark.is_open:
            if first:
                self._done.learning.append(tenant)
            return {}
        names = [one.name for one in quotas_to_keep(mark, await self._registers.now_s())]
        if first:
            self._done.quotas += len(names)
        found: dict[Place, Sides] = {}
        for start in range(0, len(names), QUOTAS_PAGE):
            some = names[start : start + QUOTAS_PAGE]
            spent = await self._database.read(stored.spend_in, tenant, some)
            states = await self._registers.read([(tenant, name) for name in some])
            for name, state in zip(some, states, strict=True):
                if state is not None:
                    found |= reconciling.differences(tenant, name, state.base, state.registers, spent.get(name, {}))
        return found

    def _busy(self) -> set[str]:
        """Sidecars that live and have told of events that the ledger has not acknowledged."""
        now_s = self._now_s()
        return {
            name
            for name, sidecar in self._fleet.sidecars.items()
            if sidecar.state(now_s) is State.LIVE and sidecar.heartbeat.log_last_seq != sidecar.heartbeat.log_acked_seq
        }

    async def _look_at_logs(self) -> None:
        ids = {log_id(one.heartbeat.sidecar, one.heartbeat.incarnation) for one in self._fleet.sidecars.values()}
        before = self._logs({}, ids)
        known = await self._database.read(stored.watermarks, list(ids))
        for log in before:
            if reconciling.is_forgotten(log._replace(watermark=known.get(log.log_id, 0))):
                self._done.logs.append((log._replace(watermark=known.get(log.log_id, 0)), FORGOTTEN))
        if any(map(reconciling.is_rolled_back, self._logs(known, ids, live=True))):
            await asyncio.sleep(LOOK_S)  # until everybody who lives was heard of again
            for log in self._logs(known, ids, live=True):
                if reconciling.is_rolled_back(log):
                    self._done.logs.append((log, ROLLED_BACK))

    def _logs(self, watermarks: Mapping[str, int], among: set[str], *, live: bool = False) -> list[LogSides]:
        """The newest heartbeats' words, beside ``watermarks``."""
        found: list[LogSides] = []
        for _, sidecar in sorted(self._fleet.sidecars.items()):
            beat = sidecar.heartbeat
            name = log_id(beat.sidecar, beat.incarnation)
            if name in among and (not live or sidecar.state(self._now_s()) is State.LIVE):
                found.append(LogSides(name, beat.log_last_seq, beat.log_acked_seq, watermarks.get(name, 0)))
        return found
