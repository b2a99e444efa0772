"""A usage event as JSON, for people and for other programs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any, Final

from licet.domain.money import format_nanos
from licet.domain.outcomes import Effect, Reason
from licet.wire.usage import (
    FLAG_DEGRADED,
    FLAG_EXPIRED,
    FLAG_OBSERVED,
    FLAG_OVERAGE,
    FLAG_STALE,
    EventKind,
    UsageEvent,
    decision_id,
)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FLAGS: Final[Mapping[int, str]] = {
    FLAG_STALE: "stale",
    FLAG_DEGRADED: "degraded",
    FLAG_OVERAGE: "overage",
    FLAG_OBSERVED: "observed",
    FLAG_EXPIRED: "expired",
}


def event_json(log_id: str, decision_prefix: bytes, event: UsageEvent) -> dict[str, Any]:
    """Everything that an event of a log says."""
    return {
        "decision_id": decision_id(decision_prefix, event.seq),
        "log_id": log_id,
        "seq": event.seq,
        "at": _instant(event.at_us),
        "kind": _name(EventKind, event.kind),
        "tenant": event.tenant,
        "subject": {"type": event.subject_type, "id": event.subject_id, "on_behalf_of": event.on_behalf_of},
        "action": event.action,
        "effect": _name(Effect, event.effect),
        "reason": _name(Reason, event.reason),
        "rule": event.rule,
        "revision": event.revision,
        "units": dict(event.units),
        "units_held": dict(event.units_held),
        "unfunded": dict(event.unfunded),
        "cost": {"amount": format_nanos(event.cost_nanos), "currency": event.currency} if event.currency else None,
        "priced_as": dict(event.priced_as),
        "flags": [name for flag, name in _FLAGS.items() if event.flags & flag],
        "exposures": dict(event.exposures),
        "idempotency_key": event.idempotency_key,
        "resource": {"type": event.resource_type, "id": event.resource_id},
        "context": event.context,
        "spends": [{"quota": quota, "units": units} for quota, units in event.spends],
        "shadow": list(event.shadow),
        "about": event.about,
        "access_request_id": event.access_request_id,
        "justification": event.justification,
        "expires_at": _instant(event.expires_us) if event.expires_us else None,
    }


def _instant(at_us: int) -> str:
    return (_EPOCH + timedelta(microseconds=at_us)).isoformat().replace("+00:00", "Z")


def _name(known: type[IntEnum], value: int) -> str:
    try:
        return known(value).name
    except ValueError:  # a newer sidecar's
        return str(value)
