"""Which ports the programs get: the documented ones when they are free."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from licet_control_plane.cli.arguments import bad

HOST: Final = "127.0.0.1"
BASE_DEFAULT: Final = 7410
_LOCK_POLL_S: Final = 0.1
_SERVER_OFFSET: Final = 20  # 7430
_SIDECAR_OFFSET: Final = 10  # 7420 and 7421, then pairs up to the server's port


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports on loopback; ``sidecars`` holds gRPC and HTTP of each. ``moved`` says which are not the documented ones."""

    redis: int
    server: int
    sidecars: tuple[tuple[int, int], ...]
    moved: tuple[str, ...]


@contextlib.contextmanager
def nobody_else_chooses(wait: Callable[[float], bool]) -> Iterator[None]:
    """To be held from choosing ports until they are listened on: two stacks that start at once would choose the same.

    ``wait`` sleeps for so many seconds while another one starts, and says whether to give up.
    """
    path = Path(tempfile.gettempdir()) / f"licet-dev-{os.getuid()}.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if wait(_LOCK_POLL_S):
                    break
        yield
    finally:
        os.close(lock)


def choose_ports(sidecars: int, base: int | None) -> Ports:
    """Ports for a stack: ``base`` for Valkey, ten above it the sidecars, twenty above it the control plane.

    Without ``base``, the documented ones (base 7410), and others for those that are taken.

    Raises:
        CliError: ``base`` was asked for, and one of its ports is taken.
    """
    taken: set[int] = set()
    moved: list[str] = []

    def choose(port: int | None, what: str) -> int:
        if port is not None and port not in taken and _is_free(port):
            taken.add(port)
            return port
        if port is not None and base is not None:
            raise bad(
                f"port {port} ({what}) is taken.",
                "end the process that listens there, choose another --port-base, or leave it out to get free ports",
            )
        free = _free_port(taken)
        taken.add(free)
        if port is not None:
            moved.append(f"port {port} is taken, so {what} listens on {free}")
        return free

    start = BASE_DEFAULT if base is None else base
    if not 1024 <= start <= 65_535 - _SERVER_OFFSET:
        raise bad(f"--port-base {start} leaves no room.", f"choose one from 1024 to {65_535 - _SERVER_OFFSET}")
    server = choose(start + _SERVER_OFFSET, "the control plane")
    redis = choose(start, "Valkey")
    pairs = []
    for index in range(sidecars):
        first = start + _SIDECAR_OFFSET + 2 * index
        documented = first + 1 < start + _SERVER_OFFSET
        grpc = choose(first if documented else None, f"sidecar {index}")
        pairs.append((grpc, choose(first + 1 if documented else None, f"sidecar {index} (HTTP)")))
    return Ports(redis=redis, server=server, sidecars=tuple(pairs), moved=tuple(moved))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: without it a port that was in use a minute ago looks taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    # A listener with SO_REUSEPORT (as gRPC's) lets others bind: only asking it tells.
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=0.2):
        return False
    return True


def _free_port(taken: set[int]) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            return port
