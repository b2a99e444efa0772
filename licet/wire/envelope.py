"""The one envelope for everything packed with msgpack in Redis and on disk: ``[schema version, kind, body]``."""

from __future__ import annotations

from typing import Any, Final

import msgpack

SCHEMA_VERSION: Final = 1
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Largest message that is unpacked: a bundle's chunk or a disk snapshot; far above any real one, below harm."""


class EnvelopeError(ValueError):
    """The bytes are not an envelope this program can read. Says whether they are damaged or only too new."""


def pack(kind: str, body: Any) -> bytes:
    """``body`` (msgpack-able) in an envelope that says what it is."""
    packed: bytes = msgpack.packb([SCHEMA_VERSION, kind, body], use_bin_type=True)
    return packed


def unpack(kind: str, data: bytes) -> Any:
    """The body of an envelope of ``kind``.

    Raises:
        EnvelopeError: not msgpack, too large, another kind, or written by a newer version.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise EnvelopeError(f"{kind}: {len(data)} bytes are more than the {MESSAGE_BYTES_MAX} that are accepted")
    try:
        message = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise EnvelopeError(f"{kind}: not readable as msgpack: {error}") from error
    if not (isinstance(message, list) and len(message) == 3):
        raise EnvelopeError(f"{kind}: not an envelope")
    version, found_kind, body = message
    if version != SCHEMA_VERSION:
        raise EnvelopeError(f"{kind}: schema version {version!r}; this program reads {SCHEMA_VERSION}: upgrade it")
    if found_kind != kind:
        raise EnvelopeError(f"expected {kind}, found {found_kind!r}")
    return body
