"""The asynchronous client. Belongs to the event loop of its first call; not to be shared between loops or threads."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from licet.client.access import (
    WATCH_PAUSE_S,
    AccessRequest,
    AskedAccess,
    access_request_message,
    access_request_of,
    asked_of,
)
from licet.client.channel import CHANNEL_OPTIONS, TIMEOUT_DEFAULT_S, resolve_target
from licet.client.errors import LicetError, SidecarUnavailable, Timeout, from_status
from licet.client.explanations import (
    Entitlements,
    Explanation,
    entitlements_of,
    entitlements_request,
    explain_request,
    explanation_of,
)
from licet.client.failure import Fallback, check_fallback, fall_back, pause_before_retry_s
from licet.client.holding import OnLost, SeatHolding
from licet.client.messages import (
    batch_request,
    check_request,
    decision_of,
    decisions_of,
    renewal_of,
    seat_of,
    seat_state_of,
)
from licet.client.model import (
    Check,
    ContextValue,
    Decision,
    Resource,
    Seat,
    SeatRenewal,
    SeatState,
    Semantics,
    Subject,
)
from licet.client.reservations import (
    AsyncReservation,
    ExpiresAfter,
    Extension,
    PendingReservation,
    ReservationState,
    Settlement,
    commit_request,
    extend_request,
    extension_of,
    reserve_request,
    settlement_of,
    state_of,
)
from licet.v1 import approval_pb2 as pb
from licet.v1.approval_pb2_grpc import ApprovalServiceStub

if TYPE_CHECKING:
    from licet.v1.approval_pb2_grpc import ApprovalServiceAsyncStub

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)


class AsyncClient:
    """Asks one sidecar, over one connection. Takes what ``licet.Client`` takes and means the same.

    May be made outside an event loop: the connection is made by the first call. A ``fallback`` function is a plain
    one, not a coroutine.

    Raises:
        ValueError: ``target`` or ``fallback`` is not one.
    """

    def __init__(
        self, target: str | None = None, *, timeout: float = TIMEOUT_DEFAULT_S, fallback: Fallback = "raise"
    ) -> None:
        self.target = resolve_target(target)
        self._timeout_s = timeout
        self._fallback = check_fallback(fallback)
        self._channel: grpc.aio.Channel | None = None
        self._connected_stub: ApprovalServiceAsyncStub | None = None

    async def check(
        self,
        tenant: str,
        action: str,
        *,
        subject: Subject | str | None = None,
        quantity: int | None = None,
        quantities: Mapping[str, int] | None = None,
        resource: Resource | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        idempotency_key: str | None = None,
        peek: bool = False,
        timeout: float | None = None,
        fallback: Fallback | None = None,
    ) -> Decision:
        """As ``licet.Client.check``: same arguments, same units, same errors. Canceling it cancels the call."""
        check = Check(tenant, action, subject, quantity, quantities, resource, context, idempotency_key, peek)
        try:
            return decision_of(await self._call(self._stub().Check, check_request(check), timeout))
        except LicetError as error:
            decision = fall_back(self._fallback if fallback is None else check_fallback(fallback), check, error)
            if decision is None:
                raise
            return decision

    async def explain(
        self,
        tenant: str,
        action: str,
        *,
        subject: Subject | str | None = None,
        quantity: int | None = None,
        quantities: Mapping[str, int] | None = None,
        resource: Resource | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        timeout: float | None = None,
    ) -> Explanation:
        """As ``licet.Client.explain``."""
        check = Check(tenant, action, subject, quantity, quantities, resource, context, peek=True)
        return explanation_of(await self._call(self._stub().Explain, explain_request(check), timeout))

    async def list_entitlements(
        self,
        tenant: str,
        *,
        subject: Subject | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        timeout: float | None = None,
    ) -> Entitlements:
        """As ``licet.Client.list_entitlements``."""
        request = entitlements_request(tenant, subject, context)
        return entitlements_of(await self._call(self._stub().ListEntitlements, request, timeout))

    def reserve(
        self,
        tenant: str,
        action: str,
        *,
        subject: Subject | str | None = None,
        quantity: int | None = None,
        quantities: Mapping[str, int] | None = None,
        resource: Resource | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        idempotency_key: str | None = None,
        expires_after: ExpiresAfter = None,
        timeout: float | None = None,
        fallback: Fallback | None = None,
    ) -> PendingReservation:
        """As ``licet.Client.reserve``: to be awaited for an ``AsyncReservation``, or entered with ``async with``."""
        check = Check(tenant, action, subject, quantity, quantities, resource, context, idempotency_key)

        async def reserve() -> AsyncReservation:
            try:
                request = reserve_request(check, expires_after)
                response = await self._call(self._stub().Reserve, request, timeout)
            except LicetError as error:
                decision = fall_back(self._fallback if fallback is None else check_fallback(fallback), check, error)
                if decision is None:
                    raise
                return AsyncReservation(self, timeout, tenant, None, decision)
            return AsyncReservation(self, timeout, tenant, response)

        return PendingReservation(reserve)

    async def commit_reservation(
        self,
        tenant: str,
        reservation_id: str,
        *,
        quantity: int | None = None,
        quantities: Mapping[str, int] | None = None,
        timeout: float | None = None,
    ) -> Settlement:
        """As ``licet.Client.commit_reservation``."""
        request = commit_request(tenant, reservation_id, quantity, quantities)
        return settlement_of(await self._call(self._stub().CommitReservation, request, timeout))

    async def cancel_reservation(
        self, tenant: str, reservation_id: str, *, timeout: float | None = None
    ) -> ReservationState:
        """As ``licet.Client.cancel_reservation``."""
        request = pb.CancelReservationRequest(tenant=tenant, reservation_id=reservation_id)
        return state_of((await self._call(self._stub().CancelReservation, request, timeout)).state)

    async def extend_reservation(
        self, tenant: str, reservation_id: str, expires_after: ExpiresAfter = None, *, timeout: float | None = None
    ) -> Extension:
        """As ``licet.Client.extend_reservation``."""
        request = extend_request(tenant, reservation_id, expires_after)
        return extension_of(await self._call(self._stub().ExtendReservation, request, timeout))

    async def request_access(
        self,
        tenant: str,
        action: str,
        *,
        subject: Subject | str | None = None,
        quantity: int | None = None,
        quantities: Mapping[str, int] | None = None,
        resource: Resource | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        justification: str = "",
        timeout: float | None = None,
    ) -> AskedAccess:
        """As ``licet.Client.request_access``."""
        check = Check(tenant, action, subject, quantity, quantities, resource, context)
        message = access_request_message(check, justification)
        return asked_of(await self._call(self._stub().RequestAccess, message, timeout))

    async def get_access_request(
        self, tenant: str, access_request_id: str, *, timeout: float | None = None
    ) -> AccessRequest:
        """As ``licet.Client.get_access_request``."""
        request = pb.GetAccessRequestRequest(tenant=tenant, access_request_id=access_request_id)
        return access_request_of(await self._call(self._stub().GetAccessRequest, request, timeout))

    async def watch_access_request(
        self, tenant: str, access_request_id: str, *, timeout: float | None = None
    ) -> AsyncIterator[AccessRequest]:
        """As ``licet.Client.watch_access_request``."""
        request = pb.GetAccessRequestRequest(tenant=tenant, access_request_id=access_request_id)
        call = self._stub().WatchAccessRequest(request, timeout=timeout)
        try:
            async for message in call:
                yield access_request_of(message)
        except grpc.aio.AioRpcError as error:
            raise from_status(error.code(), error.details(), target=self.target) from error
        finally:
            call.cancel()

    async def wait_for_approval(self, tenant: str, access_request_id: str, *, timeout: float) -> AccessRequest:
        """As ``licet.Client.wait_for_approval``."""
        now = asyncio.get_running_loop().time
        deadline = now() + timeout
        seen: AccessRequest | None = None
        while True:
            watch = self.watch_access_request(tenant, access_request_id, timeout=max(0.0, deadline - now()))
            try:
                async for seen in watch:
                    if seen.is_final:
                        await cast("AsyncGenerator[AccessRequest, None]", watch).aclose()
                        return seen
            except (SidecarUnavailable, Timeout):
                if deadline - now() <= WATCH_PAUSE_S:
                    if seen is None:
                        raise
                    return seen
            await asyncio.sleep(WATCH_PAUSE_S)

    async def check_batch(
        self,
        checks: Sequence[Check],
        *,
        semantics: Semantics = Semantics.EXECUTE_ALL,
        timeout: float | None = None,
        fallback: Fallback | None = None,
    ) -> list[Decision]:
        """As ``licet.Client.check_batch``."""
        try:
            return decisions_of(await self._call(self._stub().CheckBatch, batch_request(checks, semantics), timeout))
        except LicetError as error:
            chosen = self._fallback if fallback is None else check_fallback(fallback)
            answers = [fall_back(chosen, check, error) for check in checks]
            if not answers or None in answers:
                raise
            return cast("list[Decision]", answers)

    async def check_stream(
        self, checks: AsyncIterable[Check] | Iterable[Check], *, timeout: float | None = None
    ) -> AsyncIterator[Decision]:
        """As ``licet.Client.check_stream``; ``checks`` may be an asynchronous iterable, and is read as it is taken."""
        malformed: list[Exception] = []

        async def requests() -> AsyncIterator[pb.CheckRequest]:
            try:
                if isinstance(checks, AsyncIterable):
                    async for check in checks:
                        yield check_request(check)
                else:
                    for check in checks:
                        yield check_request(check)
            except Exception as error:  # the caller's iterator or check; gRPC would only cancel the call
                malformed.append(error)

        call = self._stub().CheckStream(requests(), timeout=timeout)
        try:
            async for response in call:
                yield decision_of(response)
        except grpc.aio.AioRpcError as error:
            raise from_status(error.code(), error.details(), target=self.target) from error
        finally:
            call.cancel()
        if malformed:
            raise malformed[0]

    async def acquire_seat(
        self,
        tenant: str,
        action: str,
        *,
        subject: Subject | str,
        resource: Resource | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        idempotency_key: str | None = None,
        peek: bool = False,
        timeout: float | None = None,
        fallback: Fallback | None = None,
    ) -> Seat:
        """As ``licet.Client.acquire_seat``."""
        check = Check(tenant, action, subject, None, None, resource, context, idempotency_key, peek)
        request = pb.AcquireSeatRequest(check=check_request(check))
        try:
            return seat_of(await self._call(self._stub().AcquireSeat, request, timeout))
        except LicetError as error:
            decision = fall_back(self._fallback if fallback is None else check_fallback(fallback), check, error)
            if decision is None:
                raise
            return Seat(decision)

    async def renew_seat(self, tenant: str, seat_id: str, *, timeout: float | None = None) -> SeatRenewal:
        """As ``licet.Client.renew_seat``."""
        request = pb.RenewSeatRequest(tenant=tenant, seat_id=seat_id)
        return renewal_of(await self._call(self._stub().RenewSeat, request, timeout))

    async def release_seat(self, tenant: str, seat_id: str, *, timeout: float | None = None) -> SeatState:
        """As ``licet.Client.release_seat``."""
        request = pb.ReleaseSeatRequest(tenant=tenant, seat_id=seat_id)
        return seat_state_of((await self._call(self._stub().ReleaseSeat, request, timeout)).state)

    @asynccontextmanager
    async def hold_seat(
        self,
        tenant: str,
        action: str,
        *,
        subject: Subject | str,
        resource: Resource | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        on_lost: OnLost | None = None,
    ) -> AsyncIterator[SeatHolding]:
        """As ``licet.Client.hold_seat``; renews in a task, which also calls ``on_lost``, a plain function."""
        seat = await self.acquire_seat(tenant, action, subject=subject, resource=resource, context=context)
        holding = SeatHolding(seat, on_lost)
        if not seat.seat_id:
            yield holding
            return

        async def renew() -> None:
            going_on = True
            while going_on:
                await asyncio.sleep(holding.pause_s)
                try:
                    going_on = holding.renewed(await self.renew_seat(tenant, seat.seat_id))
                except LicetError:
                    going_on = holding.unanswered()

        task = asyncio.create_task(renew(), name="licet-seat")
        try:
            yield holding
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with suppress(LicetError):
                await self.release_seat(tenant, seat.seat_id)

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        now = asyncio.get_running_loop().time
        deadline = now() + (self._timeout_s if timeout is None else timeout)
        attempt = 1
        while True:
            try:
                return await method(request, timeout=max(0.0, deadline - now()))
            except grpc.aio.AioRpcError as error:
                failure = from_status(error.code(), error.details(), target=self.target)
                pause_s = pause_before_retry_s(
                    failure, attempt=attempt, remaining_s=deadline - now(), jitter=random.random()
                )
                if pause_s is None:
                    raise failure from error
            await asyncio.sleep(pause_s)
            attempt += 1

    def _stub(self) -> ApprovalServiceAsyncStub:
        if self._connected_stub is None:
            self._channel = grpc.aio.insecure_channel(self.target, options=CHANNEL_OPTIONS)
            self._connected_stub = ApprovalServiceStub(self._channel)
        return self._connected_stub

    async def close(self) -> None:
        """Closes the connection; calls in flight fail. May be repeated."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
