"""Published state, read from Redis. Nothing read here is believed before its signature was verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from redis.asyncio import Redis

from licet.wire.names import RedisNames
from licet.wire.registers import RUN_SECTIONS, Pair
from licet_sidecar.adapters.redis_link import decoded, run_id_in, translated
from licet_sidecar.core.sync import Change

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

    async def read_manifest(self) -> tuple[bytes | None, str]:
        """See ``StateSource``."""
        (manifest,), run_id = await self._get_many([self._names.bundle()])
        return manifest, run_id

    async def read_chunks(self, digests: Sequence[str]) -> list[bytes | None]:
        """See ``StateSource``."""
        # By digest: whatever server they are from, they are those or none.
        chunks, _ = await self._get_many([self._names.chunk(digest) for digest in digests])
        return chunks

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

    async def read_licenses(self, tenants: Sequence[str]) -> tuple[list[bytes | None], str]:
        """See ``StateSource``."""
        return await self._get_many([self._names.license(tenant) for tenant in tenants])

    async def read_changes(self, after: int, block_ms: int) -> tuple[list[Change], str]:
        """See ``StateSource``."""
        async with translated(self._url):
            # One connection leads to one server: the run is that of the entries, and not of a moment before them.
            pipeline = self._blocking.pipeline(transaction=False)
            pipeline.xread({self._names.changes(): f"{after}-0"}, count=CHANGES_PER_READ_MAX, block=block_ms)
            pipeline.execute_command("INFO", *RUN_SECTIONS)
            reply, info = await pipeline.execute()
        return self._changes_in(reply), run_id_in(info)

    def _changes_in(self, reply: Any) -> list[Change]:
        if not reply:
            return []
        streams = list(reply.values()) if isinstance(reply, dict) else [entries for _, entries in reply]
        entries = streams[0]
        if isinstance(reply, dict):
            entries = [entry for part in entries for entry in part]  # RESP3 nests the entries once more
        changes = []
        for entry_id, fields in entries:
            revision = int(decoded(entry_id).partition("-")[0])
            kind, key = (fields.get(name, b"").decode(errors="replace") for name in (b"kind", b"key"))
            changes.append(Change(revision, kind, key))
        return changes

    async def _get_many(self, keys: Sequence[str]) -> tuple[list[bytes | None], str]:
        values: list[bytes | None] = []
        runs: set[str] = set()
        for start in range(0, len(keys), KEYS_PER_READ_MAX):
            async with translated(self._url):
                pipeline = self._redis.pipeline(transaction=False)  # not MGET: on Redis Cluster the keys are spread
                for key in keys[start : start + KEYS_PER_READ_MAX]:
                    pipeline.get(key)
                pipeline.execute_command("INFO", *RUN_SECTIONS)
                *found, info = await pipeline.execute()
            values.extend(found)
            runs.add(run_id_in(info))
        return values, runs.pop() if len(runs) == 1 else ""
