"""What changes in meaning between two catalogs: per plan, feature, limit, price, action, rule, role and flag.

Not a diff of text: comments, the order of files and how something is written do not show. Works on the records that
both programs act on, field by field, so that a field nobody thought of here still shows, under its own name: two
catalogs that differ always have at least one difference, and equal ones have none. Pure.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Any, Final

from licet.domain.catalog import (
    Action,
    ApprovalChain,
    Attribute,
    Catalog,
    Document,
    Entitlement,
    Flag,
    Limit,
    Plan,
    Policy,
    Rule,
)
from licet.domain.flags import RolloutStep, Target, Variant
from licet.domain.money import Price, format_budget, format_nanos

_TEXT_CHARS_MAX: Final = 60
"""Of a condition in the summary of a new rule; the JSON form has all of it."""


class Change(StrEnum):
    """What became of a thing."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Difference:
    """One change of meaning. ``path`` leads to it inside the document, in words; empty for the document itself.

    ``before`` and ``after`` are as people write them, and empty where there is nothing.
    """

    kind: str
    name: str
    path: tuple[str, ...]
    change: Change
    before: str = ""
    after: str = ""

    @property
    def subject(self) -> str:
        """``plan pro: reports: limit month`` or ``rule guard-exports/embargo: condition``."""
        path = self.path
        if self.kind == "Policy" and path and path[0].startswith(_RULE):
            subject = f"rule {self.name}/{path[0].removeprefix(_RULE)}"
            path = path[1:]
        else:
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", self.kind).lower()
            subject = f"{words} {self.name}".rstrip()
        return ": ".join((subject, *path))

    def __str__(self) -> str:
        """One line for people."""
        if self.change is not Change.CHANGED:
            summary = self.after or self.before
            return f"{self.subject} {self.change.value}" + (f" ({summary})" if summary else "")
        if self.path[-1] in (_CONDITION, _ORDER):
            return f"{self.subject} changed"
        return f"{self.subject} {self.before} -> {self.after}"


def diff(before: Catalog, after: Catalog) -> list[Difference]:
    """What is different in ``after``, by kind, name and place; empty exactly when both say the same."""
    old = {(type(one).__name__, one.name): one for one in before.documents()}
    new = {(type(one).__name__, one.name): one for one in after.documents()}
    found: list[Difference] = []
    for kind, name in sorted(old.keys() | new.keys(), key=lambda one: (_KINDS.index(one[0]), one[1])):
        one, other = old.get((kind, name)), new.get((kind, name))
        if one == other:
            continue
        if one is None or other is None:
            change = Change.ADDED if one is None else Change.REMOVED
            found.append(Difference(kind, name, (), change))
            continue
        found.extend(
            Difference(kind, name, path, change, earlier, later)
            for path, change, earlier, later in _compared((), _tree(one), _tree(other))
        )
    return found


_RULE: Final = "rule "
_CONDITION: Final = "condition"
_ORDER: Final = "order"
_KINDS: Final = [kind.__name__ for kind in Document.__args__]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A value: ``raw`` is compared, ``text`` is shown."""

    raw: Any
    text: str


@dataclass(frozen=True, slots=True)
class _Branch:
    """Named parts. Of those in ``ordered`` the order means something; ``summary`` says what the whole is."""

    parts: dict[str, _Branch | _Leaf] = field(default_factory=dict)
    ordered: tuple[str, ...] = ()
    summary: str = ""


_Found = tuple[tuple[str, ...], Change, str, str]


def _compared(path: tuple[str, ...], one: _Branch | _Leaf, other: _Branch | _Leaf) -> Iterator[_Found]:
    if isinstance(one, _Leaf) or isinstance(other, _Leaf):
        if not (isinstance(one, _Leaf) and isinstance(other, _Leaf)) or one.raw != other.raw:
            yield path, Change.CHANGED, _shown(one), _shown(other)
        return
    for part in dict.fromkeys((*one.parts, *other.parts)):
        below = (*path, part) if part else path  # "" is the thing's own value
        earlier, later = one.parts.get(part), other.parts.get(part)
        if earlier is None and later is not None:
            yield below, Change.ADDED, "", _shown(later)
        elif later is None and earlier is not None:
            yield below, Change.REMOVED, _shown(earlier), ""
        elif earlier is not None and later is not None:
            yield from _compared(below, earlier, later)
    both = frozenset(one.ordered) & frozenset(other.ordered)
    kept, kept_now = ([part for part in branch.ordered if part in both] for branch in (one, other))
    if kept != kept_now:
        yield (*path, _ORDER), Change.CHANGED, ", ".join(kept), ", ".join(kept_now)


def _shown(one: _Branch | _Leaf) -> str:
    return one.text if isinstance(one, _Leaf) else one.summary


def _tree(record: Any) -> _Branch:
    """The parts of a record. A part that is ``None`` is not there."""
    parts: dict[str, _Branch | _Leaf] = {}
    ordered: list[str] = []
    identity = _IDENTITY.get(type(record), "name")
    for one in fields(record):
        value = getattr(record, one.name)
        label, show = _SHOWN.get((type(record), one.name), (one.name, None))
        if value is None or one.name == identity:
            continue
        if isinstance(value, Mapping):
            for key, item in value.items():
                parts[_part(type(record), one.name, key)] = _node(one.name, item)
        elif isinstance(value, tuple) and value and all(is_dataclass(item) for item in value):
            keys = _keys(value)
            named = [_part(type(record), one.name, key) for key in keys]
            parts.update(zip(named, map(_tree, value), strict=True))
            ordered += named
        elif is_dataclass(value):
            parts[label] = _tree(value)
        elif not (isinstance(value, tuple) and not value and one.name in _LISTS_OF_RECORDS):
            parts[label] = _Leaf(value, show(record) if show else _text(one.name, value))
    summary = _SUMMARIES.get(type(record))
    return _Branch(parts, tuple(ordered), summary(record) if summary else "")


def _node(name: str, item: Any) -> _Branch | _Leaf:
    if is_dataclass(item):
        return _tree(item)
    return _Leaf(item, format_nanos(item) if name.endswith("_nanos") else _text("", item))


def _keys(records: tuple[Any, ...]) -> list[str]:
    """What tells records of a list apart: their key or name, or their place when they have none of their own."""
    identity = _IDENTITY.get(type(records[0]), "name")
    seen: Counter[str] = Counter()
    keys: list[str] = []
    for place, one in enumerate(records, 1):
        key = _own_key(one, identity)
        seen[key] += 1
        keys.append(f"{key} ({seen[key]})" if key and seen[key] > 1 else key or str(place))
    return keys


def _own_key(one: Any, identity: str) -> str:
    match one:
        case Limit():
            return _limit_name(one)
        case RolloutStep():
            return _instant(one.at_s)
    return str(getattr(one, identity, ""))


def _part(owner: type, name: str, key: str) -> str:
    return _PARTS.get((owner, name), f"{name} {{}}").replace("{}", str(key))


def _limit_name(limit: Limit) -> str:
    return limit.key.partition(":")[2]


def _text(name: str, value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return _duration(value) if name.endswith(("_s", "_s_max")) else f"{value:,}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, str) and (not value or name in ("title", "default")):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _duration(seconds: int) -> str:
    for unit, unit_s in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % unit_s == 0:
            return f"{seconds // unit_s}{unit}"
    return f"{seconds}s" if seconds else "none"


def _amount(limit: Limit) -> str:
    return format_budget(limit.amount, limit.currency) if limit.currency else f"{limit.amount:,}"


def _limit_summary(limit: Limit) -> str:
    scope = f" for each {' and '.join(limit.scope)}" if limit.scope else ""
    return f"{_amount(limit)} per {limit.per.value}{scope}, then {limit.on_exceeded.value}"


def _price_summary(price: Price) -> str:
    return f"{format_budget(price.amount_nanos, price.currency)} per {price.per_units:,}"


def _entitlement_summary(entitlement: Entitlement) -> str:
    said = [_price_summary(entitlement.price)] if entitlement.price else []
    said += [f"limit {_limit_name(limit)} {_amount(limit)}" for limit in entitlement.limits]
    if entitlement.seats:
        said.append(f"{entitlement.seats:,} seats")
    return ", ".join(said) or "no limits"


def _rule_summary(rule: Rule) -> str:
    return _conditional(rule.effect.value, rule.when)


def _conditional(what: str, when: str) -> str:
    shown = when if len(when) <= _TEXT_CHARS_MAX else f"{when[:_TEXT_CHARS_MAX]}…"
    return f"{what} when {' '.join(shown.split())}" if shown else what


def _share(percent: float) -> str:
    return f"{percent:g} %"


def _instant(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat() if at_s else "none"


def _target_summary(target: Target) -> str:
    return _conditional(target.serve, target.when)


_IDENTITY: Final[Mapping[type, str]] = {Limit: "key", Price: "", RolloutStep: "at_s"}
"""The field that names a record among others; ``name`` where nothing else is said."""

_LISTS_OF_RECORDS: Final = frozenset(("limits", "grants", "rules", "stages", "steps", "variants", "targeting"))

_PARTS: Final[Mapping[tuple[type, str], str]] = {
    (Plan, "features"): "{}",
    (Entitlement, "limits"): "limit {}",
    (Entitlement, "grants"): "grant {}",
    (Price, "amounts_nanos"): "for {}",
    (Action, "meters"): "meter {}",
    (Action, "attributes"): "attribute {}",
    (Policy, "rules"): f"{_RULE}{{}}",
    (ApprovalChain, "stages"): "stage {}",
    (Flag, "steps"): "step {}",
    (Flag, "variants"): "variant {}",
    (Flag, "targeting"): "targeting {}",
}
"""How the parts of a map or a list are called."""

_SHOWN: Final[Mapping[tuple[type, str], tuple[str, Callable[[Any], str] | None]]] = {
    (Limit, "amount"): ("", _amount),
    (Price, "amount_nanos"): ("", lambda price: format_budget(price.amount_nanos, price.currency)),
    (Price, "by"): ("by", lambda price: price.by or "nothing"),
    (Flag, "percent"): ("percent", lambda flag: _share(flag.percent)),
    (Flag, "starts_s"): ("starts", lambda flag: _instant(flag.starts_s)),
    (Flag, "ends_s"): ("ends", lambda flag: _instant(flag.ends_s)),
    (RolloutStep, "percent"): ("", lambda step: _share(step.percent)),
    (Variant, "value"): ("value", lambda variant: variant.value or "none"),
    (Rule, "when"): (_CONDITION, lambda rule: rule.when or "always"),
    (Target, "when"): (_CONDITION, lambda target: target.when or "always"),
    (Attribute, "default"): ("default", lambda one: json.dumps(one.default, ensure_ascii=False)),
}
"""Fields that are called or written in another way than their name and type say."""

_SUMMARIES: Final[Mapping[type, Callable[[Any], str]]] = {
    Limit: _limit_summary,
    Price: _price_summary,
    Entitlement: _entitlement_summary,
    Rule: _rule_summary,
    Target: _target_summary,
    RolloutStep: lambda step: _share(step.percent),
    Variant: lambda variant: f"weight {variant.weight:,}",
    Attribute: lambda one: one.type.value,
}
