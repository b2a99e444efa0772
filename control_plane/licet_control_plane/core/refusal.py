"""The error for a change that cannot be made as asked. Pure."""

from __future__ import annotations


class ChangeInvalid(Exception):
    """The change cannot be made as asked. ``field`` says where, ``fix`` what to do."""

    def __init__(self, field: str, message: str, fix: str) -> None:
        super().__init__(message)
        self.field = field
        self.fix = fix
