"""Effects and reasons of a decision. Numbers are those of ``licet.v1``; the short names are what people see."""

from __future__ import annotations

from enum import IntEnum


class Effect(IntEnum):
    """What a decision says."""

    APPROVED = 1
    DENIED = 2
    PENDING = 3


class Reason(IntEnum):
    """Why a decision says it. Stable and documented in ``docs/decisions.md``; never renumbered."""

    OK = 1
    OVERAGE = 2
    NO_LICENSE = 3
    LICENSE_EXPIRED = 4
    TENANT_SUSPENDED = 5
    UNKNOWN_ACTION = 6
    NOT_ENTITLED = 7
    FEATURE_OFF = 8
    ROLE_REQUIRED = 9
    POLICY_DENIED = 10
    POLICY_ERROR = 11
    APPROVAL_REQUIRED = 12
    QUOTA_EXHAUSTED = 13
    RATE_LIMITED = 14
    SEAT_UNAVAILABLE = 15
    STALE_POLICY = 16
    DEGRADED_ALLOW = 17
    DEGRADED_DENY = 18
    USAGE_LOG_FULL = 19
