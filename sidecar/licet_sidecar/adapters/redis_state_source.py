"""Published state, read from Redis. Nothing read here is believed before its signature was verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from redis.asyncio import Redis

from licet.wire.names import RedisNames
from licet.wire.registers import RUN_SECTIONS, Pair
from licet_sidecar.adapters.redis_link import decoded, run_id_in, translated
from licet_sidecar.ports import Change, LinkDown

CHANGES_PER_READ_MAX: Final = 1_000
KEYS_PER_READ_MAX: Final = 256


class RedisStateSource:
    """A ``StateSource``. ``blocking`` is a client of its own, whose timeout is longer than any blocking read."""

    def __init__(self, redis: Redis, blocking: Redis, names: RedisNames, url: str) -> None:
        self._redis = redis
        self._blocking = blocking
        self._names = names
        self._url = url

    async def read_head(self) -> tuple[bytes | None, str]:
        """See ``StateSource``."""
        async with translated(self._url):
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.get(self._names.head())
            pipeline.execute_command("INFO", *RUN_SECTIONS)
            head, info = await pipeline.execute()
        return head, run_id_in(info)

    async def read_manifest(self) -> bytes | None:
        """See ``StateSource``."""
        async with translated(self._url):
            return cast("bytes | None", await self._redis.get(self._names.bundle()))

    async def read_chunks(self, digests: Sequence[str]) -> list[bytes | None]:
        """See ``StateSource``."""
        return await self._get_many([self._names.chunk(digest) for digest in digests])

    async def read_license(self, tenant: str) -> tuple[bytes | None, Pair, bytes | None, str]:
        """See ``StateSource``."""
        async with translated(self._url):
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.get(self._names.license(tenant))
            pipeline.hmget(self._names.limits(tenant), ["epoch", "run"])
            pipeline.get(self._names.head())
            pipeline.execute_command("INFO", *RUN_SECTIONS)
            license_, (epoch, run), head, info = await pipeline.execute()
        pair = Pair(int(epoch), decoded(run)) if epoch and run else Pair(0, "")
        return license_, pair, head, run_id_in(info)

    async def read_licenses(self, tenants: Sequence[str]) -> list[bytes | None]:
        """See ``StateSource``."""
        return await self._get_many([self._names.license(tenant) for tenant in tenants])

    async def read_changes(self, after: int, block_ms: int) -> list[Change]:
        """See ``StateSource``."""
        async with translated(self._url):
            reply: Any = await self._blocking.xread(
                {self._names.changes(): f"{after}-0"}, count=CHANGES_PER_READ_MAX, block=block_ms
            )
        if not reply:
            return []
        streams = list(reply.values()) if isinstance(reply, dict) else [entries for _, entries in reply]
        entries = streams[0]
        if isinstance(reply, dict):
            entries = [entry for part in entries for entry in part]  # RESP3 nests the entries once more
        changes = []
        for entry_id, fields in entries:
            try:
                revision = int(decoded(entry_id).partition("-")[0])
                changes.append(Change(revision, fields[b"kind"].decode(), fields[b"key"].decode()))
            except (KeyError, ValueError) as error:
                raise LinkDown(f"entry {decoded(entry_id)} of the change stream is not one of ours") from error
        return changes

    async def _get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        values: list[bytes | None] = []
        for start in range(0, len(keys), KEYS_PER_READ_MAX):
            async with translated(self._url):
                pipeline = self._redis.pipeline(transaction=False)  # not MGET: on Redis Cluster the keys are spread
                for key in keys[start : start + KEYS_PER_READ_MAX]:
                    pipeline.get(key)
                values.extend(await pipeline.execute())
        return values
