"""Licenses as people keep them in files: documents of ``kind: License``, and tables as CSV, a row each. Pure.

They are no part of a bundle: that is for all tenants, and a license is put in force on its own. Both forms come to the
same documents, so an error says file, line and field in either.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, WithJsonSchema

from licet.domain.catalog import LicenseStatus
from licet.domain.ids import TENANT_PATTERN, UNITS_MAX
from licet.domain.money import format_budget, parse_budget
from licet_control_plane.core.documents.findings import DocumentError, Findings
from licet_control_plane.core.documents.model import Source
from licet_control_plane.core.documents.nodes import Node, SourceDocument
from licet_control_plane.core.documents.reading import SourceFile, read
from licet_control_plane.core.documents.scalars import MoneyForm, Name, PositiveUnits, Seconds, Text, refused
from licet_control_plane.core.documents.schema import check_model
from licet_control_plane.core.suggestion import did_you_mean

KIND: Final = "License"
NEVER: Final = "never"
TABLE_SUFFIX: Final = ".csv"

_YEARS: Final = range(1971, 10_000)


def _tenant(text: str) -> str:
    if not TENANT_PATTERN.fullmatch(text):
        raise refused(
            f"{text!r} cannot name a tenant",
            "Use up to 128 letters, digits, dots, dashes and underscores, starting with a letter or a digit.",
        )
    return text


def _instant(value: Any) -> str:
    """As the API takes it."""
    try:
        at = datetime.fromisoformat(value)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        at = None
    if at is None or at.year not in _YEARS or at.microsecond:
        raise refused(
            f"{value!r} is not a date", "Write a date such as 2027-01-31, or an instant such as 2027-01-31T18:00:00Z."
        )
    return at.isoformat().replace("+00:00", "Z")


def _end(value: Any) -> str | None:
    return None if value == NEVER else _instant(value)


def _amount(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= UNITS_MAX:
        return value
    try:
        return format_budget(*parse_budget(value))
    except (TypeError, ValueError, AttributeError):
        raise refused(
            f"{value!r} is neither a whole number of units nor money", 'Write units, such as 1_000, or "50.00 USD".'
        ) from None


Tenant = Annotated[
    str, AfterValidator(_tenant), WithJsonSchema({"type": "string", "pattern": f"^({TENANT_PATTERN.pattern})$"})
]
Instant = Annotated[str, BeforeValidator(_instant, json_schema_input_type=str)]
End = Annotated[str | None, BeforeValidator(_end, json_schema_input_type=str)]
Amount = Annotated[
    int | str, BeforeValidator(_amount, json_schema_input_type=Annotated[int, Field(ge=0, le=UNITS_MAX)] | MoneyForm)
]


class LicenseSource(Source):
    """``kind: License``: all of a tenant's license but its grants.

    What is left out is as in a new license; but ``status`` and ``ends_at``, which move by themselves, stay as they are.
    """

    tenant: Tenant
    plan: Name
    status: LicenseStatus | None = None
    starts_at: Instant | None = None
    ends_at: End = NEVER
    grace: Seconds | None = None
    renewal_period: Literal["day", "week", "month", "year"] | None = None
    auto_renew: StrictBool = False
    addons: dict[Name, PositiveUnits] = Field(default_factory=dict)
    overrides: dict[Text, Amount] = Field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As ``POST /v1/licenses/import`` takes it: the fields that were written."""
        body = {name: getattr(self, name) for name in self.model_fields_set if name != "grace"}
        if self.status is None:
            body.pop("status", None)
        if self.grace is not None:
            body["grace_s"] = self.grace
        return body


@dataclass(frozen=True, slots=True)
class WrittenLicense:
    """A license, and where it was written."""

    document: SourceDocument
    source: LicenseSource


def read_licenses(files: Iterable[SourceFile]) -> tuple[list[WrittenLicense], tuple[DocumentError, ...]]:
    """The licenses of all files, and all that is wrong with them. A file is a table when its name ends in ``.csv``."""
    findings = Findings()
    written: dict[str, WrittenLicense] = {}
    for file in files:
        documents = _rows(file, findings) if file.path.endswith(TABLE_SUFFIX) else read(file, findings)[0]
        for document in documents:
            if document.kind != KIND:
                findings.error(
                    document, ("kind",), "only licenses stand here", "Publish other documents with 'licet policy push'."
                )
                continue
            source = check_model(document, LicenseSource, findings)
            if source is None:
                continue
            first = written.setdefault(source.tenant, WrittenLicense(document, source))
            if first.document is not document:
                line, _ = first.document.root.position_of(("tenant",))
                findings.error(
                    document,
                    ("tenant",),
                    f"the tenant {source.tenant!r} is there twice; first at {first.document.file}:{line}",
                    "Remove one of them.",
                    code="twice",
                )
    return list(written.values()), findings.errors()


def _rows(file: SourceFile, findings: Findings) -> list[SourceDocument]:
    lines = file.text.splitlines()
    table = csv.reader(file.text.splitlines(keepends=True), strict=True)
    columns: list[str] = []
    documents = []
    line = 1
    try:
        for cells in table:
            if not columns:
                columns = [cell.strip() for cell in cells]
                _check_columns(file, columns, line, findings)
            elif len(cells) > len(columns) and any(cell.strip() for cell in cells[len(columns) :]):
                findings.error_at(
                    file.path, line, 1, f"{len(cells)} cells under {len(columns)} columns", "Quote cells with commas."
                )
            elif any(cell.strip() for cell in cells):
                entries = {"kind": Node(line, 1, KIND)}
                for column, cell in zip(columns, cells, strict=False):
                    if column in LicenseSource.model_fields and (text := cell.strip()):
                        entries[column] = _cell(column, text, line)
                keys = dict.fromkeys(entries, (line, 1))
                documents.append(SourceDocument(file.path, lines, Node(line, 1, entries, keys)))
            line = table.line_num + 1
    except csv.Error as error:
        findings.error_at(file.path, table.line_num, 1, f"not CSV: {error}", "Close quotes, and double those inside.")
    return documents


def _check_columns(file: SourceFile, columns: list[str], line: int, findings: Findings) -> None:
    for column in columns:
        if column not in LicenseSource.model_fields:
            fix = did_you_mean(column, LicenseSource.model_fields)
            findings.error_at(file.path, line, 1, f"there is no column {column!r}", fix, code="unknown-name")
        elif columns.count(column) > 1:
            findings.error_at(file.path, line, 1, f"the column {column!r} is there twice", "Remove one of them.")
            return


def _cell(column: str, text: str, line: int) -> Node:
    match column:
        case "auto_renew":
            return Node(line, 1, {"true": True, "false": False}.get(text.lower(), text))
        case "addons" | "overrides":
            pairs = [pair.rpartition("=") for pair in text.split(";") if pair.strip()]
            entries = {key.strip(): Node(line, 1, _number(value.strip())) for key, _, value in pairs}
            return Node(line, 1, entries, dict.fromkeys(entries, (line, 1)))
        case _:
            return Node(line, 1, text)


def _number(text: str) -> int | str:
    digits = text.replace("_", "")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 18 else text
