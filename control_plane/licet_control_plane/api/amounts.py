"""Amounts on the wire: a whole number of units, or money such as ``"50.00 USD"``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _amount(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is neither a whole number of units nor money such as '50.00 USD'")
    return value


Amount = Annotated[int | str, BeforeValidator(_amount)]
