"""Connections to Redis, and the translation of its errors. Everything else of redis-py stays inside the adapters."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError

from licet.wire.redis_replies import ERROR_REPLIES, error_code, meaning_of, plain_text
from licet.wire.registers import RUN_SECTIONS, run_of
from licet_sidecar.ports import CallRefused, LinkDown, LinkFull, LinkRefused

COMMAND_TIMEOUT_S: Final = 1.0
"""After this long without a reply the link counts as down. The hot path never waits for it: checks have deadlines."""

BLOCK_SLACK_S: Final = 2.0
"""How much longer than a blocking read was asked to block its socket waits."""

CONNECTIONS_MAX: Final = 8
POOL_WAIT_S: Final = 5.0
"""How long a call waits for one of them. Longer than any check waits: many cold tenants at once are a queue, and not
an outage."""


def connect(url: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Redis:
    """A client that fails fast and repeats nothing by itself: who repeats a call, and when, is decided here.

    Raises:
        LinkRefused: the URL is not one.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=COMMAND_TIMEOUT_S,
            socket_keepalive=True,
            max_connections=CONNECTIONS_MAX,
            timeout=POOL_WAIT_S,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            decode_responses=False,
            client_name="licet-sidecar",
        )
    except ValueError as error:
        raise LinkRefused(f"Redis URL {without_password(url)!r}: {error}; give redis://host:port/0") from error
    return Redis.from_pool(pool)


@dataclass(slots=True)
class RoundTrips:
    """How often this process waited for Redis; a pipeline is one."""

    total: int = 0


round_trips: Final = RoundTrips()


@asynccontextmanager
async def translated(url: str) -> AsyncIterator[None]:
    """One round trip: counts it, and turns errors of redis-py into ``LinkDown`` and ``LinkRefused``."""
    round_trips.total += 1
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise failure_of(error, url) from error
    except RuntimeError as error:
        # What uvloop raises, and redis-py lets through, when the server closed the connection just before a write.
        if "closed" not in str(error):
            raise
        raise LinkDown(f"Redis at {without_password(url)} closed the connection") from error


def failure_of(error: Exception, url: str) -> LinkDown | LinkRefused:
    """What an error of redis-py means for everybody: ``LinkDown`` when it may pass by itself."""
    where, text = without_password(url), plain_text(str(error))
    code = (error.status_code if isinstance(error, RedisError) else None) or error_code(text)
    if isinstance(error, AuthenticationError | AuthorizationError) and code not in ERROR_REPLIES:
        code = "WRONGPASS"
    if not isinstance(error, ResponseError) and code not in ERROR_REPLIES:
        return LinkDown(f"Redis at {where} cannot be reached: {text or type(error).__name__}")
    meaning = meaning_of(code, text)
    if code and not text.startswith(code):
        text = f"{code} {text}"
    failure = LinkFull if code == "OOM" else LinkDown if meaning.passes else LinkRefused
    return failure(f"Redis at {where} answers {text!r}: {meaning.fix}")


def failure_of_call(error: Exception, url: str) -> LinkDown | LinkRefused:
    """The same for one call of a script: what is wrong with its keys or arguments costs only that call."""
    if is_refusal_of_script(error):
        return CallRefused(f"Redis at {without_password(url)} holds or was sent what a script refuses: {error}")
    failure = failure_of(error, url)
    code = error.status_code if isinstance(error, RedisError) else None
    concerns_all = isinstance(failure, LinkDown) or code in ERROR_REPLIES
    return failure if concerns_all else CallRefused(str(failure))


def is_refusal_of_script(error: Exception) -> bool:
    """Whether one of our scripts refused a call, without any effect: the same call will be refused again."""
    return isinstance(error, ResponseError) and str(error).startswith("LICET ")


def without_password(url: str) -> str:
    """The URL fit for a log, also when it is not one: up to the last ``@``, and without what follows a ``?``."""
    return re.sub(r"\?.*", "?…", re.sub(r"://.*@", "://…@", url))


def decoded(value: Any) -> str:
    """A reply's string."""
    return value.decode() if isinstance(value, bytes) else str(value)


async def run_id_of(execute: Callable[..., Awaitable[Any]]) -> str:
    """The run of the server that ``execute`` talks to."""
    return run_id_in(await execute("INFO", *RUN_SECTIONS))


def run_id_in(info: Any) -> str:
    """The run (``run_of``) in a reply to ``INFO``, as text or as redis-py parsed it."""
    if not isinstance(info, dict):
        info = dict(re.findall(r"^(run_id|master_replid):(\w+)", decoded(info), re.MULTILINE))
    return run_of(info)
