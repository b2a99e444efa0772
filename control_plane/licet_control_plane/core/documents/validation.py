"""Validates a bundle as a whole: every error of every file at once, or a catalog that can be published."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from licet.domain.catalog import Catalog, Document
from licet_control_plane.core.documents.conditions import check_conditions
from licet_control_plane.core.documents.findings import DocumentError, Findings
from licet_control_plane.core.documents.index import indexed
from licet_control_plane.core.documents.inheritance import resolve_plans, resolve_roles
from licet_control_plane.core.documents.lint import check_sense
from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.documents.reading import DOCUMENTS_MAX, SourceFile, read
from licet_control_plane.core.documents.references import check_references
from licet_control_plane.core.documents.schema import check_schema
from licet_control_plane.core.documents.sources import PlanSource, RoleSource


@dataclass(frozen=True, slots=True)
class Validated:
    """What a bundle came to. ``catalog`` is ``None`` exactly when there are errors; warnings never prevent it."""

    catalog: Catalog | None
    errors: tuple[DocumentError, ...] = ()
    warnings: tuple[DocumentError, ...] = ()


def validate(files: Iterable[SourceFile]) -> Validated:
    """The catalog that ``files`` say together, or all that is wrong with them. Pure: may be repeated.

    The order of the files means nothing. When a file cannot be read to its end, the references between documents
    are not checked, because what they refer to may stand in the unread part.
    """
    findings = Findings()
    written: list[SourceDocument] = []
    complete = True
    for file in files:
        documents, whole = read(file, findings)
        written.extend(documents)
        complete = complete and whole
        if len(written) > DOCUMENTS_MAX:
            findings.error_at(
                file.path, 1, 1, f"the bundle has more than {DOCUMENTS_MAX} documents", "Publish fewer and larger ones."
            )
            return Validated(None, findings.errors(), findings.warnings())

    index = indexed(written, findings)
    records: list[Document] = []
    for document in written:
        source = check_schema(document, findings)
        if source is not None:
            index.add(document, source)
            if not isinstance(source, PlanSource | RoleSource):
                records.append(source.to_domain())
    if complete:
        resolve_plans(index, findings)
        resolve_roles(index, findings)
        records += [*index.plans.values(), *index.roles.values()]
        check_references(index, findings)
        checked = check_conditions(index, findings)
        if not findings.errors():
            check_sense(index, checked, findings)
    errors = findings.errors()
    return Validated(None if errors else Catalog.of(records), errors, findings.warnings())
