"""A YAML document as a tree in which every value, and every key, still knows its line and column.

Pure data; made by ``reading``, read by everything that reports an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class Node:
    """One value: a scalar, a list of nodes, or a mapping of text to nodes. ``line`` and ``column`` count from 1.

    ``keys`` holds the positions of a mapping's keys; ``style`` how a scalar was written: ``'``, ``"``, ``|``, ``>``
    or nothing; ``size`` the number of nodes it stands for, with those of its aliases.
    """

    line: int
    column: int
    value: Scalar | list[Node] | dict[str, Node] = None
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)
    style: str = ""
    size: int = 1

    def plain(self) -> Any:
        """The value without positions, as ``yaml.safe_load`` would give it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def at(self, key: str) -> Node:
        """The value of a mapping's key; an empty node when there is none."""
        return self.entries().get(key, _NOTHING)

    def text(self) -> str:
        """A text; empty for everything else."""
        return self.value if isinstance(self.value, str) else ""

    def items(self) -> Sequence[Node]:
        """A list's items; empty for everything else."""
        return self.value if isinstance(self.value, list) else ()

    def entries(self) -> Mapping[str, Node]:
        """A mapping's entries; empty for everything else."""
        return self.value if isinstance(self.value, dict) else {}

    def position_of(self, path: tuple[str | int, ...], *, at_key: bool = False) -> tuple[int, int]:
        """Line and column of the value at ``path``, or of the last thing on the way to it that exists.

        ``at_key`` asks for the position of the key that ends the path, instead of its value.
        """
        node = self
        position = (self.line, self.column)
        for index, part in enumerate(path):
            if isinstance(node.value, dict) and isinstance(part, str) and part in node.value:
                key_position = node.keys[part]
                node = node.value[part]
                is_last = index == len(path) - 1
                position = key_position if at_key and is_last else (node.line, node.column)
            elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                position = (node.line, node.column)
            else:
                break
        return position


_NOTHING = Node(0, 0)


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One document of a file. ``lines`` are those of the whole file."""

    file: str
    lines: Sequence[str]
    root: Node

    @property
    def kind(self) -> str:
        """What the document says it is; empty when it does not."""
        return self.root.at("kind").text()

    @property
    def name(self) -> str:
        """The document's name, or whose license it is; empty when it has none."""
        return self.root.at("name").text() or self.root.at("tenant").text()

    @property
    def label(self) -> str:
        """``Plan pro``."""
        return f"{self.kind} {self.name}".strip()

    def position_inside(self, node: Node, line: int, column: int) -> tuple[int, int]:
        """Where in the file a position inside a scalar's text is; the scalar's start when that cannot be told.

        ``line`` and ``column`` count from 1 in the text.
        """
        start = (node.line, node.column)
        if not isinstance(node.value, str) or node.line > len(self.lines):
            return start
        text_lines = node.value.split("\n")
        if line > len(text_lines):
            return start
        text = text_lines[line - 1]
        if node.style in ("|", ">"):
            file_line = node.line + line  # the text begins on the line after the indicator
            written = self.lines[file_line - 1] if file_line <= len(self.lines) else ""
            indent = written.find(text)
            # A folded text of several lines was put together from more: only one that kept its lines can be found.
            return (file_line, indent + column) if text and indent >= 0 else start
        offset = node.column - 1 + (1 if node.style else 0)
        before = text[: column - 1]
        if line == 1 and self.lines[node.line - 1].startswith(before, offset):
            return (node.line, offset + column)
        return start
