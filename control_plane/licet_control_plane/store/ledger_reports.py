"""Questions to the ledger: sums of usage, and one workload's tally.

Reads only; each function sees one committed state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Select, and_, func, select

from licet.domain.outcomes import Effect, Reason
from licet_control_plane.core.sealed_events import public_event
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.ledger import READABLE
from licet_control_plane.store.schema import conflicts, events, rollups, shards
from licet_control_plane.store.subjects import EventReader

GROUPS: Final = ("tenant", "feature", "action", "effect", "reason")
"""What usage can be summed by."""
_PAGE_ROWS: Final = 5_000
_HOUR_US: Final = 3_600 * 1_000_000


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums of one group. ``cost_nanos`` by currency."""

    group: dict[str, str]
    events: int
    units: int
    cost_nanos: dict[str, int]


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of one workload. ``denied`` by reason; units are of approved events."""

    events: int
    approved: int
    denied: dict[str, int]
    pending: int
    units_approved: int
    units_by_feature: dict[str, int]


def summary(
    connection: Connection, *, by: Sequence[str], tenant: str = "", from_us: int = 0, to_us: int | None = None
) -> list[Usage]:
    """Usage summed by ``by`` (of ``GROUPS``), from the hourly rollups: whole hours that start in ``[from, to)``."""
    # By feature an event counts once for each of its features; otherwise once.
    counted = rollups.c.events if "feature" in by else rollups.c.decisions
    grouped = [rollups.c[name] for name in by]
    query: Select[Any] = select(
        *grouped,
        rollups.c.currency,
        func.sum(counted).label("events"),
        func.sum(rollups.c.units).label("units"),
        func.sum(rollups.c.cost_nanos).label("cost_nanos"),
    )
    query = query.where(rollups.c.hour >= from_us // _HOUR_US * 3_600)
    if to_us is not None:
        query = query.where(rollups.c.hour * 1_000_000 < to_us)
    if tenant:
        query = query.where(rollups.c.tenant == tenant)
    query = query.group_by(*grouped, rollups.c.currency).order_by(*grouped, rollups.c.currency)
    sums: dict[tuple[Any, ...], Usage] = {}
    for row in connection.execute(query):
        key = tuple(row[: len(by)])
        old = sums.get(key)
        costs = dict(old.cost_nanos) if old else {}
        if row.currency and row.cost_nanos:
            costs[row.currency] = costs.get(row.currency, 0) + int(row.cost_nanos)
        sums[key] = Usage(
            group={name: _named(name, value) for name, value in zip(by, key, strict=True)},
            events=int(row.events) + (old.events if old else 0),
            units=int(row.units) + (old.units if old else 0),
            cost_nanos=costs,
        )
    # Decisions over several features are counted on "": by feature, such a row has nothing to say.
    return [usage for usage in sums.values() if usage.events or usage.units or usage.cost_nanos]


def tally(
    connection: Connection,
    ledger_key: LedgerKey,
    *,
    tenant: str = "",
    idempotency_prefix: str = "",
    from_us: int = 0,
    to_us: int | None = None,
) -> Tally:
    """What became of the events whose idempotency key starts with a prefix, from the events themselves.

    Keys are personal: every event of the tenant and the time has to be opened to look, some 150,000 a second. Events of
    erased subjects have none.
    """
    where = [events.c.at >= from_us]
    if to_us is not None:
        where.append(events.c.at < to_us)
    if tenant:
        where.append(events.c.tenant == tenant)
    reader = EventReader(connection, ledger_key)
    counts: Counter[tuple[int, int]] = Counter()
    units_approved = 0
    units: Counter[str] = Counter()
    for rows in _pages(connection, select(*READABLE).where(and_(*where))):
        for event in reader.read(rows) if idempotency_prefix else (public_event(row.public) for row in rows):
            if idempotency_prefix and not event.idempotency_key.startswith(idempotency_prefix):
                continue
            counts[event.effect, event.reason] += 1
            if event.effect == Effect.APPROVED:
                units.update(event.units)
                units_approved += sum(event.units.values())
    by_effect = {effect: sum(n for (e, _), n in counts.items() if e == effect) for effect in Effect}
    return Tally(
        events=counts.total(),
        approved=by_effect[Effect.APPROVED],
        denied={_named("reason", reason): n for (effect, reason), n in counts.items() if effect == Effect.DENIED},
        pending=by_effect[Effect.PENDING],
        units_approved=units_approved,
        units_by_feature=dict(sorted(units.items())),
    )


def totals(connection: Connection) -> tuple[int, int]:
    """Batches and events ever recorded."""
    row = connection.execute(
        select(func.coalesce(func.sum(shards.c.batches), 0), func.coalesce(func.sum(shards.c.events), 0))
    ).one()
    return int(row[0]), int(row[1])


def conflict_count(connection: Connection) -> int:
    """Events that came again with other content."""
    return connection.scalar(select(func.count()).select_from(conflicts)) or 0


def _pages(connection: Connection, query: Select[Any]) -> Iterable[Sequence[Any]]:
    return connection.execution_options(yield_per=_PAGE_ROWS).execute(query).partitions()


def _named(group: str, value: Any) -> str:
    if group not in ("effect", "reason"):
        return str(value)
    known: type[Effect] | type[Reason] = Effect if group == "effect" else Reason
    try:
        return known(value).name
    except ValueError:  # a newer sidecar's
        return f"{group.upper()}_{value}"
