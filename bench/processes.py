"""Real processes: a sidecar over gRPC beside a bare echo, its memory, its start, and 2,000 checks/s open loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import grpc

from bench.measure import cpu_s_of, percentile, resident_mb_of
from bench.service import BATCH, plain
from licet.v1 import approval_pb2 as pb
from tests.support.fleet import Fleet, wait_until
from tests.support.valkey import free_port

CHECK = "/licet.v1.ApprovalService/Check"
CHECK_BATCH = "/licet.v1.ApprovalService/CheckBatch"
TENANTS = 1_000
RULES = 100
CLIENTS = 16
QUOTAS = (10, 100, TENANTS)
QUOTAS_PER_S = 250
QUOTAS_WARM_S = 4
QUOTAS_S = 10

_numbers = count()
"""Makes idempotency keys of requests that are sent one by one."""

CATALOG = """\
kind: Feature
name: llm.tokens
---
kind: Action
name: llm.complete
feature: llm.tokens
attributes: {model: {type: string, default: ""}, region: {type: string, default: ""}}
---
kind: Plan
name: pro
features:
  llm.tokens:
    price: {amount: "8.00", per_units: 1_000_000, currency: USD}
    limits:
      - {amount: 9_000_000_000_000, per: month}
"""


@dataclass(frozen=True, slots=True)
class Transported:
    """Server CPU a call, calls a second, milliseconds, and calls that failed."""

    cpu_us: float
    calls_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """A sidecar at rest and full: MB resident, CPU seconds and seconds until ready, share of a core while idle."""

    idle_mb: float
    loaded_mb: float
    ready_s: float
    ready_cpu_s: float
    idle_share: float


@dataclass(frozen=True, slots=True)
class Results:
    """All of it."""

    echo: Transported
    check: Transported
    batch: Transported
    open_loop: Transported
    open_loop_echo: Transported
    footprint: Footprint
    round_trips_per_s: dict[int, float]
    """By how many quotas are spent from."""


def run() -> Results:
    """Measures with one sidecar, a real control plane and a real Valkey."""
    with tempfile.TemporaryDirectory() as directory, echo_server() as (echo_address, echo_pid):
        fleet = Fleet(Path(directory), count=1)
        try:
            fleet.start()
            fleet.push(CATALOG)
            fleet.licet("license", "create", "acme", "--plan", "pro")
            footprint = _footprint(fleet)
            round_trips = {quotas: _round_trips_per_s(fleet, quotas) for quotas in QUOTAS}
            pid = _pid(fleet)
            singles = [plain(number).SerializeToString() for number in range(60_000)]
            batches = [
                pb.CheckBatchRequest(
                    checks=[plain(10**7 + number * BATCH + place) for place in range(BATCH)]
                ).SerializeToString()
                for number in range(1_000)
            ]
            address = fleet.addresses[0]
            # One event loop for all of it: grpc.aio does not take kindly to several in one process.
            measured = asyncio.run(_measure(address, pid, echo_address, echo_pid, singles, batches))
        finally:
            fleet.stop()
    return Results(*measured, footprint, round_trips)


async def _measure(
    address: str, pid: int, echo_address: str, echo_pid: int, singles: list[bytes], batches: list[bytes]
) -> tuple[Transported, Transported, Transported, Transported, Transported]:
    await closed_loop(address, CHECK, singles[-500:], pid)  # warm: license, lease, code
    echo, check = [], []
    for turn in range(3):  # round and round, so that what the machine does meanwhile falls on both
        part = singles[turn * 8_000 : (turn + 1) * 8_000]
        echo.append(await closed_loop(echo_address, CHECK, part, echo_pid))
        check.append(await closed_loop(address, CHECK, part, pid))
    batch = await closed_loop(address, CHECK_BATCH, batches, pid)
    open_echo = await _open_loop(echo_address, singles[30_000:40_000], echo_pid, per_s=2_000)
    open_check = await _open_loop(address, singles[30_000:40_000], pid, per_s=2_000)
    return _quietest(echo), _quietest(check), batch, open_check, open_echo


def _quietest(found: list[Transported]) -> Transported:
    return min(found, key=lambda one: one.cpu_us)


def _footprint(fleet: Fleet) -> Footprint:
    """Restarts the sidecar on an empty directory, watches it get ready, rest, and fill."""
    sidecar = fleet.sidecars[0]
    sidecar.stop()
    started = time.monotonic()
    sidecar.start()
    wait_until("ready", lambda: fleet.page(fleet.pages[0], "/readyz"))
    ready_s, ready_cpu_s = time.monotonic() - started, cpu_s_of(_pid(fleet))
    time.sleep(1)
    before_s = cpu_s_of(_pid(fleet))
    time.sleep(10)
    idle_share = (cpu_s_of(_pid(fleet)) - before_s) / 10
    idle_mb = resident_mb_of(_pid(fleet))
    rules = "".join(
        f"""\
---
kind: Policy
name: guard-{number}
actions: [llm.*]
rules:
  - {{name: region, effect: deny, when: 'context.region == "r{number}" && quantity > {number}'}}
"""
        for number in range(RULES)
    )
    fleet.push(CATALOG + rules)
    _licenses(fleet)
    with grpc.insecure_channel(fleet.addresses[0]) as channel:
        check = channel.unary_unary(CHECK)
        for number in range(TENANTS):
            request = plain(number)
            request.tenant = f"tenant-{number}"
            check(request.SerializeToString(), timeout=10)
    loaded_mb = resident_mb_of(_pid(fleet))
    fleet.push(CATALOG)
    return Footprint(idle_mb, loaded_mb, ready_s, ready_cpu_s, idle_share)


def _round_trips_per_s(fleet: Fleet, quotas: int) -> float:
    """Redis round trips a second of a sidecar that is asked about so many tenants, one quota each, in turn."""
    with grpc.insecure_channel(fleet.addresses[0]) as channel:
        check = channel.unary_unary(CHECK)

        def ask(seconds: float) -> None:
            started = time.monotonic()
            for number in range(round(seconds * QUOTAS_PER_S)):
                if (early_s := started + number / QUOTAS_PER_S - time.monotonic()) > 0:
                    time.sleep(early_s)
                request = plain(2 * 10**8 + next(_numbers))
                request.tenant = f"tenant-{number % quotas}"
                check(request.SerializeToString(), timeout=10)

        ask(max(QUOTAS_WARM_S, quotas / QUOTAS_PER_S))
        before, started = fleet.metric(0, "licet_redis_round_trips_total"), time.monotonic()
        ask(QUOTAS_S)
        return (fleet.metric(0, "licet_redis_round_trips_total") - before) / (time.monotonic() - started)


def _licenses(fleet: Fleet) -> None:
    import httpx

    key = (fleet.directory / "server" / "admin-key").read_text().strip()
    with httpx.Client(base_url=fleet.server_url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
        for number in range(TENANTS):
            client.post("/v1/licenses", json={"tenant": f"tenant-{number}", "plan": "pro"}).raise_for_status()


def _pid(fleet: Fleet) -> int:
    return fleet.sidecars[0].pid


async def closed_loop(address: str, method: str, requests: list[bytes], pid: int) -> Transported:
    """``CLIENTS`` callers, each with its next call as soon as the last was answered."""
    latencies_ms: list[float] = []
    pending = iter(requests)
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(method)

        async def caller() -> None:
            for request in pending:
                sent = time.perf_counter()
                await call(request, timeout=30)
                latencies_ms.append(1_000 * (time.perf_counter() - sent))

        cpu_s, started = cpu_s_of(pid), time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CLIENTS)))
        took_s = time.perf_counter() - started
        return _transported(latencies_ms, cpu_s_of(pid) - cpu_s, took_s)


async def _open_loop(address: str, requests: list[bytes], pid: int, *, per_s: int) -> Transported:
    """Calls at fixed times, whether or not earlier ones were answered; latency counts from when a call was due."""
    latencies_ms: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(CHECK)
        cpu_s, started, failed = cpu_s_of(pid), time.perf_counter(), 0

        async def one(request: bytes, due: float) -> None:
            nonlocal failed
            try:
                await call(request, timeout=30)
            except grpc.aio.AioRpcError:  # grpcio cancels calls when more than a thousand are under way
                failed += 1
            latencies_ms.append(1_000 * (time.perf_counter() - due))

        tasks: list[asyncio.Task[Any]] = []
        for number, request in enumerate(requests):
            due = started + number / per_s
            if (early_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(early_s)
            tasks.append(asyncio.create_task(one(request, due)))
        await asyncio.gather(*tasks)
        took_s = time.perf_counter() - started
        return _transported(latencies_ms, cpu_s_of(pid) - cpu_s, took_s, failed)


def _transported(latencies_ms: list[float], cpu_s: float, took_s: float, failed: int = 0) -> Transported:
    latencies_ms.sort()
    count = len(latencies_ms)
    return Transported(
        1e6 * cpu_s / count, count / took_s, percentile(latencies_ms, 0.50), percentile(latencies_ms, 0.99), failed
    )


@contextmanager
def echo_server() -> Iterator[tuple[str, int]]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "bench.peer", str(port)])
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=20)
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()
