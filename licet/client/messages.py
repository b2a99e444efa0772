"""Requests from checks, decisions from responses: pure functions, the same for both clients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from licet.client.errors import InvalidRequest, SidecarError
from licet.client.model import (
    Check,
    ContextValue,
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
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb

BATCH_CHECKS_MAX: Final = 1_000
"""As the proto says; refused here so that the caller learns it without a round trip."""

_IDEMPOTENCY_KEY_BYTES: Final = 16
"""As random as a UUID, at a fifth of its cost."""

_EFFECTS: Final = {effect.value: effect for effect in Effect}
_REASONS: Final = {reason.value: reason for reason in Reason}


def new_idempotency_key() -> str:
    """128 random bits as 32 hex digits. From the kernel, so that forked processes never share keys."""
    return os.urandom(_IDEMPOTENCY_KEY_BYTES).hex()


def check_request(check: Check) -> pb.CheckRequest:
    """The message for ``check``, always with an idempotency key.

    Raises:
        InvalidRequest: a value has the wrong type or does not fit its field; whether it makes sense is for the
            sidecar to say.
    """
    if check.quantity is not None and check.quantities is not None:
        raise InvalidRequest("quantity: give quantity or quantities, not both", field="quantity")
    try:
        request = pb.CheckRequest(
            tenant=check.tenant,
            action=check.action,
            idempotency_key=check.idempotency_key or new_idempotency_key(),
            mode=pb.MODE_PEEK if check.peek else pb.MODE_CONSUME,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"tenant, action and idempotency_key are strings: {error}") from error
    if check.quantity is not None:
        request.quantity = units_of(check.quantity, "quantity")
    if check.quantities is not None:
        for meter, units in check.quantities.items():
            request.quantities[meter] = units_of(units, f"quantities.{meter}")
    if check.subject is not None:
        _set_subject(request.subject, check.subject)
    if check.resource is not None:
        _set_resource(request.resource, check.resource)
    if check.context:
        _set_values(request.context, check.context, "context")
    return request


def batch_request(checks: Sequence[Check], semantics: Semantics) -> pb.CheckBatchRequest:
    """The message for several checks.

    Raises:
        InvalidRequest: none or more than ``BATCH_CHECKS_MAX`` checks, or one of them is malformed; the field then
            begins with its place, ``checks[3].quantity``.
    """
    if not 1 <= len(checks) <= BATCH_CHECKS_MAX:
        raise InvalidRequest(f"checks: a batch holds 1 to {BATCH_CHECKS_MAX} checks, not {len(checks)}", field="checks")
    batch = pb.CheckBatchRequest(semantics=pb.BatchSemantics.ValueType(semantics.value))
    for index, check in enumerate(checks):
        try:
            batch.checks.append(check_request(check))
        except InvalidRequest as error:
            field = f"checks[{index}].{error.field}" if error.field else f"checks[{index}]"
            raise InvalidRequest(f"checks[{index}]: {error}", field=field) from error
    return batch


def decision_of(response: pb.CheckResponse) -> Decision:
    """The decision a response carries.

    Raises:
        SidecarError: the effect is one that this SDK does not know; taking it for a yes or a no would be a guess.
    """
    return Decision(
        effect=effect_of(response.effect),
        reason=reason_of(response.reason),
        message=response.message,
        rule=response.rule,
        revision=response.revision,
        as_of=_datetime(response.as_of) if response.HasField("as_of") else None,
        stale=response.stale,
        degraded=response.degraded,
        quotas=tuple([quota_of(quota) for quota in response.quotas]) if response.quotas else (),
        cost=Cost(response.cost.amount_nanos, response.cost.currency) if response.HasField("cost") else None,
        retry_after=_timedelta(response.retry_after) if response.HasField("retry_after") else None,
        decision_id=response.decision_id,
        access_request_id=response.access_request_id,
        metadata=dict(response.metadata) if response.metadata else {},
    )


def effect_of(number: int) -> Effect:
    """The effect a response carries.

    Raises:
        SidecarError: it is one that this SDK does not know.
    """
    effect = _EFFECTS.get(number)
    if effect is None:
        raise SidecarError(
            f"the sidecar answered with effect {number}, which this SDK does not know: upgrade licet",
            code="UNKNOWN_EFFECT",
        )
    return effect


def reason_of(number: int) -> Reason:
    """The reason a response carries; one that is not known here keeps its number."""
    return _REASONS.get(number) or _reason_from_a_newer_sidecar(number)


def decisions_of(response: pb.CheckBatchResponse) -> list[Decision]:
    """The decisions of a batch, in the order of its checks; fewer than them when its semantics stopped early."""
    return [decision_of(decision) for decision in response.decisions]


def seat_of(response: pb.AcquireSeatResponse) -> Seat:
    """The seat a response carries.

    Raises:
        SidecarError: as ``decision_of``.
    """
    return Seat(
        decision=decision_of(response.decision),
        seat_id=response.seat_id,
        heartbeat=_timedelta(response.heartbeat) if response.HasField("heartbeat") else None,
        expires_at=_datetime(response.expires_at) if response.HasField("expires_at") else None,
        seats=response.seats,
        taken=response.seats_taken,
    )


def renewal_of(response: pb.RenewSeatResponse) -> SeatRenewal:
    """The renewal a response carries."""
    return SeatRenewal(
        state=seat_state_of(response.state),
        expires_at=_datetime(response.expires_at) if response.HasField("expires_at") else None,
        degraded=response.degraded,
    )


def seat_state_of(number: int) -> SeatState:
    """The state a response carries.

    Raises:
        SidecarError: it is one that this SDK does not know.
    """
    try:
        return SeatState(number)
    except ValueError as error:
        raise SidecarError(
            f"the sidecar answered with seat state {number}, which this SDK does not know: upgrade licet",
            code="UNKNOWN_SEAT_STATE",
        ) from error


def units_of(units: int, field: str) -> int:
    """``units`` when they fit the field.

    Raises:
        InvalidRequest: they do not.
    """
    # A float would lose units silently and a bool is a slip, so neither is converted.
    if type(units) is not int:
        raise InvalidRequest(f"{field}: must be a whole number of units, not {units!r}", field=field)
    if not -(2**63) <= units < 2**63:
        raise InvalidRequest(f"{field}: {units} does not fit in 64 bits", field=field)
    return units


def _set_subject(message: pb.Subject, subject: Subject | str) -> None:
    try:
        if isinstance(subject, str):
            message.id = subject
            return
        message.id = subject.id
        message.type = subject.type
        message.on_behalf_of = subject.on_behalf_of
        message.roles.extend([subject.roles] if isinstance(subject.roles, str) else subject.roles)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"subject: must be an id or a licet.Subject of strings: {error}", field="subject"
        ) from error
    if subject.attributes:
        _set_values(message.attributes, subject.attributes, "subject.attributes")


def _set_resource(message: pb.Resource, resource: Resource | str) -> None:
    try:
        if isinstance(resource, str):
            message.id = resource
            return
        message.id = resource.id
        message.type = resource.type
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"resource: must be an id or a licet.Resource of strings: {error}", field="resource"
        ) from error
    if resource.attributes:
        _set_values(message.attributes, resource.attributes, "resource.attributes")


def _set_values(target: Mapping[str, pb.Value], values: Mapping[str, ContextValue], field: str) -> None:
    for name, value in values.items():
        try:
            _set_value(target[name], value)  # reading a key of a protobuf message map creates it
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"{field}.{name}: {value!r} is not a string, a 64-bit int, a float, a bool, a datetime with a zone"
                f" or a list of strings ({error})",
                field=f"{field}.{name}",
            ) from error


def _set_value(message: pb.Value, value: ContextValue) -> None:
    match value:
        case str():
            message.string_value = value
        case bool():  # before int, whose subclass it is
            message.bool_value = value
        case int():
            message.int_value = value
        case float():
            message.double_value = value
        case datetime():
            if value.tzinfo is None:
                raise ValueError("it has no time zone")
            message.timestamp_value.FromDatetime(value)
        case list() | tuple() | set() | frozenset():
            message.list_value.values.extend(value)
            message.list_value.SetInParent()  # an empty list is a value too
        case _:
            raise TypeError(f"its type is {type(value).__name__}")


def quota_of(quota: pb.QuotaState) -> Quota:
    """The quota a response carries."""
    return Quota(
        feature=quota.feature,
        window=quota.window,
        limit=quota.limit,
        remaining=quota.remaining,
        resets_at=_datetime(quota.resets_at) if quota.HasField("resets_at") else None,
        overage=quota.overage,
        currency=quota.currency,
        limit_key=quota.limit_key,
        scope=tuple(quota.scope),
        grant_id=quota.grant,
        burst=quota.burst,
    )


def _datetime(timestamp: Timestamp) -> datetime:
    return datetime.fromtimestamp(timestamp.seconds, UTC).replace(microsecond=timestamp.nanos // 1_000)


def _timedelta(duration: Duration) -> timedelta:
    return timedelta(seconds=duration.seconds, microseconds=duration.nanos / 1_000)


@lru_cache(maxsize=64)
def _reason_from_a_newer_sidecar(number: int) -> Reason:
    # The effect is known, so the answer stands; only its reason has no name here yet. A pseudo-member keeps the number
    # for logs and compares unequal to every reason that is known.
    reason = int.__new__(Reason, number)
    reason._name_ = f"REASON_{number}"
    reason._value_ = number
    return reason
