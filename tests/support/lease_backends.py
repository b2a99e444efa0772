"""The two things that keep quota registers, seen alike: the model, and the scripts on a real Valkey.

A ``Backend`` is the whole of it: what sidecars call, what the control plane calls, what can go wrong, and a look
inside.
"""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from redis.asyncio import Redis

from licet.domain.ids import LimitKey
from licet.wire.names import RedisNames
from licet.wire.registers import (
    RUN_SECTIONS,
    Mark,
    Marker,
    Pair,
    parse_mark,
    parse_register,
    run_of,
)
from licet_control_plane.publisher.marks import Fill, KeptQuota, Opening, RedisMarks, Release
from licet_sidecar.adapters.redis_lease_store import RedisLeaseStore
from licet_sidecar.core.lease import Lease
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.ports import LeaseStore
from tests.support.fake_lease_store import FakeLeaseStore, FakeRegisters
from tests.support.valkey import ValkeyProcess

TENANT = "acme"


@dataclass(frozen=True, slots=True)
class Held:
    """One register, without the times that differ from run to run."""

    granted: int
    used: int
    reserved: int
    incarnation: int
    op: int
    asserted: bool


@dataclass(frozen=True, slots=True)
class Quota:
    """One quota hash. ``asserted`` in its registers means: under the mark's present pair."""

    base: int
    sum: int
    used: int
    registers: Mapping[str, Held]


class Backend(Protocol):
    """Registers of one tenant, ``TENANT``."""

    def store(self, sidecar: str, incarnation: int) -> LeaseStore: ...
    async def now_s(self) -> int: ...
    async def begin(self, epoch: int) -> bool: ...
    async def relearn(self, old_epoch: int, epoch: int) -> bool: ...
    async def fill(self, pair: Pair, lease: Lease, sidecar: str, units: int) -> bool: ...
    async def release(self, pair: Pair, lease: Lease, sidecar: str) -> bool: ...
    async def open(self, pair: Pair, revision: int, amounts: Mapping[LimitKey, int], keep: Sequence[Lease]) -> bool: ...
    async def publish_limits(self, revision: int, amounts: Mapping[LimitKey, int]) -> bool: ...
    async def touch(self) -> tuple[Pair, bool] | None: ...
    async def mark(self) -> Mark | None: ...
    async def quota(self, lease: Lease) -> Quota | None: ...
    async def seal(self, lease: Lease, sidecar: str) -> None: ...
    async def age(self, lease: Lease, sidecar: str, seconds: int) -> None: ...
    async def fold(self, lease: Lease, sidecar: str, units: int) -> None: ...
    async def lose_quota(self, lease: Lease) -> None: ...
    async def lose_mark(self) -> None: ...
    async def restart(self) -> None: ...
    async def wipe(self) -> None: ...
    async def snapshot(self) -> object: ...
    async def roll_back(self, snapshot: object) -> None: ...
    async def forget_scripts(self) -> None: ...


def _kept(lease: Lease) -> KeptQuota:
    return KeptQuota(lease.quota, LeaseBook.marker(lease), lease.start, lease.end)


class FakeBackend:
    """The model."""

    def __init__(self) -> None:
        self.registers = FakeRegisters(now_ms=int(time.time() * 1_000), run_id="run1")
        self._runs = count(2)

    def store(self, sidecar: str, incarnation: int) -> LeaseStore:
        return FakeLeaseStore(self.registers, sidecar=sidecar, incarnation=incarnation)

    async def now_s(self) -> int:
        return self.registers.now_ms // 1_000

    async def begin(self, epoch: int) -> bool:
        return self.registers.begin(TENANT, epoch) is not None

    async def relearn(self, old_epoch: int, epoch: int) -> bool:
        return self.registers.relearn(TENANT, old_epoch, epoch) is not None

    async def fill(self, pair: Pair, lease: Lease, sidecar: str, units: int) -> bool:
        window = Marker(lease.start, lease.end, 0)
        return self.registers.fill(TENANT, pair, sidecar, units, lease.quota, LeaseBook.marker(lease), window)

    async def release(self, pair: Pair, lease: Lease, sidecar: str) -> bool:
        return self.registers.release(TENANT, pair, lease.quota, sidecar)

    async def open(self, pair: Pair, revision: int, amounts: Mapping[LimitKey, int], keep: Sequence[Lease]) -> bool:
        kept = [_kept(lease) for lease in keep]
        return bool(self.registers.open(TENANT, pair, revision, amounts, kept))

    async def publish_limits(self, revision: int, amounts: Mapping[LimitKey, int]) -> bool:
        return self.registers.publish_limits(TENANT, revision, amounts) != "NOMARK"

    async def touch(self) -> tuple[Pair, bool] | None:
        mark = self.registers.touch_mark(TENANT)
        return None if mark is None else (mark.pair, mark.phase == "open")

    async def mark(self) -> Mark | None:
        mark = self.registers.contents.marks.get(TENANT)
        if mark is None:
            return None
        return Mark(
            mark.pair, mark.phase, mark.since_ms, mark.revision, dict(mark.amounts), copy.deepcopy(mark.markers)
        )

    async def quota(self, lease: Lease) -> Quota | None:
        mark = self.registers.contents.marks.get(TENANT)
        quota = self.registers.contents.quotas.get((TENANT, lease.quota))
        if quota is None:
            return None
        registers = {
            sidecar: Held(one.g, one.u, one.h, one.incarnation, one.op, mark is not None and one.pair == mark.pair)
            for sidecar, one in quota.registers.items()
        }
        return Quota(quota.base, quota.sum, quota.used, registers)

    async def seal(self, lease: Lease, sidecar: str) -> None:
        self.registers.contents.quotas[(TENANT, lease.quota)].registers[sidecar].sealed = True

    async def age(self, lease: Lease, sidecar: str, seconds: int) -> None:
        """As if the register's last call was so long ago."""
        self.registers.contents.quotas[(TENANT, lease.quota)].registers[sidecar].time_ms -= 1_000 * seconds

    async def fold(self, lease: Lease, sidecar: str, units: int) -> None:
        """A register became part of the base, and its tombstone is gone."""
        quota = self.registers.contents.quotas[(TENANT, lease.quota)]
        del quota.registers[sidecar]
        quota.base += units

    async def lose_quota(self, lease: Lease) -> None:
        self.registers.lose_quota(TENANT, lease.quota)

    async def lose_mark(self) -> None:
        self.registers.lose_mark(TENANT)

    async def restart(self) -> None:
        self.registers.restart(f"run{next(self._runs)}")

    async def wipe(self) -> None:
        self.registers.wipe(f"run{next(self._runs)}")

    async def snapshot(self) -> object:
        return self.registers.snapshot()

    async def roll_back(self, snapshot: object) -> None:
        self.registers.roll_back(snapshot, f"run{next(self._runs)}")  # type: ignore[arg-type]  # what snapshot() gave

    async def forget_scripts(self) -> None:
        pass


class RealBackend:
    """The scripts, through the adapters that call them, on a real server."""

    def __init__(self, server: ValkeyProcess, redis: Redis) -> None:
        self._server = server
        self._redis = redis
        self._names = RedisNames()
        self._marks = RedisMarks(redis, self._names)

    def store(self, sidecar: str, incarnation: int) -> LeaseStore:
        return RedisLeaseStore(
            self._redis, self._redis, self._names, self._server.url, sidecar=sidecar, incarnation=incarnation
        )

    async def now_s(self) -> int:
        return int((await self._redis.time())[0])

    async def begin(self, epoch: int) -> bool:
        return bool(await self._marks.begin([TENANT], epoch))

    async def relearn(self, old_epoch: int, epoch: int) -> bool:
        return bool(await self._marks.relearn({TENANT: old_epoch}, epoch))

    async def fill(self, pair: Pair, lease: Lease, sidecar: str, units: int) -> bool:
        one = Fill(TENANT, pair, lease.quota, LeaseBook.marker(lease), lease.start, lease.end, sidecar, units)
        return await self._marks.fill([one]) == 1

    async def release(self, pair: Pair, lease: Lease, sidecar: str) -> bool:
        return await self._marks.release([Release(TENANT, pair, lease.quota, sidecar)]) == 1

    async def open(self, pair: Pair, revision: int, amounts: Mapping[LimitKey, int], keep: Sequence[Lease]) -> bool:
        kept = [_kept(lease) for lease in keep]
        return bool((await self._marks.open([Opening(TENANT, pair, revision, amounts, kept)])).opened)

    async def publish_limits(self, revision: int, amounts: Mapping[LimitKey, int]) -> bool:
        return not await self._marks.publish_limits({TENANT: amounts}, {TENANT: revision})

    async def touch(self) -> tuple[Pair, bool] | None:
        state = (await self._marks.touch([TENANT]))[TENANT]
        return None if state is None else (state.pair, state.is_open)

    async def mark(self) -> Mark | None:
        return parse_mark(await self._redis.hgetall(self._names.limits(TENANT)))

    async def quota(self, lease: Lease) -> Quota | None:
        mark = await self.mark()
        fields = await self._redis.hgetall(self._key(lease))
        if not fields:
            return None
        registers = {}
        for name, value in fields.items():
            if name.startswith(b"r|"):
                one = parse_register(value)
                asserted = mark is not None and one.pair == mark.pair
                registers[name[2:].decode()] = Held(
                    one.granted, one.used, one.reserved, one.incarnation, one.op, asserted
                )
        return Quota(int(fields[b"base"]), int(fields[b"sum"]), int(fields[b"used"]), registers)

    async def run_id(self) -> str:
        """What the server calls its present run."""
        return run_of(await self._redis.execute_command("INFO", *RUN_SECTIONS))

    async def expires_s(self, lease: Lease) -> int:
        """When the hash goes away by itself, seconds since the Unix epoch."""
        return int(await self._redis.expiretime(self._key(lease)))

    async def seal(self, lease: Lease, sidecar: str) -> None:
        fields = (await self._redis.hget(self._key(lease), f"r|{sidecar}")).split(b"|")
        fields[8] = b"1"
        await self._redis.hset(self._key(lease), f"r|{sidecar}", b"|".join(fields))

    async def age(self, lease: Lease, sidecar: str, seconds: int) -> None:
        fields = (await self._redis.hget(self._key(lease), f"r|{sidecar}")).split(b"|")
        fields[7] = str(int(fields[7]) - 1_000 * seconds).encode()
        await self._redis.hset(self._key(lease), f"r|{sidecar}", b"|".join(fields))

    async def fold(self, lease: Lease, sidecar: str, units: int) -> None:
        granted, used, reserved, *_ = (await self._redis.hget(self._key(lease), f"r|{sidecar}")).split(b"|")
        await self._redis.hdel(self._key(lease), f"r|{sidecar}")
        await self._redis.hincrby(self._key(lease), "base", units)
        await self._redis.hincrby(self._key(lease), "sum", units - int(granted))
        await self._redis.hincrby(self._key(lease), "used", units - int(used) - int(reserved))

    async def write_marker(self, lease: Lease, value: str) -> None:
        """As another program wrote it."""
        await self._redis.hset(self._names.limits(TENANT), f"m|{LeaseBook.marker(lease)}", value)

    async def damage(self, lease: Lease, sidecar: str) -> None:
        """Someone else writes into a register."""
        await self._redis.hset(self._key(lease), f"r|{sidecar}", "what is this")

    async def lose_quota(self, lease: Lease) -> None:
        await self._redis.delete(self._key(lease))

    async def lose_mark(self) -> None:
        await self._redis.delete(self._names.limits(TENANT))

    async def restart(self) -> None:
        await self._redis.aclose()
        self._server.restart()

    async def wipe(self) -> None:
        await self._redis.aclose()
        self._server.wipe()

    async def snapshot(self) -> object:
        return {key: await self._redis.dump(key) for key in await self._redis.keys("licet:*")}

    async def roll_back(self, snapshot: object) -> None:
        assert isinstance(snapshot, dict)
        await self.wipe()
        for key, value in snapshot.items():
            await self._redis.restore(key, 0, value)

    async def forget_scripts(self) -> None:
        await self._redis.script_flush()

    def _key(self, lease: Lease) -> str:
        return self._names.quota(TENANT, lease.quota)


@asynccontextmanager
async def real_backend(server: ValkeyProcess) -> AsyncIterator[RealBackend]:
    """An empty server's registers."""
    redis = Redis.from_url(server.url, socket_timeout=5.0)
    try:
        await redis.flushall()
        yield RealBackend(server, redis)
    finally:
        await redis.aclose()
