"""What reconciling reads of the ledger."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from sqlalchemy import Connection, select

from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.store.schema import logs, ranges, register_spend


def spend_in(connection: Connection, tenant: str, quotas: Sequence[str]) -> dict[str, dict[str, int]]:
    """Units by quota and sidecar, of a few hundred quotas of a tenant."""
    rows = connection.execute(
        select(register_spend.c.quota, register_spend.c.sidecar, register_spend.c.units).where(
            register_spend.c.tenant == tenant, register_spend.c.quota.in_(quotas)
        )
    )
    found: dict[str, dict[str, int]] = {}
    for quota, sidecar, units in rows:
        found.setdefault(quota, {})[sidecar] = int(units)
    return found


def watermarks(connection: Connection, log_ids: Collection[str]) -> dict[str, int]:
    """Of a few thousand logs; those that the ledger knows."""
    rows = connection.execute(select(logs.c.log_id, logs.c.watermark).where(logs.c.log_id.in_(log_ids)))
    return {row.log_id: row.watermark for row in rows}


def recorded_logs(connection: Connection, shard: int) -> Iterator[tuple[str, RecordedSeqs]]:
    """Every log of a shard and what of it is recorded."""
    rows = connection.execute(select(logs.c.log, logs.c.log_id, logs.c.watermark).where(logs.c.shard == shard)).all()
    above: dict[int, list[tuple[int, int]]] = {}
    for log, first, last in connection.execute(select(ranges.c.log, ranges.c.first_seq, ranges.c.last_seq)):
        above.setdefault(log, []).append((first, last))
    for log, log_id, watermark in rows:
        yield log_id, RecordedSeqs(watermark, above.get(log, ()))
