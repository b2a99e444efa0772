"""What of a request's attributes is recorded: the value, something that stands for it, or only that it was there.

Decisions are made over the true values; what is recorded is put together here, before it is written anywhere.
Source: ``docs/adr/0022-redaction-before-the-log.md``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

SALT_BYTES: Final = 32
REDACTED: Final = "(redacted)"
"""Recorded instead of a value."""
HASH_PREFIX: Final = "hmac:"
_HASH_HEX: Final = 32
"""128 bits: that two values of one deployment share a hash is never seen."""


class RecordMode(StrEnum):
    """What an attribute's record is: its value, a keyed hash (equal values stay countable), or that it was sent."""

    KEEP = "keep"
    HASH = "hash"
    REDACT = "redact"


Value = str | int | float | bool | list[str]


def hidden(values: Mapping[str, Value], modes: Mapping[str, RecordMode], salt: bytes) -> dict[str, Value]:
    """What is recorded for those of ``values`` that ``modes`` does not keep.

    Without a salt, which an older control plane does not publish, a hash would be a guess away: it is redacted then.
    """
    return {
        name: hashed(name, values[name], salt) if mode is RecordMode.HASH and salt else REDACTED
        for name, mode in modes.items()
        if name in values and mode is not RecordMode.KEEP
    }


def hashed(name: str, value: Value, salt: bytes) -> str:
    """Stands for a value of the attribute ``name``, whichever action and tenant it came with."""
    text = f"{len(name)}:{name}".encode() + _canonical(value)
    return HASH_PREFIX + hmac.digest(salt, text, hashlib.sha256).hex()[:_HASH_HEX]


def _canonical(value: Value) -> bytes:
    match value:
        case bool():
            return b"b1" if value else b"b0"
        case int():
            return f"i{int(value)}".encode()
        case float():
            return f"d{value!r}".encode()
        case str():
            return b"s" + value.encode(errors="surrogatepass")
        case _:
            # Length-prefixed, so that ["a", "bc"] and ["ab", "c"] differ.
            return b"l" + b"".join(b"%d:" % len(item.encode()) + item.encode() for item in value)
