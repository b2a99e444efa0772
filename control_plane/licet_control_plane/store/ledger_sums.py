"""The sums beside the hourly rollups: by day, by flag, and what is billed. Part of the ledger transaction.

They follow from the events: ``match`` recounts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, Table, select

from licet_control_plane.core.accounting import Account
from licet_control_plane.store.database import upsert
from licet_control_plane.store.schema import billed, exposures, rollup_days

_ROLLUP_SUMS: Final = ("decisions", "events", "units", "cost_nanos")
_BILLED_SUMS: Final = ("events", "units")


def add(connection: Connection, account: Account) -> None:
    """Add what an account of newly inserted events says."""
    for table, sums, rows in _tables(account):
        _add(connection, table, sums, rows)


def match(connection: Connection, account: Account) -> bool:
    """Whether the tables hold exactly what an account of all events says."""
    return all(_stored(connection, table, sums) == rows for table, sums, rows in _tables(account))


def _tables(account: Account) -> list[tuple[Table, tuple[str, ...], dict[Any, tuple[int, ...]]]]:
    """Each table, its sums, and the account's rows: sums by key, as ``_keys`` orders it."""
    return [
        (rollup_days, _ROLLUP_SUMS, _rows(rollup_days, account.days)),
        (exposures, _ROLLUP_SUMS, _rows(exposures, account.exposures)),
        (billed, _BILLED_SUMS, _rows(billed, account.billed)),
    ]


def _keys(table: Table) -> list[str]:
    return [column.name for column in table.primary_key.columns]


def _rows(table: Table, of: Mapping[Any, tuple[int, ...]]) -> dict[Any, tuple[int, ...]]:
    names = _keys(table)
    return {tuple(getattr(key, name) for name in names): tuple(sums) for key, sums in of.items()}


def _add(
    connection: Connection, table: Table, sums: tuple[str, ...], rows: Mapping[tuple[Any, ...], tuple[int, ...]]
) -> None:
    if not rows:
        return
    names = (*_keys(table), *sums)
    statement = upsert(connection, table)
    added = {name: table.c[name] + statement.excluded[name] for name in sums}
    connection.execute(
        statement.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=added),
        # In one order, so that two transactions never wait for each other's rows.
        [dict(zip(names, (*key, *rows[key]), strict=True)) for key in sorted(rows)],
    )


def _stored(connection: Connection, table: Table, sums: tuple[str, ...]) -> dict[Any, tuple[int, ...]]:
    columns = [table.c[name] for name in (*_keys(table), *sums)]
    rows = connection.execution_options(yield_per=5_000).execute(select(*columns))
    return {tuple(row[: -len(sums)]): tuple(int(value) for value in row[-len(sums) :]) for row in rows}
