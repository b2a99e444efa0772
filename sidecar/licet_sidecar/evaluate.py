"""``licet-sidecar evaluate``: the decision engine as a filter, for the command line's ``policy test`` and ``simulate``.

One JSON object a line in, one out, in the same order (``docs/adr/0027-the-command-line-asks-the-sidecars-engine.md``).
It listens nowhere, opens no file, and ends when its input does.

``bundle``  ``name``, ``documents`` as on the wire, ``observe``: answered with ``ok``
``begin``   ``name``, ``license`` as on the wire or null: forgets what was used; ``ok``
``use``     ``name``, ``tenant``, ``limit``, ``units``, ``who``, ``now_us``: ``ok``, or ``unknown_limit``
``check``   ``name``, ``trace``, ``checks``, each with ``now_us``: ``answers``

``name`` tells several bundles apart. A line that cannot be understood is answered with ``failed``: why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

from licet.domain.catalog import AttributeType, Catalog
from licet.domain.catalog_wire import document_from_wire, license_from_wire
from licet.domain.conditions import ConditionError
from licet_sidecar.core.evaluation import Evaluated, Evaluator, UnknownLimit
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry, TimestampUs, check_units

TIMESTAMP: Final = "timestamp_us"
"""``{"timestamp_us": 0}`` is a timestamp among the values of a check."""


def run(lines: TextIO, out: TextIO) -> None:
    """Answers every line of ``lines``."""
    service = EvaluatingService()
    for line in lines:
        if line.strip():
            out.write(json.dumps(service.answer(line), separators=(",", ":")) + "\n")
            out.flush()


class EvaluatingService:
    """The bundles that were put in, and what is asked of them."""

    def __init__(self) -> None:
        self._evaluators: dict[str, Evaluator] = {}
        self._operations: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "bundle": self._bundle,
            "begin": self._begin,
            "use": self._use,
            "check": self._check,
        }

    def answer(self, line: str) -> dict[str, Any]:
        """The answer to one line."""
        try:
            request = json.loads(line)
            return self._operations[request["op"]](request)
        except (ValueError, KeyError, TypeError, AttributeError, ConditionError) as error:
            return {"failed": f"{type(error).__name__}: {error}"}

    def _bundle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        catalog = Catalog.of(document_from_wire(wire) for wire in request["documents"])
        self._evaluators[request["name"]] = Evaluator(catalog, observe=bool(request.get("observe")))
        return {"ok": True}

    def _begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        license_ = request["license"]
        self._evaluators[request["name"]].begin(license_from_wire(license_) if license_ else None)
        return {"ok": True}

    def _use(self, request: Mapping[str, Any]) -> dict[str, Any]:
        who = _inquiry({**request["who"], "tenant": request["tenant"], "action": "-"})
        evaluator = self._evaluators[request["name"]]
        try:
            evaluator.use(request["tenant"], request["limit"], request["units"], who, request["now_us"])
        except UnknownLimit as error:
            return {"unknown_limit": error.args[0], "known": error.args[1]}
        return {"ok": True}

    def _check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        evaluator = self._evaluators[request["name"]]
        trace = bool(request.get("trace"))
        return {"answers": [self._answered(evaluator, check, trace) for check in request["checks"]]}

    def _answered(self, evaluator: Evaluator, check: Mapping[str, Any], trace: bool) -> dict[str, Any]:
        try:
            inquiry = _inquiry(check)
            if "units" in check:
                _as_recorded(inquiry, check["units"], evaluator)
            return _said(evaluator.ask(inquiry, check["now_us"], trace=trace))
        except InvalidInquiry as error:
            return {"invalid": str(error)}


def _inquiry(check: Mapping[str, Any]) -> Inquiry:
    inquiry = Inquiry(check["tenant"], check["action"])
    subject, resource = check.get("subject") or {}, check.get("resource") or {}
    inquiry.subject_type, inquiry.subject_id = subject.get("type", ""), subject.get("id", "")
    inquiry.on_behalf_of, inquiry.roles = subject.get("on_behalf_of", ""), tuple(subject.get("roles", ()))
    inquiry.subject_attributes = _values(subject.get("attributes") or {})
    inquiry.resource_type, inquiry.resource_id = resource.get("type", ""), resource.get("id", "")
    inquiry.resource_attributes = _values(resource.get("attributes") or {})
    inquiry.context = _values(check.get("context") or {})
    inquiry.peek = bool(check.get("peek"))
    if check.get("quantity") is not None:
        inquiry.quantity = check_units("quantity", check["quantity"])
    inquiry.quantities = {
        meter: check_units(f"quantities[{meter!r}]", units) for meter, units in (check.get("quantities") or {}).items()
    }
    return inquiry


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: TimestampUs(value[TIMESTAMP]) if isinstance(value, dict) else value for name, value in values.items()}


def _as_recorded(inquiry: Inquiry, units: Mapping[str, int], evaluator: Evaluator) -> None:
    """Turns what a usage event holds, units by feature and attributes as they travel, into what was asked.

    Raises:
        InvalidInquiry: the action draws on other features now.
    """
    bound = evaluator.rulebook.action(inquiry.action)
    if bound is None:
        return
    action = bound.action
    meters: dict[str, str] = {}
    for meter, feature in action.meters.items():
        meters.setdefault(feature, meter)
    unknown = sorted(units.keys() - meters.keys())
    if unknown:
        raise InvalidInquiry("units", f"{inquiry.action} does not draw on {', '.join(unknown)} any more")
    asked = {meters[feature]: number for feature, number in units.items()}
    if bound.only_meter is not None:
        inquiry.quantity = asked.get(bound.only_meter, 1)
    else:
        inquiry.quantities = asked or dict.fromkeys(action.meters, 1)
    inquiry.context = {
        name: TimestampUs(value)
        if isinstance(value, int)
        and name in action.attributes
        and action.attributes[name].type is AttributeType.TIMESTAMP
        else value
        for name, value in inquiry.context.items()
    }


def _said(evaluated: Evaluated) -> dict[str, Any]:
    decision = evaluated.decision
    return {
        "effect": decision.effect.name,
        "reason": decision.reason.name,
        "message": decision.message,
        "rule": decision.rule,
        "observed": decision.observed,
        "shadow": list(decision.shadow),
        "exposures": dict(decision.exposures),
        "units": dict(decision.units),
        "cost_nanos": decision.cost_nanos,
        "currency": decision.currency,
        "retry_after_s": decision.retry_after_s,
        "quotas": [
            {"limit": q.limit, "amount": q.amount, "used": q.used, "remaining": q.remaining, "overage": q.overage}
            for q in evaluated.quotas
        ],
        "rules": [
            [traced.rule.name, traced.matched and not traced.problem, traced.problem] for traced in evaluated.rules
        ],
    }
