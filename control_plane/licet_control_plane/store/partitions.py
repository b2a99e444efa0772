"""Months of the ledger: when they begin and end, and on PostgreSQL the partition of each.

Partitions are made ahead, by ``ensure``, never by the ledger transaction, which must not wait for whoever reads. An
event whose month has no partition, because a sidecar's clock is odd or because nobody made it in time, goes to the
default partition: nothing is refused. A partition that is made takes over what the default one holds of its month.
Source: ``docs/adr/0025-months-of-the-ledger.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self

from sqlalchemy import Connection

from licet_control_plane.store.database import POSTGRESQL
from licet_control_plane.store.schema import events

MONTHS_BEHIND: Final = 1
"""Sidecars that were cut off deliver late; at the start of a deployment the month before has no partition yet."""
MONTHS_AHEAD: Final = 2
"""So that a control plane that is down for a month has not run out of partitions when it comes back."""
DEFAULT: Final = f"{events.name}_default"
_LOCK_MS_MAX: Final = 2_000
"""How long making a partition may wait for readers of the default one, and hold up the drain; it is tried again."""
_PATTERN: Final = re.compile(r"(\d{4})-(0[1-9]|1[0-2])")
_US: Final = 1_000_000


@dataclass(frozen=True, slots=True, order=True)
class Month:
    """A calendar month, UTC; years 1970 to 9998."""

    year: int
    month: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``2026-05``.

        Raises:
            ValueError: not of that form, or not of such a year.
        """
        match = _PATTERN.fullmatch(text)
        if match is None or not 1970 <= int(match[1]) <= 9998:
            raise ValueError(f"{text!r} is not a month such as 2026-05")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def at(cls, at_us: int) -> Self:
        """The one with an instant, in microseconds since the Unix epoch; must be of such a year."""
        then = datetime.fromtimestamp(at_us // _US, UTC)
        return cls(then.year, then.month)

    def plus(self, months: int) -> Month:
        """So many months later."""
        years, month = divmod(self.month - 1 + months, 12)
        return Month(self.year + years, month + 1)

    @property
    def start_us(self) -> int:
        """Its first instant, in microseconds since the Unix epoch."""
        return int(datetime(self.year, self.month, 1, tzinfo=UTC).timestamp()) * _US

    @property
    def end_us(self) -> int:
        """The first instant after it."""
        return self.plus(1).start_us

    @property
    def partition(self) -> str:
        """The name of its partition."""
        return f"{events.name}_{self.year:04}_{self.month:02}"

    def __str__(self) -> str:
        return f"{self.year:04}-{self.month:02}"


def wanted(now_us: int) -> Iterator[Month]:
    """The months that must have a partition now."""
    this = Month.at(now_us)
    return (this.plus(months) for months in range(-MONTHS_BEHIND, MONTHS_AHEAD + 1))


def existing(connection: Connection) -> set[str]:
    """The names of all partitions; none on SQLite, which has one table."""
    if connection.dialect.name != POSTGRESQL:
        return set()
    return set(
        connection.exec_driver_sql(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = %s::regclass", (events.name,)
        ).scalars()
    )


def lock_against_writers(connection: Connection) -> None:
    """Let nobody insert or change partitions until the transaction ends; readers go on.

    Raises:
        OperationalError: whoever is at it takes longer than may be waited; try again later.
    """
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {_LOCK_MS_MAX}")
    connection.exec_driver_sql(f'LOCK TABLE ONLY "{events.name}" IN SHARE ROW EXCLUSIVE MODE')


def ensure(connection: Connection, *, now_us: int) -> list[Month]:
    """Make the partitions that are missing; returns the months. May be repeated; does nothing on SQLite.

    Raises:
        OperationalError: somebody reads the default partition for longer than may be waited; try again later.
    """
    if connection.dialect.name != POSTGRESQL:
        return []
    there = existing(connection)
    missing = [month for month in wanted(now_us) if month.partition not in there]
    if missing:
        # Whoever else makes partitions waits here, and then finds them. So does whoever inserts: it would have chosen
        # the default partition already, and be refused by its new bounds.
        lock_against_writers(connection)
        there = existing(connection)
        missing = [month for month in missing if month.partition not in there]
    for month in missing:
        _make(connection, month)
    return missing


def _make(connection: Connection, month: Month) -> None:
    # A table of its own that is attached: CREATE TABLE … PARTITION OF would lock the whole ledger against readers.
    name, bounds = month.partition, f"at >= {month.start_us} AND at < {month.end_us}"
    columns = ", ".join(f'"{column.name}"' for column in events.columns)
    connection.exec_driver_sql(f'CREATE TABLE "{name}" (LIKE "{events.name}" INCLUDING ALL)')
    # Nothing may come to the default partition between the look at it and the end of this transaction.
    connection.exec_driver_sql(f'LOCK TABLE "{DEFAULT}" IN ACCESS EXCLUSIVE MODE')
    connection.exec_driver_sql(
        f'WITH moved AS (DELETE FROM "{DEFAULT}" WHERE {bounds} RETURNING {columns})'  # noqa: S608  # own names only
        f' INSERT INTO "{name}" ({columns}) SELECT {columns} FROM moved'
    )
    # Proves to ATTACH what it would otherwise read the table for.
    connection.exec_driver_sql(f'ALTER TABLE "{name}" ADD CONSTRAINT "{name}_month" CHECK ({bounds})')
    connection.exec_driver_sql(
        f'ALTER TABLE "{events.name}" ATTACH PARTITION "{name}" FOR VALUES FROM ({month.start_us}) TO ({month.end_us})'
    )
