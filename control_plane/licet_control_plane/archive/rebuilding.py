"""Puts a ledger back together from its archive: the same events, blocks, sums, watermarks, declared losses and register
spends. A month that was dropped is there again, as far as the archive has it: it may be exported and dropped once more.

A ledger that holds a beginning of what the archive holds is gone on with: an empty one, one that was interrupted here,
or one that was restored from a backup. Any other is refused. Nothing else may write the database meanwhile.

Not in the archive, and not rebuilt: documents, licenses and keys of the API; conflicts and dead letters; checkpoints;
and of subjects that were erased, what they spent from quotas with a scope.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

from licet_control_plane.archive.files import ArchiveDamaged, Record, read, shards_in
from licet_control_plane.archive.records import ArchivedBlock
from licet_control_plane.archive.subject_keys import ArchivedSubject, SubjectKeyFiles
from licet_control_plane.core import chain
from licet_control_plane.core.sealed_events import Damaged
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import archiving, ledger
from licet_control_plane.store.database import Database

EVENTS_MAX: Final = 20_000
"""Of one transaction."""
SUBJECTS_MAX: Final = 5_000


class NotARebuild(Exception):
    """The ledger holds what the archive does not: it cannot be gone on with."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is. ``bytes_done`` of ``bytes_total`` of the archive's files were read."""

    shard: int
    block: int
    blocks: int
    events: int
    bytes_done: int
    bytes_total: int


def rebuild(
    database: Database, directory: Path, deployment: str, ledger_key: LedgerKey, *, now_us: int
) -> Iterator[Progress]:
    """Put everything in ``database`` that the archive holds beyond it; step by step, as the caller asks for it.

    Each step is a transaction: it may be ended after any of them, and called again.

    Raises:
        NotARebuild: nothing was changed.
        ArchiveDamaged: what is damaged, and where; everything before it is in the ledger.
        ArchiveUnavailable, DatabaseUnavailable: may be called again.
    """
    held = database.read_now(archiving.heads)
    found = shards_in(directory)
    if missing := sorted(shard for shard, head in held.items() if head.blocks and shard not in found):
        raise NotARebuild(f"the ledger has blocks of shard {missing[0]}, and the archive none")
    afters = {shard: held[shard].blocks if shard in held else 0 for shard in found}
    # All of them before anything is changed.
    for shard, after in afters.items():
        _verify_beginning(database, directory, shard, deployment, after)
    total = sum(path.stat().st_size for shard in found for path in (directory / f"shard-{shard}").iterdir())
    erased: set[int] = set()
    begun = False
    blocks = events = done_bytes = 0
    paths: set[Path] = set()
    for shard, after in afters.items():
        for records in _grouped(read(directory, shard, deployment, after=after)):
            if not begun:
                begun = True
                database.write_now(archiving.begin_rebuilding, str(directory), now_us=now_us)
                erased = _put_subjects(database, directory)
            database.write_now(_restore, records, ledger_key=ledger_key, erased=erased)
            for record, _ in records:
                if record.path not in paths:
                    paths.add(record.path)
                    done_bytes += record.path.stat().st_size
            blocks += len(records)
            events += sum(len(one.events) for _, one in records)
            yield Progress(shard, records[-1][0].number, blocks, events, done_bytes, total)


def _verify_beginning(database: Database, directory: Path, shard: int, deployment: str, after: int) -> None:
    if not after:
        return
    record = next(iter(read(directory, shard, deployment, after=after - 1)), None)
    stored = database.read_now(archiving.hash_at, shard, after)
    if record is None or stored is None or _unpacked(record).block.hash != stored:
        raise NotARebuild(f"block {after} of shard {shard} of the ledger is not in the archive")


def _put_subjects(database: Database, directory: Path) -> set[int]:
    """Every subject. Returns the numbers of those that were erased."""
    erased: set[int] = set()
    page: list[ArchivedSubject] = []
    for subject in SubjectKeyFiles(directory).all():
        page.append(subject)
        if subject.erased_at is not None:
            erased.add(subject.number)
        if len(page) >= SUBJECTS_MAX:
            database.write_now(archiving.put_subjects, page)
            page = []
    database.write_now(archiving.put_subjects, page)
    return erased


def _grouped(records: Iterator[Record]) -> Iterator[list[tuple[Record, ArchivedBlock]]]:
    group: list[tuple[Record, ArchivedBlock]] = []
    count = 0
    for record in records:
        one = _unpacked(record)
        group.append((record, one))
        count += len(one.events)
        if count >= EVENTS_MAX:
            yield group
            group, count = [], 0
    if group:
        yield group


def _unpacked(record: Record) -> ArchivedBlock:
    try:
        return ArchivedBlock.unpack(record.data)
    except ValueError as error:
        raise ArchiveDamaged(f"{record.path}: record {record.number}: {error}") from error


def _restore(
    connection: Connection,
    records: list[tuple[Record, ArchivedBlock]],
    *,
    ledger_key: LedgerKey,
    erased: set[int],
) -> None:
    shard = records[0][1].block.shard
    previous = archiving.hash_at(connection, shard, records[0][0].number - 1)
    for record, one in records:
        try:
            problem = one.problem(previous or b"")
            if (one.block.shard, one.block.number) != (shard, record.number):
                problem = f"it is block {one.block.number} of shard {one.block.shard}"
            if problem:
                raise ValueError(problem)
            ledger.restore(connection, one, ledger_key=ledger_key, erased=erased)
            gone = chain.erased_of(one.block)
        except (Damaged, ValueError, KeyError) as error:
            raise ArchiveDamaged(f"{record.path}: record {record.number}: {error}") from error
        if gone:
            archiving.erase_subjects(connection, gone, at=one.block.at)
        previous = one.block.hash
