"""The one place where Redis clients are made, and where their errors become ours.

Two kinds of failure: ``RedisUnavailable`` passes by itself, ``RedisRefused`` needs an operator. Callers of both back
off and try again, because what an operator repairs must be noticed without a restart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError

from licet.wire.redis_replies import ERROR_REPLIES, error_code, meaning_of, plain_text

Redis = Any
"""``redis.asyncio.Redis``: its own annotations unite synchronous and asynchronous answers, which helps nobody."""

CONNECT_S_MAX: Final = 3.0
ANSWER_S_MAX: Final = 10.0
"""Longer than the longest blocking read (``BLOCK_MS``), so that silence is not taken for a fault."""
BLOCK_MS: Final = 1_000
BACKOFF_S_MIN: Final = 0.1
BACKOFF_S_MAX: Final = 2.0
"""Short, since a server that comes back should be noticed soon; jittered, since many wait for the same one."""


class RedisUnavailable(Exception):
    """Redis cannot be reached, or answers that it cannot serve just now. Passes by itself; ``fix`` is what may help."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix or "Start Redis there, or set LICET_REDIS_URL; the server keeps trying."


class RedisRefused(Exception):
    """Redis answers, and refuses. ``fix`` says what to do."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def connect(url: str) -> Redis:
    """A client, which connects when it is first used. Whoever makes it closes it with ``aclose``."""
    return aioredis.Redis.from_url(
        url,
        protocol=2,
        socket_connect_timeout=CONNECT_S_MAX,
        socket_timeout=ANSWER_S_MAX,
        # Every caller has a loop of its own that tries again, and knows what is safe to repeat.
        retry=Retry(NoBackoff(), 0),
    )


def location(url: str) -> str:
    """``host:port`` of a URL, for messages: never its password."""
    parts = urlsplit(url)
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turns the client's errors into ours.

    Raises:
        RedisUnavailable: no connection, no answer in time, or a refusal that passes: loading, a replica, out of memory.
        RedisRefused: wrong password, a command that is not allowed, or any other refusal.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        raise _failure_of(error) from error


def _failure_of(error: Exception) -> RedisUnavailable | RedisRefused:
    text = plain_text(str(error))
    code = (error.status_code if isinstance(error, RedisError) else None) or error_code(text)
    if isinstance(error, AuthenticationError | AuthorizationError):
        return RedisRefused(
            f"Redis refuses the login: {text}",
            "Set LICET_REDIS_URL to redis://user:password@host:port/0 with the password that Redis has.",
        )
    if not isinstance(error, ResponseError) and code not in ERROR_REPLIES:
        return RedisUnavailable(text or type(error).__name__)
    meaning = meaning_of(code, text)
    if code and not text.startswith(code):
        text = f"{code} {text}"
    failure = RedisUnavailable if meaning.passes else RedisRefused
    return failure(f"Redis refuses a command: {text}", f"{meaning.fix[0].upper()}{meaning.fix[1:]}.")


def backoff_s(failures: int) -> float:
    """How long to wait after ``failures`` in a row: doubled each time, bounded, jittered."""
    ceiling: float = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** min(failures, 10))
    return ceiling * random.uniform(0.5, 1.0)
