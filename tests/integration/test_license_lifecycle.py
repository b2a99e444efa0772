"""Licenses that are put, suspended, renewed, moved to other plans and canceled, by the API and by themselves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, select

from licet_control_plane.api.app import make_app
from licet_control_plane.changes import Changes
from licet_control_plane.license_keeper import BY, LicenseKeeper
from licet_control_plane.store import licenses, revisions
from licet_control_plane.store.database import Database
from licet_control_plane.store.schema import audit
from tests.support.control_plane import Deployment, deployment, until
from tests.support.valkey import ValkeyProcess

DAY_S = 86_400


class Licensing:
    def __init__(self, running: Deployment, client: httpx.AsyncClient) -> None:
        self.running = running
        self.client = client

    async def put(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return await self.client.put("/v1/licenses/acme", json={"plan": "pro", **fields}, headers=headers)

    async def move(self, move: str, **body: Any) -> httpx.Response:
        return await self.client.post(f"/v1/licenses/acme/{move}", json=body)

    async def get(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get("/v1/licenses/acme")).json()
        return found

    async def audited(self, action: str) -> list[Any]:
        def read(connection: Connection) -> list[Any]:
            rows = connection.execute(select(audit).where(audit.c.action == action).order_by(audit.c.number))
            return list(rows.all())

        return await self.running.plane.database.read(read)


@pytest.fixture
async def licensing(tmp_path: Path, valkey_process: ValkeyProcess, database_url: str) -> AsyncIterator[Licensing]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=database_url) as running:
        transport = httpx.ASGITransport(make_app(running.plane))
        headers = {"Authorization": f"Bearer {running.admin_key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
            await running.push(plans=("pro", "big"))
            yield Licensing(running, client)


async def test_a_license_that_is_put_again_is_the_same_and_says_when_somebody_else_was_faster(
    licensing: Licensing,
) -> None:
    created = await licensing.put(starts_at="2027-01-31T00:00:00Z", renewal_period="month", grace_s=3_600)
    assert (created.status_code, created.json()["ends_at"]) == (201, "2027-02-28T00:00:00Z")
    again = await licensing.put(starts_at="2027-01-31T00:00:00Z", renewal_period="month", grace_s=3_600)
    assert (again.status_code, again.json()) == (200, created.json())
    renewed = await licensing.move("renew")
    assert renewed.json()["ends_at"] == "2027-03-31T00:00:00Z"
    kept = await licensing.put(starts_at="2027-01-31T00:00:00Z", renewal_period="month", grace_s=3_600)
    assert kept.json() == renewed.json()
    assert (await licensing.put({"If-Match": created.headers["etag"]})).status_code == 412
    assert (await licensing.put({"If-None-Match": "*"})).status_code == 412
    whole = (await licensing.put({"If-Match": renewed.headers["etag"]})).json()
    assert (whole["starts_at"], whole["renewal_period"], whole["grace_s"]) == (None, None, 0)
    other = await licensing.client.put("/v1/licenses/other", json={"plan": "pro"}, headers={"If-Match": '"1"'})
    assert other.status_code == 412


async def test_if_match_takes_any_of_its_tags_and_none_that_was_never_given(licensing: Licensing) -> None:
    path = "/v1/licenses/acme"
    assert (await licensing.put({"If-Match": "*"})).status_code == 412
    assert (await licensing.client.get(path)).status_code == 404
    await licensing.put()
    tag = (await licensing.client.get(path)).headers["etag"]
    number = tag.strip('"').partition("-")[0]
    for if_match, status in (
        (f'"1-00000000", {tag}', 200),
        (f'"zzz",W/{tag} , "1"', 200),
        (f'"{number}"', 200),
        ("*", 200),
        (f'"{number}-zzz"', 412),
        (f'"{number}-0000000g"', 412),
        (f'"{int(number) + 1}-00000000", "1"', 412),
        ("", 412),
    ):
        answers = [
            await licensing.client.patch(path, json={"plan": "pro"}, headers={"If-Match": if_match}),
            await licensing.client.post(f"{path}/resume", headers={"If-Match": if_match}),
            await licensing.put({"If-Match": if_match}),
        ]
        assert [answer.status_code for answer in answers] == [status] * 3, if_match
    missing = await licensing.client.patch("/v1/licenses/none", json={"plan": "pro"}, headers={"If-Match": "*"})
    assert missing.status_code == 404


async def test_the_audit_trail_says_what_became_of_a_license_whatever_route_it_came_by(licensing: Licensing) -> None:
    def row(tenant: str, plan: str) -> dict[str, Any]:
        return {"licenses": [{"tenant": tenant, "plan": plan}]}

    await licensing.put()
    await licensing.put(grace_s=60)
    await licensing.client.post("/v1/licenses/import", json=row("other", "pro"))
    await licensing.client.post("/v1/licenses/import", json=row("other", "big"))
    assert [one.target for one in await licensing.audited("license.create")] == ["acme", "other"]
    assert [one.target for one in await licensing.audited("license.update")] == ["acme", "other"]
    for at in ("now", "month_end"):
        assert (await licensing.move("change-plan", plan="big" if at == "now" else "pro", at=at)).status_code == 200
    now, later = await licensing.audited("license.change_plan")
    assert ("planned" in json.loads(now.after), "planned" in json.loads(later.after)) == (False, True)


async def test_a_suspended_license_is_resumed_and_a_canceled_one_says_why_it_is_not(licensing: Licensing) -> None:
    await licensing.put()
    suspended = (await licensing.move("suspend")).json()
    assert suspended["stage"] == "suspended"
    assert (await licensing.move("suspend")).json() == suspended
    assert (await licensing.move("resume")).json()["stage"] == "active"
    assert (await licensing.move("cancel", at="term_end")).status_code == 422
    assert (await licensing.move("cancel")).json()["stage"] == "canceled"
    refused = await licensing.move("resume")
    assert refused.status_code == 409
    assert refused.json()["type"] == "urn:licet:problem:license-state"
    assert "it was canceled" in refused.json()["detail"]
    assert (await licensing.put()).json()["stage"] == "canceled"
    assert (await licensing.put(status="active")).json()["stage"] == "active"
    assert [row.action for row in await licensing.audited("license.suspend")] == ["license.suspend"]


async def test_a_term_that_ended_while_nobody_ran_is_renewed_once_for_each_period_by_whoever_comes_first(
    licensing: Licensing,
) -> None:
    plane = licensing.running.plane
    now_s = int(time.time())
    fields = {"starts_at": str(now_s - 4 * DAY_S), "ends_at": str(now_s - 3 * DAY_S)}
    created = await licensing.put(**fields, renewal_period="day", auto_renew=True)
    assert created.status_code == 201, created.text
    second = Database(plane.config.database)
    try:
        changes = Changes(second, licensing.running.key, wake=asyncio.Event(), now_s=time.time)
        others = [
            LicenseKeeper(plane.database, plane.changes, now_s=time.time),
            LicenseKeeper(second, changes, now_s=time.time),
        ]

        async def renewed() -> bool:
            await asyncio.gather(*(keeper.look() for keeper in others))
            return bool((await licensing.get())["stage"] == "active")

        await until(renewed)
        await asyncio.gather(*(keeper.look() for keeper in others))
    finally:
        second.close()
    # The fourth day runs, and the control plane's own keeper may have been there, too.
    found = await licensing.audited("license.renew")
    assert [row.by for row in found] == [BY] * 4
    ends = [json.loads(row.after)["ends_s"] for row in found]
    assert ends == [now_s + number * DAY_S for number in (-2, -1, 0, 1)]


async def test_a_planned_change_of_plan_is_made_when_it_is_due_and_holds_its_plan_until_then(
    licensing: Licensing,
) -> None:
    now_s = int(time.time())
    await licensing.put(starts_at=str(now_s - DAY_S), ends_at=str(now_s + DAY_S))
    planned = (await licensing.move("change-plan", plan="big", at="term_end")).json()
    assert (planned["plan"], planned["planned"]["plan"]) == ("pro", "big")
    assert (await licensing.move("change-plan", plan="none", at="term_end")).status_code == 422
    assert (await licensing.move("change-plan", plan="big", at="2020-01-01")).status_code == 422
    bundle = {"documents": [{"path": "a.yaml", "content": "kind: Plan\nname: pro\nfeatures: {}\n"}]}
    refused = await licensing.client.post("/v1/bundles", json=bundle)
    assert refused.status_code == 422
    assert "Plan/big" in refused.text
    keeper = LicenseKeeper(
        licensing.running.plane.database, licensing.running.plane.changes, now_s=lambda: now_s + DAY_S
    )
    while await keeper.look():
        pass
    found = await licensing.get()
    assert (found["plan"], found["planned"]) == ("big", None)
    revision = await licensing.running.plane.database.read(revisions.get, found["revision"])
    assert revision is not None


async def test_a_license_that_is_canceled_at_its_end_is_canceled_then(licensing: Licensing) -> None:
    now_s = int(time.time())
    await licensing.put(ends_at=str(now_s + DAY_S), renewal_period="month", auto_renew=True, grace_s=60)
    ending = (await licensing.move("cancel", at="term_end")).json()
    assert (ending["stage"], ending["cancels"], ending["auto_renew"], ending["grace_ends_at"]) == (
        "active",
        True,
        False,
        None,
    )
    database, changes = licensing.running.plane.database, licensing.running.plane.changes
    keeper = LicenseKeeper(database, changes, now_s=lambda: now_s + DAY_S)
    while await keeper.look():
        pass
    assert (await licensing.get())["stage"] == "canceled"
    assert await database.read(licenses.due, now_s=now_s + 400 * DAY_S, limit=10) == []


async def test_many_are_put_at_once_and_all_or_none(licensing: Licensing) -> None:
    async def send(*rows: dict[str, Any], **fields: Any) -> httpx.Response:
        return await licensing.client.post("/v1/licenses/import", json={"licenses": rows, **fields})

    async def tenants() -> list[str]:
        return [item["tenant"] for item in (await licensing.client.get("/v1/licenses")).json()["items"]]

    await licensing.put()
    rows = [{"tenant": "acme", "plan": "pro"}, {"tenant": "b", "plan": "big"}, {"tenant": "c", "plan": "pro"}]
    dry = (await send(*rows, dry_run=True)).json()
    assert (dry["created"], dry["changed"], dry["unchanged"], await tenants()) == (2, 0, 1, ["acme"])
    done = (await send(*rows)).json()
    assert [item["outcome"] for item in done["items"]] == ["unchanged", "created", "created"]
    assert done["revision"] == done["items"][2]["revision"]
    assert (await send(*rows)).json()["unchanged"] == 3
    before = await licensing.audited("license.update")

    refused = await send(
        {"tenant": "acme", "plan": "big"},
        {"tenant": "b", "plan": "bug"},
        {"tenant": "d", "plan": "pro", "addons": {"big": 0}},
        {"tenant": "a b", "plan": "pro"},
        {"tenant": "acme", "plan": "pro"},
    )
    assert refused.status_code == 422
    assert [(error["path"], error["tenant"]) for error in refused.json()["errors"]] == [
        ("licenses.1.plan", "b"),
        ("licenses.2.addons.big", "d"),
        ("licenses.3.tenant", "a b"),
        ("licenses.4.tenant", "acme"),
    ]
    assert (await licensing.get())["plan"] == "pro"
    assert await tenants() == ["acme", "b", "c"]
    assert await licensing.audited("license.update") == before
    assert (await send()).status_code == 422
    assert (await send(*({"tenant": f"t{n}", "plan": "pro"} for n in range(501)))).status_code == 422
