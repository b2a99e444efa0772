"""Connections to Redis, and the translation of its errors. Everything else of redis-py stays inside the adapters."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from licet.wire.registers import RUN_SECTIONS, run_of
from licet_sidecar.ports import CallRefused, LinkDown, LinkRefused

COMMAND_TIMEOUT_S: Final = 1.0
"""After this long without a reply the link counts as down. The hot path never waits for it: checks have deadlines."""

BLOCK_SLACK_S: Final = 2.0
"""How much longer than a blocking read was asked to block its socket waits."""

CONNECTIONS_MAX: Final = 8
POOL_WAIT_S: Final = 5.0
"""How long a call waits for one of them. Longer than any check waits: many cold tenants at once are a queue, and not
an outage."""

_TRANSIENT_CODES: Final = re.compile(
    r"^(READONLY|LOADING|OOM|MISCONF|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|MOVED|ASK|BUSY|NOREPLICAS|UNKILLABLE)\b"
)


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


@asynccontextmanager
async def translated(url: str) -> AsyncIterator[None]:
    """Turns errors of redis-py into ``LinkDown`` and ``LinkRefused``."""
    try:
        yield
    except (AuthenticationError, AuthorizationError) as error:
        raise LinkRefused(
            f"Redis at {without_password(url)} refuses the login: {error}; check user and password in LICET_REDIS_URL"
        ) from error
    except NoPermissionError as error:
        raise LinkRefused(
            f"Redis at {without_password(url)} lacks a permission for this user: {error}; see the shipped ACL rules"
        ) from error
    except ResponseError as error:
        text = str(error)
        if "NOAUTH" in text or "WRONGPASS" in text or "invalid username-password" in text:
            raise LinkRefused(
                f"Redis at {without_password(url)} refuses the login: {text}; check LICET_REDIS_URL"
            ) from error
        raise LinkDown(f"Redis at {without_password(url)} answers: {text}") from error
    except (RedisError, OSError, TimeoutError) as error:
        raise LinkDown(
            f"Redis at {without_password(url)} cannot be reached: {str(error) or type(error).__name__}"
        ) from error
    except RuntimeError as error:
        # What uvloop raises, and redis-py lets through, when the server closed the connection just before a write.
        if "closed" not in str(error):
            raise
        raise LinkDown(f"Redis at {without_password(url)} closed the connection") from error


def failure_of(error: Exception, url: str) -> Exception:
    """The translated form of an error that a pipeline returned as one of its results."""
    if isinstance(error, NoPermissionError | AuthenticationError):
        return LinkRefused(f"Redis at {without_password(url)}: {error}; see the shipped ACL rules")
    if is_refusal_of_script(error):
        return CallRefused(f"Redis at {without_password(url)} holds or was sent what a script refuses: {error}")
    return LinkDown(f"Redis at {without_password(url)} answers: {error}")


def is_refusal_of_script(error: Exception) -> bool:
    """Whether one of our scripts refused a call, without any effect: the same call will be refused again."""
    return isinstance(error, ResponseError) and str(error).startswith("LICET ")


def is_transient(text: str) -> bool:
    """Whether an error reply is one that passes by itself (failover, loading, memory)."""
    return bool(_TRANSIENT_CODES.match(text))


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
