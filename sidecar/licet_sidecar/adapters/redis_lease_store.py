"""Quota registers in Redis, moved by ``settle.lua``."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from licet.wire.names import RedisNames
from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, QUOTA_KEPT_S, SERVER_RUN_LUA, WINDOW_GRACE_S, Pair
from licet_sidecar.adapters.redis_link import decoded, failure_of, is_refusal_of_script, translated
from licet_sidecar.core.leases import Granted, LeaseBook, SettleAnswer, SettleCall, Status

CALLS_PER_PIPELINE_MAX: Final = 32
"""Bounds how long one pipeline keeps checks waiting here, and other sidecars at the server: about 2 ms."""
ASKS_MAX: Final = 10_000
LISTEN_S: Final = 5.0
_FIELDS_BEFORE: Final = 8
_FIELDS_EACH: Final = 7
_SCRIPT: Final = SERVER_RUN_LUA + Path(__file__).with_name("settle.lua").read_text()
_SCRIPT_SHA: Final = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()


class RedisLeaseStore:
    """A ``LeaseStore``. ``listening`` is a client whose timeout is longer than ``LISTEN_S``."""

    def __init__(
        self, redis: Redis, listening: Redis, names: RedisNames, url: str, *, sidecar: str, incarnation: int
    ) -> None:
        self._redis = redis
        self._listening = listening
        self._names = names
        self._url = url
        self._sidecar = sidecar
        self._incarnation = incarnation

    async def settle(self, calls: Sequence[SettleCall], live: int) -> list[SettleAnswer | Exception]:
        """See ``LeaseStore``."""
        answers: list[SettleAnswer | Exception] = []
        for start in range(0, len(calls), CALLS_PER_PIPELINE_MAX):
            answers.extend(await self._settle_some(calls[start : start + CALLS_PER_PIPELINE_MAX], live))
        return answers

    async def ask(self, tenant: str, why: str) -> None:
        """See ``LeaseStore``."""
        async with translated(self._url):
            await self._redis.xadd(
                self._names.asks(), {"tenant": tenant, "why": why}, maxlen=ASKS_MAX, approximate=True
            )

    async def recall(self, tenant: str, quotas: Sequence[str]) -> None:
        """See ``LeaseStore``."""
        async with translated(self._url):
            await self._redis.publish(self._names.wanted(), "\n".join([self._sidecar, tenant, *quotas]))

    async def recalls(self) -> AsyncIterator[tuple[str, list[str]]]:
        """See ``LeaseStore``."""
        async with translated(self._url):
            subscription = self._listening.pubsub(ignore_subscribe_messages=True)
            async with subscription:
                await subscription.subscribe(self._names.wanted())
                while True:
                    message = await subscription.get_message(timeout=LISTEN_S)
                    if message is None:
                        continue
                    sidecar, tenant, *quotas = decoded(message["data"]).split("\n")
                    if sidecar != self._sidecar:
                        yield tenant, quotas

    async def _settle_some(self, calls: Sequence[SettleCall], live: int) -> list[SettleAnswer | Exception]:
        async with translated(self._url):
            replies = await self._evaluate([("EVALSHA", _SCRIPT_SHA, *self._arguments(call, live)) for call in calls])
            if any(isinstance(reply, NoScriptError) for reply in replies):
                # The server was restarted or its scripts flushed. Calls may be repeated, so all are sent again.
                replies = await self._evaluate([("EVAL", _SCRIPT, *self._arguments(call, live)) for call in calls])
        return [
            failure_of(reply, self._url) if isinstance(reply, Exception) else _answer(reply, len(call.asks))
            for call, reply in zip(calls, replies, strict=True)
        ]

    async def _evaluate(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        if len(commands) == 1:
            try:
                return [await self._redis.execute_command(*commands[0])]  # type: ignore[no-untyped-call]  # untyped there
            except ResponseError as error:
                if isinstance(error, NoScriptError) or is_refusal_of_script(error):
                    return [error]
                raise
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, RedisError) and "NOSCRIPT" in str(reply):
                return [NoScriptError(str(reply))]
        return replies

    def _arguments(self, call: SettleCall, live: int) -> list[Any]:
        names, tenant = self._names, call.tenant
        keys = [names.limits(tenant), *(names.quota(tenant, ask.lease.quota) for ask in call.asks)]
        arguments: list[Any] = [
            self._sidecar,
            self._incarnation,
            call.op,
            call.pair.epoch,
            call.pair.run,
            call.revision,
            live,
            WINDOW_GRACE_S,
            QUOTA_KEPT_S,
            1_000 * (HOLD_S + HOLD_MARGIN_S),
            int(call.retiring),
            int(call.durable),
        ]
        for ask in call.asks:
            lease = ask.lease
            arguments += [
                lease.limit_key,
                LeaseBook.marker(lease),
                lease.start,
                lease.end,
                ask.cap,
                ask.used,
                ask.reserved,
                ask.want,
                ask.min,
                ask.amount,
                ask.kind.value,
                int(ask.known),
            ]
        return [len(keys), *keys, *arguments]


def _answer(reply: Sequence[Any], asks: int) -> SettleAnswer:
    status = Status[decoded(reply[0])]
    common: dict[str, Any] = {
        "status": status,
        "incarnation": int(reply[2]),
        "op": int(reply[3]),
        "pair": Pair(int(reply[4]), decoded(reply[5])),
        "phase": decoded(reply[6]),
        "redis_ms": int(reply[7]),
    }
    if status is not Status.OK:
        return SettleAnswer(**common, about=int(reply[_FIELDS_BEFORE]) - 1)
    numbers = [int(value) for value in reply[_FIELDS_BEFORE : _FIELDS_BEFORE + asks * _FIELDS_EACH]]
    granted = tuple(
        Granted(g, d, u, amount, sum_, used, wanted == 1)
        for g, d, u, amount, sum_, used, wanted in zip(*[iter(numbers)] * _FIELDS_EACH, strict=True)
    )
    return SettleAnswer(**common, granted=granted)
