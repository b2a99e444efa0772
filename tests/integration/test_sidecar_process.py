"""The ``licet-sidecar`` process: how it starts, serves, refuses, breaks and stops, on a real Redis."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from licet.domain.catalog import Action, Attribute, AttributeType, Entitlement, Plan
from licet.v1 import approval_pb2 as pb
from licet.v1 import approval_pb2_grpc as rpc
from licet.wire.documents import Heartbeat
from tests.support.fleet import Program, wait_until
from tests.support.published import KEY, OTHER_KEY, catalog, limit
from tests.support.redis_publisher import RedisPublisher
from tests.support.sidecar import ask
from tests.support.valkey import ValkeyProcess, free_port

COMMAND = [sys.executable, "-m", "licet_sidecar"]
AMOUNT = 100
CATALOG = catalog(
    Action("report.export", {"": "reports"}, {"note": Attribute(AttributeType.STRING, "")}),
    Action("free", {"": "free"}),
    Plan("pro", {"reports": Entitlement(limits=(limit(AMOUNT),)), "free": Entitlement()}),
    Plan("large", {"reports": Entitlement(limits=(limit(1_000_000),))}),
)


class Sidecar:
    """One process, and ways to talk to it."""

    def __init__(
        self, directory: Path, redis_url: str, *flags: str, key: str = KEY.public_key, name: str = "s"
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.pages = f"127.0.0.1:{free_port()}"
        self.state_dir = directory / name
        self.program = Program(
            name,
            [
                *COMMAND,
                *("--listen", self.address, "--http-listen", self.pages),
                *("--state-dir", str(self.state_dir), "--redis-url", redis_url, "--public-key", key),
                *("--drain-grace", "1s"),
                *flags,
            ],
            directory,
        )

    def start(self, *, ready: bool = True) -> Sidecar:
        self.program.start()
        if ready:
            wait_until("ready", lambda: self.page("/readyz")[0] == 200 or not self.program.running)
            assert self.program.running, self.program.log()
        else:
            wait_until("serving", lambda: self.page("/healthz")[0] == 200 or not self.program.running)
        return self

    def page(self, path: str) -> tuple[int, str]:
        """Status and text; 0 when nobody answers."""
        host, _, port = self.pages.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    @contextlib.contextmanager
    def stub(self, address: str = "", **options: Any) -> Iterator[rpc.ApprovalServiceStub]:
        with grpc.insecure_channel(address or self.address, **options) as channel:
            yield rpc.ApprovalServiceStub(channel)

    def check(self, request: pb.CheckRequest | None = None, **fields: Any) -> pb.CheckResponse:
        with self.stub() as stub:
            return stub.Check(request or ask(**fields), timeout=5, wait_for_ready=True)

    def approved(self, checks: int) -> int:
        """How many of so many checks of one unit are approved."""
        with self.stub() as stub:
            response = stub.CheckBatch(
                pb.CheckBatchRequest(checks=[ask() for _ in range(checks)]), timeout=20, wait_for_ready=True
            )
        return sum(decision.effect == pb.EFFECT_APPROVED for decision in response.decisions)

    def log_lines(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.program.log().splitlines() if line.startswith("{")]
        return [line for line in lines if event in line["event"]]

    def stop(self) -> int:
        return self.program.stop()


@pytest.fixture
def publisher(valkey_process: ValkeyProcess) -> Iterator[RedisPublisher]:
    made = RedisPublisher(valkey_process.url)
    made.push(CATALOG)
    made.license("large", "large")
    made.license("acme")
    yield made
    made.close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[list[Sidecar]]:
    """Sidecars of a test; those still running at its end are killed."""
    sidecars: list[Sidecar] = []
    yield sidecars
    for sidecar in sidecars:
        sidecar.program.kill()


@pytest.fixture
def sidecar(tmp_path: Path, publisher: RedisPublisher, valkey_process: ValkeyProcess, made: list[Sidecar]) -> Sidecar:
    made.append(Sidecar(tmp_path, valkey_process.url))
    return made[0].start()


def refused(directory: Path, *flags: str) -> str:
    """What a process that cannot start says; it must end by itself, soon, with status 2."""
    arguments = ["--public-key", KEY.public_key, "--state-dir", str(directory / "refused"), *flags]
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    assert "Traceback" not in ended.stderr
    return ended.stderr


# Serving


def test_serves_what_is_published(sidecar: Sidecar, publisher: RedisPublisher) -> None:
    response = sidecar.check(quantity=3)
    assert (response.effect, response.reason, response.revision) == (pb.EFFECT_APPROVED, pb.REASON_OK, 3)
    assert [(quota.window, quota.limit, quota.remaining) for quota in response.quotas] == [("month", AMOUNT, 97)]
    assert sidecar.check(ask("nobody")).reason == pb.REASON_NO_LICENSE
    revision = publisher.license("acme", "free")
    wait_until("the change is live", lambda: sidecar.check().revision == revision)
    assert sidecar.check().reason == pb.REASON_NOT_ENTITLED


def test_serves_batches_and_streams(sidecar: Sidecar) -> None:
    with sidecar.stub() as stub:
        batch = stub.CheckBatch(pb.CheckBatchRequest(checks=[ask(), ask(action="free")]), timeout=5)
        assert [decision.reason for decision in batch.decisions] == [pb.REASON_OK, pb.REASON_OK]
        answers = stub.CheckStream(iter([ask(quantity=n) for n in (1, 200, 2)]), timeout=5)
        assert [answer.reason for answer in answers] == [pb.REASON_OK, pb.REASON_QUOTA_EXHAUSTED, pb.REASON_OK]


def test_many_cold_tenants_at_once_are_all_served(sidecar: Sidecar, publisher: RedisPublisher) -> None:
    tenants = [f"t{number}" for number in range(60)]
    for tenant in tenants:
        publisher.license(tenant)
    wait_until("synced", lambda: f"revision {publisher.revision}" in sidecar.page("/readyz")[1])
    with sidecar.stub() as stub:
        calls = [stub.Check.future(ask(tenant), timeout=5) for tenant in tenants]
        assert {pb.Reason.Name(call.result().reason) for call in calls} == {"REASON_OK"}


def test_health_and_reflection_are_served(sidecar: Sidecar) -> None:
    with grpc.insecure_channel(sidecar.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "licet.v1.ApprovalService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
        )
        names = {service.name for service in next(reflected).list_services_response.service}
    assert "licet.v1.ApprovalService" in names


def test_pages_tell_health_readiness_and_metrics(sidecar: Sidecar) -> None:
    sidecar.check()
    assert sidecar.page("/healthz") == (200, "ok\n")
    assert sidecar.page("/readyz") == (200, "ready: revision 3\n")
    status, text = sidecar.page("/metrics")
    assert status == 200
    assert 'licet_checks_total{effect="APPROVED",reason="OK"} 1.0' in text
    assert sidecar.page("/nothing")[0] == 404


def test_a_unix_socket_is_served_beside_a_port(
    tmp_path: Path, publisher: RedisPublisher, valkey_process: ValkeyProcess, made: list[Sidecar]
) -> None:
    path = tmp_path / "licet.sock"
    one = Sidecar(tmp_path, valkey_process.url)
    one.program.command += ["--listen", f"{one.address},unix:{path}"]
    made.append(one)
    one.start()
    with one.stub(f"unix:{path}") as stub:
        assert stub.Check(ask(), timeout=5).effect == pb.EFFECT_APPROVED
    one.program.kill()
    assert path.is_socket()  # left by the kill; the next start takes it over
    one.start()
    with one.stub(f"unix:{path}") as stub:
        assert stub.Check(ask(), timeout=5).effect == pb.EFFECT_APPROVED
    assert f"cannot listen on unix:{path}" in refused(
        tmp_path, "--listen", f"unix:{path}", "--http-listen", f"127.0.0.1:{free_port()}"
    )
    with one.stub(f"unix:{path}") as stub:
        assert stub.Check(ask(), timeout=5).effect == pb.EFFECT_APPROVED


def test_usage_reaches_redis_and_is_acknowledged(sidecar: Sidecar, publisher: RedisPublisher) -> None:
    answers = [sidecar.check(quantity=n) for n in (1, 2, 3)]
    wait_until("shipped", lambda: len(publisher.events()) == 3)
    prefix = answers[0].decision_id[:16]
    assert [f"{prefix}{event.seq:016x}" for event in publisher.events()] == [one.decision_id for one in answers]
    (name,) = publisher.sidecars()
    publisher.acknowledge(name, 1, 3)

    def acked() -> bool:
        heartbeat = Heartbeat.unpack(publisher.redis.hget(publisher.names.sidecars(), name))
        return (heartbeat.log_last_seq, heartbeat.log_acked_seq) == (3, 3)

    wait_until("acknowledged", acked)


# Bad input


def test_a_context_of_5_mb_is_refused_by_name_and_with_the_limit(sidecar: Sidecar) -> None:
    with sidecar.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Check(ask(context={"note": "x" * 5_000_000}), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("context.note: ")
    assert "16,384" in caught.value.details()
    assert sidecar.check().effect == pb.EFFECT_APPROVED


def test_a_message_above_the_limit_is_refused(sidecar: Sidecar) -> None:
    with sidecar.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Check(ask(context={"note": "x" * 9_000_000}), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert sidecar.check().effect == pb.EFFECT_APPROVED


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(context={"note": "x" * 500_000}), "context.note"),
        (ask(quantities={"m" * 500_000: 1}), "quantities['mmm"),
        (ask(tenant=""), "tenant"),
        (ask(tenant="ü" * 100_000), "tenant"),
        (ask(quantity=-1), "quantity"),
        (ask(action="a" * 500_000), "action"),
    ],
    ids=["context", "meter", "no tenant", "tenant", "quantity", "action"],
)
def test_a_malformed_request_names_the_field(sidecar: Sidecar, request_: pb.CheckRequest, field: str) -> None:
    with sidecar.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Check(request_, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(field)


def test_a_method_that_does_not_exist_is_unimplemented(sidecar: Sidecar) -> None:
    with grpc.insecure_channel(sidecar.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/licet.v1.ApprovalService/Nothing")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Starts that are refused


@pytest.mark.parametrize("flag", ["--listen", "--http-listen"])
def test_a_taken_port_ends_the_start_and_says_what_to_do(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = "--http-listen" if flag == "--listen" else "--listen"
        message = refused(tmp_path, flag, address, other, f"127.0.0.1:{free_port()}")
    assert f"cannot listen on {address}" in message
    assert f"choose another with {flag}" in message.replace("\n", " ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--listen", "nonsense"), "cannot listen on nonsense"),
        (("--http-listen", "127.0.0.1:x"), "cannot listen on 127.0.0.1:x"),
        (("--redis-url", "localhost"), "give redis://host:port/0"),
        (("--public-key", "ed25519:short"), "--public-key"),
        (("--public-key", ","), "no public key"),
        (("--public-key", "", "--public-key-file", "/nonexistent/key"), "--public-key-file /nonexistent/key"),
        (("--staleness-max", "soon"), "--staleness-max 'soon'"),
        (("--tenants-max", "0"), "--tenants-max '0'"),
        (("--log-level", "loud"), "--log-level 'loud'"),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_named(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    free = ("--listen", f"127.0.0.1:{free_port()}", "--http-listen", f"127.0.0.1:{free_port()}")
    assert message in refused(tmp_path, *free, *flags)


def test_a_state_directory_in_use_is_refused(sidecar: Sidecar, tmp_path: Path) -> None:
    free = ("--listen", f"127.0.0.1:{free_port()}", "--http-listen", f"127.0.0.1:{free_port()}")
    message = refused(tmp_path, *free, "--state-dir", str(sidecar.state_dir))
    assert f"state directory {sidecar.state_dir} is in use by another sidecar (pid {sidecar.program.pid})" in message
    assert sidecar.check().effect == pb.EFFECT_APPROVED


def test_a_state_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused(tmp_path, "--state-dir", str(tmp_path / "file" / "state"))
    assert "cannot be written" in message
    assert "--state-dir" in message


# Redis that is away, refuses, or is somebody else's


def test_an_unreachable_redis_is_told_and_waited_for(tmp_path: Path, made: list[Sidecar]) -> None:
    server = ValkeyProcess(tmp_path / "valkey")
    made.append(Sidecar(tmp_path, server.url))
    one = made[0].start(ready=False)
    wait_until("said", lambda: "cannot be reached" in one.page("/readyz")[1])
    status, text = one.page("/readyz")
    assert status == 503
    assert f"127.0.0.1:{server.port}" in text
    assert one.log_lines("Redis does not answer")
    with one.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Check(ask(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "cannot be reached" in caught.value.details()
    with grpc.insecure_channel(one.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    server.start()
    publisher = RedisPublisher(server.url)
    publisher.push(CATALOG)
    publisher.license("acme")
    wait_until("ready", lambda: one.page("/readyz")[0] == 200)
    assert one.check().effect == pb.EFFECT_APPROVED
    publisher.close()
    server.kill()


def test_a_wrong_password_is_told_with_what_to_do_and_without_the_password(tmp_path: Path, made: list[Sidecar]) -> None:
    server = ValkeyProcess(tmp_path / "valkey", password="right").start()
    made.append(Sidecar(tmp_path, f"redis://:hunter2@127.0.0.1:{server.port}/0"))
    one = made[0].start(ready=False)
    wait_until("said", lambda: "LICET_REDIS_URL" in one.page("/readyz")[1])
    assert one.page("/readyz")[0] == 503
    assert any("LICET_REDIS_URL" in line["error"] for line in one.log_lines("Redis does not answer"))
    assert "hunter2" not in one.program.log() + one.page("/readyz")[1]
    server.kill()


def test_a_wrong_public_key_never_becomes_ready_and_says_why(
    tmp_path: Path, publisher: RedisPublisher, valkey_process: ValkeyProcess, made: list[Sidecar]
) -> None:
    made.append(Sidecar(tmp_path, valkey_process.url, key=OTHER_KEY.public_key))
    one = made[0].start(ready=False)
    wait_until("said", lambda: KEY.key_id in one.page("/readyz")[1])
    assert "configure the control plane's public key" in one.page("/readyz")[1]
    with one.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Check(ask(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_while_redis_is_paused_leases_carry_on_and_answers_say_degraded(
    sidecar: Sidecar, valkey_process: ValkeyProcess
) -> None:
    sidecar.check(ask("large"))
    valkey_process.pause()
    try:
        wait_until("noticed", lambda: "degraded" in sidecar.page("/readyz")[1])
        response = sidecar.check(ask("large", quantity=100))
        assert (response.effect, response.reason, response.degraded) == (pb.EFFECT_APPROVED, pb.REASON_OK, True)
        assert sidecar.page("/readyz")[0] == 200
        denied = sidecar.check(ask("large", quantity=900_000))
        assert (denied.reason, denied.degraded) == (pb.REASON_DEGRADED_DENY, True)
    finally:
        valkey_process.resume()
    wait_until("recovered", lambda: sidecar.check(ask("large", quantity=900_000)).reason == pb.REASON_OK)


# Ends


def test_a_killed_process_keeps_its_id_and_its_count(sidecar: Sidecar, publisher: RedisPublisher) -> None:
    approved = sidecar.approved(40)
    (before,) = publisher.sidecars()
    for _ in range(2):
        sidecar.program.kill()
        sidecar.start()
        approved += sidecar.approved(15)
    approved += sidecar.approved(200)
    assert approved == AMOUNT
    assert publisher.sidecars() == [before]
    wait_until("all is shipped", lambda: len(publisher.events()) >= 270)
    units = sum(units for event in publisher.events() for _, units in event.spends)
    assert units == AMOUNT
    sidecar.stop()
    assert (publisher.registers("acme"), publisher.bases("acme")) == ({}, [AMOUNT])


def test_a_call_repeated_after_kill_gets_its_answer_and_takes_nothing(
    sidecar: Sidecar, publisher: RedisPublisher
) -> None:
    asked = [ask(idempotency_key=f"k{number}", quantity=number % 3) for number in range(60)]
    first = [sidecar.check(request) for request in asked[:30]]
    sidecar.program.kill()
    sidecar.start()
    first += [sidecar.check(request) for request in asked[30:]]
    sidecar.program.kill()
    sidecar.start()
    for request, answer in zip(asked, first, strict=True):
        again = sidecar.check(request)
        assert (again.decision_id, again.effect, again.reason) == (answer.decision_id, answer.effect, answer.reason)
    with pytest.raises(grpc.RpcError) as caught:
        sidecar.check(idempotency_key="k1", quantity=2)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "idempotency_key: it was used for another request" in caught.value.details()
    taken = sum(number % 3 for number in range(60))
    assert sidecar.approved(AMOUNT) == AMOUNT - taken


def test_a_start_that_failed_in_between_forgets_nothing(
    sidecar: Sidecar, publisher: RedisPublisher, tmp_path: Path
) -> None:
    """An incarnation that never got as far as its log must not cost what the one before it had spent."""
    assert sidecar.approved(40) == 40
    sidecar.program.kill()
    refused(tmp_path, "--state-dir", str(sidecar.state_dir), "--redis-url", "nonsense")
    sidecar.start()
    assert sidecar.approved(200) == AMOUNT - 40
    assert len(publisher.sidecars()) == 1


def test_two_sidecars_share_a_limit_to_the_unit(
    sidecar: Sidecar, publisher: RedisPublisher, valkey_process: ValkeyProcess, tmp_path: Path, made: list[Sidecar]
) -> None:
    made.append(Sidecar(tmp_path, valkey_process.url, name="other"))
    other = made[1].start()
    approved = sum(one.approved(30) for one in (sidecar, other) * 3)
    assert approved == AMOUNT


def test_sigterm_returns_leases_deregisters_and_ends_well(sidecar: Sidecar, publisher: RedisPublisher) -> None:
    sidecar.check(ask("large", quantity=5))
    wait_until("registered", lambda: publisher.sidecars())
    ((granted, _, _),) = publisher.registers("large").values()
    assert granted > 5
    assert sidecar.stop() == 0
    # Nothing is left of it but what it spent: its id is never used again.
    assert (publisher.registers("large"), publisher.bases("large")) == ({}, [5])
    assert [heartbeat.retired for heartbeat in publisher.heartbeats()] == [True]
    assert len(publisher.events()) == 1
    assert sidecar.log_lines("stopping with events the ledger has not acknowledged")


def test_sigterm_while_redis_is_away_ends_within_its_grace(
    sidecar: Sidecar, publisher: RedisPublisher, valkey_process: ValkeyProcess
) -> None:
    sidecar.check(quantity=5)
    valkey_process.pause()
    wait_until("noticed", lambda: "degraded" in sidecar.page("/readyz")[1])
    assert sidecar.stop() == 0
    valkey_process.resume()
    assert len(list(sidecar.state_dir.glob("usage-*.log"))) == 1


def test_a_restart_without_redis_serves_from_disk(
    sidecar: Sidecar, publisher: RedisPublisher, valkey_process: ValkeyProcess
) -> None:
    sidecar.check(action="free")
    wait_until("saved", lambda: (sidecar.state_dir / "snapshot").exists())
    assert sidecar.stop() == 0
    valkey_process.stop()
    sidecar.start()
    response = sidecar.check(action="free")
    assert (response.effect, response.revision, response.stale) == (pb.EFFECT_APPROVED, 3, False)


def test_a_damaged_log_costs_the_id_and_no_event_that_can_be_read(sidecar: Sidecar, publisher: RedisPublisher) -> None:
    assert sidecar.approved(10) == 10
    (before,) = publisher.sidecars()
    sidecar.program.kill()
    path = max(sidecar.state_dir.glob("usage-*.log"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    sidecar.start()
    assert sidecar.log_lines("the usage log is damaged")
    wait_until("under a new id", lambda: set(publisher.sidecars()) - {before})
    granted_before = sum(granted for granted, _, _ in publisher.registers("acme").values())
    assert sidecar.approved(AMOUNT) <= AMOUNT - min(granted_before, AMOUNT)


def test_a_full_log_is_an_answer_also_after_a_restart(
    tmp_path: Path, publisher: RedisPublisher, valkey_process: ValkeyProcess, made: list[Sidecar]
) -> None:
    made.append(Sidecar(tmp_path, valkey_process.url, "--log-bytes-max", str(1024 * 1024)))
    one = made[0].start()
    reasons = set()
    with one.stub() as stub:
        for size in (1_000, 100, 10, 1):
            batch = pb.CheckBatchRequest(checks=[ask(action="free")] * size)
            for _ in range(40):
                told = {decision.reason for decision in stub.CheckBatch(batch, timeout=20).decisions}
                reasons |= told
                if pb.REASON_USAGE_LOG_FULL in told:
                    break
    assert reasons == {pb.REASON_OK, pb.REASON_USAGE_LOG_FULL}
    one.program.kill()
    one.start()  # also full, it starts, says so per action, and ships what it has
    assert one.check(action="free").reason == pb.REASON_USAGE_LOG_FULL
