"""What ``licet dev`` is made of: ports, child processes and its state directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from licet_control_plane.cli.context import DevContext, process_started, write_context
from licet_control_plane.cli.dev.children import Child, stop_all
from licet_control_plane.cli.dev.command import EXAMPLE
from licet_control_plane.cli.dev.ports import choose_ports, nobody_else_chooses
from licet_control_plane.cli.dev.stack import ENDED_AT_ONCE_MAX, RESTART_S, Stack, ended_by_itself
from licet_control_plane.cli.failure import CliError
from licet_control_plane.core.documents.json_schema import KINDS
from tests.support.command_line import CommandLine, licet_command

__all__ = ["licet_command"]

SLEEPS = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
IGNORES_SIGTERM = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Child]]:
    children: list[Child] = []
    yield children
    for child in children:
        child.kill()


def start(children: list[Child], command: list[str], tmp_path: Path, name: str = "child") -> Child:
    child = Child(name, command, env=os.environ, log_path=tmp_path / f"{name}.log")
    children.append(child)
    return child


def wait_until_up(child: Child) -> None:
    deadline = time.monotonic() + 10
    while "up" not in child.end_of_log():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def free_base() -> int:
    """A port base whose ports are free, out of the range that the kernel hands out for connections."""
    for base in range(20_000, 30_000, 50):
        try:
            choose_ports(5, base)
        except CliError:
            continue
        return base
    raise AssertionError("no free ports")


def test_gives_the_ports_that_were_asked_for() -> None:
    base = free_base()
    ports = choose_ports(3, base)
    assert (ports.redis, ports.server) == (base, base + 20)
    assert ports.sidecars == ((base + 10, base + 11), (base + 12, base + 13), (base + 14, base + 15))
    assert ports.moved == ()


def test_never_gives_a_port_twice() -> None:
    ports = choose_ports(16, None)
    every = [ports.redis, ports.server, *(port for pair in ports.sidecars for port in pair)]
    assert len(set(every)) == 34


def test_says_which_port_is_taken_when_it_was_asked_for() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        with pytest.raises(CliError, match=f"port {port} .* is taken") as caught:
            choose_ports(1, port)
    assert "--port-base" in caught.value.fix


def test_a_stack_that_starts_waits_for_one_that_chooses_ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) == 3

    with nobody_else_chooses(wait):
        assert waited == []
        with nobody_else_chooses(wait):
            assert len(waited) == 3
    with nobody_else_chooses(wait):
        assert len(waited) == 3


def test_ends_children_in_their_order(started: list[Child], tmp_path: Path) -> None:
    first, second = (start(started, SLEEPS, tmp_path, name) for name in ("first", "second"))
    assert stop_all([[first], [second]], hurry=lambda: False) == []
    assert first.exit_code == second.exit_code == -signal.SIGTERM


def test_kills_a_child_that_does_not_end(started: list[Child], tmp_path: Path) -> None:
    stubborn = start(started, IGNORES_SIGTERM, tmp_path)
    wait_until_up(stubborn)
    assert stop_all([[stubborn]], hurry=lambda: False, stop_s_max=0.2) == ["child"]
    assert stubborn.exit_code == -signal.SIGKILL


def test_does_not_wait_when_told_to_hurry(started: list[Child], tmp_path: Path) -> None:
    stubborn = start(started, IGNORES_SIGTERM, tmp_path)
    wait_until_up(stubborn)
    began = time.monotonic()
    assert stop_all([[stubborn]], hurry=lambda: True) == ["child"]
    assert time.monotonic() - began < 2


def test_reports_why_a_child_ended(started: list[Child], tmp_path: Path) -> None:
    (tmp_path / "child.log").write_text("from an earlier run\n")
    child = start(started, [sys.executable, "-c", "import sys; sys.exit('no such key')"], tmp_path)
    deadline = time.monotonic() + 10
    while child.exit_code is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    error = ended_by_itself(child)
    assert "child ended with exit code 1" in str(error)
    assert "no such key" in str(error)
    assert "earlier run" not in str(error)
    assert "child.log" in error.fix


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent died")
def test_leaves_no_child_behind_when_it_is_killed(tmp_path: Path) -> None:
    script = f"""
        import os, time
        from pathlib import Path
        from licet_control_plane.cli.dev.children import Child
        child = Child("child", {IGNORES_SIGTERM!r}, env=os.environ, log_path=Path({str(tmp_path)!r}) / "child.log")
        print(child.pid, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        assert process_started(child_pid)
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5
    while process_started(child_pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.01)


def test_second_stack_says_where_the_first_is(licet_command: CommandLine) -> None:
    pid = os.getpid()
    write_context(
        DevContext(pid, process_started(pid), "http://127.0.0.1:1", "k", ["127.0.0.1:2"], "redis://", "/here")
    )
    ended = licet_command("dev", "--temp")
    assert ended.code == 2
    assert f"process {pid}" in ended.err
    assert "http://127.0.0.1:1" in ended.err
    assert "/here" in ended.err


class TendedStack(Stack):
    """Of sidecars that do as a test says."""

    def __init__(self, tmp_path: Path, started: list[Child], command: list[str]) -> None:
        super().__init__(tmp_path, choose_ports(1, None))
        self.command, self.tmp_path, self.started = command, tmp_path, started
        self._sidecars.append(self._sidecar(0))

    def _sidecar(self, index: int) -> Child:
        return start(self.started, self.command, self.tmp_path, f"sidecar-{index}")

    def wait_until_ended(self) -> None:
        deadline = time.monotonic() + 10
        while self._sidecars[0].exit_code is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_sidecar_that_was_killed_is_started_again(started: list[Child], tmp_path: Path) -> None:
    stack = TendedStack(tmp_path, started, SLEEPS)
    assert stack.tend(0.0) == []
    for at_s in (100.0, 200.0, 300.0, 400.0, 500.0):  # as often as somebody likes
        stack.children()[0].kill()
        (told,) = stack.tend(at_s)
        assert "sidecar-0 ended by signal 9" in told
        assert stack.tend(at_s + RESTART_S - 0.1) == []
        (told,) = stack.tend(at_s + RESTART_S)
        assert f"process {stack.children()[0].pid}" in told
        assert stack.dead() is None


def test_a_sidecar_that_ends_at_once_again_and_again_is_given_up(started: list[Child], tmp_path: Path) -> None:
    stack = TendedStack(tmp_path, started, [sys.executable, "-c", "import sys; sys.exit('no such key')"])
    now_s = 0.0
    for _ in range(ENDED_AT_ONCE_MAX - 1):
        stack.wait_until_ended()
        stack.tend(now_s)
        now_s += RESTART_S * 2**ENDED_AT_ONCE_MAX
        stack.tend(now_s)
    stack.wait_until_ended()
    with pytest.raises(CliError, match="sidecar-0 ended with exit code 1") as caught:
        stack.tend(now_s)
    assert "no such key" in str(caught.value)
    assert len(started) == ENDED_AT_ONCE_MAX


def test_refuses_a_state_directory_that_is_in_use(tmp_path: Path) -> None:
    ports = choose_ports(1, None)
    first, second = Stack(tmp_path, ports), Stack(tmp_path, ports)
    first._claim_state_dir()
    with pytest.raises(CliError, match="in use by another"):
        second.start(lambda: True)
    first.stop(hurry=lambda: False)


def test_refuses_a_state_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CliError, match="cannot be used"):
        Stack(tmp_path / "file" / "state", choose_ports(1, None)).start(lambda: True)


def test_starter_catalog_is_valid(licet_command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text(EXAMPLE)
    ended = licet_command("policy", "validate", tmp_path, "--json")
    assert ended.code == 0
    assert ended.json == {"valid": True, "files": 1, "errors": [], "warnings": []}


def test_warnings_stand_in_the_way_only_when_asked(licet_command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text(EXAMPLE + "---\nkind: Feature\nname: unused\n")
    ended = licet_command("policy", "validate", tmp_path)
    assert (ended.code, "valid, 1 warning." in ended.out) == (0, True)
    assert "[unused-feature]" in ended.err
    ended = licet_command("policy", "validate", tmp_path, "--strict", "--json")
    assert (ended.code, ended.json["valid"]) == (1, True)
    (warning,) = ended.json["warnings"]
    assert list(warning) == ["file", "line", "column", "path", "message", "fix", "code", "severity"]
    assert (warning["file"], warning["code"], warning["severity"]) == ("catalog.yaml", "unused-feature", "warning")


def test_schemas_are_printed_and_written(licet_command: CommandLine, tmp_path: Path) -> None:
    assert licet_command("policy", "schema", "Plan").json["properties"]["kind"] == {"const": "Plan"}
    assert licet_command("policy", "schema").json["title"] == "Document"
    ended = licet_command("policy", "schema", "Pan")
    assert (ended.code, "Did you mean 'Plan'?" in ended.err) == (2, True)
    ended = licet_command("policy", "schema", "--output", tmp_path / "schemas", "--json")
    assert [Path(name).stem for name in ended.json["files"]] == list(KINDS)
    assert json.loads((tmp_path / "schemas" / "Role.json").read_text())["title"] == "Role"


@pytest.mark.parametrize("command", ["renew", "release"])
def test_what_is_no_seat_is_refused_before_anybody_is_asked(licet_command: CommandLine, command: str) -> None:
    ended = licet_command("seat", command, "acme", "nonsense", "--sidecar", "127.0.0.1:1")
    assert ended.code == 2
    assert "licet seat acquire" in ended.err
