"""What a command writes: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def emit_json(result: object) -> None:
    """One JSON object (or array) on one line of standard output."""
    print(json.dumps(result, separators=(",", ":"), ensure_ascii=False, default=str), flush=True)


def say(text: str = "") -> None:
    """One line of the result, for people."""
    print(text)


def note(text: str) -> None:
    """A remark for the person at the keyboard, never part of the result."""
    print(text, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numeric: Sequence[str] = ()) -> None:
    """A table on standard output; columns in ``numeric`` are aligned right. Says "none" when there are no rows."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        shown.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(_cell(value) for value in row))
    # Piped into a file or another program, a row stays on one line however long it is.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 500)
    if shown.row_count:
        console.print(shown)
    else:
        print("none")


def _cell(value: Any) -> str:
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.1f}"
        case dict():
            return " ".join(f"{key}={item}" for key, item in value.items()) or "-"
        case list():
            return ", ".join(map(str, value)) or "-"
        case _:
            return str(value)
