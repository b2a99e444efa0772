"""Reservations: what both clients send and read, and the handles they return.

A handle settles with the sidecar that made the reservation, through the client it came from. Settling is safe to
repeat: a sidecar gives the same answer again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self

from licet.client.errors import InvalidRequest, LicetError
from licet.client.messages import check_request, decision_of, units_of
from licet.client.model import Check, Decision
from licet.v1 import approval_pb2 as pb

ExpiresAfter = float | timedelta | None
"""Seconds, or a ``timedelta``: 1 s to 7 days. ``None``: as long as the action says."""


class ReservationState(IntEnum):
    """What became of a reservation. ``UNKNOWN``: this sidecar never made it, or settled it over ten minutes ago."""

    HELD = 1
    COMMITTED = 2
    CANCELED = 3
    EXPIRED = 4
    UNKNOWN = 5


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of a commit.

    ``committed`` are units by feature that were used out of a limit. ``unfunded`` are units used beyond the reservation
    that no limit had room for: recorded, and not approved. ``decision`` is ``None`` when nothing was decided, because
    the reservation had been canceled, had expired, or is not known.
    """

    state: ReservationState
    decision: Decision | None = None
    committed: Mapping[str, int] = field(default_factory=dict)
    unfunded: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether everything that was used was approved."""
        return self.state is ReservationState.COMMITTED and not self.unfunded and bool(self.decision)


class Extension(NamedTuple):
    """What became of an extension: ``HELD`` until ``expires_at``, or how the reservation was settled before."""

    state: ReservationState
    expires_at: datetime | None


NOTHING_HELD: Final = Settlement(ReservationState.UNKNOWN)
"""The settlement of what was answered without a reservation: a denial, or a fallback."""


def reserve_request(check: Check, expires_after: ExpiresAfter) -> pb.ReserveRequest:
    """The message for a reservation, always with an idempotency key.

    Raises:
        InvalidRequest: a value has the wrong type or does not fit its field.
    """
    request = pb.ReserveRequest(check=check_request(check))
    _set_expiry(request, expires_after)
    return request


def commit_request(
    tenant: str, id_: str, quantity: int | None, quantities: Mapping[str, int] | None
) -> pb.CommitReservationRequest:
    """The message for a commit; see ``reserve_request``."""
    if quantity is not None and quantities is not None:
        raise InvalidRequest("quantity: give quantity or quantities, not both", field="quantity")
    request = pb.CommitReservationRequest(tenant=tenant, reservation_id=id_)
    if quantity is not None:
        request.quantity = units_of(quantity, "quantity")
    for meter, units in (quantities or {}).items():
        request.quantities[meter] = units_of(units, f"quantities.{meter}")
    return request


def extend_request(tenant: str, id_: str, expires_after: ExpiresAfter) -> pb.ExtendReservationRequest:
    """The message for an extension; see ``reserve_request``."""
    request = pb.ExtendReservationRequest(tenant=tenant, reservation_id=id_)
    _set_expiry(request, expires_after)
    return request


def settlement_of(response: pb.CommitReservationResponse) -> Settlement:
    """What a commit's response says."""
    return Settlement(
        state=state_of(response.state),
        decision=decision_of(response.decision) if response.decision.reason else None,
        committed=dict(response.committed),
        unfunded=dict(response.unfunded),
    )


def extension_of(response: pb.ExtendReservationResponse) -> Extension:
    """What an extension's response says."""
    return Extension(state_of(response.state), _expiry_of(response))


def state_of(number: int) -> ReservationState:
    """The state of that number; ``UNKNOWN`` for one that a newer sidecar knows."""
    try:
        return ReservationState(number)
    except ValueError:
        return ReservationState.UNKNOWN


def _set_expiry(request: pb.ReserveRequest | pb.ExtendReservationRequest, expires_after: ExpiresAfter) -> None:
    if expires_after is None:
        return
    try:
        after = expires_after if isinstance(expires_after, timedelta) else timedelta(seconds=expires_after)
        request.expires_after.FromTimedelta(after)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"expires_after: {expires_after!r} is no duration", field="expires_after") from error


class Held:
    """The decision to reserve, and when it was approved what is needed to settle it.

    True exactly when the decision is approved. ``id`` is empty when nothing is held: a denial, a fallback, or an
    approval that could not be recorded. ``expires_at`` is when it is settled by itself.
    """

    def __init__(self, tenant: str, response: pb.ReserveResponse | None, decision: Decision | None = None) -> None:
        self.tenant = tenant
        if response is not None:
            decision = decision_of(response.decision)
        assert decision is not None, "a response, or the decision of a fallback"
        self.decision = decision
        self.id = response.reservation_id if response is not None else ""
        self.expires_at = _expiry_of(response) if response is not None else None
        self.settled = not self.id

    def __bool__(self) -> bool:
        return bool(self.decision)


def _expiry_of(response: pb.ReserveResponse | pb.ExtendReservationResponse) -> datetime | None:
    return response.expires_at.ToDatetime(UTC) if response.HasField("expires_at") else None


class _Settling(Protocol):
    """The calls that a handle needs of its client."""

    def commit_reservation(
        self,
        tenant: str,
        reservation_id: str,
        *,
        quantity: int | None = None,
        quantities: Mapping[str, int] | None = None,
        timeout: float | None = None,
    ) -> Settlement:
        """See ``Client``."""

    def cancel_reservation(self, tenant: str, reservation_id: str, *, timeout: float | None = None) -> ReservationState:
        """See ``Client``."""

    def extend_reservation(
        self, tenant: str, reservation_id: str, expires_after: ExpiresAfter = None, *, timeout: float | None = None
    ) -> Extension:
        """See ``Client``."""


class Reservation(Held):
    """What ``Client.reserve`` returns. As a context manager it commits what was reserved when the block ends without
    having settled it, and cancels when the block raises.
    """

    def __init__(
        self,
        client: _Settling,
        timeout: float | None,
        tenant: str,
        response: pb.ReserveResponse | None,
        decision: Decision | None = None,
    ) -> None:
        super().__init__(tenant, response, decision)
        self._client = client
        self._timeout = timeout

    def commit(self, *, quantity: int | None = None, quantities: Mapping[str, int] | None = None) -> Settlement:
        """Uses what was reserved, or so many units instead. May be repeated.

        Raises:
            LicetError: as ``Client.check`` does; what was reserved stays held then.
        """
        if not self.id:
            return NOTHING_HELD
        settlement = self._client.commit_reservation(
            self.tenant, self.id, quantity=quantity, quantities=quantities, timeout=self._timeout
        )
        self.settled = settlement.state is not ReservationState.HELD
        return settlement

    def cancel(self) -> ReservationState:
        """Frees what was reserved. May be repeated; raises as ``commit`` does."""
        if not self.id:
            return ReservationState.UNKNOWN
        state = self._client.cancel_reservation(self.tenant, self.id, timeout=self._timeout)
        self.settled = state is not ReservationState.HELD
        return state

    def extend(self, expires_after: ExpiresAfter = None) -> ReservationState:
        """Holds it for ``expires_after`` from now on. Raises as ``commit`` does."""
        if not self.id:
            return ReservationState.UNKNOWN
        extension = self._client.extend_reservation(self.tenant, self.id, expires_after, timeout=self._timeout)
        self.expires_at = extension.expires_at or self.expires_at
        return extension.state

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.settled:
            return
        if error is None:
            self.commit()
        else:
            with contextlib.suppress(LicetError):  # it expires by itself; the block's own error is what matters
                self.cancel()


class _AsyncSettling(Protocol):
    """The calls that a handle needs of its client."""

    async def commit_reservation(
        self,
        tenant: str,
        reservation_id: str,
        *,
        quantity: int | None = None,
        quantities: Mapping[str, int] | None = None,
        timeout: float | None = None,
    ) -> Settlement:
        """See ``Client``."""

    async def cancel_reservation(
        self, tenant: str, reservation_id: str, *, timeout: float | None = None
    ) -> ReservationState:
        """See ``Client``."""

    async def extend_reservation(
        self, tenant: str, reservation_id: str, expires_after: ExpiresAfter = None, *, timeout: float | None = None
    ) -> Extension:
        """See ``Client``."""


class AsyncReservation(Held):
    """What ``AsyncClient.reserve`` gives: as ``Reservation``, with methods to be awaited."""

    def __init__(
        self,
        client: _AsyncSettling,
        timeout: float | None,
        tenant: str,
        response: pb.ReserveResponse | None,
        decision: Decision | None = None,
    ) -> None:
        super().__init__(tenant, response, decision)
        self._client = client
        self._timeout = timeout

    async def commit(self, *, quantity: int | None = None, quantities: Mapping[str, int] | None = None) -> Settlement:
        """As ``Reservation.commit``."""
        if not self.id:
            return NOTHING_HELD
        settlement = await self._client.commit_reservation(
            self.tenant, self.id, quantity=quantity, quantities=quantities, timeout=self._timeout
        )
        self.settled = settlement.state is not ReservationState.HELD
        return settlement

    async def cancel(self) -> ReservationState:
        """As ``Reservation.cancel``."""
        if not self.id:
            return ReservationState.UNKNOWN
        state = await self._client.cancel_reservation(self.tenant, self.id, timeout=self._timeout)
        self.settled = state is not ReservationState.HELD
        return state

    async def extend(self, expires_after: ExpiresAfter = None) -> ReservationState:
        """As ``Reservation.extend``."""
        if not self.id:
            return ReservationState.UNKNOWN
        extension = await self._client.extend_reservation(self.tenant, self.id, expires_after, timeout=self._timeout)
        self.expires_at = extension.expires_at or self.expires_at
        return extension.state


class PendingReservation:
    """``await`` it for the ``AsyncReservation``, or enter it with ``async with``, which settles it at the end."""

    def __init__(self, reserve: Callable[[], Awaitable[AsyncReservation]]) -> None:
        self._reserve = reserve
        self._reservation: AsyncReservation | None = None

    def __await__(self) -> Generator[Any, None, AsyncReservation]:
        return self._reserve().__await__()

    async def __aenter__(self) -> AsyncReservation:
        self._reservation = await self._reserve()
        return self._reservation

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reservation = self._reservation
        if reservation is None or reservation.settled:
            return
        if error is None:
            await reservation.commit()
        else:
            with contextlib.suppress(LicetError):  # it expires by itself; the block's own error is what matters
                await reservation.cancel()
