"""The ``licet-sidecar`` command."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> None:
    """Runs a sidecar. Exit status: 0 stopped as asked, 1 gave up, 2 cannot start as configured."""
    try:
        import structlog
        import uvloop

        from licet_sidecar import bootstrap
    except ModuleNotFoundError as error:
        sys.exit(f"licet-sidecar: {error.name} is not installed; run: pip install 'licet[sidecar]'")
    import asyncio
    import logging

    from licet_sidecar.adapters.state_directory import StateDirectoryError
    from licet_sidecar.adapters.usage_log import UsageLogError
    from licet_sidecar.config import ConfigError, parse
    from licet_sidecar.ports import LinkRefused
    from licet_sidecar.transport.grpc_edge import ListenError

    try:
        config = parse(sys.argv[1:])
    except ConfigError as error:
        _fail(error)
    level = logging.getLevelNamesMapping().get(config.log_level.upper())
    if level is None:
        _fail(f"--log-level {config.log_level!r} is not one of debug, info, warning and error")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # A thread that encodes a batch must not keep the loop waiting for the default of 5 ms.
    sys.setswitchinterval(0.0005)

    async def run() -> int:
        return await bootstrap.Sidecar(config).run()

    try:
        sys.exit(uvloop.run(run()) if sys.platform != "win32" else asyncio.run(run()))
    except (StateDirectoryError, UsageLogError, ListenError, LinkRefused) as error:
        _fail(error)


def _fail(problem: object) -> NoReturn:
    print(f"licet-sidecar: {problem}", file=sys.stderr)
    sys.exit(2)
