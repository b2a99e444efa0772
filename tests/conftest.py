"""Fixtures that every test can ask for."""

from __future__ import annotations

from tests.support.valkey import valkey_process

__all__ = ["valkey_process"]
