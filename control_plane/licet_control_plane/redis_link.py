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
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

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
    """Redis cannot be reached or does not answer. Passes by itself."""


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
        RedisUnavailable: no connection, or no answer in time.
        RedisRefused: wrong password, or a command that is not allowed, or any other refusal.
    """
    try:
        yield
    except AuthenticationError as error:
        raise RedisRefused(
            f"Redis refuses the login: {error}",
            "Set LICET_REDIS_URL to redis://user:password@host:port/0 with the password that Redis has.",
        ) from error
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise RedisUnavailable(str(error) or type(error).__name__) from error
    except NoPermissionError as error:
        raise RedisRefused(
            f"Redis does not allow a command: {error}",
            "Give the user of LICET_REDIS_URL the access rules in deploy/k8s/base/secret.example.yaml.",
        ) from error
    except ResponseError as error:
        fix = "Look at the Redis server: its answer says why."
        if str(error).startswith("OOM"):
            fix = "Redis is full: raise its maxmemory. It must run with maxmemory-policy noeviction."
        raise RedisRefused(f"Redis refuses a command: {error}", fix) from error
    except RedisError as error:
        raise RedisUnavailable(str(error)) from error


def backoff_s(failures: int) -> float:
    """How long to wait after ``failures`` in a row: doubled each time, bounded, jittered."""
    ceiling: float = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** min(failures, 10))
    return ceiling * random.uniform(0.5, 1.0)
