"""Batches of usage events, the heartbeat and acknowledgements, in Redis."""

from __future__ import annotations

from collections.abc import Sequence

from redis.asyncio import Redis

from licet.wire.names import RedisNames, usage_shard
from licet.wire.registers import RUN_SECTIONS
from licet_sidecar.adapters.redis_link import run_id_in, translated
from licet_sidecar.ports import PulseReport


class RedisUsageSink:
    """A ``UsageSink``."""

    def __init__(self, redis: Redis, names: RedisNames, url: str, *, sidecar: str) -> None:
        self._redis = redis
        self._names = names
        self._url = url
        self._stream = names.usage(usage_shard(sidecar))

    async def pulse(self, heartbeat: tuple[str, bytes], logs: Sequence[str], batches: Sequence[bytes]) -> PulseReport:
        """See ``UsageSink``."""
        async with translated(self._url):
            pipeline = self._redis.pipeline(transaction=False)
            for batch in batches:
                pipeline.xadd(self._stream, {"b": batch})
            pipeline.hset(self._names.sidecars(), heartbeat[0], heartbeat[1])
            pipeline.get(self._names.head())
            pipeline.hmget(self._names.acked(), list(logs))
            pipeline.execute_command("INFO", *RUN_SECTIONS, "memory")
            pipeline.xlen(self._stream)
            _, head, acks, info, backlog = (await pipeline.execute())[len(batches) :]
        found = {log: ack for log, ack in zip(logs, acks, strict=True) if ack is not None}
        bytes_max = int(info.get("maxmemory", 0))
        return PulseReport(
            head,
            found,
            run_id_in(info),
            int(info["server_time_usec"]) // 1_000,
            backlog_batches=backlog,
            memory_share=int(info["used_memory"]) / bytes_max if bytes_max else 0.0,
        )

    async def ship(self, batches: Sequence[bytes]) -> None:
        """See ``UsageSink``."""
        if not batches:
            return
        async with translated(self._url):
            pipeline = self._redis.pipeline(transaction=False)
            for batch in batches:
                pipeline.xadd(self._stream, {"b": batch})
            await pipeline.execute()

    async def deregister(self, sidecar: str) -> None:
        """See ``UsageSink``."""
        async with translated(self._url):
            await self._redis.hdel(self._names.sidecars(), sidecar)
