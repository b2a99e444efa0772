"""A deployment with an archive, killed under load: the ledger that is rebuilt from it is the one that was lost."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

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
kind: Plan
name: pro
features:
  reports:
    limits:
      - {name: monthly, amount: 1_000_000, per: month}
      - {name: each, amount: 500_000, per: month, scope: [subject]}
"""
ROUNDS = 4


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, count=2, server_flags=("--archive-dir", str(tmp_path / "archive")))
    try:
        fleet.start()
        fleet.push(CATALOG)
        fleet.licet("license", "create", "acme", "--plan", "pro", "--wait")
        yield fleet
    finally:
        fleet.stop()


async def load(fleet: Fleet, record: Record) -> None:
    """Clients ask all the while; the server is killed again and again, and a sidecar in between."""
    until = asyncio.Event()
    asking = asyncio.create_task(
        drive(fleet.addresses, record, tenant="acme", action="report.export", until=until, clients=4)
    )
    chance = random.Random(1)
    for number in range(ROUNDS):
        await asyncio.sleep(chance.uniform(0.5, 1.5))
        victim = fleet.server if number % 2 == 0 else fleet.sidecars[0]
        victim.kill()
        victim.start()
    await asyncio.sleep(1)
    until.set()
    await asking


def test_a_lost_ledger_is_rebuilt_event_by_event_after_kills_under_load(fleet: Fleet) -> None:
    record = Record()
    asyncio.run(load(fleet, record))
    answered = set(record.approved) | set(record.refused)
    assert len(answered) > 200
    wait_until("the ledger has everything", lambda: answered <= set(recorded_decisions(fleet)))
    wait_until("everything is acknowledged", lambda: not unacknowledged(fleet))
    agreed = fleet.licet("ledger", "reconcile")
    assert (agreed["ok"], agreed["archive"], agreed["quotas"] >= 5) == (True, [], True), agreed

    fleet.server.kill()
    before = totals(fleet)
    database = fleet.directory / "server" / "licet.db"
    for path in database.parent.glob("licet.db*"):
        path.unlink()
    done = fleet.licet(
        "ledger", "rebuild", "--from-archive", fleet.directory / "archive", "--state-dir", database.parent
    )
    assert done["events"] == len(before["events"])
    assert totals(fleet) == before
    assert answered <= set(recorded_decisions(fleet))


def unacknowledged(fleet: Fleet) -> int:
    return sum(item["log_last_seq"] != item["log_acked_seq"] for item in fleet.licet("sidecar", "list")["items"])


def totals(fleet: Fleet) -> dict[str, list[Any]]:
    queries = {
        "events": "SELECT l.log_id, e.seq, e.public, e.commitment, e.personal FROM ledger_events e JOIN ledger_logs l"
        " ON l.log = e.log ORDER BY 1, 2",
        "rollups": "SELECT * FROM ledger_rollups ORDER BY 1, 2, 3, 4, 5, 6, 7",
        "spend": "SELECT * FROM register_spend ORDER BY 1, 2, 3",
        "watermarks": "SELECT log_id, watermark FROM ledger_logs ORDER BY 1",
        "heads": "SELECT shard, blocks, head FROM ledger_shards WHERE blocks > 0 ORDER BY 1",
    }
    path = fleet.directory / "server" / "licet.db"
    with closing(sqlite3.connect(path, timeout=30)) as database:
        return {name: database.execute(query).fetchall() for name, query in queries.items()}
