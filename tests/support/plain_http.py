"""HTTP to programs on this machine. ``httpx.get`` would read every certificate of the world for each request."""

from __future__ import annotations

import ssl
from typing import Any, Final

import httpx

NOBODY_TRUSTED: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def get(url: str, **options: Any) -> httpx.Response:
    """GET."""
    return httpx.get(url, verify=NOBODY_TRUSTED, trust_env=False, **options)
