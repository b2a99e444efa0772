"""Fixtures that every test can ask for."""

from __future__ import annotations

from tests.support.postgres import (
    database_url,
    long_suite_database_url,
    postgres_process,
    postgres_server,
    postgres_url,
)
from tests.support.valkey import valkey_process

__all__ = [
    "database_url",
    "long_suite_database_url",
    "postgres_process",
    "postgres_server",
    "postgres_url",
    "valkey_process",
]
