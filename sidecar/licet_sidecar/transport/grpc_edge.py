"""grpc.aio over ``ApprovalService``: bytes in, bytes out. The one place that knows gRPC status codes.

A faster transport can take this module's place without touching the service.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from licet_sidecar.logs import Logger
from licet_sidecar.services.approval import ApprovalService, Malformed, NotReady

SERVICE: Final = "licet.v1.ApprovalService"
SOCKET_PROBE_S: Final = 0.5
DEADLINE_DEFAULT_S: Final = 5.0
"""For callers that set none."""


class ListenError(Exception):
    """An address cannot be served. The message says which, why and what to do."""


class GrpcEdge:
    """The gRPC server of a sidecar."""

    def __init__(self, service: ApprovalService, *, message_bytes_max: int) -> None:
        self._service = service
        self._logger = Logger("grpc")
        self._server = aio.server(
            options=[
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.so_reuseport", 0),  # a taken port must be an error, not a second server that steals calls
            ]
        )
        self._health = health_aio.HealthServicer()
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Check": grpc.unary_unary_rpc_method_handler(self._unary("Check")),
            "CheckBatch": grpc.unary_unary_rpc_method_handler(self._unary("CheckBatch")),
            "Reserve": grpc.unary_unary_rpc_method_handler(self._unary("Reserve")),
            "CommitReservation": grpc.unary_unary_rpc_method_handler(self._unary("CommitReservation")),
            "CancelReservation": grpc.unary_unary_rpc_method_handler(self._unary("CancelReservation")),
            "ExtendReservation": grpc.unary_unary_rpc_method_handler(self._unary("ExtendReservation")),
            "CheckStream": grpc.stream_stream_rpc_method_handler(self._check_stream),
            "AcquireSeat": grpc.unary_unary_rpc_method_handler(self._unary("AcquireSeat")),
            "RenewSeat": grpc.unary_unary_rpc_method_handler(self._unary("RenewSeat")),
            "ReleaseSeat": grpc.unary_unary_rpc_method_handler(self._unary("ReleaseSeat")),
            "Explain": grpc.unary_unary_rpc_method_handler(self._unary("Explain")),
            "ListEntitlements": grpc.unary_unary_rpc_method_handler(self._unary("ListEntitlements")),
            "RequestAccess": grpc.unary_unary_rpc_method_handler(self._unary("RequestAccess")),
            "GetAccessRequest": grpc.unary_unary_rpc_method_handler(self._unary("GetAccessRequest")),
            "WatchAccessRequest": grpc.unary_stream_rpc_method_handler(self._watch),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), self._server)

    async def start(self, addresses: Sequence[str]) -> list[str]:
        """Serves the addresses; returns them with the ports that were chosen for port 0.

        Raises:
            ListenError: one of them cannot be served.
        """
        served = []
        for address in addresses:
            if address.startswith("unix:"):
                _clear_stale_socket(Path(address.removeprefix("unix:")))
            try:
                port = self._server.add_insecure_port(address)
            except RuntimeError as error:
                raise ListenError(
                    f"cannot listen on {address}: the port is taken or the address is not of this machine;"
                    " stop what uses it, or choose another with --listen"
                ) from error
            served.append(address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}")
        await self.set_ready(False)  # before the first probe can ask
        await self._server.start()
        return served

    async def set_ready(self, ready: bool) -> None:
        """What gRPC health checks are told."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", status)
        await self._health.set(SERVICE, status)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, and lets those under way finish for ``grace_s`` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    def _unary(self, method: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        handle = self._service.handle

        async def call(request: bytes, context: Any) -> bytes:
            remaining_s = context.time_remaining()
            try:
                answer = handle(method, request, DEADLINE_DEFAULT_S if remaining_s is None else remaining_s)
                return answer if isinstance(answer, bytes) else await answer
            except (Malformed, NotReady) as error:
                return await _abort(context, error)

        return call

    async def _watch(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            async for message in self._service.stream("WatchAccessRequest", request):
                yield message
        except (Malformed, NotReady) as error:
            await _abort(context, error)

    async def _check_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        check = self._unary("CheckStream")
        async for request in requests:
            yield await check(request, context)


async def _abort(context: Any, error: Malformed | NotReady) -> bytes:
    code = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, Malformed) else grpc.StatusCode.UNAVAILABLE
    await context.abort(code, str(error))
    raise AssertionError("abort raises")


def _clear_stale_socket(path: Path) -> None:
    """Removes a socket that a killed process left.

    Raises:
        ListenError: somebody serves it, perhaps a sidecar with another state directory.
    """
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(SOCKET_PROBE_S)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ListenError(
        f"cannot listen on unix:{path}: another process serves it; stop that one, or choose another with --listen"
    )
