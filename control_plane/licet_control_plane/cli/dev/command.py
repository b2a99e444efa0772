"""``licet dev``."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final

import typer

from licet_control_plane.cli.arguments import JsonOption, bad
from licet_control_plane.cli.context import DevContext, process_started, read_context, remove_context, write_context
from licet_control_plane.cli.output import emit_json, note, say

if TYPE_CHECKING:
    from licet_control_plane.cli.dev.stack import Stack

_WATCH_S: Final = 0.2

EXAMPLE: Final = """\
# A catalog to start with. Change it, and push it again: every sidecar has it within half a second.
kind: Feature
name: reports
unit: report
title: Reports
---
kind: Action
name: report.view
feature: reports
---
kind: Plan
name: pro
features:
  reports:
    price: {amount: "0.05", per_units: 1, currency: USD}
    limits:
      - {name: monthly, amount: 100, per: month}
"""


def dev(
    sidecars: Annotated[int, typer.Option("--sidecars", help="How many sidecars.", min=1, max=16)] = 3,
    state_dir: Annotated[Path, typer.Option("--state-dir", help="Where everything is kept, also between runs.")] = Path(
        ".licet-dev"
    ),
    temp: Annotated[bool, typer.Option("--temp", help="Keep nothing: a temporary directory instead.")] = False,
    port_base: Annotated[
        int | None, typer.Option("--port-base", help="Valkey here, sidecars from +10, control plane at +20.")
    ] = None,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    as_json: JsonOption = False,
) -> None:
    """Run the whole stack on this machine: Valkey, the control plane and sidecars. Ctrl-C stops it.

    While it runs, every other command finds it by itself, without addresses or keys.

    \b
    Example:
      licet dev --sidecars 3
    """
    if (running := read_context()) is not None:
        raise bad(
            f"`licet dev` is already running (process {running.pid}): control plane {running.server},"
            f" state in {running.state_dir}.",
            "use that one, or stop it first; a second one needs its own LICET_CONTEXT file",
        )
    stop = _StopSignals()
    if temp:
        state_dir = Path(tempfile.mkdtemp(prefix="licet-dev-"))
    try:
        _run(state_dir, sidecars, port_base, stop, log_level=log_level, as_json=as_json)
    finally:
        if temp:
            shutil.rmtree(state_dir, ignore_errors=True)


def _run(
    state_dir: Path, sidecars: int, port_base: int | None, stop: _StopSignals, *, log_level: str, as_json: bool
) -> None:
    from licet_control_plane.cli.dev.ports import choose_ports, nobody_else_chooses
    from licet_control_plane.cli.dev.stack import Stack

    stack: Stack | None = None
    try:
        with nobody_else_chooses(stop.wait):
            if stop.asked:
                return
            stack = Stack(state_dir, choose_ports(sidecars, port_base), log_level=log_level)
            for moved in stack.ports.moved:
                note(f"licet dev: {moved}")
            stack.start(wanted=lambda: not stop.asked)
        if not stop.asked:
            context = DevContext(
                pid=os.getpid(),
                started=process_started(os.getpid()),
                server=stack.server_url,
                api_key=stack.api_key,
                sidecars=stack.sidecars,
                redis=stack.redis_url,
                state_dir=str(stack.state_dir.resolve()),
            )
            write_context(context)
            example = stack.state_dir / "example"
            if not example.exists():
                example.mkdir()
                (example / "catalog.yaml").write_text(EXAMPLE)
            if (tenants := stack.learning()) > 0:
                note(
                    f"licet dev: the quotas of {tenants} tenants wait for sidecars of the last run; see `licet status`"
                )
            _announce(stack, context, as_json=as_json)
        while not stop.wait(_WATCH_S):
            for told in stack.tend(time.monotonic()):
                note(f"licet dev: {told}")
    finally:
        remove_context(os.getpid())
        note("licet dev: stopping (once more to stop at once)" if stop.asked else "licet dev: stopping")
        for name in stack.stop(hurry=lambda: stop.asked > 1) if stack is not None else ():
            note(f"licet dev: {name} did not end in time and was killed")


def _announce(stack: Stack, context: DevContext, *, as_json: bool) -> None:
    if as_json:
        emit_json(
            {
                "ready": True,
                "pid": context.pid,
                "server": context.server,
                "sidecars": context.sidecars,
                "sidecars_http": [f"127.0.0.1:{http_port}" for _, http_port in stack.ports.sidecars],
                "redis": context.redis,
                "state_dir": context.state_dir,
                "pids": {child.name: child.pid for child in stack.children()},
            }
        )
        return
    say(f"Licet is running, with its state in {stack.state_dir}. Ctrl-C stops it.")
    say()
    say(f"  control plane  {context.server}")
    say(f"  sidecars       {'  '.join(context.sidecars)}")
    say(f"  valkey         {context.redis}")
    say(f"  logs           {stack.logs_dir}")
    say()
    say("Try it, in another terminal; no addresses or keys needed while this runs:")
    say()
    say(f"  licet policy push {stack.state_dir / 'example'} --wait")
    say("  licet license create acme --plan pro --wait")
    say("  licet check acme report.view --subject ada")
    say("  licet usage summary")
    sys.stdout.flush()


class _StopSignals:
    """Counts SIGINT, SIGTERM and SIGHUP. Installed for the rest of the process; the first asks, the second insists."""

    def __init__(self) -> None:
        self.asked = 0
        self._event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def wait(self, seconds: float) -> bool:
        """Sleep for so long, or until a signal came; whether one has."""
        return self._event.wait(seconds)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        self._event.set()
