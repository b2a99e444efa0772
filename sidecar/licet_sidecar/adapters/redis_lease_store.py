"""Quota registers in Redis, moved by ``settle.lua``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from licet.wire.names import RedisNames
from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, QUOTA_KEPT_S, WINDOW_GRACE_S, Pair
from licet_sidecar.adapters.redis_link import decoded, failure_of_call, translated, without_password
from licet_sidecar.adapters.redis_script import Script
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.settling import Granted, SettleAnswer, SettleCall, Status
from licet_sidecar.ports import CallRefused, LinkDown, Unconfirmed

CALLS_PER_PIPELINE_MAX: Final = 512
"""One round of upkeep is one round trip; the server serves others in between, as it reads 16 KB of one at a time."""
CONFIRM_MS: Final = (10, 100, 500)
"""How long one try waits for the disk and the replicas; each part is shorter than the client's timeout. In parts, since
each asks the replicas anew: asked along with what they have to write, they answer before it is on their disk, and by
themselves only once a second.
"""
ASKS_MAX: Final = 10_000
LISTEN_S: Final = 5.0
_FIELDS_BEFORE: Final = 8
_FIELDS_EACH: Final = 7
_SETTLE: Final = Script("settle.lua")


class RedisLeaseStore:
    """A ``LeaseStore``. ``listening`` is a client whose timeout is longer than ``LISTEN_S``.

    What a durable limit grants is on the server's disk and on ``replicas`` of it before it is answered; on a server
    without an append-only file, on ``replicas`` alone, of which there must be one then.
    """

    def __init__(
        self,
        redis: Redis,
        listening: Redis,
        names: RedisNames,
        url: str,
        *,
        sidecar: str,
        incarnation: int,
        replicas: int = 0,
    ) -> None:
        self._redis = redis
        self._listening = listening
        self._names = names
        self._url = url
        self._sidecar = sidecar
        self._incarnation = incarnation
        self._replicas = replicas

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
        durable = any(call.durable for call in calls)
        async with translated(self._url):
            arguments = [self._arguments(call, live) for call in calls]
            replies, doubt = await self._evaluate(_SETTLE.calls(arguments), durable)
            if _SETTLE.is_missing(replies):
                replies, doubt = await self._evaluate(_SETTLE.calls(arguments, whole=True), durable)
        answers: list[SettleAnswer | Exception] = []
        for call, reply in zip(calls, replies, strict=True):
            if isinstance(reply, Exception):
                answers.append(failure_of_call(reply, self._url))
            else:
                answers.append(doubt if call.durable and doubt else _answer(reply, len(call.asks)))
        return answers

    async def _evaluate(self, commands: Sequence[tuple[Any, ...]], durable: bool) -> tuple[list[Any], Exception | None]:
        """Replies, and why what they granted may still be lost (``None``: it may not, or nobody asked)."""
        if not durable:
            return await self._replies(commands), None
        waits = [("WAITAOF", 1, self._replicas, wait_ms) for wait_ms in CONFIRM_MS]
        replies = await self._replies([*commands, *waits])
        replies, reached = replies[: len(commands)], replies[-1]
        if isinstance(reached, Exception) and "appendonly" in str(reached):
            if not self._replicas:
                return replies, CallRefused(
                    f"a limit is durable, and Redis at {without_password(self._url)} has no append-only file; set"
                    " appendonly yes there, or LICET_DURABLE_REPLICAS here"
                )
            # Not the same connection, perhaps: the calls are repeated, and write again, before the wait.
            *replies, reached = await self._replies([*commands, ("WAIT", self._replicas, CONFIRM_MS[-1])])
            reached = reached if isinstance(reached, Exception) else [1, reached]
        if isinstance(reached, Exception):
            failure = failure_of_call(reached, self._url)
            # Only what is durable waits for this: other limits go on.
            return replies, failure if isinstance(failure, LinkDown) else CallRefused(f"a limit is durable: {failure}")
        on_disk, on_replicas = reached
        if on_disk >= 1 and on_replicas >= self._replicas:
            return replies, None
        return replies, Unconfirmed(
            f"what was leased is not safe yet: on disk {on_disk} of 1, on replicas {on_replicas} of {self._replicas}"
        )

    async def _replies(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One reply or error for each command."""
        if len(commands) == 1:
            try:
                return [await self._redis.execute_command(*commands[0])]  # type: ignore[no-untyped-call]  # untyped there
            except RedisError as error:
                if error.status_code is None and not isinstance(error, ResponseError):
                    raise  # no reply, but a connection that broke
                return [error]
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
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
