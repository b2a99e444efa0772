"""The records of the catalog as primitives that msgpack can carry, and back.

Refuses nothing a newer writer might add: unknown map keys are ignored, so that an older sidecar can read a newer
bundle. An unknown *enum value* raises ``ValueError``: acting on a rule that is only half understood is not safe.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from licet.domain.approvals import RequestEntry
from licet.domain.catalog import (
    Action,
    ApprovalChain,
    ApprovalStage,
    Attribute,
    AttributeType,
    Document,
    Durability,
    Enforcement,
    Entitlement,
    Feature,
    Grant,
    License,
    LicenseStatus,
    Limit,
    OnExceeded,
    OnExpiry,
    OnUnavailable,
    Plan,
    PlannedPlan,
    Policy,
    Renewal,
    ReservationTerms,
    Role,
    Rule,
    RuleEffect,
    UnavailableMode,
    Wire,
    is_rate_key,
)
from licet.domain.flags import FLAG_KINDS, flag_from_wire, flag_to_wire
from licet.domain.flags import Flag as Flag  # one of the documents, so that it is found here with the others
from licet.domain.ids import LimitKey
from licet.domain.money import Fee, Price, Step, TierMode, Tiers
from licet.domain.redaction import RecordMode
from licet.domain.windows import Anchor, Period


def document_to_wire(document: Document) -> Wire:
    """The document as primitives that msgpack can carry; ``document_from_wire`` is its inverse."""
    match document:
        case Feature():
            body: Wire = {"name": document.name, "unit": document.unit, "title": document.title}
        case Action():
            body = {
                "name": document.name,
                "meters": dict(document.meters),
                "attributes": {name: _attribute_to_wire(spec) for name, spec in document.attributes.items()},
                "durability": document.durability.value,
                "on_unavailable": [
                    document.on_unavailable.mode.value,
                    document.on_unavailable.units_max,
                    document.on_unavailable.for_s_max,
                ],
                "reservation": [document.reservation.expires_after_s, document.reservation.on_expiry.value],
            }
        case Plan():
            features = {name: _entitlement_to_wire(entitlement) for name, entitlement in document.features.items()}
            body = {"name": document.name, "title": document.title, "features": features}
            # In keys of their own: only invoices need them, and a sidecar that does not know them ignores them.
            if document.fee:
                body["fee"] = [document.fee.amount_nanos, document.fee.currency]
            if billing := _billing_to_wire(document):
                body["billing"] = billing
        case Policy():
            body = {
                "name": document.name,
                "actions": list(document.actions),
                "enforcement": document.enforcement.value,
                "rules": [[rule.name, rule.effect.value, rule.when, rule.approval] for rule in document.rules],
            }
        case Role():
            body = {"name": document.name, "actions": list(document.actions)}
        case Flag():
            return flag_to_wire(document)
        case ApprovalChain():
            stages = [
                [list(s.approvers), s.need, s.escalate_after_s, list(s.escalate_to), s.deny_after_s]
                for s in document.stages
            ]
            body = {"name": document.name, "stages": stages}
    return {"kind": type(document).__name__, **body}


def _attribute_to_wire(spec: Attribute) -> list[Any]:
    # A sidecar that cannot hide a value must not take the bundle for one that hides nothing: a longer list stops it.
    record = [] if spec.record is RecordMode.KEEP else [spec.record.value]
    return [spec.type.value, spec.default, *record]


_NO_TERMS: Final = (ReservationTerms().expires_after_s, ReservationTerms().on_expiry.value)


def document_from_wire(wire: Wire) -> Document:
    """The inverse of ``document_to_wire``.

    Raises:
        ValueError: an unknown kind or enum value, as a newer control plane might write.
        KeyError: a field is missing.
    """
    name: str = wire["name"]
    match wire["kind"]:
        case "Feature":
            return Feature(name, wire["unit"], wire["title"])
        case "Action":
            mode, units_max, for_s_max = wire["on_unavailable"]
            expires_after_s, on_expiry = wire.get("reservation", _NO_TERMS)
            return Action(
                name=name,
                meters=wire["meters"],
                attributes={
                    key: Attribute(AttributeType(type_), default, *map(RecordMode, record))
                    for key, (type_, default, *record) in wire["attributes"].items()
                },
                durability=Durability(wire["durability"]),
                on_unavailable=OnUnavailable(UnavailableMode(mode), units_max, for_s_max),
                reservation=ReservationTerms(expires_after_s, OnExpiry(on_expiry)),
            )
        case "Plan":
            billing = wire.get("billing", {})
            features = {
                key: _with_billing(_entitlement_from_wire(entitlement), billing.get(key, {}))
                for key, entitlement in wire["features"].items()
            }
            fee = wire.get("fee")
            return Plan(name, features, wire["title"], Fee(*fee[:2]) if fee else None)
        case "Policy":
            rules = tuple(
                Rule(rule_name, RuleEffect(effect), when, approval)
                for rule_name, effect, when, approval in wire["rules"]
            )
            return Policy(name, tuple(wire["actions"]), rules, Enforcement(wire["enforcement"]))
        case "Role":
            return Role(name, tuple(wire["actions"]))
        case kind if kind in FLAG_KINDS:
            return flag_from_wire(wire)
        case "ApprovalChain":
            stages = tuple(
                ApprovalStage(tuple(approvers), need, escalate_after_s, tuple(escalate_to), deny_after_s)
                for approvers, need, escalate_after_s, escalate_to, deny_after_s in wire["stages"]
            )
            return ApprovalChain(name, stages)
        case unknown:
            raise ValueError(f"document {name!r} has the unknown kind {unknown!r}; this program is too old to read it")


def license_to_wire(license_: License) -> Wire:
    """The license as primitives that msgpack can carry; ``license_from_wire`` is its inverse."""
    wire: Wire = {
        "tenant": license_.tenant,
        "plan": license_.plan,
        "status": license_.status.value,
        "starts_s": license_.starts_s,
        "ends_s": license_.ends_s,
        "addons": dict(license_.addons),
        "overrides": dict(license_.overrides),
        "grants": grants_to_wire(license_.grants),
    }
    if license_.requests:
        wire["requests"] = [entry.to_wire() for entry in license_.requests]
    # Keys of their own, only where they say something: a sidecar that does not know them ignores them.
    if license_.grace_s:
        wire["grace_s"] = license_.grace_s
    if license_.cancels:
        wire["cancels"] = True
    if license_.renewal:
        wire["renewal"] = renewal_to_wire(license_.renewal)
    if license_.planned:
        wire["planned"] = [license_.planned.plan, license_.planned.at_s]
    return wire


def license_from_wire(wire: Wire) -> License:
    """The inverse of ``license_to_wire``.

    Raises:
        ValueError: an unknown status.
        KeyError: a field is missing.
    """
    renewal, planned = wire.get("renewal"), wire.get("planned")
    return License(
        tenant=wire["tenant"],
        plan=wire["plan"],
        status=LicenseStatus(wire["status"]),
        starts_s=wire["starts_s"],
        ends_s=wire["ends_s"],
        addons=wire["addons"],
        overrides=wire["overrides"],
        grants=grants_from_wire(wire.get("grants", ())),
        requests=tuple(RequestEntry.from_wire(entry) for entry in wire.get("requests", ())),
        grace_s=wire.get("grace_s", 0),
        cancels=wire.get("cancels", False),
        renewal=renewal_from_wire(renewal) if renewal else None,
        planned=PlannedPlan(*planned[:2]) if planned else None,
    )


def renewal_to_wire(renewal: Renewal) -> list[Any]:
    """A renewal as it is stored and travels."""
    return [renewal.period.value, renewal.anchor_s, renewal.auto]


def renewal_from_wire(wire: list[Any]) -> Renewal:
    """The inverse of ``renewal_to_wire``; what a newer writer appends is ignored."""
    period, anchor_s, auto, *_ = wire
    return Renewal(Period(period), anchor_s, auto)


def grants_to_wire(grants: Iterable[Grant]) -> list[list[Any]]:
    """Grants as they are stored and travel."""
    return [[grant.id, grant.limit, grant.amount, grant.starts_s, grant.ends_s, grant.priority] for grant in grants]


def grants_from_wire(wire: Iterable[list[Any]]) -> tuple[Grant, ...]:
    """The inverse of ``grants_to_wire``; what a newer writer appends to a grant is ignored."""
    return tuple(
        Grant(id_, LimitKey(limit), amount, starts_s, ends_s, priority)
        for id_, limit, amount, starts_s, ends_s, priority, *_ in wire
    )


def _entitlement_to_wire(entitlement: Entitlement) -> list[Any]:
    price = entitlement.price
    return [
        [price.amount_nanos, price.per_units, price.currency, price.by, dict(price.amounts_nanos)] if price else None,
        [_limit_to_wire(limit) for limit in entitlement.limits],
        entitlement.seats,
        entitlement.heartbeat_s,
    ]


def _entitlement_from_wire(wire: list[Any]) -> Entitlement:
    price, limits, seats, heartbeat_s = wire
    return Entitlement(
        price=Price(*price) if price else None,
        limits=tuple(_limit_from_wire(limit) for limit in limits),
        seats=seats,
        heartbeat_s=heartbeat_s,
    )


def _billing_to_wire(plan: Plan) -> dict[str, Wire]:
    """What only invoices need of a plan's features: included units, tiers, and prices of overage by limit."""
    billing: dict[str, Wire] = {}
    for feature, entitlement in plan.features.items():
        said: Wire = {}
        if entitlement.included:
            said["included"] = entitlement.included
        if entitlement.price and (tiers := entitlement.price.tiers):
            steps = [[s.up_to, s.amount_nanos, s.flat_nanos, dict(s.amounts_nanos)] for s in tiers.steps]
            said["tiers"] = [tiers.mode.value, steps]
        overage = {
            limit.key: [price.amount_nanos, price.per_units, price.currency]
            for limit in entitlement.limits
            if (price := limit.overage_price)
        }
        if overage:
            said["overage"] = overage
        if said:
            billing[feature] = said
    return billing


def _with_billing(entitlement: Entitlement, wire: Wire) -> Entitlement:
    """The entitlement with what ``_billing_to_wire`` says of it."""
    if not wire:
        return entitlement
    price, overage = entitlement.price, wire.get("overage", {})
    if price and (tiers := wire.get("tiers")):
        mode, steps = tiers
        price = replace(price, tiers=Tiers(TierMode(mode), tuple(Step(*step[:4]) for step in steps)))
    limits = tuple(
        replace(limit, overage_price=Price(*overage[limit.key][:3])) if limit.key in overage else limit
        for limit in entitlement.limits
    )
    return replace(entitlement, price=price, limits=limits, included=wire.get("included", 0))


def _limit_to_wire(limit: Limit) -> list[Any]:
    on_exceeded = limit.on_exceeded.value
    # In the place of a word that every sidecar looks up: one that does not know of enforcement must not enforce it all
    # the same, so it refuses the bundle and keeps the one it has.
    if limit.enforcement is not Enforcement.ENFORCE:
        on_exceeded = f"{limit.enforcement.value}:{on_exceeded}"
    return [
        limit.key,
        limit.amount,
        limit.per.value,
        list(limit.scope),
        on_exceeded,
        limit.anchor.value,
        limit.currency,
        limit.burst,
        limit.durable,
    ]


def _limit_from_wire(wire: list[Any]) -> Limit:
    key, amount, per, scope, on_exceeded, *later = wire
    enforcement, _, on_exceeded = on_exceeded.rpartition(":")
    anchor, currency, burst, durable = later[:4] if len(later) >= 4 else (Anchor.CALENDAR.value, "", 0, False)
    period = Period(per)
    if is_rate_key(key) != (period is Period.SECOND):
        raise ValueError(f"limit {key!r} per {per}: what it counts is not what its key says")
    return Limit(
        LimitKey(key),
        amount,
        period,
        tuple(scope),
        OnExceeded(on_exceeded),
        Anchor(anchor),
        currency,
        burst,
        durable,
        enforcement=Enforcement(enforcement or Enforcement.ENFORCE),
    )
