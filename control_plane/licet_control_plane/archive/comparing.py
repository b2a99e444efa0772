"""The archive against the ledger: every record verified, the same blocks, and the same numbers of every log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from licet.wire.names import USAGE_SHARDS
from licet_control_plane.archive.files import ArchiveDamaged, read
from licet_control_plane.archive.records import ArchivedBlock
from licet_control_plane.core import chain
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.store import archiving, reconciling
from licet_control_plane.store.database import Database


@dataclass(frozen=True, slots=True)
class ArchiveDifference:
    """Something that the two do not have in common. ``log_id`` is empty when it is about a whole shard."""

    shard: int
    log_id: str
    what: str


@dataclass(frozen=True, slots=True)
class Compared:
    """One shard. ``blocks`` and ``events`` are what the archive holds of it."""

    shard: int
    blocks: int
    events: int
    differences: list[ArchiveDifference]


def compare(database: Database, directory: Path, deployment: str) -> Iterator[Compared]:
    """Compare shard by shard; reads the whole archive. What the archive lacks because it is behind is no difference.

    Raises:
        ArchiveUnavailable: a file cannot be read.
        DatabaseUnavailable: the ledger cannot.
    """
    for shard in range(USAGE_SHARDS):
        yield _compare(database, directory, deployment, shard)


def _compare(database: Database, directory: Path, deployment: str, shard: int) -> Compared:
    blocks = events = 0
    found: list[ArchiveDifference] = []
    archived: dict[str, RecordedSeqs] = {}
    previous = chain.genesis(deployment, shard)
    try:
        for record in read(directory, shard, deployment):
            one = ArchivedBlock.unpack(record.data)
            problem = one.problem(previous)
            if problem:
                raise ArchiveDamaged(f"{record.path}: record {record.number}: {problem}")
            for log_id, first, last in (*chain.ranges_of(one.block), *(gap[:3] for gap in chain.lost_of(one.block))):
                archived.setdefault(log_id, RecordedSeqs()).add(first, last)
            previous, blocks, events = one.block.hash, record.number, events + one.block.events
    except (ArchiveDamaged, ValueError) as error:
        found.append(ArchiveDifference(shard, "", str(error)))
    head = database.read_now(archiving.heads).get(shard)
    stored = database.read_now(archiving.hash_at, shard, blocks)
    if blocks and (head is None or head.blocks < blocks):
        has = head.blocks if head else 0
        found.append(ArchiveDifference(shard, "", f"the archive has {blocks} blocks, the ledger {has}"))
    elif blocks and stored is not None and stored != previous:
        found.append(ArchiveDifference(shard, "", f"block {blocks} is another one in the ledger"))
    recorded = dict(database.read_now(lambda connection: list(reconciling.recorded_logs(connection, shard))))
    for log_id, seqs in archived.items():
        in_ledger = recorded.get(log_id, RecordedSeqs())
        ranges = [(1, seqs.watermark)] if seqs.watermark else []
        for first, last in (*ranges, *seqs.ranges):
            for gap in in_ledger.missing(first, last):
                what = f"events {gap[0]} to {gap[1]} are in the archive and not in the ledger"
                found.append(ArchiveDifference(shard, log_id, what))
    if head is not None and head.blocks == blocks:  # else what it lacks is what it has not archived yet
        for log_id, seqs in recorded.items():
            in_archive = archived.get(log_id, RecordedSeqs())
            for first, last in (*([(1, seqs.watermark)] if seqs.watermark else []), *seqs.ranges):
                for gap in in_archive.missing(first, last):
                    what = f"events {gap[0]} to {gap[1]} are in the ledger and not in the archive"
                    found.append(ArchiveDifference(shard, log_id, what))
    return Compared(shard, blocks, events, found)
