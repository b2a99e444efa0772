"""Takes back the units of sidecars that will not come back: for an operator who says so, or by a timer.

Works through tenants in pages. What is about to be sealed is in the audit trail before Redis is touched; the script
``seal`` decides by itself, under the clock of Redis, and everything may be repeated. The timer belongs to the
publisher's task; ``reclaim`` may be called from any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog
from sqlalchemy import Connection

from licet.domain.catalog import Catalog
from licet.wire.registers import Pair
from licet_control_plane.core.counting import Counting, Kind, limit_key_of, limits_by_key
from licet_control_plane.core.reclaim import Holding, overdue
from licet_control_plane.publisher.fleet import Fleet
from licet_control_plane.publisher.marks import MarkState, RedisMarks, quotas_to_keep
from licet_control_plane.publisher.registers import RedisRegisters, Seal, Sealed, SealStatus
from licet_control_plane.store import access, ledger, licenses, marks
from licet_control_plane.store.database import Database

PAGE: Final = 200
"""Tenants in one step: some tens of milliseconds."""
SIDECARS_MAX: Final = 500
"""Sidecars that the timer reclaims in one pass; the others wait for the next."""
AUDITED_MAX: Final = 100
"""Registers listed in one line of the audit trail; the sums are of all."""
RETRY_S: Final = 60.0
"""Between passes of the timer, when some tenants were learning."""
_CHUNK: Final = 300

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one register. On a dry run ``sealed`` is ``None``."""

    holding: Holding
    sealed: Sealed | None

    @property
    def done(self) -> bool:
        """Whether it holds nothing any more."""
        return self.sealed is not None and self.sealed.status in _DONE

    @property
    def freed(self) -> int:
        """Units that became free, or would."""
        if self.sealed is None:
            return self.holding.freed
        return self.sealed.granted - self.sealed.counted if self.sealed.status is SealStatus.SEALED else 0


_DONE: Final = (SealStatus.SEALED, SealStatus.ALREADY, SealStatus.NONE)


@dataclass(slots=True)
class Reclaimed:
    """``skipped``: tenants whose quotas are learning or lost, which must be asked about again. ``after``: where the
    next page of tenants begins; ``None`` when there is none."""

    outcomes: list[Outcome] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    after: str | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing of these tenants is left to do."""
        return not self.skipped and all(outcome.done for outcome in self.outcomes)


class Reclaimer:
    """``after_s``: the timer reclaims a sidecar that was silent for so long; 0 for never."""

    def __init__(
        self, database: Database, redis_marks: RedisMarks, registers: RedisRegisters, fleet: Fleet, *, after_s: float
    ) -> None:
        self._database = database
        self._marks = redis_marks
        self._registers = registers
        self._fleet = fleet
        self._after_s = after_s
        self.registers_sealed = 0
        self._passing: list[str] = []
        self._incomplete = False
        self._page_after = ""
        self._rests_until_s = 0.0

    async def page(self, sidecars: Sequence[str], catalog: Catalog, *, after: str, by: str, dry_run: bool) -> Reclaimed:
        """Reclaim from the tenants of one page, those after ``after``."""
        tenants = await self._database.read(marks.page, after=after, limit=PAGE)
        reclaimed = await self.reclaim(sidecars, tenants, catalog, by=by, dry_run=dry_run)
        reclaimed.after = tenants[-1] if len(tenants) == PAGE else None
        return reclaimed

    async def reclaim(
        self, sidecars: Sequence[str], tenants: Sequence[str], catalog: Catalog, *, by: str, dry_run: bool
    ) -> Reclaimed:
        """Seal what ``sidecars`` hold of the open quotas of ``tenants``, at most ``PAGE`` of them.

        The caller has made sure that the sidecars are dead. Raises ``RedisUnavailable``, ``RedisRefused`` and
        ``DatabaseUnavailable``; may be repeated.
        """
        states = await self._marks.touch(tenants)
        pairs = {name: state.pair for name, state in states.items() if state is not None and state.is_open}
        reclaimed = Reclaimed(skipped=[name for name in tenants if name not in pairs])
        holdings = await self._holdings(sidecars, list(pairs), catalog)
        if dry_run or not holdings:
            reclaimed.outcomes = [Outcome(holding, None) for holding in holdings]
            return reclaimed
        await self._database.write(_record, holdings, by=by, now_us=_now_us(states))
        reclaimed.outcomes = await self._seal(holdings, pairs)
        sealed = sum(
            outcome.sealed is not None and outcome.sealed.status is SealStatus.SEALED for outcome in reclaimed.outcomes
        )
        self.registers_sealed += sealed
        log.info("registers sealed", by=by, sidecars=sidecars[:5], registers=sealed, of=len(holdings))
        return reclaimed

    async def step(self, catalog: Catalog, now_s: float) -> bool:
        """One page of what the timer does. Returns whether there is more to do at once."""
        if not self._after_s or now_s < self._rests_until_s:
            return False
        late = overdue(
            self._fleet.sidecars.values(), after_s=self._after_s, watched_s=self._fleet.watched_s(now_s), now_s=now_s
        )
        if not self._passing:
            self._passing, self._page_after, self._incomplete = late[:SIDECARS_MAX], "", False
        still = set(late)
        self._passing = [name for name in self._passing if name in still]  # who was heard of meanwhile is left alone
        if not self._passing:
            return False
        done = await self.page(self._passing, catalog, after=self._page_after, by="timer", dry_run=False)
        self._incomplete = self._incomplete or not done.complete
        if done.after is not None:
            self._page_after = done.after
            return True
        if self._incomplete:
            self._rests_until_s = now_s + RETRY_S
        else:
            await self._fleet.retire(self._passing, now_s)
            log.info("sidecars reclaimed", sidecars=len(self._passing), first=self._passing[0])
        self._passing = []
        return False

    async def _holdings(self, sidecars: Sequence[str], tenants: Sequence[str], catalog: Catalog) -> list[Holding]:
        if not tenants:
            return []
        now_s = await self._registers.now_s()
        quotas = [
            (tenant, quota.name)
            for tenant, mark in (await self._marks.read(tenants)).items()
            if mark is not None
            for quota in quotas_to_keep(mark, now_s)
        ]
        held = [
            one
            for start in range(0, len(quotas), _CHUNK)
            for one in await self._registers.held_by(quotas[start : start + _CHUNK], sidecars)
        ]
        if not held:
            return []
        found = await self._database.read(licenses.of_tenants, {tenant for tenant, *_ in held})
        of_plans = limits_by_key(catalog)
        counting = {
            tenant: Counting(found[tenant].license if tenant in found else None, catalog, of_plans)
            for tenant, *_ in held
        }
        spent: dict[tuple[str, str, str], int] = {}
        for start in range(0, len(held), _CHUNK):
            part = held[start : start + _CHUNK]
            spent |= await self._database.read(
                ledger.spend_from,
                {(tenant, quota) for tenant, quota, *_ in part},
                {sidecar for *_, sidecar, _ in part},
            )
        holdings: list[Holding] = []
        for tenant, quota, sidecar, register in held:
            limit = limit_key_of(quota.rpartition(":")[0])
            # What was spent at a rate is past; only a share is held.
            is_rate = counting[tenant].kind(limit) is Kind.RATE
            units = 0 if is_rate else spent.get((tenant, quota, sidecar), 0)
            holdings.append(Holding(tenant, quota, limit, sidecar, register, units))
        return holdings

    async def _seal(self, holdings: Sequence[Holding], pairs: Mapping[str, Pair]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for start in range(0, len(holdings), _CHUNK):
            part = holdings[start : start + _CHUNK]
            answers = await self._registers.seal([Seal(holding, pairs[holding.tenant]) for holding in part])
            outcomes += [Outcome(holding, answer) for holding, answer in zip(part, answers, strict=True)]
        return outcomes


def _record(connection: Connection, holdings: Sequence[Holding], *, by: str, now_us: int) -> None:
    by_sidecar: dict[str, list[Holding]] = {}
    for holding in holdings:
        by_sidecar.setdefault(holding.sidecar, []).append(holding)
    for sidecar, mine in by_sidecar.items():
        access.record(
            connection,
            by=by,
            action="sidecar.reclaim",
            target=sidecar,
            before={
                "registers": len(mine),
                "granted": {_name(one): one.register.granted for one in mine[:AUDITED_MAX]},
            },
            after={"granted": {_name(one): one.counted for one in mine[:AUDITED_MAX]}},
            now_us=now_us,
        )


def _name(holding: Holding) -> str:
    return f"{holding.tenant} {holding.quota}"


def _now_us(states: Mapping[str, MarkState | None]) -> int:
    return max(state.now_ms for state in states.values() if state is not None) * 1_000
