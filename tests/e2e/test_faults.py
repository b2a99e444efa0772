"""Real processes that are killed, paused and robbed of their data under load: what clients were told still holds.

Clients keep their own record of every answer. At the end the limit was not exceeded (P1), everything that was not
spent can still be spent (P2), and the ledger holds every answered decision exactly once, as answered (P6).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support.fleet import Fleet, wait_until
from tests.support.ledger import recorded_decisions
from tests.support.load import Record, drive, spend_the_rest
from tests.support.postgres import PostgresProcess

LIMIT = 40_000
CATALOG = f"""\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Action
name: report.synced
feature: reports
durability: synced
---
kind: Action
name: report.shipped
feature: reports
durability: shipped
---
kind: Plan
name: pro
features:
  reports:
    limits:
      - {{name: monthly, amount: {LIMIT}, per: month}}
---
kind: Plan
name: large
features:
  reports:
    limits:
      - {{name: monthly, amount: 1_000_000_000, per: month}}
"""
ACTIONS = ["report.export", "report.synced", "report.shipped"]
APPROVED = 1
_NUMBERS = itertools.count()
AWAY_S = 10
"""How long Redis answers nothing. A lease can be spent for 60 seconds after its last renewal."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One for several tests, each with a tenant of its own."""
    with started(Fleet(tmp_path_factory.mktemp("fleet"))) as fleet:
        yield fleet


@contextmanager
def started(fleet: Fleet) -> Iterator[Fleet]:
    try:
        fleet.start()
        fleet.push(CATALOG)
        yield fleet
    finally:
        fleet.stop()


def licensed(fleet: Fleet, plan: str) -> str:
    """A new tenant."""
    tenant = f"tenant-{next(_NUMBERS)}"
    fleet.licet("license", "create", tenant, "--plan", plan, "--wait")
    return tenant


Fault = Callable[[Fleet, random.Random], None]


def kill_a_sidecar(fleet: Fleet, chance: random.Random) -> None:
    sidecar = chance.choice(fleet.sidecars)
    sidecar.kill()
    sidecar.start()


def kill_the_server(fleet: Fleet, _: random.Random) -> None:
    fleet.server.kill()
    fleet.server.start()


def kill_redis(fleet: Fleet, _: random.Random) -> None:
    fleet.valkey.kill()
    fleet.valkey.start()


def empty_redis(fleet: Fleet, _: random.Random) -> None:
    fleet.valkey.command("FLUSHALL")


def wipe_redis(fleet: Fleet, _: random.Random) -> None:
    fleet.valkey.wipe()


def pause_redis(fleet: Fleet, _: random.Random) -> None:
    fleet.valkey.pause()
    time.sleep(1.5)  # longer than calls wait, and than heads and heartbeats are apart
    fleet.valkey.resume()


@pytest.mark.parametrize(
    ("faults", "count"),
    [
        pytest.param([kill_a_sidecar], 6, id="sidecars killed"),
        pytest.param([kill_the_server], 3, id="control plane killed"),
        pytest.param([kill_redis], 2, id="redis killed"),
        pytest.param([empty_redis], 1, id="redis emptied"),
        pytest.param([wipe_redis], 1, id="redis replaced by an empty one"),
        pytest.param(
            [kill_a_sidecar, kill_the_server, pause_redis, kill_a_sidecar, kill_redis], 10, id="one after the other"
        ),
    ],
)
def test_answers_hold_under(fleet: Fleet, faults: list[Fault], count: int) -> None:
    holds_under(fleet, faults, count)


def test_answers_hold_under_a_killed_postgresql(tmp_path: Path, postgres_process: PostgresProcess) -> None:
    def kill_the_database(*_: object) -> None:
        postgres_process.kill()
        postgres_process.start()

    with started(Fleet(tmp_path, database_url=postgres_process.url())) as fleet:
        holds_under(fleet, [kill_the_database, kill_a_sidecar, kill_the_server], 6)


def holds_under(fleet: Fleet, faults: list[Fault], count: int) -> None:
    """``count`` faults hit a fleet at work, in turn; then everything that clients were told holds."""
    tenant = licensed(fleet, "pro")
    record = Record()
    chance = random.Random(count)

    async def load() -> None:
        until = asyncio.Event()
        clients = asyncio.create_task(
            drive(fleet.addresses, record, tenant=tenant, action=ACTIONS, until=until, clients=12, pause_s=0.04)
        )
        for number in range(count):
            before = len(record.approved) + len(record.refused)
            await asyncio.to_thread(faults[number % len(faults)], fleet, chance)
            # Some answers in between, whatever they are: every fault hits a system at work.
            await asyncio.to_thread(
                wait_until, "answers go on", lambda then=before: len(record.approved) + len(record.refused) > then + 150
            )
        until.set()
        await clients

    asyncio.run(load())
    for number in range(fleet.count):
        fleet.wait_ready(number)

    answered = record.approved.keys() | record.refused.keys()
    wait_until("the ledger has every answer", lambda: answered <= recorded_decisions(fleet, tenant).keys())
    ledger = recorded_decisions(fleet, tenant)
    assert {name: ledger[name] for name in record.approved} == {
        name: (APPROVED, units) for name, units in record.approved.items()
    }
    assert all(ledger[name][0] != APPROVED for name in record.refused)
    spent = sum(units for effect, units in ledger.values() if effect == APPROVED)
    assert record.units <= spent <= LIMIT

    rest = asyncio.run(spend_the_rest(fleet.addresses[0], tenant=tenant, action="report.export"))
    assert spent + rest == LIMIT
    wait_until("the ledger is consistent", lambda: fleet.licet("ledger", "verify")["ok"])


def test_what_was_answered_as_shipped_outlives_the_pod_and_its_volume(tmp_path: Path) -> None:
    with started(Fleet(tmp_path)) as fleet:  # of its own: what the lost ones held is waited for
        outlives_the_pod_and_its_volume(fleet)


def outlives_the_pod_and_its_volume(fleet: Fleet) -> None:
    tenant = licensed(fleet, "large")
    record = Record()

    async def load() -> None:
        until = asyncio.Event()
        clients = asyncio.create_task(
            drive(fleet.addresses, record, tenant=tenant, action="report.shipped", until=until, clients=12)
        )
        for number, sidecar in enumerate(fleet.sidecars[:2]):
            before = len(record.approved)
            await asyncio.to_thread(wait_until, "answers go on", lambda then=before: len(record.approved) > then + 300)
            sidecar.kill()
            shutil.rmtree(fleet.directory / f"sidecar-{number}")
            sidecar.start()
        until.set()
        await clients

    asyncio.run(load())
    wait_until(
        "the ledger has every answer", lambda: record.approved.keys() <= recorded_decisions(fleet, tenant).keys()
    )
    ledger = recorded_decisions(fleet, tenant)
    assert {name: ledger[name] for name in record.approved} == {
        name: (APPROVED, units) for name, units in record.approved.items()
    }
    assert not record.refused
    assert len(record.approved) > 600


def test_a_ledger_restored_from_a_backup_of_mid_run_gets_again_what_it_lost(tmp_path: Path) -> None:
    with started(Fleet(tmp_path)) as fleet:
        gets_again_what_it_lost(fleet)


def gets_again_what_it_lost(fleet: Fleet) -> None:
    tenant = licensed(fleet, "large")
    record = Record()
    live, backup = fleet.directory / "server" / "licet.db", fleet.directory / "backup.db"

    async def load(answers: int) -> None:
        until = asyncio.Event()
        clients = asyncio.create_task(
            drive(fleet.addresses, record, tenant=tenant, action=ACTIONS, until=until, clients=12)
        )
        wanted = len(record.approved) + answers
        await asyncio.to_thread(wait_until, "answers go on", lambda: len(record.approved) >= wanted)
        until.set()
        await clients

    asyncio.run(load(500))
    with closing(sqlite3.connect(live, timeout=30)) as database, closing(sqlite3.connect(backup)) as copied:
        database.backup(copied)
    asyncio.run(load(500))
    wait_until(
        "the ledger has every answer", lambda: record.approved.keys() <= recorded_decisions(fleet, tenant).keys()
    )
    waits = "licet_log_events_unacknowledged"
    wait_until("all is acknowledged", lambda: not any(fleet.metric(one, waits) for one in range(fleet.count)))

    fleet.server.kill()
    for suffix in ("-wal", "-shm"):
        live.with_name(live.name + suffix).unlink(missing_ok=True)
    shutil.copy(backup, live)
    assert not record.approved.keys() <= recorded_decisions(fleet, tenant).keys()
    fleet.server.command = [*fleet.server.command, "--new-generation"]
    fleet.server.start()
    # Nobody asks anything: what was acknowledged before comes again by itself.
    wait_until(
        "the ledger has every answer again", lambda: record.approved.keys() <= recorded_decisions(fleet, tenant).keys()
    )
    ledger = recorded_decisions(fleet, tenant)
    assert {name: ledger[name] for name in record.approved} == {
        name: (APPROVED, units) for name, units in record.approved.items()
    }
    wait_until("the ledger is consistent", lambda: fleet.licet("ledger", "verify")["ok"])
    assert fleet.licet("ledger", "verify")["lost"] == []


def test_no_answer_changes_while_redis_is_away_and_leases_last(fleet: Fleet) -> None:
    tenant = licensed(fleet, "large")
    record = Record()

    async def load() -> None:
        until = asyncio.Event()
        clients = asyncio.create_task(
            drive(fleet.addresses, record, tenant=tenant, action="report.export", until=until, clients=12, pause_s=0.02)
        )
        await asyncio.to_thread(wait_until, "leases are held", lambda: len(record.approved) > 300)
        fleet.valkey.pause()
        await asyncio.sleep(AWAY_S)
        fleet.valkey.resume()
        before = len(record.approved)
        await asyncio.to_thread(wait_until, "answers go on", lambda: len(record.approved) > before + 300)
        until.set()
        await clients

    asyncio.run(load())
    assert not record.refused
    assert not record.lost
    assert not record.unlogged
    assert record.degraded > 0
    wait_until(
        "the ledger has every answer", lambda: record.approved.keys() <= recorded_decisions(fleet, tenant).keys()
    )
    ledger = recorded_decisions(fleet, tenant)
    assert {name: ledger[name] for name in record.approved} == {
        name: (APPROVED, units) for name, units in record.approved.items()
    }
