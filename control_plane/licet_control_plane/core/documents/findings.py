"""What validation says to people: errors and warnings, each with its file, line, column and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.suggestion import did_you_mean

ERRORS_MAX: Final = 1_000
"""Errors described in one validation. Nobody reads more, and suggestions for more would cost seconds."""

Path = tuple[str | int, ...]
"""Where in a document: field names, keys and positions, from its root."""


class Severity(StrEnum):
    """Whether it stands in the way of publishing."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class DocumentError:
    """One thing that is wrong, or with ``severity`` a warning, probably not meant.

    ``line`` and ``column`` count from 1; ``path`` names the document and the field; ``message`` is a clause, and
    ``fix`` whole sentences. ``code`` is stable: programs match on it.
    """

    file: str
    line: int
    column: int
    path: str
    message: str
    fix: str = ""
    code: str = "invalid"
    severity: Severity = Severity.ERROR

    def as_json(self) -> dict[str, Any]:
        """As the API and ``--json`` show it."""
        return {**asdict(self), "severity": self.severity.value}

    def __str__(self) -> str:
        """One line for a terminal: where, what, and what to do."""
        subject = f"{self.path}: " if self.path else ""
        stop = "" if self.message.endswith("?") else "."
        return f"{self.file}:{self.line}:{self.column}: {subject}{self.message}{stop} {self.fix}".rstrip()


class Findings:
    """Collects errors and warnings of one validation. Not for use from two threads."""

    def __init__(self) -> None:
        self._errors: list[DocumentError] = []
        self._warnings: list[DocumentError] = []

    @property
    def full(self) -> bool:
        """Whether further errors are dropped, so that looking for more is of no use."""
        return len(self._errors) >= ERRORS_MAX

    def error(
        self,
        document: SourceDocument,
        path: Path,
        message: str,
        fix: str = "",
        *,
        at_key: bool = False,
        code: str = "invalid",
    ) -> None:
        """An error at ``path``, or at the nearest thing above it that was written; ``at_key`` points at its name."""
        position = document.root.position_of(path, at_key=at_key)
        self.error_inside(document, path, position, message, fix, code=code)

    def error_inside(
        self,
        document: SourceDocument,
        path: Path,
        position: tuple[int, int],
        message: str,
        fix: str,
        *,
        code: str = "invalid",
    ) -> None:
        """An error at a line and column inside the text at ``path``."""
        self.error_at(document.file, *position, message, fix, _described(document, path), code=code)

    def error_at(
        self,
        file: str,
        line: int,
        column: int,
        message: str,
        fix: str = "",
        path: str = "",
        *,
        code: str = "unreadable",
    ) -> None:
        """An error at a known position."""
        if not self.full:
            self._errors.append(DocumentError(file, line, column, path, message, fix, code))

    def warning(self, document: SourceDocument, path: Path, message: str, fix: str = "", *, code: str) -> None:
        """Something legal that is probably not meant."""
        if len(self._warnings) < ERRORS_MAX:
            line, column = document.root.position_of(path)
            described = _described(document, path)
            self._warnings.append(
                DocumentError(document.file, line, column, described, message, fix, code, Severity.WARNING)
            )

    def unknown(self, document: SourceDocument, path: Path, what: str, word: str, known: Iterable[str]) -> None:
        """The error that ``word`` is no ``what``, with the nearest of ``known``."""
        if not self.full:
            self.error(document, path, f"there is no {what} {word!r}", did_you_mean(word, known), code="unknown-name")

    def errors(self) -> tuple[DocumentError, ...]:
        """All errors by file and position; when there were too many, a last one says so."""
        ordered = sorted(self._errors, key=_position)
        if self.full:
            last = ordered[-1]
            message = f"no more than {ERRORS_MAX} errors are shown"
            ordered.append(DocumentError(last.file, last.line, last.column, "", message, "Fix these first."))
        return tuple(ordered)

    def warnings(self) -> tuple[DocumentError, ...]:
        """All warnings by file and position."""
        return tuple(sorted(self._warnings, key=_position))


def rendered(path: Path) -> str:
    """``features[llm.tokens].limits[1].per``: plain words by dots, everything else in brackets."""
    text = ""
    for part in path:
        if isinstance(part, str) and part.isidentifier():
            text += f".{part}" if text else part
        else:
            text += f"[{part}]"
    return text


def _described(document: SourceDocument, path: Path) -> str:
    return ": ".join(part for part in (document.label, rendered(path)) if part)


def _position(finding: DocumentError) -> tuple[str, int, int]:
    return finding.file, finding.line, finding.column
