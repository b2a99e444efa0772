"""Seats in Redis, moved by ``seats.lua``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgpack
from redis.asyncio import Redis

from licet.wire.names import RedisNames
from licet.wire.registers import Pair
from licet_sidecar.adapters.redis_link import decoded, failure_of, translated
from licet_sidecar.adapters.redis_script import Script
from licet_sidecar.core.seats import (
    KEPT_MS,
    NOT_SAID,
    Result,
    Room,
    SeatAnswer,
    SeatAsk,
    SeatCall,
    SeatStatus,
    Who,
)

CALLS_PER_PIPELINE_MAX: Final = 32
"""As for leases: bounds how long one pipeline keeps others waiting."""
_FIELDS_BEFORE: Final = 8
_FIELDS_EACH_FEATURE: Final = 3
_FIELDS_EACH_ASK: Final = 2
_SEATS: Final = Script("seats.lua")


class RedisSeatStore:
    """A ``SeatStore``."""

    def __init__(self, redis: Redis, names: RedisNames, url: str, *, sidecar: str, incarnation: int) -> None:
        self._redis = redis
        self._names = names
        self._url = url
        self._sidecar = sidecar
        self._incarnation = incarnation

    async def call(self, calls: Sequence[SeatCall]) -> list[SeatAnswer | Exception]:
        """See ``SeatStore``."""
        answers: list[SeatAnswer | Exception] = []
        for start in range(0, len(calls), CALLS_PER_PIPELINE_MAX):
            answers.extend(await self._call_some(calls[start : start + CALLS_PER_PIPELINE_MAX]))
        return answers

    async def _call_some(self, calls: Sequence[SeatCall]) -> list[SeatAnswer | Exception]:
        features = [_features_of(call) for call in calls]
        arguments = [self._arguments(call, names) for call, names in zip(calls, features, strict=True)]
        async with translated(self._url):
            replies = await self._evaluate(_SEATS.calls(arguments))
            if _SEATS.is_missing(replies):
                replies = await self._evaluate(_SEATS.calls(arguments, whole=True))
        return [
            failure_of(reply, self._url) if isinstance(reply, Exception) else _answer(reply, names, len(call.asks))
            for call, names, reply in zip(calls, features, replies, strict=True)
        ]

    async def _evaluate(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    def _arguments(self, call: SeatCall, features: Sequence[str]) -> list[Any]:
        names, tenant = self._names, call.tenant
        keys = [names.limits(tenant)]
        for feature in features:
            keys += [names.seats(tenant, feature), names.seat_holders(tenant, feature)]
        pair = call.pair
        arguments: list[Any] = [
            self._sidecar, self._incarnation, call.op, pair.epoch, pair.run, call.revision, KEPT_MS, len(features),
        ]  # fmt: skip
        for feature in features:
            arguments += [feature, max((ask.seats for ask in call.asks if ask.feature == feature), default=0)]
        number = {feature: position for position, feature in enumerate(features, 1)}
        for ask in call.asks:
            arguments += [number[ask.feature], ask.verb.value, ask.holder, _pack_who(ask)]
        return [len(keys), *keys, *arguments]


def _features_of(call: SeatCall) -> list[str]:
    return list(dict.fromkeys(ask.feature for ask in call.asks))


def _pack_who(ask: SeatAsk) -> bytes:
    packed: bytes = msgpack.packb(tuple(ask.who)) if ask.who.heartbeat_ms else b""
    return packed


def _unpack_who(data: bytes) -> Who:
    """Whose a seat is; ``NOT_SAID`` when Redis does not know, or holds what no sidecar wrote."""
    try:
        who = Who(*msgpack.unpackb(data)[: len(Who._fields)])
    except (ValueError, TypeError, msgpack.UnpackException):
        return NOT_SAID
    texts = (who.subject_type, who.subject_id, who.on_behalf_of, who.action)
    return who if all(type(text) is str for text in texts) and type(who.heartbeat_ms) is int else NOT_SAID


def _answer(reply: Sequence[Any], features: Sequence[str], asks: int) -> SeatAnswer:
    status = SeatStatus[decoded(reply[0])]
    common: dict[str, Any] = {
        "status": status,
        "incarnation": int(reply[2]),
        "op": int(reply[3]),
        "pair": Pair(int(reply[4]), decoded(reply[5])),
        "phase": decoded(reply[6]),
    }
    if status is not SeatStatus.OK:
        return SeatAnswer(**common)
    now_ms = int(reply[7])
    rest = reply[_FIELDS_BEFORE:]
    room: dict[str, Room] = {}
    for position, feature in enumerate(features):
        at = position * _FIELDS_EACH_FEATURE
        seats, taken, ends_ms = map(int, rest[at : at + _FIELDS_EACH_FEATURE])
        room[feature] = Room(seats, taken, max(0, ends_ms - now_ms) if ends_ms else 0)
    rest = rest[len(features) * _FIELDS_EACH_FEATURE :]
    results = tuple(
        (Result[decoded(rest[at])], _unpack_who(rest[at + 1])) for at in range(0, asks * _FIELDS_EACH_ASK, 2)
    )
    return SeatAnswer(**common, room=room, results=results)
