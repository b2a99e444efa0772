"""The ledger transaction: puts batches of usage events in the ledger, each event exactly once.

Guaranteed, under repeats, reordering, and workers that were paused and resume:
- an event (log, seq) is inserted once; the rollups and the register spend cover only events inserted with them;
- the watermark of a log says that everything up to it is inserted, and never falls;
- the same (log, seq) with other content is kept in ``ledger_conflicts`` and changes nothing else.

Not guaranteed here: that an event was honestly made. Whoever can write the usage stream can invent events.
Source: the rule of the ledger transaction, ``docs/adr/0001-redis-is-not-the-record.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from licet.wire.usage import UsageEvent, unpack_event
from licet_control_plane.core.accounting import Account, DecodedBatch, storable, window_start_of
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.store.database import insert_rows, upsert
from licet_control_plane.store.schema import (
    conflicts,
    events,
    logs,
    ranges,
    register_spend,
    rollups,
    shards,
)

_EVENT_COLUMNS: Final = (
    "log",
    "seq",
    "at",
    "tenant",
    "subject_type",
    "subject_id",
    "action",
    "effect",
    "reason",
    "rule",
    "revision",
    "units_total",
    "idempotency_key",
    "body",
)


@dataclass(slots=True)
class Recorded:
    """What one transaction did. ``watermarks`` by log id, of every log it saw."""

    inserted: int = 0
    duplicates: int = 0
    conflicts: int = 0
    watermarks: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Log:
    number: int
    recorded: RecordedSeqs
    stored_ranges: set[tuple[int, int]]
    stored_watermark: int
    last_at: int


def record(connection: Connection, shard: int, batches: Sequence[DecodedBatch], *, now_us: int) -> Recorded:
    """Put ``batches`` of one shard in the ledger. May be repeated with the same or overlapping batches.

    The batches of one call should hold 100,000 events at most: they are one transaction.
    """
    _lock(connection, shard)
    done = Recorded()
    account = Account()
    known: dict[str, _Log] = {}
    for decoded in batches:
        batch = decoded.batch
        log = known.get(batch.log_id)
        if log is None:
            log = known[batch.log_id] = _open_log(connection, shard, decoded, now_us)
        missing = log.recorded.missing(batch.first_seq, batch.last_seq)
        present = len(decoded.events) - sum(last - first + 1 for first, last in missing)
        if present:
            different = _compare(connection, log.number, decoded, missing, now_us)
            done.conflicts += different
            done.duplicates += present - different
        for first, last in missing:
            start, end = first - batch.first_seq, last - batch.first_seq + 1
            new = decoded.events[start:end]
            _insert(connection, log.number, new, batch.events[start:end])
            account.add(batch.sidecar, new)
            log.recorded.add(first, last)
            log.last_at = max(log.last_at, new[-1].at_us)
            done.inserted += len(new)
    for log in known.values():
        _save_log(connection, log)
    _add_rollups(connection, account)
    _add_spend(connection, account)
    connection.execute(
        update(shards)
        .where(shards.c.shard == shard)
        .values(batches=shards.c.batches + len(batches), events=shards.c.events + done.inserted)
    )
    done.watermarks = {log_id: log.recorded.watermark for log_id, log in known.items()}
    return done


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


def newest_events(connection: Connection, tenant: str, *, limit: int) -> list[UsageEvent]:
    """The newest events of a tenant, newest first."""
    query = select(events.c.body).where(events.c.tenant == tenant).order_by(events.c.at.desc()).limit(limit)
    return [unpack_event(bytes(body)) for body in connection.scalars(query)]


def _lock(connection: Connection, shard: int) -> None:
    if connection.execute(select(shards.c.shard).where(shards.c.shard == shard).with_for_update()).first() is None:
        connection.execute(upsert(connection, shards).values(shard=shard, batches=0, events=0).on_conflict_do_nothing())
        connection.execute(select(shards.c.shard).where(shards.c.shard == shard).with_for_update()).one()


def _open_log(connection: Connection, shard: int, decoded: DecodedBatch, now_us: int) -> _Log:
    batch = decoded.batch
    # Locked too: a batch that somebody puts in the stream of another shard must not be recorded twice at a time.
    row = connection.execute(select(logs).where(logs.c.log_id == batch.log_id).with_for_update()).first()
    if row is None:
        made = connection.execute(
            insert(logs).values(
                log_id=batch.log_id,
                shard=shard,
                sidecar=batch.sidecar,
                incarnation=batch.incarnation,
                previous_incarnation=batch.previous_incarnation,
                previous_last_seq=batch.previous_last_seq,
                decision_prefix=batch.decision_prefix,
                watermark=0,
                first_at=now_us,
                last_at=0,
            )
        )
        key = made.inserted_primary_key
        assert key is not None
        return _Log(key[0], RecordedSeqs(), set(), 0, 0)
    stored = {
        (first, last)
        for first, last in connection.execute(
            select(ranges.c.first_seq, ranges.c.last_seq).where(ranges.c.log == row.log)
        )
    }
    return _Log(row.log, RecordedSeqs(row.watermark, stored), stored, row.watermark, row.last_at)


def _save_log(connection: Connection, log: _Log) -> None:
    now = set(log.recorded.ranges)
    for first, _ in log.stored_ranges - now:
        connection.execute(delete(ranges).where(ranges.c.log == log.number, ranges.c.first_seq == first))
    if added := now - log.stored_ranges:
        connection.execute(
            insert(ranges), [{"log": log.number, "first_seq": first, "last_seq": last} for first, last in sorted(added)]
        )
    connection.execute(
        update(logs).where(logs.c.log == log.number).values(watermark=log.recorded.watermark, last_at=log.last_at)
    )


def _insert(connection: Connection, log: int, new: Sequence[UsageEvent], bodies: Sequence[bytes]) -> None:
    insert_rows(
        connection,
        events,
        _EVENT_COLUMNS,
        (
            (
                log,
                event.seq,
                event.at_us,
                event.tenant,
                storable(event.subject_type),
                storable(event.subject_id),
                storable(event.action),
                event.effect,
                event.reason,
                event.rule,
                event.revision,
                sum(event.units.values()),
                storable(event.idempotency_key),
                body,
            )
            for event, body in zip(new, bodies, strict=True)
        ),
    )


def _compare(
    connection: Connection, log: int, decoded: DecodedBatch, missing: Sequence[tuple[int, int]], now_us: int
) -> int:
    """Keep aside every event of the batch that is recorded with other content. Returns how many there are."""
    batch = decoded.batch
    query = select(events.c.seq, events.c.body).where(
        events.c.log == log, events.c.seq >= batch.first_seq, events.c.seq <= batch.last_seq
    )
    stored = {row.seq: row.body for row in connection.execute(query)}
    different = [
        (seq, body)
        for seq, body in enumerate(batch.events, batch.first_seq)
        if seq in stored and bytes(stored[seq]) != body
    ]
    for seq, body in different:
        statement = upsert(connection, conflicts).values(
            log=log, seq=seq, digest=hashlib.sha256(body).hexdigest(), at=now_us, body=body
        )
        connection.execute(statement.on_conflict_do_nothing())
    return len(different)


def _add_rollups(connection: Connection, account: Account) -> None:
    # Sorted, here and below: other shards add to the same rows, and two that lock in one order never deadlock.
    rows = [{**key._asdict(), **sums._asdict()} for key, sums in sorted(account.rollups.items())]
    if not rows:
        return
    statement = upsert(connection, rollups)
    added = {
        name: rollups.c[name] + statement.excluded[name] for name in ("decisions", "events", "units", "cost_nanos")
    }
    connection.execute(
        statement.on_conflict_do_update(index_elements=list(rollups.primary_key.columns), set_=added), rows
    )


def _add_spend(connection: Connection, account: Account) -> None:
    rows = [
        {
            "tenant": tenant,
            "quota": quota,
            "sidecar": sidecar,
            "window_start": window_start_of(quota),
            "units": units,
        }
        for (tenant, quota, sidecar), units in sorted(account.spend.items())
    ]
    if not rows:
        return
    statement = upsert(connection, register_spend)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=list(register_spend.primary_key.columns),
            set_={"units": register_spend.c.units + statement.excluded.units},
        ),
        rows,
    )
