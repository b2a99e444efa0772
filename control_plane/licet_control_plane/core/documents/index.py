"""All documents of a bundle by kind and name: what everything that looks at more than one of them looks into.

Filled in steps: ``indexed`` knows the written documents, ``add`` those that are sound by themselves, and
``inheritance`` puts plans and roles together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from licet.domain.catalog import Action, Plan, Role
from licet_control_plane.core.documents.findings import Findings
from licet_control_plane.core.documents.model import Source
from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.documents.sources import ActionSource

_AFTER_NAMES: Final = chr(0x10FFFF)
"""After every character that a name can have, also one that is not valid."""

_Source = TypeVar("_Source", bound=Source)


@dataclass(slots=True)
class DocumentIndex:
    """Written documents, what their models read, and records: of the sound actions, and of whole plans and roles.

    Of documents that share a name, the first one counts.
    """

    documents: Sequence[SourceDocument]
    by_kind: dict[str, dict[str, SourceDocument]] = field(default_factory=dict)
    actions: dict[str, Action] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    _sources: dict[tuple[type[Source], str], Source] = field(default_factory=dict)
    _matching: dict[tuple[str, ...], frozenset[str]] = field(default_factory=dict)
    _action_names: list[str] = field(default_factory=list)

    def named(self, kind: str) -> Mapping[str, SourceDocument]:
        """The documents of a kind, by name."""
        return self.by_kind.get(kind, {})

    def of_kind(self, kind: str) -> Iterable[SourceDocument]:
        """The documents of a kind, with those whose names repeat."""
        return (document for document in self.documents if document.kind == kind)

    def add(self, document: SourceDocument, source: Source) -> None:
        """Keeps what a sound document's model read."""
        if self.named(document.kind).get(document.name) is document:
            self._sources[type(source), document.name] = source
            if isinstance(source, ActionSource):
                self.actions[source.name] = source.to_domain()

    def matching(self, patterns: Sequence[str]) -> frozenset[str]:
        """The written actions that match one of ``patterns``: as ``catalog.matches``, for many patterns and actions."""
        key = tuple(patterns)
        found = self._matching.get(key)
        if found is None:
            # A bundle has as many patterns as rules, so that one by one against every action would take minutes.
            self._action_names = self._action_names or sorted(self.named("Action"))
            found = frozenset(name for pattern in key for name in self._matching_one(pattern))
            self._matching[key] = found
        return found

    def _matching_one(self, pattern: str) -> Sequence[str]:
        names = self._action_names
        if pattern == "*":
            return names
        if pattern.endswith(".*"):
            prefix = pattern[:-1]
            return names[bisect_left(names, prefix) : bisect_left(names, prefix + _AFTER_NAMES)]
        return (pattern,) if pattern in self.named("Action") else ()

    def source(self, name: str, model: type[_Source]) -> _Source | None:
        """What the model read of the document of that name; ``None`` when it has errors or is not there."""
        found = self._sources.get((model, name))
        return found if isinstance(found, model) else None


def indexed(documents: Sequence[SourceDocument], findings: Findings) -> DocumentIndex:
    """The documents by kind and name; a repeated name is an error."""
    index = DocumentIndex(documents)
    for document in documents:
        if not document.kind or not document.name:
            continue
        named = index.by_kind.setdefault(document.kind, {})
        first = named.setdefault(document.name, document)
        if first is not document:
            line, column = first.root.position_of(("name",))
            findings.error(
                document,
                ("name",),
                f"the name {document.name!r} is taken by the {document.kind} at {first.file}:{line}:{column}",
                "Rename or remove one of them.",
                code="duplicate-name",
            )
    return index
