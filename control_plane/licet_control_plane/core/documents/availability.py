"""What the design promises and this version does not do yet. Refused, never accepted in silence.

Each row of ``NOT_AVAILABLE`` is one such thing; when the programs learn to do it, its row goes, and the schema says
the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from licet_control_plane.core.documents.findings import Findings, Path
from licet_control_plane.core.documents.nodes import Node, SourceDocument

EACH: Final = "*"
"""In a path: every key of a mapping, or every item of a list."""


@dataclass(frozen=True, slots=True)
class NotAvailable:
    """A field, or some of its values, that documents of ``kind`` cannot have yet.

    ``path`` leads to the field; ``values`` are the refused ones, and an empty set refuses the field itself.
    ``implies`` names the fields beside it that only make sense, or can only be left out, together with it.
    """

    kind: str
    path: tuple[str, ...]
    values: frozenset[str]
    fix: str
    implies: tuple[str, ...] = ()


_LIMIT: Final = ("features", EACH, "limits", EACH)

NOT_AVAILABLE: Final = (
    NotAvailable(
        "Action",
        ("durability",),
        frozenset(("synced", "shipped")),
        "Use 'logged': the decision survives the process.",
    ),
    NotAvailable(
        "Action",
        ("on_unavailable", "mode"),
        frozenset(("capped", "last_known")),
        "Use 'deny' or 'allow'.",
        implies=("units_max", "for_max"),
    ),
    NotAvailable("Plan", (*_LIMIT, "per"), frozenset(("second",)), "Use 'minute', with sixty times the amount."),
    NotAvailable("Plan", (*_LIMIT, "per"), frozenset(("term",)), "Use 'month' or 'year'."),
    NotAvailable("Plan", (*_LIMIT, "anchor"), frozenset(("license",)), "Use 'calendar': windows begin in UTC."),
    NotAvailable(
        "Plan", (*_LIMIT, "spend"), frozenset(), "Limit units with 'amount' instead of money.", implies=("amount",)
    ),
    NotAvailable(
        "Plan",
        (*_LIMIT, "on_exceeded"),
        frozenset(("overage", "require_approval")),
        "Use 'deny'; a license's overrides raise the amount for one tenant.",
    ),
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
        for path, node in _found(document.root, row.path, ()):
            if row.values and node.value not in row.values:
                continue
            said = f"'{path[-1]}: {node.value}'" if row.values else f"'{path[-1]}'"
            findings.error(document, path, f"{said} is not available in this version", row.fix, at_key=not row.values)
            explained.add(path)
            explained.update((*path[:-1], field) for field in row.implies)
    return explained


def _found(node: Node, pattern: tuple[str, ...], path: Path) -> Iterator[tuple[Path, Node]]:
    if not pattern:
        yield path, node
        return
    first, *rest = pattern
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            if first in (EACH, key):
                yield from _found(child, tuple(rest), (*path, key))
    elif isinstance(node.value, list) and first == EACH:
        for index, child in enumerate(node.value):
            yield from _found(child, tuple(rest), (*path, index))
