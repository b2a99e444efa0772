"""Checked CEL expressions as the library serializes them: the names they refer to, where things stand, and their tree.

The library tells none of this itself. What is read here is the wire form of ``cel.expr.CheckedExpr`` (checked.proto and
syntax.proto of google/cel-spec), whose field numbers are used. Pure; refuses nothing, as the library wrote it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

TREE_DEPTH_MAX: Final = 64
"""Deepest part of a tree that is told apart; what is below is ``Opaque``. Conditions of people are below ten."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal. ``kind``: ``null``, ``bool``, ``int``, ``uint``, ``double``, ``string`` or ``bytes``."""

    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class Name:
    """A variable, with its dots, or the own variable of a loop."""

    name: str


@dataclass(frozen=True, slots=True)
class Select:
    """``operand.field``; with ``tests_presence`` it is ``has(operand.field)``."""

    operand: Expression
    field: str
    tests_presence: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A function or operator, such as ``_&&_`` and ``@in``; the object of a method is the first argument."""

    function: str
    arguments: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    elements: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """A loop, a map, or what is nested too deeply. Different ones of the same source differ in ``id``."""

    id: int


Expression = Constant | Name | Select | Call | Items | Opaque


def is_whole(expression: Expression) -> bool:
    """Whether nothing in it is ``Opaque``: only then do equal trees of two sources mean that both say the same."""
    match expression:
        case Opaque():
            return False
        case Select(operand, _, _):
            return is_whole(operand)
        case Call(_, parts) | Items(parts):
            return all(map(is_whole, parts))
        case _:
            return True


class Node(NamedTuple):
    """A node of a checked expression. ``last_text`` is the last argument of a call, where that is a string literal."""

    id: int
    name: str
    loop_depth: int
    last_id: int = 0
    last_text: str | None = None


class CheckedExpression:
    """One expression. ``references`` are the names it refers to, those of functions among them."""

    __slots__ = ("_positions", "_root", "_source_info", "references")

    def __init__(self, serialized: bytes) -> None:
        self.references: set[str] = set()
        self._root = self._source_info = b""
        self._positions: dict[int, int] | None = None
        checked = _last(serialized, 2)  # google.protobuf.Any {value: 2}
        for number, value in _wire_fields(checked):
            if number == 2:  # reference_map {value: 2} -> Reference {name: 1}
                self.references.add(_last(_last(value, 2), 1).decode())
            elif number == 4:
                self._root = value
            elif number == 5:
                self._source_info = value

    def offset_of(self, node_id: int) -> int:
        """Characters before the node in the source; 0 when it is not known."""
        if self._positions is None:
            self._positions = {}
            for number, value in _wire_fields(self._source_info):
                if number == 4:  # SourceInfo.positions {key: 1, value: 2}
                    entry = dict(_wire_fields(value))
                    self._positions[entry.get(1, 0)] = entry.get(2, 0)
        return self._positions.get(node_id, 0)

    def walk(self) -> Iterator[Node]:
        """Names, calls and loops, in no particular order."""
        pending: list[tuple[bytes, int]] = [(self._root, 0)]
        while pending:
            expression, depth = pending.pop()
            body = dict(_wire_fields(expression))
            node_id = body.get(2, 0)
            if 4 in body:  # Ident {name: 1}
                yield Node(node_id, _last(body[4], 1).decode(), depth)
            elif 5 in body:  # Select {operand: 1}
                pending.append((_last(body[5], 1), depth))
            elif 6 in body:  # Call {target: 1, function: 2, args: 3}
                call = list(_wire_fields(body[6]))
                arguments = [value for number, value in call if number == 3]
                pending.extend((value, depth) for number, value in call if number in (1, 3))
                last = dict(_wire_fields(arguments[-1])) if arguments else {}
                # Constant {string_value: 6}
                text = dict(_wire_fields(last[3])).get(6) if 3 in last else None
                yield Node(
                    node_id,
                    _last(body[6], 2).decode(),
                    depth,
                    last.get(2, 0),
                    text.decode() if text is not None else None,
                )
            elif 7 in body:  # CreateList {elements: 1}
                pending.extend((value, depth) for number, value in _wire_fields(body[7]) if number == 1)
            elif 8 in body:  # CreateStruct {entries: 2 {map_key: 3, value: 4}}
                for number, entry in _wire_fields(body[8]):
                    if number == 2:
                        pending.extend((value, depth) for part, value in _wire_fields(entry) if part in (3, 4))
            elif 9 in body:  # Comprehension {iter_range: 2, accu_init: 4, loop_condition: 5, loop_step: 6, result: 7}
                yield Node(node_id, "", depth + 1)
                for number, value in _wire_fields(body[9]):
                    # The range is computed once; what is inside runs for each of its elements.
                    if number in (2, 4, 7):
                        pending.append((value, depth))
                    elif number in (5, 6):
                        pending.append((value, depth + 1))

    def tree(self) -> Expression:
        """The expression as a value; where it ``is_whole``, equal for sources that differ only in form."""
        return _tree(self._root, 0)


def _last(message: bytes, number: int) -> bytes:
    """The bytes of the last field of that number, empty when there is none."""
    found = b""
    for field_number, value in _wire_fields(message):
        if field_number == number:
            found = value
    return found


def _wire_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protobuf message: an ``int`` for a varint, ``bytes`` for everything else."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == 0:
            value: int | bytes
            value, at = _varint(message, at)
        else:
            length = {1: 8, 5: 4}.get(wire_type)
            if length is None:
                length, at = _varint(message, at)
            value = message[at : at + length]
            at += length
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


_CONSTANT_KINDS: Final = {1: "null", 2: "bool", 3: "int", 4: "uint", 5: "double", 6: "string", 7: "bytes"}


def _tree(expression: bytes, depth: int) -> Expression:
    body = dict(_wire_fields(expression))
    if depth >= TREE_DEPTH_MAX:
        return Opaque(body.get(2, 0))
    if 3 in body:
        return _constant(body[3])
    if 4 in body:  # Ident {name: 1}
        return Name(_last(body[4], 1).decode())
    if 5 in body:  # Select {operand: 1, field: 2, test_only: 3}
        select = dict(_wire_fields(body[5]))
        return Select(_tree(select[1], depth + 1), select[2].decode(), bool(select.get(3)))
    if 6 in body:  # Call {target: 1, function: 2, args: 3}
        call = list(_wire_fields(body[6]))
        arguments = tuple(_tree(value, depth + 1) for part in (1, 3) for number, value in call if number == part)
        return Call(_last(body[6], 2).decode(), arguments)
    if 7 in body:  # CreateList {elements: 1}
        return Items(tuple(_tree(value, depth + 1) for number, value in _wire_fields(body[7]) if number == 1))
    return Opaque(body.get(2, 0))


def _constant(constant: bytes) -> Constant:
    ((number, value),) = _wire_fields(constant)
    kind = _CONSTANT_KINDS.get(number, "")
    match kind:
        case "null":
            return Constant(kind, None)
        case "bool":
            return Constant(kind, bool(value))
        case "int":  # in two's complement
            return Constant(kind, value - 2**64 if value >= 2**63 else value)
        case "double":
            return Constant(kind, struct.unpack("<d", value)[0])
        case "string":
            return Constant(kind, value.decode())
        case _:
            return Constant(kind, value)
