"""Eight sidecars and 64 clients race for 10,000 units, while sidecars are killed and Redis is restarted, robbed of its
last writes, and fails over to replicas that lag.

Clients keep their own record. What they were answered never exceeds the limit (P1), and all of it can be spent (P2);
the ledger says the same. Where a sidecar never comes back after a loss in Redis, the excess of a limit that is not
``durable`` is at most what that loss took from it; a durable limit has none.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import redis

from licet.wire.registers import REGISTER_FIELD, parse_register
from tests.support.fleet import Fleet, wait_until
from tests.support.ledger import approved_units
from tests.support.load import Record, drive, spend_the_rest
from tests.support.proxy import TcpProxy
from tests.support.valkey import ValkeyProcess

LIMIT: Final = 10_000
SIDECARS: Final = 8
CLIENTS: Final = 64
KILL_EACH_S: Final = 1.0
PLAIN, DURABLE = "acme", "globex"
ALWAYS: Final = ("--appendfsync", "always", "--repl-diskless-sync-delay", "0")
CATALOG: Final = f"""\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Plan
name: plain
features:
  reports:
    limits:
      - {{name: monthly, amount: {LIMIT}, per: month}}
---
kind: Plan
name: durable
features:
  reports:
    limits:
      - {{name: monthly, amount: {LIMIT}, per: month, durable: true}}
"""
SHORT_HOLDS: Final = "from licet.wire import registers; registers.HOLD_S, registers.HOLD_MARGIN_S = 6, 2"
"""So that a sidecar that never comes back is waited for for eight seconds instead of 75."""


@dataclass
class Race:
    """Clients of one or two tenants, and a killer of sidecars, on a fleet."""

    fleet: Fleet
    records: dict[str, Record]
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    gone: set[int] = field(default_factory=set)
    """Sidecars that do not come back."""
    _over: threading.Event = field(default_factory=threading.Event)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def run(self, faults: Callable[[Race], None], *, kills: bool = True) -> None:
        """Races until ``faults`` is through; meanwhile with ``kills`` a sidecar dies each second, and is restarted."""
        asyncio.run(self._run(faults, kills))

    def wait_spent(self, units: int, *tenants: str) -> None:
        """Waits until clients were approved so many units of each of the tenants, or of all."""
        wait_until(
            f"{units} units are spent", lambda: all(self.records[one].units >= units for one in tenants or self.records)
        )

    def wait_exhausted(self) -> None:
        """Waits until clients were told that a limit is spent."""
        wait_until(
            "the limits are spent",
            lambda: all("QUOTA_EXHAUSTED" in one.refused.values() for one in self.records.values()),
        )

    def lose(self, number: int) -> None:
        """A sidecar dies and its disk with it."""
        with self._turn:
            self.gone.add(number)
            self.fleet.sidecars[number].kill()
            shutil.rmtree(self.fleet.directory / f"sidecar-{number}")

    async def _run(self, faults: Callable[[Race], None], kills: bool) -> None:
        until = asyncio.Event()
        clients = [
            asyncio.create_task(
                drive(
                    self.fleet.addresses,
                    record,
                    tenant=tenant,
                    action="report.export",
                    until=until,
                    clients=CLIENTS // len(self.records),
                    units_max=3,
                    pause_s=0.1,
                )
            )
            for tenant, record in self.records.items()
        ]
        if not kills:
            self._over.set()
        killing = asyncio.create_task(asyncio.to_thread(self._kill_sidecars))
        try:
            await asyncio.to_thread(faults, self)
        finally:
            self._over.set()
            await killing
            until.set()
            await asyncio.gather(*clients)

    def _kill_sidecars(self) -> None:
        while not self._over.wait(KILL_EACH_S):
            with self._turn:
                number = self.chance.choice([one for one in range(self.fleet.count) if one not in self.gone])
                self.fleet.sidecars[number].kill()
                self.fleet.sidecars[number].start()


class Redundant:
    """Two Valkeys, one the replica of the other, behind one address."""

    def __init__(self, directory: Path) -> None:
        self.primary = ValkeyProcess(directory / "valkey-a", options=ALWAYS).start()
        self.replica = ValkeyProcess(directory / "valkey-b", options=ALWAYS).start()
        self.address = TcpProxy(self.primary.port).start()
        self.replication = TcpProxy(self.primary.port).start()
        self.follow()

    def follow(self) -> None:
        """Makes the one a replica of the other, and waits until it has everything."""
        self.replication.point_to(self.primary.port)
        self.replica.command("REPLICAOF", "127.0.0.1", str(self.replication.port))
        wait_until(
            "the replica follows", lambda: "master_link_status:up" in self.replica.command("INFO", "replication")
        )

    def fail_over(self) -> None:
        """The replica becomes the primary, without what was held back; the old primary answers nobody any more."""
        self.replication.point_to(self.replica.port)
        self.replica.command("REPLICAOF", "NO", "ONE")
        self.primary, self.replica = self.replica, self.primary
        self.address.point_to(self.primary.port)

    def stop(self) -> None:
        """Ends all of it."""
        self.address.stop()
        self.replication.stop()
        self.primary.kill()
        self.replica.kill()


@dataclass(frozen=True)
class Site:
    """A fleet on redundant Redis."""

    servers: Redundant
    fleet: Fleet

    def license(self, tenant: str, plan: str) -> None:
        """A tenant with a limit of its own."""
        self.fleet.licet("license", "create", tenant, "--plan", plan, "--wait")


def site(directory: Path, *, count: int, prelude: str = "") -> Iterator[Site]:
    """A started one."""
    servers = Redundant(directory)
    fleet = Fleet(
        directory,
        count=count,
        valkey=servers.primary,
        redis_url=servers.address.url,
        sidecar_flags=("--durable-replicas", "1"),
        prelude=prelude,
    )
    try:
        fleet.start()
        fleet.push(CATALOG)
        yield Site(servers, fleet)
    finally:
        fleet.stop()
        servers.stop()


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for several tests: it takes longer to start than to be raced on."""
    yield from site(tmp_path_factory.mktemp("eight"), count=SIDECARS)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Site]:
    """One where nobody is waited for long."""
    yield from site(tmp_path, count=3, prelude=SHORT_HOLDS)


def test_the_limit_and_no_unit_more_is_spent_when_redis_is_restarted(eight: Site) -> None:
    def restart_twice(race: Race) -> None:
        for spent in (LIMIT // 4, LIMIT // 2):
            race.wait_spent(spent)
            eight.servers.primary.restart()
        race.wait_exhausted()

    eight.license("restarted", "plain")
    race = Race(eight.fleet, {"restarted": Record()})
    race.run(restart_twice)
    spend_and_compare(race, "restarted")


def test_the_limit_and_no_unit_more_is_spent_when_redis_loses_its_last_writes(eight: Site) -> None:
    """Killed, it comes back as it was a while ago: what ``appendfsync everysec`` may mean when a machine crashes."""

    def rob_twice(race: Race) -> None:
        valkey = eight.servers.primary
        earlier = race.fleet.directory / "earlier"
        for spent in (LIMIT // 5, LIMIT // 2):
            race.wait_spent(spent)
            shutil.copytree(valkey.data_dir, earlier)
            race.wait_spent(spent + LIMIT // 20)
            valkey.kill()
            shutil.rmtree(valkey.data_dir)
            earlier.rename(valkey.data_dir)
            valkey.start()
        race.wait_exhausted()

    eight.license("robbed", "plain")
    race = Race(eight.fleet, {"robbed": Record()})
    race.run(rob_twice)
    spend_and_compare(race, "robbed")


def test_the_limit_and_no_unit_more_is_spent_when_redis_fails_over_and_back(eight: Site) -> None:
    def fail_over_and_back(race: Race) -> None:
        for spent in (LIMIT // 5, LIMIT // 2):
            race.wait_spent(spent)
            eight.servers.replication.hold()
            race.wait_spent(spent + LIMIT // 20, PLAIN)
            eight.servers.fail_over()
            eight.servers.follow()  # the old primary was never restarted, and is the next one

    eight.license(PLAIN, "plain")
    eight.license(DURABLE, "durable")
    race = Race(eight.fleet, {PLAIN: Record(), DURABLE: Record()})
    race.run(fail_over_and_back)
    spend_and_compare(race, PLAIN)
    spend_and_compare(race, DURABLE)


def test_what_is_lost_of_a_lost_sidecar_is_the_only_excess_and_there_is_none_of_a_durable_limit(three: Site) -> None:
    servers, last = three.servers, three.fleet.count - 1
    name = re.search(r'"sidecar": "(\w+)"', three.fleet.sidecars[last].log())
    assert name is not None
    lost = 0

    def lose_it(race: Race) -> None:
        nonlocal lost
        race.wait_spent(LIMIT // 5)
        three.fleet.server.pause()  # so that what is spent now is in no ledger
        servers.replication.hold()
        race.wait_spent(LIMIT // 3, PLAIN)
        wait_until(
            "a lease is not on the replica",
            lambda: granted(servers.primary, PLAIN, name[1]) > granted(servers.replica, PLAIN, name[1]),
        )
        race.lose(last)
        servers.fail_over()
        lost = granted(servers.replica, PLAIN, name[1]) - granted(servers.primary, PLAIN, name[1])
        three.fleet.server.resume()
        servers.follow()

    three.license(PLAIN, "plain")
    three.license(DURABLE, "durable")
    race = Race(three.fleet, {PLAIN: Record(), DURABLE: Record()})
    race.run(lose_it, kills=False)
    assert lost > 0
    for tenant in (PLAIN, DURABLE):
        asyncio.run(spend_the_rest(three.fleet.addresses[0], tenant=tenant, action="report.export"))
    wait_until(
        "the others have shipped everything",
        lambda: not any(three.fleet.metric(number, "licet_log_events_unacknowledged") for number in range(last)),
    )
    for tenant, most in ((PLAIN, LIMIT + lost), (DURABLE, LIMIT)):
        # What the lost one answered and did not ship is in the clients' record only.
        approved = race.records[tenant].approved | approved_units(three.fleet, tenant)
        assert sum(approved.values()) <= most


def granted(valkey: ValkeyProcess, tenant: str, sidecar: str) -> int:
    """Units that a server knows to be leased to a sidecar, of the one quota of a tenant."""
    with redis.Redis(port=valkey.port) as client:
        fields = [client.hget(key, f"{REGISTER_FIELD}{sidecar}") for key in client.keys(f"licet:{{{tenant}}}:q:*")]
    return sum(parse_register(field).granted for field in fields if field)


def spend_and_compare(race: Race, tenant: str) -> None:
    """The dead are back: all that is left can be spent, and the ledger says what clients say."""
    fleet, record = race.fleet, race.records[tenant]
    for number in range(fleet.count):
        fleet.wait_ready(number)
    assert record.units <= LIMIT
    wait_until("the ledger has every answer", lambda: record.approved.keys() <= approved_units(fleet, tenant).keys())
    rest = asyncio.run(spend_the_rest(fleet.addresses[0], tenant=tenant, action="report.export"))
    wait_until("the ledger says the limit", lambda: sum(approved_units(fleet, tenant).values()) >= LIMIT)
    ledger = approved_units(fleet, tenant)
    assert sum(ledger.values()) == LIMIT
    assert {name: ledger[name] for name in record.approved} == record.approved
    assert record.units + rest <= LIMIT
    wait_until("the ledger is consistent", lambda: fleet.licet("ledger", "verify")["ok"])
