"""Quotas as operators see them, and dead sidecars whose units are taken back: the control plane on a real Valkey."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, License, Limit, Plan
from licet.domain.ids import LimitKey
from licet.domain.windows import FOREVER_S, Anchor, Period, window_at, window_of
from licet.wire.names import scope_digest
from licet_control_plane.api.app import make_app
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.fleet import GONE_S_MIN, Sidecar
from licet_control_plane.store import ledger
from licet_control_plane.store import sidecars as sidecar_store
from licet_control_plane.store.schema import audit
from tests.integration.test_api import assert_problem
from tests.support.control_plane import MONTHLY, NAMES, Deployment, deployment, heartbeat, until
from tests.support.registers import add_markers, look, make_quota, register
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

DEAD, OTHER, LIVE = "d" * 32, "e" * 32, "a" * 32


class Running(Deployment):
    """A deployment with an API client, and one tenant, acme."""

    client: httpx.AsyncClient
    start_s: int
    end_s: int

    @property
    def quota(self) -> str:
        """The quota of the month."""
        return f"{MONTHLY}:{self.start_s}"

    async def quotas(self, **params: Any) -> dict[str, Any]:
        """What the API shows of acme."""
        response = await self.client.get("/v1/tenants/acme/quotas", params=params)
        assert response.status_code == 200, response.text
        shown: dict[str, Any] = response.json()
        return shown

    async def reclaim(self, sidecar: str = DEAD, **body: Any) -> httpx.Response:
        """An order to reclaim."""
        return await self.client.post(f"/v1/sidecars/{sidecar}/reclaim", json=body)

    async def heard(self, name: str, *, ago_s: float, **changes: Any) -> None:
        """A sidecar that was heard of some time ago, and a registry that listened all the while."""
        now_s = time.time()
        fleet = self.plane.fleet
        fleet.sidecars[name] = Sidecar(heartbeat(name, **changes), now_s - ago_s)
        fleet._unsaved.add(name)
        await fleet.save(now_s)
        fleet._watched_since_s = -math.inf

    async def holds(self, registers: Mapping[str, str], tenant: str = "acme", *, base: int = 0) -> None:
        """Registers in the month's quota of a tenant."""
        await make_quota(self.redis, tenant, self.quota, registers, base=base)
        await add_markers(self.redis, tenant, {MONTHLY: f"{self.start_s}|{self.end_s}|0|0|0"})

    async def audited(self) -> list[Any]:
        """The audit trail of reclaims."""
        rows: list[Any] = await self.plane.database.read(
            lambda connection: connection.execute(select(audit).where(audit.c.action == "sidecar.reclaim")).all()
        )
        return rows


@pytest.fixture
async def running(
    tmp_path: Path, valkey_process: ValkeyProcess, long_suite_database_url: str
) -> AsyncIterator[Running]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=long_suite_database_url) as made:
        made.__class__ = Running
        assert isinstance(made, Running)
        made.start_s, made.end_s = window_at(Period.MONTH, int(time.time()))
        await made.push(100)
        await made.headed(await made.license("acme"))
        transport = httpx.ASGITransport(make_app(made.plane))
        headers = {"Authorization": f"Bearer {made.admin_key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
            made.client = client
            yield made


# Looking


async def test_shows_what_is_used_leased_and_reserved_and_who_holds_it(running: Running) -> None:
    await running.heard(LIVE, ago_s=1.0)
    await running.heard(DEAD, ago_s=400.0)
    now_ms = int(time.time() * 1_000)
    await running.holds({LIVE: register(30, 10, 5, at_ms=now_ms), DEAD: register(20, 8), OTHER: register(4, 4)}, base=7)
    shown = await running.quotas()
    assert shown["phase"] == "open"
    assert shown["since"]
    assert shown["next"] is None
    (quota,) = shown["items"]
    assert (quota["quota"], quota["limit"], quota["kind"]) == (running.quota, MONTHLY, "units")
    assert quota["window"]["per"] == "month"
    assert (quota["amount"], quota["used"], quota["reserved"], quota["leased"]) == (100, 29, 5, 27)
    assert (quota["remaining"], quota["overage"], quota["leased_by_dead"]) == (39, 0, 12)
    holders = {holder["sidecar"]: holder for holder in quota["holders"]}
    assert {name: holder["state"] for name, holder in holders.items()} == {LIVE: "live", DEAD: "dead", OTHER: "unknown"}
    assert 399 < holders[DEAD]["silent_s"] < 460
    assert (holders[LIVE]["granted"], holders[LIVE]["unspent"]) == (30, 15)


async def test_shows_one_limit_with_its_grants_and_no_limit_that_does_not_exist(running: Running) -> None:
    await running.holds({LIVE: register(10, 2)})
    grant = f"{MONTHLY}+topup"
    await make_quota(running.redis, "acme", f"{grant}:{running.start_s}", {LIVE: register(5, 5)})
    await add_markers(running.redis, "acme", {grant: f"{running.start_s}|{running.end_s}|0|0|0"})
    assert [quota["limit"] for quota in (await running.quotas(key=MONTHLY))["items"]] == [grant, MONTHLY]
    assert [quota["limit"] for quota in (await running.quotas(key=grant))["items"]] == [grant]
    response = await running.client.get("/v1/tenants/acme/quotas", params={"key": MONTHLY[:-1]})
    assert f"Did you mean '{MONTHLY}'" in assert_problem(response, 400, says="has no limit")["fix"]


async def test_shows_what_is_beyond_a_limit_that_was_lowered(running: Running) -> None:
    await running.holds({LIVE: register(10, 2)}, base=80)
    await running.headed(await running.push(60))
    (quota,) = (await running.quotas())["items"]
    assert (quota["amount"], quota["remaining"], quota["overage"]) == (60, 0, 22), "what is leased is not used"


async def test_limits_nobody_touched_and_tenants_nobody_knows(running: Running) -> None:
    shown = await running.quotas()
    assert (shown["items"], shown["untouched"]) == ([], [{"limit": MONTHLY, "amount": 100}])
    assert_problem(await running.client.get("/v1/tenants/nobody/quotas"), 404, says="nobody")


async def test_scopes_are_readable_when_somebody_used_them_lately_and_pages_hold_all(running: Running) -> None:
    limit = Limit(MONTHLY, 100, Period.MONTH, scope=("subject", "context.team"))
    plan = Plan("pro", {"reports": Entitlement(limits=(limit,))})
    catalog = Catalog.of([Feature("reports"), Action("report.export", {"": "reports"}), plan])
    await running.headed((await running.plane.changes.push(catalog, [], by="test")).revision)
    used = batch(1, 1, subject_type="user", subject_id="ada", context={"team": "blue"})
    await running.plane.database.write(ledger.record, 0, [DecodedBatch.of(used.pack())], keys=running.keys, now_us=1)
    known, unknown = scope_digest(("user/ada", "blue")), scope_digest(("user/bob", ""))
    for digest in (known, unknown):
        await make_quota(running.redis, "acme", f"{MONTHLY}@{digest}:{running.start_s}", base=3)
        await add_markers(running.redis, "acme", {f"{MONTHLY}@{digest}": f"{running.start_s}|{running.end_s}|0|0|0"})
    first = await running.quotas(limit=1, key=MONTHLY)
    second = await running.quotas(limit=1, key=MONTHLY, after=first["next"])
    assert second["next"] is None
    shown = {item["scope"]: item["scope_values"] for item in first["items"] + second["items"]}
    assert shown == {known: {"subject": "user/ada", "context.team": "blue"}, unknown: None}


# Taking back


async def test_reclaims_what_a_dead_sidecar_holds_and_has_not_spent(running: Running) -> None:
    await running.heard(DEAD, ago_s=400.0)
    await running.headed(await running.license("globex"))
    for tenant in ("acme", "globex"):
        await running.holds({DEAD: register(20, 8), LIVE: register(30, 10)}, tenant)
    spent = DecodedBatch.of(batch(1, 9, sidecar=DEAD, spends=[(running.quota, 1)], tenant="acme").pack())
    await running.plane.database.write(ledger.record, 0, [spent], keys=running.keys, now_us=1)

    dry = (await running.reclaim(dry_run=True)).json()
    assert [(item["tenant"], item["status"], item["freed"]) for item in dry["items"]] == [
        ("acme", "would_seal", 11),
        ("globex", "would_seal", 12),
    ]
    assert (await look(running.redis, "acme", running.quota))["sum"] == 50
    assert await running.audited() == []

    done = (await running.reclaim(DEAD[:12])).json()
    assert (done["sidecar"], done["next"], done["skipped"]) == (DEAD, None, [])
    assert [(item["tenant"], item["status"], item["freed"], item["counted"]) for item in done["items"]] == [
        ("acme", "sealed", 11, 9),
        ("globex", "sealed", 12, 8),
    ]
    after = await look(running.redis, "acme", running.quota)
    assert (after["base"], after["sum"]) == (9, 39)
    (line,) = await running.audited()
    assert (line.by, line.target) == ("admin", DEAD)
    assert json.loads(line.before)["granted"] == {f"{t} {running.quota}": 20 for t in ("acme", "globex")}
    assert json.loads(line.after)["granted"][f"acme {running.quota}"] == 9
    assert running.plane.fleet.sidecars[DEAD].gone, "it holds nothing any more"
    assert [one.gone for one in await running.plane.database.read(sidecar_store.load)] == [True]
    assert (await running.reclaim()).json()["items"] == []


SLOW_S_MAX = 20
"""No test that is this slow is told apart from one that hangs."""


def seconds_in(text: str, pattern: str) -> int:
    """The seconds that a message names."""
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])


async def test_a_sidecar_that_may_live_is_not_reclaimed(running: Running) -> None:
    await running.holds({LIVE: register(20, 8)})
    await running.heard(LIVE, ago_s=3.0)
    problem = assert_problem(await running.reclaim(LIVE), 409, says=" s ago")
    assert 3 <= seconds_in(problem["detail"], r"(\d+) s ago") < SLOW_S_MAX
    assert 75 - SLOW_S_MAX < seconds_in(problem["fix"], r"in (\d+) s") <= 72
    running.plane.fleet._watched_since_s = time.time() - 10.0  # the server itself has only just started to listen
    problem = assert_problem(await running.reclaim(DEAD), 409, says="nobody listened until 1")
    assert 10 <= seconds_in(problem["detail"], r"until (\d+) s ago") < SLOW_S_MAX
    assert 75 - SLOW_S_MAX < seconds_in(problem["fix"], r"in (\d+) s") < 70
    await running.heard(DEAD, ago_s=400.0)  # also when it is shown as dead
    running.plane.fleet._watched_since_s = time.time() - 10.0
    assert_problem(await running.reclaim(DEAD), 409, says="nobody listened until 1")
    assert (await look(running.redis, "acme", running.quota))["sum"] == 20
    dry = (await running.reclaim(LIVE, dry_run=True)).json()
    assert dry["wait_s"] > 0
    assert 3 <= seconds_in(dry["why_not"], r"(\d+) s ago") < SLOW_S_MAX


async def test_a_register_in_use_is_left_whatever_the_registry_says(running: Running) -> None:
    await running.heard(DEAD, ago_s=400.0)
    await running.holds({DEAD: register(20, 8, at_ms=int(time.time() * 1_000) - 10_000)})
    done = (await running.reclaim()).json()
    assert [item["status"] for item in done["items"]] == ["live"]
    assert not running.plane.fleet.sidecars[DEAD].gone


async def test_a_tenant_that_learns_is_skipped_and_named(running: Running) -> None:
    await running.heard(DEAD, ago_s=400.0)
    await running.holds({DEAD: register(20, 8)})
    running.plane.quotas.learning.clear()
    await running.redis.hset(NAMES.limits("acme"), "phase", "learning")
    assert_problem(await running.reclaim(tenant="acme"), 409, says="learning")
    done = (await running.reclaim()).json()
    assert (done["items"], done["skipped"]) == ([], ["acme"])
    assert not running.plane.fleet.sidecars[DEAD].gone


async def test_an_order_names_one_sidecar_and_a_tenant_that_exists(running: Running) -> None:
    await running.heard(DEAD, ago_s=400.0)
    await running.heard(DEAD[:31] + "0", ago_s=400.0)
    assert_problem(await running.reclaim(DEAD[:12]), 422, says="not the id of one sidecar")
    assert_problem(await running.reclaim("d"), 422)
    assert_problem(await running.reclaim("123456789abc"), 404, says="ever heard of")
    assert_problem(await running.reclaim(tenant="nobody"), 404, says="nobody")
    assert_problem(await running.reclaim(nonsense=1), 422)


async def test_the_timer_reclaims_only_who_was_silent_for_long_enough(running: Running) -> None:
    await running.holds({DEAD: register(20, 8), OTHER: register(10, 1), LIVE: register(30, 10)})
    await running.heard(DEAD, ago_s=700.0)
    await running.heard(OTHER, ago_s=500.0)
    reclaimer, catalog = running.plane.reclaimer, running.plane.publisher.catalog
    assert not await reclaimer.step(catalog, time.time()), "off unless asked for"
    reclaimer._after_s = 600.0
    running.plane.fleet._watched_since_s = time.time() - 100.0
    await reclaimer.step(catalog, time.time())
    assert (await look(running.redis, "acme", running.quota))["sum"] == 60, "nobody listened for long enough"
    running.plane.fleet._watched_since_s = -math.inf

    await until(lambda: _is_gone(running, DEAD))
    after = await look(running.redis, "acme", running.quota)
    assert (after["base"], after["sum"]) == (8, 48)
    assert not running.plane.fleet.sidecars[OTHER].gone
    assert [(line.by, line.target) for line in await running.audited()] == [("timer", DEAD)]


async def test_a_killed_sidecar_is_remembered_after_its_heartbeat_was_removed(running: Running) -> None:
    await running.redis.hset(NAMES.sidecars(), DEAD, heartbeat(DEAD).pack())
    await until(lambda: _knows(running, DEAD))
    fleet = running.plane.fleet
    fleet.sidecars[DEAD] = replace(fleet.sidecars[DEAD], last_heard_s=time.time() - GONE_S_MIN - 1)

    async def removed() -> bool:
        return not await running.redis.hexists(NAMES.sidecars(), DEAD)

    await until(removed)
    heads = running.plane.publisher.status.heads

    async def looked_again() -> bool:
        return running.plane.publisher.status.heads > heads + 1

    await until(looked_again)
    assert not fleet.sidecars[DEAD].gone, "it said no goodbye"
    assert fleet.dead_count(time.time()) == 1


# Sweeping


async def test_sweeps_ended_windows_and_idle_rates_of_every_tenant(running: Running) -> None:
    ended = int(time.time()) - 10_000
    rate = Limit(LimitKey("reports:second.rate"), 5, Period.SECOND)
    monthly = Limit(MONTHLY, 100, Period.MONTH, scope=("subject",))
    minutely = Limit(LimitKey("old:minute"), 5, Period.MINUTE, scope=("subject",))
    term = Limit(LimitKey("reports:term"), 900, Period.TERM)
    plan = Plan("pro", {"reports": Entitlement(limits=(monthly, rate, minutely, term))})
    catalog = Catalog.of([Feature("reports"), Action("report.export", {"": "reports"}), plan])
    await running.headed((await running.plane.changes.push(catalog, [], by="test")).revision)
    await running.opened("acme")
    await add_markers(running.redis, "acme", {f"old:minute@{n:016x}": f"{ended}|{ended + 60}|0" for n in range(1_200)})
    # A term can be prolonged after its end, and a limit that no plan has can come back.
    movable = {
        term.key: f"1000|{ended}|0|0|0",
        f"{term.key}+grant": f"1000|{ended}|0|0|0",
        "gone:month": f"1000|{ended}|0|0|0",
    }
    await add_markers(
        running.redis, "acme", {rate.key: f"0|{FOREVER_S}|0|0|0", "a:b": "0|1000|0", "c:d": "junk", **movable}
    )
    await make_quota(running.redis, "acme", f"{rate.key}:0", {"dead": register(500)})
    await running.holds({"old": register(sealed=True), "live": register(3, 1)})
    sweeper = running.plane.sweeper
    sweeper._round_s = None

    async def swept() -> bool:
        return (sweeper.markers_removed, sweeper.registers_removed, sweeper.rates_removed) == (1_201, 2, 1)

    await until(swept)
    await running.redis.hdel(NAMES.limits("acme"), "m|c:d")
    mark = await running.mark("acme")
    assert mark is not None
    assert set(mark.markers) == {MONTHLY, *movable}
    assert list((await look(running.redis, "acme", running.quota))["registers"]) == ["live"]


# Learning


async def test_opening_fills_windows_of_the_licenses_own_terms_from_the_ledger(running: Running) -> None:
    started = int(time.time()) - 3 * 366 * 86_400 - 1_000
    yearly = Limit(LimitKey("reports:yearly"), 500, Period.YEAR, anchor=Anchor.LICENSE)
    term = Limit(LimitKey("reports:term"), 900, Period.TERM)
    plan = Plan("pro", {"reports": Entitlement(limits=(yearly, term))})
    catalog = Catalog.of([Feature("reports"), Action("report.export", {"": "reports"}), plan])
    await running.plane.changes.push(catalog, [], by="test")
    last = await running.plane.changes.create_license(License("globex", "pro", starts_s=started), by="test")
    await running.headed(last.revision)
    year = window_of(Period.YEAR, Anchor.LICENSE, int(time.time()), starts_s=started, ends_s=0)
    spends = [(f"{yearly.key}:{year.start}", 2), (f"{term.key}:{started}", 3)]
    spent = [
        DecodedBatch.of(batch(1, 10, sidecar=name, spends=spends, tenant="globex").pack()) for name in (DEAD, OTHER)
    ]
    await running.plane.database.write(ledger.record, 0, spent, keys=running.keys, now_us=1)
    await running.redis.flushall()
    await running.headed(last.revision, epoch=2)
    mark = await running.opened("globex", epoch=2)
    assert mark.markers[yearly.key][:2] == year
    assert mark.markers[term.key][:2] == (started, FOREVER_S)
    assert (await look(running.redis, "globex", f"{yearly.key}:{year.start}"))["sum"] == 40
    assert (await look(running.redis, "globex", f"{term.key}:{started}"))["sum"] == 60


async def test_what_was_folded_is_not_counted_again_when_the_server_restarts(
    running: Running, valkey_process: ValkeyProcess
) -> None:
    await running.heard(DEAD, ago_s=400.0)
    await running.holds({DEAD: register(20, 8), LIVE: register(30, 10)})
    spends = [(running.quota, 1)]
    for name, units in ((DEAD, 9), (LIVE, 12), (OTHER, 5)):  # the last one left in order, and folded itself
        spent = DecodedBatch.of(batch(1, units, sidecar=name, spends=spends).pack())
        await running.plane.database.write(ledger.record, 0, [spent], keys=running.keys, now_us=1)
    assert (await running.reclaim(tenant="acme")).json()["items"][0]["counted"] == 9
    await running.redis.hincrby(NAMES.quota("acme", running.quota), "base", 5)
    await running.redis.hincrby(NAMES.quota("acme", running.quota), "sum", 5)
    await running.redis.hincrby(NAMES.quota("acme", running.quota), "used", 5)
    before = await running.mark("acme")
    assert before is not None
    await asyncio.to_thread(valkey_process.restart)

    async def opened_again() -> bool:
        mark = await running.mark("acme")
        return mark is not None and mark.is_open and mark.pair != before.pair

    await until(opened_again)
    after = await look(running.redis, "acme", running.quota)
    assert (after["base"], after["sum"]) == (14, 44)
    assert after["registers"][LIVE].used == 12


async def test_a_quota_lost_while_it_is_learned_makes_its_tenant_learn_again(running: Running) -> None:
    await running.heard(LIVE, ago_s=0.0)  # who did not assert: learning goes on
    await running.redis.xadd(NAMES.asks(), {"tenant": "acme", "why": "quota-lost"})
    await until(lambda: _learns(running, 2))
    running.plane.quotas._relearned_s.clear()
    await running.redis.xadd(NAMES.asks(), {"tenant": "acme", "why": "quota-lost"})
    await until(lambda: _learns(running, 3))


async def test_learning_frees_what_a_sidecar_does_not_hold_any_more(running: Running) -> None:
    mark = await running.mark("acme")
    assert mark is not None
    said = {"asserted_epoch": 99, "asserted_run": mark.pair.run, "asserted_ms": 2**60}
    await running.heard(LIVE, ago_s=0.0, **said)
    await running.holds({LIVE: register(20, 8), DEAD: register(30, 10)})  # as an older state of Redis has them
    await running.redis.xadd(NAMES.asks(), {"tenant": "acme", "why": "quota-lost"})
    await until(lambda: _is_open(running, 2))
    after = await look(running.redis, "acme", running.quota)
    assert (after["sum"], after["used"]) == (8 + 30, 8 + 10)


async def _is_open(running: Running, epoch: int) -> bool:
    mark = await running.mark("acme")
    return mark is not None and mark.is_open and mark.pair.epoch == epoch


async def _learns(running: Running, epoch: int) -> bool:
    mark = await running.mark("acme")
    return mark is not None and not mark.is_open and mark.pair.epoch == epoch


async def _is_gone(running: Running, sidecar: str) -> bool:
    return running.plane.fleet.sidecars[sidecar].gone


async def _knows(running: Running, sidecar: str) -> bool:
    return sidecar in running.plane.fleet.sidecars
