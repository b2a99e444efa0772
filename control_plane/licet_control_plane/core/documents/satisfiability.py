"""Whether a condition can ever be true. Answers "never" only where that is certain, and "I cannot tell" otherwise.

A condition is taken apart into alternatives, each a list of facts that must hold together, such as ``context.region ==
"eu"``. It is never true when in each alternative two facts contradict, or one contradicts what is known of a variable.
Equal expressions have equal values within an evaluation, because conditions read nothing but their variables. A
condition that fails is not true, so that failures need no thought. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from licet.domain.expressions import Call, Constant, Expression, Items, Name, Opaque, Select

ALTERNATIVES_MAX: Final = 256
"""Alternatives looked at; a condition of more is not decided. Those of people have a handful."""

Known = Mapping[str, frozenset[str]]
"""Of variables that hold texts: all values they can have."""

_Fact = tuple[Expression, bool]

_INT64: Final = (-(2**63), 2**63 - 1)
_MAPS: Final = frozenset(("subject.attributes", "resource.attributes"))
"""Their values can be of several types, which is known at run time only; they are never null."""

_RANGES: Final[Mapping[str, tuple[int, int]]] = {
    "size": (0, _INT64[1]),
    "getMonth": (0, 11),
    "getDate": (1, 31),
    "getDayOfMonth": (0, 30),
    "getDayOfWeek": (0, 6),
    "getDayOfYear": (0, 365),
    "getHours": (0, 23),
    "getMinutes": (0, 59),
    "getSeconds": (0, 59),
    "getMilliseconds": (0, 999),
}
"""What functions can return, at the least and at the most."""

_FLIPPED: Final = {"_==_": "_==_", "_!=_": "_!=_", "_<_": "_>_", "_>_": "_<_", "_<=_": "_>=_", "_>=_": "_<=_"}
_NEGATED: Final = {"_==_": "_!=_", "_!=_": "_==_", "_<_": "_>=_", "_>_": "_<=_", "_<=_": "_>_", "_>=_": "_<_"}
_AFFIXES: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "startsWith": str.startswith,
    "endsWith": str.endswith,
    "contains": str.__contains__,
}
_FINER_THAN_OURS: Final = re.compile(r"\.[0-9]{7}")
_NUMBERS: Final = frozenset(("int", "uint", "double"))
_ORDERED: Final = frozenset(("int", "double", "string", "timestamp"))


def why_never_true(tree: Expression, known: Known) -> str:
    """A clause that says why no request makes the condition true; empty when it may be, or nobody can tell."""
    try:
        alternatives = _alternatives(tree, True)
    except _TooMany:
        return ""
    reason = "it is false by itself"
    for facts in alternatives:
        reason = _contradiction(facts, known)
        if not reason:
            return ""
    return reason


def shown(expression: Expression) -> str:
    """An expression for people; not always as it was written."""
    match expression:
        case Name(name):
            return name
        case Select(operand, field_, _):
            return f"{shown(operand)}.{field_}"
        case Constant(kind, value):
            return str(value).lower() if kind == "bool" else "null" if kind == "null" else repr(value)
        case Call("_[_]", (of, key)):
            return f"{shown(of)}[{shown(key)}]"
        case Call(function, (on,)) if function.isalpha():
            return f"{function}({shown(on)})" if function == "size" else f"{shown(on)}.{function}()"
        case _:
            return "one of its expressions"


class _TooMany(Exception):
    """More alternatives than are looked at."""


def _alternatives(expression: Expression, wanted: bool) -> list[list[_Fact]]:
    """The ways in which ``expression`` comes to ``wanted``; none when it cannot."""
    match expression:
        case Constant("bool", value):
            return [[]] if value is wanted else []
        case Call("!_", (inner,)):
            return _alternatives(inner, not wanted)
        case Call("_&&_" | "_||_" as function, (left, right)):
            ways, others = _alternatives(left, wanted), _alternatives(right, wanted)
            # A conjunction is false, and a disjunction true, as soon as one side is, also when the other fails.
            found = _both(ways, others) if (function == "_&&_") is wanted else ways + others
        case Call("_?_:_", (condition, then, otherwise)):
            found = _both(_alternatives(condition, True), _alternatives(then, wanted)) + _both(
                _alternatives(condition, False), _alternatives(otherwise, wanted)
            )
        case _:
            return [[(expression, wanted)]]
    if len(found) > ALTERNATIVES_MAX:
        raise _TooMany
    return found


def _both(ways: list[list[_Fact]], others: list[list[_Fact]]) -> list[list[_Fact]]:
    if len(ways) * len(others) > ALTERNATIVES_MAX:
        raise _TooMany
    return [way + other for way in ways for other in others]


@dataclass(slots=True)
class _Bounds:
    """What one expression must be: one of ``values`` unless that is ``None``, and none of ``excluded``.

    ``low`` and ``high`` are (value, whether it is itself excluded), of constants of the kind ``kind``.
    """

    values: list[Constant] | None = None
    excluded: set[Constant] = field(default_factory=set)
    kind: str = ""
    low: tuple[Any, bool] | None = None
    high: tuple[Any, bool] | None = None
    affixes: list[tuple[str, str, bool]] = field(default_factory=list)


def _contradiction(facts: list[_Fact], known: Known) -> str:
    """Why the facts cannot hold together; empty when they may."""
    bounds: dict[Expression, _Bounds] = {}
    for atom, wanted in facts:
        if not _note(atom, wanted, bounds):
            about = [one for one in getattr(atom, "arguments", ()) if _constant(one) is None]
            return f"no value of {shown(about[0])} is all that is asked of it" if about else "it is false by itself"
    for expression, bound in bounds.items():
        if not _possible(expression, bound, known):
            return _said(expression, bound)
    return ""


def _said(expression: Expression, bound: _Bounds) -> str:
    single = bound.values[0] if bound.values and len(bound.values) == 1 else None
    if single is not None and single.kind != "bool" and not (bound.excluded or bound.affixes):
        return f"{shown(expression)} is never {shown(single)}"
    return f"no value of {shown(expression)} is all that is asked of it"


def _note(atom: Expression, wanted: bool, bounds: dict[Expression, _Bounds]) -> bool:
    """Adds what a fact says to ``bounds``. ``False`` when it cannot hold at all."""
    if not _narrow(bounds.setdefault(atom, _Bounds()), [Constant("bool", wanted)]):
        return False
    match atom:
        case Call(function, (left, right)) if function in _FLIPPED:
            constant = _constant(right)
            if constant is None and (constant := _constant(left)) is not None:
                left, function = right, _FLIPPED[function]
            if constant is not None:
                return _compare(function, left, constant, wanted, bounds)
            # Not even a number that is none is less than itself; what it is not equal to says nothing.
            return not (wanted and left == right and function in ("_<_", "_>_"))
        case Call("@in", (left, Items(elements))):
            constants = [_constant(element) for element in elements]
            found = [one for one in constants if one is not None]
            if len(found) < len(constants):
                return True
            bound = bounds.setdefault(left, _Bounds())
            if wanted:
                return bool(found) and _narrow(bound, found)
            bound.excluded.update(found)
        case Call(function, (left, Constant("string", text))) if function in _AFFIXES:
            bounds.setdefault(left, _Bounds()).affixes.append((function, text, wanted))
    return True


def _compare(
    function: str, term: Expression, constant: Constant, wanted: bool, bounds: dict[Expression, _Bounds]
) -> bool:
    own = _constant(term)
    if own is not None:
        return _compared(function, own, constant) in (wanted, None)
    if not wanted:
        # A number that is none is neither less than another nor not less than it.
        if function not in ("_==_", "_!=_") and (constant.kind == "double" or _may_be_any_type(term)):
            return True
        function = _NEGATED[function]
    bound = bounds.setdefault(term, _Bounds())
    if function == "_==_":
        return _narrow(bound, [constant])
    if function == "_!=_":
        bound.excluded.add(constant)
    elif constant.kind in _ORDERED and bound.kind in ("", constant.kind):
        bound.kind = constant.kind
        side = (constant.value, function in ("_<_", "_>_"))
        if function in ("_>_", "_>=_"):
            bound.low = side if bound.low is None else max(bound.low, side)
        elif bound.high is None or (side[0], not side[1]) < (bound.high[0], not bound.high[1]):
            bound.high = side
    return True


def _compared(function: str, one: Constant, other: Constant) -> bool | None:
    """How two constants compare; ``None`` when that is left to the library."""
    if one.kind != other.kind or one.kind not in (*_ORDERED, "bool"):
        return None
    match function:
        case "_==_":
            return bool(one.value == other.value)
        case "_!=_":
            return bool(one.value != other.value)
        case "_<_":
            return bool(one.value < other.value)
        case "_<=_":
            return bool(one.value <= other.value)
        case "_>_":
            return bool(one.value > other.value)
        case _:
            return bool(one.value >= other.value)


def _narrow(bound: _Bounds, values: list[Constant]) -> bool:
    """Allows only ``values`` from now on. ``False`` when nothing is left."""
    if bound.values is None:
        bound.values = values
        return True
    left = [value for value in bound.values if any(_may_equal(value, other) for other in values)]
    bound.values = left or bound.values  # what was asked is still wanted for the message
    return bool(left)


def _may_equal(one: Constant, other: Constant) -> bool:
    if one.kind == other.kind:
        return bool(one.value == other.value)
    return one.kind in _NUMBERS and other.kind in _NUMBERS  # how exactly they compare is the library's


def _possible(expression: Expression, bound: _Bounds, known: Known) -> bool:
    values = bound.values
    if isinstance(expression, Name) and expression.name in known:
        texts = known[expression.name]
        every = [Constant("string", text) for text in sorted(texts)]
        values = every if values is None else [one for one in values if one.value in texts]
    low, high = _range_of(expression)
    if low is not None and bound.kind in ("", "int"):
        bound.low = (low, False) if bound.low is None else max(bound.low, (low, False))
        bound.high = (high, False) if bound.high is None else min(bound.high, (high, False))
        bound.kind = "int"
    if values is not None:
        return any(_fits(expression, value, bound) for value in values)
    return _range_has_values(expression, bound) and _affixes_agree(bound)


def _fits(expression: Expression, value: Constant, bound: _Bounds) -> bool:
    if value in bound.excluded:
        return False
    if value.kind == "null" and _is_value_of_map(expression):
        return False
    if value.kind == bound.kind:
        if bound.low is not None and not (
            value.value > bound.low[0] or (value.value == bound.low[0] and not bound.low[1])
        ):
            return False
        if bound.high is not None and not (
            value.value < bound.high[0] or (value.value == bound.high[0] and not bound.high[1])
        ):
            return False
    if value.kind != "string":
        return True
    match expression:
        case Call("lowerAscii", _) if any("A" <= letter <= "Z" for letter in value.value):
            return False
        case Call("upperAscii", _) if any("a" <= letter <= "z" for letter in value.value):
            return False
    return all(_AFFIXES[function](value.value, text) is wanted for function, text, wanted in bound.affixes)


def _range_has_values(expression: Expression, bound: _Bounds) -> bool:
    if bound.kind == "int" and not _may_be_any_type(expression):
        low = _INT64[0] if bound.low is None else bound.low[0] + bound.low[1]
        high = _INT64[1] if bound.high is None else bound.high[0] - bound.high[1]
        excluded = {one.value for one in bound.excluded if one.kind == "int" and low <= one.value <= high}
        return bool(max(low, _INT64[0]) <= min(high, _INT64[1])) and len(excluded) < high - low + 1
    if bound.low is None or bound.high is None:
        return True
    if bound.low[0] == bound.high[0]:
        return not (bound.low[1] or bound.high[1] or Constant(bound.kind, bound.low[0]) in bound.excluded)
    return bool(bound.low[0] < bound.high[0])


def _affixes_agree(bound: _Bounds) -> bool:
    for function, place in (("startsWith", str.startswith), ("endsWith", str.endswith)):
        wanted = sorted((text for name, text, is_wanted in bound.affixes if name == function and is_wanted), key=len)
        refused = [text for name, text, is_wanted in bound.affixes if name == function and not is_wanted]
        if not wanted:
            continue
        longest = wanted[-1]
        if not all(place(longest, text) for text in wanted) or any(place(longest, text) for text in refused):
            return False
    return True


def _range_of(expression: Expression) -> tuple[int, int] | tuple[None, None]:
    match expression:
        case Name("quantity") | Call("_[_]", (Name("quantities"), _)) | Select(Name("quantities"), _, False):
            return 0, _INT64[1]
        case Call(function, arguments) if function in _RANGES and arguments:
            # Of a duration, hours, minutes and seconds have no end: only timestamps are known to be such by their form.
            of_timestamp = function == "size" or isinstance(arguments[0], Name) or len(arguments) > 1
            return _RANGES[function] if of_timestamp else (None, None)
        case _:
            return None, None


def _constant(expression: Expression) -> Constant | None:
    """A literal, or an instant that is written out."""
    match expression:
        case Constant():
            return expression
        case Call("timestamp", (Constant("string", text),)) if not _FINER_THAN_OURS.search(text):
            try:
                at = datetime.fromisoformat(text)
            except ValueError:
                return None
            return Constant("timestamp", at) if at.tzinfo is not None and at.astimezone(UTC).year > 1 else None
        case _:
            return None


def _is_value_of_map(expression: Expression) -> bool:
    match expression:
        case Select(Name(name), _, False) | Call("_[_]", (Name(name), _)):
            return name in _MAPS
        case _:
            return False


def _may_be_any_type(expression: Expression) -> bool:
    """Whether the type of a value is known at run time only."""
    match expression:
        case Name(name):
            return name in _MAPS
        case Constant():
            return False
        case Call("_[_]", (of, _)):
            return of != Name("quantities")
        case Call(function, arguments):
            return function == "dyn" or any(map(_may_be_any_type, arguments))
        case Select(of, _, tests_presence):
            return not tests_presence and of != Name("quantities")
        case Items() | Opaque():
            return True
