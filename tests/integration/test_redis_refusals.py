"""A real server that answers, and refuses: a replica, full, loading, in cluster mode, busy, without permissions.

What passes by itself is ``LinkDown`` (calls stay outstanding and are repeated), what needs somebody is ``LinkRefused``;
each message says what to do. When the server serves again the same calls go through, and nothing was lost.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from licet.domain.ids import LimitKey
from licet.wire.registers import Pair
from licet_control_plane.redis_link import RedisUnavailable
from licet_sidecar.adapters.redis_lease_store import RedisLeaseStore
from licet_sidecar.adapters.redis_link import connect
from licet_sidecar.adapters.redis_state_source import RedisStateSource
from licet_sidecar.adapters.redis_usage_sink import RedisUsageSink
from licet_sidecar.core.lease import Lease, Terms
from licet_sidecar.core.settling import Ask, SettleAnswer, SettleCall, Status
from licet_sidecar.ports import CallRefused, LinkDown, LinkRefused, Unconfirmed
from tests.support.control_plane import NAMES, deployment, until
from tests.support.lease_backends import TENANT, RealBackend, real_backend
from tests.support.valkey import ValkeyProcess, free_port

ME = "a" * 32
REVISION = 7
CALLS = LimitKey("calls:monthly")
WAIT_S_MAX = 90.0


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline, "the server never came into the state that is to be tested"
        time.sleep(0.01)


@contextmanager
def replica(server: ValkeyProcess) -> Iterator[None]:
    server.command("REPLICAOF", "127.0.0.1", str(free_port()))
    yield
    server.command("REPLICAOF", "NO", "ONE")


@contextmanager
def replica_without_data(server: ValkeyProcess) -> Iterator[None]:
    server.command("CONFIG", "SET", "replica-serve-stale-data", "no")
    with replica(server):
        yield


@contextmanager
def full(server: ValkeyProcess) -> Iterator[None]:
    server.command("CONFIG", "SET", "maxmemory", "100kb")
    yield
    server.command("CONFIG", "SET", "maxmemory", "0")


@contextmanager
def disk_broken(server: ValkeyProcess) -> Iterator[None]:
    (server.data_dir / "dump.rdb").mkdir()  # no file can be put in its place
    server.command("CONFIG", "SET", "save", "3600 1")
    server.command("SET", "something", "new")
    server.command("BGSAVE")
    wait_for(lambda: "rdb_last_bgsave_status:err" in server.command("INFO", "persistence"))
    yield
    (server.data_dir / "dump.rdb").rmdir()
    server.command("SAVE")


@contextmanager
def replicas_missing(server: ValkeyProcess) -> Iterator[None]:
    server.command("CONFIG", "SET", "min-replicas-to-write", "1")
    yield
    server.command("CONFIG", "SET", "min-replicas-to-write", "0")


@contextmanager
def busy(server: ValkeyProcess) -> Iterator[None]:
    server.command("CONFIG", "SET", "busy-reply-threshold", "1")

    def run() -> None:
        with suppress(RuntimeError, OSError):  # it is killed
            server.command("EVAL", "while true do end", "0")

    script = threading.Thread(target=run)
    script.start()
    wait_for(lambda: _refuses(server, "BUSY"))
    yield
    server.command("SCRIPT", "KILL")
    script.join()


@contextmanager
def forbidden(server: ValkeyProcess) -> Iterator[None]:
    server.command("ACL", "SETUSER", "default", "-evalsha", "-hset", "-xadd")
    yield
    server.command("ACL", "SETUSER", "default", "+@all")


@contextmanager
def loading(server: ValkeyProcess) -> Iterator[None]:
    server.command("DEBUG", "POPULATE", "2000", "key", "2000")
    server.command("BGREWRITEAOF")
    wait_for(lambda: "aof_rewrite_in_progress:0" in server.command("INFO", "persistence"))
    server.stop()
    server.options = (*server.options, "--key-load-delay", "3000", "--loading-process-events-interval-bytes", "2048")
    starting = threading.Thread(target=server.start, kwargs={"within_s": 6 * WAIT_S_MAX})
    starting.start()
    wait_for(lambda: _refuses(server, "LOADING"))
    yield
    server.command("CONFIG", "SET", "key-load-delay", "0")
    starting.join()


def _refuses(server: ValkeyProcess, code: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S_MAX) as connection:
            connection.sendall(b"GET x\r\n")
            return connection.recv(64).startswith(f"-{code}".encode())
    except OSError:
        return False


@dataclass(frozen=True)
class Fault:
    name: str
    make: Callable[[ValkeyProcess], Any]
    failure: type[Exception]
    says: str
    """Part of the message: the code, and what to do."""
    reads_too: bool = False


FAULTS = (
    Fault("a replica", replica, LinkDown, "READONLY.*address of the primary"),
    Fault(
        "a replica without data", replica_without_data, LinkDown, "(MASTERDOWN|READONLY).*address of the primary", True
    ),
    Fault("full", full, LinkDown, "OOM.*raise maxmemory"),
    Fault("its disk broken", disk_broken, LinkDown, "MISCONF.*disk"),
    Fault("replicas missing", replicas_missing, LinkDown, "NOREPLICAS.*min-replicas-to-write"),
    Fault("busy", busy, LinkDown, "BUSY.*SCRIPT KILL", True),
    Fault("loading", loading, LinkDown, "LOADING.*wait", True),
    Fault("not permitted", forbidden, LinkRefused, "NOPERM.*access rules"),
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyProcess]:
    process = ValkeyProcess(tmp_path / "valkey", options=("--enable-debug-command", "yes"))
    process.start()
    yield process
    process.kill()


class Sidecar:
    """The adapters of one sidecar."""

    def __init__(self, url: str, replicas: int = 0) -> None:
        self.redis = connect(url)
        self.store = RedisLeaseStore(self.redis, self.redis, NAMES, url, sidecar=ME, incarnation=1, replicas=replicas)
        self.sink = RedisUsageSink(self.redis, NAMES, url, sidecar=ME)
        self.source = RedisStateSource(self.redis, self.redis, NAMES, url)

    async def settle(self, *calls: SettleCall) -> list[SettleAnswer]:
        answers = await self.store.settle(calls, 1)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, SettleAnswer)]


@asynccontextmanager
async def sidecar_at(url: str, replicas: int = 0) -> AsyncIterator[Sidecar]:
    made = Sidecar(url, replicas)
    try:
        yield made
    finally:
        await made.redis.aclose()


@dataclass
class Ready:
    """A tenant with an open mark, and numbered calls about it."""

    backend: RealBackend
    lease: Lease
    pair: Pair

    async def reopened(self) -> None:
        """What the control plane does after a start or a promotion of the server."""
        try:
            state = await self.backend.touch()
        except RedisUnavailable:  # the connection was one to the server before
            state = await self.backend.touch()
        assert state is not None
        self.pair = state[0]
        if not state[1]:
            assert await self.backend.open(self.pair, REVISION, {CALLS: 100}, [])

    def call(self, op: int, *, durable: bool = False, cap: int = 0) -> SettleCall:
        asks = (Ask(self.lease, cap, 0, 0, 1, 1, self.lease.amount),)
        return SettleCall(TENANT, op, self.pair, REVISION, asks, 0, durable)


@asynccontextmanager
async def ready(server: ValkeyProcess) -> AsyncIterator[Ready]:
    async with real_backend(server) as backend:
        now_s = await backend.now_s()
        lease = Lease(CALLS, "", now_s - 86_400, now_s + 86_400, Terms(100))
        await backend.begin(1)
        state = await backend.touch()
        assert state is not None
        assert await backend.open(state[0], REVISION, {CALLS: 100}, [])
        yield Ready(backend, lease, state[0])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_every_call_of_a_sidecar_says_what_is_wrong_and_goes_through_afterwards(
    fault: Fault, server: ValkeyProcess
) -> None:
    async with ready(server) as state, sidecar_at(server.url) as sidecar:
        writes: list[Callable[[], Awaitable[Any]]] = [
            lambda: sidecar.settle(state.call(1)),
            lambda: sidecar.settle(state.call(1), state.call(2)),
            lambda: sidecar.settle(state.call(1, durable=True)),
            lambda: sidecar.sink.pulse((ME, b"alive"), [f"{ME}:1"], [b"batch"]),
            lambda: sidecar.store.ask(TENANT, "mark-missing"),
        ]
        reads: list[Callable[[], Awaitable[Any]]] = [
            sidecar.source.read_head,
            lambda: sidecar.source.read_license(TENANT),
            lambda: sidecar.source.read_licenses([TENANT]),
            lambda: sidecar.source.read_changes(0, 10),
        ]
        fault_ = fault.make(server)
        await asyncio.to_thread(fault_.__enter__)
        try:
            for call in [*writes, *(reads if fault.reads_too else [])]:
                with pytest.raises(fault.failure, match=f"(?s){fault.says}") as caught:
                    await call()
                assert not isinstance(caught.value, CallRefused | Unconfirmed)
                assert "Command #" not in str(caught.value), "what a client says of a pipeline holds data"
            for call in [] if fault.reads_too else reads:
                await call()
        finally:
            await asyncio.to_thread(fault_.__exit__, None, None, None)
        await state.reopened()
        (answer,) = await sidecar.settle(state.call(1))
        assert answer.granted[0].d >= 1
        (again,) = await sidecar.settle(state.call(1))
        assert again.granted == answer.granted, "nothing that was refused had an effect"
        for call in writes[3:] + reads:
            await call()


async def test_a_wrong_password_says_so(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey", password="right")
    server.start()
    try:
        for url in (server.url.replace("right", "wrong"), f"redis://127.0.0.1:{server.port}/0"):
            async with sidecar_at(url) as sidecar:
                with pytest.raises(LinkRefused, match=r"(WRONGPASS|NOAUTH).*LICET_REDIS_URL") as caught:
                    await sidecar.sink.pulse((ME, b"alive"), [f"{ME}:1"], [])
                assert ":wrong" not in str(caught.value)
    finally:
        server.kill()


@asynccontextmanager
async def cluster_node(tmp_path: Path, name: str) -> AsyncIterator[ValkeyProcess]:
    bus = str(free_port())
    node = ValkeyProcess(tmp_path / name, options=("--cluster-enabled", "yes", "--cluster-port", bus))
    await asyncio.to_thread(node.start)
    try:
        yield node
    finally:
        node.kill()


async def test_a_node_of_a_cluster_without_slots_is_down(tmp_path: Path) -> None:
    async with cluster_node(tmp_path, "one") as node, sidecar_at(node.url) as sidecar:
        lease = Lease(CALLS, "", 0, 2**31, Terms(100))
        with pytest.raises(LinkDown, match=r"CLUSTERDOWN.*CLUSTER INFO"):
            await sidecar.settle(SettleCall(TENANT, 1, Pair(1, "x"), REVISION, (Ask(lease, 0, 0, 0, 1, 1, 100),), 0))
        with pytest.raises(LinkDown, match=r"CLUSTERDOWN.*CLUSTER INFO"):
            await sidecar.sink.pulse((ME, b"alive"), [f"{ME}:1"], [])
        with pytest.raises(LinkDown, match=r"CLUSTERDOWN.*CLUSTER INFO"):
            await sidecar.source.read_license(TENANT)


async def test_a_cluster_of_several_nodes_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with cluster_node(tmp_path, "one") as one, cluster_node(tmp_path, "other") as other:
        other.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        one.command("CLUSTER", "MEET", "127.0.0.1", str(other.port), other.options[-1])
        await asyncio.to_thread(wait_for, lambda: "cluster_state:ok" in one.command("CLUSTER", "INFO"))
        async with sidecar_at(one.url) as sidecar:
            lease = Lease(CALLS, "", 0, 2**31, Terms(100))
            call = SettleCall(TENANT, 1, Pair(1, "x"), REVISION, (Ask(lease, 0, 0, 0, 1, 1, 100),), 0)
            for calls in ([call], [call, call]):
                with pytest.raises(LinkRefused, match=r"MOVED.*Redis Cluster.*not supported yet"):
                    await sidecar.settle(*calls)
            with pytest.raises(LinkRefused, match=r"MOVED.*Redis Cluster"):
                await sidecar.sink.pulse((ME, b"alive"), [f"{ME}:1"], [])


@pytest.mark.parametrize("durable", [False, True])
async def test_scripts_flushed_between_two_calls_of_a_pipeline_cost_nothing(
    server: ValkeyProcess, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ready(server) as state, sidecar_at(server.url) as sidecar:
        send, flushes = sidecar.store._replies, [1]

        async def flushing(commands: Any) -> list[Any]:
            if not flushes:
                return await send(commands)
            at = flushes.pop()
            replies = await send([*commands[:at], ("SCRIPT", "FLUSH"), *commands[at:]])
            return replies[:at] + replies[at + 1 :]

        await sidecar.settle(state.call(1))  # the script is known
        monkeypatch.setattr(sidecar.store, "_replies", flushing)
        answers = await sidecar.settle(*(state.call(op, durable=durable) for op in (2, 3, 4)))
        assert not flushes
        assert [answer.op for answer in answers] == [2, 3, 4]
        quota = await state.backend.quota(state.lease)
        assert quota is not None
        assert quota.sum == answers[-1].granted[0].g


async def test_a_key_of_another_type_costs_only_the_call_about_it(server: ValkeyProcess) -> None:
    async with ready(server) as state, sidecar_at(server.url) as sidecar:
        server.command("SET", NAMES.limits("other"), "what is this")
        good = state.call(1)
        bad = SettleCall("other", 2, state.pair, REVISION, good.asks, 0)
        first, second = await sidecar.store.settle([bad, good], 1)
        assert isinstance(first, CallRefused)
        assert "LICET_REDIS_PREFIX" in str(first)
        assert isinstance(second, SettleAnswer)
        assert isinstance((await sidecar.store.settle([bad], 1))[0], CallRefused)


# Durable limits


async def test_a_durable_call_without_an_append_only_file_is_refused_and_others_are_not(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey", appendonly=False)
    server.start()
    try:
        async with ready(server) as state, sidecar_at(server.url) as sidecar:
            durable, other = await sidecar.store.settle([state.call(1, durable=True), state.call(2)], 1)
            assert isinstance(durable, CallRefused)
            assert "set appendonly yes there, or LICET_DURABLE_REPLICAS here" in str(durable)
            assert isinstance(other, SettleAnswer)
    finally:
        server.kill()


async def test_a_durable_call_that_may_not_wait_is_refused_and_others_are_not(server: ValkeyProcess) -> None:
    server.command("ACL", "SETUSER", "default", "-waitaof")
    async with ready(server) as state, sidecar_at(server.url) as sidecar:
        durable, other = await sidecar.store.settle([state.call(1, durable=True), state.call(2)], 1)
        assert isinstance(durable, CallRefused)
        assert "access rules" in str(durable)
        assert isinstance(other, SettleAnswer)


@pytest.mark.parametrize("appendonly", [True, False])
async def test_a_durable_call_is_unconfirmed_until_the_replicas_are_there(tmp_path: Path, appendonly: bool) -> None:
    primary = ValkeyProcess(tmp_path / "primary", appendonly=appendonly, options=("--repl-diskless-sync-delay", "0"))
    second = ValkeyProcess(tmp_path / "replica", appendonly=appendonly)
    primary.start()
    second.start()
    try:
        async with ready(primary) as state, sidecar_at(primary.url, replicas=1) as sidecar:
            call = state.call(1, durable=True)
            for _ in range(2):
                durable, other = await sidecar.store.settle([call, state.call(2)], 1)
                assert isinstance(durable, Unconfirmed)
                assert "on replicas 0 of 1" in str(durable)
                assert isinstance(other, SettleAnswer)
            second.command("REPLICAOF", "127.0.0.1", str(primary.port))

            async def confirmed() -> SettleAnswer | None:
                (answer,) = await sidecar.store.settle([call], 1)
                # FENCED: it was run before the replica came, and the wait was over after that.
                known = isinstance(answer, SettleAnswer) and answer.status is not Status.FENCED
                return answer if known else None

            assert (await until(confirmed)).status is Status.STALE, "its first replica gives a server a new run"
            await state.reopened()
            call = state.call(3, durable=True)
            assert (await until(confirmed)).granted[0].d == 0, "the first call after it asserts"
            call = state.call(4, durable=True)
            answer = await until(confirmed)
            assert answer.granted[0].g >= 1
    finally:
        primary.kill()
        second.kill()


# The control plane


CONTROL_PLANE_SAYS = {
    "a replica": ("READONLY", "address of the primary"),
    "full": ("OOM", "maxmemory-policy must be noeviction"),
    "its disk broken": ("MISCONF", "free space there"),
    "replicas missing": ("NOREPLICAS", "bring them back"),
    "busy": ("BUSY", "SCRIPT KILL"),
    "not permitted": ("NOPERM", "secret.example.yaml"),
}


@pytest.mark.parametrize("fault", [one for one in FAULTS if one.name in CONTROL_PLANE_SAYS], ids=lambda one: one.name)
async def test_the_control_plane_waits_says_why_and_goes_on(
    fault: Fault, server: ValkeyProcess, tmp_path: Path
) -> None:
    code, fix = CONTROL_PLANE_SAYS[fault.name]
    async with deployment(tmp_path / "state", server.url) as plane:
        await plane.headed(await plane.push(100))
        status = plane.plane.publisher.status
        fault_ = fault.make(server)
        await asyncio.to_thread(fault_.__enter__)
        try:

            async def said() -> bool:
                return status.state == "waiting" and code in status.reason and fix in status.fix

            await until(said)
            revision = await plane.push(200)  # is kept, and published when it can be
        finally:
            await asyncio.to_thread(fault_.__exit__, None, None, None)
        await plane.headed(revision)

        async def goes_on() -> bool:  # it says so right after the head is out
            return (status.state, status.reason, status.fix) == ("publishing", "", "")

        await until(goes_on)


async def test_scripts_flushed_all_the_time_do_not_stop_the_control_plane(
    server: ValkeyProcess, tmp_path: Path
) -> None:
    async with deployment(tmp_path / "state", server.url) as plane:
        await plane.headed(await plane.push(100))
        await plane.headed(await plane.license("acme"))

        async def flush() -> None:
            while True:
                server.command("SCRIPT", "FLUSH")
                await asyncio.sleep(0.001)

        flushing = asyncio.create_task(flush())
        try:
            await plane.headed(await plane.push(300))
        finally:
            flushing.cancel()
        mark = await plane.opened("acme")
        assert list(mark.amounts.values()) == [300]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ((("maxmemory", "100mb"), ("maxmemory-policy", "allkeys-lru")), "Set maxmemory-policy noeviction"),
        ((("maxmemory", "100mb"), ("maxmemory-policy", "volatile-ttl")), "Set maxmemory-policy noeviction"),
        ((("appendonly", "no"),), "Set appendonly yes"),
        ((("maxmemory-policy", "allkeys-lru"),), ""),
    ],
)
async def test_a_server_that_loses_what_it_is_told_is_named(
    server: ValkeyProcess, tmp_path: Path, settings: tuple[tuple[str, str], ...], says: str
) -> None:
    for name, value in settings:
        server.command("CONFIG", "SET", name, value)
    async with deployment(tmp_path / "state", server.url) as plane:
        await plane.headed(await plane.push(100))
        status = plane.plane.publisher.status

        async def publishing() -> bool:  # markers make the loss of a quota known, so this is no reason to stop
            return status.state == "publishing"

        await until(publishing)
        assert (says in status.keeping.warning) if says else not status.keeping.warning
        metrics = plane.plane.metrics.render().decode()
        assert f"licet_redis_evicts {float('noeviction' in says)}" in metrics
        assert f"licet_redis_append_only {float('appendonly' not in says)}" in metrics
