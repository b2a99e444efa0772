"""Access requests and overrides in the control plane, over both databases: from the event to the signed document."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from licet.domain.approvals import RequestEntry, RequestState, request_key
from licet.domain.catalog import ApprovalChain, ApprovalStage, Catalog, Policy, Rule, RuleEffect
from licet.domain.catalog_wire import license_from_wire
from licet.domain.outcomes import Effect
from licet.wire.documents import Manifest
from licet.wire.usage import FLAG_OBSERVED, EventKind
from licet_control_plane import access_desk
from licet_control_plane.api.app import make_app
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.publisher.quotas import limits_under
from licet_control_plane.store import access, access_requests, licenses, snapshots
from licet_control_plane.store.schema import access_requests as table
from licet_control_plane.store.schema import audit
from tests.support.control_plane import Deployment, catalog, deployment, until
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

GUARD = Policy("guard", ("report.*",), (Rule("large", RuleEffect.REQUIRE_APPROVAL, approval="finance"),))
FINANCE = ApprovalChain("finance", (ApprovalStage(("group:finance",), deny_after_s=7_200),))
ID = "a1" * 16
ROOM = 10


class Desk:
    """A deployment, its API as several people use it, and events as a sidecar would send them."""

    def __init__(self, running: Deployment, keys: dict[str, str]) -> None:
        self.running = running
        self.keys = keys
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(make_app(running.plane)), base_url="http://licet")
        self._seq = 0

    async def __call__(self, method: str, path: str, *, by: str = "admin", **arguments: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[by]}", **arguments.pop("headers", {})}
        return await self._http.request(method, f"/v1{path}", headers=headers, **arguments)

    async def decide(self, what: str, id_: str = ID, *, by: str = "admin", **body: Any) -> httpx.Response:
        return await self("POST", f"/access-requests/{id_}/{what}", by=by, json=body)

    async def asks(self, count: int = 1, **changes: Any) -> None:
        """Events that ask for the request ``ID``, unless ``changes`` say otherwise, reach the ledger."""
        fields = {
            "effect": Effect.PENDING.value,
            "at_us": time.time_ns() // 1_000,
            "rule": "guard/large",
            "units": {"reports": 50},
            "spends": [],
            "access_request_id": ID,
        }
        made = batch(self._seq + 1, self._seq + count, **(fields | changes))
        self._seq += count
        worker = self.running.plane.workers[0]
        await worker._record([DecodedBatch.of(made.pack())])

    async def opened(self, id_: str = ID) -> dict[str, Any]:
        async def there() -> Any:
            answer = await self("GET", f"/access-requests/{id_}")
            return answer.json() if answer.status_code == 200 else None

        found: dict[str, Any] = await until(there)
        return found

    async def entries(self, tenant: str = "acme") -> tuple[RequestEntry, ...]:
        """As the newest document says."""
        stored = await self.running.plane.database.read(licenses.get, tenant)
        assert stored is not None
        return stored.license.requests

    async def audited(self, action: str) -> list[tuple[str, str]]:
        """(by, target) of each line."""
        query = select(audit.c.by, audit.c.target).where(audit.c.action == action)
        rows = await self.running.plane.database.read(lambda connection: connection.execute(query).all())
        return [(row.by, row.target) for row in rows]

    async def close(self) -> None:
        await self._http.aclose()


def content(amount: int = 100) -> Catalog:
    plain = catalog(amount)
    return Catalog.of([*plain.documents(), GUARD, FINANCE])


@pytest.fixture
async def desk(tmp_path: Path, valkey_process: ValkeyProcess) -> AsyncIterator[Desk]:
    async with started(tmp_path, valkey_process) as made:
        yield made


@pytest.fixture
async def any_desk(tmp_path: Path, valkey_process: ValkeyProcess, database_url: str) -> AsyncIterator[Desk]:
    async with started(tmp_path, valkey_process, database_url) as made:
        yield made


@asynccontextmanager
async def started(tmp_path: Path, valkey: ValkeyProcess, database_url: str = "") -> AsyncIterator[Desk]:
    async with deployment(tmp_path / "state", valkey.url, start=False, database_url=database_url) as running:
        running.settings["approver_groups"] = {"finance": ("ben", "cora", "fay")}
        running.settings["webhooks_private"] = True
        plane = await running.start()
        keys = {"admin": running.admin_key}
        for name, role in (("ben", "approver"), ("cora", "approver"), ("dan", "approver"), ("eve", "operator")):
            keys[name] = f"licet_{name}"
            await plane.database.write(access.add_key, name=name, role=role, key=keys[name], now_us=1)
        await plane.changes.push(content(), [], by="test")
        await running.license("acme")
        made = Desk(running, keys)
        yield made
        await made.close()


async def test_an_event_becomes_one_request_that_is_published_audited_and_named_by_its_chain(desk: Desk) -> None:
    await desk.asks(3)
    await desk.asks(kind=EventKind.REQUEST_ACCESS, units={}, units_held={"reports": 50}, justification="quarter end")
    shown = await desk.opened()
    assert (shown["state"], shown["subject"]["id"], shown["units_asked"]) == ("pending", "ada", {"reports": 50})
    assert (shown["chain"], shown["stage"]["approvers"]) == ("finance", ["group:finance"])
    assert [item["id"] for item in (await desk("GET", "/access-requests?state=pending")).json()["items"]] == [ID]
    (entry,) = await desk.entries()
    key = request_key("acme", ("user", "ada"), "", "report.export", "guard/large")
    assert (entry.id, entry.key, entry.state) == (ID, key, RequestState.PENDING)
    assert await desk.audited("access_request.open") == [("sidecars", f"acme/{ID}")]

    async def published() -> Any:
        statement = await desk.running.document("license", "acme")
        return statement and license_from_wire(statement.payload).requests

    assert (await until(published))[0].id == ID
    await until(lambda: _said(desk, "quarter end"))


async def _said(desk: Desk, words: str) -> bool:
    return bool((await desk("GET", f"/access-requests/{ID}")).json()["justification"] == words)


async def test_the_ledger_and_the_request_are_one_transaction(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise RuntimeError("the power failed")

    real = access_requests.note_asked
    monkeypatch.setattr(access_requests, "note_asked", broken)
    with pytest.raises(RuntimeError):
        await desk.asks()
    monkeypatch.setattr(access_requests, "note_asked", real)
    desk._seq = 0  # the batch comes again, whole
    await desk.asks()
    assert (await desk.opened())["state"] == "pending"


async def test_other_events_ask_for_nothing(desk: Desk) -> None:
    for changes in (
        {"effect": Effect.APPROVED.value},
        {"flags": FLAG_OBSERVED},
        {"access_request_id": ""},
        {"access_request_id": "not one"},
    ):
        await desk.asks(**changes)
    rows = await desk.running.plane.database.read(lambda connection: connection.execute(select(table)).all())
    assert rows == []


async def test_an_approval_is_signed_audited_and_idempotent_and_a_revocation_takes_it_back(any_desk: Desk) -> None:
    desk = any_desk
    await desk.asks()
    await desk.opened()
    first = await desk.decide("approve", by="ben", expires_after_s=3_600, units=70, reason="fine")
    again = await desk.decide("approve", by="ben", expires_after_s=3_600, units=70)
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert (first.json()["state"], first.json()["live"], first.json()["units"]) == ("approved", True, 70)
    (entry,) = await desk.entries()
    assert (entry.state, entry.units, entry.by, entry.reason) == (RequestState.APPROVED, 70, "ben", "fine")
    other = await desk.decide("approve", by="cora", expires_after_s=60)
    assert (other.status_code, other.json()["type"]) == (409, "urn:licet:problem:access-request-settled")

    async def published() -> Any:
        mark = await desk.running.mark("acme")
        return mark and mark.amounts.get(entry.limit_key)

    assert await until(published) == 70
    revoked = await desk.decide("revoke", by="cora", reason="oops")
    assert revoked.json()["state"] == "revoked"
    assert [one.state for one in await desk.entries()] == [RequestState.REVOKED]
    stored = await desk.running.plane.database.read(licenses.get, "acme")
    assert stored is not None
    assert entry.limit_key not in limits_under(stored.license, content())
    assert await desk.audited("access_request.approve") == [("ben", f"acme/{ID}")]
    assert await desk.audited("access_request.revoke") == [("cora", f"acme/{ID}")]


async def test_an_approver_of_one_tenant_decides_about_its_requests_and_finds_no_others(desk: Desk) -> None:
    for name, tenant in (("fay", "acme"), ("mallory", "globex")):
        desk.keys[name] = f"licet_{name}"
        added = {"name": name, "role": "approver", "tenant": tenant, "key": desk.keys[name], "now_us": 1}
        await desk.running.plane.database.write(access.add_key, **added)
    await desk.asks()
    await desk.opened()
    bodies = {"approve": {"expires_after_s": 60}, "deny": {"reason": "no"}, "revoke": {"reason": "no"}}
    for what, body in bodies.items():
        hidden = await desk.decide(what, by="mallory", **body)
        assert (hidden.status_code, hidden.json()["type"]) == (404, "urn:licet:problem:access-request-unknown")
    assert (await desk("GET", f"/access-requests/{ID}", by="mallory")).status_code == 404
    assert (await desk("GET", "/access-requests", by="mallory")).json()["items"] == []
    assert (await desk("GET", f"/access-requests/{ID}", by="fay")).json()["state"] == "pending"
    for what in ("approve", "revoke"):
        assert (await desk.decide(what, by="fay", **bodies[what])).status_code == 200
    assert await desk.audited("access_request.approve") == [("fay", f"acme/{ID}")]


async def test_who_asked_who_is_not_named_and_who_has_no_such_role_are_refused(desk: Desk) -> None:
    await desk.asks(subject_id="ben")
    await desk.opened()
    body = {"expires_after_s": 60}
    for who, why, kind in (
        ("ben", "own request", "access-request-own"),
        ("dan", "group:finance", "access-request-approver"),
        ("eve", "role operator", "role"),
    ):
        answer = await desk.decide("approve", by=who, **body)
        assert (answer.status_code, why in answer.json()["detail"]) == (403, True), answer.text
        assert answer.json()["type"] == f"urn:licet:problem:{kind}"
    early = await desk.decide("revoke", by="cora", reason="too early")
    assert (early.status_code, early.json()["type"]) == (409, "urn:licet:problem:access-request-state")
    assert (await desk.decide("approve", by="cora", **body)).status_code == 200
    assert await desk.audited("access_request.approve") == [("cora", f"acme/{ID}")]


async def test_an_edit_that_was_read_before_an_approval_is_still_made(desk: Desk) -> None:
    await desk.asks()
    before = (await desk("GET", "/licenses/acme")).headers["etag"]
    await desk.opened()
    assert (await desk.decide("approve", by="ben", expires_after_s=60)).status_code == 200
    assert (await desk("GET", "/licenses/acme")).headers["etag"] != before
    edited = await desk("PATCH", "/licenses/acme", json={"grace_s": 60}, headers={"If-Match": before})
    assert (edited.status_code, edited.json()["grace_s"]) == (200, 60)
    again = await desk("PATCH", "/licenses/acme", json={"grace_s": 90}, headers={"If-Match": before})
    assert (again.status_code, again.json()["type"]) == (412, "urn:licet:problem:changed")


async def test_a_denial_closes_the_request_with_its_reason(desk: Desk) -> None:
    await desk.asks()
    await desk.opened()
    assert (await desk.decide("deny", by="ben", reason="")).status_code == 422
    assert (await desk.decide("deny", by="ben", reason="not now")).json()["reason"] == "not now"
    (entry,) = await desk.entries()
    assert (entry.state, entry.reason, entry.by) == (RequestState.DENIED, "not now", "ben")
    assert (await desk.decide("approve", by="cora", expires_after_s=60)).status_code == 409


async def test_an_exceeded_limit_is_topped_up_by_what_is_approved_and_no_more(desk: Desk) -> None:
    plain = catalog(100)
    limit = plain.plans["pro"].features["reports"].limits[0]
    await desk.asks(rule=limit.key)
    await desk.opened()
    missing = await desk.decide("approve", expires_after_s=60)
    assert (missing.status_code, missing.json()["errors"][0]["path"]) == (422, "units")
    assert (await desk.decide("approve", expires_after_s=60, units="5.00 USD")).status_code == 422
    assert (await desk.decide("approve", expires_after_s=60, units=25)).status_code == 200
    grants = (await desk("GET", "/licenses/acme/grants")).json()["items"]
    assert [(one["id"], one["limit"], one["amount"]) for one in grants] == [(ID, limit.key, 25)]
    await desk.decide("revoke", reason="oops")
    assert (await desk("GET", "/licenses/acme/grants")).json()["items"] == []


async def test_a_request_that_nobody_decides_expires(desk: Desk) -> None:
    await desk.asks()
    await desk.opened()
    past = time.time_ns() // 1_000 - 1
    await desk.running.plane.database.write(
        lambda connection: connection.execute(update(table).values(expires_at=past))
    )
    late = await desk.decide("approve", by="ben", expires_after_s=60)
    assert (late.status_code, late.json()["type"]) == (409, "urn:licet:problem:access-request-expired")

    async def expired() -> bool:
        return await desk.audited("access_request.expire") == [("sidecars", f"acme/{ID}")]

    await until(expired)
    assert (await desk("GET", "/access-requests?state=expired")).json()["items"][0]["id"] == ID
    await desk.asks(access_request_id="b2" * 16, at_us=past - 86_400_000_000)
    assert (await desk.opened("b2" * 16))["state"] == "expired"  # it was on its way for a day


async def test_a_flood_opens_so_many_requests_of_a_tenant_and_no_more(
    any_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = any_desk
    monkeypatch.setattr(access_desk, "OPEN_MAX", ROOM)
    flood = ROOM + 3
    for number in range(flood):
        await desk.asks(access_request_id=f"{number:032x}", subject_id=f"user-{number}")

    async def settled() -> bool:
        counts = desk.running.plane.access_desk.counts
        return counts.opened + counts.refused == flood

    await until(settled)
    assert desk.running.plane.access_desk.counts.opened == ROOM
    assert len(await desk.entries()) == ROOM
    pages: list[str] = []
    cursor = ""
    while cursor is not None:
        page = (await desk("GET", f"/access-requests?limit=4&cursor={cursor}")).json()
        pages += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert len(pages) == len(set(pages)) == ROOM


async def test_erasing_a_subject_blanks_who_asked(any_desk: Desk) -> None:
    desk = any_desk
    await desk.asks(resource_id="report-7", justification="for ada")
    await desk.opened()
    answer = await desk("POST", "/tenants/acme/subjects/erase", json={"type": "user", "id": "ada"})
    assert answer.status_code == 200
    shown = (await desk("GET", f"/access-requests/{ID}")).json()
    assert shown["subject"] == {"type": "", "id": "", "on_behalf_of": ""}
    assert (shown["resource"]["id"], shown["justification"], shown["state"]) == ("", "", "expired")
    lines = await desk.running.plane.database.read(
        lambda connection: connection.execute(select(audit.c.before, audit.c.after)).all()
    )
    assert not any("ada" in (line.before + line.after) for line in lines)


async def test_a_change_of_the_license_keeps_its_requests(desk: Desk) -> None:
    await desk.asks()
    await desk.opened()
    stored = await desk.running.plane.changes.update_license("acme", {"ends_s": 2**32}, if_seen=None, by="test")
    assert [one.id for one in stored.license.requests] == [ID]
    line = await desk.running.plane.database.read(
        lambda connection: connection.execute(select(audit.c.after).where(audit.c.action == "license.update")).one()
    )
    assert "requests" not in json.loads(line.after)
    put = await desk("PUT", "/licenses/acme", json={"plan": "pro", "renewal_period": "month", "grace_s": 60})
    assert put.status_code == 200, put.text
    for move in ("suspend", "resume", "renew", "cancel"):
        moved = await desk("POST", f"/licenses/acme/{move}", json={})
        assert moved.status_code == 200, moved.text
        assert [one.id for one in await desk.entries()] == [ID], move


async def test_a_request_leaves_what_a_license_is_and_when_it_renews_itself_as_they_were(desk: Desk) -> None:
    now_s = int(time.time())
    terms = {"plan": "pro", "ends_at": str(now_s + 86_400), "renewal_period": "month", "auto_renew": True}
    assert (await desk("PUT", "/licenses/acme", json={**terms, "grace_s": 60})).status_code == 200
    database = desk.running.plane.database
    before = await database.read(licenses.get, "acme")
    await desk.asks()
    await desk.opened()
    assert (await desk.decide("approve", expires_after_s=60)).status_code == 200
    after = await database.read(licenses.get, "acme")
    assert before is not None
    assert after is not None
    assert replace(after.license, requests=()) == before.license
    assert await database.read(licenses.due, now_s=now_s, limit=10) == []
    assert await database.read(licenses.due, now_s=now_s + 86_400, limit=10) == ["acme"]


async def test_webhooks_hear_of_an_approval_that_tops_up_a_limit_and_of_no_other(desk: Desk) -> None:
    hook = {"url": "http://127.0.0.1:9/", "events": ["license.changed"]}
    made = (await desk("POST", "/webhooks", json=hook)).json()

    async def told() -> int:
        return len((await desk("GET", f"/webhooks/{made['id']}/deliveries")).json()["items"])

    await desk.asks()
    await desk.opened()
    assert (await desk.decide("approve", expires_after_s=60)).status_code == 200
    assert await told() == 0
    limit = catalog(100).plans["pro"].features["reports"].limits[0]
    other = "b2" * 16
    await desk.asks(rule=limit.key, access_request_id=other)
    await desk.opened(other)
    assert await told() == 0
    assert (await desk.decide("approve", other, expires_after_s=60, units=25)).status_code == 200
    assert await told() == 1
    await desk.decide("revoke", other, reason="oops")
    assert await told() == 2


async def test_a_request_survives_a_control_plane_that_is_stopped_before_it_is_decided(desk: Desk) -> None:
    await desk.asks()
    await desk.opened()
    await desk.running.stop()
    await desk.running.redis.flushall()
    await desk.running.start()
    reborn = Desk(desk.running, desk.keys)
    approved = await reborn.decide("approve", by="ben", expires_after_s=3_600)
    assert approved.json()["state"] == "approved"

    async def published() -> Any:
        statement = await desk.running.document("license", "acme")
        states = [one.state for one in license_from_wire(statement.payload).requests] if statement else []
        return states == [RequestState.APPROVED]

    assert await until(published)
    await reborn.close()


async def test_what_is_not_there_is_said_to_be_so(desk: Desk) -> None:
    for method, path, body, kind in (
        ("GET", f"/access-requests/{ID}", None, "access-request-unknown"),
        ("GET", "/access-requests/none", None, "access-request-unknown"),
        ("POST", f"/access-requests/{ID}/deny", {"reason": "no"}, "access-request-unknown"),
        ("DELETE", "/overrides/none", None, "override-unknown"),
    ):
        answer = await desk(method, path, json=body)
        assert (answer.status_code, answer.json()["type"]) == (404, f"urn:licet:problem:{kind}")
    assert (await desk("GET", "/access-requests?cursor=x")).status_code == 422
    assert (await desk("GET", "/access-requests?state=x")).status_code == 422


# Overrides


async def manifest_of(desk: Desk, holds: Callable[[Manifest], bool]) -> Manifest:
    async def there() -> Any:
        statement = await desk.running.document("bundle", "bundle")
        found = Manifest.from_payload(statement.payload) if statement else None
        return found if found and holds(found) else None

    made: Manifest = await until(there)
    return made


INCIDENT = {"action": "report.*", "effect": "allow", "expires_after_s": 3_600, "reason": "INC-1", "id": "inc-1"}


async def test_an_override_is_published_with_the_bundle_kept_by_a_push_and_cleared(desk: Desk) -> None:
    before = await manifest_of(desk, lambda one: not one.overrides)
    first = await desk("POST", "/overrides", json=INCIDENT)
    again = await desk("POST", "/overrides", json=INCIDENT)
    assert (first.status_code, again.status_code, again.json()["set_at"]) == (201, 200, first.json()["set_at"])
    other = await desk("POST", "/overrides", json=INCIDENT | {"effect": "deny"})
    assert (other.status_code, other.json()["type"]) == (422, "urn:licet:problem:override-exists")
    published = await manifest_of(desk, lambda one: len(one.overrides) == 1)
    assert published.has_content_of(before)
    assert [(one.id, one.by, one.reason) for one in published.overrides] == [("inc-1", "admin", "INC-1")]
    await desk.running.plane.changes.push(content(7), [], by="test")
    pushed = await manifest_of(desk, lambda one: one.chunks != before.chunks)
    assert pushed.overrides == published.overrides
    cleared = await desk("DELETE", "/overrides/inc-1")
    assert cleared.json()["state"] == "cleared"
    assert (await desk("DELETE", "/overrides/inc-1")).json()["cleared_at"] == cleared.json()["cleared_at"]
    await manifest_of(desk, lambda one: not one.overrides)
    assert await desk.audited("override.set") == [("admin", "override/inc-1")]
    assert await desk.audited("override.clear") == [("admin", "override/inc-1")]
    assert [one["state"] for one in (await desk("GET", "/overrides")).json()["items"]] == ["cleared"]


async def test_an_override_reaches_sidecars_by_the_second_route_and_outlives_a_wiped_redis(desk: Desk) -> None:
    await desk("POST", "/overrides", json=INCIDENT)
    plane = desk.running.plane
    snapshot = await plane.database.read(
        snapshots.read, sign=plane.changes.sign, have=(0, 0), known=[], wanted=[], now_us=1, epoch=1, live=1
    )
    assert snapshot.manifest is not None
    statement = desk.running.verifier.verify(snapshot.manifest, kind="bundle", key="bundle")
    assert [one.id for one in Manifest.from_payload(statement.payload).overrides] == ["inc-1"]
    await manifest_of(desk, lambda one: len(one.overrides) == 1)
    await desk.running.redis.flushall()
    await manifest_of(desk, lambda one: len(one.overrides) == 1)


async def test_an_override_that_cannot_be_meant_is_refused_by_its_field(desk: Desk) -> None:
    for changes, field in (
        ({"reason": " "}, "reason"),
        ({"expires_after_s": 86_401}, "expires_after_s"),
        ({"expires_after_s": 0}, "expires_after_s"),
        ({"effect": "maybe"}, "effect"),
        ({"action": "repor.*"}, "action"),
        ({"action": "report.*.x"}, "action"),
        ({"tenant": "a b"}, "tenant"),
    ):
        answer = await desk("POST", "/overrides", json=INCIDENT | changes)
        assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, field)
    assert (await desk("GET", "/overrides")).json()["items"] == []


async def test_two_that_decide_at_once_do_not_both_win(desk: Desk) -> None:
    await desk.asks()
    await desk.opened()
    answers = await asyncio.gather(
        desk.decide("approve", by="ben", expires_after_s=60), desk.decide("deny", by="cora", reason="no")
    )
    assert sorted(one.status_code for one in answers) == [200, 409]
