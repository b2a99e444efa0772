"""The synchronous client. Safe to share between threads; make it after a fork, not before."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self, TypeVar, cast

import grpc
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
    ExpiresAfter,
    Extension,
    Reservation,
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

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)


class Client:
    """Asks one sidecar, over one connection.

    Args:
        target: ``host:port`` or ``unix:/path`` of *one* sidecar; by default ``$LICET_SIDECAR``, else 127.0.0.1:7420.
        timeout: seconds each call may take, retries included.
        fallback: what answers when the sidecar is away: ``"raise"``, ``"deny"``, ``"allow"``, or a function of the
            check and the error that returns a decision or whether to allow. It never hides a malformed request.

    Raises:
        ValueError: ``target`` or ``fallback`` is not one.
    """

    def __init__(
        self, target: str | None = None, *, timeout: float = TIMEOUT_DEFAULT_S, fallback: Fallback = "raise"
    ) -> None:
        self.target = resolve_target(target)
        self._timeout_s = timeout
        self._fallback = check_fallback(fallback)
        self._channel = grpc.insecure_channel(self.target, options=CHANNEL_OPTIONS)
        self._stub = ApprovalServiceStub(self._channel)

    def check(
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
        """Whether ``tenant`` may do ``action`` now; when it may, its units are taken. May be repeated only with a key.

        Args:
            tenant: the customer account.
            action: what is asked, such as ``report.export``.
            subject: who acts, an id or a ``Subject`` with roles and attributes.
            quantity: units of the action's one meter; 1 when absent.
            quantities: units by meter, for an action with several.
            resource: what it is done to, an id or a ``Resource``.
            context: the attributes that the action declares.
            idempotency_key: the same key gives the same answer and takes the units once, for as long as the sidecar
                remembers it: ten minutes, or less under a heavy load. Made for you when absent.
            peek: decide only: take and record nothing.
            timeout: seconds, instead of the client's.
            fallback: instead of the client's.

        Raises:
            InvalidRequest: malformed; its ``field`` says where.
            MessageTooLarge: larger than the sidecar accepts.
            SidecarUnavailable: not reachable or not synced yet, and the fallback is to raise.
            Timeout: no answer in time, and the fallback is to raise. The units may have been taken.
            SidecarError: anything else.
        """
        check = Check(tenant, action, subject, quantity, quantities, resource, context, idempotency_key, peek)
        try:
            return decision_of(self._call(self._stub.Check, check_request(check), timeout))
        except LicetError as error:
            decision = fall_back(self._fallback if fallback is None else check_fallback(fallback), check, error)
            if decision is None:
                raise
            return decision

    def explain(
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
        """The decision that ``check`` would get, and every step of it with what was found. Takes and records nothing.

        Arguments are as for ``check``. No fallback answers: it is for people who want to know.

        Raises:
            InvalidRequest, MessageTooLarge, SidecarUnavailable, Timeout, SidecarError: as for ``check``.
        """
        check = Check(tenant, action, subject, quantity, quantities, resource, context, peek=True)
        return explanation_of(self._call(self._stub.Explain, explain_request(check), timeout))

    def list_entitlements(
        self,
        tenant: str,
        *,
        subject: Subject | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        timeout: float | None = None,
    ) -> Entitlements:
        """What a tenant's subject may do now and what remains, for pages that customers see. Takes and records nothing.

        Args:
            tenant: the customer account.
            subject: whose rollouts, roles and own limits count.
            context: attributes that conditions and scopes read, as far as they are known before a check.
            timeout: seconds, instead of the client's.

        Raises:
            InvalidRequest, MessageTooLarge, SidecarUnavailable, Timeout, SidecarError: as for ``check``.
        """
        request = entitlements_request(tenant, subject, context)
        return entitlements_of(self._call(self._stub.ListEntitlements, request, timeout))

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
    ) -> Reservation:
        """Decides as ``check`` does and, when approved, holds the units until they are committed, canceled, or expire.

        Use it as a context manager, or settle it yourself::

            with client.reserve("acme", "llm.generate", quantity=4_000) as held:
                if held:
                    held.commit(quantity=generate())

        Args:
            quantity: units to hold; as for ``check``, and so is everything that is not listed here.
            expires_after: how long to hold them: seconds or a ``timedelta``, 1 s to 7 days. By default as long as the
                action says, which also says whether they are canceled or committed then.
            timeout: seconds, also of the calls that settle it.

        Raises:
            LicetError: as ``check`` does.
        """
        check = Check(tenant, action, subject, quantity, quantities, resource, context, idempotency_key)
        try:
            response = self._call(self._stub.Reserve, reserve_request(check, expires_after), timeout)
        except LicetError as error:
            decision = fall_back(self._fallback if fallback is None else check_fallback(fallback), check, error)
            if decision is None:
                raise
            return Reservation(self, timeout, tenant, None, decision)
        return Reservation(self, timeout, tenant, response)

    def commit_reservation(
        self,
        tenant: str,
        reservation_id: str,
        *,
        quantity: int | None = None,
        quantities: Mapping[str, int] | None = None,
        timeout: float | None = None,
    ) -> Settlement:
        """Uses what was reserved, or so many units instead, with the sidecar that made the reservation.

        The same as ``Reservation.commit``, for whoever knows only the id. May be repeated.

        Raises:
            LicetError: as ``check`` does; there is no fallback, and what was reserved stays held.
        """
        request = commit_request(tenant, reservation_id, quantity, quantities)
        return settlement_of(self._call(self._stub.CommitReservation, request, timeout))

    def cancel_reservation(self, tenant: str, reservation_id: str, *, timeout: float | None = None) -> ReservationState:
        """Frees what was reserved; as ``commit_reservation``."""
        request = pb.CancelReservationRequest(tenant=tenant, reservation_id=reservation_id)
        return state_of((self._call(self._stub.CancelReservation, request, timeout)).state)

    def extend_reservation(
        self, tenant: str, reservation_id: str, expires_after: ExpiresAfter = None, *, timeout: float | None = None
    ) -> Extension:
        """Holds a reservation for ``expires_after`` from now on; as ``commit_reservation``."""
        request = extend_request(tenant, reservation_id, expires_after)
        return extension_of(self._call(self._stub.ExtendReservation, request, timeout))

    def request_access(
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
        """Asks people to approve what a check would answer ``PENDING``, and tells them why. Takes nothing.

        A check that is answered ``PENDING`` has asked already; this adds words to its request. Arguments are as for
        ``check``; ``quantity`` is what is asked for. May be repeated: an open request stays the same.

        Args:
            justification: for whoever decides, at most 300 characters.

        Raises:
            LicetError: as ``check`` does; there is no fallback.
        """
        check = Check(tenant, action, subject, quantity, quantities, resource, context)
        return asked_of(self._call(self._stub.RequestAccess, access_request_message(check, justification), timeout))

    def get_access_request(self, tenant: str, access_request_id: str, *, timeout: float | None = None) -> AccessRequest:
        """What became of an access request, as far as the sidecar knows.

        Raises:
            LicetError: as ``check`` does; there is no fallback.
        """
        request = pb.GetAccessRequestRequest(tenant=tenant, access_request_id=access_request_id)
        return access_request_of(self._call(self._stub.GetAccessRequest, request, timeout))

    def watch_access_request(
        self, tenant: str, access_request_id: str, *, timeout: float | None = None
    ) -> Iterator[AccessRequest]:
        """An access request now and at each change; the last one is final.

        Args:
            timeout: seconds for all of it; no limit when absent.

        Raises:
            LicetError: the stream broke; what was yielded before is good.
        """
        request = pb.GetAccessRequestRequest(tenant=tenant, access_request_id=access_request_id)
        call = self._stub.WatchAccessRequest(request, timeout=timeout)
        try:
            for message in call:
                yield access_request_of(message)
        except grpc.RpcError as error:
            raise _translated(error, self.target) from error
        finally:
            call.cancel()

    def wait_for_approval(self, tenant: str, access_request_id: str, *, timeout: float) -> AccessRequest:
        """Waits until an access request is decided, through restarts of the sidecar; the state it then has.

        Args:
            timeout: seconds at most. What is returned then is still ``PENDING``, as last known.

        Raises:
            LicetError: no sidecar answered at all in that time, or the id is malformed.
        """
        deadline = time.monotonic() + timeout
        seen: AccessRequest | None = None
        while True:
            left_s = deadline - time.monotonic()
            try:
                for seen in self.watch_access_request(tenant, access_request_id, timeout=max(0.0, left_s)):
                    if seen.is_final:
                        return seen
            except (SidecarUnavailable, Timeout):
                if deadline - time.monotonic() <= WATCH_PAUSE_S:
                    if seen is None:
                        raise
                    return seen
            time.sleep(WATCH_PAUSE_S)

    def check_batch(
        self,
        checks: Sequence[Check],
        *,
        semantics: Semantics = Semantics.EXECUTE_ALL,
        timeout: float | None = None,
        fallback: Fallback | None = None,
    ) -> list[Decision]:
        """One decision for each of 1 to 1,000 checks, in order; fewer when ``semantics`` stopped early.

        When the sidecar is away, the fallback answers each of them (and does not stop early).

        Raises:
            LicetError: as ``check`` does.
        """
        try:
            return decisions_of(self._call(self._stub.CheckBatch, batch_request(checks, semantics), timeout))
        except LicetError as error:
            chosen = self._fallback if fallback is None else check_fallback(fallback)
            answers = [fall_back(chosen, check, error) for check in checks]
            if not answers or None in answers:
                raise
            return cast("list[Decision]", answers)

    def check_stream(self, checks: Iterable[Check], *, timeout: float | None = None) -> Iterator[Decision]:
        """Decisions in the order of ``checks``, which are read, on another thread, as the sidecar takes them.

        Cheaper than ``check`` where many come at once. No retries and no fallback: when the stream breaks, what became
        of the checks already sent is not known here. Give them idempotency keys, and ask again for those that have no
        answer.

        Args:
            checks: what to ask.
            timeout: seconds for the whole stream; no limit when absent.

        Raises:
            LicetError: the stream broke, or a check is malformed; decisions yielded before are good.
        """
        malformed: list[Exception] = []

        def requests() -> Iterator[pb.CheckRequest]:
            try:
                for check in checks:
                    yield check_request(check)
            except Exception as error:  # the caller's iterator or check; gRPC would only report "exception iterating"
                malformed.append(error)

        call = self._stub.CheckStream(requests(), timeout=timeout)
        try:
            for response in call:
                yield decision_of(response)
        except grpc.RpcError as error:
            raise _translated(error, self.target) from error
        finally:
            call.cancel()
        if malformed:
            raise malformed[0]

    def acquire_seat(
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
        """A seat of the feature that ``action`` draws on, for as long as it is renewed.

        Args:
            tenant, action, subject, resource, context, idempotency_key, peek, timeout, fallback: as for ``check``. The
                ``subject`` is required: it is the holder, and has one seat of a feature wherever it asks.

        Raises:
            LicetError: as ``check`` does.
        """
        check = Check(tenant, action, subject, None, None, resource, context, idempotency_key, peek)
        request = pb.AcquireSeatRequest(check=check_request(check))
        try:
            return seat_of(self._call(self._stub.AcquireSeat, request, timeout))
        except LicetError as error:
            decision = fall_back(self._fallback if fallback is None else check_fallback(fallback), check, error)
            if decision is None:
                raise
            return Seat(decision)

    def renew_seat(self, tenant: str, seat_id: str, *, timeout: float | None = None) -> SeatRenewal:
        """A heartbeat: keeps a seat. At least one in ``heartbeat``; after two without, the seat is taken back.

        Raises:
            LicetError: as ``check`` does. ``SidecarUnavailable`` also when nobody can say just now whether it is held.
        """
        request = pb.RenewSeatRequest(tenant=tenant, seat_id=seat_id)
        return renewal_of(self._call(self._stub.RenewSeat, request, timeout))

    def release_seat(self, tenant: str, seat_id: str, *, timeout: float | None = None) -> SeatState:
        """Gives a seat back. May be repeated.

        Raises:
            LicetError: as ``check`` does.
        """
        request = pb.ReleaseSeatRequest(tenant=tenant, seat_id=seat_id)
        return seat_state_of((self._call(self._stub.ReleaseSeat, request, timeout)).state)

    @contextmanager
    def hold_seat(
        self,
        tenant: str,
        action: str,
        *,
        subject: Subject | str,
        resource: Resource | str | None = None,
        context: Mapping[str, ContextValue] | None = None,
        on_lost: OnLost | None = None,
    ) -> Iterator[SeatHolding]:
        """Holds a seat while the block runs: acquires it, renews it on a thread, and releases it at the end.

        What it yields is true while the seat is held, and false from the start when none was given: its ``decision``
        says why. Look at it as often as the action should notice a loss, or pass ``on_lost``, which is called with the
        state, once, on that thread.

        Raises:
            LicetError: acquiring failed, as ``acquire_seat`` does. At the end nothing is raised: a seat that cannot be
                released ends by itself.
        """
        seat = self.acquire_seat(tenant, action, subject=subject, resource=resource, context=context)
        holding = SeatHolding(seat, on_lost)
        if not seat.seat_id:
            yield holding
            return
        done = threading.Event()

        def renew() -> None:
            going_on = True
            while going_on and not done.wait(holding.pause_s):
                try:
                    going_on = holding.renewed(self.renew_seat(tenant, seat.seat_id))
                except LicetError:
                    going_on = holding.unanswered()

        thread = threading.Thread(target=renew, name="licet-seat", daemon=True)
        thread.start()
        try:
            yield holding
        finally:
            done.set()
            thread.join()
            with suppress(LicetError):
                self.release_seat(tenant, seat.seat_id)

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        deadline = time.monotonic() + (self._timeout_s if timeout is None else timeout)
        attempt = 1
        while True:
            try:
                return method(request, timeout=max(0.0, deadline - time.monotonic()))
            except grpc.RpcError as error:
                failure = _translated(error, self.target)
                remaining_s = deadline - time.monotonic()
                pause_s = pause_before_retry_s(
                    failure, attempt=attempt, remaining_s=remaining_s, jitter=random.random()
                )
                if pause_s is None:
                    raise failure from error
            time.sleep(pause_s)
            attempt += 1

    def close(self) -> None:
        """Closes the connection; calls in flight fail. May be repeated."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _translated(error: grpc.RpcError, target: str) -> LicetError:
    call = cast("grpc.Call", error)  # every error of a call is one too; the types do not say so
    return from_status(call.code(), call.details(), target=target)
