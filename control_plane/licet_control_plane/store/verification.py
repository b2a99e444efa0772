"""Recounts the ledger from its rows: every hash, every column, every gap, and the sums.

``verify`` reads what the heads of the chains cover at its start; what is recorded meanwhile is left to the next time.
Blocks are checked in pieces by several processes, each in short transactions of its own: events up to a head never
change (but for an erasure, which each piece sees wholly or not at all). Changes nothing.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection, Engine, func, select

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.core import chain
from licet_control_plane.core.accounting import Account, Sums, storable
from licet_control_plane.core.chain import Block
from licet_control_plane.core.recorded import RecordedSeqs, overlaps
from licet_control_plane.core.sealed_events import (
    COLUMNS,
    SPENDS,
    UNITS,
    Damaged,
    Sealed,
    check_personal,
    event_of,
    fields_of,
    leaf_hash,
)
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import checkpoints, ledger_sums, meta, retention
from licet_control_plane.store.checkpoints import Checkpoint
from licet_control_plane.store.database import read_only_engine
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.schema import blocks, conflicts, events, logs, ranges, shards, subjects
from licet_control_plane.store.schema import gaps as declared
from licet_control_plane.store.subjects import EventReader

PROCESSES_MAX: Final = 8
PIECE_EVENTS: Final = 50_000
"""Events of one piece: half a second of one process, so that progress shows and memory stays small."""
PIECE_BLOCKS: Final = 2_000
INLINE_EVENTS_MAX: Final = 20_000
"""A ledger this small is read sooner than a process is started."""
FINDINGS_MAX: Final = 1_000
"""Findings that are listed. The first one says where to look; the rest is counted."""
ROWS_MAX: Final = 5_000
_STREAMED: Final = {"yield_per": ROWS_MAX}
_COLUMNS: Final = [events.c[name] for name in COLUMNS]
_ROW: Final = (*_COLUMNS, events.c.units_total, events.c.public, events.c.commitment, events.c.personal)


class Finding(NamedTuple):
    """Something that is not as it was recorded. ``kind`` is ``altered``, ``removed``, ``inserted``, ``reordered``,
    ``block``, ``log``, ``subject``, ``checkpoint`` or ``head``; 0, "" and ``None`` where a field does not apply."""

    shard: int | None
    block: int
    log_id: str
    seq: int
    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Events of a log that a sidecar numbered and the ledger does not have."""

    log_id: str
    from_seq: int
    to_seq: int
    why: str


@dataclass(frozen=True, slots=True)
class LogFacts:
    """One log as the ledger has it."""

    log_id: str
    sidecar: str
    incarnation: int
    watermark: int
    events: int


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the ledger is whole. ``findings`` in the order of shards and blocks, at most ``FINDINGS_MAX`` of
    ``findings_total``. ``heads`` are (shard, last block, hash in hexadecimal). ``opened``: personal parts were opened
    too. ``checkpoints``: how many signed ones the chains were held to.

    ``lost`` are events that their sidecar numbered and declared lost: the ledger has what it can have, so that these do
    not make it less whole. Each is a loss that somebody should look into.

    ``dropped``: events by month that were exported and dropped. What is left of their blocks is checked; the root over
    a block with such events cannot be, and is covered by the chain alone. The sums of those months are taken as they
    are.
    """

    events: int
    blocks: int
    logs: list[LogFacts]
    gaps: list[Gap]
    lost: list[Gap]
    dropped: dict[str, int]
    conflicts: int
    rollups_match: bool
    findings: list[Finding]
    findings_total: int
    heads: list[tuple[int, int, str]]
    erased_events: int
    erased_subjects: int
    opened: bool
    checkpoints: int

    @property
    def ok(self) -> bool:
        """Nothing is missing, altered, contested, or billed otherwise than recorded."""
        return not (self.gaps or self.conflicts or self.findings_total) and self.rollups_match

    def as_json(self) -> dict[str, Any]:
        """As the API and ``--json`` have it."""
        return {
            "ok": self.ok,
            **asdict(self),
            "findings": [one._asdict() for one in self.findings],
            "heads": [{"shard": shard, "block": number, "hash": head} for shard, number, head in self.heads],
        }


class Progress(NamedTuple):
    """Events that were checked, of how many."""

    done: int
    of: int


def verify(
    url: str,
    ledger_key: LedgerKey | None,
    verifier: Verifier | None,
    *,
    given: Sequence[Checkpoint] = (),
    processes: int = 0,
) -> Generator[Progress | Verification, None, None]:
    """Check the ledger in the database at ``url``; yields progress, and the verification last.

    ``ledger_key`` ``None``: personal parts are not opened, and an alteration of them is not found. ``verifier`` checks
    the checkpoints in the database; ``given`` are checked too, their signatures by the caller. ``processes`` 0: as many
    as there are processors, at most ``PROCESSES_MAX``.

    Raises:
        OperationalError and others of SQLAlchemy: the database cannot be read.
    """
    engine = read_only_engine(url)
    try:
        with engine.connect() as connection, connection.begin():
            plan = _Plan.read(connection, ledger_key)
        books = _Books(plan)
        yield Progress(0, plan.events)
        secret = ledger_key.secret if ledger_key else None
        processes = processes or min(os.cpu_count() or 1, PROCESSES_MAX)
        if plan.events <= INLINE_EVENTS_MAX or processes == 1:
            for piece in plan.pieces:
                books.add(_check(engine, piece, plan.deployment, ledger_key))
                yield Progress(books.events, plan.events)
        else:
            for found in _in_processes(url, secret, plan, processes):
                books.add(found)
                yield Progress(books.events, plan.events)
        with engine.connect() as connection, connection.begin():
            yield books.closed(connection, verifier, given, opened=ledger_key is not None)
    finally:
        engine.dispose()


class _Piece(NamedTuple):
    """Blocks of one shard, bounds included."""

    shard: int
    first: int
    last: int


@dataclass(slots=True)
class _Found:
    """What the check of a piece came to. ``ranges`` and ``erased`` are what blocks (shard, number) say."""

    events: int = 0
    blocks: int = 0
    erased_events: int = 0
    findings: list[Finding] = field(default_factory=list)
    findings_total: int = 0
    ranges: list[tuple[int, int, chain.Range]] = field(default_factory=list)
    erased: list[tuple[int, int, int]] = field(default_factory=list)
    sums: tuple[Sums, Sums, Sums] = ({}, {}, {})

    def add(self, finding: Finding) -> None:
        self.findings_total += 1
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(finding)


@dataclass(slots=True)
class _Plan:
    """The state that is verified: one committed one."""

    deployment: str
    generation: int
    heads: list[tuple[int, int, bytes]]
    pieces: list[_Piece]
    events: int
    stray: list[Finding]
    logs: list[Any]
    above: dict[int, list[tuple[int, int]]]
    lost: dict[int, list[tuple[int, int, str]]]
    gone: dict[int, int]
    dropped: dict[Month, int]
    counts: dict[int, int]
    sums: ledger_sums.Contents
    conflicts: int
    erased: dict[int, bool]
    checkpoint: bytes | None

    @classmethod
    def read(cls, connection: Connection, ledger_key: LedgerKey | None) -> _Plan:
        about = meta.read(connection)
        heads = [(row.shard, row.blocks, bytes(row.head)) for row in connection.execute(select(shards))]
        pieces, total, stray = _pieces(connection, {shard: number for shard, number, _ in heads})
        above: dict[int, list[tuple[int, int]]] = {}
        for log, first, last in connection.execute(select(ranges)):
            above.setdefault(log, []).append((first, last))
        lost: dict[int, list[tuple[int, int, str]]] = {}
        for row in connection.execute(select(declared).order_by(declared.c.log, declared.c.first_seq)):
            lost.setdefault(row.log, []).append((row.first_seq, row.last_seq, row.reason))
        known = list(connection.execute(select(logs).order_by(logs.c.sidecar, logs.c.incarnation)))
        counts: dict[int, int] = {
            row[0]: row[1] for row in connection.execute(select(events.c.log, func.count()).group_by(events.c.log))
        }
        gone = retention.dropped_by_log(connection)
        stray += _strays(connection, known, above, lost, gone, counts)
        erased, altered = _subjects(connection, ledger_key)
        stray += altered
        return cls(
            deployment=about.deployment,
            generation=about.ledger_generation,
            heads=heads,
            pieces=pieces,
            events=total,
            stray=stray,
            logs=known,
            above=above,
            lost=lost,
            gone=gone,
            dropped=retention.dropped_by_month(connection),
            counts=counts,
            sums=ledger_sums.contents(connection),
            conflicts=connection.scalar(select(func.count()).select_from(conflicts)) or 0,
            erased=erased,
            checkpoint=checkpoints.newest(connection),
        )


def _pieces(connection: Connection, ends: dict[int, int]) -> tuple[list[_Piece], int, list[Finding]]:
    """Pieces of all chains up to their heads; how many events they say they have; and blocks beyond a head."""
    pieces: list[_Piece] = []
    stray: list[Finding] = []
    total = begun = 0
    open_: _Piece | None = None
    rows = connection.execute(
        select(blocks.c.shard, blocks.c.number, blocks.c.events).order_by(blocks.c.shard, blocks.c.number),
        execution_options=_STREAMED,
    )
    for shard, number, count in rows:
        if number > ends.get(shard, 0) or number < 1:
            stray.append(Finding(shard, number, "", 0, "head", "a block beyond the head of its chain"))
            continue
        total += count
        if open_ is None or open_.shard != shard or begun >= PIECE_EVENTS or number - open_.first >= PIECE_BLOCKS:
            if open_ is not None:
                pieces.append(open_)
            open_, begun = _Piece(shard, open_.last + 1 if open_ and open_.shard == shard else 1, number), 0
        open_ = open_._replace(last=number)
        begun += count
    if open_ is not None:
        pieces.append(open_)
    # What was cut off at the end belongs to the last piece, or to one of its own.
    for shard, end in sorted(ends.items()):
        reached = max((piece.last for piece in pieces if piece.shard == shard), default=0)
        if reached < end:
            pieces.append(_Piece(shard, reached + 1, end))
    return pieces, total, stray


def _strays(
    connection: Connection,
    known: Sequence[Any],
    above: dict[int, list[tuple[int, int]]],
    lost: dict[int, list[tuple[int, int, str]]],
    gone: dict[int, int],
    counts: dict[int, int],
) -> list[Finding]:
    """Events of no log, or with numbers that their log does not say it has."""
    found: list[Finding] = []
    for log in sorted(counts.keys() - {row.log for row in known}):
        found.append(Finding(None, 0, "", 0, "inserted", f"{counts[log]} events of a log that is not known"))
    for row in known:
        recorded = RecordedSeqs(row.watermark, above.get(row.log, ()))
        absent = [(first, last) for first, last, _ in lost.get(row.log, ())]
        promised = row.watermark + sum(last - first + 1 for first, last in recorded.ranges)
        promised -= gone.get(row.log, 0)
        if counts.get(row.log, 0) <= promised - sum(last - first + 1 for first, last in absent):
            continue
        seqs = connection.scalars(
            select(events.c.seq).where(events.c.log == row.log).order_by(events.c.seq), execution_options=_STREAMED
        )
        for seq in seqs:
            if seq < 1 or recorded.missing(seq, seq) or overlaps(absent, seq, seq):
                found.append(Finding(row.shard, 0, row.log_id, seq, "inserted", "no block has the event"))
    return found


def _subjects(connection: Connection, ledger_key: LedgerKey | None) -> tuple[dict[int, bool], list[Finding]]:
    """Subjects that seem erased, and whether they wholly are; and keys that were altered."""
    erased: dict[int, bool] = {}
    altered: list[Finding] = []
    rows = connection.execute(
        select(subjects.c.number, subjects.c.tag, subjects.c.key, subjects.c.erased_at), execution_options=_STREAMED
    )
    for number, tag, key, erased_at in rows:
        if key is None or erased_at is not None:
            erased[number] = key is None and tag is None and erased_at is not None
        elif ledger_key is not None:
            try:
                ledger_key.unwrap(bytes(key), bytes(tag or b""))
            except Damaged:
                what = f"the key or the tag of subject {number} was altered"
                altered.append(Finding(None, 0, "", 0, "subject", what))
    return erased, altered


def _kept(sums: ledger_sums.Contents, dropped: Collection[Month]) -> ledger_sums.Contents:
    """Without what is about months whose events are gone."""
    if not dropped:
        return sums
    seconds = [range(month.start_us // 1_000_000, month.end_us // 1_000_000) for month in dropped]
    return [
        {key: value for key, value in one.items() if not any(ledger_sums.time_of(key) in month for month in seconds)}
        for one in sums
    ]


# --- one piece --------------------------------------------------------------------------------------------------------

_here: dict[str, Any] = {}
"""Of a process of the pool: its engine, its ledger key."""


def _begin_process(url: str, secret: bytes | None) -> None:
    gc.set_threshold(200_000)  # rows are many, short-lived, and in no cycles
    _here["engine"] = read_only_engine(url)
    _here["key"] = LedgerKey(secret) if secret else None


def _check_here(piece: _Piece, deployment: str) -> _Found:
    return _check(_here["engine"], piece, deployment, _here["key"])


def _in_processes(url: str, secret: bytes | None, plan: _Plan, processes: int) -> Iterator[_Found]:
    # Spawned: a fork would share the threads' locks, and SQLite's connections, with this process.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_process, initargs=(url, secret))
    try:
        waiting = iter(plan.pieces)
        running: set[Future[_Found]] = set()
        while True:
            # A few ahead, so that whoever stops listening ends the work soon.
            while len(running) < 2 * processes and (piece := next(waiting, None)) is not None:
                running.add(pool.submit(_check_here, piece, plan.deployment))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check(engine: Engine, piece: _Piece, deployment: str, ledger_key: LedgerKey | None) -> _Found:
    found = _Found()
    account = Account()
    with engine.connect() as connection, connection.begin():
        reader = EventReader(connection, ledger_key)
        numbers: dict[str, int] = {row.log_id: row.log for row in connection.execute(select(logs.c.log_id, logs.c.log))}
        gone = retention.dropped_numbers(connection)
        dropped = {log_id: gone[log] for log_id, log in numbers.items() if log in gone}
        group: list[tuple[Block, list[chain.Range]]] = []
        size = 0
        for block, covered in _checked_blocks(connection, piece, deployment, found):
            group.append((block, covered))
            size += block.events
            if size >= ROWS_MAX:
                _check_group(connection, reader, numbers, dropped, group, found, account)
                group, size = [], 0
        _check_group(connection, reader, numbers, dropped, group, found, account)
    found.sums = (account.hours, account.exposed, account.billed)
    return found


def _checked_blocks(
    connection: Connection, piece: _Piece, deployment: str, found: _Found
) -> Iterator[tuple[Block, list[chain.Range]]]:
    """The blocks of a piece with their ranges, once their links and hashes were looked at."""
    stored = {
        row.number: Block(*row)
        for row in connection.execute(
            select(blocks).where(blocks.c.shard == piece.shard, blocks.c.number.between(piece.first - 1, piece.last))
        )
    }
    covered: dict[str, RecordedSeqs] = {}
    for number in range(piece.first, piece.last + 1):
        block = stored.get(number)
        if block is None:
            found.add(Finding(piece.shard, number, "", 0, "removed", "the block is missing"))
            continue
        found.blocks += 1
        before = stored.get(number - 1)
        link = chain.genesis(deployment, piece.shard) if number == 1 else before.hash if before else block.previous
        if block.previous != link:
            what = "the block does not follow the one before it"
            found.add(Finding(piece.shard, number, "", 0, "block", what))
        if chain.hash_of(block) != block.hash:
            what = "the block was altered: its hash is not that of its contents"
            found.add(Finding(piece.shard, number, "", 0, "block", what))
        try:
            ranges_ = chain.ranges_of(block)
            found.erased += [(piece.shard, number, subject) for subject in chain.erased_of(block)]
        except ValueError as error:
            found.add(Finding(piece.shard, number, "", 0, "block", f"the block cannot be read: {error}"))
            continue
        for one in ranges_:
            _cover(covered, piece.shard, number, one, found)
        yield block, ranges_
    for log_id, seqs in covered.items():
        below = [(1, seqs.watermark)] if seqs.watermark else []
        found.ranges += [(piece.shard, piece.last, (log_id, first, last)) for first, last in [*below, *seqs.ranges]]


def _cover(covered: dict[str, RecordedSeqs], shard: int, number: int, one: chain.Range, found: _Found) -> None:
    """Note that a block (or one up to it) has a range, which no other may have."""
    log_id, first, last = one
    seqs = covered.setdefault(log_id, RecordedSeqs())
    if seqs.missing(first, last) != [(first, last)]:
        what = "a block has events that a block before it has too"
        found.add(Finding(shard, number, log_id, first, "block", what))
    seqs.add(first, last)


def _check_group(
    connection: Connection,
    reader: EventReader,
    numbers: dict[str, int],
    dropped: Mapping[str, RecordedSeqs],
    group: Sequence[tuple[Block, list[chain.Range]]],
    found: _Found,
    account: Account,
) -> None:
    """Check blocks that follow each other; their rows are read together, since most blocks are small."""
    wanted: dict[str, list[tuple[int, int]]] = {}
    for _, covered in group:
        for log_id, first, last in covered:
            spans = wanted.setdefault(log_id, [])
            if spans and spans[-1][1] == first - 1:
                spans[-1] = (spans[-1][0], last)
            else:
                spans.append((first, last))
    rows: dict[str, dict[int, Any]] = {}
    twice: set[tuple[str, int]] = set()
    for log_id, spans in wanted.items():
        mine = rows[log_id] = {}
        for first, last in spans if log_id in numbers else ():
            query = select(*_ROW).where(events.c.log == numbers[log_id], events.c.seq.between(first, last))
            for row in connection.execute(query.order_by(events.c.seq, events.c.at)):
                if mine.setdefault(row[1], row) is not row:
                    twice.add((log_id, row[1]))
    ciphers = reader.ciphers({row[0] for mine in rows.values() for row in mine.values()})
    readable: list[Any] = []
    for block, covered in group:
        before = found.findings_total
        leaves: list[bytes] = []
        is_whole = True
        for log_id, first, last in covered:
            if log_id not in numbers:
                found.add(Finding(block.shard, block.number, log_id, first, "log", "the log was removed or renamed"))
                continue
            mine = rows[log_id]
            gone = dropped.get(log_id)
            for seq in range(first, last + 1):
                if found.findings_total - before > FINDINGS_MAX:
                    break  # a range without end, of a block that was altered
                if (kept := mine.get(seq)) is None:
                    if gone is not None and not gone.missing(seq, seq):
                        is_whole = False
                        continue
                    found.add(Finding(block.shard, block.number, log_id, seq, "removed", "the event is missing"))
                    continue
                if twice and (log_id, seq) in twice:
                    found.add(Finding(block.shard, block.number, log_id, seq, "inserted", "the event is there twice"))
                found.events += 1
                leaves.append(leaf_hash(kept[-3], kept[-2]))
                try:
                    fields = fields_of(kept[-3])
                    fields[SPENDS] = ()  # of what is summed below, what registers spent is not wanted
                    readable.append(fields)
                    _check_row(kept, fields, log_id, reader, ciphers[kept[0]], found)
                except Damaged as error:
                    kind = "reordered" if isinstance(error, _Misplaced) else "altered"
                    found.add(Finding(block.shard, block.number, log_id, seq, kind, str(error)))
        if is_whole and found.findings_total == before:
            _check_root(block, covered, leaves, found)
    try:
        account.add("", map(event_of, readable))
    except (TypeError, ValueError, AttributeError):
        pass  # a public part that was altered: its block says so


def _check_root(block: Block, covered: Sequence[chain.Range], leaves: Sequence[bytes], found: _Found) -> None:
    """Check the tree of a block in which every event fits itself: columns, public part, and personal part if open."""
    if chain.root_of(leaves) != block.root:
        # So another one was put in the place of one of these, whole; or one was altered whose personal part is erased,
        # or closed to this reader.
        log_id, first, last = covered[0] if covered else ("", 0, 0)
        what = (
            f"an event of this block was altered, or the root of the block: the root over events {first} to {last}"
            + (f" and {len(covered) - 1} more ranges" if len(covered) > 1 else "")
            + " is another"
        )
        found.add(Finding(block.shard, block.number, log_id, first, "altered", what))
    elif len(leaves) != block.events:
        what = f"the block counts {block.events} events, and has {len(leaves)}"
        found.add(Finding(block.shard, block.number, "", 0, "block", what))


class _Misplaced(Damaged):
    """An event stands in the place of another."""


def _check_row(
    row: Any, fields: list[Any], log_id: str, reader: EventReader, cipher: AESGCM | None, found: _Found
) -> None:
    """
    Raises:
        Damaged: the row is not what was recorded.
    """
    repeated = list(row[: len(COLUMNS)])
    said = fields[1:UNITS]
    if repeated != said and repeated != (said := [storable(one) if type(one) is str else one for one in said]):
        name = next(name for name, a, b in zip(COLUMNS, repeated, said, strict=True) if a != b)
        if name == "seq":
            raise _Misplaced(f"the event numbered {fields[2]} stands in its place")
        raise Damaged(f"column {name} is not what the public part says")
    if row[-4] != sum(fields[UNITS].values()):
        raise Damaged("column units_total is not what the public part says")
    personal = row[-1]
    if cipher is not None:
        check_personal(log_id, Sealed(row[-3], row[-2], personal), cipher)
    elif row[0] in reader.erased:
        found.erased_events += 1
        if personal is not None:
            raise Damaged("it has a personal part, and its subject was erased")
    elif personal is None:
        raise Damaged("the personal part is missing, and its subject was not erased")
    elif reader.has_key:
        raise Damaged("the key of its subject is missing or was altered")


# --- the whole --------------------------------------------------------------------------------------------------------


class _Books:
    """Everything that the pieces found, put together."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._found = _Found()
        self._account = Account()
        self._found.findings += plan.stray[:FINDINGS_MAX]
        self._found.findings_total += len(plan.stray)

    @property
    def events(self) -> int:
        return self._found.events

    def add(self, piece: _Found) -> None:
        found = self._found
        found.events += piece.events
        found.blocks += piece.blocks
        found.erased_events += piece.erased_events
        found.findings += piece.findings[: FINDINGS_MAX - len(found.findings)]
        found.findings_total += piece.findings_total
        found.ranges += piece.ranges
        found.erased += piece.erased
        self._account.merge(*piece.sums)

    def closed(
        self, connection: Connection, verifier: Verifier | None, given: Sequence[Checkpoint], *, opened: bool
    ) -> Verification:
        plan, found = self._plan, self._found
        facts, gaps, lost = self._logs()
        self._subjects()
        self._heads(connection)
        held_to = self._checkpoints(connection, verifier, given)
        findings = sorted(found.findings, key=_order)
        return Verification(
            events=found.events,
            blocks=found.blocks,
            logs=facts,
            gaps=gaps,
            lost=lost,
            dropped={str(month): count for month, count in plan.dropped.items()},
            conflicts=plan.conflicts,
            rollups_match=_kept(plan.sums, plan.dropped) == _kept(ledger_sums.contents_of(self._account), plan.dropped),
            findings=findings,
            findings_total=found.findings_total,
            heads=[(shard, number, head.hex()) for shard, number, head in sorted(plan.heads) if number],
            erased_events=found.erased_events,
            erased_subjects=len(plan.erased),
            opened=opened,
            checkpoints=held_to,
        )

    def _logs(self) -> tuple[list[LogFacts], list[Gap], list[Gap]]:
        """What logs say that they have against what blocks have; and what never came."""
        found, plan = self._found, self._plan
        covered: dict[str, RecordedSeqs] = {}
        for shard, number, one in sorted(found.ranges):
            _cover(covered, shard, number, one, found)
        watermarks = {(row.sidecar, row.incarnation): row.watermark for row in plan.logs}
        facts: list[LogFacts] = []
        gaps: list[Gap] = []
        lost: list[Gap] = []
        for row in plan.logs:
            count = plan.counts.get(row.log, 0)
            facts.append(LogFacts(row.log_id, row.sidecar, row.incarnation, row.watermark, count))
            recorded = RecordedSeqs(row.watermark, plan.above.get(row.log, ()))
            seqs = covered.get(row.log_id, RecordedSeqs())
            for first, last, reason in plan.lost.get(row.log, ()):
                lost.append(Gap(row.log_id, first, last, reason))
                if seqs.missing(first, last) != [(first, last)]:
                    what = f"{first} to {last} are declared lost, and blocks have some of them"
                    found.add(Finding(row.shard, 0, row.log_id, first, "log", what))
                seqs.add(first, last)
            if (recorded.watermark, recorded.ranges) != (seqs.watermark, seqs.ranges):
                what = f"the log says that it has {_text(recorded)}; its blocks have {_text(seqs)}"
                found.add(Finding(row.shard, 0, row.log_id, 0, "log", what))
            gaps += [Gap(row.log_id, first, last, "not received yet, or lost") for first, last in recorded.holes()]
            if row.previous_last_seq:
                reached = watermarks.get((row.sidecar, row.previous_incarnation), 0)
                if reached < row.previous_last_seq:
                    log_id = f"{row.sidecar}:{row.previous_incarnation}"
                    gaps.append(
                        Gap(log_id, reached + 1, row.previous_last_seq, "its successor says that it went on to here")
                    )
        return facts, gaps, lost

    def _subjects(self) -> None:
        """Who was erased, by the blocks and by the rows."""
        declared = {subject for _, _, subject in self._found.erased}
        for number, gone in sorted(self._plan.erased.items()):
            if number not in declared:
                what = f"subject {number} has no key, and no block says that it was erased"
                self._found.add(Finding(None, 0, "", 0, "subject", what))
            elif not gone:
                what = f"subject {number} was erased, and has a key or a tag"
                self._found.add(Finding(None, 0, "", 0, "subject", what))
        for number in sorted(declared - self._plan.erased.keys()):
            what = f"subject {number} was erased by a block, and not in fact"
            self._found.add(Finding(None, 0, "", 0, "subject", what))

    def _heads(self, connection: Connection) -> None:
        for shard, number, head in self._plan.heads:
            end = self._hash(connection, shard, number)
            if number and end is not None and end != head:
                self._found.add(Finding(shard, number, "", 0, "head", "the head of the chain is not its last block"))

    def _checkpoints(self, connection: Connection, verifier: Verifier | None, given: Sequence[Checkpoint]) -> int:
        found, plan = self._found, self._plan
        held = list(given)
        if plan.checkpoint is not None and verifier is not None:
            try:
                held.append(Checkpoint.of(plan.checkpoint, verifier))
            except VerificationError as error:
                found.add(Finding(None, 0, "", 0, "checkpoint", f"the newest checkpoint in the database: {error}"))
        ends = {shard: number for shard, number, _ in plan.heads}
        for one in held:
            name = f"checkpoint {one.number} of ledger generation {one.generation}"
            if one.deployment != plan.deployment:
                found.add(Finding(None, 0, "", 0, "checkpoint", f"{name} is of another deployment"))
                continue
            for shard, number, head in one.heads:
                end = ends.get(shard, 0)
                restored = (
                    f"; the ledger is of generation {plan.generation} now: it was restored from a backup since"
                    if one.generation != plan.generation
                    else ""
                )
                if number > end:
                    what = f"{name} has block {number}, and the chain ends at {end}: blocks were removed{restored}"
                    found.add(Finding(shard, end + 1, "", 0, "checkpoint", what))
                elif self._hash(connection, shard, number) != head:
                    what = f"{name} has another block {number}: it, or one before it, was rewritten{restored}"
                    found.add(Finding(shard, number, "", 0, "checkpoint", what))
        return len(held)

    def _hash(self, connection: Connection, shard: int, number: int) -> bytes | None:
        row = connection.execute(select(blocks).where(blocks.c.shard == shard, blocks.c.number == number)).first()
        return chain.hash_of(Block(*row)) if row is not None else None


def _order(finding: Finding) -> tuple[float, ...]:
    """By shard and block; what is about no block comes after what is, and what is about no shard last."""
    return (math.inf if finding.shard is None else finding.shard, finding.block or math.inf, finding.seq)


def _text(seqs: RecordedSeqs) -> str:
    parts = [f"1 to {seqs.watermark}"] if seqs.watermark else []
    parts += [f"{first} to {last}" for first, last in seqs.ranges[:10]]
    return ", ".join(parts) or "nothing"
