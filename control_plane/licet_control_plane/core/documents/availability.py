"""What the design promises and this version does not do yet. Refused, never accepted in silence.

Each row of ``NOT_AVAILABLE`` is one such thing; when the programs learn to do it, its row goes, and the schema says
the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from licet_control_plane.core.documents.findings import Findings, Path
from licet_control_plane.core.documents.nodes import SourceDocument


@dataclass(frozen=True, slots=True)
class NotAvailable:
    """A field, or some of its values, that documents of ``kind`` cannot have yet.

    ``path`` leads to the field; ``values`` are the refused ones, and an empty set refuses the field itself.
    """

    kind: str
    path: tuple[str, ...]
    values: frozenset[str]
    fix: str


NOT_AVAILABLE: Final = (
    NotAvailable("Flag", ("variants",), frozenset(), "Use one flag for each variant, or 'rollout' alone."),
    NotAvailable("Flag", ("schedule",), frozenset(), "Push the change of 'rollout' when it is due."),
    NotAvailable("Flag", ("rollout", "schedule"), frozenset(), "Push the change of 'percent' when it is due."),
)


def refuse_unavailable(document: SourceDocument, findings: Findings) -> set[Path]:
    """Reports what of ``NOT_AVAILABLE`` the document has.

    Returns:
        The paths that are explained by it, so that the schema need not complain of them again.
    """
    explained: set[Path] = set()
    for row in NOT_AVAILABLE:
        if row.kind != document.kind:
            continue
        node = document.root
        for field in row.path[:-1]:
            node = node.at(field)
        found = node.entries().get(row.path[-1])
        if found is None or (row.values and found.text() not in row.values):
            continue
        said = f"'{row.path[-1]}: {found.value}'" if row.values else f"'{row.path[-1]}'"
        findings.error(document, row.path, f"{said} is not available in this version", row.fix, at_key=not row.values)
        explained.add(row.path)
    return explained
