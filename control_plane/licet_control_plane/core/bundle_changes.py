"""Which documents came, went and changed between two bundles, from their digests alone. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class DocumentChanges(NamedTuple):
    """Documents as ``Kind/name``, each list in order."""

    added: list[str]
    modified: list[str]
    removed: list[str]


def document_changes(before: Iterable[tuple[str, str, str]], after: Iterable[tuple[str, str, str]]) -> DocumentChanges:
    """Between two lists of (kind, name, digest)."""
    old = {f"{kind}/{name}": digest for kind, name, digest in before}
    new = {f"{kind}/{name}": digest for kind, name, digest in after}
    return DocumentChanges(
        added=sorted(new.keys() - old.keys()),
        modified=sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
        removed=sorted(old.keys() - new.keys()),
    )
