"""All documents of a bundle by kind and name: what everything that looks at more than one of them looks into.

Filled in steps: ``indexed`` knows the written documents, ``add`` those that are sound by themselves, and
``inheritance`` puts plans and roles together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from licet.domain.catalog import Action, Plan, Role
from licet_control_plane.core.documents.findings import Findings
from licet_control_plane.core.documents.model import Source
from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.documents.sources import ActionSource

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
