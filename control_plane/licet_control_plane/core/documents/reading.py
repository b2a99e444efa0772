"""Reads YAML into positioned documents, and refuses what has no business in a policy file.

From libyaml's events, not its composed tree, so that depth, size and aliases are bounded while the text is read.
Scalars are those of YAML 1.2's core schema, except that a number may have underscores: ``no``, ``on`` and ``12:30``
are words, not booleans or base-60 numbers. Refused: duplicate keys, tags, merge keys, keys that are not words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from licet_control_plane.core.documents.findings import Findings
from licet_control_plane.core.documents.nodes import Node, Scalar, SourceDocument

FILE_BYTES_MAX: Final = 1024 * 1024
"""Largest file: some ten thousand rules."""

DOCUMENTS_MAX: Final = 50_000
"""Most documents of a bundle; each costs a sidecar some kilobytes."""

DEPTH_MAX: Final = 32
"""Deepest nesting of a document; the deepest that means anything is 6."""

NODES_MAX: Final = 1_000_000
"""Most values in a file, counting what each alias stands for: far above 1 MiB of real text, below harm."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was read: ``path`` as people know it, ``text`` its content."""

    path: str
    text: str


def read(file: SourceFile, findings: Findings) -> tuple[list[SourceDocument], bool]:
    """The documents of a file, and whether it could be read to its end."""
    size = len(file.text.encode("utf-8", "replace"))
    if size > FILE_BYTES_MAX:
        findings.error_at(
            file.path,
            1,
            1,
            f"the file has {size} bytes, and {FILE_BYTES_MAX} are the most",
            "Split it into several files.",
        )
        return [], False
    lines = file.text.splitlines()
    documents: list[SourceDocument] = []
    try:
        for root in _Composer(file, findings).roots():
            if isinstance(root.value, dict):
                documents.append(SourceDocument(file.path, lines, root))
            elif root.value is not None:  # nothing between two lines of dashes
                findings.error_at(
                    file.path,
                    root.line,
                    root.column,
                    "a document must be a mapping",
                    "Begin it with 'kind: …', and separate documents with a line '---'.",
                )
    except _Unreadable as unreadable:
        findings.error_at(file.path, unreadable.line, unreadable.column, str(unreadable), unreadable.fix)
        return documents, False
    except yaml.YAMLError as error:
        line, column, problem = _explained(error, file.text)
        findings.error_at(file.path, line, column, f"not readable as YAML: {problem}", _fix_of(problem))
        return documents, False
    return documents, True


class _Unreadable(Exception):
    """The rest of the file cannot be trusted."""

    def __init__(self, message: str, fix: str, mark: Any) -> None:
        super().__init__(message)
        self.fix = fix
        self.line: int = mark.line + 1
        self.column: int = mark.column + 1


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end was not met yet; ``key`` is the mapping's key that waits for its value."""

    node: Node
    anchor: str | None
    key: str | None = None
    key_position: tuple[int, int] = (0, 0)
    takes_key: bool = False
    skips_value: bool = False


class _Composer:
    """Puts trees together from events, without recursion."""

    def __init__(self, file: SourceFile, findings: Findings) -> None:
        self._file = file
        self._findings = findings
        self._nodes = 0
        self._anchors: dict[str, Node | None] = {}  # None while the anchored value is still open
        self._open: list[_Open] = []

    def roots(self) -> Iterator[Node]:
        """The root of each document, as it ends."""
        for event in yaml.parse(self._file.text, Loader=yaml.CSafeLoader):
            match event:
                case yaml.DocumentStartEvent():
                    self._anchors = {}
                case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                    self._begin(event)
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    ended = self._open.pop()
                    ended.node.size += 1
                    if ended.anchor is not None:
                        self._anchors[ended.anchor] = ended.node
                    if (root := self._placed(ended.node, event)) is not None:
                        yield root
                case yaml.ScalarEvent():
                    if (root := self._scalar(event)) is not None:
                        yield root
                case yaml.AliasEvent():
                    if (root := self._placed(self._aliased(event), event)) is not None:
                        yield root

    def _begin(self, event: Any) -> None:
        self._refuse_tag(event)
        mark = event.start_mark
        if len(self._open) >= DEPTH_MAX:
            raise _Unreadable(f"nested more than {DEPTH_MAX} deep", "Write it flatter.", mark)
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        node = Node(mark.line + 1, mark.column + 1, {} if is_mapping else [], size=0)
        if self._open and self._open[-1].takes_key:
            raise _Unreadable("a key must be a word, not a list or a mapping", "Quote it, if text is meant.", mark)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        self._open.append(_Open(node, event.anchor, takes_key=is_mapping))

    def _scalar(self, event: Any) -> Node | None:
        self._refuse_tag(event)
        mark = event.start_mark
        inside = self._open[-1] if self._open else None
        if inside is not None and inside.takes_key:
            self._take_key(inside, event.value, mark)
            return None
        style = event.style or ""
        value: Scalar = event.value if style or not event.implicit[0] else _resolved(event.value)
        node = Node(mark.line + 1, mark.column + 1, value, style=style)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return self._placed(node, event)

    def _take_key(self, mapping: _Open, key: str, mark: Any) -> None:
        mapping.takes_key = False
        mapping.key = key
        mapping.key_position = (mark.line + 1, mark.column + 1)
        mapping.skips_value = False
        if key == "<<":
            mapping.skips_value = True
            self._error(
                mark, "merge keys (<<) are not supported", "Repeat the fields, or use an alias for a whole value."
            )
        elif key in mapping.node.keys:
            mapping.skips_value = True
            line, column = mapping.node.keys[key]
            self._error(mark, f"the key {key!r} is there twice; first at {line}:{column}", "Remove one of them.")

    def _aliased(self, event: Any) -> Node:
        mark = event.start_mark
        if self._open and self._open[-1].takes_key:
            raise _Unreadable("a key must be a word, not an alias", "Write the word.", mark)
        if event.anchor not in self._anchors:
            raise _Unreadable(f"there is no anchor &{event.anchor} before this alias", "Define the anchor first.", mark)
        node = self._anchors[event.anchor]
        if node is None:
            raise _Unreadable(f"the alias *{event.anchor} stands inside its own anchor", "Write the value out.", mark)
        return node

    def _placed(self, node: Node, event: Any) -> Node | None:
        """Puts a finished node where it belongs; returns it when it is a document's root."""
        self._nodes += 1 if not isinstance(event, yaml.AliasEvent) else node.size
        if self._nodes > NODES_MAX:
            raise _Unreadable(
                f"more than {NODES_MAX} values, counting what aliases stand for", "Use fewer aliases.", event.start_mark
            )
        if not self._open:
            return node
        inside = self._open[-1]
        inside.node.size += node.size
        if isinstance(inside.node.value, list):
            inside.node.value.append(node)
        elif isinstance(inside.node.value, dict) and inside.key is not None:
            if not inside.skips_value:
                inside.node.value[inside.key] = node
                inside.node.keys[inside.key] = inside.key_position
            inside.takes_key = True
        return None

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._error(
                event.start_mark,
                f"tags such as {tag} are not supported",
                "Remove it, and quote the value if text is meant.",
            )

    def _error(self, mark: Any, message: str, fix: str) -> None:
        self._findings.error_at(self._file.path, mark.line + 1, mark.column + 1, message, fix)


# Thirty digits are enough to say "too large", and keep conversion cheap.
_INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29}(?:_[0-9]{1,30}){0,10})")
_FLOAT: Final = re.compile(
    r"[-+]?(?:[0-9]{1,30}\.[0-9]{0,30}|\.[0-9]{1,30}|[0-9]{1,30}(?=[eE]))(?:[eE][-+]?[0-9]{1,3})?"
)
_WORDS: Final[dict[str, Scalar]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def _resolved(text: str) -> Scalar:
    """What an unquoted scalar means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _explained(error: yaml.YAMLError, text: str) -> tuple[int, int, str]:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return error.problem_mark.line + 1, error.problem_mark.column + 1, str(error.problem or error.context)
    if isinstance(error, yaml.reader.ReaderError):
        # libyaml counts bytes here.
        before = text.encode("utf-8", "replace")[: error.position].decode("utf-8", "replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return line, column, f"the character U+{ord(text[len(before)]):04X} is not allowed"
    return 1, 1, str(error)


def _fix_of(problem: str) -> str:
    if "tab" in problem:
        return "Indent with spaces."
    if "mapping values are not allowed" in problem:
        return "Quote a value that holds ': ', and check the indentation."
    if "cannot start any token" in problem:
        return "Quote the value."
    if "is not allowed" in problem:
        return "Remove the character, or write it as an escape in double quotes."
    if "end of stream" in problem:
        return "Close the quote."
    return "Check quotes, brackets and indentation near this place."
