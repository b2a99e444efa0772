"""Reconciling over a real Valkey and a real ledger, with registers, logs and archives that do not agree."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from licet.domain.windows import Period, window_at
from licet.wire.names import usage_shard
from licet.wire.usage import LostRange
from licet_control_plane import reconciliation
from licet_control_plane.api.app import make_app
from licet_control_plane.archive import comparing
from licet_control_plane.archive.files import ShardArchive, read
from tests.integration.test_quotas import Running
from tests.support.command_line import CommandLine, licet_command
from tests.support.control_plane import NAMES, deployment, until
from tests.support.registers import register
from tests.support.stub_control_plane import StubControlPlane
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

__all__ = ["licet_command"]

ONE, TWO = "a" * 32, "b" * 32


@pytest.fixture
async def running(
    tmp_path: Path, valkey_process: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    monkeypatch.setattr(reconciliation, "LOOK_S", 0.05)
    async with deployment(tmp_path / "state", valkey_process.url, start=False) as made:
        made.__class__ = Running
        assert isinstance(made, Running)
        made.archive_dir = tmp_path / "archive"
        made.settings = {"archive_dir": made.archive_dir}
        await made.start()
        made.start_s, made.end_s = window_at(Period.MONTH, int(time.time()))
        await made.push(100)
        await made.headed(await made.license("acme"))
        await made.opened("acme")
        transport = httpx.ASGITransport(make_app(made.plane))
        headers = {"Authorization": f"Bearer {made.admin_key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
            made.client = client
            yield made


async def spends(running: Running, first: int, last: int, *, sidecar: str = ONE, units: int = 1) -> None:
    one = batch(first, last, sidecar=sidecar, spends=[(running.quota, units)])
    before = running.plane.drain.events
    await running.redis.xadd(NAMES.usage(usage_shard(sidecar)), {"b": one.pack()})
    await until(lambda: recorded(running, before + last - first + 1))


async def recorded(running: Running, count: int) -> bool:
    await asyncio.sleep(0)
    return running.plane.drain.events >= count


async def declared(running: Running, count: int) -> bool:
    await asyncio.sleep(0)
    return running.plane.drain.declared_lost >= count


async def reconciled(running: Running, **order: Any) -> dict[str, Any]:
    response = await running.client.post("/v1/ledger/reconcile", json=order)
    *steps, last = [json.loads(line) for line in response.text.splitlines()]
    assert all(step["progress"]["doing"] for step in steps)
    result: dict[str, Any] = last["result"]
    return result


async def test_what_agrees_agrees(running: Running) -> None:
    await spends(running, 1, 10)
    await spends(running, 1, 4, sidecar=TWO)
    await running.holds({ONE: register(30, 10)}, base=4)
    result = await reconciled(running)
    assert result["ok"], result
    assert (result["tenants"], result["quotas"], result["differences"], result["in_flight"]) == (1, 1, [], [])
    assert (result["archive"], result["logs"], result["learning"]) == ([], [], [])


async def test_differences_are_named_by_tenant_quota_and_sidecar(running: Running) -> None:
    await spends(running, 1, 10)
    await spends(running, 1, 4, sidecar=TWO)
    await running.holds({ONE: register(30, 13), TWO: register(3, 1)}, base=2)
    result = await reconciled(running, tenant="acme")
    assert not result["ok"]
    found = {item["sidecar"]: (item["register"], item["ledger"]) for item in result["differences"]}
    assert found == {ONE: (13, 10), TWO: (3, 4), None: (2, 0)}
    assert {item["quota"] for item in result["differences"]} == {running.quota}
    assert result["archive"] is None


async def test_what_is_on_its_way_is_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await spends(running, 1, 10)
    await running.holds({ONE: register(30, 13)})
    await running.heard(ONE, ago_s=0.0, log_last_seq=13, log_acked_seq=10)
    result = await reconciled(running)
    assert (result["ok"], result["differences"]) == (True, [])
    assert [item["sidecar"] for item in result["in_flight"]] == [ONE]

    async def arrives() -> None:
        await asyncio.sleep(0.1)
        await spends(running, 11, 13)

    arriving = asyncio.create_task(arrives())
    result = await reconciled(running)
    await arriving
    assert (result["ok"], result["in_flight"]) == (True, [])


async def test_a_ledger_that_forgot_and_a_log_that_went_back_are_named(running: Running) -> None:
    await spends(running, 1, 10)
    await running.holds({ONE: register(30, 10)})
    await running.heard(ONE, ago_s=0.0, log_last_seq=8, log_acked_seq=8)
    await running.heard(TWO, ago_s=0.0, log_last_seq=5, log_acked_seq=5)
    result = await reconciled(running)
    assert not result["ok"]
    assert [(log["log_id"], log["watermark"], log["what"]) for log in result["logs"]] == [
        (f"{TWO}:1", 0, reconciliation.FORGOTTEN),
        (f"{ONE}:1", 10, reconciliation.ROLLED_BACK),
    ]


async def test_an_archive_that_is_damaged_or_of_another_ledger_is_named(running: Running) -> None:
    assert running.archive_dir is not None
    for number in range(3):
        await spends(running, number * 10 + 1, number * 10 + 10)
    await running.holds({ONE: register(50, 32)})
    shard, deployment_id = usage_shard(ONE), running.plane.deployment

    def differences() -> list[str]:
        assert running.archive_dir is not None
        compared = comparing.compare(running.plane.database, running.archive_dir, deployment_id)
        return [one.what for each in compared for one in each.differences]

    await running.redis.xadd(
        NAMES.usage(shard), {"b": batch(31, 30, sidecar=ONE, lost=(LostRange(31, 34, "torn"),)).pack()}
    )
    await until(lambda: declared(running, 4))
    await spends(running, 35, 36)
    assert differences() == []
    records = [one.data for one in read(running.archive_dir, shard, deployment_id)]
    shutil.rmtree(running.archive_dir / f"shard-{shard}")
    shorter = ShardArchive.open(running.archive_dir, shard, deployment_id)
    shorter.append(1, records[:2], now_s=0)
    assert differences() == []  # behind: it is on its way
    shorter.append(3, [records[0]], now_s=0)
    assert "record 3: its hash of the block before it is another one" in differences()[0]
    result = await reconciled(running)
    assert not result["ok"]
    assert result["archive"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, licet_command: CommandLine) -> Any:
    stub = StubControlPlane().start()
    monkeypatch.setenv("LICET_SERVER", stub.url)
    monkeypatch.setenv("LICET_API_KEY", "secret")
    yield stub
    stub.stop()


def result(**changes: Any) -> dict[str, Any]:
    plain = {
        "ok": True, "tenants": 1, "quotas": 2, "differences": [], "in_flight": [], "learning": [], "logs": [],
        "archive": None,
    }  # fmt: skip
    return {"result": {**plain, **changes}}


def test_the_command_says_what_differs_and_ends_with_1(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["POST /v1/ledger/reconcile"] = result()
    ended = licet_command("ledger", "reconcile", "--tenant", "acme")
    assert (ended.code, "in agreement" in ended.out) == (0, True)
    assert server.requests[0].body == {"tenant": "acme"}
    difference = {
        "tenant": "acme", "quota": "q:1", "sidecar": None, "register": 5, "ledger": 4, "difference": 1, "what": "why",
    }  # fmt: skip
    log = {"log_id": "s:1", "last_seq": 1, "acked_seq": 2, "watermark": 3, "what": "because"}
    archive = {"shard": 0, "log_id": "", "what": "is damaged"}
    server.answers["POST /v1/ledger/reconcile"] = result(
        ok=False, differences=[difference], logs=[log], archive=[archive], in_flight=[difference], learning=["t"]
    )
    ended = licet_command("ledger", "reconcile")
    assert ended.code == 1
    for text in ("NOT in agreement", "why", "because", "is damaged", "still change", "1 tenants"):
        assert text in ended.out
    assert licet_command("ledger", "reconcile", "--json").json["ok"] is False
    server.answers["POST /v1/ledger/reconcile"] = {"error": "Redis is away"}
    assert licet_command("ledger", "reconcile").code == 1
