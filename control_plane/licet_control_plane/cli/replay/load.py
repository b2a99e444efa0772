"""The load generator: asks every row of a workload of sidecars in turn, so many at a time.

As many workers as calls may be in flight take rows from one iterator, so rows start in the order of the file and no
queue grows. At a recorded speed a worker sleeps until its row is due; rows that are due while all workers wait for
answers start late, and are counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import licet
from licet.client.model import ContextValue
from licet_control_plane.cli.replay.tally import Answers, SidecarTally
from licet_control_plane.cli.replay.workload import Row

LATE_S: Final = 0.1
"""A row that starts this much after its time is late: the load was not what was recorded."""

_NS_PER_S: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send where. ``speed`` 0 means as fast as answers come; 2 means twice as fast as recorded.

    ``meters`` names the units of a row in their order; the one meter "" is sent as ``quantity``.
    """

    run: str
    tenant: str
    action: str
    meters: Sequence[str]
    sidecars: Sequence[str]
    concurrency: int
    timeout_s: float
    speed: float = 0.0
    first_at_ns: int = 0
    context: Mapping[str, ContextValue] | None = None
    roles: Sequence[str] = ()


class Load:
    """One run. ``started`` counts rows that were sent, ``late`` those that were not sent in time."""

    def __init__(self, plan: Plan, rows: Iterator[Row]) -> None:
        self.plan = plan
        self.answers = Answers([SidecarTally(address) for address in plan.sidecars])
        self.started = 0
        self.late = 0
        self.duration_s = 0.0
        self._rows = rows
        self._begin = 0.0

    async def run(self) -> None:
        """Send every row and wait for every answer.

        Raises:
            licet.InvalidRequest: the sidecar finds the first request malformed; the others are not sent then.
            ValueError: a sidecar address is not one.
        """
        clients = [licet.AsyncClient(address, timeout=self.plan.timeout_s) for address in self.plan.sidecars]
        self._begin = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.plan.concurrency):
                    group.create_task(self._worker(clients))
        except BaseExceptionGroup as failed:
            # Not `except*`: before Python 3.11.4 what is raised there comes wrapped in a group again.
            refused, others = failed.split(licet.InvalidRequest)
            if refused is None or others is not None:
                raise
            raise refused.exceptions[0] from None  # all rows are made alike, so one of these errors says it all
        finally:
            self.duration_s = time.perf_counter() - self._begin
            for client in clients:
                await client.close()

    async def _worker(self, clients: Sequence[licet.AsyncClient]) -> None:
        plan, tallies = self.plan, self.answers.sidecars
        for row in self._rows:
            index = self.started % len(clients)
            self.started += 1
            if plan.speed:
                await self._until_due(row)
            tally = tallies[index]
            sent_ns = time.perf_counter_ns()
            try:
                decision = await clients[index].check(
                    plan.tenant,
                    plan.action,
                    subject=licet.Subject(row.subject, roles=plan.roles) if row.subject or plan.roles else None,
                    quantity=row.units[0] if plan.meters[0] == "" else None,
                    quantities=None if plan.meters[0] == "" else dict(zip(plan.meters, row.units, strict=True)),
                    context=plan.context,
                    idempotency_key=f"{key_prefix(plan.run)}{row.number}",
                )
            except licet.InvalidRequest:
                raise
            except licet.LicetError as error:
                tally.errors[str(error)] += 1
            else:
                tally.count(decision, sum(row.units), time.perf_counter_ns() - sent_ns)

    async def _until_due(self, row: Row) -> None:
        due = self._begin + (row.at_ns - self.plan.first_at_ns) / _NS_PER_S / self.plan.speed
        wait_s = due - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        elif wait_s < -LATE_S:
            self.late += 1


def key_prefix(run: str) -> str:
    """What the idempotency keys of a run begin with; the number of the row follows."""
    return f"replay-{run}-"
