"""The sums that the ledger transaction keeps: the rollups by hour, by day and by flag, and what is billed.

They follow from the events, and cover exactly those that were inserted with them; verifying the ledger recounts them.
"""

from __future__ import annotations

import hashlib
from operator import itemgetter
from typing import Any, Final, NamedTuple

import msgpack
from sqlalchemy import ColumnElement, Connection, Table, select

from licet_control_plane.core.accounting import Account, BilledKey, ExposureKey, RollupKey, RollupSums, Sums
from licet_control_plane.store.database import SUM_MAX, upsert_sql
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.schema import billed, exposures, register_spend, rollup_days, rollups

_SUMS: Final = RollupSums._fields
_PAGE_ROWS: Final = 5_000


class _Kept(NamedTuple):
    """A table, its key in the order of an account's, and which of the four sums it has."""

    table: Table
    key: tuple[str, ...]
    sums: tuple[str, ...] = _SUMS
    time: str = "hour"


_HOURS: Final = _Kept(rollups, RollupKey._fields)
_DAYS: Final = _Kept(rollup_days, RollupKey._fields)
_EXPOSED: Final = _Kept(exposures, ExposureKey._fields)
_BILLED: Final = _Kept(billed, BilledKey._fields, ("events", "units"), "month")


def add(connection: Connection, account: Account) -> None:
    """Add what an account of newly inserted events says."""
    for kept, sums in _of(account):
        if sums:
            columns = tuple(column.name for column in kept.table.columns)
            in_order = itemgetter(*map((*kept.key, *_SUMS).index, columns))
            # In one order, so that two transactions never wait for each other's rows. As tuples straight to the driver:
            # naming each value costs as much as adding the row.
            connection.exec_driver_sql(
                upsert_sql(connection.dialect.name, kept.table, columns, key=kept.key, added=kept.sums),
                [in_order((*key, *map(_bounded, sums[key]))) for key in sorted(sums)],
            )


TABLES: Final = tuple(kept.table.name for kept in (_HOURS, _DAYS, _EXPOSED, _BILLED))
"""In the order of ``Contents``."""

Contents = list[dict[tuple[Any, ...], list[int]]]
"""What the tables hold: by key, the sums that each has."""


def contents(connection: Connection) -> Contents:
    """What the tables hold now."""
    return [_stored(connection, kept) for kept in (_HOURS, _DAYS, _EXPOSED, _BILLED)]


def stored_in(connection: Connection, month: Month) -> Contents:
    """What the tables hold of a month."""
    start_s, end_s = month.start_us // 1_000_000, month.end_us // 1_000_000
    return [
        _stored(connection, kept, kept.table.c[kept.time] >= start_s, kept.table.c[kept.time] < end_s)
        for kept in (_HOURS, _DAYS, _EXPOSED, _BILLED)
    ]


def digest_of(sums: Contents) -> bytes:
    """SHA-256 that two have in common when they say the same; rows that sum up nothing are as good as none."""
    said = [sorted(item for item in one.items() if any(item[1])) for one in sums]
    return hashlib.sha256(msgpack.packb(said)).digest()


def time_of(key: tuple[Any, ...]) -> int:
    """The hour, day or month that a key of any of the tables is about, in seconds since the Unix epoch."""
    return int(key[0] if isinstance(key[0], int) else key[1])


Spend = dict[tuple[str, str, str], tuple[int, int, int]]
"""Start of the window, units that registers spent, and those of them that were only observed, by tenant, quota and
sidecar."""


def spend(connection: Connection) -> Spend:
    """What ``register_spend`` holds now."""
    table = register_spend.c
    columns = (table.tenant, table.quota, table.sidecar, table.window_start, table.units, table.observed)
    rows = connection.execute(select(*columns), execution_options={"yield_per": _PAGE_ROWS})
    return {(row[0], row[1], row[2]): (int(row[3]), int(row[4]), int(row[5])) for row in rows}


def spend_of(account: Account) -> dict[tuple[str, str, str], tuple[int, int]]:
    """What ``register_spend`` holds when ``account`` is of all events, without the windows."""
    observed = account.observed
    return {key: (_bounded(units), _bounded(observed.get(key, 0))) for key, units in account.spend.items()}


def contents_of(account: Account) -> Contents:
    """What the tables hold when ``account`` is of all events."""
    found = []
    for kept, sums in _of(account):
        which = [_SUMS.index(name) for name in kept.sums]
        found.append({key: [_bounded(row[index]) for index in which] for key, row in sums.items()})
    return found


def _bounded(number: int) -> int:
    return min(number, SUM_MAX)


def _of(account: Account) -> list[tuple[_Kept, Sums]]:
    return [(_HOURS, account.hours), (_DAYS, account.days()), (_EXPOSED, account.exposed), (_BILLED, account.billed)]


def _stored(connection: Connection, kept: _Kept, *where: ColumnElement[bool]) -> dict[tuple[Any, ...], list[int]]:
    columns = [kept.table.c[name] for name in (*kept.key, *kept.sums)]
    rows = connection.execute(select(*columns).where(*where), execution_options={"yield_per": _PAGE_ROWS})
    width = len(kept.key)
    return {tuple(row[:width]): [int(value) for value in row[width:]] for row in rows}
