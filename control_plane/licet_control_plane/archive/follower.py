"""Keeps the archive as far as the ledger: copies each block, with its events and their subjects' keys, once committed.

Concurrency: everything here runs in one thread of its own, so that an erasure is never overtaken by a key that was read
before it. ``catch_up`` is asked for after each ledger transaction, before sidecars are told: what is acknowledged is in
the archive. It starts from what is on disk, so that whatever was interrupted is done by the next call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Self

import structlog

from licet.wire.names import USAGE_SHARDS
from licet_control_plane.archive.files import (
    ArchiveDamaged,
    ArchiveDirectory,
    ArchiveUnavailable,
    ShardArchive,
    read,
)
from licet_control_plane.archive.records import ArchivedBlock
from licet_control_plane.archive.subject_keys import SubjectKeyFiles
from licet_control_plane.core import chain
from licet_control_plane.store import archiving
from licet_control_plane.store.archiving import FoundBlock
from licet_control_plane.store.database import Database

EVENTS_MAX: Final = 20_000
BLOCKS_MAX: Final = 256
"""Of one frame: some 10 MB."""

log: Final = structlog.get_logger(__name__)


class ArchiveAhead(Exception):
    """The archive does not fit the ledger: it holds what the ledger lacks, or something else under the same number."""


@dataclass(slots=True)
class ArchiveCounts:
    """``lag`` is by shard, in blocks, as of the last look; ``failures`` since the start."""

    blocks: int = 0
    events: int = 0
    failures: int = 0
    bytes: int = 0
    lag: dict[int, int] = field(default_factory=dict)


class Archive:
    """A claimed directory that follows one ledger."""

    def __init__(
        self,
        directory: ArchiveDirectory,
        shards: dict[int, ShardArchive],
        database: Database,
        *,
        now_s: Callable[[], float],
    ) -> None:
        self.counts = ArchiveCounts(bytes=sum(one.bytes for one in shards.values()))
        self._directory = directory
        self._shards = shards
        self._keys = SubjectKeyFiles(directory.path)
        self._database = database
        self._now_s = now_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive")

    @classmethod
    def open(
        cls, directory: ArchiveDirectory, database: Database, deployment: str, *, now_s: Callable[[], float]
    ) -> Self:
        """Recover the files, and see that they are of this ledger and not ahead of it.

        Raises:
            ArchiveAhead: they are.
            ArchiveDamaged, ArchiveUnavailable: see there.
        """
        shards: dict[int, ShardArchive] = {}
        for shard in range(USAGE_SHARDS):
            files = shards[shard] = directory.shard(shard, deployment)
            if files.torn is not None:
                torn = files.torn
                log.warning("a torn end of the archive was cut off", file=str(torn.path), bytes=torn.bytes)
            if not files.last:
                continue
            newest = next(iter(read(directory.path, shard, deployment, after=files.last - 1)))
            try:
                held = ArchivedBlock.unpack(newest.data).block
            except ValueError as error:
                raise ArchiveDamaged(f"{newest.path}: record {newest.number}: {error}") from error
            stored = database.read_now(archiving.hash_at, shard, files.last)
            head = database.read_now(archiving.heads).get(shard)
            if head is None or head.blocks < files.last:
                raise ArchiveAhead(
                    f"{newest.path} ends with block {files.last} of shard {shard}, and the ledger with block"
                    f" {head.blocks if head else 0}"
                )
            if stored is not None and stored != held.hash:
                raise ArchiveAhead(f"{newest.path}: block {files.last} of shard {shard} is another one in the ledger")
        return cls(directory, shards, database, now_s=now_s)

    async def catch_up(self, shard: int) -> None:
        """Copy what is new in a shard of the ledger. When it returns, what was committed before it is on disk.

        Raises:
            ArchiveUnavailable: it cannot be written now.
            ArchiveDamaged: it needs a look; nothing was changed.
            DatabaseUnavailable: the ledger cannot be read now.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._catch_up, shard)
        except (ArchiveUnavailable, ArchiveDamaged):
            self.counts.failures += 1
            raise

    def _catch_up(self, shard: int) -> None:
        files = self._shards[shard]
        while True:
            found = self._database.read_now(
                archiving.blocks_after, shard, files.last, events_max=EVENTS_MAX, blocks_max=BLOCKS_MAX
            )
            head = self._database.read_now(archiving.heads).get(shard)
            self.counts.lag[shard] = head.blocks - files.last if head else 0
            if not found:
                if self.counts.lag[shard]:
                    raise ArchiveDamaged(
                        f"block {files.last + 1} of shard {shard} is not in the ledger any more: an archive can only"
                        " go on from a ledger that holds everything after it"
                    )
                return
            self._copy(files, found)
            self.counts.lag[shard] = max(0, self.counts.lag[shard] - len(found))

    def _copy(self, files: ShardArchive, found: Sequence[FoundBlock]) -> None:
        missing = self._keys.missing(set().union(*(one.subjects for one in found)))
        if missing:
            self._keys.put(self._database.read_now(archiving.subject_rows, missing))
        blocks = [one.archived for one in found]
        for one in blocks:
            erased = chain.erased_of(one.block)
            if erased:
                self._keys.erase(set(erased), at=one.block.at)
        before = files.bytes
        files.append(blocks[0].block.number, [one.pack() for one in blocks], now_s=self._now_s())
        self.counts.bytes += files.bytes - before
        self.counts.blocks += len(found)
        self.counts.events += sum(len(one.events) for one in blocks)

    def close(self) -> None:
        """Finish what runs, and let the directory go."""
        self._thread.shutdown()
        for files in self._shards.values():
            files.close()
        self._directory.close()
