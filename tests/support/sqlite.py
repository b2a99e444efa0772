"""Migrated, empty SQLite databases: copies of one that was migrated once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from licet_control_plane.store.database import Database


def new_database(path: Path) -> str:
    """Make one at ``path``, unless there is one; its URL."""
    if not path.exists():
        path.write_bytes(_migrated())
    return f"sqlite:///{path}"


@functools.cache
def _migrated() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "licet.db")
        database = Database(f"sqlite:///{path}")
        database.migrate()
        database.close()  # which leaves nothing in the write-ahead log
        return path.read_bytes()
