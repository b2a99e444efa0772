"""A bar on standard error, for a person who waits there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def bar(doing: str = "verifying", unit: str = "events") -> Iterator[Progress | None]:
    """The bar; ``None`` where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        shown.add_task(unit, total=None)
        yield shown


def move(shown: Progress | None, done: int, of: int) -> None:
    """Show how far it is."""
    if shown is not None:
        shown.update(shown.task_ids[0], completed=done, total=of)
