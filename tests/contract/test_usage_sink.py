"""What a ``UsageSink`` promises, held to by the fake and by Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import pytest
import redis.asyncio as aioredis

from licet.wire.names import RedisNames, usage_shard
from licet.wire.registers import RUN_SECTIONS, run_of
from licet_sidecar.adapters.redis_link import connect
from licet_sidecar.adapters.redis_usage_sink import RedisUsageSink
from licet_sidecar.ports import LinkDown, LinkFull, PulseReport, UsageSink
from tests.support.fake_usage_sink import FakeUsageSink
from tests.support.valkey import ValkeyProcess

NAMES = RedisNames("contract")
ME = "a" * 32
LOG = f"{ME}:1"
RAW = bytes(range(256))


class Doorstep(Protocol):
    """The other side of a sink, as the control plane sees it."""

    sink: UsageSink

    async def run_id(self) -> str: ...
    async def put_head(self, head: bytes) -> None: ...
    async def put_ack(self, log: str, ack: bytes) -> None: ...
    async def batches(self) -> list[bytes]: ...
    async def heartbeats(self) -> dict[str, bytes]: ...
    async def break_it(self) -> None: ...


class FakeDoorstep:
    def __init__(self) -> None:
        self.sink = FakeUsageSink()

    async def run_id(self) -> str:
        return self.sink.run_id

    async def put_head(self, head: bytes) -> None:
        self.sink.head = head

    async def put_ack(self, log: str, ack: bytes) -> None:
        self.sink.acks[log] = ack

    async def batches(self) -> list[bytes]:
        return self.sink.batches

    async def heartbeats(self) -> dict[str, bytes]:
        return self.sink.heartbeats

    async def break_it(self) -> None:
        self.sink.trouble = LinkDown("gone")


class RedisDoorstep:
    def __init__(self, valkey: ValkeyProcess) -> None:
        self.valkey = valkey
        self.redis: aioredis.Redis = aioredis.Redis.from_url(valkey.url, protocol=2)
        self.client = connect(valkey.url)
        self.sink = RedisUsageSink(self.client, NAMES, valkey.url, sidecar=ME)

    async def run_id(self) -> str:
        return run_of(await self.redis.execute_command("INFO", *RUN_SECTIONS))

    async def put_head(self, head: bytes) -> None:
        await self.redis.set(NAMES.head(), head)

    async def put_ack(self, log: str, ack: bytes) -> None:
        await self.redis.hset(NAMES.acked(), log, ack)  # type: ignore[arg-type]

    async def batches(self) -> list[bytes]:
        return [fields[b"b"] for _, fields in await self.redis.xrange(NAMES.usage(usage_shard(ME)))]

    async def heartbeats(self) -> dict[str, bytes]:
        return {name.decode(): value for name, value in (await self.redis.hgetall(NAMES.sidecars())).items()}

    async def break_it(self) -> None:
        self.valkey.kill()

    async def close(self) -> None:
        await self.redis.aclose()
        await self.client.aclose()


@pytest.fixture(params=["fake", "redis"])
async def doorstep(request: pytest.FixtureRequest) -> AsyncIterator[Doorstep]:
    if request.param == "fake":
        yield FakeDoorstep()
        return
    made = RedisDoorstep(request.getfixturevalue("valkey_process"))
    yield made
    await made.close()


async def test_a_pulse_into_an_empty_world_brings_nothing_back(doorstep: Doorstep) -> None:
    report = await doorstep.sink.pulse((ME, b"alive"), [LOG], [])
    assert report == PulseReport(None, {}, await doorstep.run_id(), report.redis_ms)
    assert (report.backlog_batches, report.memory_share) == (0, 0.0)
    assert await doorstep.batches() == []


async def test_a_pulse_hands_batches_over_in_order_byte_for_byte(doorstep: Doorstep) -> None:
    await doorstep.sink.pulse((ME, b"1"), [LOG], [b"one" + RAW, b"two"])
    await doorstep.sink.pulse((ME, b"2"), [LOG], [b"three"])
    assert await doorstep.batches() == [b"one" + RAW, b"two", b"three"]


async def test_batches_are_handed_over_between_pulses_too(doorstep: Doorstep) -> None:
    await doorstep.sink.pulse((ME, b"1"), [LOG], [b"one"])
    await doorstep.sink.ship([b"two" + RAW, b"three"])
    await doorstep.sink.ship([])
    assert await doorstep.batches() == [b"one", b"two" + RAW, b"three"]
    report = await doorstep.sink.pulse((ME, b"2"), [LOG], [b"four"])
    assert report.backlog_batches == 4


async def test_a_batch_may_be_handed_over_again(doorstep: Doorstep) -> None:
    for _ in range(2):
        await doorstep.sink.pulse((ME, b"1"), [LOG], [b"one"])
    assert await doorstep.batches() == [b"one", b"one"]


async def test_a_pulse_brings_head_and_acknowledgements_back(doorstep: Doorstep) -> None:
    await doorstep.put_head(b"head" + RAW)
    await doorstep.put_ack(LOG, b"ack" + RAW)
    await doorstep.put_ack("somebody:1", b"else")
    report = await doorstep.sink.pulse((ME, b"1"), [f"{ME}:0", LOG], [])
    assert report == PulseReport(b"head" + RAW, {LOG: b"ack" + RAW}, await doorstep.run_id(), report.redis_ms)


async def test_the_newest_heartbeat_is_the_one_that_is_there(doorstep: Doorstep) -> None:
    await doorstep.sink.pulse((ME, b"old"), [LOG], [])
    await doorstep.sink.pulse((ME, b"new" + RAW), [LOG], [])
    assert await doorstep.heartbeats() == {ME: b"new" + RAW}


async def test_who_deregisters_is_gone(doorstep: Doorstep) -> None:
    await doorstep.sink.pulse((ME, b"1"), [LOG], [b"one"])
    for _ in range(2):
        await doorstep.sink.deregister(ME)
    assert await doorstep.heartbeats() == {}
    assert await doorstep.batches() == [b"one"]


async def test_a_broken_link_is_told(doorstep: Doorstep) -> None:
    await doorstep.sink.pulse((ME, b"1"), [LOG], [])
    await doorstep.break_it()
    with pytest.raises(LinkDown):
        await doorstep.sink.pulse((ME, b"2"), [LOG], [b"one"])
    with pytest.raises(LinkDown):
        await doorstep.sink.deregister(ME)
    with pytest.raises(LinkDown):
        await doorstep.sink.ship([b"one"])


async def test_a_full_server_says_so_and_takes_no_batch(valkey_process: ValkeyProcess) -> None:
    doorstep = RedisDoorstep(valkey_process)
    await doorstep.sink.pulse((ME, b"1"), [LOG], [])
    used = int((await doorstep.redis.info("memory"))["used_memory"])
    await doorstep.redis.config_set("maxmemory", used * 2)
    report = await doorstep.sink.pulse((ME, b"1"), [LOG], [])
    assert 0.4 < report.memory_share < 0.7
    await doorstep.redis.config_set("maxmemory", 1)
    for send in (doorstep.sink.ship([b"one"]), doorstep.sink.pulse((ME, b"2"), [LOG], [b"one"])):
        with pytest.raises(LinkFull):
            await send
    await doorstep.redis.config_set("maxmemory", 0)
    assert await doorstep.batches() == []
    await doorstep.close()
