"""What a bundle's policies say about one check: any deny wins; then any require_approval that is not exempted.

Evaluating a condition costs more than everything else in a decision together. Where all of an action's conditions read
only what has few values (a region, a plan, a flag), the ruling is remembered for those values: conditions are
functions of what they read, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from licet.domain.catalog import AttributeType, License, RuleEffect
from licet.domain.conditions import ConditionFailed
from licet.domain.outcomes import Effect, Reason
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.rulebook import BoundAction, BoundRule

RULINGS_MAX: Final = 1_024
"""Rulings remembered for an action; then all are forgotten. An attribute with more values than that costs little more
than it would without."""


class Traced(NamedTuple):
    """What one rule says. ``problem`` is why its condition cannot be evaluated; then ``matched`` means nothing."""

    rule: BoundRule
    matched: bool
    problem: str


class Ruling(NamedTuple):
    """``effect`` is ``None`` when no enforced rule objects. ``shadow``: what shadow policies would have done."""

    effect: Effect | None
    reason: Reason
    message: str
    rule: str
    shadow: tuple[str, ...]


def rule_on(bound: BoundAction, license_: License, inquiry: Inquiry, now_us: int) -> Ruling:
    """The ruling on an inquiry that was prepared for ``bound``."""
    bindings = bindings_of(bound.variables, bound, license_, inquiry, now_us)
    if not bound.rulings_kept:
        return _evaluate(bound, bindings)
    values = tuple([bindings.get(variable) for variable in bound.variables])
    ruling: Ruling | None = bound.rulings.get(values)
    if ruling is None:
        if len(bound.rulings) >= RULINGS_MAX:
            bound.rulings.clear()
        ruling = bound.rulings[values] = _evaluate(bound, bindings)
    return ruling


def trace_rules(bound: BoundAction, license_: License, inquiry: Inquiry, now_us: int) -> list[Traced]:
    """What each rule says about an inquiry that was prepared for ``bound``, also after one that decides."""
    bindings = bindings_of(bound.variables, bound, license_, inquiry, now_us)
    return [Traced(rule, *_asked(rule, bindings)) for rule in bound.rules]


def _asked(rule: BoundRule, bindings: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the rule matches, and why its condition cannot be evaluated, if so."""
    if rule.condition is None:
        return True, rule.broken
    try:
        return rule.condition.evaluate(bindings), ""
    except ConditionFailed as error:
        unsent = [variable for variable in rule.condition.variables if variable not in bindings]
        return True, f"{', '.join(unsent)} was not sent and has no default" if unsent else str(error)


def _evaluate(bound: BoundAction, bindings: Mapping[str, Any]) -> Ruling:
    denial: tuple[Reason, str, str] | None = None
    exempt: set[str] = set()
    approvals: list[BoundRule] = []
    shadow: list[str] = []
    for rule in bound.rules:
        if denial is not None and not rule.shadow:
            continue  # decided; what shadow policies say is recorded all the same
        matched, problem = _asked(rule, bindings)
        if rule.shadow:
            if problem or matched:
                shadow.append(f"{rule.name}={'error' if problem else rule.effect.value}")
        elif problem:
            denial = (Reason.POLICY_ERROR, f"The condition of {rule.name} failed: {problem}.", rule.name)
        elif not matched:
            continue
        elif rule.effect is RuleEffect.DENY:
            denial = (Reason.POLICY_DENIED, f"Policy rule {rule.name} denies this.", rule.name)
        elif rule.effect is RuleEffect.ALLOW:
            exempt.add(rule.policy)
        else:
            approvals.append(rule)
    if denial is not None:
        return Ruling(Effect.DENIED, *denial, tuple(shadow))
    pending = next((rule for rule in approvals if rule.policy not in exempt), None)
    if pending is None:
        return Ruling(None, Reason.OK, "", "", tuple(shadow))
    message = f"Policy rule {pending.name} requires approval."
    return Ruling(Effect.PENDING, Reason.APPROVAL_REQUIRED, message, pending.name, tuple(shadow))


def bindings_of(
    variables: Iterable[str], bound: BoundAction, license_: License, inquiry: Inquiry, now_us: int
) -> dict[str, Any]:
    """Values of exactly the variables that conditions read: binding is much of what evaluation costs.

    The inquiry was prepared for ``bound``. What was not sent and has no default is left out: the condition fails.
    """
    bindings: dict[str, Any] = {}
    for variable in variables:
        root, _, rest = variable.partition(".")
        match root:
            case "context":
                value = inquiry.declared.get(rest)
                if value is None:
                    continue
                if bound.action.attributes[rest].type is AttributeType.TIMESTAMP and isinstance(value, int):
                    bindings[variable] = datetime.fromtimestamp(value / 1e6, UTC)
                else:
                    bindings[variable] = value
            case "quantity":
                bindings[variable] = sum(inquiry.units.values())
            case "quantities":
                asked = inquiry.quantities or dict.fromkeys(bound.action.meters, sum(inquiry.units.values()))
                bindings[variable] = {**dict.fromkeys(bound.action.meters, 0), **asked}
            case "tenant":
                bindings[variable] = inquiry.tenant
            case "action":
                bindings[variable] = inquiry.action
            case "now":
                bindings[variable] = datetime.fromtimestamp(now_us / 1e6, UTC)
            case "license":
                bindings[variable] = license_.plan if rest == "plan" else license_.status.value
            case "subject":
                bindings[variable] = _subject_value(inquiry, rest)
            case "resource":
                bindings[variable] = _resource_value(inquiry, rest)
    return bindings


def _subject_value(inquiry: Inquiry, name: str) -> Any:
    match name:
        case "type":
            return inquiry.subject_type
        case "id":
            return inquiry.subject_id
        case "on_behalf_of":
            return inquiry.on_behalf_of
        case "roles":
            return list(inquiry.roles)
        case _:
            return dict(inquiry.subject_attributes)


def _resource_value(inquiry: Inquiry, name: str) -> Any:
    match name:
        case "type":
            return inquiry.resource_type
        case "id":
            return inquiry.resource_id
        case _:
            return dict(inquiry.resource_attributes)
