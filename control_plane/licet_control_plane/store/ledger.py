"""The ledger transaction: puts batches of usage events in the ledger, each event exactly once.

Guaranteed, under repeats, reordering, and workers that were paused and resume:
- an event (log, seq) is inserted once; the rollups, the register spend and the block cover only events inserted with
  them, and a transaction that changed nothing makes no block: the chain of a shard never forks;
- the watermark of a log says that everything up to it is inserted, and never falls;
- the same (log, seq) with other content is kept in ``ledger_conflicts`` and changes nothing else;
- what a sidecar declares lost is kept in ``ledger_gaps`` and counts as recorded, unless it is recorded; an event that
  comes after all is inserted, and leaves the gap. The block says what was declared with it, and which logs are new.

Not guaranteed here: that an event was honestly made. Whoever can write the usage stream can invent events. The rest is
in ``README.md`` beside this module.
Source: the rule of the ledger transaction, ``docs/adr/0001-redis-is-not-the-record.md``;
``docs/adr/0017-a-ledger-that-proves-and-forgets.md``, ``docs/adr/0028-what-leaves-the-ledger-is-in-its-chain.md``.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, tuple_, update

from licet.wire.names import USAGE_SHARDS
from licet.wire.usage import UsageBatch, UsageEvent
from licet_control_plane.archive.records import ArchivedBlock
from licet_control_plane.core import chain
from licet_control_plane.core.accounting import Account, DecodedBatch, storable, window_start_of
from licet_control_plane.core.chain import Drop, Lost, MetLog
from licet_control_plane.core.recorded import Gap, LogNumbers, RecordedSeqs
from licet_control_plane.core.sealed_events import RANDOM_BYTES, UNITS, Sealed, fields_of, is_same, leaf_hash, seal
from licet_control_plane.core.subject_keys import LedgerKey, Subject
from licet_control_plane.store import ledger_sums, meta, subjects
from licet_control_plane.store.database import SUM_MAX, insert_rows, upsert, upsert_sql
from licet_control_plane.store.schema import (
    blocks,
    conflicts,
    events,
    gaps,
    logs,
    ranges,
    register_spend,
    shards,
)
from licet_control_plane.store.schema import subjects as subjects_table
from licet_control_plane.store.subjects import EventReader, SubjectKeys

_EVENT_COLUMNS: Final = (
    "log",
    "seq",
    "at",
    "tenant",
    "subject",
    "subject_type",
    "action",
    "effect",
    "reason",
    "rule",
    "revision",
    "units_total",
    "public",
    "commitment",
    "personal",
)
WHOLE_LEDGER_SHARD: Final = 0
"""Erasures and dropped months are written in the chain of this shard."""


@dataclass(slots=True)
class Recorded:
    """What one transaction did. ``watermarks`` by log id, of every log it saw; ``lost`` likewise, of those with gaps:
    the ranges below it that are declared lost. ``declared`` counts numbers that became so.
    """

    inserted: int = 0
    duplicates: int = 0
    conflicts: int = 0
    declared: int = 0
    watermarks: dict[str, int] = field(default_factory=dict)
    lost: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Log:
    number: int
    shard: int
    numbers: LogNumbers
    stored_ranges: set[tuple[int, int]]
    stored_watermark: int
    last_at: int


class _NewBlock:
    """What a transaction does, in order, for its block."""

    def __init__(self) -> None:
        self.ranges: list[chain.Range] = []
        self.leaves: list[bytes] = []
        self.first_at = 0
        self.last_at = 0
        self.logs: list[MetLog] = []
        self.lost: list[Lost] = []

    def __bool__(self) -> bool:
        return bool(self.leaves or self.logs or self.lost)

    def declare(self, log_id: str, parts: Sequence[tuple[int, int]], reason: str) -> int:
        """Numbers became lost; how many that are."""
        self.lost += [Lost(log_id, first, last, reason) for first, last in parts]
        return sum(last - first + 1 for first, last in parts)

    def add(self, log_id: str, new: Sequence[UsageEvent], leaves: list[bytes]) -> None:
        times = [event.at_us for event in new]
        first_at, last_at = min(times), max(times)
        self.first_at = min(self.first_at, first_at) if self.leaves else first_at
        self.last_at = max(self.last_at, last_at)
        self.leaves += leaves
        if self.ranges and self.ranges[-1][0] == log_id and self.ranges[-1][2] == new[0].seq - 1:
            self.ranges[-1] = (log_id, self.ranges[-1][1], new[-1].seq)
        else:
            self.ranges.append((log_id, new[0].seq, new[-1].seq))


def record(
    connection: Connection, shard: int, batches: Sequence[DecodedBatch], *, keys: SubjectKeys, now_us: int
) -> Recorded:
    """Put ``batches`` of one shard in the ledger. May be repeated with the same or overlapping batches.

    The batches of one call should hold 100,000 events at most: they are one transaction.

    Raises:
        Damaged: the key of a subject was altered in the database.
    """
    head = _lock(connection, shard)
    keys.begin(head.erasures)
    reader = EventReader(connection, keys.ledger_key)
    made = _NewBlock()
    done = Recorded()
    account = Account()
    known: dict[str, _Log] = {}
    for decoded in batches:
        batch = decoded.batch
        log = known.get(batch.log_id)
        if log is None:
            found = _find_log(connection, batch.log_id)
            log = known[batch.log_id] = found or _make_log(connection, shard, _met(batch), at=now_us)
            if found is None or log.shard != shard:
                # Also in a chain that is not its own: each chain can be restored before the others.
                made.logs.append(_met(batch))
        for lost in batch.lost:
            parts = log.numbers.declare(lost.first_seq, lost.last_seq, Gap(lost.reason, now_us))
            done.declared += made.declare(batch.log_id, parts, lost.reason)
        missing = log.numbers.missing(batch.first_seq, batch.last_seq)
        present = len(decoded.events) - sum(last - first + 1 for first, last in missing)
        if present:
            different = _compare(connection, reader, keys, log.number, decoded, now_us)
            done.conflicts += different
            done.duplicates += present - different
        for first, last in missing:
            start, end = first - batch.first_seq, last - batch.first_seq + 1
            new = decoded.events[start:end]
            made.add(batch.log_id, new, _insert(connection, keys, log.number, new, batch, start, now_us))
            account.add(batch.sidecar, new)
            log.numbers.add(first, last)
            log.last_at = max(log.last_at, new[-1].at_us)
            done.inserted += len(new)
    for log in known.values():
        _save_log(connection, log)
    ledger_sums.add(connection, account)
    _add_spend(connection, account)
    if made:
        head = _append(
            connection,
            head,
            now_us,
            ranges=made.ranges,
            leaves=made.leaves,
            span=(made.first_at, made.last_at),
            logs=made.logs,
            lost=made.lost,
        )
    connection.execute(
        update(shards)
        .where(shards.c.shard == shard)
        .values(batches=shards.c.batches + len(batches), events=shards.c.events + done.inserted)
    )
    done.watermarks = {log_id: log.numbers.recorded.watermark for log_id, log in known.items()}
    done.lost = {log_id: sorted(log.numbers.gaps) for log_id, log in known.items() if log.numbers.gaps}
    return done


def restore(connection: Connection, archived: ArchivedBlock, *, ledger_key: LedgerKey, erased: Container[int]) -> None:
    """Put a block back that was read from an archive, after the block before it, with all that follows from it.

    The caller has verified it. Subjects are there already; what is personal of those in ``erased`` is left out.

    Raises:
        Damaged: an event cannot be read.
        ValueError: an event is not where the block says, is of a log that no block named, or of a subject that is not
            there: its number would be given to somebody else.
    """
    block = archived.block
    _lock(connection, block.shard)
    reader = EventReader(connection, ledger_key)
    account = Account()
    sealed = iter(archived.events)
    known: dict[str, _Log] = {}
    for met in chain.logs_of(block):
        log = _find_log(connection, met.log_id) or _make_log(connection, block.shard, met, at=block.at)
        known[met.log_id] = log
    numbers: set[int] = set()
    for lost in chain.lost_of(block):
        _known_log(connection, known, lost.log_id).numbers.declare(lost.first, lost.last, Gap(lost.reason, block.at))
    for log_id, first, last in chain.ranges_of(block):
        log = _known_log(connection, known, log_id)
        rows: list[tuple[Any, ...]] = []
        readable: list[_Readable] = []
        for seq, event in zip(range(first, last + 1), sealed, strict=False):
            fields = fields_of(event.public)
            subject, numbered, at, tenant, *columns = fields[1:UNITS]
            if numbered != seq:
                raise ValueError(f"event {numbered} of log {log_id} stands where event {seq} should")
            personal = None if subject in erased else event.personal
            units = sum(fields[UNITS].values())
            rows.append(
                (log.number, seq, at, tenant, subject, *columns, units, event.public, event.commitment, personal)
            )
            readable.append(_Readable(log.number, subject, event.public, event.commitment, personal))
        insert_rows(connection, events, _EVENT_COLUMNS, rows)
        numbers.update(row.subject for row in readable)
        read = reader.read(readable)
        account.add(log_id.rpartition(":")[0], read)
        log.numbers.add(first, last)
        log.last_at = max(log.last_at, read[-1].at_us)
    if missing := subjects.unknown(connection, numbers):
        raise ValueError(f"subject {missing[0]}, who is in it, is not in subject-keys: put the whole folder back")
    for log in known.values():
        _save_log(connection, log)
    ledger_sums.add(connection, account)
    _add_spend(connection, account)
    connection.execute(insert(blocks).values(block._asdict()))
    connection.execute(
        update(shards)
        .where(shards.c.shard == block.shard)
        .values(
            blocks=block.number, head=block.hash, batches=shards.c.batches + 1, events=shards.c.events + block.events
        )
    )
    if chain.erased_of(block):
        _count_erasure(connection)


def _known_log(connection: Connection, known: dict[str, _Log], log_id: str) -> _Log:
    log = known.get(log_id) or _find_log(connection, log_id)
    if log is None:
        raise ValueError(f"no block names the log {log_id} first")
    known[log_id] = log
    return log


class _Readable(NamedTuple):
    """The columns of ``READABLE``."""

    log: int
    subject: int
    public: bytes
    commitment: bytes
    personal: bytes | None


def spend_of(
    connection: Connection, tenants: Sequence[str], *, window_start_min: int, starts: Collection[int] = ()
) -> dict[str, list[Row[Any]]]:
    """Rows (tenant, quota, sidecar, window_start, units) of a few hundred tenants, by tenant, of windows that start
    at ``window_start_min`` (seconds) or later, and of those that start at one of ``starts``, a few thousand at most."""
    found: dict[str, list[Row[Any]]] = {}
    windows = register_spend.c.window_start >= window_start_min
    if starts:
        windows = or_(windows, register_spend.c.window_start.in_(list(starts)))
    rows = connection.execute(select(register_spend).where(register_spend.c.tenant.in_(tenants), windows))
    for row in rows:
        found.setdefault(row.tenant, []).append(row)
    return found


def spend_from(
    connection: Connection, quotas: Collection[tuple[str, str]], sidecars: Collection[str]
) -> dict[tuple[str, str, str], int]:
    """Units that ``sidecars`` spent from ``quotas`` (tenant, quota), by (tenant, quota, sidecar); of a few hundred."""
    rows = connection.execute(
        select(register_spend).where(
            register_spend.c.tenant.in_({tenant for tenant, _ in quotas}),
            register_spend.c.quota.in_({quota for _, quota in quotas}),
            register_spend.c.sidecar.in_(sidecars),
        )
    )
    return {(row.tenant, row.quota, row.sidecar): int(row.units) for row in rows}


def newest_events(connection: Connection, tenant: str, *, ledger_key: LedgerKey, limit: int) -> list[UsageEvent]:
    """The newest events of a tenant, newest first. Those of erased subjects have ``ERASED`` for their subject."""
    query = select(*READABLE).where(events.c.tenant == tenant).order_by(events.c.at.desc()).limit(limit)
    return EventReader(connection, ledger_key).read(connection.execute(query).all())


READABLE: Final = (events.c.log, events.c.subject, events.c.public, events.c.commitment, events.c.personal)
"""What ``EventReader.read`` takes."""


class Cursor(NamedTuple):
    """Where a page of events ended: the time and the place of its last one."""

    at: int
    log: int
    seq: int


@dataclass(frozen=True, slots=True)
class SubjectEvent:
    """An event about somebody, and where it stands. ``conflict``: it came with the number of another one."""

    log_id: str
    decision_prefix: bytes
    event: UsageEvent
    conflict: bool = False


def events_about(
    connection: Connection,
    ledger_key: LedgerKey,
    tenant: str,
    type: str,
    id: str,
    *,
    after: Cursor | None,
    limit: int,
) -> tuple[list[SubjectEvent], Cursor | None]:
    """A page of what is recorded about somebody, by time, and where it ended; ``None`` when that was all.

    Those kept aside as conflicts come with the last page. Reads all events of the tenant over the pages.

    Raises:
        Damaged: an event was altered.
    """
    number = subjects_table.c.number
    whom = subjects.is_about(ledger_key, tenant, type, id)
    mine = events.c.subject.in_(select(number).where(whom))
    place = tuple_(events.c.at, events.c.log, events.c.seq)
    where = [events.c.tenant == tenant, mine] + ([place > after] if after is not None else [])
    query = select(*READABLE, events.c.at, events.c.seq).where(*where).order_by(events.c.at, events.c.log, events.c.seq)
    rows = connection.execute(query.limit(limit)).all()
    reader = EventReader(connection, ledger_key)
    prefixes = {
        row.log: (row.log_id, bytes(row.decision_prefix))
        for row in connection.execute(select(logs).where(logs.c.log.in_({row.log for row in rows})))
    }
    page = [
        SubjectEvent(*prefixes[row.log], event)
        for row, event in zip(rows, reader.read([row[: len(READABLE)] for row in rows]), strict=True)
    ]
    if len(rows) == limit:
        return page, Cursor(rows[-1].at, rows[-1].log, rows[-1].seq)
    asides = connection.execute(
        select(*(conflicts.c[column.name] for column in READABLE), logs.c.log_id, logs.c.decision_prefix)
        .join(logs, logs.c.log == conflicts.c.log)
        .where(conflicts.c.subject.in_(select(number).where(whom)))
        .order_by(conflicts.c.at, conflicts.c.seq)
    ).all()
    page += [
        SubjectEvent(row.log_id, bytes(row.decision_prefix), event, conflict=True)
        for row, event in zip(asides, reader.read([row[: len(READABLE)] for row in asides]), strict=True)
    ]
    return page, None


@dataclass(frozen=True, slots=True)
class Erased:
    """What an erasure did. ``numbers`` are those of the subjects, which stay."""

    numbers: list[int]
    events: int


def erase(connection: Connection, ledger_key: LedgerKey, tenant: str, type: str, id: str, *, now_us: int) -> Erased:
    """Destroy the personal part of everything recorded about somebody, and the keys of it.

    The chain records the numbers, and verifies as before. Reads all events of the tenant, a million in some seconds,
    for which ledger transactions wait. May be repeated: what came since is erased then.
    """
    heads = _lock_all(connection)
    whom = subjects.is_about(ledger_key, tenant, type, id)
    number = subjects_table.c.number
    numbers = list(connection.scalars(select(number).where(whom).order_by(number)))
    if not numbers:
        return Erased([], 0)
    gone = [
        connection.execute(
            update(table)
            .where(*where, table.c.subject.in_(select(number).where(whom)), table.c.personal.is_not(None))
            .values(personal=None)
        ).rowcount
        for table, where in ((events, [events.c.tenant == tenant]), (conflicts, []))
    ]
    subjects.forget(connection, whom, now_us=now_us)
    _count_erasure(connection)
    _append(connection, heads[WHOLE_LEDGER_SHARD], now_us, erased=numbers)
    return Erased(numbers, gone[0])


def _count_erasure(connection: Connection) -> None:
    connection.execute(update(shards).values(erasures=shards.c.erasures + 1))


def stand_still(connection: Connection) -> None:
    """No ledger transaction is under way from now on until this one ends."""
    _lock_all(connection)


def note_drop(connection: Connection, step: Drop, *, now_us: int) -> None:
    """Put in the chain that a month begins to be dropped, or is gone."""
    _append(connection, _lock(connection, WHOLE_LEDGER_SHARD), now_us, dropped=[step])


@dataclass(frozen=True, slots=True)
class _Head:
    """Where a shard's chain ends."""

    shard: int
    blocks: int
    hash: bytes
    erasures: int


def lock_shard(connection: Connection, shard: int) -> None:
    """Make this transaction the only one of its shard until it ends."""
    _lock(connection, shard)


def _lock(connection: Connection, shard: int) -> _Head:
    row = connection.execute(select(shards).where(shards.c.shard == shard).with_for_update()).first()
    if row is None:
        connection.execute(
            upsert(connection, shards)
            .values(
                shard=shard,
                batches=0,
                events=0,
                blocks=0,
                head=chain.genesis(meta.read(connection).deployment, shard),
                erasures=select(func.coalesce(func.max(shards.c.erasures), 0)).scalar_subquery(),
            )
            .on_conflict_do_nothing()
        )
        row = connection.execute(select(shards).where(shards.c.shard == shard).with_for_update()).one()
    return _Head(shard, row.blocks, bytes(row.head), row.erasures)


def _lock_all(connection: Connection) -> list[_Head]:
    return [_lock(connection, shard) for shard in range(USAGE_SHARDS)]


def _append(connection: Connection, head: _Head, now_us: int, **contents: Any) -> _Head:
    """Append a block to the chain whose head is locked."""
    block = chain.next_block(
        head.hash,
        head.shard,
        head.blocks + 1,
        generation=meta.read(connection).ledger_generation,
        at=now_us,
        **contents,
    )
    connection.execute(insert(blocks).values(block._asdict()))
    connection.execute(update(shards).where(shards.c.shard == head.shard).values(blocks=block.number, head=block.hash))
    return _Head(head.shard, block.number, block.hash, head.erasures)


def _met(batch: UsageBatch) -> MetLog:
    return MetLog(
        batch.log_id,
        batch.sidecar,
        batch.incarnation,
        batch.previous_incarnation,
        batch.previous_last_seq,
        batch.decision_prefix,
    )


def _find_log(connection: Connection, log_id: str) -> _Log | None:
    # Locked too: a batch that somebody puts in the stream of another shard must not be recorded twice at a time.
    row = connection.execute(select(logs).where(logs.c.log_id == log_id).with_for_update()).first()
    if row is None:
        return None
    stored = {
        (first, last)
        for first, last in connection.execute(
            select(ranges.c.first_seq, ranges.c.last_seq).where(ranges.c.log == row.log)
        )
    }
    found = connection.execute(select(gaps).where(gaps.c.log == row.log))
    declared = {(gap.first_seq, gap.last_seq): Gap(gap.reason, gap.at) for gap in found}
    numbers = LogNumbers(RecordedSeqs(row.watermark, stored), declared)
    return _Log(row.log, row.shard, numbers, stored, row.watermark, row.last_at)


def _make_log(connection: Connection, shard: int, about: MetLog, *, at: int) -> _Log:
    """A log that is heard of for the first time; ``at`` is the time of the block that names it."""
    made = connection.execute(
        insert(logs).values(about._asdict() | {"shard": shard, "watermark": 0, "first_at": at, "last_at": 0})
    )
    key = made.inserted_primary_key
    assert key is not None
    return _Log(key[0], shard, LogNumbers(RecordedSeqs()), set(), 0, 0)


def _save_log(connection: Connection, log: _Log) -> None:
    now = set(log.numbers.recorded.ranges)
    for first, _ in log.stored_ranges - now:
        connection.execute(delete(ranges).where(ranges.c.log == log.number, ranges.c.first_seq == first))
    if added := now - log.stored_ranges:
        connection.execute(
            insert(ranges), [{"log": log.number, "first_seq": first, "last_seq": last} for first, last in sorted(added)]
        )
    if log.numbers.gaps_changed:
        connection.execute(delete(gaps).where(gaps.c.log == log.number))
        rows = [
            {"log": log.number, "first_seq": first, "last_seq": last, "reason": gap.reason, "at": gap.at}
            for (first, last), gap in log.numbers.gaps.items()
        ]
        if rows:
            connection.execute(insert(gaps), rows)
    connection.execute(
        update(logs)
        .where(logs.c.log == log.number)
        .values(watermark=log.numbers.recorded.watermark, last_at=log.last_at)
    )


def _insert(
    connection: Connection,
    keys: SubjectKeys,
    log: int,
    new: Sequence[UsageEvent],
    batch: UsageBatch,
    start: int,
    now_us: int,
) -> list[bytes]:
    """Insert ``new``, which are the events of the batch from ``start`` on. Returns their leaves."""
    log_id = batch.log_id
    whose = [Subject(event.tenant, event.subject_type, event.subject_id, event.on_behalf_of) for event in new]
    key_of = keys.of(connection, set(whose), now_us=now_us)
    random = os.urandom(RANDOM_BYTES * len(new))
    rows: list[tuple[Any, ...]] = []
    leaves: list[bytes] = []
    for index, (event, subject) in enumerate(zip(new, whose, strict=True)):
        key = key_of[subject]
        public, commitment, personal = seal(
            event,
            batch.events[start + index],
            log_id,
            key.number,
            key.cipher,
            random[index * RANDOM_BYTES : (index + 1) * RANDOM_BYTES],
        )
        leaves.append(leaf_hash(public, commitment))
        rows.append(
            (
                log,
                event.seq,
                event.at_us,
                event.tenant,
                key.number,
                storable(event.subject_type),
                storable(event.action),
                event.effect,
                event.reason,
                event.rule,
                event.revision,
                sum(event.units.values()),
                public,
                commitment,
                personal,
            )
        )
    insert_rows(connection, events, _EVENT_COLUMNS, rows)
    return leaves


def _compare(
    connection: Connection, reader: EventReader, keys: SubjectKeys, log: int, decoded: DecodedBatch, now_us: int
) -> int:
    """Keep aside every event of the batch that is recorded with other content. Returns how many there are."""
    batch = decoded.batch
    query = select(events.c.seq, *READABLE).where(
        events.c.log == log, events.c.seq >= batch.first_seq, events.c.seq <= batch.last_seq
    )
    stored = connection.execute(query).all()
    ciphers = reader.ciphers({row.subject for row in stored})
    different: list[tuple[UsageEvent, bytes]] = []
    for row in stored:
        event, packed = decoded.events[row.seq - batch.first_seq], batch.events[row.seq - batch.first_seq]
        sealed = Sealed(row.public, row.commitment, row.personal)
        if not is_same(event, packed, batch.log_id, row.subject, sealed, ciphers[row.subject]):
            different.append((event, packed))
    if not different:
        return 0
    whose = [Subject(event.tenant, event.subject_type, event.subject_id, event.on_behalf_of) for event, _ in different]
    key_of = keys.of(connection, set(whose), now_us=now_us)
    for (event, packed), subject in zip(different, whose, strict=True):
        key = key_of[subject]
        kept = seal(event, packed, batch.log_id, key.number, key.cipher, os.urandom(RANDOM_BYTES))
        statement = upsert(connection, conflicts).values(
            log=log,
            seq=event.seq,
            digest=hmac.digest(key.key, packed, "sha256").hex(),
            at=now_us,
            subject=key.number,
            **kept._asdict(),
        )
        connection.execute(statement.on_conflict_do_nothing())
    return len(different)


def _add_spend(connection: Connection, account: Account) -> None:
    observed = account.observed
    rows = [
        (tenant, quota, sidecar, window_start_of(quota), min(units, SUM_MAX), min(observed.get(key, 0), SUM_MAX))
        for key, units in sorted(account.spend.items())
        for tenant, quota, sidecar in (key,)
    ]
    if rows:
        columns = tuple(column.name for column in register_spend.columns)
        key = tuple(column.name for column in register_spend.primary_key.columns)
        connection.exec_driver_sql(
            upsert_sql(connection.dialect.name, register_spend, columns, key=key, added=("units", "observed")),
            rows,
        )
