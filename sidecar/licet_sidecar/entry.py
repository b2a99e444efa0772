"""The ``licet-sidecar`` command."""

from __future__ import annotations

import sys
from typing import Final, NoReturn

GC_THRESHOLDS: Final = (20_000, 20, 100)
"""A check leaves no cycles behind: looking for them after every 700 objects only costs time."""


def main() -> None:
    """Runs a sidecar. Exit status: 0 stopped as asked, 1 gave up, 2 cannot start as configured.

    ``licet-sidecar evaluate`` runs only the decision engine, as a filter; see ``licet_sidecar.evaluate``.
    """
    if sys.argv[1:] == ["evaluate"]:
        from licet_sidecar import evaluate

        evaluate.run(sys.stdin, sys.stdout)
        return
    try:
        import uvloop

        from licet_sidecar import bootstrap
    except ModuleNotFoundError as error:
        sys.exit(f"licet-sidecar: {error.name} is not installed; run: pip install 'licet[sidecar]'")
    import asyncio
    import gc

    from licet_sidecar import logs
    from licet_sidecar.adapters.state_directory import StateDirectoryError
    from licet_sidecar.adapters.usage_log import UsageLogError
    from licet_sidecar.config import ConfigError, parse
    from licet_sidecar.ports import LinkRefused
    from licet_sidecar.transport.grpc_edge import ListenError

    try:
        config = parse(sys.argv[1:])
    except ConfigError as error:
        _fail(error)
    try:
        logs.configure(config.log_level)
    except ValueError as error:
        _fail(error)
    # A thread that encodes a batch must not keep the loop waiting for the default of 5 ms.
    sys.setswitchinterval(0.0005)

    async def run() -> int:
        sidecar = bootstrap.Sidecar(config)
        # What is there now stays: collections need not look at it again, and pauses stay short.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        return await sidecar.run()

    try:
        sys.exit(uvloop.run(run()) if sys.platform != "win32" else asyncio.run(run()))
    except (StateDirectoryError, UsageLogError, ListenError, LinkRefused) as error:
        _fail(error)


def _fail(problem: object) -> NoReturn:
    print(f"licet-sidecar: {problem}", file=sys.stderr)
    sys.exit(2)
