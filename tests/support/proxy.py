"""A loopback TCP proxy: one address for whichever server is behind it at the moment.

It stands for the service name that follows the primary in a failover, and for a replication link that lags. It runs on
a thread of its own, so that a test may turn it in the middle of anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, Final

CHUNK_BYTES: Final = 65_536
START_S_MAX: Final = 60.0


class TcpProxy:
    """Forwards ``port`` to a port of the same machine."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        """As ``LICET_REDIS_URL``."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> TcpProxy:
        """Listens on a free port."""
        self._thread.start()
        self._run(self._listen())
        return self

    def stop(self) -> None:
        """Ends all connections, and listens no more."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S_MAX)
        self._loop.close()

    def point_to(self, port: int) -> None:
        """Ends all connections, and leads new ones to ``port``. What was on its way is lost."""
        self._run(self._turn(port))

    def hold(self) -> None:
        """What is sent arrives no more, in either direction; connections stay."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S_MAX)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        target = self._target
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            self._connections.discard(writer)
            writer.close()
            return
        self._connections.add(onward_writer)
        if writer not in self._connections:  # cut meanwhile
            self._connections.discard(onward_writer)
            onward_writer.transport.abort()
            return
        for task in (
            self._loop.create_task(self._forward(reader, onward_writer)),
            self._loop.create_task(self._forward(onward_reader, writer)),
        ):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
        self._connections.discard(writer)

    async def _turn(self, port: int) -> None:
        self._target = port
        await self._cut()
        self._flows.set()

    async def _cut(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        connections = list(self._connections)
        self._connections.clear()
        for writer in connections:
            writer.transport.abort()
        # An aborted socket is closed in a later round of the loop, which must not be ended before.
        await asyncio.gather(*(writer.wait_closed() for writer in connections), return_exceptions=True)

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
