"""What every request of the REST API can rely on: keys that make it happen once, ETags, rates, and problems."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, select, update

from licet_control_plane.api import licenses as licenses_api
from licet_control_plane.api.app import make_app
from licet_control_plane.api.problems import Problem
from licet_control_plane.store import idempotency, licenses, webhooks
from licet_control_plane.store.database import DatabaseUnavailable
from licet_control_plane.store.schema import audit, idempotency_keys
from tests.support.control_plane import Deployment, deployment
from tests.support.valkey import ValkeyProcess


class Api:
    def __init__(self, running: Deployment, client: httpx.AsyncClient) -> None:
        self.running = running
        self.client = client

    async def renew(self, key: str, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/licenses/acme/renew", json=body, headers={"Idempotency-Key": key})

    async def ends_at(self) -> str:
        return str((await self.client.get("/v1/licenses/acme")).json()["ends_at"])

    async def change_key(self, **values: Any) -> None:
        def work(connection: Connection) -> None:
            connection.execute(update(idempotency_keys).values(**values))

        await self.running.plane.database.write(work)


@pytest.fixture
async def api(tmp_path: Path, valkey_process: ValkeyProcess, database_url: str) -> AsyncIterator[Api]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=database_url, api_rate=20.0) as running:
        transport = httpx.ASGITransport(make_app(running.plane), raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {running.admin_key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
            await running.push()
            terms = {"plan": "pro", "starts_at": "2027-01-01", "renewal_period": "month"}
            assert (await client.put("/v1/licenses/acme", json=terms)).status_code == 201
            yield Api(running, client)


async def test_a_request_that_is_sent_again_with_its_key_is_done_once_and_answered_the_same(api: Api) -> None:
    first, *others = await asyncio.gather(*(api.renew("k") for _ in range(4)))
    done = [answer for answer in (first, *others) if answer.status_code == 200]
    busy = [answer for answer in (first, *others) if answer.status_code == 409]
    assert len(done) + len(busy) == 4
    assert {answer.json()["type"] for answer in busy} <= {"urn:licet:problem:idempotency-running"}
    again = await api.renew("k")
    assert (again.status_code, again.json(), again.headers["etag"]) == (200, done[0].json(), done[0].headers["etag"])
    assert again.headers["idempotency-replayed"] == "true"
    assert await api.ends_at() == "2027-03-01T00:00:00Z"


async def test_a_key_that_was_used_for_another_request_is_refused(api: Api) -> None:
    await api.renew("k")
    other = await api.renew("k", periods=2)
    assert (other.status_code, other.json()["type"]) == (422, "urn:licet:problem:idempotency-key-reused")
    assert (await api.renew("l")).status_code == 200
    assert await api.ends_at() == "2027-04-01T00:00:00Z"


async def test_what_was_refused_is_done_anew_with_its_key_once_it_can_be(api: Api) -> None:
    license_ = "/v1/licenses/acme"
    assert (await api.client.post(f"{license_}/cancel", json={})).status_code == 200
    assert (await api.renew("k")).json()["type"] == "urn:licet:problem:license-state"
    assert (await api.client.patch(license_, json={"status": "active"})).status_code == 200
    assert (await api.renew("k")).status_code == 200
    tag = (await api.client.get(license_)).headers["etag"]
    for if_match, status in (('"1"', 412), (tag, 200), ('"1"', 200)):
        headers = {"Idempotency-Key": "l", "If-Match": if_match}
        answer = await api.client.post(f"{license_}/renew", json={}, headers=headers)
        assert answer.status_code == status
    assert await api.ends_at() == "2027-04-01T00:00:00Z"


async def test_a_request_that_is_refused_after_its_commit_is_not_done_twice(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise Problem(409, "Too late.", "Do not.")

    with monkeypatch.context() as patched:
        patched.setattr(licenses_api, "described", refused)
        assert (await api.renew("k")).status_code == 409
    again = await api.renew("k")
    assert (again.status_code, again.headers["idempotency-replayed"]) == (409, "true")
    assert await api.ends_at() == "2027-03-01T00:00:00Z"


async def test_a_refusal_about_webhooks_commits_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "WEBHOOKS_MAX", 1)
    body = {"url": "https://example.com/"}
    first = (await api.client.post("/v1/webhooks", json=body)).json()["id"]
    for path, sent, status in (
        ("/v1/webhooks", body, 409),
        (f"/v1/webhooks/{first}/redeliver", {"message": "msg_none"}, 404),
    ):
        for _ in range(2):
            refused = await api.client.post(path, json=sent, headers={"Idempotency-Key": "k"})
            assert (refused.status_code, "idempotency-replayed" in refused.headers) == (status, False)

    def actions(connection: Connection) -> list[str]:
        return list(connection.scalars(select(audit.c.action).where(audit.c.action.like("webhook.%"))))

    assert await api.running.plane.database.read(actions) == ["webhook.create"]


async def test_what_failed_is_done_anew_with_its_key(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(licenses, "save", broken)
        failed = await api.renew("broken")
    assert (failed.status_code, failed.json()["type"]) == (500, "urn:licet:problem:internal")
    assert "a defect" not in failed.text
    assert (await api.renew("broken")).status_code == 200
    assert await api.ends_at() == "2027-03-01T00:00:00Z"


async def test_an_answer_is_kept_for_its_caller_who_must_still_be_admitted_and_holds_no_secret(api: Api) -> None:
    made = [
        (
            await api.client.post(
                "/v1/api-keys", json={"name": name, "role": "operator"}, headers={"Idempotency-Key": name}
            )
        )
        for name in ("first", "second")
    ]
    first, second = ({"Authorization": f"Bearer {one.json()['key']}", "Idempotency-Key": "k"} for one in made)
    renew = "/v1/licenses/acme/renew"
    assert "idempotency-replayed" not in (await api.client.post(renew, json={}, headers=first)).headers
    assert (await api.client.post(renew, json={}, headers=first)).headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in (await api.client.post(renew, json={}, headers=second)).headers
    assert (await api.client.delete("/v1/api-keys/first")).status_code == 200
    assert (await api.client.post(renew, json={}, headers=first)).status_code == 401

    def kept(connection: Connection) -> list[str]:
        return list(connection.scalars(select(idempotency_keys.c.key)))

    assert await api.running.plane.database.read(kept) == ["k", "k"]


async def test_an_answer_that_holds_the_secret_of_a_webhook_is_not_kept_and_the_webhook_is_made_once(api: Api) -> None:
    body, headers = {"url": "https://example.com/"}, {"Idempotency-Key": "k"}
    made = await api.client.post("/v1/webhooks", json=body, headers=headers)
    again = await api.client.post("/v1/webhooks", json=body, headers=headers)
    assert (again.status_code, again.json()["type"]) == (409, "urn:licet:problem:idempotency-lost")
    assert made.json()["secret"] not in again.text
    assert len((await api.client.get("/v1/webhooks")).json()["items"]) == 1

    def kept(connection: Connection) -> bytes:
        return connection.scalars(select(idempotency_keys.c.body)).one()

    assert b"whsec" not in await api.running.plane.database.read(kept)
    path, headers = f"/v1/webhooks/{made.json()['id']}/secret", {"Idempotency-Key": "r"}
    rotated = await api.client.post(path, json={}, headers=headers)
    again = await api.client.post(path, json={}, headers=headers)
    assert (rotated.status_code, again.status_code) == (200, 409)
    assert rotated.json()["secret"] not in again.text
    assert (await api.client.post("/v1/webhooks", json={**body, "url": "-"}, headers={"Idempotency-Key": "l"})).is_error


async def test_an_answer_is_kept_before_anybody_has_it(api: Api) -> None:
    """Else a client that has it, and asks again, could be told that it is being done, or was lost."""
    app = make_app(api.running.plane)
    kept_before_sent: list[Any] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.body":
                with api.running.plane.database.engine.connect() as connection:
                    kept_before_sent.append(connection.scalar(select(idempotency_keys.c.status)))
            await send(message)

        await app(scope, receive, sending)

    headers = {**api.client.headers, "Idempotency-Key": "k"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(watched), base_url="http://licet") as client:
        assert (await client.post("/v1/licenses/acme/renew", json={}, headers=headers)).status_code == 200
    assert kept_before_sent == [200]


async def test_that_a_key_is_used_for_the_first_time_is_not_taken_for_its_change(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = (await api.client.post("/v1/api-keys", json={"name": "new", "role": "operator"})).json()["key"]
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "k"}

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(licenses, "save", broken)
        assert (await api.client.post("/v1/licenses/acme/renew", json={}, headers=headers)).status_code == 500
    assert (await api.client.post("/v1/licenses/acme/renew", json={}, headers=headers)).status_code == 200


async def test_an_attempt_that_was_refused_may_be_made_again_with_its_key(api: Api) -> None:
    key = (await api.client.post("/v1/api-keys", json={"name": "reads", "role": "auditor"})).json()["key"]
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "k"}
    for _ in range(2):
        assert (await api.client.post("/v1/licenses/acme/renew", json={}, headers=headers)).status_code == 403


@pytest.mark.parametrize(("committed", "status"), [(True, 409), (False, 200)])
async def test_after_a_crash_a_request_is_done_again_only_if_it_had_not_come_to_its_commit(
    api: Api, committed: bool, status: int
) -> None:
    await api.renew("k")
    before = await api.ends_at()
    # As a process leaves it that is killed: the answer was not kept.
    await api.change_key(status=None, headers=None, body=None, committed=committed, at=1)
    now_us = idempotency.RUNNING_S_MAX * 1_000_000 + 2
    plane = api.running.plane
    kept, plane.now_s = plane.now_s, lambda: now_us / 1_000_000
    try:
        again = await api.renew("k")
    finally:
        plane.now_s = kept
    assert again.status_code == status
    assert (await api.ends_at() == before) is committed
    if committed:
        assert again.json()["type"] == "urn:licet:problem:idempotency-lost"


async def test_a_request_that_took_so_long_that_it_was_begun_once_more_changes_nothing(api: Api) -> None:
    database, key = api.running.plane.database, ("c", "k")
    later = idempotency.RUNNING_S_MAX * 1_000_000
    for now_us in (0, later):
        assert await database.write(idempotency.begin, *key, "r", now_us=now_us) is idempotency.Standing.NEW
    with pytest.raises(DatabaseUnavailable, match="too long"):
        await database.write(idempotency.commit, *key, begun_us=0)
    await database.write(idempotency.forget, *key, begun_us=0)
    await database.write(idempotency.commit, *key, begun_us=later)
    answer = idempotency.Answer(200, {}, b"done")
    await database.write(idempotency.keep, *key, answer, begun_us=later)
    assert await database.write(idempotency.begin, *key, "r", now_us=later + 1) == answer


async def test_the_commit_is_noted_in_the_transaction_that_makes_the_change(api: Api) -> None:
    await api.renew("k")

    def read(connection: Connection) -> list[Any]:
        return list(connection.execute(select(idempotency_keys.c.committed, idempotency_keys.c.status)))

    assert await api.running.plane.database.read(read) == [(True, 200)]


async def test_keys_are_forgotten_after_a_day_and_the_oldest_make_room(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = api.running.plane.database
    monkeypatch.setattr(idempotency, "KEYS_MAX", 3)
    for number in range(5):
        await database.write(idempotency.begin, "c", f"{number}", "r", now_us=number)
    late = idempotency.KEPT_S * 1_000_000 + 3

    def left(connection: Connection) -> list[str]:
        return list(connection.scalars(select(idempotency_keys.c.key).order_by(idempotency_keys.c.key)))

    assert await database.read(left) == ["2", "3", "4"]
    assert await database.write(idempotency.begin, "c", "9", "r", now_us=late) is idempotency.Standing.NEW
    assert await database.read(left) == ["3", "4", "9"]


async def test_large_answers_make_room_before_there_are_too_many_keys(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = api.running.plane.database
    monkeypatch.setattr(idempotency, "BYTES_MAX", 25)
    answer = idempotency.Answer(200, {}, b"x" * 10)
    for number in range(5):
        await database.write(idempotency.begin, "c", f"{number}", "r", now_us=number)
        await database.write(idempotency.keep, "c", f"{number}", answer, begun_us=number)
    await database.write(idempotency.begin, "c", "5", "r", now_us=5)

    def left(connection: Connection) -> list[str]:
        return list(connection.scalars(select(idempotency_keys.c.key).order_by(idempotency_keys.c.key)))

    assert await database.read(left) == ["3", "4", "5"]


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_a_key_that_cannot_be_one_is_refused(api: Api, key: str) -> None:
    refused = await api.renew(key)
    assert (refused.status_code, refused.json()["type"]) == (400, "urn:licet:problem:idempotency-key")


async def test_a_key_that_is_written_otherwise_is_the_same_caller(api: Api) -> None:
    app, left = make_app(api.running.plane), []
    key = api.client.headers["authorization"].partition(" ")[2]
    for number, spelled in enumerate(("Bearer ", "bearer ", "BEARER ", "Bearer   ")):
        transport = httpx.ASGITransport(app, client=(f"192.0.2.{number}", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://licet") as client:
            headers = {"Authorization": f"{spelled}{key}"}
            answers = await asyncio.gather(*(client.get("/v1/licenses", headers=headers) for _ in range(30)))
            left.append(min(int(answer.headers["ratelimit"].split("r=")[1].split(";")[0]) for answer in answers))
    assert left[-1] == 0  # each address alone would have ten of its forty left


async def test_what_the_caller_has_already_is_not_sent_again(api: Api) -> None:
    await api.running.headed((await api.client.get("/v1/licenses/acme")).json()["revision"])  # published meanwhile
    for path in ("/v1/licenses/acme", "/v1/plans/pro", "/v1/bundles/current"):
        first = await api.client.get(path)
        assert first.status_code == 200, path
        same = await api.client.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", first.headers["etag"]), path
        assert (await api.client.get(path, headers={"If-None-Match": '"other"'})).json() == first.json(), path


async def test_whoever_asks_too_often_is_told_when_to_come_back(api: Api) -> None:
    answers = [await api.client.get("/v1/plans") for _ in range(60)]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["type"] == "urn:licet:problem:rate"
    assert int(refused.headers["retry-after"]) == 1
    assert refused.headers["ratelimit-policy"] == '"key";q=40;w=2'
    assert refused.headers["ratelimit"].startswith('"key";r=0;t=')
    assert (await api.client.get("/healthz")).status_code == 200
    # A made-up key shares the bucket of its address, whatever it is.
    made_up = [await api.client.get("/v1/plans", headers={"Authorization": f"Bearer x{n}"}) for n in range(60)]
    assert {answer.status_code for answer in made_up} == {401, 429}


async def test_what_is_not_there_and_what_cannot_be_done_with_it_are_problems(api: Api) -> None:
    for method, path, status, kind in (
        ("GET", "/v1/nothing", 404, "not-found"),
        ("GET", "/v1/plans/por", 404, "plan-unknown"),
        ("GET", "/v1/licenses/nobody", 404, "license-unknown"),
        ("DELETE", "/v1/licenses", 405, "method"),
        ("PATCH", "/v1/licenses/acme", 422, "invalid"),
    ):
        answer = await api.client.request(method, path)
        assert (answer.status_code, answer.json()["type"]) == (status, f"urn:licet:problem:{kind}"), path
        assert answer.headers["content-type"] == "application/problem+json"
    assert "GET" in (await api.client.delete("/v1/plans")).headers["allow"]


async def test_plans_and_entitlements_are_shown_as_customers_read_them(api: Api) -> None:
    plan = (await api.client.get("/v1/plans")).json()["items"][0]
    assert (plan["plan"], plan["features"][0]["limits"][0]["amount"]) == ("pro", 100)
    await api.running.headed(1)
    grant = {"limit": "reports:monthly", "amount": 5, "expires_after_s": 60}
    assert (await api.client.post("/v1/licenses/acme/grants", json=grant)).status_code == 201
    has = (await api.client.get("/v1/tenants/acme/entitlements")).json()
    assert (has["stage"], has["in_force"], has["quotas_known"]) == ("scheduled", False, True)
    limit = has["features"][0]["limits"][0]
    assert (limit["limit"], limit["used"], limit["granted"], limit["remaining"]) == ("reports:monthly", 0, 5, 105)
    assert (await api.client.get("/v1/tenants/nobody/entitlements")).status_code == 404


@pytest.fixture
async def on_each_database(tmp_path: Path, valkey_process: ValkeyProcess, database_url: str) -> AsyncIterator[Api]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=database_url) as running:
        transport = httpx.ASGITransport(make_app(running.plane), raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {running.admin_key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
            yield Api(running, client)


async def test_a_value_that_no_column_can_hold_is_no_failure_of_the_server(on_each_database: Api) -> None:
    client, beyond = on_each_database.client, 2**63
    for method, path, body in (
        ("GET", f"/v1/revisions/{beyond}/rollout", None),
        ("DELETE", f"/v1/usage/dead-letters/{beyond}", None),
        ("GET", "/v1/licenses/a%00b", None),
        ("GET", "/v1/usage/events?tenant=%00", None),
        ("PUT", "/v1/licenses/a%00b", {"plan": "pro"}),
        ("POST", "/v1/webhooks", {"url": "https://example.com/", "tenant": "a\0"}),
    ):
        answer = await client.request(method, path, json=body)
        assert answer.status_code in (201, 404, 422, 200), (path, answer.text)
