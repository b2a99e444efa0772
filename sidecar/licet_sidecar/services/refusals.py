"""Why a call is refused instead of answered. A denial is an answer, and none of these."""

from __future__ import annotations


class NotReady(Exception):
    """Nothing was synced yet, so nothing can be decided: gRPC ``UNAVAILABLE``."""


class Malformed(Exception):
    """The request is malformed: gRPC ``INVALID_ARGUMENT``. The message names the field."""
