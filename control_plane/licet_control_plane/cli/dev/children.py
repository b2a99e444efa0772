"""Child processes that never outlive us, and whose output is in a file.

Each child leads a process group of its own, so that a Ctrl-C in the terminal reaches only the parent, which then ends
the children in its order. On Linux the kernel kills them when the parent dies in a way that it cannot handle itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

STOP_S_MAX: Final = 15.0
"""A sidecar takes up to 10 s to ship its log when Redis is away (its drain grace), and then has to end."""

_TAIL_LINES: Final = 15
_TAIL_BYTES: Final = 16_384
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_POLL_S: Final = 0.02


class Child:
    """One process. ``log_path`` gets its standard output and error, after what earlier runs wrote."""

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str], log_path: Path) -> None:
        self.name = name
        self.command = list(command)
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._log_from = log.tell()
            # The child writes to the file itself: no thread of ours to feed, no pipe to break when we die.
            self._process = subprocess.Popen(
                self.command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_bound_to_this_process(),  # safe: this process has one thread
            )

    @property
    def pid(self) -> int:
        """Process id, and id of its group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; ``None`` while it runs."""
        return self._process.poll()

    def end_of_log(self) -> str:
        """The last lines it wrote in this run, for the message that says why it ended."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_from, size - _TAIL_BYTES))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])
        return ""

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its group (SIGKILL), and collect it."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)


def stop_all(
    stages: Sequence[Sequence[Child]], *, hurry: Callable[[], bool], stop_s_max: float = STOP_S_MAX
) -> list[str]:
    """End ``stages`` one after the other, each at once; returns the names of those that had to be killed.

    ``hurry`` turns true when the person at the keyboard does not want to wait: then what is left is killed.
    """
    killed = []
    for stage in stages:
        for child in stage:
            child.terminate()
        deadline = time.monotonic() + stop_s_max
        while any(child.exit_code is None for child in stage) and time.monotonic() < deadline and not hurry():
            time.sleep(_POLL_S)
        for child in stage:
            if child.exit_code is None:
                killed.append(child.name)
            child.kill()
    return killed


def _bound_to_this_process() -> Callable[[], None] | None:
    """What a child runs before its program: on Linux, ask the kernel to kill it when this process dies."""
    if not sys.platform.startswith("linux"):
        return None
    # Loaded here, since after the fork nothing may be imported or allocated that another thread could hold a lock for.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the request was in place
            os._exit(1)

    return bind
