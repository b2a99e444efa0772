"""Serves the API over HTTP until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator, Sequence
from typing import Final

import uvicorn
from fastapi import FastAPI

from licet_control_plane.state_dir import StartError

DRAIN_S_MAX: Final = 5
"""How long requests that are under way may take at the end."""


class _Server(uvicorn.Server):
    """uvicorn, without its own idea of signals: the program decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        StartError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1_024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"Port {port} on {host} is taken.", "Stop what uses it, or give another one with --listen."
            ) from error
        raise StartError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}.", "Give another one with --listen."
        ) from error
    listener.setblocking(False)
    return listener


async def serve(
    app: FastAPI, listener: socket.socket, stop: asyncio.Event, *, trusted_proxies: Sequence[str] = ()
) -> None:
    """Serve until ``stop`` is set, then finish what is under way. Closes the listener.

    What ``X-Forwarded-For`` says counts only from ``trusted_proxies`` (addresses and networks), from the right, up to
    the first that is not one of them: anybody can write the rest.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        timeout_graceful_shutdown=DRAIN_S_MAX,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        stopping.cancel()
        listener.close()
