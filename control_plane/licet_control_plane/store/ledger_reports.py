"""Questions to the ledger: one workload's tally, and counts.

Reads only; each function sees one committed state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Select, and_, func, select

from licet.domain.outcomes import Effect
from licet_control_plane.core.sealed_events import public_event
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.ledger import READABLE
from licet_control_plane.store.schema import conflicts, events, shards
from licet_control_plane.store.subjects import EventReader
from licet_control_plane.store.usage_reports import named

_PAGE_ROWS: Final = 5_000


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of one workload. ``denied`` by reason; units are of approved events."""

    events: int
    approved: int
    denied: dict[str, int]
    pending: int
    units_approved: int
    units_by_feature: dict[str, int]


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
        denied={str(named("reason", reason)): n for (effect, reason), n in counts.items() if effect == Effect.DENIED},
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
