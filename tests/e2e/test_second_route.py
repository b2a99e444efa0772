"""Redis away at the start, and away at the end: a sidecar serves all the same, and nothing that it answered is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import licet
from tests.support.fleet import Fleet, wait_until
from tests.support.ledger import recorded_decisions
from tests.support.load import Record, drive

CATALOG = """\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Action
name: report.bill
feature: reports
durability: shipped
---
kind: Plan
name: pro
features:
  reports: {}
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"), count=1, second_route=True)
    try:
        made.start()
        made.push(CATALOG)
        made.licet("license", "create", "acme", "--plan", "pro", "--wait")
        yield made
    finally:
        made.stop()


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """With everything running, whatever the test before left."""
    for program in (started.valkey, started.server, *started.sidecars):
        if not program.running:
            program.start()
    started.wait_ready(0)
    wait_until("Redis is used", lambda: started.metric(0, "licet_redis_up") == 1)
    return started


async def _load(fleet: Fleet, record: Record, answers: int) -> None:
    until = asyncio.Event()
    clients = asyncio.create_task(
        drive(fleet.addresses, record, tenant="acme", action="report.export", until=until, clients=8)
    )
    while len(record.approved) < answers:
        assert not clients.done()
        await asyncio.sleep(0.02)
    until.set()
    await clients


def _ledger_has(fleet: Fleet, record: Record) -> bool:
    return record.approved.keys() <= recorded_decisions(fleet).keys()


def test_a_sidecar_that_starts_while_redis_is_away_serves_and_its_usage_is_billed(fleet: Fleet) -> None:
    (sidecar,) = fleet.sidecars
    assert sidecar.stop() == 0
    for file in ("snapshot", "head"):
        (fleet.directory / "sidecar-0" / file).unlink(missing_ok=True)  # it must not know anything by itself
    fleet.valkey.kill()
    sidecar.start()
    fleet.wait_ready(0)
    record = Record()
    asyncio.run(_load(fleet, record, 200))
    assert not record.refused
    assert record.degraded == len(record.approved)
    wait_until("the ledger has every answer", lambda: _ledger_has(fleet, record))

    # What is pushed meanwhile takes force.
    fleet.licet("license", "create", "globex", "--plan", "pro")

    async def known() -> bool:
        async with licet.AsyncClient(fleet.addresses[0]) as client:
            return (await client.check("globex", "report.export", timeout=5.0)).approved

    wait_until("the new tenant is known", lambda: asyncio.run(known()))

    fleet.valkey.start()
    wait_until("Redis is used again", lambda: fleet.metric(0, "licet_redis_up") == 1)
    asyncio.run(_load(fleet, record, 300))
    wait_until("the ledger has every answer", lambda: _ledger_has(fleet, record))
    wait_until("the ledger is whole", lambda: fleet.licet("ledger", "verify")["ok"])


def test_a_sidecar_that_ends_while_redis_is_away_hands_everything_in(fleet: Fleet) -> None:
    record = Record()
    asyncio.run(_load(fleet, record, 300))
    fleet.valkey.kill()
    asyncio.run(_load(fleet, record, 900))
    (sidecar,) = fleet.sidecars
    assert sidecar.stop() == 0
    ledger = recorded_decisions(fleet)
    assert record.approved.keys() <= ledger.keys()
    assert {name: ledger[name][1] for name in record.approved} == record.approved
    assert fleet.licet("ledger", "verify")["ok"]
    assert sidecar.log().splitlines()[-1].count('"unacknowledged": 0') == 1


def test_what_could_not_be_handed_in_is_counted_and_goes_with_the_next_start(fleet: Fleet) -> None:
    record = Record()
    fleet.valkey.kill()
    asyncio.run(_load(fleet, record, 100))
    fleet.server.kill()
    asyncio.run(_load(fleet, record, 200))
    (sidecar,) = fleet.sidecars
    fleet.restart_with(0, "--drain-grace", "1s")
    assert sidecar.stop() == 0
    assert "stopping with events the ledger has not acknowledged" in sidecar.log()
    fleet.server.start()
    fleet.valkey.start()
    sidecar.start()
    fleet.wait_ready(0)
    wait_until("the ledger has every answer", lambda: _ledger_has(fleet, record))
    wait_until("the ledger is whole", lambda: fleet.licet("ledger", "verify")["ok"])
