"""Webhooks to a real server that fails, hangs, redirects, goes away and comes back."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, insert, select
from sqlalchemy import event as sql_event

from licet.domain.windows import Period, window_at
from licet.wire.names import usage_shard
from licet_control_plane import quota_watcher
from licet_control_plane.api.app import make_app
from licet_control_plane.core import webhook_events
from licet_control_plane.license_keeper import LicenseKeeper
from licet_control_plane.quota_watcher import QuotaWatcher
from licet_control_plane.sink import webhook_sender
from licet_control_plane.sink.webhook_sender import WebhookSender
from licet_control_plane.store import webhooks
from licet_control_plane.store.schema import audit, register_spend
from licet_control_plane.store.schema import webhooks as webhooks_table
from tests.support.control_plane import NAMES, Deployment, deployment, until
from tests.support.http_receiver import Received, Receiver
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

DAY_S = 86_400


class Hooks:
    def __init__(self, running: Deployment, client: httpx.AsyncClient) -> None:
        self.running = running
        self.client = client

    async def create(self, receiver: Receiver, **fields: Any) -> dict[str, Any]:
        body = {"url": f"http://127.0.0.1:{receiver.port}/in", **fields}
        answer = await self.client.post("/v1/webhooks", json=body)
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    async def license(self, tenant: str = "acme", **fields: Any) -> None:
        answer = await self.client.put(f"/v1/licenses/{tenant}", json={"plan": "pro", **fields})
        assert answer.is_success, answer.text

    async def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get(f"/v1/webhooks/{path}")).json()
        return found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


@pytest.fixture
async def hooks(
    tmp_path: Path, valkey_process: ValkeyProcess, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Hooks]:
    monkeypatch.setattr(webhook_sender, "LOOK_S", 0.02)
    monkeypatch.setattr(webhook_events, "BACKOFF_S", (0.01, 0.01, 0.01))
    settings = {"webhooks_private": True, "api_rate": 0.0}
    async with deployment(tmp_path / "state", valkey_process.url, database_url=database_url, **settings) as running:
        transport = httpx.ASGITransport(make_app(running.plane))
        headers = {"Authorization": f"Bearer {running.admin_key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
            await running.push(plans=("pro", "big"))
            yield Hooks(running, client)


async def taken(receiver: Receiver, count: int) -> list[dict[str, Any]]:
    async def there() -> bool:
        return len(receiver.taken) >= count

    await until(there)
    return [json.loads(request.body) for request in receiver.taken]


async def test_what_happens_to_a_license_is_told_in_order_and_signed(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver)
    await hooks.license(ends_at=str(int(time.time()) + 400 * DAY_S), renewal_period="month")
    for move, body in (
        ("suspend", {}),
        ("resume", {}),
        ("renew", {}),
        ("change-plan", {"plan": "big"}),
        ("cancel", {}),
    ):
        assert (await hooks.client.post(f"/v1/licenses/acme/{move}", json=body)).is_success
    events = await taken(receiver, 6)
    told = ["created", "suspended", "resumed", "renewed", "changed", "canceled"]
    assert [event["type"] for event in events] == [f"dev.licet.license.{one}" for one in told]
    assert [event["data"]["plan"] for event in events] == ["pro"] * 4 + ["big"] * 2
    secret = base64.b64decode(made["secret"].removeprefix("whsec_"))
    for request, event in zip(receiver.taken, events, strict=True):
        assert request.headers["webhook-id"] == event["id"]
        text = f"{event['id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
        signature = base64.b64encode(hmac.digest(secret, text, hashlib.sha256)).decode()
        assert request.headers["webhook-signature"] == f"v1,{signature}"
    assert "secret" not in await hooks.get(made["id"])


async def test_a_secret_is_rotated_and_for_a_while_both_sign(
    hooks: Hooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = hooks.running.plane
    made = await hooks.create(receiver)
    path = f"/v1/webhooks/{made['id']}"
    ahead_s = 0.0
    monkeypatch.setattr(plane.webhook_sender, "_now_s", lambda: time.time() + ahead_s)

    async def signatures(secrets: list[str]) -> tuple[str, str]:
        await hooks.client.post(f"{path}/test")
        await taken(receiver, len(told) + 1)
        request = receiver.taken[-1]
        told.append(request)
        text = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
        keys = (base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets)
        digests = (base64.b64encode(hmac.digest(key, text, hashlib.sha256)).decode() for key in keys)
        return request.headers["webhook-signature"], " ".join(f"v1,{digest}" for digest in digests)

    told: list[Received] = []
    rotated = (await hooks.client.post(f"{path}/secret", json={"overlap_s": 3_600})).json()
    assert rotated["secret"] != made["secret"]
    sent, expected = await signatures([rotated["secret"], made["secret"]])
    assert sent == expected
    ahead_s = 3_601
    sent, expected = await signatures([rotated["secret"]])
    assert sent == expected
    shown = await hooks.get(made["id"])
    assert (shown["old_secret_until"], "secret" in shown) == (None, False)

    def stored(connection: Connection) -> list[Any]:
        return list(connection.execute(select(webhooks_table.c.old_nonce, webhooks_table.c.nonce != "")))

    assert await plane.database.read(stored) == [(None, True)]
    last = (await hooks.client.post(f"{path}/secret", json={"overlap_s": 0})).json()
    sent, expected = await signatures([last["secret"]])
    assert sent == expected
    trail = (await hooks.client.get("/v1/audit", params={"action": "webhook.rotate_secret"})).text
    assert trail.count("webhook.rotate_secret") == 2
    assert not any(one["secret"] in trail for one in (made, rotated, last))
    unknown = await hooks.client.post("/v1/webhooks/wh_none/secret", json={})
    assert unknown.json()["type"] == "urn:licet:problem:webhook-unknown"


async def test_only_what_a_webhook_wants_of_the_tenant_it_names_is_told(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver, events=["license.created"], tenant="mine")
    await hooks.license("other")
    await hooks.license("mine")
    await hooks.license("mine", plan="big")
    assert (await hooks.client.post(f"/v1/webhooks/{made['id']}/test")).is_success
    events = await taken(receiver, 2)
    assert [(event["type"], event["subject"]) for event in events] == [
        ("dev.licet.license.created", "mine"),
        ("dev.licet.webhook.test", "mine"),
    ]


@pytest.mark.parametrize("status", [500, 302, None])
async def test_what_is_not_taken_is_sent_again_with_the_same_id(
    hooks: Hooks, receiver: Receiver, status: int | None
) -> None:
    refusals = iter([status, status])
    receiver.answer = lambda _request: next(refusals, 204)
    made = await hooks.create(receiver)
    await hooks.license()
    await taken(receiver, 1)
    assert len({request.headers["webhook-id"] for request in receiver.received}) == 1

    async def noted() -> dict[str, Any] | None:
        (delivery,) = (await hooks.get(f"{made['id']}/deliveries"))["items"]
        return delivery if delivery["state"] == "delivered" else None

    delivery = await until(noted)
    assert (delivery["attempts"], delivery["status"], delivery["error"]) == (3, 204, "")


async def test_one_that_hangs_holds_up_nobody_else_and_is_given_up(
    hooks: Hooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_sender, "REQUEST_S_MAX", 0.3)
    hanging, released = Receiver(), threading.Event()

    def hang(_request: Received) -> int | None:
        released.wait(30)
        return None

    hanging.answer = hang
    try:
        stuck = await hooks.create(hanging)
        await hooks.create(receiver)
        await hooks.license()
        await taken(receiver, 1)

        async def failed() -> dict[str, Any] | None:
            (delivery,) = (await hooks.get(f"{stuck['id']}/deliveries"))["items"]
            return delivery if delivery["state"] == "failed" else None

        delivery = await until(failed)
        assert delivery["attempts"] == 4
        assert "nothing within" in delivery["error"]
        assert (await hooks.get(stuck["id"]))["failing_since"]
        released.set()
        hanging.answer = lambda _request: 204
        again = await hooks.client.post(f"/v1/webhooks/{stuck['id']}/redeliver", json={})
        assert again.json() == {"messages": 1}
        assert [event["id"] for event in await taken(hanging, 1)] == [delivery["id"]]
    finally:
        released.set()
        hanging.stop()


async def test_what_was_not_delivered_before_a_restart_is_delivered_after_it(
    hooks: Hooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_events, "BACKOFF_S", (0.01,) * 1_000)
    monkeypatch.setattr(webhooks, "BUSY_S", 1)  # it may be stopped in the middle of an attempt
    receiver.answer = lambda _request: 503
    await hooks.create(receiver)
    await hooks.license()

    async def refused() -> bool:
        return bool(receiver.received)

    await until(refused)
    await hooks.running.stop()
    receiver.answer = lambda _request: 204
    await hooks.running.start()
    assert [event["type"] for event in await taken(receiver, 1)] == ["dev.licet.license.created"]


async def test_a_claim_holds_off_others_until_whoever_made_it_is_taken_for_dead(
    hooks: Hooks, receiver: Receiver
) -> None:
    database = hooks.running.plane.database
    made = await hooks.create(receiver, events=["license.expired"])
    now_us = int(time.time() * 1_000_000)

    def announced_and_claimed(connection: Connection) -> list[Any]:
        webhooks.announce(connection, "license.expired", "acme", {}, now_us=now_us)
        return webhooks.claim(connection, now_us=now_us)

    ((claimed, messages),) = await database.write(announced_and_claimed)
    assert (claimed.id, len(messages)) == (made["id"], 1)
    soon, late = (now_us + seconds * 1_000_000 for seconds in (webhooks.BUSY_S - 1, webhooks.BUSY_S))
    assert await database.write(webhooks.claim, now_us=soon) == []
    ((_, again),) = await database.write(webhooks.claim, now_us=late)
    assert [message.id for message in again] == [message.id for message in messages]


async def test_one_that_is_gone_is_disabled_with_the_reason_and_enabled_again(hooks: Hooks, receiver: Receiver) -> None:
    receiver.answer = lambda _request: 410
    made = await hooks.create(receiver)
    await hooks.license()

    async def disabled() -> bool:
        return bool((await hooks.get(made["id"]))["disabled_at"])

    await until(disabled)

    def audited(connection: Connection) -> list[str]:
        rows = connection.execute(select(audit).where(audit.c.target == made["id"]).order_by(audit.c.number))
        return [row.action for row in rows]

    assert await hooks.running.plane.database.read(audited) == ["webhook.create", "webhook.disable"]
    assert (await hooks.client.post(f"/v1/webhooks/{made['id']}/test")).status_code == 409
    receiver.answer = lambda _request: 204
    assert (await hooks.client.post(f"/v1/webhooks/{made['id']}/enable")).json()["disabled_at"] is None
    assert [event["type"] for event in await taken(receiver, 1)] == ["dev.licet.license.created"]


async def test_thresholds_of_a_quota_are_told_once_for_each_window(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.create(receiver, events=["quota.threshold"], thresholds=[50, 80, 100])
    await hooks.license()
    plane, now_s = hooks.running.plane, int(time.time())
    quota = f"reports:monthly:{window_at(Period.MONTH, now_s).start}"

    async def used(first: int, units: int) -> None:
        one = batch(first, first, at_us=now_s * 1_000_000, units={"reports": units}, spends=[(quota, units)])
        await hooks.running.redis.xadd(NAMES.usage(usage_shard(one.sidecar)), {"b": one.pack()})

        async def drained() -> bool:
            return plane.drain.events >= first

        await until(drained)
        watcher = QuotaWatcher(plane.database, plane.catalogs, now_s=time.time)
        await asyncio.gather(watcher.look(), watcher.look())

    await used(1, 49)
    await used(2, 36)
    await used(3, 16)
    events = await taken(receiver, 3)
    assert [(event["data"]["percent"], event["data"]["used"]) for event in events] == [(50, 85), (80, 85), (100, 101)]
    assert events[0]["data"]["limit"] == "reports:monthly"
    assert events[0]["data"]["amount"] == 100


async def test_thresholds_of_windows_shorter_than_a_webhook_wants_are_not_told(
    hooks: Hooks, receiver: Receiver
) -> None:
    usual = await hooks.create(receiver, events=["quota.threshold"])
    close = await hooks.create(receiver, events=["quota.threshold"], shortest_window="minute")
    assert (usual["shortest_window"], close["shortest_window"]) == ("hour", "minute")
    await hooks.running.push(per=Period.MINUTE)
    await hooks.license()
    plane, now_s = hooks.running.plane, int(time.time())
    start = window_at(Period.MINUTE, now_s).start
    spent = {"tenant": "acme", "sidecar": "a", "window_start": start, "units": 85, "observed": 0}

    def spend(connection: Connection) -> None:
        connection.execute(insert(register_spend).values(**spent, quota=f"reports:monthly:{start}"))

    await plane.database.write(spend)
    await QuotaWatcher(plane.database, plane.catalogs, now_s=lambda: now_s).look()
    assert [len((await hooks.get(f"{one['id']}/deliveries"))["items"]) for one in (usual, close)] == [0, 1]
    assert [event["data"]["per"] for event in await taken(receiver, 1)] == ["minute"]


async def test_a_threshold_that_late_usage_reaches_is_told(hooks: Hooks, receiver: Receiver) -> None:
    """Usage that sidecars kept while nobody drained: its hours are over when it comes, its window is not."""
    await hooks.create(receiver, events=["quota.threshold"])
    await hooks.license()
    plane, now_s = hooks.running.plane, int(time.time())
    window = window_at(Period.MONTH, now_s)
    quota, at_s = f"reports:monthly:{window.start}", window.start + 60
    now_s = at_s + 86_400
    watcher = QuotaWatcher(plane.database, plane.catalogs, now_s=lambda: now_s)
    await watcher.look()
    one = batch(1, 1, at_us=at_s * 1_000_000, units={"reports": 90}, spends=[(quota, 90)])
    await hooks.running.redis.xadd(NAMES.usage(usage_shard(one.sidecar)), {"b": one.pack()})

    async def drained() -> bool:
        return plane.drain.events >= 1

    await until(drained)
    now_s += int(quota_watcher.ALL_EVERY_S)
    await watcher.look()
    assert [event["data"]["percent"] for event in await taken(receiver, 1)] == [80]


async def test_limits_that_many_subjects_reach_at_once_are_told_in_small_transactions_and_looked_at_in_one(
    hooks: Hooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await hooks.create(receiver, events=["quota.threshold"])
    await hooks.license()
    plane, now_s = hooks.running.plane, int(time.time())
    start = window_at(Period.MONTH, now_s).start
    spent = {"tenant": "acme", "sidecar": "a", "window_start": start, "units": 85, "observed": 0}
    rows = [{**spent, "quota": f"reports:monthly@{number:016x}:{start}"} for number in range(300)]

    def spend(connection: Connection) -> None:
        connection.execute(insert(register_spend), rows)

    await plane.database.write(spend)
    told: list[int] = []

    def counted(connection: Connection, tenant: str, reached: list[Any], now_s: int) -> int:
        told.append(len(reached))
        return announce(connection, tenant, reached, now_s)

    announce = quota_watcher._announce
    monkeypatch.setattr(quota_watcher, "_announce", counted)
    watcher = QuotaWatcher(plane.database, plane.catalogs, now_s=lambda: now_s)
    await watcher.look()
    assert max(told) == quota_watcher.NOTICES_MAX
    asked: list[str] = []

    def noted(*arguments: Any) -> None:
        asked.append(str(arguments[2]))

    sql_event.listen(plane.database.engine, "before_cursor_execute", noted)
    watcher = QuotaWatcher(plane.database, plane.catalogs, now_s=lambda: now_s)
    await watcher.look()
    assert sum("quota_notices" in statement for statement in asked if statement.startswith("SELECT")) <= 3
    assert len((await hooks.get(f"{made['id']}/deliveries?limit=1000"))["items"]) == 300


async def test_the_end_of_a_term_is_announced_once_and_said_once(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver, events=["license.expiring", "license.expired"])
    now_s = int(time.time())
    await hooks.license(ends_at=str(now_s + 20 * DAY_S), grace_s=DAY_S)
    plane, today = hooks.running.plane, now_s
    keepers = [LicenseKeeper(plane.database, plane.changes, now_s=lambda: today) for _ in range(2)]
    for days in (5, 7, 20, 21, 22):
        today = now_s + days * DAY_S
        while any(await asyncio.gather(*(keeper.look() for keeper in keepers))):
            pass
    told = (await hooks.get(f"{made['id']}/deliveries"))["items"]
    assert [one["type"] for one in told] == ["license.expired", "license.expiring"]


async def test_nothing_is_sent_within_the_network_unless_that_is_allowed(hooks: Hooks, receiver: Receiver) -> None:
    plane = hooks.running.plane
    made = await hooks.create(receiver, events=["license.expired"])
    sender = WebhookSender(
        plane.database,
        deployment="d",
        ledger_key=hooks.running.ledger_key,
        private=False,
        now_s=time.time,
        wake=asyncio.Event(),
    )
    webhook = await plane.database.read(webhooks.get, made["id"])
    assert webhook is not None
    message = webhooks.Message(1, "msg_1", 1, "license.expired", "acme", {})
    assert not await sender._send(webhook, message)
    assert receiver.received == []
    assert sender.counts.failures == 1


@pytest.mark.parametrize("url", ["https://a..b/", f"https://{'a' * 64}.example/", "https://.example/"])
async def test_an_address_that_nothing_can_be_made_of_is_in_nobodys_way(
    hooks: Hooks, receiver: Receiver, url: str
) -> None:
    bad = webhooks.Webhook("wh_bad", url, ("license.created",), (), "", 0, "an older version")
    await hooks.running.plane.database.write(webhooks.add, bad)
    await hooks.create(receiver)
    await hooks.license()
    await taken(receiver, 1)

    async def failed() -> dict[str, Any] | None:
        (delivery,) = (await hooks.get("wh_bad/deliveries"))["items"]
        return delivery if delivery["state"] == "failed" else None

    assert (await until(failed))["error"]


async def test_a_webhook_that_cannot_be_is_refused(hooks: Hooks, receiver: Receiver) -> None:
    for body, says in (
        ({"url": "https://example.com/", "events": ["license.expird"]}, "license.expired"),
        ({"url": "http://example.com/"}, "readable"),
        ({"url": "https://example.com/", "thresholds": [0]}, "thresholds"),
    ):
        refused = await hooks.client.post("/v1/webhooks", json=body)
        assert refused.status_code == 422
        assert says in refused.text
    assert (await hooks.get("wh_none"))["type"] == "urn:licet:problem:webhook-unknown"
    made = await hooks.create(receiver)
    assert (await hooks.client.delete(f"/v1/webhooks/{made['id']}")).is_success
    assert (await hooks.client.get("/v1/webhooks")).json()["items"] == []
