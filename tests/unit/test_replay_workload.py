"""Reading recorded workloads: real files, wrong files, and everything a spreadsheet might write."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.ids import UNITS_MAX
from licet_control_plane.cli.replay.workload import (
    PROBLEMS_SHOWN_MAX,
    Columns,
    WorkloadError,
    good_rows,
    parse_timestamp_ns,
    parse_units,
    survey,
)

BOTH = Columns(meters={"": ["Context", "Generated"]}, timestamp="TIMESTAMP")
AT_NS = 1_700_158_623_979_960_000  # 2023-11-16 18:17:03.97996 UTC


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "workload.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_reads_crlf_and_seven_fractional_digits_and_no_final_newline(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "TIMESTAMP,Context,Generated\r\n2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8",
    )
    rows = list(good_rows(path, BOTH))
    assert [(row.number, row.units) for row in rows] == [(1, (4818,)), (2, (3188,))]
    assert rows[0].at_ns == AT_NS
    assert rows[1].at_ns - rows[0].at_ns == 52_000_000


def test_reads_a_byte_order_mark_and_quoted_cells(tmp_path: Path) -> None:
    path = written(
        tmp_path, '\ufeff"TIMESTAMP","who, then",Context,Generated\n"2023-11-16 18:17:03","a ""b""\nc", 5 ,"7"\n'
    )
    (row,) = good_rows(path, Columns(meters={"": ["Context", "Generated"]}, subject="who, then"))
    assert row.units == (12,)
    assert row.subject == 'a "b"\nc'


def test_keeps_several_meters_apart(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,c\n1,2,3\n")
    (row,) = good_rows(path, Columns(meters={"input": ["a", "c"], "output": ["b"]}))
    assert row.units == (4, 2)


def test_ignores_empty_lines_and_counts_rows_without_them(tmp_path: Path) -> None:
    path = written(tmp_path, "n\n\n1\n\n2\n\n")
    assert [row.number for row in good_rows(path, Columns(meters={"": ["n"]}))] == [1, 2]


def test_surveys_what_is_there(tmp_path: Path) -> None:
    path = written(
        tmp_path, "TIMESTAMP,Context,Generated\n2023-11-16 18:17:05,1,2\n2023-11-16 18:17:03.97996,3,4\nsoon,5,6\n"
    )
    found = survey(path, BOTH)
    assert (found.rows, found.units, found.bad_rows) == (2, 10, 1)
    assert found.first_at_ns == AT_NS
    assert found.last_at_ns == 1_700_158_625_000_000_000


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ("2023-11-16 18:17:03,many,1", "row 1 (line 2), column Context: 'many' is not a number"),
        ("2023-11-16 18:17:03,1,-5", "row 1 (line 2), column Generated: '-5' is negative"),
        (
            "2023-11-16 18:17:03,1,1.5",
            "row 1 (line 2), column Generated: '1.5' is not a whole number, written in digits",
        ),
        ("2023-11-16 18:17:03,,1", "row 1 (line 2), column Context: '' is not a number"),
        ("yesterday,1,1", "row 1 (line 2), column TIMESTAMP: 'yesterday' is not a timestamp"),
        ("2023-13-16 18:17:03,1,1", "row 1 (line 2), column TIMESTAMP: '2023-13-16 18:17:03' month must be in 1..12"),
        ("2023-11-16 18:17:03,1", "row 1 (line 2): 2 cells, where the header has 3"),
        (f"2023-11-16 18:17:03,{UNITS_MAX},1", f"add up to {UNITS_MAX + 1} units"),
        ("2023-11-16 18:17:03," + "9" * 5000 + ",1", "more than the largest number of units"),
    ],
)
def test_names_row_line_and_column_of_a_bad_row(tmp_path: Path, cells: str, problem: str) -> None:
    path = written(tmp_path, f"TIMESTAMP,Context,Generated\n{cells}\n2023-11-16 18:17:03,1,1\n")
    found = survey(path, BOTH)
    assert (found.rows, found.bad_rows) == (1, 1)
    assert problem in found.problems[0]
    assert len(found.problems[0]) < 200
    assert [row.number for row in good_rows(path, BOTH)] == [2]


def test_keeps_only_the_first_problems_of_a_hopeless_file(tmp_path: Path) -> None:
    found = survey(written(tmp_path, "n\n" + "x\n" * 500), Columns(meters={"": ["n"]}))
    assert (found.bad_rows, len(found.problems)) == (500, PROBLEMS_SHOWN_MAX)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2\n", "no column named 'n'; the columns are a, b"),
        (b"n,n\n1,2\n", "more than one column named 'n'"),
        (b'n\n"1\n', "line 2 is not CSV"),
        (b"n\n\xff\xfe\n", "not UTF-8"),
    ],
)
def test_refuses_a_file_that_cannot_be_used(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(WorkloadError, match=problem):
        survey(written(tmp_path, content), Columns(meters={"": ["n"]}))


def test_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        survey(tmp_path / "none.csv", Columns(meters={"": ["n"]}))


@pytest.mark.parametrize(
    ("text", "at_ns"),
    [
        ("2023-11-16 18:17:03.9799600", AT_NS),
        ("2023-11-16T18:17:03.97996Z", AT_NS),
        ("2023-11-16T19:17:03.979960000+01:00", AT_NS),
        ("2023-11-16 19:17:03,97996+0100", AT_NS),
        (" 1700158623.97996 ", AT_NS),
        ("2023-11-16 18:17:03.979960001", AT_NS + 1),
        ("1970-01-01 00:00", 0),
    ],
)
def test_reads_timestamps_to_the_nanosecond(text: str, at_ns: int) -> None:
    assert parse_timestamp_ns(text) == at_ns


@pytest.mark.parametrize("text", ["", "2023-11-16", "16.11.2023 18:17", "2023-11-16 18:17:03.1234567890", "-5", "1e9"])
def test_refuses_what_is_no_timestamp(text: str) -> None:
    with pytest.raises(ValueError):
        parse_timestamp_ns(text)


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1)))
def test_agrees_with_the_calendar(at: datetime) -> None:
    whole = at.replace(microsecond=0, tzinfo=UTC)
    expected_ns = int(whole.timestamp()) * 1_000_000_000 + at.microsecond * 1_000
    assert parse_timestamp_ns(at.isoformat(sep=" ", timespec="microseconds")) == expected_ns


@given(st.integers(min_value=0, max_value=UNITS_MAX))
def test_reads_every_number_of_units(units: int) -> None:
    assert parse_units(f" {units}") == units


@pytest.mark.parametrize("text", ["", "x", "1.0", "-1", "1_000", "+1", "0x10", "٣", "nan", "inf", str(UNITS_MAX + 1)])
def test_refuses_what_is_no_number_of_units(text: str) -> None:
    with pytest.raises(ValueError):
        parse_units(text)
