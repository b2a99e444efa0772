"""What an operator publishes, in the form both programs act on: plain immutable records.

Owns the meaning of a published document after validation. As primitives that can be sent: ``catalog_wire``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self

from licet.domain.approvals import RequestEntry
from licet.domain.flags import Flag as Flag  # one of the documents, so that it is found here with the others
from licet.domain.ids import LimitKey
from licet.domain.money import Fee, Price
from licet.domain.redaction import RecordMode
from licet.domain.windows import Anchor, Period

Wire = dict[str, Any]


class AttributeType(StrEnum):
    """Types a declared context attribute can have. ``list`` is a list of strings."""

    STRING = "string"
    INT = "int"
    DOUBLE = "double"
    BOOL = "bool"
    LIST = "list"
    TIMESTAMP = "timestamp"


AttributeValue = str | int | float | bool | list[str]
"""A context attribute at run time. A timestamp travels as integer microseconds since the Unix epoch."""


class Durability(StrEnum):
    """What a decision survives once it was answered: the process, the node, or the pod and its volume."""

    LOGGED = "logged"
    SYNCED = "synced"
    SHIPPED = "shipped"


class UnavailableMode(StrEnum):
    """What an action does when its quota or fresh state cannot be had."""

    DENY = "deny"
    ALLOW = "allow"
    CAPPED = "capped"
    LAST_KNOWN = "last_known"


class OnExceeded(StrEnum):
    """What a limit does once it is reached."""

    DENY = "deny"
    OVERAGE = "overage"
    REQUIRE_APPROVAL = "require_approval"


class OnExpiry(StrEnum):
    """What becomes of a reservation that nobody settled in time."""

    CANCEL = "cancel"
    COMMIT = "commit"


class RuleEffect(StrEnum):
    """What a matching policy rule does."""

    ALLOW = "allow"
    DENY = "deny"
    REQUIRE_APPROVAL = "require_approval"


class Enforcement(StrEnum):
    """Whether what a policy or a limit says is answered (``enforce``), only recorded (``shadow``), or not computed
    (``off``)."""

    ENFORCE = "enforce"
    SHADOW = "shadow"
    OFF = "off"


class LicenseStatus(StrEnum):
    """Life of a license. Whether its term has ended is computed from the term, not stored."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    CANCELED = "canceled"


@dataclass(frozen=True, slots=True)
class Attribute:
    """A declared context attribute. ``default`` is ``None`` when the caller must send it; ``record`` is what events
    keep of it."""

    type: AttributeType
    default: AttributeValue | None = None
    record: RecordMode = RecordMode.KEEP


@dataclass(frozen=True, slots=True)
class Feature:
    """What is licensed. ``unit`` is the word for one of it, such as ``token``."""

    name: str
    unit: str = "unit"
    title: str = ""


@dataclass(frozen=True, slots=True)
class OnUnavailable:
    """``units_max`` bounds ``capped`` (units per window and sidecar); ``for_s_max`` bounds ``last_known`` (seconds)."""

    mode: UnavailableMode = UnavailableMode.DENY
    units_max: int = 0
    for_s_max: int = 0


@dataclass(frozen=True, slots=True)
class ReservationTerms:
    """How long a reservation of an action is held when the caller names no time, and what becomes of it then."""

    expires_after_s: int = 900
    on_expiry: OnExpiry = OnExpiry.CANCEL


@dataclass(frozen=True, slots=True)
class Action:
    """What can be asked. ``meters`` maps each meter to its feature; an action of one feature has the meter ``""``."""

    name: str
    meters: Mapping[str, str]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    durability: Durability = Durability.LOGGED
    on_unavailable: OnUnavailable = OnUnavailable()
    reservation: ReservationTerms = ReservationTerms()


@dataclass(frozen=True, slots=True)
class Limit:
    """At most ``amount`` of a feature in each ``per`` window, counted separately for each value of ``scope``.

    ``amount`` counts units or, when there is a ``currency``, nanos of it: a budget, spent at the plan's price. With
    ``per`` a second it is a rate: units a second over time, at most ``burst`` of them at once (0: as many as in a
    second). ``scope`` is a tuple of paths, ``"subject"`` or ``"context.<attribute>"``; empty means the whole tenant.
    ``durable``: what is leased is confirmed on disk and on replicas before it is spent.
    ``overage_price`` is what units beyond a soft limit cost on top of the feature's own price.
    ``enforcement`` ``shadow``: it counts and records what it would have said, and answers as if it were absent.
    ``key`` never depends on the amount or on the position in the file. It says whether units, money or a rate is
    counted under it (``budget_key``, ``rate_key``), because their counts must never mix.
    """

    key: LimitKey
    amount: int
    per: Period
    scope: tuple[str, ...] = ()
    on_exceeded: OnExceeded = OnExceeded.DENY
    anchor: Anchor = Anchor.CALENDAR
    currency: str = ""
    burst: int = 0
    durable: bool = False
    overage_price: Price | None = None
    enforcement: Enforcement = Enforcement.ENFORCE

    @property
    def is_rate(self) -> bool:
        """Whether it bounds units a second instead of units a window."""
        return self.per is Period.SECOND


@dataclass(frozen=True, slots=True)
class Grant:
    """A top-up of one limit of a license: ``amount`` more, once, between ``starts_s`` and ``ends_s`` (exclusive).

    What a check needs is taken from the plan's allowance and from grants in the order of ``priority``, the lowest
    first; the allowance has priority 0. Of grants with the same priority the one that ends first is used first.
    A grant is the whole tenant's, whatever the scope of its limit. ``amount``: units, or nanos for a budget.
    """

    id: str
    limit: LimitKey
    amount: int
    starts_s: int
    ends_s: int
    priority: int = 100

    @property
    def key(self) -> LimitKey:
        """The key its quota is counted under."""
        return grant_key(self.limit, self.id)


@dataclass(frozen=True, slots=True)
class Entitlement:
    """A feature as a plan grants it. ``seats`` 0 means the feature is not sold by seat.

    ``grants`` are the license's, of any of the limits, in the order they are used; a plan has none.
    ``included`` are units of each calendar month that cost nothing.
    """

    price: Price | None = None
    limits: tuple[Limit, ...] = ()
    seats: int = 0
    heartbeat_s: int = 0
    grants: tuple[Grant, ...] = ()
    included: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Features, limits and prices that are sold together. ``fee`` is owed for each month that the plan is held."""

    name: str
    features: Mapping[str, Entitlement]
    title: str = ""
    fee: Fee | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``when`` is CEL source; empty means always. ``approval`` names an approval chain."""

    name: str
    effect: RuleEffect
    when: str = ""
    approval: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules over the actions that match one of ``actions`` (exact names, ``prefix.*``, or ``*``)."""

    name: str
    actions: tuple[str, ...]
    rules: tuple[Rule, ...]
    enforcement: Enforcement = Enforcement.ENFORCE


@dataclass(frozen=True, slots=True)
class Role:
    """A role allows the actions that match one of ``actions``. An action that no role names needs no role."""

    name: str
    actions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ApprovalStage:
    """One stage of an approval chain; durations in seconds, 0 for never."""

    approvers: tuple[str, ...]
    need: int = 1
    escalate_after_s: int = 0
    escalate_to: tuple[str, ...] = ()
    deny_after_s: int = 0


@dataclass(frozen=True, slots=True)
class ApprovalChain:
    """Who must say yes, in which order."""

    name: str
    stages: tuple[ApprovalStage, ...]


Document = Feature | Action | Plan | Policy | Role | Flag | ApprovalChain


@dataclass(frozen=True, slots=True)
class Catalog:
    """All documents of one bundle, by name."""

    features: Mapping[str, Feature] = field(default_factory=dict)
    actions: Mapping[str, Action] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    flags: Mapping[str, Flag] = field(default_factory=dict)
    approval_chains: Mapping[str, ApprovalChain] = field(default_factory=dict)

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Self:
        """A catalog of ``documents``; a later one replaces an earlier one of the same kind and name."""
        kinds: dict[type[Document], dict[str, Any]] = {kind: {} for kind in _FIELD_OF_KIND}
        for document in documents:
            kinds[type(document)][document.name] = document
        return cls(**{field_name: kinds[kind] for kind, field_name in _FIELD_OF_KIND.items()})

    def documents(self) -> Iterable[Document]:
        """Every document, kinds in a fixed order, then by name."""
        for field_name in _FIELD_OF_KIND.values():
            by_name: Mapping[str, Document] = getattr(self, field_name)
            for name in sorted(by_name):
                yield by_name[name]


@dataclass(frozen=True, slots=True)
class Renewal:
    """By what a license is renewed: one ``period``, counted from ``anchor_s`` (seconds since the Unix epoch), so that
    what ended on a 31st ends on the last day of each shorter month and on the 31st again. ``auto``: by itself.
    """

    period: Period
    anchor_s: int = 0
    auto: bool = False


@dataclass(frozen=True, slots=True)
class PlannedPlan:
    """A change of plan that is due at ``at_s``, seconds since the Unix epoch."""

    plan: str
    at_s: int


@dataclass(frozen=True, slots=True)
class License:
    """A tenant's hold on a plan.

    ``starts_s`` and ``ends_s`` are seconds since the Unix epoch, ``ends_s`` exclusive and 0 for open-ended.
    ``addons`` maps plan names to counts, whose limit amounts are added that many times.
    ``overrides`` maps limit keys to amounts that replace the plan's. ``grants`` are top-ups. ``requests`` are the
    access requests of the tenant's subjects, the latest change last.
    ``grace_s``: for how long after its term it still answers. ``cancels``: it was canceled at the end of its term, so
    it is not renewed and has no grace. ``planned``: the plan it changes to later.
    """

    tenant: str
    plan: str
    status: LicenseStatus = LicenseStatus.ACTIVE
    starts_s: int = 0
    ends_s: int = 0
    addons: Mapping[str, int] = field(default_factory=dict)
    overrides: Mapping[str, int] = field(default_factory=dict)
    grants: tuple[Grant, ...] = ()
    requests: tuple[RequestEntry, ...] = ()
    grace_s: int = 0
    cancels: bool = False
    renewal: Renewal | None = None
    planned: PlannedPlan | None = None

    @property
    def stops_s(self) -> int:
        """When it stops answering: the end of its grace, exclusive; 0 for never."""
        return self.ends_s and self.ends_s + (0 if self.cancels else self.grace_s)

    @property
    def renews_itself(self) -> bool:
        """Whether its term becomes longer by itself. ``renewal.auto`` outlasts ``cancels``, which can be taken back."""
        return self.renewal is not None and self.renewal.auto and not self.cancels


_FIELD_OF_KIND: dict[type[Document], str] = {
    Feature: "features",
    Action: "actions",
    Plan: "plans",
    Policy: "policies",
    Role: "roles",
    Flag: "flags",
    ApprovalChain: "approval_chains",
}


# A name has no dot, but a scope does: `context.usd` is an attribute, `month@context.usd` a limit in units.
_BUDGET_KEY: Final = re.compile(r":[^:]+(?<![@+]context)\.([a-z]{3})\Z")
RATE_SUFFIX: Final = ".rate"
_RATE_KEY: Final = re.compile(r":[^:]+(?<![@+]context)\.rate\Z")


def budget_key(limit: LimitKey, currency: str) -> LimitKey:
    """``<feature>:<limit name>.<currency, lower case>``: the key of a limit in money.

    The currency is in it, so that a limit that is changed between units and money never mixes their counts.
    """
    return LimitKey(f"{limit}.{currency.lower()}")


def rate_key(limit: LimitKey) -> LimitKey:
    """``<feature>:<limit name>.rate``: the key of a limit per second.

    Its registers hold shares, in thousandths of a unit a second: a limit that is changed between a rate and units must
    not take one for the other.
    """
    return LimitKey(f"{limit}{RATE_SUFFIX}")


def is_rate_key(limit: str) -> bool:
    """Whether a limit with this key is one per second."""
    return bool(_RATE_KEY.search(limit))


def currency_of(limit: str) -> str:
    """The currency of a limit in money, from its key; empty for one in units."""
    match = _BUDGET_KEY.search(limit)
    return match[1].upper() if match else ""


def grant_key(limit: LimitKey, grant_id: str) -> LimitKey:
    """``<limit key>+<grant id>``: the key a grant's quota is counted under."""
    return LimitKey(f"{limit}+{grant_id}")


def seats_key(feature: str) -> LimitKey:
    """``<feature>#seats``: the key a feature's number of seats is published under."""
    return LimitKey(f"{feature}#seats")


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether ``name`` is one of ``patterns``: an exact name, ``prefix.*`` (any depth below ``prefix``), or ``*``."""
    return any(
        pattern in ("*", name) or (pattern.endswith(".*") and name.startswith(pattern[:-1])) for pattern in patterns
    )
