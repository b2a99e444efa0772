"""Which control plane and which sidecars a command talks to.

A flag wins over the environment, and the environment over ``licet dev``: while that runs, it keeps a context file with
its addresses and key, so that no other command needs any of them. The file is ignored once the process is gone. Its key
is sent only to the address that stands beside it, never to a server that was named by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from licet_control_plane.cli.failure import EXIT_USAGE, CliError

SERVER_DEFAULT: Final = "http://127.0.0.1:7430"
SIDECAR_DEFAULT: Final = "127.0.0.1:7420"


@dataclass(frozen=True, slots=True)
class DevContext:
    """A running ``licet dev``. ``started`` tells its process from a later one with the same ``pid``."""

    pid: int
    started: str
    server: str
    api_key: str
    sidecars: list[str]
    redis: str
    state_dir: str


@dataclass(frozen=True, slots=True)
class Target:
    """Where the REST API is, and the key it wants."""

    server: str
    api_key: str


def context_path() -> Path:
    """``$LICET_CONTEXT``, else ``licet/dev.json`` in the user's state directory."""
    if named := os.environ.get("LICET_CONTEXT"):
        return Path(named)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "licet" / "dev.json"


def write_context(context: DevContext) -> None:
    """Publish ``context``, readable by this user only. One atomic file: a reader sees all of it or the old one."""
    path = context_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(context), file)
    draft.replace(path)


def remove_context(pid: int) -> None:
    """Take the context away, unless it belongs to another process by now."""
    with contextlib.suppress(FileNotFoundError):
        context = read_context()
        if context is None or context.pid == pid:
            context_path().unlink()


def read_context() -> DevContext | None:
    """The running ``licet dev``, or ``None``."""
    try:
        raw: dict[str, Any] = json.loads(context_path().read_text())
        context = DevContext(**raw)
    except (OSError, ValueError, TypeError):
        return None  # not there, or written by another version
    return context if context.started and process_started(context.pid) == context.started else None


def process_started(pid: int) -> str:
    """When process ``pid`` was started, in a form that only compares; empty when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        # Not Linux: whether the process exists is all that can be had without another library.
        try:
            os.kill(pid, 0)
        except PermissionError:
            return str(pid)
        except OSError:
            return ""
        return str(pid)
    after_name = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return "" if after_name[0] == "Z" else after_name[19]  # field 22: start time, in ticks since boot


def server_target(server: str | None, api_key: str | None) -> Target:
    """The control plane to talk to, from flags and environment (already merged), else from ``licet dev``.

    Raises:
        CliError: no key is known for it.
    """
    dev = read_context()
    url = _url(server) if server else dev.server if dev else SERVER_DEFAULT
    if api_key:
        return Target(url, api_key)
    if dev and url == dev.server:
        return Target(url, dev.api_key)
    raise CliError(
        f"no API key for the control plane at {url}, and no `licet dev` runs there.",
        fix="set LICET_API_KEY (the server writes the first one to admin-key in its state directory),"
        " or start a stack with: licet dev",
        exit_code=EXIT_USAGE,
    )


def sidecar_targets(sidecars: list[str] | None) -> list[str]:
    """The sidecars to ask, from flags and environment, else those of ``licet dev``, else the default address."""
    if sidecars:
        return [address for item in sidecars for address in item.replace(",", " ").split()]
    dev = read_context()
    return dev.sidecars if dev else [SIDECAR_DEFAULT]


def _url(server: str) -> str:
    return (server if "://" in server else f"http://{server}").rstrip("/")
