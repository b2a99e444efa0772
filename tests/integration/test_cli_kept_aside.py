"""``licet usage dead-letters`` and ``licet usage conflicts``: the real API, and a server that stands for it."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from licet.wire.names import usage_shard
from licet.wire.usage import log_id
from licet_control_plane.api.app import make_app
from licet_control_plane.store.schema import audit
from tests.support.command_line import CommandLine, licet_command
from tests.support.control_plane import NAMES, Deployment, deployment, until
from tests.support.stub_control_plane import StubControlPlane
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

__all__ = ["licet_command"]

SIDECAR = "a" * 32
STREAM = NAMES.usage(usage_shard(SIDECAR))
LETTERS = "/v1/usage/dead-letters"


@pytest.fixture
async def running(tmp_path: Path, valkey_process: ValkeyProcess) -> AsyncIterator[Deployment]:
    async with deployment(tmp_path / "state", valkey_process.url) as made:
        yield made


@pytest.fixture
async def client(running: Deployment) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(running.plane))
    headers = {"Authorization": f"Bearer {running.admin_key}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as made:
        yield made


async def test_dead_letters_are_listed_shown_retried_and_dropped(
    running: Deployment, client: httpx.AsyncClient
) -> None:
    await running.redis.xadd(STREAM, {"b": b"not a batch"})
    misfit = batch(1, 30, sidecar="e" * 32, units=["reports"])
    await running.redis.xadd(STREAM, {"b": misfit.pack()})
    await until(lambda: letters_waiting(running, 2))

    page = (await client.get(LETTERS, params={"limit": 1})).json()
    assert (len(page["items"]), page["next"]) == (1, 1)
    (second,) = (await client.get(LETTERS, params={"after": page["next"]})).json()["items"]
    assert (second["log_id"], second["first_seq"], second["last_seq"]) == (misfit.log_id, 1, 30)

    shown = (await client.get(f"{LETTERS}/2", params={"raw": True})).json()
    assert (shown["events_total"], len(shown["events"]), shown["events"][0]["units"]) == (30, 20, ["reports"])
    assert base64.b64decode(shown["raw"]) == misfit.pack()
    unreadable = (await client.get(f"{LETTERS}/1")).json()
    assert (unreadable["events"], "raw" in unreadable) == ([], False)

    refused = await client.post(f"{LETTERS}/2/retry")
    assert (refused.status_code, "still cannot be recorded" in refused.json()["detail"]) == (409, True)
    assert (await client.delete(f"{LETTERS}/1")).json() == {"number": 1, "outcome": "dropped"}
    assert (await client.post(f"{LETTERS}/1/retry")).status_code == 409
    assert (await client.delete(f"{LETTERS}/3")).status_code == 404
    assert [item["number"] for item in (await client.get(LETTERS)).json()["items"]] == [2]
    settled = (await client.get(LETTERS, params={"settled": True})).json()["items"]
    assert [(item["number"], item["outcome"], item["settled_by"]) for item in settled] == [
        (1, "dropped", "admin"),
        (2, None, None),
    ]
    rows = await running.plane.database.read(
        lambda connection: connection.execute(audit.select().where(audit.c.action == "dead_letter.dropped")).all()
    )
    assert [(row.by, row.target) for row in rows] == [("admin", "1")]
    status = (await client.get("/v1/status")).json()
    assert status["ledger"] == {"dead_letters": 1, "conflicts": 0}
    metrics = (await client.get("/metrics")).text
    assert "licet_dead_letters 1.0" in metrics


async def test_a_conflict_is_shown_beside_what_is_recorded(running: Deployment, client: httpx.AsyncClient) -> None:
    log = log_id(SIDECAR, 1)
    await running.redis.xadd(STREAM, {"b": batch(1, 3).pack()})
    await running.redis.xadd(STREAM, {"b": batch(2, 4, subject_id="mallory", units={"reports": 9}).pack()})
    await until(lambda: conflicts_kept(running, 2))
    page = (await client.get("/v1/usage/conflicts", params={"limit": 1})).json()
    (first,) = page["items"]
    assert (first["log_id"], first["seq"], first["units"], first["effect"]) == (log, 2, {"reports": 9}, "APPROVED")
    rest = (await client.get("/v1/usage/conflicts", params={"after": page["next"]})).json()
    assert ([item["seq"] for item in rest["items"]], rest["next"]) == ([3], None)
    shown = (await client.get(f"/v1/usage/conflicts/{log}/2")).json()
    assert shown["recorded"]["subject_id"] == "ada"
    assert sorted(shown["items"][0]["differs"]) == ["subject_id", "units"]
    assert (await client.get(f"/v1/usage/conflicts/{log}/1")).status_code == 404
    assert (await client.get("/v1/usage/conflicts", params={"after": "x"})).status_code == 422


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, licet_command: CommandLine) -> Iterator[StubControlPlane]:
    stub = StubControlPlane().start()
    monkeypatch.setenv("LICET_SERVER", stub.url)
    monkeypatch.setenv("LICET_API_KEY", "secret")
    yield stub
    stub.stop()


def letter(number: int, **changes: Any) -> dict[str, Any]:
    shown = {
        "number": number, "reason": "usage: damaged batch", "log_id": "s:1", "first_seq": 5, "last_seq": 9, "shard": 0,
        "entry": "1-0", "bytes": 1_234, "digest": "ab", "times": 2, "first_at": "then", "last_at": "now",
        "outcome": None, "settled_at": None, "settled_by": None,
    }  # fmt: skip
    return {**shown, **changes}


def test_lists_every_page_of_dead_letters(licet_command: CommandLine, server: StubControlPlane) -> None:
    pages = iter([{"items": [letter(1)], "next": 1}, {"items": [letter(2, log_id=None)], "next": None}])
    server.answers["GET /v1/usage/dead-letters"] = lambda _request: (200, next(pages))
    ended = licet_command("usage", "dead-letters", "list", "--settled")
    assert ended.code == 0
    assert "5 to 9" in ended.out
    assert "1,234" in ended.out
    assert [one.query for one in server.requests] == [
        {"limit": "500", "settled": "true"},
        {"limit": "500", "settled": "true", "after": "1"},
    ]


def test_shows_a_dead_letter_as_far_as_it_can_be_read(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["GET /v1/usage/dead-letters/7"] = letter(7, events=[{"seq": 5}], events_total=5)
    ended = licet_command("usage", "dead-letters", "show", 7)
    assert ended.code == 0
    assert '{"seq": 5}' in ended.out
    assert "and 4 more" in ended.out
    assert licet_command("usage", "dead-letters", "show", 7, "--json", "--raw").json["number"] == 7
    assert server.requests[-1].query == {"raw": "true"}


def test_retries_all_and_says_which_ones_failed(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["GET /v1/usage/dead-letters"] = {"items": [letter(1), letter(2)], "next": None}
    done = {"number": 1, "outcome": "recorded", "inserted": 5, "duplicates": 0, "conflicts": 0, "acknowledged": True}
    server.answers["POST /v1/usage/dead-letters/1/retry"] = done
    server.answers["POST /v1/usage/dead-letters/2/retry"] = lambda _request: (409, {"detail": "still bad", "fix": "x"})
    ended = licet_command("usage", "dead-letters", "retry", "--all", "--json")
    assert ended.code == 1
    assert [item["outcome"] for item in ended.json["items"]] == ["recorded", "failed"]
    assert licet_command("usage", "dead-letters", "retry", 2).code == 1
    assert licet_command("usage", "dead-letters", "retry", 1).code == 0
    assert licet_command("usage", "dead-letters", "retry").code == 2


def test_drops_a_dead_letter(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["DELETE /v1/usage/dead-letters/7"] = {"number": 7, "outcome": "dropped"}
    assert licet_command("usage", "dead-letters", "drop", 7, "--yes").code == 0
    assert [one.method for one in server.requests] == ["DELETE"]


def test_shows_where_a_conflict_differs(licet_command: CommandLine, server: StubControlPlane) -> None:
    event = {"subject_id": "ada", "at": "now", "units": {"reports": 1}}
    item = {"came_at": "later", "differs": ["subject_id", "at_us"], "event": {"subject_id": "mallory", "at": "then"}}
    server.answers["GET /v1/usage/conflicts/s%3A1/2"] = {"recorded": event, "items": [item]}
    ended = licet_command("usage", "conflicts", "show", "s:1", 2)
    assert ended.code == 0, ended.err
    for text in ("subject_id", "ada", "mallory", "then", "later"):
        assert text in ended.out
    server.answers["GET /v1/usage/conflicts"] = {"items": [], "next": None}
    assert "none" in licet_command("usage", "conflicts", "list").out


async def letters_waiting(running: Deployment, count: int) -> bool:
    return running.plane.drain.dead_letters.letters == count


async def conflicts_kept(running: Deployment, count: int) -> bool:
    await running.plane.workers[0].count_kept()
    return running.plane.drain.conflicts_kept == count
