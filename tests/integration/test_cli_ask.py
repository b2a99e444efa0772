"""``licet check`` and ``licet replay`` against real gRPC servers that answer by script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from licet.v1 import approval_pb2 as pb
from tests.support.command_line import CommandLine, Ended, licet_command
from tests.support.scripted_sidecar import Refusal, ScriptedSidecar, approved, denied
from tests.support.stub_control_plane import Request, StubControlPlane

__all__ = ["licet_command"]


@pytest.fixture
def sidecars() -> Iterator[list[ScriptedSidecar]]:
    started = [ScriptedSidecar().start() for _ in range(3)]
    yield started
    for sidecar in started:
        sidecar.stop()


def ask(command: CommandLine, sidecar: ScriptedSidecar, *arguments: object) -> Ended:
    return command("check", "acme", "llm.generate", *arguments, "--sidecar", sidecar.target)


def test_prints_the_decision(licet_command: CommandLine, sidecars: list[ScriptedSidecar]) -> None:
    answer = denied(message="No units left.", rule="llm.tokens:month")
    answer.quotas.add(feature="llm.tokens", window="month", limit=1000, remaining=5, limit_key="llm.tokens:month")
    budget = answer.quotas.add(feature="llm.tokens", window="month", limit=5_500_000_000, remaining=250_000_000)
    budget.currency, budget.limit_key, budget.grant = "USD", "llm.tokens:month@context.team.usd", "extra"
    rate = answer.quotas.add(feature="llm.tokens", window="second", limit=5, remaining=9, burst=10)
    rate.limit_key = "llm.tokens:second.rate"
    answer.retry_after.FromSeconds(30)
    sidecars[0].scripted.append(answer)
    ended = ask(licet_command, sidecars[0])
    assert ended.code == 1
    assert "DENIED  QUOTA_EXHAUSTED" in ended.out
    assert "quota     llm.tokens:month: 5 of 1,000 left" in ended.out
    assert "llm.tokens:month@context.team.usd (grant extra): 0.25 of 5.50 USD left" in ended.out
    assert "llm.tokens:second.rate: 5 a second, 9 of a burst of 10 saved up" in ended.out
    assert "in 30 s" in ended.out


def test_sends_what_the_command_line_says(licet_command: CommandLine, sidecars: list[ScriptedSidecar]) -> None:
    ended = ask(
        licet_command, sidecars[0], "--subject", "user:ada", "--role", "analyst", "--meter", "input=812",
        "--meter", "output=64", "--context", "model=small", "--context", "n:int=5", "--peek", "--json",
        "--idempotency-key", "k", "--resource", "doc:1",
    )  # fmt: skip
    assert ended.code == 0
    assert ended.json["effect"] == "APPROVED"
    assert ended.json["reason"] == "OK"
    assert ended.json["sidecar"] == sidecars[0].target
    (request,) = sidecars[0].requests
    assert (request.subject.type, request.subject.id, list(request.subject.roles)) == ("user", "ada", ["analyst"])
    assert dict(request.quantities) == {"input": 812, "output": 64}
    assert request.context["model"].string_value == "small"
    assert request.context["n"].int_value == 5
    assert request.mode == pb.MODE_PEEK
    assert request.idempotency_key == "k"
    assert (request.resource.type, request.resource.id) == ("doc", "1")


def test_malformed_check_is_bad_input(licet_command: CommandLine, sidecars: list[ScriptedSidecar]) -> None:
    sidecars[0].scripted.append(Refusal(grpc.StatusCode.INVALID_ARGUMENT, "quantity: must not be negative"))
    ended = ask(licet_command, sidecars[0], "--quantity", "-1")
    assert ended.code == 2
    assert "quantity: must not be negative" in ended.err


def test_absent_sidecar_is_unreachable(licet_command: CommandLine) -> None:
    ended = licet_command("check", "acme", "a", "--sidecar", "127.0.0.1:1", "--json")
    assert ended.code == 3
    assert ended.out == ""
    assert "127.0.0.1:1" in ended.err
    assert licet_command("check", "acme", "a", "--sidecar", "http://x").code == 2


class Ledger:
    """Stands for the control plane of a replay: records what the sidecars answered, unless told to lose something."""

    def __init__(self, sidecars: list[ScriptedSidecar], stub: StubControlPlane) -> None:
        self.events: list[tuple[str, pb.CheckResponse, int]] = []
        self.lost = 0
        self.behind = 0
        self.stub = stub
        for sidecar in sidecars:
            sidecar.default = self.approve
        stub.answers["GET /v1/usage/tally"] = self.tally

    def approve(self, request: pb.CheckRequest) -> pb.CheckResponse:
        return self.record(request, approved())

    def record(self, request: pb.CheckRequest, answer: pb.CheckResponse) -> pb.CheckResponse:
        units = sum(request.quantities.values()) or request.quantity
        self.events.append((request.idempotency_key, answer, units))
        return answer

    def tally(self, request: Request) -> tuple[int, dict[str, Any]]:
        prefix = request.query["idempotency_prefix"]
        held = [event for event in self.events if event[0].startswith(prefix)][self.lost :]
        if self.behind:
            self.behind -= 1
            held = held[:1]
        yes = [units for _, answer, units in held if answer.effect == pb.EFFECT_APPROVED]
        no = Counter(
            pb.Reason.Name(answer.reason).removeprefix("REASON_")
            for _, answer, _ in held
            if answer.effect == pb.EFFECT_DENIED
        )
        return 200, {
            "events": len(held), "approved": len(yes), "denied": dict(no), "pending": 0, "units_approved": sum(yes),
        }  # fmt: skip


@pytest.fixture
def ledger(sidecars: list[ScriptedSidecar], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    stub = StubControlPlane().start()
    monkeypatch.setenv("LICET_SERVER", stub.url)
    monkeypatch.setenv("LICET_API_KEY", "secret")
    monkeypatch.setenv("LICET_SIDECAR", ",".join(sidecar.target for sidecar in sidecars))
    yield Ledger(sidecars, stub)
    stub.stop()


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.csv"
    rows = [f"2023-11-16 18:17:{n // 10:02d}.{n % 10}000000,{n},1,u{n % 7}\r\n" for n in range(300)]
    path.write_text("TIMESTAMP,Context,Generated,who\r\n" + "".join(rows), newline="")
    return path


def replay(command: CommandLine, path: Path, *arguments: object) -> Ended:
    return command(
        "replay", path, "--tenant", "acme", "--action", "llm.complete", "--timestamp", "TIMESTAMP",
        *(arguments if "--meter" in arguments else ("--quantity", "Context+Generated", *arguments)),
    )  # fmt: skip


def test_replays_over_all_sidecars_and_agrees(
    licet_command: CommandLine, sidecars: list[ScriptedSidecar], ledger: Ledger, workload: Path
) -> None:
    ledger.behind = 2
    ended = replay(licet_command, workload, "--json", "--subject", "who")
    assert ended.code == 0, ended.err
    report = ended.json
    units = sum(range(300)) + 300
    assert (report["requests"], report["approved"], report["denied"], report["errors"]) == (300, 300, {}, 0)
    assert report["units_approved"] == units == report["units_asked"]
    assert report["ledger"]["events"] == 300
    assert report["ledger"]["units_approved"] == units
    assert report["agrees"] is True
    assert report["duration_s"] > 0
    assert 0 < report["latency_us"]["p50"] <= report["latency_us"]["p99"]
    assert [one["requests"] for one in report["sidecars"]] == [100, 100, 100]
    assert [sidecar.calls for sidecar in sidecars] == [100, 100, 100]
    keys = {request.idempotency_key for sidecar in sidecars for request in sidecar.requests}
    assert keys == {f"replay-{report['run']}-{number}" for number in range(1, 301)}
    assert {request.subject.id for request in sidecars[0].requests} == {f"u{n}" for n in range(7)}


def test_sends_several_meters_and_context(
    licet_command: CommandLine, sidecars: list[ScriptedSidecar], ledger: Ledger, workload: Path
) -> None:
    ended = replay(
        licet_command, workload, "--meter", "input=Context", "--meter", "output=Generated", "--context", "model=small"
    )
    assert ended.code == 0, ended.err
    assert "the ledger agrees" in ended.out
    first = min(sidecars[0].requests, key=lambda request: sum(request.quantities.values()))
    assert dict(first.quantities) == {"input": 0, "output": 1}
    assert first.context["model"].string_value == "small"


def test_counts_denials_by_reason(
    licet_command: CommandLine, sidecars: list[ScriptedSidecar], ledger: Ledger, workload: Path
) -> None:
    sidecars[1].default = lambda request: ledger.record(request, denied())
    ended = replay(licet_command, workload, "--json")
    assert ended.code == 0
    assert ended.json["approved"] == 200
    assert ended.json["denied"] == {"QUOTA_EXHAUSTED": 100}


def test_does_not_agree_when_an_event_is_missing(licet_command: CommandLine, ledger: Ledger, workload: Path) -> None:
    ledger.lost = 1
    ended = replay(licet_command, workload, "--json", "--ledger-timeout", "300ms")
    assert ended.code == 1
    assert ended.json["agrees"] is False
    assert "events: answered 300, the ledger holds 299" in ended.json["differences"]


def test_a_failed_call_is_an_error_and_not_a_denial(
    licet_command: CommandLine, sidecars: list[ScriptedSidecar], ledger: Ledger, workload: Path
) -> None:
    sidecars[2].scripted.append(Refusal(grpc.StatusCode.INTERNAL, "boom"))
    ended = replay(licet_command, workload, "--json", "--ledger-timeout", "300ms")
    assert ended.code == 1
    assert (ended.json["errors"], ended.json["approved"], ended.json["agrees"]) == (1, 299, False)
    assert "boom" in ended.err


def test_sends_nothing_when_a_row_is_bad(
    licet_command: CommandLine, sidecars: list[ScriptedSidecar], ledger: Ledger, workload: Path
) -> None:
    workload.write_text(workload.read_text() + "2023-11-16 18:20:00,many,1,u\n")
    ended = replay(licet_command, workload)
    assert ended.code == 2
    assert "row 301 (line 302), column Context: 'many' is not a number" in ended.err
    assert "--skip-bad-rows" in ended.err
    assert sum(sidecar.calls for sidecar in sidecars) == 0


def test_leaves_bad_rows_out_when_told_to(licet_command: CommandLine, ledger: Ledger, workload: Path) -> None:
    workload.write_text(workload.read_text() + "2023-11-16 18:20:00,many,1,u\n")
    ended = replay(licet_command, workload, "--skip-bad-rows", "--json")
    assert ended.code == 0
    assert (ended.json["requests"], ended.json["skipped_rows"]) == (300, 1)
    assert "row 301" in ended.err


def test_keeps_the_recorded_pace(licet_command: CommandLine, ledger: Ledger, workload: Path) -> None:
    ended = replay(licet_command, workload, "--speed", "60", "--json")  # 30 recorded seconds in half a second
    assert ended.code == 0
    assert ended.json["duration_s"] > 0.45


def test_stops_at_a_request_that_is_malformed(
    licet_command: CommandLine, sidecars: list[ScriptedSidecar], ledger: Ledger, workload: Path
) -> None:
    for sidecar in sidecars:
        sidecar.scripted.extend([Refusal(grpc.StatusCode.INVALID_ARGUMENT, "tenant: has a blank")] * 300)
    ended = replay(licet_command, workload, "--concurrency", "4")
    assert ended.code == 2
    assert "tenant: has a blank" in ended.err
    assert sum(sidecar.calls for sidecar in sidecars) < 20


@pytest.mark.parametrize(
    "arguments",
    [
        ("--speed", "fast"),
        ("--speed", "0"),
        ("--speed", "nan"),
        ("--quantity", "Nothing"),
        ("--meter", "Context"),
        ("--concurrency", "0"),
        ("--sidecar", "http://x"),
        ("--timeout", "soon"),
    ],
)
def test_finds_mistakes_before_it_sends(
    licet_command: CommandLine,
    sidecars: list[ScriptedSidecar],
    ledger: Ledger,
    workload: Path,
    arguments: tuple[str, ...],
) -> None:
    ended = replay(licet_command, workload, *arguments)
    assert ended.code == 2, ended.err
    assert sum(sidecar.calls for sidecar in sidecars) == 0


def test_needs_the_server_before_it_sends(
    licet_command: CommandLine, sidecars: list[ScriptedSidecar], ledger: Ledger, workload: Path
) -> None:
    ended = replay(licet_command, workload, "--server", "http://127.0.0.1:1")
    assert ended.code == 3
    assert sum(sidecar.calls for sidecar in sidecars) == 0
