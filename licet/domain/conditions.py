"""Conditions: CEL source in, a checked and fast yes or no out. The only module that knows the CEL library.

The control plane compiles every condition when a bundle is pushed, to refuse it; a sidecar compiles the same source
again, to run it. Both get the same answer, because what can be refused is refused here:

- a name that is not declared, a wrong type, a result that is not true or false (CEL's own checker);
- a source longer than ``SOURCE_CHARS_MAX``, or loops nested deeper than ``LOOP_DEPTH_MAX``;
- ``has()`` of a declared variable, which would silently mean the variable itself;
- a literal pattern, timestamp or duration that can never be read.

Compiling and evaluating are synchronous and share no mutable state; a ``Condition`` may be used from any thread.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from cel_expr_python import cel
from cel_expr_python.ext import ext_strings

from licet.domain.catalog import Attribute, AttributeType
from licet.domain.expressions import CheckedExpression

SOURCE_CHARS_MAX: Final = 4_096
"""Longest condition. Real ones are below 300 characters; this bounds compile time at a few milliseconds."""

LOOP_DEPTH_MAX: Final = 2
"""Deepest nesting of ``all``, ``exists``, ``map`` and ``filter``. Each level multiplies the cost of an evaluation."""

CONTEXT_PREFIX: Final = "context."

VARIABLE_TYPES: Final[Mapping[str, Any]] = {
    "tenant": cel.Type.STRING,
    "license.plan": cel.Type.STRING,
    "license.status": cel.Type.STRING,
    "subject.type": cel.Type.STRING,
    "subject.id": cel.Type.STRING,
    "subject.on_behalf_of": cel.Type.STRING,
    "subject.roles": cel.Type.List(cel.Type.STRING),
    "subject.attributes": cel.Type.Map(cel.Type.STRING, cel.Type.DYN),
    "action": cel.Type.STRING,
    "resource.type": cel.Type.STRING,
    "resource.id": cel.Type.STRING,
    "resource.attributes": cel.Type.Map(cel.Type.STRING, cel.Type.DYN),
    "quantity": cel.Type.INT,
    "quantities": cel.Type.Map(cel.Type.STRING, cel.Type.INT),
    "now": cel.Type.TIMESTAMP,
}
"""Variables of every condition, beside ``context.<attribute>`` for each attribute its action declares."""

_ATTRIBUTE_TYPES: Final = {
    AttributeType.STRING: cel.Type.STRING,
    AttributeType.INT: cel.Type.INT,
    AttributeType.DOUBLE: cel.Type.DOUBLE,
    AttributeType.BOOL: cel.Type.BOOL,
    AttributeType.LIST: cel.Type.List(cel.Type.STRING),
    AttributeType.TIMESTAMP: cel.Type.TIMESTAMP,
}

_LISTED_MAX: Final = 8
"""Names listed in a message; more would hide it."""

_FUNCTIONS: Final = (
    *("size", "has", "all", "exists", "exists_one", "map", "filter", "int", "uint", "double", "string", "bool", "dyn"),
    *("type", "timestamp", "duration", "startsWith", "endsWith", "contains", "matches", "getFullYear", "getMonth"),
    *("getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getHours", "getMinutes", "getSeconds"),
    *("charAt", "indexOf", "lastIndexOf", "lowerAscii", "upperAscii", "replace", "split", "join", "substring", "trim"),
)
"""Names offered when a function is unknown."""


class ConditionError(ValueError):
    """A condition that cannot be used. ``line`` and ``column`` count from 1, within the source.

    ``further`` holds the other problems of the same source, in the order of the text.
    """

    def __init__(self, message: str, line: int, column: int, further: tuple[ConditionError, ...] = ()) -> None:
        super().__init__(f"{line}:{column}: {message}")
        self.message = message
        self.line = line
        self.column = column
        self.further = further


class ConditionFailed(Exception):
    """An evaluation that came to no answer: a missing key, a division by zero, a binding of the wrong type."""


class Condition:
    """A compiled condition. ``variables`` are the names that ``evaluate`` needs, sorted.

    They are those the source refers to, and no other, unless a loop gives its own variable the name of one.
    """

    __slots__ = ("_evaluate", "source", "variables")

    def __init__(self, source: str, variables: tuple[str, ...], program: Any) -> None:
        self.source = source
        self.variables = variables
        self._evaluate = program.eval

    def __repr__(self) -> str:
        return f"Condition({self.source!r})"

    def evaluate(self, bindings: Mapping[str, Any]) -> bool:
        """Whether the condition holds. Pure: may be repeated.

        ``bindings`` maps at least each of ``variables`` to a plain value of its type: ``str``, ``int``, ``float``,
        ``bool``, ``list`` (not ``tuple``), ``dict``, an aware ``datetime`` for a timestamp. Others are ignored.

        Raises:
            ConditionFailed: there is no answer; the message is CEL's.
        """
        try:
            value = self._evaluate(data=bindings).value()
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConditionFailed(str(error)) from error
        if value is True:
            return True
        if value is False:
            return False
        raise ConditionFailed(str(value))


class ConditionEnvironment:
    """What a condition over an action can mention: the common variables, and the attributes the action declares.

    One costs about 0.4 ms and 200 KB: make one for each distinct set of attributes, not one for each action.
    """

    __slots__ = ("_environment", "_types")

    def __init__(self, attributes: Mapping[str, Attribute]) -> None:
        """``attributes`` by name, without the ``context.`` before it."""
        declared = {CONTEXT_PREFIX + name: _ATTRIBUTE_TYPES[spec.type] for name, spec in attributes.items()}
        self._types: dict[str, Any] = {**VARIABLE_TYPES, **declared}
        self._environment = cel.NewEnv(variables=self._types, extensions=[ext_strings.ExtStrings()])

    def compile(self, source: str) -> Condition:
        """The condition that ``source`` says. Pure: may be repeated.

        Raises:
            ConditionError: it cannot be used; says where and why.
        """
        return self.compile_checked(source)[0]

    def compile_checked(self, source: str) -> tuple[Condition, CheckedExpression]:
        """As ``compile``, with what the condition is made of, for whoever wants to know what it means."""
        if len(source) > SOURCE_CHARS_MAX:
            raise ConditionError(
                f"the condition has {len(source)} characters, and {SOURCE_CHARS_MAX} are the most: split the rule", 1, 1
            )
        if not source.strip():
            raise ConditionError("the condition is empty", 1, 1)
        try:
            program = self._environment.compile(source)
        except RuntimeError as error:
            raise self._explained(str(error), source) from error
        except (TypeError, ValueError) as error:  # a lone surrogate, which UTF-8 cannot carry
            raise ConditionError("the condition is not valid Unicode text", 1, 1) from error
        checked = CheckedExpression(program.serialize())
        # Loops, has() and literals all need a parenthesis: plain comparisons, most rules, skip the walk.
        if "(" in source:
            self._refuse_unusable_calls(checked, source)
        result = program.return_type()
        if result != cel.Type.BOOL:
            raise ConditionError(f"the condition must be true or false, but is {_type_name(result.name())}", 1, 1)
        variables = sorted(name for name in checked.references if name in self._types)
        return Condition(source, tuple(variables), program), checked

    def _refuse_unusable_calls(self, checked: CheckedExpression, source: str) -> None:
        for node in checked.walk():
            if node.loop_depth > LOOP_DEPTH_MAX:
                raise _error_at(
                    f"loops are nested {node.loop_depth} deep, and {LOOP_DEPTH_MAX} are the most",
                    source,
                    checked.offset_of(node.id),
                )
            if node.name in self._types:
                # The checker turns has(context.x) into context.x, which asks for the value and not for its presence.
                offset = checked.offset_of(node.id)
                before = source[:offset].rstrip()
                if source[offset : offset + 1] == "(" and before.endswith("has"):
                    raise _error_at(
                        f"has({node.name}) is always true, as {node.name} always has a value: compare the value",
                        source,
                        len(before) - len("has"),
                    )
            if node.name in _LITERAL_PROBES and node.last_text is not None:
                probe = _LITERAL_PROBES[node.name].format(json.dumps(node.last_text, ensure_ascii=False))
                value = self._environment.compile(probe).eval(data={})
                if value.type() == cel.Type.ERROR:
                    problem = re.sub(r"^[A-Z_]+: ", "", str(value.value()))
                    raise _error_at(
                        f"{node.name}() cannot read {node.last_text!r}: {problem}",
                        source,
                        checked.offset_of(node.last_id),
                    )

    def _explained(self, report: str, source: str) -> ConditionError:
        found = _REPORTED.findall(report)
        if "recursion" in report:
            return ConditionError("the condition is nested too deeply: split the rule", 1, 1)
        if not found:
            return ConditionError(_plain(report), 1, 1)
        errors = [
            self._explained_one(_plain(text), source, max(1, int(line)), max(1, int(column)))
            for line, column, text in found
        ]
        # After the first syntax error the parser guesses, so that what it says next is noise.
        if errors[0].message.startswith("syntax error"):
            errors = errors[:1]
        first, *further = errors
        return ConditionError(first.message, first.line, first.column, tuple(further))

    def _explained_one(self, text: str, source: str, line: int, column: int) -> ConditionError:
        if syntax := re.match(r"Syntax error: (.*)", text, re.DOTALL):
            return ConditionError(f"syntax error: {_syntax_problem(syntax[1])}", line, column)
        if undeclared := re.match(r"undeclared reference to '(.*?)'", text):
            name = undeclared[1]
            lines = source.split("\n")
            rest = lines[line - 1][column - 1 :] if line <= len(lines) else ""
            # CEL points at the last dot of a name, and at the parenthesis of a call.
            is_call = rest.startswith("(")
            before = name if is_call else name.rpartition(".")[0]
            if lines[line - 1][: column - 1].endswith(before):
                column -= len(before)
            return ConditionError(self._undeclared(name, is_call=is_call), line, column)
        if overload := re.match(r"found no matching overload for '(.*?)' applied to '\((.*)\)'", text):
            return ConditionError(_mismatch(overload[1], overload[2]), line, column)
        return ConditionError(text, line, column)

    def _undeclared(self, name: str, *, is_call: bool) -> str:
        if is_call:
            return f"there is no function {name}()" + _suggestion(name, _FUNCTIONS, "{}()")
        declared = sorted(known for known in self._types if known.startswith(CONTEXT_PREFIX))
        if name.startswith(CONTEXT_PREFIX):
            # Compared without the prefix, which would make any two names look alike.
            tails = [known.removeprefix(CONTEXT_PREFIX) for known in declared]
            near = _suggestion(name.removeprefix(CONTEXT_PREFIX), tails, CONTEXT_PREFIX + "{}")
            listed = f"; declared: {', '.join(declared[:_LISTED_MAX])}" if declared else "; the action declares none"
            return f"{name} is not a declared attribute{near or listed}"
        parts = sorted(known for known in self._types if known.startswith(name + "."))[:_LISTED_MAX]
        if parts:
            return f"{name} has no value of its own; it has {', '.join(parts)}"
        return f"there is no variable {name}" + _suggestion(name, self._types)


_REPORTED: Final = re.compile(r"ERROR: <input>:(-?\d+):(-?\d+): (.*?)(?=\n \||\nERROR: |\Z)", re.DOTALL)

_LITERAL_PROBES: Final = {"matches": '"".matches({})', "timestamp": "timestamp({})", "duration": "duration({})"}
"""How to find out whether the literal argument of a function can be read at all."""


def _plain(text: str) -> str:
    """The library's message without its status codes."""
    return re.sub(r"^[A-Z_]+: | \[[A-Z_]+\]$", "", text.strip()).strip()


def _syntax_problem(text: str) -> str:
    text = re.sub(r" expecting .*", "", text, flags=re.DOTALL)
    if "'<EOF>'" in text:
        missing = re.match(r"missing ('.*?') at", text)
        return f"{missing[1]} is missing at the end" if missing else "the expression ends too early"
    if unreadable := re.match(r"token recognition error at: '(.*)'$", text, re.DOTALL):
        word = unreadable[1].strip()
        if word == "=":
            return "'=' does not compare; write '=='"
        if word.startswith(("'", '"')):
            return f"the string {word} is not closed, or has an unknown escape"
        return f"unexpected {word!r}"
    if unexpected := re.match(r"(?:mismatched|extraneous) input '(.*)'$", text, re.DOTALL):
        replacement = {"and": "&&", "or": "||", "not": "!", "AND": "&&", "OR": "||", "NOT": "!"}.get(unexpected[1])
        return f"unexpected {unexpected[1]!r}" + (f"; write {replacement!r}" if replacement else "")
    return text


def _mismatch(function: str, arguments: str) -> str:
    operator = function.strip("_@")
    operator = {"[": "[]", "[_]": "[]", "?_:": "?:"}.get(operator, operator)
    problem = f"{operator!r} does not work on ({arguments})"
    if set(arguments.split(", ")) == {"int", "double"}:
        return f"{problem}; convert with double(), or write 2.0 for 2"
    return problem


def _type_name(name: str) -> str:
    return {"DYN": "of unknown type: compare it with a value"}.get(name, name.lower())


def _suggestion(word: str, candidates: Iterable[str], form: str = "{}") -> str:
    near = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {form.format(near[0])}?" if near else ""


def _error_at(message: str, source: str, offset: int) -> ConditionError:
    before = source[: max(0, offset)]
    return ConditionError(message, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
