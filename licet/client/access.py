"""Access requests: what both clients send and read. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from licet.client.messages import check_request, decision_of
from licet.client.model import Check, Decision
from licet.v1 import approval_pb2 as pb

WATCH_PAUSE_S: Final = 0.5
"""Before a watch that broke is begun again."""


class AccessRequestState(IntEnum):
    """What became of an access request. Only ``PENDING`` is not final."""

    PENDING = 1
    APPROVED = 2
    """It may have ended since: see ``AccessRequest.ends_at``."""
    DENIED = 3
    EXPIRED = 4
    """Nobody decided in time."""
    REVOKED = 5
    """Approved, and taken back."""
    UNKNOWN = 6
    """The sidecar knows of none: never made, or decided more than a day ago. Also a state this client does not know."""


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """An access request as a sidecar knows it. True exactly when it is ``APPROVED``.

    ``confirmed`` says of a pending one that people can see it already. ``units`` is what an approval is for, in all,
    ``None`` for any number. ``as_of``, ``stale`` and ``degraded`` are as in a ``Decision``: what was decided after
    ``as_of`` is not known here.
    """

    id: str
    tenant: str
    state: AccessRequestState
    confirmed: bool = False
    expires_at: datetime | None = None
    approved_at: datetime | None = None
    ends_at: datetime | None = None
    units: int | None = None
    decided_by: str = ""
    reason: str = ""
    as_of: datetime | None = None
    stale: bool = False
    degraded: bool = False

    @property
    def is_final(self) -> bool:
        """Whether nothing more will be decided, but for an approval that is revoked."""
        return self.state is not AccessRequestState.PENDING

    def __bool__(self) -> bool:
        return self.state is AccessRequestState.APPROVED


@dataclass(frozen=True, slots=True)
class AskedAccess:
    """The answer to asking for access. ``request`` is ``None`` unless ``decision`` waits for one, or was denied one:
    where the decision is ``APPROVED`` none is needed, and where a rule or a limit denies none would help."""

    decision: Decision
    request: AccessRequest | None = None


def access_request_message(check: Check, justification: str) -> pb.RequestAccessRequest:
    """The message that asks for access.

    Raises:
        InvalidRequest: as ``check_request``.
    """
    return pb.RequestAccessRequest(check=check_request(check), justification=justification)


def asked_of(response: pb.RequestAccessResponse) -> AskedAccess:
    """What a response says.

    Raises:
        SidecarError: as ``decision_of``.
    """
    request = access_request_of(response.request) if response.HasField("request") else None
    return AskedAccess(decision_of(response.decision), request)


def access_request_of(message: pb.AccessRequest) -> AccessRequest:
    """The request that a message describes."""
    try:
        state = AccessRequestState(message.state)
    except ValueError:  # a newer sidecar's
        state = AccessRequestState.UNKNOWN
    return AccessRequest(
        id=message.id,
        tenant=message.tenant,
        state=state,
        confirmed=message.confirmed,
        expires_at=_instant(message.expires_at) if message.HasField("expires_at") else None,
        approved_at=_instant(message.approved_at) if message.HasField("approved_at") else None,
        ends_at=_instant(message.ends_at) if message.HasField("ends_at") else None,
        units=message.units or None,
        decided_by=message.decided_by,
        reason=message.reason,
        as_of=_instant(message.as_of) if message.HasField("as_of") else None,
        stale=message.stale,
        degraded=message.degraded,
    )


def _instant(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)
