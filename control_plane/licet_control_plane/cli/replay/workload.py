"""A recorded workload: any CSV whose rows are actions with a time and a number of units. Reads; keeps no row.

A file is read twice, once to check every row before anything is sent and once to send, so that its size does not
matter. Bad rows are counted as they are found, and only the first of them are kept for the message.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from licet.domain.ids import UNITS_MAX

PROBLEMS_SHOWN_MAX: Final = 10
"""Enough to see a pattern; the rest is only counted."""

_NS_PER_S: Final = 1_000_000_000
_TIMESTAMP: Final = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d)?)(?:[.,](\d{1,9}))? ?(Z|[+-]\d\d:?\d\d)?")
_EPOCH_SECONDS: Final = re.compile(r"(\d{1,11})(?:\.(\d{1,9}))?")


class WorkloadError(Exception):
    """The file as a whole cannot be used: not there, not CSV, without a column."""


class Row(NamedTuple):
    """One action. ``number`` counts data rows from 1; ``at_ns`` is nanoseconds since the Unix epoch, 0 without a time.

    ``units`` has one entry for each meter, in the order of ``Columns.meters``.
    """

    number: int
    at_ns: int
    units: tuple[int, ...]
    subject: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns to read. ``meters`` maps each meter to the columns added up for it; "" is a single meter."""

    meters: Mapping[str, Sequence[str]]
    timestamp: str | None = None
    subject: str | None = None


@dataclass(slots=True)
class Survey:
    """What the first pass over a file found. Units are summed over good rows."""

    rows: int = 0
    units: int = 0
    bad_rows: int = 0
    problems: list[str] = field(default_factory=list)
    first_at_ns: int = 0
    last_at_ns: int = 0


class BadRow(ValueError):
    """A row that cannot be an action; the message names row, line and column."""


def survey(path: Path, columns: Columns) -> Survey:
    """Read the whole file and count.

    Raises:
        WorkloadError: it cannot be used at all.
    """
    found = Survey()
    for row in _rows(path, columns):
        if isinstance(row, BadRow):
            found.bad_rows += 1
            if len(found.problems) < PROBLEMS_SHOWN_MAX:
                found.problems.append(str(row))
            continue
        found.first_at_ns = min(found.first_at_ns, row.at_ns) if found.rows else row.at_ns
        found.last_at_ns = max(found.last_at_ns, row.at_ns)
        found.rows += 1
        found.units += sum(row.units)
    return found


def good_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows that are actions, in the order of the file.

    Raises:
        WorkloadError: it cannot be used at all.
    """
    return (row for row in _rows(path, columns) if not isinstance(row, BadRow))


def parse_timestamp_ns(text: str) -> int:
    """Nanoseconds since the Unix epoch.

    Takes ISO 8601 with a blank or a T, up to nine fractional digits and an optional zone (UTC without one), or seconds
    since the epoch.

    Raises:
        ValueError: it is neither, or no such date.
    """
    text = text.strip()
    if match := _TIMESTAMP.fullmatch(text):
        base, fraction, zone = match.groups()
        at = datetime.fromisoformat(base + (zone or "+00:00"))
        seconds = int((at - _EPOCH).total_seconds())
    elif match := _EPOCH_SECONDS.fullmatch(text):
        whole, fraction = match.groups()
        seconds = int(whole)
    else:
        raise ValueError("is not a timestamp, such as 2027-01-31 18:17:03.9799600")
    return seconds * _NS_PER_S + (int(fraction.ljust(9, "0")) if fraction else 0)


def parse_units(text: str) -> int:
    """Units as a whole number that is not negative.

    Raises:
        ValueError: it is something else.
    """
    digits = text.strip()
    if digits.isascii() and digits.isdecimal():
        units = int(digits) if len(digits) <= 16 else UNITS_MAX + 1  # int() of a huge text takes quadratic time
        if units > UNITS_MAX:
            raise ValueError(f"is more than the largest number of units, {UNITS_MAX}")
        return units
    try:
        number = float(digits)
    except ValueError:
        raise ValueError("is not a number") from None
    raise ValueError("is negative" if number < 0 else "is not a whole number, written in digits")


def _rows(path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    try:
        # utf-8-sig takes a byte order mark off; newline="" leaves line ends, also CRLF, to the csv module.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if header is None:
                raise WorkloadError(f"{path}: the file is empty; its first line must name the columns")
            parse = _RowParser(header, columns, path)
            number = 0
            for cells in reader:
                if not cells:
                    continue  # an empty line, as many files end with
                number += 1
                try:
                    yield parse(number, reader.line_num, cells)
                except BadRow as problem:
                    yield problem
    except csv.Error as error:
        raise WorkloadError(f"{path}: line {reader.line_num} is not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path}: not UTF-8: {error.reason} at byte {error.start} of a block") from error
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error


class _RowParser:
    """Reads rows of one file; finds the columns once."""

    def __init__(self, header: Sequence[str], columns: Columns, path: Path) -> None:
        names = [name.strip() for name in header]

        def place(column: str) -> int:
            if names.count(column) != 1:
                problem = "no column" if column not in names else "more than one column"
                raise WorkloadError(f"{path}: {problem} named {column!r}; the columns are {', '.join(names)}")
            return names.index(column)

        self._cells = len(names)
        self._meters = [[(name, place(name)) for name in summed] for summed in columns.meters.values()]
        self._timestamp = (columns.timestamp, place(columns.timestamp)) if columns.timestamp else None
        self._subject = place(columns.subject) if columns.subject else None

    def __call__(self, number: int, line: int, cells: Sequence[str]) -> Row:
        where = f"row {number} (line {line})"
        if len(cells) != self._cells:
            raise BadRow(f"{where}: {len(cells)} cells, where the header has {self._cells}")

        def read(place: tuple[str, int], parse: Callable[[str], int]) -> int:
            column, index = place
            try:
                return parse(cells[index])
            except ValueError as error:
                text = cells[index]
                shown = repr(text if len(text) <= 40 else text[:40] + "…")
                raise BadRow(f"{where}, column {column}: {shown} {error}") from None

        at_ns = read(self._timestamp, parse_timestamp_ns) if self._timestamp else 0
        units = tuple([sum([read(place, parse_units) for place in summed]) for summed in self._meters])
        if max(units) > UNITS_MAX:
            raise BadRow(f"{where}: its columns add up to {max(units)} units, more than {UNITS_MAX}")
        return Row(number, at_ns, units, cells[self._subject] if self._subject is not None else "")


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
