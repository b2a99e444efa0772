"""The main job, as a user does it: ``licet dev`` with three sidecars, a push, licenses, checks, replays that agree."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import licet
from licet_control_plane.cli.context import process_started
from tests.support.fleet import wait_until

LICET = [sys.executable, "-m", "licet_control_plane.cli.entry"]
START_S_MAX = 120.0
TRACE = Path(__file__).parents[3] / "shared" / "data" / "azure_llm_2023_code.csv"

CATALOG = """\
kind: Feature
name: llm.tokens
unit: token
---
kind: Feature
name: reports
---
kind: Action
name: llm.complete
feature: llm.tokens
---
kind: Action
name: report.view
feature: reports
---
kind: Plan
name: unlimited
features:
  llm.tokens: {price: {amount: "2.00", per_units: 1_000_000, currency: USD}}
  reports: {}
---
kind: Plan
name: limited
features:
  llm.tokens:
    limits:
      - {name: monthly, amount: LIMIT, per: month}
"""


class Stack:
    """A running ``licet dev``, and the command line as its user sees it: no addresses, no keys."""

    def __init__(self, directory: Path) -> None:
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("LICET_")}
        self.env["LICET_CONTEXT"] = str(directory / "context.json")
        self.directory = directory
        self.process = subprocess.Popen(
            [*LICET, "dev", "--state-dir", str(directory / "state"), "--sidecars", "3", "--json"],
            env=self.env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(START_S_MAX) else ""
        assert line, "licet dev did not start"
        self.ready: dict[str, Any] = json.loads(line)

    def licet(self, *arguments: object, code: int = 0) -> Any:
        """The JSON that a command ends with; it has to end with ``code``."""
        ended = subprocess.run(
            [*LICET, *map(str, arguments), "--json"], env=self.env, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == code, f"{arguments}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return json.loads(ended.stdout.splitlines()[-1])

    def push(self, limit: int = 5_000) -> Any:
        catalog = self.directory / "catalog"
        catalog.mkdir(exist_ok=True)
        (catalog / "catalog.yaml").write_text(CATALOG.replace("LIMIT", str(limit)))
        return self.licet("policy", "push", catalog, "--wait")

    def replay(self, file: Path, tenant: str, quantity: str, timestamp: str, code: int = 0) -> Any:
        return self.licet(
            "replay", file, "--tenant", tenant, "--action", "llm.complete", "--quantity", quantity,
            "--timestamp", timestamp, code=code,
        )  # fmt: skip

    def end(self, how: signal.Signals) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(90)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def wait_until_gone(self) -> None:
        pids = self.ready["pids"].values()
        wait_until(f"none of {self.ready['pids']} is left", lambda: not any(map(process_started, pids)))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("stack"))
    try:
        running.push()
        for tenant, plan in (("free-rein", "unlimited"), ("on-a-budget", "limited")):
            running.licet("license", "create", tenant, "--plan", plan, "--wait")
        yield running
    finally:
        running.end(signal.SIGTERM)
        running.wait_until_gone()


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.csv"
    rows = [f"2023-11-16 18:17:{n % 60:02d}.9799600,{n % 50},{n % 7}\r\n" for n in range(600)]
    path.write_text("at,context,generated\r\n" + "".join(rows), newline="")
    return path


def test_push_is_live_everywhere_when_it_returns(stack: Stack) -> None:
    pushed = stack.push(limit=5_001)
    assert len(pushed["rollout"]["confirmed"]) == 3
    listed = stack.licet("sidecar", "list")
    assert [item["revision"] for item in listed["items"]] == [pushed["revision"]] * 3
    assert stack.push(limit=5_001)["published"] is False


def test_answers_carry_their_reason(stack: Stack) -> None:
    assert stack.licet("check", "free-rein", "report.view", "--subject", "ada")["reason"] == "OK"
    assert stack.licet("check", "on-a-budget", "report.view", code=1)["reason"] == "NOT_ENTITLED"
    assert stack.licet("check", "free-rein", "report.burn", code=1)["reason"] == "UNKNOWN_ACTION"
    assert stack.licet("check", "nobody", "report.view", code=1)["reason"] == "NO_LICENSE"
    assert (
        stack.licet("check", "on-a-budget", "llm.complete", "--quantity", 10**9, code=1)["reason"] == "QUOTA_EXHAUSTED"
    )


def test_malformed_checks_name_their_field(stack: Stack) -> None:
    with licet.Client(stack.ready["sidecars"][0]) as client:
        for field, arguments in {
            "tenant": {"tenant": ""},
            "action": {"action": ""},
            "quantity": {"quantity": -1},
        }.items():
            with pytest.raises(licet.InvalidRequest) as caught:
                client.check(**{"tenant": "free-rein", "action": "llm.complete", **arguments})
            assert caught.value.field == field


def test_changed_license_is_live_when_update_returns(stack: Stack) -> None:
    stack.licet("license", "create", "moody", "--plan", "unlimited", "--wait")
    for status, effect in (("suspended", "DENIED"), ("active", "APPROVED")):
        stack.licet("license", "update", "moody", "--status", status, "--wait")
        for sidecar in stack.ready["sidecars"]:
            code = 0 if effect == "APPROVED" else 1
            assert stack.licet("check", "moody", "report.view", "--sidecar", sidecar, code=code)["effect"] == effect


def test_replay_agrees_with_the_ledger(stack: Stack, workload: Path) -> None:
    report = stack.replay(workload, "free-rein", "context+generated", "at")
    units = sum(n % 50 + n % 7 for n in range(600))
    assert (report["requests"], report["approved"], report["units_approved"]) == (600, 600, units)
    assert (report["ledger"]["events"], report["ledger"]["units_approved"]) == (600, units)
    assert report["agrees"] is True
    assert [one["requests"] for one in report["sidecars"]] == [200, 200, 200]


def test_limit_is_never_overspent_and_never_stranded(stack: Stack, workload: Path) -> None:
    stack.licet("license", "create", "bounded", "--plan", "limited", "--override", "llm.tokens:monthly=5000", "--wait")
    report = stack.replay(workload, "bounded", "context+generated", "at")
    largest = max(n % 50 + n % 7 for n in range(600))
    assert 5_000 - largest < report["units_approved"] <= 5_000
    assert report["denied"].keys() == {"QUOTA_EXHAUSTED"}
    assert report["agrees"] is True


@pytest.mark.skipif(not TRACE.exists(), reason=f"{TRACE.name} is not part of the project and not beside it")
def test_real_trace_is_held_to_the_unit(stack: Stack) -> None:
    report = stack.replay(TRACE, "free-rein", "ContextTokens+GeneratedTokens", "TIMESTAMP")
    assert (report["approved"], report["units_approved"]) == (8_819, 18_305_870)
    assert (report["ledger"]["events"], report["ledger"]["units_approved"]) == (8_819, 18_305_870)
    stack.licet(
        "license", "create", "traced", "--plan", "limited", "--override", "llm.tokens:monthly=5000000", "--wait"
    )
    report = stack.replay(TRACE, "traced", "ContextTokens+GeneratedTokens", "TIMESTAMP")
    assert 5_000_000 - 7_841 < report["units_approved"] <= 5_000_000
    assert report["agrees"] is True


def test_ledger_is_consistent_and_priced(stack: Stack, workload: Path) -> None:
    stack.replay(workload, "free-rein", "context+generated", "at")
    assert stack.licet("ledger", "verify")["ok"] is True
    (item,) = [
        item
        for item in stack.licet("usage", "summary", "--tenant", "free-rein", "--by", "feature")["items"]
        if item.get("feature") == "llm.tokens"
    ]
    assert item["units"] > 0
    assert item["cost"][0]["currency"] == "USD"


def test_second_dev_says_that_one_is_running(stack: Stack) -> None:
    ended = subprocess.run([*LICET, "dev", "--temp"], env=stack.env, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert stack.ready["server"] in ended.stderr


def test_state_survives_a_restart_of_everything(tmp_path: Path) -> None:
    first = Stack(tmp_path)
    first.push()
    first.licet("license", "create", "acme", "--plan", "limited", "--wait")
    first.licet("check", "acme", "llm.complete", "--quantity", 4_000)
    assert first.end(signal.SIGINT) == 0
    first.wait_until_gone()
    second = Stack(tmp_path)
    try:
        assert second.licet("check", "acme", "llm.complete", "--quantity", 4_000, code=1)["reason"] == "QUOTA_EXHAUSTED"
        assert second.licet("check", "acme", "llm.complete", "--quantity", 1_000)["effect"] == "APPROVED"
    finally:
        assert second.end(signal.SIGTERM) == 0
    second.wait_until_gone()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent died")
def test_kill_9_leaves_no_process_behind(tmp_path: Path) -> None:
    killed = Stack(tmp_path)
    killed.end(signal.SIGKILL)
    killed.wait_until_gone()
    ended = subprocess.run([*LICET, "status"], env=killed.env, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2  # the context file is still there, and is not believed
    assert "licet dev" in ended.stderr


def test_dev_starts_a_dead_sidecar_again_and_stops_when_another_process_dies(tmp_path: Path) -> None:
    broken = Stack(tmp_path)
    os.kill(broken.ready["pids"]["sidecar-1"], signal.SIGKILL)
    # A sidecar is started again, as its supervisor would: it goes on under its id.
    address = broken.ready["sidecars"][1]
    wait_until(
        "it is there again",
        lambda: any(
            one["address"] == address and one["state"] == "live" and one["incarnation"] == 2
            for one in broken.licet("sidecar", "list")["items"]
        ),
    )
    assert len(broken.licet("sidecar", "list")["items"]) == 3
    # What all others hang on is not.
    os.kill(broken.ready["pids"]["server"], signal.SIGKILL)
    assert broken.process.wait(40) == 1
    broken.end(signal.SIGTERM)
    broken.wait_until_gone()
