"""A real gRPC server in this process that answers by script and remembers what it was asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc

from licet.v1 import approval_pb2 as pb
from licet.v1 import approval_pb2_grpc as pb_grpc

Script = Callable[[pb.CheckRequest], pb.CheckResponse]


class Refusal(Exception):
    """Scripted instead of an answer: fails the call with a gRPC status."""

    def __init__(self, code: grpc.StatusCode, details: str = "") -> None:
        super().__init__(details)
        self.code = code
        self.details = details


def approved(request: pb.CheckRequest | None = None, **fields: Any) -> pb.CheckResponse:
    return pb.CheckResponse(effect=pb.EFFECT_APPROVED, reason=pb.REASON_OK, decision_id="0" * 32, revision=1, **fields)


def denied(reason: pb.Reason.ValueType = pb.REASON_QUOTA_EXHAUSTED, **fields: Any) -> pb.CheckResponse:
    return pb.CheckResponse(effect=pb.EFFECT_DENIED, reason=reason, decision_id="1" * 32, revision=1, **fields)


class ScriptedSidecar(pb_grpc.ApprovalServiceServicer):
    """Answers with what was scripted, in order; when nothing is left, with ``default``.

    ``requests`` holds every check it was asked, ``calls`` counts calls and ``timeouts_s`` the deadlines they came with.
    """

    def __init__(self, default: Script = approved) -> None:
        self.default = default
        self.scripted: deque[pb.CheckResponse | Refusal] = deque()
        self.requests: list[pb.CheckRequest] = []
        self.batches: list[pb.CheckBatchRequest] = []
        self.watches: deque[list[pb.AccessRequest | Refusal]] = deque()
        """What each watch of an access request is told."""
        self.asked: list[pb.RequestAccessRequest | pb.GetAccessRequestRequest] = []
        self.calls = 0
        self.timeouts_s: list[float] = []
        self.target = ""
        self._server: grpc.Server | None = None

    def start(self, address: str = "127.0.0.1:0") -> Self:
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4))
        pb_grpc.add_ApprovalServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self._server.start()
        return self

    def stop(self) -> None:
        assert self._server is not None
        self._server.stop(grace=None).wait()

    def Check(self, request: pb.CheckRequest, context: Any) -> pb.CheckResponse:
        return self._answer(request, context)

    def CheckBatch(self, request: pb.CheckBatchRequest, context: Any) -> pb.CheckBatchResponse:
        self.batches.append(request)
        return pb.CheckBatchResponse(decisions=[self._answer(check, context) for check in request.checks])

    def CheckStream(self, request_iterator: Any, context: Any) -> Iterator[pb.CheckResponse]:
        for request in request_iterator:
            yield self._answer(request, context)

    def RequestAccess(self, request: pb.RequestAccessRequest, context: Any) -> pb.RequestAccessResponse:
        self.asked.append(request)
        decision = self._answer(request.check, context)
        if decision.effect != pb.EFFECT_PENDING:
            return pb.RequestAccessResponse(decision=decision)
        made = pb.AccessRequest(id=decision.access_request_id, state=pb.ACCESS_REQUEST_STATE_PENDING)
        return pb.RequestAccessResponse(decision=decision, request=made)

    def GetAccessRequest(self, request: pb.GetAccessRequestRequest, context: Any) -> pb.AccessRequest:
        self.asked.append(request)
        return pb.AccessRequest(id=request.access_request_id, tenant=request.tenant, state=99)

    def WatchAccessRequest(self, request: pb.GetAccessRequestRequest, context: Any) -> Iterator[pb.AccessRequest]:
        self.asked.append(request)
        for told in self.watches.popleft() if self.watches else ():
            if isinstance(told, Refusal):
                context.abort(told.code, told.details)
            else:
                yield told

    def _answer(self, request: pb.CheckRequest, context: Any) -> pb.CheckResponse:
        self.calls += 1
        self.timeouts_s.append(context.time_remaining())
        self.requests.append(request)
        answer = self.scripted.popleft() if self.scripted else self.default(request)
        if isinstance(answer, Refusal):
            context.abort(answer.code, answer.details)
        assert isinstance(answer, pb.CheckResponse)
        return answer
