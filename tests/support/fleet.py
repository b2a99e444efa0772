"""Real processes, as deployed: Valkey, ``licet server`` and sidecars, each of which a test may pause, kill and restart.

A restarted process gets its old port and state directory, as with a container that its node restarts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.support.valkey import ValkeyProcess, free_port

LICET: Final = [sys.executable, "-m", "licet_control_plane.cli.entry"]
SIDECAR: Final = [sys.executable, "-m", "licet_sidecar"]
WAIT_S_MAX: Final = 90.0
"""Only how long a failure takes: machines that are shared differ by a factor of three within the hour."""


def wait_until(what: str, condition: Callable[[], object], *, within_s: float = WAIT_S_MAX) -> None:
    """Polls until ``condition`` holds; fails with ``what`` when it does not in time."""
    deadline = time.monotonic() + within_s
    while True:
        asked = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < deadline, f"not in {within_s:.0f} s: {what}"
        time.sleep(max(0.02, 3 * (now - asked)))  # a question that costs much is asked seldom


class Program:
    """One process with a log file of its own."""

    def __init__(self, name: str, command: list[str], directory: Path) -> None:
        self.name = name
        self.command = command
        self.log_path = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it may take a moment until it serves."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LICET_")}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)

    def kill(self) -> None:
        """As a crash would (SIGKILL)."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """As an orchestrator would (SIGTERM); the exit status."""
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Freezes it (SIGSTOP)."""
        if self._process:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undoes ``pause``."""
        if self._process:
            self._process.send_signal(signal.SIGCONT)

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id; 0 when it does not run."""
        return self._process.pid if self._process else 0

    def log(self) -> str:
        """What it has written so far."""
        return self.log_path.read_text(errors="replace")

    def _end(self, how: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGCONT)  # a paused process would not take a SIGTERM
        process.send_signal(how)
        try:
            return process.wait(WAIT_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(WAIT_S_MAX)


class Fleet:
    """A control plane and ``count`` sidecars on one Valkey."""

    def __init__(
        self,
        directory: Path,
        *,
        count: int = 3,
        server_flags: tuple[str, ...] = (),
        sidecar_flags: tuple[str, ...] = (),
        valkey: ValkeyProcess | None = None,
        redis_url: str = "",
        prelude: str = "",
        second_route: bool = False,
        database_url: str = "",
    ) -> None:
        """``redis_url``: where all of them reach ``valkey``, when not directly. ``prelude``: Python that each process
        runs before anything of ours is imported. ``second_route``: sidecars ask the control plane while Redis is away.
        ``database_url``: of another database than SQLite in the control plane's directory.
        """
        self.directory = directory
        self.database_url = database_url or f"sqlite:///{directory / 'server' / 'licet.db'}"
        self.valkey = valkey or ValkeyProcess(directory / "valkey")
        self.redis_url = redis_url or self.valkey.url
        self.sidecar_flags = sidecar_flags
        self.second_route = second_route
        self.prelude = prelude
        self.server_url = f"http://127.0.0.1:{free_port()}"
        self.server = Program(
            "server",
            [
                *self._module(LICET),
                "server",
                *("--listen", self.server_url.removeprefix("http://")),
                *("--state-dir", str(directory / "server"), "--redis-url", self.redis_url),
                *("--database-url", self.database_url),
                *server_flags,
            ],
            directory,
        )
        self.count = count
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(count)]
        self.pages = [f"127.0.0.1:{free_port()}" for _ in range(count)]
        self.sidecars: list[Program] = []

    def start(self) -> Fleet:
        """Starts everything, and waits until the sidecars are ready."""
        self.valkey.start()
        self.server.start()
        address = self.server_url.removeprefix("http://")
        wait_until("the server serves", lambda: self.page(address, "/healthz") or not self.server.running)
        assert self.server.running, f"the server ended:\n{self.server.log()[-2_000:]}"
        self.sidecars = [
            Program(
                f"sidecar-{number}",
                [
                    *self._module(SIDECAR),
                    *("--listen", self.addresses[number], "--http-listen", self.pages[number]),
                    *("--state-dir", str(self.directory / f"sidecar-{number}"), "--redis-url", self.redis_url),
                    *("--public-key-file", str(self.directory / "server" / "public-key.txt"), "--drain-grace", "20s"),
                    *self._second_route_flags(),
                    *self.sidecar_flags,
                ],
                self.directory,
            )
            for number in range(self.count)
        ]
        for sidecar in self.sidecars:
            sidecar.start()
        for number in range(self.count):
            self.wait_ready(number)
        return self

    def _second_route_flags(self) -> list[str]:
        if not self.second_route:
            return []
        key_file = self.directory / "server" / "sidecar-key"
        return ["--control-plane-url", self.server_url, "--sidecar-key-file", str(key_file)]

    def restart_with(self, number: int, *flags: str) -> None:
        """Kills a sidecar and starts it with other flags, which count more than those it had."""
        sidecar = self.sidecars[number]
        sidecar.kill()
        sidecar.command = [*sidecar.command, *flags]
        sidecar.start()
        self.wait_ready(number)

    def _module(self, command: list[str]) -> list[str]:
        if not self.prelude:
            return command
        python, _, module = command
        run = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        return [python, "-c", f"{self.prelude}; {run}"]

    def wait_ready(self, number: int) -> None:
        """Waits until a sidecar is ready."""
        wait_until(f"sidecar {number} is ready", lambda: self.page(self.pages[number], "/readyz"))

    def stop(self) -> None:
        """Ends every process."""
        for program in (*self.sidecars, self.server):
            program.kill()
        self.valkey.kill()

    def page(self, address: str, path: str) -> str:
        """The text of a page; empty when it is not answered with 200."""
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
                text: str = response.read().decode()
                return text
        except OSError:
            return ""

    def licet(self, *arguments: object, code: int = 0) -> Any:
        """The JSON that a command ends with; it has to end with ``code``."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LICET_")}
        environment["LICET_CONTEXT"] = str(self.directory / "no-context.json")
        environment["LICET_SERVER"] = self.server_url
        environment["LICET_API_KEY"] = (self.directory / "server" / "admin-key").read_text().strip()
        environment["LICET_SIDECAR"] = self.addresses[0]
        ended = subprocess.run(
            [*LICET, *map(str, arguments), "--json"], env=environment, capture_output=True, text=True, timeout=240
        )
        assert ended.returncode == code, f"{arguments}: exit {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        lines = ended.stdout.strip().splitlines()
        return json.loads(lines[-1]) if lines else None

    def push(self, catalog: str) -> None:
        """Pushes a catalog of one file, and waits until it is live everywhere."""
        folder = self.directory / "catalog"
        folder.mkdir(exist_ok=True)
        (folder / "catalog.yaml").write_text(catalog)
        self.licet("policy", "push", folder, "--wait")

    def metric(self, number: int, name: str) -> float:
        """Sum of a metric of a sidecar over its labels."""
        lines = self.page(self.pages[number], "/metrics").splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)
