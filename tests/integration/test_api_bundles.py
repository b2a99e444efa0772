"""Bundles of before, over the REST API: those that were pushed without files, and those that are not valid any more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from licet_control_plane.api.app import make_app
from tests.support.control_plane import Deployment, catalog, deployment
from tests.support.valkey import ValkeyProcess


@pytest.fixture
async def running(tmp_path: Path, valkey_process: ValkeyProcess) -> AsyncIterator[Deployment]:
    async with deployment(tmp_path / "state", valkey_process.url) as running:
        yield running


@pytest.fixture
async def client(running: Deployment) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {running.admin_key}"}
    transport = httpx.ASGITransport(make_app(running.plane))
    async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
        yield client


async def push(client: httpx.AsyncClient, files: list[dict[str, str]]) -> dict[str, Any]:
    response = await client.post("/v1/bundles", json={"documents": files})
    assert response.status_code in (200, 201), response.text
    body: dict[str, Any] = response.json()
    return body


async def test_a_bundle_without_files_is_written_anew(running: Deployment, client: httpx.AsyncClient) -> None:
    revision = await running.push(100)
    found = (await client.get(f"/v1/bundles/{revision}/files")).json()
    assert found["as_pushed"] is False
    assert (await push(client, found["files"]))["unchanged"]
    await running.push(7)
    rolled = await client.post(f"/v1/bundles/{revision}/rollback", json={})
    assert rolled.status_code == 201
    assert [one["text"] for one in rolled.json()["differences"]] == [
        "plan pro: reports: limit monthly 7 -> 100",
    ]
    newest = (await client.get("/v1/bundles", params={"limit": 1})).json()["items"][0]
    assert (newest["revision"], newest["message"]) == (rolled.json()["revision"], f"rollback to revision {revision}")


async def test_what_is_not_valid_any_more_is_not_published_again(
    running: Deployment, client: httpx.AsyncClient
) -> None:
    # As an earlier version accepted it: this one does not know the field.
    text = "kind: Feature\nname: reports\ncolour: blue\n"
    pushed = await running.plane.changes.push(catalog(), [("old.yaml", text)], by="test")
    await running.push(7)
    refused = await client.post(f"/v1/bundles/{pushed.revision}/rollback", json={"message": "back"})
    assert refused.status_code == 422
    body = refused.json()
    assert f"Revision {pushed.revision}, as this version reads it, has 1 error" in body["detail"]
    assert (body["errors"][0]["file"], body["errors"][0]["line"]) == ("old.yaml", 3)
    assert (await client.get("/v1/bundles", params={"limit": 1})).json()["items"][0]["revision"] != pushed.revision


async def test_observe_mode_is_part_of_what_a_revision_was(running: Deployment, client: httpx.AsyncClient) -> None:
    observed = await running.plane.changes.push(catalog(), [], by="test", observe=True)
    enforced = await running.plane.changes.push(catalog(), [], by="test")
    found = (await client.post("/v1/bundles/diff", json={"after": observed.revision})).json()
    assert (found["before"], found["equal"]) == (enforced.revision, False)
    assert [one["text"] for one in found["differences"]] == ["bundle: mode enforce -> observe"]
    rolled = (await client.post(f"/v1/bundles/{observed.revision}/rollback", json={})).json()
    assert rolled["observe"] is True
    newest = (await client.get("/v1/bundles/current")).json()
    assert (newest["revision"], newest["observe"]) == (rolled["revision"], True)


async def test_pages_of_the_history_follow_each_other(running: Deployment, client: httpx.AsyncClient) -> None:
    revisions = [await running.push(amount) for amount in range(1, 6)]
    seen: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = (await client.get("/v1/bundles", params=query)).json()
        seen += page["items"]
        if page["next"] is None:
            break
        query["before"] = page["next"]
    assert [one["revision"] for one in seen] == revisions[::-1]
    assert [len(one["changed"]["modified"]) for one in seen] == [1, 1, 1, 1, 0]
    assert len(seen[-1]["changed"]["added"]) == 3


async def test_requests_that_cannot_be_answered_say_why(running: Deployment, client: httpx.AsyncClient) -> None:
    await running.push()
    licensed = await running.license("acme")
    for method, path, body, status in (
        ("GET", "/v1/bundles/99", None, 404),
        ("GET", f"/v1/bundles/{2**64}", None, 404),
        ("GET", "/v1/bundles/-1", None, 404),
        ("GET", f"/v1/bundles/{licensed}", None, 404),
        ("GET", f"/v1/bundles?before={2**63}", None, 422),
        ("POST", f"/v1/bundles/{licensed}/rollback", {}, 404),
        ("POST", "/v1/bundles/diff", {}, 422),
        ("POST", "/v1/bundles/diff", {"after": 1, "documents": []}, 422),
        ("POST", "/v1/bundles/diff", {"before": 99, "documents": []}, 404),
        ("POST", "/v1/bundles/diff", {"documents": [{"path": "a.yaml", "content": "kind: X"}]}, 422),
        ("GET", f"/v1/decisions?after={2**63}:1:acme", None, 422),
    ):
        response = await client.request(method, path, json=body)
        assert response.status_code == status, (path, response.text)
        assert response.json()["fix"]
