"""What can go wrong with a call. A denial is not among it: that is an answer, a ``Decision``."""

from __future__ import annotations

import re
from typing import Final

import grpc

_FIELD: Final = re.compile(r"([A-Za-z_]\S*): ")
"""How a sidecar begins the message of INVALID_ARGUMENT: ``quantities['input']: must be …``."""

_NOT_READY: Final = "this sidecar has no state to decide from yet"
"""How a sidecar that runs, but has synced nothing, begins the message of UNAVAILABLE."""


class LicetError(Exception):
    """Base of every error of the SDK."""


class InvalidRequest(LicetError, ValueError):
    """The request is malformed; asking again as it is will fail again.

    ``field`` names the part that is wrong, as in the proto (``subject.roles``); empty when it is not known.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class MessageTooLarge(LicetError):
    """The request is larger than the sidecar accepts; send a smaller context, or fewer checks in a batch."""


class SidecarUnavailable(LicetError, ConnectionError):
    """The sidecar cannot be reached, or has not synced anything yet. The ``fallback`` applies."""


class Timeout(LicetError, TimeoutError):
    """No answer within the deadline. The sidecar may have decided and recorded all the same. The ``fallback`` applies.

    To learn what was decided, ask again with the same ``idempotency_key``.
    """


class SidecarError(LicetError):
    """The sidecar failed in a way that the protocol does not describe: a defect, or a version that does not fit.

    ``code`` is the name of the gRPC status, such as ``INTERNAL``.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


def from_status(code: grpc.StatusCode, details: str | None, *, target: str) -> LicetError:
    """The error for a gRPC status. ``target`` is named in the messages, so that they say which sidecar to look at."""
    details = details or "no details given"
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            named = _FIELD.match(details)
            return InvalidRequest(details, field=named[1] if named else "")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return MessageTooLarge(f"the sidecar at {target} did not take the message: {details}")
        case grpc.StatusCode.UNAVAILABLE:
            if details.startswith(_NOT_READY):  # it is there, and says itself what it waits for
                return SidecarUnavailable(f"the sidecar at {target} is not ready: {details}")
            return SidecarUnavailable(
                f"no answer from the sidecar at {target}: {details}. Is it running, and is LICET_SIDECAR right?"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return Timeout(f"the sidecar at {target} did not answer within the deadline")
        case _:
            return SidecarError(f"the sidecar at {target} failed with {code.name}: {details}", code=code.name)
