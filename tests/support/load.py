"""Concurrent clients that keep their own record of every answer, to be held against the ledger."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import licet

DRAIN_S_MAX: Final = 90.0
"""Learning after a loss may take as long as a lease lives."""


@dataclass
class Record:
    """What clients were answered. ``approved`` maps decision ids to units; ``lost`` counts calls without an answer."""

    approved: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unlogged: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    degraded: int = 0

    @property
    def units(self) -> int:
        """Units approved by answers that arrived."""
        return sum(self.approved.values())


async def drive(
    addresses: list[str],
    record: Record,
    *,
    tenant: str,
    action: str | Sequence[str],
    until: asyncio.Event,
    clients: int,
    units_max: int = 20,
    pause_s: float = 0.002,
    seed: int = 1,
) -> None:
    """``clients`` clients ask one check after the other, at random sidecars, until the event is set. Of several actions
    each client takes any, each time.
    """
    actions = [action] if isinstance(action, str) else list(action)
    connections = [licet.AsyncClient(address) for address in addresses]

    async def client(number: int) -> None:
        chance = random.Random(f"{seed}/{number}")
        while not until.is_set():
            units = chance.randint(1, units_max)
            try:
                decision: Any = await chance.choice(connections).check(
                    tenant, chance.choice(actions), subject=f"user-{number}", quantity=units, timeout=2.0
                )
            except licet.LicetError as error:
                record.lost[type(error).__name__] += 1
                await asyncio.sleep(0.05)
                continue
            record.degraded += decision.degraded
            if not decision.decision_id:
                record.unlogged[decision.reason.name] += 1
            elif decision.approved:
                record.approved[decision.decision_id] = units
            else:
                record.refused[decision.decision_id] = decision.reason.name
            await asyncio.sleep(pause_s)

    try:
        await asyncio.gather(*(client(number) for number in range(clients)))
    finally:
        for connection in connections:
            await connection.close()


async def spend_the_rest(address: str, *, tenant: str, action: str, step: int = 1_000) -> int:
    """Asks one sidecar for all that is left, in shrinking steps, until nothing is or time is up; what was got."""
    deadline = asyncio.get_running_loop().time() + DRAIN_S_MAX
    got = 0
    async with licet.AsyncClient(address) as client:
        while asyncio.get_running_loop().time() < deadline:
            decision: Any = await client.check(tenant, action, quantity=step, timeout=5.0)
            if decision.approved:
                got += step
            elif decision.reason is not licet.Reason.QUOTA_EXHAUSTED:
                await asyncio.sleep(0.1)
            elif step > 1:
                step = max(1, step // 4)
            else:
                break
    return got
