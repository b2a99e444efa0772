"""How many checks wait for the network: simulated sidecars with real leasing, and a clock that costs no time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, Limit, Plan
from licet.domain.ids import LimitKey
from licet.domain.windows import Period
from tests.support.simulated_fleet import SimulatedFleet, SimulatedSidecar

ZIPF_SIDECARS = 50
ZIPF_TENANTS = 2_000
ZIPF_PER_S = 100
ZIPF_S = 40
STEADY_SIDECARS = 3
STEADY_PER_S = 200
STEADY_S = 120
UNITS_MAX = 20


@dataclass(frozen=True, slots=True)
class Waits:
    """Checks, those that waited, those that were a tenant's first on their sidecar, and what was used of the limit by
    the tenant that used most.
    """

    checks: int
    waited: int
    first: int
    used_share: float

    @property
    def waited_share(self) -> float:
        """Of all checks."""
        return self.waited / self.checks

    @property
    def waited_later_share(self) -> float:
        """Of those that were no tenant's first; a first one always waits."""
        return (self.waited - self.first) / max(1, self.checks - self.first)


def run() -> dict[str, Waits]:
    """One tenant up to 80 % of its limit, and many of them in a Zipf distribution."""
    units = (UNITS_MAX + 1) / 2
    of_one = STEADY_SIDECARS * STEADY_PER_S * STEADY_S * units
    of_first = ZIPF_SIDECARS * ZIPF_PER_S * ZIPF_S * units / sum(1 / (number + 1) for number in range(ZIPF_TENANTS))
    many = f"{ZIPF_TENANTS:,} tenants (Zipf), {ZIPF_SIDECARS} sidecars"
    return {
        f"one tenant, {STEADY_SIDECARS} sidecars": asyncio.run(steady(round(of_one / 0.8))),
        f"{many}, wide limits": asyncio.run(zipf(10**8)),
        f"{many}, limits that the first one nears": asyncio.run(zipf(round(of_first / 0.8))),
    }


async def steady(
    limit: int, *, count: int = STEADY_SIDECARS, per_s: float = STEADY_PER_S, seconds: float = STEADY_S
) -> Waits:
    """One tenant, with requests of 1 to ``UNITS_MAX`` units."""
    chance = random.Random(1)
    fleet = SimulatedFleet(catalog(limit), ["acme"], count=count)

    async def ask(sidecar: SimulatedSidecar) -> None:
        await sidecar.check("acme", "report.export", chance.randint(1, UNITS_MAX))

    await fleet.run(seconds, per_s, ask)
    return _waits(fleet, limit)


async def zipf(
    limit: int,
    *,
    count: int = ZIPF_SIDECARS,
    tenants: int = ZIPF_TENANTS,
    per_s: float = ZIPF_PER_S,
    seconds: float = ZIPF_S,
) -> Waits:
    """Tenant k is asked about 1/k as often as the first."""
    chance = random.Random(1)
    names = [f"tenant-{number}" for number in range(tenants)]
    weights = list(accumulate(1 / (number + 1) for number in range(tenants)))
    fleet = SimulatedFleet(catalog(limit), names, count=count)

    async def ask(sidecar: SimulatedSidecar) -> None:
        (tenant,) = chance.choices(names, cum_weights=weights)
        await sidecar.check(tenant, "report.export", chance.randint(1, UNITS_MAX))

    await fleet.run(seconds, per_s, ask)
    return _waits(fleet, limit)


def catalog(limit: int) -> Catalog:
    """One feature with a monthly limit."""
    return Catalog.of(
        [
            Feature("reports"),
            Action("report.export", {"": "reports"}),
            Plan("pro", {"reports": Entitlement(None, (Limit(LimitKey("reports:month"), limit, Period.MONTH),))}),
        ]
    )


def _waits(fleet: SimulatedFleet, limit: int) -> Waits:
    def total(field: str) -> int:
        return sum(getattr(sidecar, field) for sidecar in fleet.sidecars)

    spent: Counter[str] = Counter()
    for sidecar in fleet.sidecars:
        for tenant, held in sidecar.engine.leases.tenants.items():
            spent[tenant] += sum(lease.used for lease in held.all())
    return Waits(total("checks"), total("waits"), total("cold"), max(spent.values()) / limit)
