"""Many sidecars in one process, to count how many of their checks wait: real engines, real leasing, the model of the
registers, and time that moves only when it is moved. No log, no sockets.

What takes time in reality takes none here: a check that has to call Redis is counted as one that waited, and is then
decided again in the same instant.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from licet.domain.catalog import Catalog, License
from licet.domain.entitlements import entitlements_of, limits_of
from licet_sidecar.bootstrap import UPKEEP_S
from licet_sidecar.core.decision import Decision, LeaseWait
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.tenant import Tenant
from licet_sidecar.ports import LeaseStore
from licet_sidecar.services.leasing import LeasingService
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.tally import Tally
from tests.support.fake_clock import START_US, FakeClock
from tests.support.fake_lease_store import FakeLeaseStore, FakeRegisters

TICK_S: Final = 0.05
EPOCH: Final = 1
PATIENCE_S: Final = 5.0
TURNS: Final = 4
"""Turns of the event loop in each tick, so that calls under way come to their end: nothing else here yields."""


class _Log:
    def append(self, records: bytes, events: int) -> None:
        """Forgets it."""


class SimulatedSidecar:
    """One of them. ``checks``, ``waits``: all, and those that waited; ``cold``: those that were a tenant's first."""

    def __init__(self, name: str, fleet: SimulatedFleet, number: int) -> None:
        self.checks = self.waits = self.cold = self.denied = 0
        self._fleet = fleet
        self.engine = Engine(LeaseBook(1), tenants_max=1_000_000, staleness_us_max=10**15)
        self.engine.leases.live = fleet.count
        self.engine.install_bundle(Rulebook(fleet.catalog, generation=1, revision=1, observe=False))
        self.engine.revision, self.engine.as_of_us = 1, fleet.clock.us
        link, self.tally = LinkState(), Tally()
        link.succeeded()
        stand_ins: Any = (_Log(), fleet.clock, link)
        store: LeaseStore = FakeLeaseStore(fleet.registers, sidecar=name, incarnation=1)
        self.leasing = LeasingService(self.engine, store, *stand_ins, self.tally, on_replaced=fleet.failed)
        self._upkeep_due_s = UPKEEP_S * (number + 1) / fleet.count

    async def check(self, tenant: str, action: str, units: int) -> Decision:
        """One check, which consumes."""
        clock, engine = self._fleet.clock, self.engine
        self.checks += 1
        if tenant not in engine.tenants:
            self.cold += 1
            engine.install_license(Tenant(License(tenant, "pro"), generation=1, revision=1, document=b""))
        inquiry = Inquiry(tenant, action)
        inquiry.quantity = units
        waited = False
        while True:
            outcome = engine.decide(inquiry, now_us=clock.us, boot_ms=clock.ms, patient=True)
            if isinstance(outcome, Decision):
                break
            waited = True
            assert isinstance(outcome, LeaseWait)
            await self.leasing.acquire(outcome, PATIENCE_S)
        self.waits += waited
        if outcome.spends and any(units for _, units in outcome.spends):
            for lease, taken in outcome.spends:
                if LeaseBook.spend(lease, taken, clock.ms):
                    self.leasing.refill_soon(tenant)
        else:
            self.denied += 1
        return outcome

    async def upkeep_when_due(self, elapsed_s: float) -> None:
        """As ``bootstrap`` runs it."""
        if elapsed_s >= self._upkeep_due_s:
            self._upkeep_due_s += UPKEEP_S
            await self.leasing.upkeep()


class SimulatedFleet:
    """``count`` sidecars, and the registers they share. All tenants hold the plan ``pro``."""

    def __init__(self, catalog: Catalog, tenants: Sequence[str], *, count: int) -> None:
        self.catalog = catalog
        self.count = count
        self.clock = FakeClock()
        self.registers = FakeRegisters(now_ms=START_US // 1_000, run_id="run1")
        for tenant in tenants:
            amounts = limits_of(entitlements_of(License(tenant, "pro"), catalog))
            self.registers.begin(tenant, EPOCH)
            self.registers.open(tenant, self.registers.contents.marks[tenant].pair, 1, amounts)
        self.sidecars = [SimulatedSidecar(f"{number:032x}", self, number) for number in range(count)]
        self._elapsed_s = 0.0

    def failed(self, why: str) -> None:
        """Nothing here may fail."""
        raise AssertionError(why)

    async def run(self, seconds: float, per_s: float, ask: Callable[[SimulatedSidecar], Any]) -> None:
        """Time passes, and ``ask`` is awaited ``per_s`` times a second for each sidecar, evenly."""
        owed = random.Random(1).random()
        for _ in range(round(seconds / TICK_S)):
            self.clock.advance(TICK_S)
            self.registers.now_ms += round(TICK_S * 1_000)
            self._elapsed_s += TICK_S
            owed += per_s * TICK_S
            for _ in range(TURNS):
                await asyncio.sleep(0)
            for sidecar in self.sidecars:
                sidecar.engine.as_of_us = self.clock.us
                await sidecar.upkeep_when_due(self._elapsed_s)
                for _ in range(int(owed)):
                    await ask(sidecar)
            owed -= int(owed)
