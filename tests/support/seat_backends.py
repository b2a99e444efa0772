"""The two things that keep seats, seen alike: the model, and the script on a real Valkey."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, Protocol

from redis.asyncio import Redis

from licet.domain.ids import LimitKey
from licet.wire.names import RedisNames
from licet.wire.registers import SEATS_SENTINEL, Pair
from licet_control_plane.publisher.marks import Opening, RedisMarks
from licet_sidecar.adapters.redis_seat_store import RedisSeatStore
from licet_sidecar.ports import SeatStore
from tests.support.fake_lease_store import FakeRegisters
from tests.support.fake_seat_store import FakeSeats, FakeSeatStore
from tests.support.valkey import ValkeyProcess

TENANT = "acme"


class SeatBackend(Protocol):
    """Seats of one tenant, ``TENANT``. ``holders`` is ``None`` when the set was never made."""

    def store(self, sidecar: str, incarnation: int) -> SeatStore: ...
    async def begin(self, epoch: int) -> bool: ...
    async def relearn(self, old_epoch: int, epoch: int) -> bool: ...
    async def open(self, pair: Pair, revision: int, amounts: Mapping[LimitKey, int]) -> bool: ...
    async def publish(self, revision: int, amounts: Mapping[LimitKey, int]) -> None: ...
    async def touch(self) -> tuple[Pair, bool] | None: ...
    async def holders(self, feature: str) -> set[str] | None: ...
    async def ends_in_ms(self, feature: str, holder: str) -> int: ...
    async def expire(self, feature: str, holder: str, *, in_ms: int = 0) -> None: ...
    async def lose_set(self, feature: str) -> None: ...
    async def restart(self) -> None: ...
    async def wipe(self) -> None: ...


class FakeSeatBackend:
    """The model."""

    def __init__(self) -> None:
        self.registers = FakeRegisters(now_ms=int(time.time() * 1_000), run_id="run1")
        self.seats = FakeSeats(self.registers)
        self._runs = count(2)

    def store(self, sidecar: str, incarnation: int) -> SeatStore:
        return FakeSeatStore(self.seats, sidecar=sidecar, incarnation=incarnation)

    async def begin(self, epoch: int) -> bool:
        return self.registers.begin(TENANT, epoch) is not None

    async def relearn(self, old_epoch: int, epoch: int) -> bool:
        return self.registers.relearn(TENANT, old_epoch, epoch) is not None

    async def open(self, pair: Pair, revision: int, amounts: Mapping[Any, int]) -> bool:
        return self.registers.open(TENANT, pair, revision, amounts)

    async def publish(self, revision: int, amounts: Mapping[Any, int]) -> None:
        self.registers.publish_limits(TENANT, revision, amounts)

    async def touch(self) -> tuple[Pair, bool] | None:
        mark = self.registers.touch_mark(TENANT)
        return None if mark is None else (mark.pair, mark.phase == "open")

    async def holders(self, feature: str) -> set[str] | None:
        if (TENANT, feature) not in self.seats.contents.holders:
            return None
        return set(self.seats.live(TENANT, feature))

    async def ends_in_ms(self, feature: str, holder: str) -> int:
        return self.seats.live(TENANT, feature)[holder].ends_ms - self.registers.now_ms

    async def expire(self, feature: str, holder: str, *, in_ms: int = 0) -> None:
        self.seats.contents.holders[TENANT, feature][holder].ends_ms = self.registers.now_ms + in_ms

    async def lose_set(self, feature: str) -> None:
        self.seats.lose_set(TENANT, feature)

    async def restart(self) -> None:
        self.registers.restart(f"run{next(self._runs)}")

    async def wipe(self) -> None:
        self.registers.wipe(f"run{next(self._runs)}")
        self.seats.wipe()


class RealSeatBackend:
    """The script, through the adapter that calls it, on a real server."""

    def __init__(self, server: ValkeyProcess, redis: Any) -> None:
        self._server = server
        self._redis = redis
        self._names = RedisNames()
        self._marks = RedisMarks(redis, self._names)

    def store(self, sidecar: str, incarnation: int) -> SeatStore:
        return RedisSeatStore(self._redis, self._names, self._server.url, sidecar=sidecar, incarnation=incarnation)

    async def begin(self, epoch: int) -> bool:
        return bool(await self._marks.begin([TENANT], epoch))

    async def relearn(self, old_epoch: int, epoch: int) -> bool:
        return bool(await self._marks.relearn({TENANT: old_epoch}, epoch))

    async def open(self, pair: Pair, revision: int, amounts: Mapping[LimitKey, int]) -> bool:
        return bool(await self._marks.open([Opening(TENANT, pair, revision, amounts)]))

    async def publish(self, revision: int, amounts: Mapping[LimitKey, int]) -> None:
        await self._marks.publish_limits({TENANT: amounts}, {TENANT: revision})

    async def touch(self) -> tuple[Pair, bool] | None:
        state = (await self._marks.touch([TENANT]))[TENANT]
        return None if state is None else (state.pair, state.is_open)

    async def holders(self, feature: str) -> set[str] | None:
        key = self._names.seats(TENANT, feature)
        if not await self._redis.exists(key):
            return None
        members = await self._redis.zrangebyscore(key, f"({await self._now_ms()}", "+inf")
        return {member.decode() for member in members} - {SEATS_SENTINEL}

    async def ends_in_ms(self, feature: str, holder: str) -> int:
        score = await self._redis.zscore(self._names.seats(TENANT, feature), holder)
        return int(score) - await self._now_ms()

    async def expire(self, feature: str, holder: str, *, in_ms: int = 0) -> None:
        await self._redis.zadd(self._names.seats(TENANT, feature), {holder: await self._now_ms() + in_ms})

    async def damage(self, feature: str, holder: str) -> None:
        """Someone else writes into the hash."""
        await self._redis.hset(self._names.seat_holders(TENANT, feature), holder, "what is this")

    async def raw_members(self, feature: str) -> tuple[set[str], set[str]]:
        """Members of the set, and fields of the hash."""
        members = await self._redis.zrange(self._names.seats(TENANT, feature), 0, -1)
        fields = await self._redis.hkeys(self._names.seat_holders(TENANT, feature))
        return {member.decode() for member in members}, {field.decode() for field in fields}

    async def lose_set(self, feature: str) -> None:
        await self._redis.delete(self._names.seats(TENANT, feature), self._names.seat_holders(TENANT, feature))

    async def restart(self) -> None:
        await self._redis.aclose()
        self._server.restart()

    async def wipe(self) -> None:
        await self._redis.aclose()
        self._server.wipe()

    async def forget_scripts(self) -> None:
        """As ``SCRIPT FLUSH`` does."""
        await self._redis.script_flush()

    async def _now_ms(self) -> int:
        seconds, micros = await self._redis.time()
        return int(seconds) * 1_000 + int(micros) // 1_000


@asynccontextmanager
async def real_seat_backend(server: ValkeyProcess) -> AsyncIterator[RealSeatBackend]:
    """An empty server's seats."""
    redis = Redis.from_url(server.url, socket_timeout=5.0)
    try:
        await redis.flushall()
        yield RealSeatBackend(server, redis)
    finally:
        await redis.aclose()
