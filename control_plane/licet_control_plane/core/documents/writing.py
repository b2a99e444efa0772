"""Documents back as people write them: a catalog as canonical YAML, and pushed files with the version they are in.

The inverse of ``validation``: what is written here is valid, and means the same. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import yaml

from licet.domain.catalog import (
    RATE_SUFFIX,
    Action,
    ApprovalChain,
    ApprovalStage,
    Attribute,
    AttributeType,
    Catalog,
    Document,
    Durability,
    Enforcement,
    Entitlement,
    Feature,
    Flag,
    Limit,
    OnExceeded,
    OnUnavailable,
    Plan,
    Policy,
    ReservationTerms,
    Role,
    Rule,
)
from licet.domain.flags import Target, Variant
from licet.domain.money import Price, Step, format_budget, format_nanos
from licet.domain.redaction import RecordMode
from licet.domain.windows import Anchor
from licet_control_plane.core.documents.findings import Findings
from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.documents.reading import SourceFile, read
from licet_control_plane.core.documents.schema import API_VERSION

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.@/-]*(\*)?")
"""Texts that need no quotes; with them a text can never be taken for a number or a list."""
_WORDS: Final = frozenset(("true", "false", "null", "yes", "no", "on", "off", "y", "n"))


def write_files(catalog: Catalog) -> list[SourceFile]:
    """The catalog as one file for each kind, ordered by path; documents by name."""
    texts: dict[str, list[str]] = {}
    for document in catalog.documents():
        texts.setdefault(_FILE_OF_KIND[type(document)], []).append(_dumped(to_source(document)))
    return [SourceFile(path, "---\n".join(parts)) for path, parts in sorted(texts.items())]


def stamped(file: SourceFile) -> SourceFile:
    """The file with ``apiVersion`` in each document that does not say it; everything else stays as it was written.

    A file whose documents begin in a way that this cannot add to is returned as it is.
    """
    findings = Findings()
    documents, complete = read(file, findings)
    if not complete or findings.errors():
        return file
    lines = file.text.splitlines(keepends=True)
    for document in reversed(documents):
        if "apiVersion" in document.root.entries() or not document.root.keys:
            continue
        _stamp(document, lines)
    made = SourceFile(file.path, "".join(lines))
    again, complete = read(made, findings)
    unchanged = complete and [_body(one) for one in again] == [_body(one) for one in documents]
    return made if unchanged and not findings.errors() else file


def to_source(document: Document) -> dict[str, Any]:
    """A document as its kind is written, without what is the default."""
    head: dict[str, Any] = {"apiVersion": API_VERSION, "kind": type(document).__name__, "name": document.name}
    match document:
        case Feature():
            head |= _given({"unit": (document.unit, Feature("").unit), "title": (document.title, "")})
        case Action():
            head |= _action(document)
        case Plan():
            head |= _given({"title": (document.title, "")})
            head |= {"fee": format_budget(document.fee.amount_nanos, document.fee.currency)} if document.fee else {}
            head["features"] = {name: _entitlement(name, one) for name, one in document.features.items()}
        case Policy():
            head |= _given({"enforcement": (document.enforcement, Enforcement.ENFORCE)})
            head |= {"actions": list(document.actions), "rules": [_rule(rule) for rule in document.rules]}
        case Role():
            head["actions"] = list(document.actions)
        case Flag():
            head |= _flag(document)
        case ApprovalChain():
            head["stages"] = [_stage(stage) for stage in document.stages]
    return head


def duration(seconds: int) -> str:
    """``15m`` for 900: the largest unit that says it exactly."""
    for unit, unit_s in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % unit_s == 0:
            return f"{seconds // unit_s}{unit}"
    return f"{seconds}s"


def _action(action: Action) -> dict[str, Any]:
    only = action.meters.get("") if len(action.meters) == 1 else None
    body: dict[str, Any] = {"feature": only} if only is not None else {"meters": dict(action.meters)}
    if action.attributes:
        body["attributes"] = {name: _attribute(one) for name, one in action.attributes.items()}
    body |= _given({"durability": (action.durability, Durability.LOGGED)})
    unavailable = action.on_unavailable
    if unavailable != OnUnavailable():
        body["on_unavailable"] = {"mode": unavailable.mode.value} | _given(
            {"units_max": (unavailable.units_max, 0), "for_max": (_seconds(unavailable.for_s_max), None)}
        )
    terms = action.reservation
    if terms != ReservationTerms():
        body["reservation"] = {"expires_after": duration(terms.expires_after_s), "on_expiry": terms.on_expiry.value}
    return body


def _attribute(attribute: Attribute) -> Any:
    default: Any = attribute.default
    record = _given({"record": (attribute.record, RecordMode.KEEP)})
    if default is None and not record:
        return attribute.type.value
    if default is not None and attribute.type is AttributeType.TIMESTAMP:
        default = (_EPOCH + timedelta(microseconds=default)).isoformat()
    return {"type": attribute.type.value} | _given({"default": (default, None)}) | record


def _entitlement(feature: str, entitlement: Entitlement) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if entitlement.price is not None:
        body["price"] = _price(entitlement.price)
    body |= _given({"included": (entitlement.included, 0)})
    if entitlement.limits:
        body["limits"] = [_limit(feature, limit) for limit in entitlement.limits]
    if entitlement.seats:
        body |= {"seats": entitlement.seats, "heartbeat": duration(entitlement.heartbeat_s)}
    return body


def _price(price: Price) -> dict[str, Any]:
    body: dict[str, Any] = (
        {"tiers": {"mode": price.tiers.mode.value, "steps": [_step(step) for step in price.tiers.steps]}}
        if price.tiers
        else {"amount": format_nanos(price.amount_nanos)}
    )
    body |= _given({"per_units": (price.per_units, 1)})
    body["currency"] = price.currency
    if price.by:
        body["by"] = price.by
        if not price.tiers:  # else they are in the steps
            body["amounts"] = _amounts(price.amounts_nanos)
    return body


def _step(step: Step) -> dict[str, Any]:
    body = _given({"up_to": (step.up_to, 0)}) | {"amount": format_nanos(step.amount_nanos)}
    body |= {"flat": format_nanos(step.flat_nanos)} if step.flat_nanos else {}
    return body | ({"amounts": _amounts(step.amounts_nanos)} if step.amounts_nanos else {})


def _amounts(amounts_nanos: Mapping[str, int]) -> dict[str, str]:
    return {value: format_nanos(nanos) for value, nanos in amounts_nanos.items()}


def _limit(feature: str, limit: Limit) -> dict[str, Any]:
    body: dict[str, Any] = (
        {"spend": format_budget(limit.amount, limit.currency)} if limit.currency else {"amount": limit.amount}
    )
    body["per"] = limit.per.value
    if limit.scope:
        body["scope"] = list(limit.scope)
    name = limit.key.removeprefix(f"{feature}:")
    if limit.currency:
        name = name.removesuffix(f".{limit.currency.lower()}")
    elif limit.is_rate:
        name = name.removesuffix(RATE_SUFFIX)
    derived = f"{limit.per.value}@{'+'.join(sorted(limit.scope))}" if limit.scope else limit.per.value
    if name != derived:
        body["name"] = name
    if limit.overage_price is not None:
        body["overage_price"] = _price(limit.overage_price)
    return body | _given(
        {
            "anchor": (limit.anchor, Anchor.CALENDAR),
            "on_exceeded": (limit.on_exceeded, OnExceeded.DENY),
            "burst": (limit.burst, 0),
            "durable": (limit.durable, False),
            "enforcement": (limit.enforcement, Enforcement.ENFORCE),
        }
    )


def _rule(rule: Rule) -> dict[str, Any]:
    body: dict[str, Any] = {"name": rule.name, "effect": rule.effect.value}
    return body | _given({"when": (rule.when, ""), "approval": (rule.approval, "")})


def _flag(flag: Flag) -> dict[str, Any]:
    percent = 0.0 if flag.steps else 100.0  # what is meant when nothing is said
    rollout = _given({"percent": (flag.percent, percent), "by": (flag.by, "tenant")})
    return _given(
        {
            "feature": (flag.feature, ""),
            "enabled": (flag.enabled, True),
            "starts": (_instant(flag.starts_s), None),
            "ends": (_instant(flag.ends_s), None),
            "rollout": (rollout, {}),
            "schedule": ([{"at": _instant(step.at_s), "percent": step.percent} for step in flag.steps], []),
            "variants": ({variant.name: _variant(variant) for variant in flag.variants}, {}),
            "targeting": ([_target(target) for target in flag.targeting], []),
        }
    )


def _variant(variant: Variant) -> Any:
    if not variant.value:
        return variant.weight
    return {"weight": variant.weight, "value": json.loads(variant.value)}


def _target(target: Target) -> dict[str, Any]:
    return {"name": target.name} | _given({"when": (target.when, "")}) | {"serve": target.serve}


def _instant(at_s: int) -> str | None:
    return (_EPOCH + timedelta(seconds=at_s)).isoformat() if at_s else None


def _stage(stage: ApprovalStage) -> dict[str, Any]:
    body: dict[str, Any] = {"approvers": list(stage.approvers)}
    return body | _given(
        {
            "need": (stage.need, 1),
            "escalate_after": (_seconds(stage.escalate_after_s), None),
            "escalate_to": (list(stage.escalate_to), []),
            "deny_after": (_seconds(stage.deny_after_s), None),
        }
    )


def _seconds(seconds: int) -> str | None:
    return duration(seconds) if seconds else None


def _given(fields: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Of ``name: (value, default)`` those that differ."""
    return {
        name: getattr(value, "value", value)  # an enum is written as its word
        for name, (value, default) in fields.items()
        if value != default
    }


_FILE_OF_KIND: Final[Mapping[type[Document], str]] = {
    Feature: "features.yaml",
    Action: "actions.yaml",
    Plan: "plans.yaml",
    Policy: "policies.yaml",
    Role: "roles.yaml",
    Flag: "flags.yaml",
    ApprovalChain: "approval-chains.yaml",
}


class _Dumper(yaml.CSafeDumper):
    """Quotes every text that could be read as something else, here or by another program."""


def _represent_text(dumper: Any, text: str) -> Any:
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        style = None
    elif "\n" in text:
        style = "|"  # where that cannot hold the text, it is quoted all the same
    else:
        style = '"' if "'" in text or not text.isprintable() else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _dumped(body: Mapping[str, Any]) -> str:
    text: str = yaml.dump(
        dict(body), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31 - 1, default_flow_style=False
    )
    return text


def _stamp(document: SourceDocument, lines: list[str]) -> None:
    """Adds the version before the first key, in the way the document is written."""
    root = document.root
    line, column = min(root.keys.values())
    before = lines[line - 1][: column - 1]
    if not before.strip():
        lines.insert(line - 1, f"{before}apiVersion: {API_VERSION}\n")
    elif (root.line, root.column) < (line, column) and lines[root.line - 1][root.column - 1 :].startswith("{"):
        opened = lines[root.line - 1]
        lines[root.line - 1] = f"{opened[: root.column]}apiVersion: {API_VERSION}, {opened[root.column :]}"


def _body(document: SourceDocument) -> dict[str, Any]:
    plain: dict[str, Any] = document.root.plain()
    return {key: value for key, value in plain.items() if key != "apiVersion"}


def as_pairs(files: Iterable[SourceFile]) -> list[tuple[str, str]]:
    """Paths and texts, as bundles are pushed."""
    return [(file.path, file.text) for file in files]
