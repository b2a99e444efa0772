"""Writes signed documents, chunks, changes and heads in Redis, and looks at what is there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from redis.exceptions import ResponseError

from licet.wire.documents import Heartbeat
from licet.wire.envelope import EnvelopeError
from licet.wire.names import RedisNames
from licet.wire.registers import RUN_SECTIONS, SERVER_RUN_LUA, run_of
from licet.wire.signing import Statement, VerificationError, read_own
from licet_control_plane.core.contents import Found, Keeping
from licet_control_plane.core.publishing import is_repeat
from licet_control_plane.redis_link import Redis, redis_errors
from licet_control_plane.store.revisions import Revision

LUA: Final = Path(__file__).parent / "lua"
CHANGES_MAX: Final = 10_000
"""Changes kept in the stream; a sidecar that missed more reads all documents again, which is then cheaper."""
CHUNK_KEPT_S: Final = 3_600
"""How long a chunk outlives the last two manifests: a sidecar that reads slowly may still be at it."""
_PIPELINE_MAX: Final = 1_000
_KEEPING_SECTIONS: Final = ("memory", "persistence")


class ChangeRefused(Exception):
    """The stream of changes holds something else under a revision. Publishing must not go on."""


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a server: its contents, and the heartbeats, by sidecar, read in the same instant. ``head``: what it
    says itself, which nobody has verified.
    """

    found: Found
    manifest: bytes | None
    last_digest: str
    head: Statement | None
    keeping: Keeping
    heartbeats: Mapping[str, Heartbeat]
    unreadable: int


class RedisDocuments:
    """The adapter. Raises ``RedisUnavailable`` and ``RedisRefused``; everything may be repeated."""

    def __init__(self, redis: Redis, names: RedisNames) -> None:
        self._redis = redis
        self._names = names
        self._set_if_newer = redis.register_script((LUA / "set_if_newer.lua").read_text())
        self._head = redis.register_script(SERVER_RUN_LUA + (LUA / "head.lua").read_text())

    async def look(self, chunks: Collection[str] = ()) -> Look:
        """What the server holds now; ``chunks`` should be there. Of the manifest, and of the last entry, only whether
        there is one is known.
        """
        names = self._names
        with redis_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.execute_command("INFO", *RUN_SECTIONS, *_KEEPING_SECTIONS)
                pipe.get(names.epoch())
                pipe.xrevrange(names.changes(), count=1)
                pipe.get(names.bundle())
                pipe.get(names.head())
                pipe.hgetall(names.sidecars())
                pipe.exists(names.epoch(), *(names.chunk(digest) for digest in chunks))
                server, sentinel, last, manifest, head, raw_heartbeats, there = await pipe.execute()
        deployment, _, epoch = (sentinel or b"").decode(errors="replace").rpartition(":")
        heartbeats: dict[str, Heartbeat] = {}
        unreadable = 0
        for raw in raw_heartbeats.values():
            try:
                heartbeat = Heartbeat.unpack(raw)
                heartbeats[heartbeat.sidecar] = heartbeat
            except EnvelopeError:
                unreadable += 1
        found = Found(
            run_id=run_of(server),
            deployment=deployment,
            epoch=int(epoch) if epoch.isdigit() else 0,
            last_revision=int(last[0][0].partition(b"-")[0]) if last else 0,
            has_manifest=manifest is not None,
            has_chunks=there - bool(sentinel) >= len(chunks),
            generation=_version_of(manifest)[0] if manifest is not None else 0,
        )
        keeping = Keeping(
            eviction_policy=str(server.get("maxmemory_policy", "")),
            memory_bytes_max=int(server.get("maxmemory", 0)),
            append_only=bool(server.get("aof_enabled", True)),
        )
        last_digest = last[0][1].get(b"digest", b"").decode(errors="replace") if last else ""
        return Look(found, manifest, last_digest, _statement_of(head), keeping, heartbeats, unreadable)

    async def set_documents(self, deployment: str, revisions: Sequence[Revision]) -> None:
        """Store documents, each unless a newer one is there."""
        names = self._names
        for start in range(0, len(revisions), _PIPELINE_MAX):
            with redis_errors():
                async with self._redis.pipeline(transaction=False) as pipe:
                    for row in revisions[start : start + _PIPELINE_MAX]:
                        key = names.bundle() if row.kind == "bundle" else names.license(row.key)
                        arguments = [deployment, row.generation, row.revision, row.document]
                        await self._set_if_newer(keys=[key], args=arguments, client=pipe)
                    await pipe.execute()

    async def set_chunks(self, bodies: Mapping[str, bytes]) -> None:
        """Store chunks under their digests; one that was about to expire stays."""
        if not bodies:
            return
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for digest, body in bodies.items():
                    pipe.set(self._names.chunk(digest), body)
                await pipe.execute()

    async def expire_chunks(self, digests: Iterable[str]) -> None:
        """Let chunks that no manifest needs any more go after a while."""
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for digest in digests:
                    pipe.expire(self._names.chunk(digest), CHUNK_KEPT_S)
                await pipe.execute()

    async def announce(self, revisions: Sequence[Revision]) -> None:
        """Add changes to the stream, in order. One that is there already with the same digest is a repeat.

        Raises:
            ChangeRefused: the stream has another change under the revision, or went past it.
        """
        for start in range(0, len(revisions), _PIPELINE_MAX):
            part = revisions[start : start + _PIPELINE_MAX]
            with redis_errors():
                async with self._redis.pipeline(transaction=False) as pipe:
                    for row in part:
                        fields = {"kind": row.kind, "key": row.key, "digest": row.digest}
                        pipe.xadd(self._names.changes(), fields, f"{row.revision}-0", CHANGES_MAX, approximate=True)
                    answers = await pipe.execute(raise_on_error=False)
                for row, answer in zip(part, answers, strict=True):
                    if isinstance(answer, ResponseError) and "equal or smaller" in str(answer):
                        await self._check_repeat(row)
                    elif isinstance(answer, Exception):
                        raise answer

    async def announce_resync(self, revision: int, kind: str, digest: str) -> None:
        """Make the stream end at ``revision``, when it was lost: whoever is behind it resyncs, nobody else notices."""
        with redis_errors():
            entry = {"kind": kind, "key": "", "digest": digest}
            try:
                await self._redis.xadd(self._names.changes(), entry, f"{revision}-0", CHANGES_MAX)
            except ResponseError as error:
                if "equal or smaller" not in str(error):
                    raise
                last = await self._redis.xrevrange(self._names.changes(), count=1)
                if last and int(last[0][0].partition(b"-")[0]) >= revision:
                    return
                # Entries were removed, and the stream remembers their ids: one that begins anew takes them again.
                await self._redis.delete(self._names.changes())
                await self._redis.xadd(self._names.changes(), entry, f"{revision}-0", CHANGES_MAX)

    async def set_sentinel(self, deployment: str, epoch: int, *, only_present: bool = False) -> bool:
        """Say that the contents are complete under ``epoch``. ``only_present``: unless they were lost meanwhile."""
        with redis_errors():
            return bool(await self._redis.set(self._names.epoch(), f"{deployment}:{epoch}", xx=only_present))

    async def set_head(self, deployment: str, epoch: int, run_id: str, revision: int, head: bytes) -> bool:
        """Vouch for the contents. ``False`` when the sentinel, the server or the end of the stream is another than was
        checked.
        """
        with redis_errors():
            keys = [self._names.head(), self._names.epoch(), self._names.changes()]
            return bool(await self._head(keys=keys, args=[f"{deployment}:{epoch}", run_id, head, revision]))

    async def remove_manifest(self) -> None:
        """Remove a manifest that is not one of this database: it may say of itself that it is newer than any."""
        with redis_errors():
            await self._redis.delete(self._names.bundle())

    async def licensed_tenants(self) -> set[str]:
        """Tenants that have a license document in Redis: a scan of the whole keyspace, for rare occasions."""
        before, after = self._names.license("\0").split("\0")
        found: set[str] = set()
        with redis_errors():
            async for key in self._redis.scan_iter(match=self._names.license("*"), count=1_000):
                name = key.decode(errors="replace")
                if name.startswith(before) and name.endswith(after):
                    found.add(name[len(before) : len(name) - len(after)])
        return found

    async def remove_newer_licenses(self, version: tuple[int, int]) -> None:
        """Remove licenses newer than ``version``, (generation, revision): a scan of the whole keyspace, after a loss.

        One that is left there by a database that is lost would be taken for one of this database, once that gives its
        revision to something else.
        """
        with redis_errors():
            cursor, pattern = 0, self._names.license("*")
            while True:
                cursor, keys = await self._redis.scan(cursor, match=pattern, count=1_000)
                async with self._redis.pipeline(transaction=False) as pipe:
                    for key in keys:
                        pipe.get(key)
                    documents = await pipe.execute()
                for key, document in zip(keys, documents, strict=True):
                    if document is not None and _version_of(document) > version:
                        await self._redis.delete(key)
                if not cursor:
                    return

    async def forget_sidecars(self, sidecars: Sequence[str]) -> None:
        """Remove heartbeats of sidecars that are gone for good."""
        if sidecars:
            with redis_errors():
                await self._redis.hdel(self._names.sidecars(), *sidecars)

    async def _check_repeat(self, row: Revision) -> None:
        entries = await self._redis.xrange(self._names.changes(), f"{row.revision}-0", f"{row.revision}-0")
        digest = entries[0][1].get(b"digest", b"").decode() if entries else None
        if not is_repeat(row.digest, digest):
            there = f"holds digest {digest[:12] or 'none'}" if digest is not None else "has gone past it"
            raise ChangeRefused(
                f"revision {row.revision} ({row.kind} {row.key}, digest {row.digest[:12]}) was refused by the stream"
                f" {self._names.changes()}, which {there}"
            )


def _version_of(document: bytes) -> tuple[int, int]:
    """(generation, revision) as it says itself, which nobody has verified; zeros when it says none."""
    statement = _statement_of(document)
    return statement.version if statement is not None else (0, 0)


def _statement_of(document: bytes | None) -> Statement | None:
    try:
        statement = read_own(document or b"")
    except (VerificationError, TypeError):
        return None
    return statement if all(isinstance(number, int) for number in statement.version) else None
