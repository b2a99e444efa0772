"""The peer: a bare grpc.aio server that answers with what it was sent. ``python -m bench.peer PORT``."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import uvloop


async def _echo(request: bytes, _: Any) -> bytes:
    return request


async def _serve(port: int) -> None:
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Check": grpc.unary_unary_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("licet.v1.ApprovalService", handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
