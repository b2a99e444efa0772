"""What a test of policies asks the decision engine, whether the answer is the expected one, and which rules were hit.

Pure: the engine itself is asked elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from licet.domain.catalog import AttributeType, Catalog, Enforcement
from licet.domain.money import format_budget, format_nanos
from licet_control_plane.core.documents.findings import Findings
from licet_control_plane.core.documents.reading import SourceFile, read
from licet_control_plane.core.documents.suites import (
    AskSource,
    ExpectSource,
    Given,
    ScopedUse,
    SubjectSource,
    amount_of,
)


@dataclass(frozen=True, slots=True)
class RuleAt:
    """A rule of a policy that is not off, and where it stands."""

    name: str
    file: str
    line: int


@dataclass(slots=True)
class Coverage:
    """Which rules matched in some test."""

    rules: tuple[RuleAt, ...]
    hit: set[str] = field(default_factory=set)

    @property
    def missed(self) -> list[RuleAt]:
        """Rules that no test made match, in the order of the files."""
        return [rule for rule in self.rules if rule.name not in self.hit]

    @property
    def percent(self) -> float:
        """Of all rules; 100 when there are none."""
        return 100.0 * (len(self.rules) - len(self.missed)) / len(self.rules) if self.rules else 100.0


def rules_in(files: Iterable[SourceFile]) -> tuple[RuleAt, ...]:
    """Every rule of policies that are not off, by file and line."""
    found: list[RuleAt] = []
    for file in files:
        for document in read(file, Findings())[0]:
            if document.kind != "Policy" or document.root.at("enforcement").value == Enforcement.OFF.value:
                continue
            for rule in document.root.at("rules").items():
                found.append(RuleAt(f"{document.name}/{rule.at('name').text()}", file.path, rule.line))
    return tuple(sorted(found, key=lambda rule: (rule.file, rule.line)))


def check_of(ask: AskSource, given: Given, catalog: Catalog) -> dict[str, Any]:
    """The check that a test asks, as the engine takes it."""
    action = catalog.actions.get(ask.action)
    attributes = action.attributes if action else {}
    context: dict[str, Any] = {}
    for name, value in ask.context.items():
        if value is None:
            continue
        is_instant = name in attributes and attributes[name].type is AttributeType.TIMESTAMP
        context[name] = _timestamp(value) if is_instant and isinstance(value, str) else value
    now_us = given.now_us if ask.now is None else int(ask.now.timestamp()) * 1_000_000 + ask.now.microsecond
    return {
        "tenant": given.tenant,
        "action": ask.action,
        "subject": _subject(ask.subject),
        "resource": ask.resource.model_dump(),
        "quantity": ask.quantity,
        "quantities": dict(ask.quantities),
        "context": context,
        "peek": ask.peek,
        "now_us": now_us,
    }


def who_of(used: ScopedUse) -> dict[str, Any]:
    """Whose quota was used, as the engine takes it."""
    return {"subject": _subject(used.subject), "context": dict(used.context)}


def mismatches(expect: ExpectSource, answer: Mapping[str, Any]) -> list[str]:
    """What of an answer is not as expected, each as a sentence without its stop."""
    if "invalid" in answer:
        if expect.invalid is not None and expect.invalid in answer["invalid"]:
            return []
        return [f"the check is malformed: {answer['invalid']}"]
    found: list[str] = []
    if expect.invalid is not None:
        found.append(f"the check is well-formed; expected it to be malformed: {expect.invalid}")
    for name in ("effect", "reason", "rule"):
        expected = getattr(expect, name)
        if expected is not None and answer[name] != expected:
            found.append(f"{name} is {answer[name] or 'none'}, expected {expected or 'none'}")
    if expect.message is not None and expect.message not in answer["message"]:
        found.append(f"message is {answer['message']!r}, expected it to contain {expect.message!r}")
    if expect.shadow is not None and sorted(expect.shadow) != sorted(answer["shadow"]):
        found.append(f"shadow is [{', '.join(answer['shadow'])}], expected [{', '.join(expect.shadow)}]")
    for flag, variant in expect.variants.items():
        served = answer["exposures"].get(flag)
        if served != variant:
            said = f"serves {served}" if served else "was not looked at"
            found.append(f"flag {flag} {said}, expected {variant}")
    if expect.cost is not None:
        nanos, currency = expect.cost if isinstance(expect.cost, tuple) else (expect.cost, "")
        if answer["cost_nanos"] != nanos or (currency and nanos and answer["currency"] != currency):
            cost = format_budget(answer["cost_nanos"], answer["currency"]) if answer["currency"] else "none"
            found.append(f"cost is {cost}, expected {format_budget(nanos, currency)}")
    remaining = {quota["limit"]: quota["remaining"] for quota in answer["quotas"]}
    for key, amount in expect.remaining.items():
        is_money = isinstance(amount, tuple)
        expected = amount_of(amount)
        if key not in remaining:
            found.append(f"{key} was not looked at, expected {_shown(expected, is_money)} of it to remain")
        elif remaining[key] != expected:
            found.append(f"{_shown(remaining[key], is_money)} of {key} remain, expected {_shown(expected, is_money)}")
    return found


def _subject(subject: SubjectSource) -> dict[str, Any]:
    return {**subject.model_dump(), "roles": list(subject.roles)}


def _timestamp(text: str) -> Any:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text  # the engine says that it has the wrong type
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return {"timestamp_us": int(at.timestamp()) * 1_000_000 + at.microsecond}


def _shown(amount: int, is_money: bool) -> str:
    return format_nanos(amount) if is_money else f"{amount:,}"
