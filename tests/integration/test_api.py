"""The REST API over a real control plane."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from sqlalchemy import Connection, select

from licet.domain.catalog import Grant
from licet.domain.ids import LimitKey
from licet.wire.documents import ACK, HEAD, HEAD_KEY, Head, Manifest, Snapshot, catalog_of_chunks
from licet.wire.names import usage_shard
from licet.wire.usage import UsageBatch, pack_batches
from licet_control_plane.api.app import make_app
from licet_control_plane.api.limits import BODY_BYTES_MAX
from licet_control_plane.api.second_route import OCTETS
from licet_control_plane.store import access, licenses
from licet_control_plane.store.schema import audit
from tests.support.control_plane import NAMES, Deployment, deployment, heartbeat, until
from tests.support.usage import AT_US, batch
from tests.support.valkey import ValkeyProcess

BUNDLE = """\
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
      - {amount: 100, per: month}
"""


class Api:
    """A client with the administrator's key."""

    def __init__(self, running: Deployment, client: httpx.AsyncClient) -> None:
        self.running = running
        self.client = client

    async def get(self, path: str, **params: Any) -> httpx.Response:
        return await self.client.get(path, params=params)

    async def push(self, content: str = BUNDLE, **fields: Any) -> httpx.Response:
        body = {"documents": [{"path": "a.yaml", "content": content}], **fields}
        return await self.client.post("/v1/bundles", json=body)

    async def license(self, tenant: str = "acme", plan: str = "pro", **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/licenses", json={"tenant": tenant, "plan": plan, **fields})


@pytest.fixture
async def api(tmp_path: Path, valkey_process: ValkeyProcess, database_url: str) -> AsyncIterator[Api]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=database_url) as running:
        transport = httpx.ASGITransport(make_app(running.plane))
        headers = {"Authorization": f"Bearer {running.admin_key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
            yield Api(running, client)


def assert_problem(response: httpx.Response, status: int, *, says: str = "") -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["fix"]
    assert says in response.text
    return problem


async def test_a_request_without_a_key_or_with_a_wrong_one_is_refused(api: Api) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer licet_wrong"}, {"Authorization": "Basic x"}):
        response = await api.client.get("/v1/status", headers=headers)
        assert_problem(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    assert (await api.client.get("/healthz", headers={"Authorization": ""})).status_code == 200


async def test_a_pushed_bundle_is_published_and_is_the_current_one(api: Api) -> None:
    pushed = await api.push(message="first")
    assert pushed.status_code == 201
    body = pushed.json()
    assert (body["revision"], body["generation"], body["unchanged"]) == (1, 1, False)
    assert body["changed"] == {
        "added": ["Action/report.export", "Feature/reports", "Plan/pro"],
        "modified": [],
        "removed": [],
    }
    await api.running.headed(1)
    current = (await api.get("/v1/bundles/current")).json()
    assert (current["revision"], current["observe"], current["message"]) == (1, False, "first")
    assert current["published_at"].endswith("Z")
    assert {"kind": "Plan", "name": "pro"} in current["documents"]


async def test_schemas_are_served_to_editors_which_send_no_key(api: Api) -> None:
    listed = (await api.client.get("/v1/schemas", headers={"Authorization": ""})).json()["items"]
    for one in listed:
        answer = await api.client.get(one["url"], headers={"Authorization": ""})
        assert (answer.status_code, answer.json()["title"]) == (200, one["kind"])
        assert answer.headers["content-type"] == "application/schema+json"
    missing = await api.client.get("/v1/schemas/Pan")
    assert (missing.status_code, missing.json()["fix"]) == (404, "Did you mean 'Plan'?")


async def test_the_same_bundle_again_publishes_nothing(api: Api) -> None:
    await api.push()
    again = await api.push()
    assert (again.status_code, again.json()["revision"], again.json()["unchanged"]) == (200, 1, True)
    observed = await api.push(observe=True)
    assert (observed.status_code, observed.json()["revision"]) == (201, 2)


async def test_a_changed_bundle_names_what_changed(api: Api) -> None:
    await api.push()
    changed = BUNDLE.replace("100", "200") + "---\nkind: Feature\nname: editor\n"
    body = (await api.push(changed)).json()
    assert body["changed"] == {"added": ["Feature/editor"], "modified": ["Plan/pro"], "removed": []}


async def test_a_dry_run_changes_nothing(api: Api) -> None:
    response = await api.push(dry_run=True)
    assert response.status_code == 200
    assert response.json()["changed"]["added"]
    assert_problem(await api.get("/v1/bundles/current"), 404)


async def test_an_invalid_bundle_is_refused_with_every_error_and_its_place(api: Api) -> None:
    problem = assert_problem(await api.push("kind: Featur\nname: reports\n"), 422)
    error = problem["errors"][0]
    assert (error["file"], error["line"]) == ("a.yaml", 1)
    assert "Feature" in error["fix"]
    assert_problem(await api.get("/v1/bundles/current"), 404)


async def test_a_bundle_without_a_plan_that_a_license_holds_is_refused(api: Api) -> None:
    await api.push()
    await api.license()
    problem = assert_problem(await api.push("kind: Feature\nname: reports\n"), 422, says="acme")
    assert problem["errors"][0]["path"] == "Plan/pro"


async def test_a_license_is_created_read_changed_and_listed(api: Api) -> None:
    await api.push()
    created = await api.license(ends_at="2030-01-01T00:00:00+01:00", overrides={"reports:month": 7})
    assert created.status_code == 201, created.text
    assert created.headers["location"] == "/v1/licenses/acme"
    read = await api.get("/v1/licenses/acme")
    assert read.headers["etag"].startswith('"2-')
    assert read.json() == created.json()
    assert read.json() | {"updated_at": ""} == {
        "tenant": "acme",
        "plan": "pro",
        "status": "active",
        "starts_at": None,
        "ends_at": "2029-12-31T23:00:00Z",
        "addons": {},
        "overrides": {"reports:month": 7},
        "grants": [],
        "stage": "active",
        "grace_s": 0,
        "grace_ends_at": None,
        "renewal_period": None,
        "auto_renew": False,
        "cancels": False,
        "planned": None,
        "revision": 2,
        "updated_at": "",
    }
    changed = await api.client.patch("/v1/licenses/acme", json={"status": "suspended", "ends_at": None})
    assert (changed.json()["status"], changed.json()["ends_at"], changed.json()["revision"]) == ("suspended", None, 3)
    assert changed.json()["overrides"] == {"reports:month": 7}
    listed = (await api.get("/v1/licenses", status="suspended")).json()
    assert [one["tenant"] for one in listed["items"]] == ["acme"]
    assert (await api.get("/v1/licenses", plan="other")).json() == {"items": [], "next": None}


async def test_pages_of_licenses_follow_on_each_other(api: Api) -> None:
    await api.push()
    for tenant in ("a", "b", "c"):
        await api.license(tenant)
    first = (await api.get("/v1/licenses", limit=2)).json()
    assert ([one["tenant"] for one in first["items"]], first["next"]) == (["a", "b"], "b")
    second = (await api.get("/v1/licenses", limit=2, after=first["next"])).json()
    assert ([one["tenant"] for one in second["items"]], second["next"]) == (["c"], None)


async def test_what_cannot_be_licensed_is_refused_with_a_suggestion(api: Api) -> None:
    await api.push()
    assert_problem(await api.license(plan="prro"), 422, says="Did you mean 'pro'?")
    assert_problem(await api.license("a:b"), 422, says="letters")
    assert_problem(await api.license(overrides={"reports:monht": 1}), 422, says="reports:month")
    assert_problem(await api.license(overrides={"reports:month": -1}), 422, says="-1")
    assert_problem(await api.license(addons={"extra": 1}), 422, says="extra")
    assert_problem(await api.license(ends_at="soon"), 422, says="2026-11-24T08:00:00Z")
    assert_problem(await api.license(colour="red"), 422, says="colour")
    assert_problem(await api.get("/v1/licenses/acme"), 404)


QUOTAS = """\
kind: Feature
name: tokens
---
kind: Action
name: llm.complete
feature: tokens
attributes: {team: string}
---
kind: Plan
name: pro
features:
  tokens:
    price: {amount: "8.00", per_units: 1_000_000, currency: USD}
    limits:
      - {amount: 100, per: month, anchor: license}
      - {spend: "500.00 USD", per: month, scope: [context.team], on_exceeded: require_approval}
      - {amount: 5, per: second, burst: 20}
"""
BUDGET = "tokens:month@context.team.usd"
GRANTS = "/v1/licenses/acme/grants"


async def test_an_override_of_a_budget_is_money(api: Api) -> None:
    await api.push(QUOTAS)
    created = await api.license(overrides={BUDGET: "750.5 USD", "tokens:second.rate": 9})
    assert created.json()["overrides"] == {BUDGET: "750.50 USD", "tokens:second.rate": 9}
    changed = await api.client.patch("/v1/licenses/acme", json={"overrides": {BUDGET: "1 USD"}})
    assert changed.json()["overrides"] == {BUDGET: "1.00 USD"}
    again = await api.client.patch("/v1/licenses/acme", json={"overrides": {BUDGET: "1.00 USD"}})
    assert again.json()["revision"] == changed.json()["revision"]
    for wrong, says in (
        ({BUDGET: 5}, "5 is not money"),
        ({BUDGET: "5.00 EUR"}, "not in USD"),
        ({"tokens:month": "5.00 USD"}, "whole units"),
        ({"tokens:month": 1.5}, "neither a whole number of units nor money"),
        ({"tokens:month": True}, "neither a whole number of units nor money"),
        ({"tokens:month.usd": "5.00 USD"}, "no limit 'tokens:month.usd'"),
    ):
        refused = await api.client.patch("/v1/licenses/acme", json={"overrides": wrong})
        assert_problem(refused, 422, says=says)
    assert (await api.get("/v1/licenses/acme")).json()["overrides"] == {BUDGET: "1.00 USD"}


async def test_a_grant_is_added_listed_and_revoked(api: Api) -> None:
    await api.push(QUOTAS)
    await api.license()
    asked = {"limit": "tokens:month", "amount": 1_000, "id": "order-17", "expires_after_s": 3_600, "priority": 50}
    added = await api.client.post(GRANTS, json=asked)
    assert added.status_code == 201, added.text
    grant = added.json()
    assert (grant["tenant"], grant["id"], grant["state"], grant["revision"]) == ("acme", "order-17", "live", 3)
    again = await api.client.post(GRANTS, json=asked)
    assert (again.status_code, again.json()) == (200, grant)
    other = {**asked, "amount": 999}
    assert_problem(await api.client.post(GRANTS, json=other), 409, says="order-17")

    listed = (await api.get(GRANTS)).json()
    described = {name: value for name, value in grant.items() if name not in ("tenant", "revision")}
    assert listed == {"items": [described], "revision": 3}
    assert (await api.get("/v1/licenses/acme")).json()["grants"] == [described]

    revoked = await api.client.delete(f"{GRANTS}/order-17")
    assert revoked.json() == {"tenant": "acme", "id": "order-17", "revision": 4}
    assert (await api.get(GRANTS)).json() == {"items": [], "revision": 4}
    assert_problem(await api.client.delete(f"{GRANTS}/order-17"), 404, says="order-17")
    assert await api.running.plane.database.read(_audited) == [
        ("bundle.push", 0, 0),
        ("license.create", 0, 0),
        ("grant.add", 0, 1),
        ("grant.revoke", 1, 0),
    ]


def _audited(connection: Connection) -> list[tuple[str, int, int]]:
    """Each change, with how many grants its license had before and after it."""
    rows = connection.execute(select(audit).order_by(audit.c.number))
    return [
        (row.action, *(len((json.loads(text) or {}).get("grants", ())) for text in (row.before, row.after)))
        for row in rows
    ]


async def test_a_grant_of_a_budget_is_money_and_gets_a_name(api: Api) -> None:
    await api.push(QUOTAS)
    await api.license()
    asked = {"limit": BUDGET, "amount": "50 USD", "starts_at": "2090-01-01", "expires_at": "2090-07-01T00:00:00Z"}
    grant = (await api.client.post(GRANTS, json=asked)).json()
    assert (grant["amount"], grant["state"], grant["starts_at"]) == ("50.00 USD", "scheduled", "2090-01-01T00:00:00Z")
    assert grant["id"]
    assert (await api.client.post(GRANTS, json=asked)).json()["id"] != grant["id"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"limit": "tokens:mont"}, "Did you mean 'tokens:month'?"),
        ({"limit": "tokens:second.rate"}, "is a rate"),
        ({"amount": 0}, "more than nothing"),
        ({"amount": 2**53}, "0 to 9007199254740991"),
        ({"amount": 1.5}, "neither a whole number of units nor money"),
        ({"amount": "5.00 USD"}, "counts whole units"),
        ({"expires_after_s": 0}, "ends before it starts"),
        ({"expires_at": "2090-01-01"}, "either at an instant or after a time"),
        ({"expires_after_s": None, "expires_at": "2020-01-01"}, "ends before it starts"),
        ({"expires_after_s": None, "starts_at": "2019-01-01", "expires_at": "2020-01-01"}, "has ended already"),
        ({"expires_after_s": None, "expires_at": "soon"}, "is not an instant"),
        ({"expires_after_s": None, "expires_at": "9999-12-31T23:59:59-01:00"}, "is not an instant"),
        ({"id": "a:b"}, "cannot name a grant"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_what_cannot_be_granted_is_refused(api: Api, change: dict[str, Any], says: str) -> None:
    await api.push(QUOTAS)
    await api.license()
    asked = {"limit": "tokens:month", "amount": 5, "expires_after_s": 60, **change}
    assert_problem(await api.client.post(GRANTS, json=asked), 422, says=says)
    assert (await api.get(GRANTS)).json()["items"] == []


async def test_a_tenant_without_a_license_has_no_grants(api: Api) -> None:
    asked = {"limit": "tokens:month", "amount": 5, "expires_after_s": 60}
    assert_problem(await api.client.post(GRANTS, json=asked), 404, says="acme")
    assert_problem(await api.get(GRANTS), 404, says="acme")
    assert_problem(await api.client.delete(f"{GRANTS}/g"), 404, says="acme")


async def test_grants_that_ended_long_ago_go_with_the_next_change(api: Api) -> None:
    await api.push(QUOTAS)
    old = Grant("old", LimitKey("tokens:month"), 5, 1, 2)
    lately = Grant("lately", LimitKey("tokens:month"), 5, 1, int(time.time()) - 60)
    await api.license()
    stored = await api.running.plane.database.read(licenses.get, "acme")
    assert stored
    with_grants = replace(stored.license, grants=(old, lately))
    await api.running.plane.database.write(
        partial(licenses.save, license_=with_grants, revision=stored.revision, now_us=1, new=False)
    )
    assert [grant["id"] for grant in (await api.get(GRANTS)).json()["items"]] == ["old", "lately"]
    await api.client.patch("/v1/licenses/acme", json={"status": "suspended"})
    left = (await api.get(GRANTS)).json()["items"]
    assert [(grant["id"], grant["state"]) for grant in left] == [("lately", "expired")]


async def test_a_second_license_and_a_stale_change_conflict(api: Api) -> None:
    await api.push()
    await api.license()
    assert_problem(await api.license(), 409)
    stale = await api.client.patch("/v1/licenses/acme", json={"plan": "pro"}, headers={"If-Match": '"1"'})
    assert_problem(stale, 412)
    fresh = await api.client.patch("/v1/licenses/acme", json={"status": "canceled"}, headers={"If-Match": '"2"'})
    assert fresh.status_code == 200
    assert_problem(await api.client.patch("/v1/licenses/nobody", json={}), 404)


async def test_a_rollout_waits_for_a_sidecar_that_is_behind(api: Api) -> None:
    await api.push()
    await api.running.headed(1)
    done = (await api.get("/v1/revisions/1/rollout")).json()
    assert done == {"revision": 1, "published": True, "confirmed": [], "waiting": [], "silent": [], "done": True}
    await beat(api, "a" * 32, revision=0)
    behind = (await api.get("/v1/revisions/1/rollout")).json()
    assert not behind["done"]
    assert behind["waiting"][0]["sidecar"] == "a" * 32
    await beat(api, "a" * 32, revision=1)
    assert (await api.get("/v1/revisions/1/rollout")).json()["confirmed"] == ["a" * 32]
    assert_problem(await api.get("/v1/revisions/9/rollout"), 404)


async def test_sidecars_are_listed_with_what_they_said(api: Api) -> None:
    await beat(api, "a" * 32, revision=4, tenants_held=3, log_bytes=17)
    item = (await api.get("/v1/sidecars")).json()["items"][0]
    assert (item["sidecar"], item["revision"], item["tenants_held"], item["log_bytes"]) == ("a" * 32, 4, 3, 17)
    assert item["state"] == "live"
    assert item["last_heard_s"] >= 0
    assert item["as_of"].endswith("Z")
    assert (await api.get("/v1/status")).json()["sidecars_live"] == 1


async def test_usage_is_summed_and_tallied(api: Api) -> None:
    sidecar = "a" * 32
    stream = NAMES.usage(usage_shard(sidecar))
    for one in (
        batch(1, 4, units={"reports": 2}, cost_nanos=1_500_000_000),
        batch(5, 6, effect=2, reason=13, cost_nanos=0, currency=""),
        batch(7, 7, idempotency_key="other-1", tenant="globex"),
    ):
        await api.running.redis.xadd(stream, {"b": one.pack()})
    await until(lambda: committed(api, 7))
    summary = (await api.get("/v1/usage/summary", tenant="acme")).json()
    assert summary["items"] == [
        {
            "tenant": "acme",
            "feature": "reports",
            "effect": "APPROVED",
            "events": 4,
            "units": 8,
            "cost": [{"currency": "USD", "amount": "6.00"}],
        },
        {"tenant": "acme", "feature": "reports", "effect": "DENIED", "events": 2, "units": 2, "cost": []},
    ]
    reasons = (await api.get("/v1/usage/summary", by="reason")).json()["items"]
    assert {(one["reason"], one["events"]) for one in reasons} == {("OK", 5), ("QUOTA_EXHAUSTED", 2)}
    tally = (await api.get("/v1/usage/tally", idempotency_prefix="job-")).json()
    assert tally == {
        "events": 6,
        "approved": 4,
        "denied": {"QUOTA_EXHAUSTED": 2},
        "pending": 0,
        "units_approved": 8,
        "units_by_feature": {"reports": 8},
    }
    at_s = AT_US // 1_000_000
    assert (await api.get("/v1/usage/tally", **{"from": at_s + 10})).json()["events"] == 0
    assert (await api.get("/v1/usage/tally", to="2026-09-21T14:13:21Z")).json()["events"] == 7
    assert_problem(await api.get("/v1/usage/summary", by="planet"), 422, says="tenant")
    assert_problem(await api.get("/v1/usage/tally", to="tomorrow"), 422)
    verified = (await api.get("/v1/ledger/verify")).json()
    assert verified["ok"] is True
    assert verified["logs"][0]["watermark"] == 7


async def test_readiness_says_what_is_wrong_and_passes_when_it_is_right(
    api: Api, valkey_process: ValkeyProcess
) -> None:
    await until(lambda: ready(api))
    await asyncio.to_thread(valkey_process.kill)

    async def unready() -> bool:
        return not (await api.get("/readyz")).json()["checks"]["redis"]["ok"]

    await until(unready)
    checks = (await api.get("/readyz")).json()["checks"]
    assert checks["database"]["ok"]
    assert not checks["redis"]["ok"]
    assert "keeps trying" in checks["redis"]["fix"]
    assert (await api.get("/healthz")).status_code == 200
    await asyncio.to_thread(valkey_process.start)
    await until(lambda: ready(api))


async def test_metrics_are_prometheus_text(api: Api) -> None:
    await api.push()
    await api.running.headed(1)
    response = await api.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    assert "licet_revision 1.0" in lines
    assert any(line.startswith("licet_ledger_events_total ") for line in lines)


async def test_a_body_that_is_too_large_is_refused(api: Api) -> None:
    response = await api.client.post("/v1/bundles", content=b" " * (BODY_BYTES_MAX + 1))
    assert_problem(response, 413)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b" " * 1024 * 1024

    assert_problem(await api.client.post("/v1/bundles", content=chunks()), 413)


async def test_an_unknown_address_is_a_problem_too(api: Api) -> None:
    assert_problem(await api.get("/v1/nothing"), 404)
    assert_problem(await api.client.delete("/v1/licenses"), 405)


async def beat(api: Api, sidecar: str, **fields: Any) -> None:
    """A heartbeat, and wait until the control plane has taken it in."""
    one = heartbeat(sidecar, **fields)
    await api.running.redis.hset(NAMES.sidecars(), sidecar, one.pack())

    async def heard() -> bool:
        known = api.running.plane.fleet.sidecars.get(sidecar)
        return known is not None and known.heartbeat == one

    await until(heard)


async def committed(api: Api, events: int) -> bool:
    return api.running.plane.drain.events >= events


async def ready(api: Api) -> bool:
    return (await api.get("/readyz")).status_code == 200


# The second route


@pytest.fixture
async def sidecar(api: Api) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a sidecar's key."""
    key = "licet_sidecar"
    await api.running.plane.database.write(access.add_key, name="pods", role=access.SIDECAR, key=key, now_us=1)
    transport = httpx.ASGITransport(make_app(api.running.plane))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://licet", headers={"Authorization": f"Bearer {key}"}
    ) as client:
        yield client


async def _snapshot(client: httpx.AsyncClient, **asked: Any) -> Snapshot:
    response = await client.post("/v1/sidecar/snapshot", json=asked)
    assert response.status_code == 200, response.text
    return Snapshot.unpack(response.content)


async def _usage(client: httpx.AsyncClient, *batches: UsageBatch) -> dict[str, Any]:
    body = pack_batches([one.pack() for one in batches])
    response = await client.post("/v1/usage/batches", content=body, headers={"Content-Type": OCTETS})
    assert response.status_code == 200, response.text
    acks: dict[str, str] = response.json()["acks"]
    return {log: base64.b64decode(ack) for log, ack in acks.items()}


async def test_a_sidecars_key_opens_nothing_but_the_second_route(api: Api, sidecar: httpx.AsyncClient) -> None:
    for path in ("/v1/status", "/v1/licenses", "/v1/usage/summary", "/v1/ledger/verify", "/v1/sidecars"):
        assert_problem(await sidecar.get(path), 403, says="role sidecar")
    assert_problem(await sidecar.post("/v1/bundles", json={}), 403)
    assert_problem(await api.client.post("/v1/sidecar/snapshot", json={}, headers={"Authorization": ""}), 401)
    assert_problem(await api.client.post("/v1/usage/batches", content=b"", headers={"Authorization": ""}), 401)


async def test_a_snapshot_is_signed_and_complete(api: Api, sidecar: httpx.AsyncClient) -> None:
    empty = await _snapshot(sidecar)
    assert (empty.manifest, empty.licenses) == (None, {})
    await api.push()
    await api.license("acme")
    await api.license("globex")
    found = await _snapshot(sidecar, wanted=["acme", "nobody"])
    verifier = api.running.verifier
    head = verifier.verify(found.head, kind=HEAD, key=HEAD_KEY)
    assert (head.revision, Head.from_payload(head.payload).run_id) == (3, "")
    assert found.manifest is not None
    manifest = Manifest.from_payload(verifier.verify(found.manifest, kind="bundle", key="bundle").payload)
    assert "report.export" in catalog_of_chunks([found.chunks[one] for one in manifest.chunks], manifest.chunks).actions
    assert verifier.verify(found.licenses["acme"], kind="license", key="acme").revision == 2
    assert (list(found.licenses), found.absent) == (["acme"], ("nobody",))


async def test_a_snapshot_for_who_has_it_brings_only_what_is_wanted(api: Api, sidecar: httpx.AsyncClient) -> None:
    await api.push()
    await api.license("acme")
    await api.license("globex")
    same = await _snapshot(sidecar, generation=1, revision=3, known=["acme"], wanted=["globex"])
    assert (same.manifest, same.chunks, list(same.licenses)) == (None, {}, ["globex"])
    newer = await _snapshot(sidecar, generation=1, revision=2, known=["acme"])
    assert newer.manifest is not None
    assert list(newer.licenses) == ["acme"]


async def test_batches_over_http_are_in_the_ledger_once_whatever_way_they_come(
    api: Api, sidecar: httpx.AsyncClient
) -> None:
    mine, other = "a" * 32, "b" * 32
    acks = await _usage(sidecar, batch(1, 5), batch(1, 2, sidecar=other))
    statement = api.running.verifier.verify(acks[f"{mine}:1"], kind=ACK, key=f"{mine}:1")
    assert (statement.generation, statement.revision) == (1, 5)
    assert set(acks) == {f"{mine}:1", f"{other}:1"}
    await api.running.redis.xadd(NAMES.usage(usage_shard(mine)), {"b": batch(3, 8).pack()})
    for _ in range(2):
        acks = await _usage(sidecar, batch(4, 10))

    async def all_there() -> bool:
        verified = (await api.get("/v1/ledger/verify")).json()
        return bool(verified["ok"] and verified["events"] == 12)

    await until(all_there)
    assert api.running.plane.drain.conflicts == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"junk", pack_batches([]), pack_batches([b"junk"]), pack_batches([batch(1, 1).pack()[:-3]])],
    ids=["empty", "junk", "none", "no batch", "torn"],
)
async def test_what_is_no_batch_is_refused_and_changes_nothing(
    api: Api, sidecar: httpx.AsyncClient, body: bytes
) -> None:
    response = await sidecar.post("/v1/usage/batches", content=body, headers={"Content-Type": OCTETS})
    assert_problem(response, 422)
    assert (await api.get("/v1/ledger/verify")).json()["events"] == 0


async def test_a_batch_that_does_not_fit_the_ledger_is_not_acknowledged(api: Api, sidecar: httpx.AsyncClient) -> None:
    wrong = batch(1, 2, sidecar="f" * 32, at_us="yesterday")
    acks = await _usage(sidecar, wrong, batch(1, 3))
    assert list(acks) == [f"{'a' * 32}:1"]


async def test_an_event_that_cannot_be_read_holds_up_only_its_own_batch(api: Api, sidecar: httpx.AsyncClient) -> None:
    newer = replace(batch(1, 2, sidecar="f" * 32), events=(msgpack.packb([1]), msgpack.packb([2])))
    for _ in range(2):
        assert list(await _usage(sidecar, newer, batch(1, 3))) == [f"{'a' * 32}:1"]
    (letter,) = (await api.get("/v1/usage/dead-letters")).json()["items"]
    assert (letter["log_id"], letter["first_seq"], letter["last_seq"], letter["times"]) == (newer.log_id, 1, 2, 2)
    assert "damaged event" in letter["reason"]


async def test_more_than_a_body_may_have_is_refused(api: Api, sidecar: httpx.AsyncClient) -> None:
    body = b"x" * (BODY_BYTES_MAX + 1)
    response = await sidecar.post("/v1/usage/batches", content=body, headers={"Content-Type": OCTETS})
    assert_problem(response, 413)
