"""Licet: ask whether a tenant may do something, now, at this cost, and get the answer from a sidecar on localhost.

    import licet

    client = licet.Client()
    decision = client.check("acme", "llm.generate", subject="ada", quantities={"input": 812, "output": 64})
    if decision.approved:
        ...

The names below are the public interface of the SDK. They are loaded when first used, so that ``import licet`` stays
light for the programs that share this package and need only a part of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from licet.client.access import AccessRequest, AccessRequestState, AskedAccess
    from licet.client.aio import AsyncClient
    from licet.client.blocking import Client
    from licet.client.errors import (
        InvalidRequest,
        LicetError,
        MessageTooLarge,
        SidecarError,
        SidecarUnavailable,
        Timeout,
    )
    from licet.client.explanations import Entitlements, Explanation
    from licet.client.holding import SeatHolding
    from licet.client.model import (
        Check,
        Cost,
        Decision,
        Quota,
        Resource,
        Seat,
        SeatRenewal,
        SeatState,
        Semantics,
        Subject,
    )
    from licet.client.reservations import AsyncReservation, Reservation, ReservationState, Settlement
    from licet.domain.outcomes import Effect, Reason

_HOMES: Final = {
    "AccessRequest": "licet.client.access",
    "AccessRequestState": "licet.client.access",
    "AskedAccess": "licet.client.access",
    "AsyncClient": "licet.client.aio",
    "AsyncReservation": "licet.client.reservations",
    "Check": "licet.client.model",
    "Client": "licet.client.blocking",
    "Cost": "licet.client.model",
    "Decision": "licet.client.model",
    "Effect": "licet.domain.outcomes",
    "Entitlements": "licet.client.explanations",
    "Explanation": "licet.client.explanations",
    "InvalidRequest": "licet.client.errors",
    "LicetError": "licet.client.errors",
    "MessageTooLarge": "licet.client.errors",
    "Quota": "licet.client.model",
    "Reason": "licet.domain.outcomes",
    "Reservation": "licet.client.reservations",
    "ReservationState": "licet.client.reservations",
    "Resource": "licet.client.model",
    "Seat": "licet.client.model",
    "SeatHolding": "licet.client.holding",
    "SeatRenewal": "licet.client.model",
    "SeatState": "licet.client.model",
    "Semantics": "licet.client.model",
    "Settlement": "licet.client.reservations",
    "SidecarError": "licet.client.errors",
    "SidecarUnavailable": "licet.client.errors",
    "Subject": "licet.client.model",
    "Timeout": "licet.client.errors",
}

__all__ = [
    "AccessRequest",
    "AccessRequestState",
    "AskedAccess",
    "AsyncClient",
    "AsyncReservation",
    "Check",
    "Client",
    "Cost",
    "Decision",
    "Effect",
    "Entitlements",
    "Explanation",
    "InvalidRequest",
    "LicetError",
    "MessageTooLarge",
    "Quota",
    "Reason",
    "Reservation",
    "ReservationState",
    "Resource",
    "Seat",
    "SeatHolding",
    "SeatRenewal",
    "SeatState",
    "Semantics",
    "Settlement",
    "SidecarError",
    "SidecarUnavailable",
    "Subject",
    "Timeout",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'licet' has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
