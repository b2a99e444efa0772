"""Documents in tests: written with a mark where the error must point."""

from __future__ import annotations

from textwrap import dedent

from licet.domain.catalog import Catalog
from licet_control_plane.core.documents import DocumentError, SourceFile, Validated, validate

MARK = "▶"
"""Stands before the place of the one error of a text."""


def validated(*texts: str) -> Validated:
    """What the texts come to, as the files ``1.yaml``, ``2.yaml`` and so on."""
    return validate([SourceFile(f"{number}.yaml", dedent(text)) for number, text in enumerate(texts, 1)])


def catalog_of(*texts: str) -> Catalog:
    """The catalog that the texts say, which must have no errors."""
    result = validated(*texts)
    assert result.errors == ()
    assert result.catalog is not None
    return result.catalog


def only_error(text: str) -> DocumentError:
    """The one error of a text, which must stand at its ``MARK``."""
    text = dedent(text)
    before, mark, after = text.partition(MARK)
    assert mark, "the text has no mark"
    result = validate([SourceFile("1.yaml", before + after)])
    assert result.catalog is None
    assert len(result.errors) == 1, [str(error) for error in result.errors]
    error = result.errors[0]
    assert (error.file, error.line, error.column) == (
        "1.yaml",
        before.count("\n") + 1,
        len(before) - before.rfind("\n"),
    ), str(error)
    return error
