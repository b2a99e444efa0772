"""The control plane's side of quota registers: begins marks, publishes limits, and ends learning.

Part of the publisher's one task; ``core.learning`` says when a mark opens. An epoch is allocated in the database, and
what is about to happen is noted there, before Redis is touched.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

import structlog
from sqlalchemy import Connection, Row

from licet.domain.approvals import counted_limits
from licet.domain.catalog import Catalog, License
from licet.domain.entitlements import entitlements_of, limits_of
from licet.domain.ids import LimitKey
from licet.wire.registers import WINDOW_GRACE_S, Marker, Pair
from licet_control_plane.core.counting import Counting, Kind, limit_key_of, limits_by_key
from licet_control_plane.core.learning import Holder, Verdict, corrections, has_said, may_open
from licet_control_plane.core.reclaim import holder_state
from licet_control_plane.publisher.fleet import Fleet
from licet_control_plane.publisher.marks import (
    Fill,
    MarkState,
    Opened,
    Opening,
    RedisMarks,
    Release,
    quotas_to_keep,
)
from licet_control_plane.publisher.registers import RedisRegisters
from licet_control_plane.store import access, ledger, licenses, marks, meta
from licet_control_plane.store.database import Database
from licet_control_plane.store.licenses import StoredLicense

SLICE: Final = 500
"""Tenants handled in one step: some tens of milliseconds, so that a push is not kept waiting."""
RELEARN_S_MIN: Final = 5.0
"""A tenant is put in learning again at most this often, whatever its sidecars ask."""
_RELEARNED_MAX: Final = 10_000
_YEAR_S: Final = 366 * 86_400  # only terms and grants have longer windows
_STARTS_MAX: Final = 5_000
"""Windows older than a year that are looked for by their start; with more of them, all are read."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class InForce:
    """What limits follow from: the catalog of the last published bundle, and the last published revision."""

    catalog: Catalog
    revision: int


class Quotas:
    """``epoch`` is the newest one; ``learning`` the tenants whose mark is learning, the next to be looked at first."""

    def __init__(
        self,
        database: Database,
        redis_marks: RedisMarks,
        registers: RedisRegisters,
        fleet: Fleet,
        *,
        now_s: Callable[[], float],
    ) -> None:
        self._database = database
        self._marks = redis_marks
        self._registers = registers
        self._fleet = fleet
        self._now_s = now_s
        self.epoch = 0
        self.learning: dict[str, None] = {}
        self._relearned_s: dict[str, float] = {}

    async def load(self) -> None:
        """Take up the epoch, and which marks were learning."""
        self.epoch = (await self._database.read(meta.read)).epoch
        self.learning = dict.fromkeys(await self._database.read(marks.learning))

    async def publish(self, limits: Mapping[str, Mapping[LimitKey, int]], revisions: Mapping[str, int]) -> list[str]:
        """Write limits in the marks of tenants; a mark that was never made is made, and open at once.

        Returns the tenants whose mark is lost: ``begin_lost`` is for them, unless all of Redis is lost.
        """
        now_us = int(self._now_s() * 1_000_000)
        new = await self._database.write(marks.intend, list(limits), now_us=now_us)
        if new:
            begun = await self._marks.begin(sorted(new), self.epoch)
            await self._marks.open(
                Opening(tenant, Pair(self.epoch, run), revisions[tenant], limits[tenant])
                for tenant, run in begun.items()
            )
        return await self._marks.publish_limits(limits, revisions)

    async def begin_lost(self, tenants: Sequence[str]) -> None:
        """Make marks that existed and are missing, in learning under a new epoch."""
        await self._new_epoch("mark.lost", tenants)
        await self._marks.begin(tenants, self.epoch)
        self.learning.update(dict.fromkeys(tenants))

    async def begin_all(self, *, found_epoch: int) -> None:
        """Redis was lost, whole or in part: every tenant learns under a new epoch, greater than ``found_epoch``."""
        await self._new_epoch("redis.lost", None, above=found_epoch)
        async for tenants in self._pages():
            states = await self._marks.touch(tenants)
            await self._marks.relearn({name: state.pair.epoch for name, state in states.items() if state}, self.epoch)
            await self._marks.begin([name for name, state in states.items() if state is None], self.epoch)
            self.learning.update(dict.fromkeys(tenants))

    async def touch_all(self) -> None:
        """The server is another, or was restarted: every mark learns what its sidecars hold."""
        await self._database.write(marks.set_all_learning)
        async for tenants in self._pages():
            states = await self._marks.touch(tenants)
            if lost := [name for name, state in states.items() if state is None]:
                await self.begin_lost(lost)
            self.learning.update(dict.fromkeys(tenants))

    async def answer(self, asks: Mapping[str, str], in_force: InForce) -> None:
        """Look at the tenants that sidecars asked about, and put right what is wrong with their marks."""
        limits = await self._limits(list(asks), in_force.catalog)
        asks = {tenant: why for tenant, why in asks.items() if tenant in limits}  # others hold no license
        states = await self._marks.touch(list(asks))
        gone = {tenant: limits[tenant] for tenant, state in states.items() if state is None}
        if gone and (lost := await self.publish(gone, dict.fromkeys(gone, in_force.revision))):
            await self.begin_lost(lost)
        present = {tenant: state for tenant, state in states.items() if state is not None}
        if unpublished := {name: limits[name] for name in present if asks[name] == "unpublished"}:
            await self._marks.publish_limits(unpublished, dict.fromkeys(unpublished, in_force.revision))
        if doubted := {
            name: state.pair.epoch
            for name, state in present.items()
            if asks[name] == "quota-lost" and self._may_relearn(name)
        }:
            await self._relearn(doubted)
        self.learning.update(dict.fromkeys(name for name, state in present.items() if not state.is_open))

    async def open_learned(self, in_force: InForce) -> tuple[int, list[str]]:
        """Open what may be opened of the next ``SLICE`` marks that are learning.

        Returns how many left learning, and the sidecars that the others wait for.
        """
        tenants = list(islice(self.learning, SLICE))
        if not tenants:
            return 0, []
        now_s = self._now_s()
        holders = self._fleet.holders()
        registry_s = self._fleet.complete_for_s(now_s)
        waited_for: set[str] = set()
        ready: dict[str, MarkState] = {}
        done: list[str] = []
        states = await self._marks.touch(tenants)
        if lost := [tenant for tenant, state in states.items() if state is None]:
            await self.begin_lost(lost)
        for tenant, state in states.items():
            if state is None:
                continue
            if state.is_open:
                done.append(tenant)
                continue
            verdict, missing = may_open(
                state.pair,
                since_ms=state.since_ms,
                learning_s=state.learning_s,
                registry_s=registry_s,
                holders=holders,
                now_s=now_s,
            )
            waited_for.update(missing)
            if verdict is not Verdict.WAIT:
                ready[tenant] = state
        opened, lost_again = await self._open(ready, in_force, holders) if ready else Opened([], [])
        for tenant in tenants:  # those still learning go to the end of the line
            del self.learning[tenant]
            if tenant not in done and tenant not in opened:
                self.learning[tenant] = None
        if lost_again:
            await self._relearn({tenant: ready[tenant].pair.epoch for tenant in lost_again})
        if finished := [*done, *opened]:
            await self._database.write(marks.set_learning, finished, False)
        if opened:
            log.info("quotas opened", tenants=len(opened), still_learning=len(self.learning), epoch=self.epoch)
        return len(finished), sorted(waited_for)

    async def _relearn(self, epochs: Mapping[str, int]) -> None:
        """Tenants whose marks have these epochs lost a quota, and learn again under a new one."""
        await self._new_epoch("quota.lost", list(epochs))
        await self._marks.relearn(epochs, self.epoch)
        self.learning.update(dict.fromkeys(epochs))

    async def _open(self, states: Mapping[str, MarkState], in_force: InForce, holders: Sequence[Holder]) -> Opened:
        tenants = list(states)
        found = await self._database.read(licenses.of_tenants, tenants)
        limits = {tenant: limits_under(stored.license, in_force.catalog) for tenant, stored in found.items()}
        server_s = next(iter(states.values())).now_ms / 1_000
        await self._correct(states, await self._spent(states, found, in_force.catalog, server_s), holders, server_s)
        openings = [
            Opening(
                tenant,
                states[tenant].pair,
                in_force.revision,  # never another's: a publisher that was paused must not open with older limits
                limits.get(tenant, {}),
                quotas_to_keep(mark, server_s),
                sorted(mark.seats),
            )
            for tenant, mark in (await self._marks.read(tenants)).items()
            if mark is not None
        ]
        return await self._marks.open(openings)

    async def _spent(
        self,
        states: Mapping[str, MarkState],
        found: Mapping[str, StoredLicense],
        catalog: Catalog,
        server_s: float,
    ) -> list[Fill]:
        """What the ledger knows that each sidecar spent, of every quota whose window still takes calls."""
        of_plans = limits_by_key(catalog)
        counting = {
            tenant: Counting(found[tenant].license if tenant in found else None, catalog, of_plans) for tenant in states
        }
        markers = {tenant: mark.markers for tenant, mark in (await self._marks.read(list(states))).items() if mark}
        oldest = max(0, int(server_s) - _YEAR_S)
        starts = {start for one in counting.values() for start in one.starts()}
        starts |= {
            start
            for one in markers.values()
            for marker in one.values()
            for start in (marker.start, marker.previous_start)
            if start < oldest
        }
        starts = {start for start in starts if start < oldest}
        if len(starts) > _STARTS_MAX:
            starts, oldest = set(), 0
        spend = await self._database.read(ledger.spend_of, list(states), window_start_min=oldest, starts=starts)
        return [
            fill
            for tenant, rows in spend.items()
            for row in rows
            if (fill := _fill(row, states[tenant].pair, counting[tenant], markers.get(tenant, {}), server_s))
        ]

    async def _correct(
        self, states: Mapping[str, MarkState], spent: Sequence[Fill], holders: Sequence[Holder], server_s: float
    ) -> None:
        """Count what only the ledger knows, and free what nobody holds."""
        quotas = {(fill.tenant, fill.quota): fill for fill in spent}
        by_sidecar: dict[tuple[str, str], dict[str, int]] = {}
        for fill in spent:
            by_sidecar.setdefault((fill.tenant, fill.quota), {})[fill.sidecar] = fill.units
        for tenant, mark in (await self._marks.read(list(states))).items():
            for kept in quotas_to_keep(mark, server_s) if mark else ():
                pair = states[tenant].pair
                one = Fill(tenant, pair, kept.name, kept.marker, kept.window_start, kept.window_end, "", 0)
                quotas.setdefault((tenant, kept.name), one)
        said = {
            tenant: {one.sidecar for one in holders if has_said(one, state.pair, state.since_ms)}
            for tenant, state in states.items()
        }
        now_s = self._now_s()
        fills: list[Fill] = []
        releases: list[Release] = []
        for (quota, fill), state in zip(quotas.items(), await self._registers.read(list(quotas)), strict=True):
            right = corrections(
                state.registers if state else {},
                by_sidecar.get(quota, {}),
                pair=fill.pair,
                said=said[fill.tenant],
                state_of=lambda sidecar: holder_state(self._fleet.sidecars.get(sidecar), now_s),
            )
            fills += [replace(fill, sidecar=sidecar, units=units) for sidecar, units in right.spent.items()]
            if right.base:
                fills.append(replace(fill, sidecar="", units=right.base))
            releases += [Release(fill.tenant, fill.pair, fill.quota, sidecar) for sidecar in right.releases]
        await self._marks.fill(fills)
        if freed := await self._marks.release(releases):
            log.info("units freed that came back with an older state of Redis", registers=freed)

    async def _limits(self, tenants: Sequence[str], catalog: Catalog) -> dict[str, dict[LimitKey, int]]:
        found = await self._database.read(licenses.of_tenants, tenants)
        return {tenant: limits_under(stored.license, catalog) for tenant, stored in found.items()}

    async def _new_epoch(self, why: str, tenants: Sequence[str] | None, *, above: int = 0) -> None:
        now_us = int(self._now_s() * 1_000_000)
        before = self.epoch

        def allocate(connection: Connection) -> int:
            epoch = meta.allocate_epoch(connection, above=above)
            if tenants is None:
                marks.set_all_learning(connection)
            else:
                marks.set_learning(connection, tenants, True)
            target = "redis" if tenants is None else ", ".join(tenants[:5])[:256]
            if not before:
                return epoch  # the first one: nothing is doubted, it only begins
            access.record(
                connection,
                by="publisher",
                action=why,
                target=target,
                before={"epoch": before},
                after={"epoch": epoch},
                now_us=now_us,
            )
            return epoch

        self.epoch = await self._database.write(allocate)
        if before:
            count = "all" if tenants is None else len(tenants)
            log.warning("quota registers doubted: learning begins", why=why, epoch=self.epoch, tenants=count)

    def _may_relearn(self, tenant: str) -> bool:
        now_s = self._now_s()
        if now_s - self._relearned_s.get(tenant, 0.0) < RELEARN_S_MIN:
            return False
        if len(self._relearned_s) >= _RELEARNED_MAX:
            self._relearned_s.clear()
        self._relearned_s[tenant] = now_s
        return True

    async def _pages(self) -> AsyncIterator[list[str]]:
        after = ""
        while True:
            page = await self._database.read(marks.page, after=after, limit=SLICE)
            if not page:
                return
            yield page
            after = page[-1]


def limits_under(license_: License, catalog: Catalog) -> dict[LimitKey, int]:
    """Amounts of the limits a license has under a catalog."""
    return limits_of(entitlements_of(license_, catalog)) | counted_limits(license_.requests)


def changed_plans(old: Catalog, new: Catalog) -> set[str]:
    """Plans that differ between two catalogs, those included that only one of them has."""
    names = {*old.plans, *new.plans}
    return {name for name in names if old.plans.get(name) != new.plans.get(name)}


def _fill(row: Row[Any], pair: Pair, counting: Counting, markers: Mapping[str, Marker], now_s: float) -> Fill | None:
    marker = row.quota.rpartition(":")[0]
    limit = limit_key_of(marker)
    if counting.kind(limit) is Kind.RATE:
        return None  # its registers hold shares, and what was spent at it is past
    window = counting.window(limit, row.window_start, markers.get(marker))
    if window is None or window.end + WINDOW_GRACE_S <= now_s:
        return None
    return Fill(row.tenant, pair, row.quota, marker, window.start, window.end, row.sidecar, int(row.units))
