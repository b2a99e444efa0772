"""Proof and privacy of the ledger, through the REST API and the commands: a real server, a real database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from licet.wire.names import usage_shard
from licet.wire.signing import SigningKey
from licet_control_plane.api.app import make_app
from licet_control_plane.server import listen, serve
from licet_control_plane.store.schema import audit
from tests.support.command_line import CommandLine, licet_command
from tests.support.control_plane import NAMES, Deployment, deployment, until
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

__all__ = ["licet_command"]  # a fixture


class Served:
    """A deployment that listens, with seven events in its ledger, and the commands to ask it."""

    def __init__(self, running: Deployment, url: str, command: CommandLine) -> None:
        self.running = running
        self.url = url
        self._command = command

    async def licet(self, *arguments: object) -> Any:
        """Run a command against it, as an operator does."""
        with_server = (*arguments, "--server", self.url, "--api-key", self.running.admin_key)
        return await asyncio.to_thread(self._command, *with_server)

    async def by_hand(self, *arguments: object) -> Any:
        """Run a command that asks no server."""
        return await asyncio.to_thread(self._command, *arguments)

    @property
    def database(self) -> str:
        return self.running.plane.config.database


@pytest.fixture
async def served(tmp_path: Path, valkey_process: ValkeyProcess, licet_command: CommandLine) -> AsyncIterator[Served]:
    async with deployment(tmp_path / "state", valkey_process.url) as running, listening(running) as url:
        for one in (batch(1, 5), batch(6, 7, subject_id="bob", on_behalf_of="ada")):
            await running.redis.xadd(NAMES.usage(usage_shard(one.sidecar)), {"b": one.pack()})

        async def there() -> bool:
            return running.plane.drain.events == 7

        await until(there)
        yield Served(running, url, licet_command)


@asynccontextmanager
async def listening(running: Deployment) -> AsyncIterator[str]:
    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    serving = asyncio.create_task(serve(make_app(running.plane), listener, stop))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        await serving


def damage(connection: Any) -> None:
    connection.exec_driver_sql("UPDATE ledger_events SET units_total = 9 WHERE seq = 4")


async def test_verify_says_that_all_is_well_and_what_is_not(served: Served) -> None:
    ended = await served.licet("ledger", "verify")
    assert ended.code == 0
    assert "7 events" in ended.out
    assert ": consistent" in ended.out
    await served.running.plane.database.write(damage)
    ended = await served.licet("ledger", "verify")
    assert ended.code == 1
    assert "event 4: altered: column units_total" in ended.out
    ended = await served.licet("ledger", "verify", "--json")
    assert (ended.code, ended.json["findings"][0]["seq"]) == (1, 4)


async def test_an_auditor_verifies_from_a_database_and_a_checkpoint_alone(served: Served, tmp_path: Path) -> None:
    kept = tmp_path / "checkpoint.json"
    ended = await served.licet("ledger", "checkpoint", "--output", kept)
    assert ended.code == 0
    key = served.running.key.public_key
    arguments = ("ledger", "verify", "--database", served.database, "--checkpoint", kept)
    ended = await served.by_hand(*arguments, "--public-key", key, "--json")
    assert (ended.code, ended.json["checkpoints"], ended.json["opened"]) == (0, 2, False)
    ledger_key = tmp_path / "ledger-key"
    ledger_key.write_text(served.running.ledger_key.secret.hex())
    ended = await served.by_hand(*arguments, "--public-key", key, "--ledger-key", ledger_key, "--json")
    assert (ended.code, ended.json["opened"]) == (0, True)
    ended = await served.by_hand(*arguments, "--public-key", SigningKey.generate().public_key)
    assert ended.code == 1
    assert "not among the trusted keys" in ended.err
    ended = await served.by_hand(*arguments)
    assert (ended.code, "--public-key" in ended.err) == (2, True)


async def test_a_server_holds_its_ledger_to_a_checkpoint(served: Served, tmp_path: Path) -> None:
    kept = tmp_path / "checkpoint.json"
    await served.licet("ledger", "checkpoint", "--output", kept)
    ended = await served.licet("ledger", "verify", "--checkpoint", kept, "--json")
    assert (ended.code, ended.json["checkpoints"]) == (0, 2)
    spoiled = json.loads(kept.read_text())
    spoiled["document"] = spoiled["document"][:-8] + "AAAAAAA="
    kept.write_text(json.dumps(spoiled))
    ended = await served.licet("ledger", "verify", "--checkpoint", kept)
    assert ended.code == 1
    assert "checkpoint" in ended.err
    kept.write_text("{}")
    ended = await served.licet("ledger", "verify", "--checkpoint", kept)
    assert (ended.code, "licet ledger checkpoint" in ended.err) == (2, True)


async def test_there_is_no_checkpoint_of_nothing(
    tmp_path: Path, valkey_process: ValkeyProcess, licet_command: CommandLine
) -> None:
    async with deployment(tmp_path / "state", valkey_process.url) as running, listening(running) as url:
        ended = await Served(running, url, licet_command).licet("ledger", "checkpoint")
        assert ended.code == 1
        assert "empty" in ended.err


async def test_checkpoints_are_made_by_themselves(served: Served) -> None:
    served.running.plane.checkpointer._every_s = 0.01
    await served.running.stop()
    await served.running.start()

    async def made() -> bool:
        return served.running.plane.checkpointer.number > 0

    await until(made)


async def test_a_subject_is_exported_and_erased(served: Served) -> None:
    ended = await served.licet("usage", "subject", "export", "acme", "user/ada")
    assert ended.code == 0
    lines = exported(ended.out)
    assert [one["seq"] for one in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert lines[0]["subject"] == {"type": "user", "id": "ada", "on_behalf_of": ""}
    assert (lines[0]["context"], lines[0]["reason"], lines[0]["units"]) == ({"region": "eu"}, "OK", {"reports": 1})
    ended = await served.licet("usage", "subject", "erase", "acme", "user/ada")
    assert (ended.code, "--yes" in ended.err) == (2, True)
    ended = await served.licet("usage", "subject", "erase", "acme", "user/ada", "--yes", "--json")
    assert (ended.code, ended.json["events"], len(ended.json["subjects"])) == (0, 7, 2)
    ended = await served.licet("usage", "subject", "export", "acme", "user/ada")
    assert (ended.code, exported(ended.out)) == (0, [])
    ended = await served.licet("ledger", "verify", "--json")
    assert (ended.code, ended.json["erased_events"], ended.json["rollups_match"]) == (0, 7, True)
    tally = await served.running.plane.database.read(lambda connection: connection.execute(audit.select()).all())
    (entry,) = [row for row in tally if row.action == "subject.erase"]
    assert (entry.by, entry.target) == ("admin", "acme")
    assert "ada" not in entry.before + entry.after


def exported(out: str) -> list[Any]:
    """Events on standard output, which the server of these tests logs to as well."""
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("subject", ["ada", "user/", ""])
async def test_a_subject_has_a_type_and_an_id(served: Served, subject: str) -> None:
    ended = await served.licet("usage", "subject", "export", "acme", subject)
    assert ended.code == 2
    assert "user/ada" in ended.err


async def test_only_one_verification_runs_at_a_time(served: Served) -> None:
    from licet_control_plane.api import proof

    headers = {"Authorization": f"Bearer {served.running.admin_key}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers) as client, proof._busy:
        answer = await client.post("/v1/ledger/verify", json={})
        assert answer.status_code == 409


async def test_a_database_that_is_none_is_said_so(licet_command: CommandLine, tmp_path: Path) -> None:
    for url, code in (("nonsense", 2), (f"sqlite:///{tmp_path / 'missing.db'}", 1)):
        ended = await asyncio.to_thread(licet_command, "ledger", "verify", "--database", url)
        assert (ended.code, "fix:" in ended.err) == (code, True)
