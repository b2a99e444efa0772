"""The REST API on a port of its own, in a thread of its own: for clients that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from licet_control_plane.api.app import make_app
from licet_control_plane.server import listen, serve
from tests.support.control_plane import deployment

START_S_MAX = 60


@dataclass(frozen=True)
class ApiServer:
    """Where it is, and the administrator's key."""

    url: str
    key: str


@contextmanager
def api_server(state_dir: Path, redis_url: str, database_url: str = "", **settings: Any) -> Iterator[ApiServer]:
    """A control plane that serves until the end; ``settings`` are of its configuration."""
    ready: Future[ApiServer] = Future()
    ended: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        stop = asyncio.Event()
        async with deployment(state_dir, redis_url, database_url=database_url, **settings) as running:
            listener = listen("127.0.0.1", 0)
            ended.set_result((asyncio.get_running_loop(), stop))
            ready.set_result(ApiServer(f"http://127.0.0.1:{listener.getsockname()[1]}", running.admin_key))
            await serve(make_app(running.plane), listener, stop)

    def target() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=target, name="api-server")
    thread.start()
    try:
        yield ready.result(START_S_MAX)
    finally:
        if ended.done():
            loop, stop = ended.result()
            loop.call_soon_threadsafe(stop.set)
        thread.join()
