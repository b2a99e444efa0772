"""Where the sidecar is, and how to hold one connection to it."""

from __future__ import annotations

import os
from typing import Final

TARGET_DEFAULT: Final = "127.0.0.1:7420"
TARGET_VARIABLE: Final = "LICET_SIDECAR"
TIMEOUT_DEFAULT_S: Final = 1.0
"""A check is answered in well under a millisecond; one second is for a lease that ran dry while Redis is slow."""

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.enable_http_proxy", 0),  # a proxy for the outside world is never on the way to localhost
    ("grpc.enable_retries", 0),  # we retry ourselves, and without them each call is cheaper
    ("grpc.use_local_subchannel_pool", 1),  # one client, one connection: closing one never disturbs another
    # Find a sidecar that went away without a word (a frozen pod), while calls are in flight.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # gRPC backs off for up to two minutes by default. The sidecar is a neighbor: notice within a second that it is up.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


def resolve_target(target: str | None) -> str:
    """The address to dial: ``target``, else ``LICET_SIDECAR``, else ``127.0.0.1:7420``.

    ``host:port`` or ``unix:/path``.

    Raises:
        ValueError: it is a URL or has no port.
    """
    chosen = target or os.environ.get(TARGET_VARIABLE) or TARGET_DEFAULT
    if chosen.startswith("unix:"):
        return chosen
    _, colon, port = chosen.rpartition(":")
    if "//" in chosen or not colon or not port.isdecimal():
        raise ValueError(f"sidecar address {chosen!r} must be host:port or unix:/path, such as {TARGET_DEFAULT}")
    return chosen
