"""The server as a process: what it leaves in its state directory, how it starts, ends, and refuses to start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.state_dir import read_ledger_key
from licet_control_plane.store import access, ledger, meta
from licet_control_plane.store.database import Database
from licet_control_plane.store.subjects import SubjectKeys
from tests.support import plain_http
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess, free_port

SECRETS = ("admin-key", "signing-key.pem", "ledger-key")

DEADLINE_S = 20.0


class Server:
    """``licet server`` with its output in files."""

    def __init__(self, state_dir: Path, redis_url: str, port: int, *flags: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.state_dir = state_dir
        self.log = state_dir.parent / f"server-{port}-{time.monotonic_ns()}.log"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LICET_")}
        paths = [path for path in sys.path if path]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "licet_control_plane.cli.entry", "server"),
                    *("--listen", f"127.0.0.1:{port}", "--state-dir", str(state_dir), "--redis-url", redis_url, *flags),
                ],
                env=environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdout=log,
                stderr=log,
            )

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def answers(self, path: str) -> int:
        try:
            return plain_http.get(self.url + path).status_code
        except httpx.TransportError:
            return 0

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def make(redis_url: str, *flags: str, state_dir: str = "state", port: int = 0) -> Server:
        server = Server(tmp_path / state_dir, redis_url, port or free_port(), *flags)
        started.append(server)
        return server

    yield make
    for server in started:
        server.process.kill()
        server.process.wait()


def test_the_first_start_makes_keys_that_stay_and_sigterm_ends_it(
    start: Callable[..., Server], valkey_process: ValkeyProcess
) -> None:
    server = start(valkey_process.url)
    server.wait(lambda: server.answers("/readyz") == 200)
    state = server.state_dir
    modes = {name: (state / name).stat().st_mode & 0o777 for name in (*SECRETS, "public-key.txt")}
    assert modes == {**dict.fromkeys(SECRETS, 0o600), "public-key.txt": 0o644}
    assert (state / "licet.db").stat().st_mode & 0o077 == 0
    key = (state / "admin-key").read_text().strip()
    headers = {"Authorization": f"Bearer {key}"}
    first = plain_http.get(f"{server.url}/v1/status", headers=headers).json()
    public = (state / "public-key.txt").read_text()
    assert public.startswith("ed25519:")
    assert key not in server.log.read_text()
    assert server.end() == 0

    again = start(valkey_process.url)
    again.wait(lambda: again.answers("/readyz") == 200)
    second = plain_http.get(f"{again.url}/v1/status", headers=headers).json()
    assert second["deployment"] == first["deployment"]
    assert (state / "public-key.txt").read_text() == public
    assert again.end(signal.SIGINT) == 0


def test_a_taken_port_is_named(start: Callable[..., Server], valkey_process: ValkeyProcess) -> None:
    server = start(valkey_process.url)
    server.wait(lambda: server.answers("/healthz") == 200)
    port = int(server.url.rpartition(":")[2])
    other = start(valkey_process.url, state_dir="other", port=port)
    assert other.process.wait(DEADLINE_S) != 0
    assert f"Port {port}" in other.log.read_text()
    assert "--listen" in other.log.read_text()


def test_a_state_directory_has_one_server(start: Callable[..., Server], valkey_process: ValkeyProcess) -> None:
    server = start(valkey_process.url)
    server.wait(lambda: server.answers("/healthz") == 200)
    other = start(valkey_process.url)
    assert other.process.wait(DEADLINE_S) != 0
    assert "in use by another server" in other.log.read_text()
    assert str(server.process.pid) in other.log.read_text()


@pytest.mark.parametrize("name", ["signing-key.pem", "ledger-key"])
def test_a_missing_key_is_not_replaced(start: Callable[..., Server], valkey_process: ValkeyProcess, name: str) -> None:
    server = start(valkey_process.url)
    server.wait(lambda: server.answers("/healthz") == 200)
    server.end()
    (server.state_dir / name).unlink()
    again = start(valkey_process.url)
    assert again.process.wait(DEADLINE_S) != 0
    assert name in again.log.read_text()
    assert not (server.state_dir / name).exists()


def test_a_ledger_key_of_another_database_is_refused(
    start: Callable[..., Server], valkey_process: ValkeyProcess
) -> None:
    server = start(valkey_process.url)
    server.wait(lambda: server.answers("/healthz") == 200)
    server.end()
    database = Database(f"sqlite:///{server.state_dir / 'licet.db'}")
    keys = SubjectKeys(read_ledger_key(server.state_dir / "ledger-key"))
    database.write_now(ledger.record, 0, [DecodedBatch.of(batch(1, 1).pack())], keys=keys, now_us=1)
    database.close()
    (server.state_dir / "ledger-key").write_text("00" * 32)
    again = start(valkey_process.url)
    assert again.process.wait(DEADLINE_S) != 0
    assert "not the one of this database" in again.log.read_text()


def test_it_serves_without_redis_and_says_so(start: Callable[..., Server]) -> None:
    server = start(f"redis://127.0.0.1:{free_port()}/0")
    server.wait(lambda: server.answers("/healthz") == 200)
    server.wait(lambda: "publishing waits" in server.log.read_text())
    assert server.answers("/readyz") == 503
    assert server.end() == 0


def test_a_wrong_password_is_logged_without_the_password(start: Callable[..., Server], tmp_path: Path) -> None:
    valkey = ValkeyProcess(tmp_path / "locked", password="right")
    valkey.start()
    try:
        server = start(valkey.url.replace("right", "wrong-secret"))
        server.wait(lambda: "publishing waits" in server.log.read_text())
        line = next(line for line in server.log.read_text().splitlines() if "publishing waits" in line)
        entry = json.loads(line)
        assert entry["level"] == "error"
        assert "refuses the login" in entry["reason"]
        assert "LICET_REDIS_URL" in entry["fix"]
        assert "wrong-secret" not in server.log.read_text()
        assert server.end() == 0
    finally:
        valkey.kill()


def test_of_two_servers_on_one_postgresql_the_second_takes_over_when_the_first_is_frozen_or_killed(
    start: Callable[..., Server], valkey_process: ValkeyProcess, postgres_url: str, tmp_path: Path
) -> None:
    def publisher(server: Server) -> str:
        state: str = plain_http.get(f"{server.url}/readyz").json()["checks"]["publisher"]["state"]
        return state

    def end_lease() -> None:  # as fifteen seconds would
        with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
            connection.execute("UPDATE publisher_lease SET ends_at = 0")

    first = start(valkey_process.url, "--database-url", postgres_url, state_dir="one")
    first.wait(lambda: first.answers("/readyz") == 200)
    (tmp_path / "two").mkdir()
    for key in ("signing-key.pem", "ledger-key"):
        shutil.copy(tmp_path / "one" / key, tmp_path / "two")
    second = start(valkey_process.url, "--database-url", postgres_url, state_dir="two")
    second.wait(lambda: second.answers("/readyz") == 200 and publisher(second) == "standby")
    assert publisher(first) == "publishing"

    first.process.send_signal(signal.SIGSTOP)
    end_lease()
    second.wait(lambda: publisher(second) == "publishing")
    first.process.send_signal(signal.SIGCONT)
    first.wait(lambda: publisher(first) == "standby")

    second.end(signal.SIGKILL)
    end_lease()
    first.wait(lambda: publisher(first) == "publishing")
    assert first.end() == 0


def test_a_further_server_without_the_signing_key_does_not_start(
    start: Callable[..., Server], valkey_process: ValkeyProcess, postgres_url: str
) -> None:
    first = Database(postgres_url)
    first.write_now(meta.ensure, deployment="d" * 32, now_us=1)
    first.write_now(access.add_key, name="admin", role="admin", key="licet_x", now_us=1)
    first.close()
    server = start(valkey_process.url, "--database-url", postgres_url)
    assert server.process.wait(DEADLINE_S) != 0
    assert "signing-key.pem is missing" in server.log.read_text()
