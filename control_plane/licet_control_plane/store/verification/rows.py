"""The rows of events: each column against the public part, the personal part opened, and what it counts.

The inner loop of verifying. It is written out in one place because calling and naming cost as much as what is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, bindparam, select

from licet_control_plane.core.accounting import Account, storable
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.core.sealed_events import (
    COLUMNS,
    SCOPED_FROM,
    SPENDS,
    UNITS,
    Damaged,
    PublicEvent,
    all_fields_of,
    belonging,
    fields_of,
    named,
    opened,
    scoped_spends,
)
from licet_control_plane.store.database import raw_rows
from licet_control_plane.store.schema import events
from licet_control_plane.store.subjects import EventReader
from licet_control_plane.store.verification.report import Finding, Findings

_COLUMNS: Final = (*COLUMNS, "units_total", "public", "commitment", "personal")
Row = tuple[Any, ...]
"""Of ``_COLUMNS``."""
UNITS_AT: Final = len(COLUMNS)
PUBLIC_AT: Final = _COLUMNS.index("public")
_SEQ: Final = COLUMNS.index("seq")
_ROWS: Final = (
    select(*(events.c[name] for name in _COLUMNS))
    .where(events.c.log == bindparam("log"), events.c.seq.between(bindparam("first"), bindparam("last")))
    .order_by(events.c.seq, events.c.at)
)


def read(connection: Connection, log: int, first: int, last: int) -> list[Row]:
    """The rows of a log's numbers that are here, by number; one that is there twice comes twice."""
    return raw_rows(connection, _ROWS, (log, first, last))


def is_whole(rows: Sequence[Row], first: int, last: int) -> bool:
    """Whether ``rows``, by number, are those of ``first`` to ``last``, each once."""
    return len(rows) == last - first + 1 and [row[_SEQ] for row in rows] == list(range(first, last + 1))


def by_number(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """``rows`` by their number."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row[_SEQ], []).append(row)
    return found


class RowChecker:
    """Checks the rows of one log's events. ``uncounted`` are numbers that no sum is compared with any more, ``gone``
    those that should not be here."""

    def __init__(
        self,
        log_id: str,
        reader: EventReader,
        *,
        findings: Findings,
        account: Account,
        uncounted: RecordedSeqs | None,
        gone: RecordedSeqs | None,
    ) -> None:
        self.events = 0
        self.erased_events = 0
        self.last_at = 0
        self.unread: set[str] = set()
        """Tenants with events whose spends from quotas with a scope, if they have any, cannot be read."""
        self._log_id = log_id
        self._sidecar = log_id.rpartition(":")[0]
        self._belongs_to = belonging(log_id)
        self._reader = reader
        self._findings = findings
        self._account = account
        self._uncounted = uncounted
        self._gone = gone

    def check(self, shard: int, block: int, rows: Sequence[Row]) -> list[bytes]:
        """The leaves of ``rows``, which are of one block, as they are."""
        reader = self._reader
        ciphers = reader.ciphers({row[0] for row in rows})
        owners, log_id, belongs_to = reader.owners, self._log_id, self._belongs_to
        sha256 = hashlib.sha256
        leaves: list[bytes] = []
        counted: list[PublicEvent] = []
        last_at = self.last_at
        for row, read in zip(rows, _read_together(rows), strict=True):
            subject, seq, at, tenant, subject_type, *_, total, public, commitment, personal = row
            fields = read
            try:
                leaf = b""
                leaf = sha256(b"\0" + public + commitment).digest()
                if at > last_at:
                    last_at = at
                if not fields:
                    fields = fields_of(public)
                if row[:UNITS_AT] != tuple(fields[1:UNITS]):
                    _compare(row, fields)
                if total != sum(fields[UNITS].values()):
                    raise Damaged("column units_total is not what the public part says")
                if owners.get(subject) != (tenant, subject_type):
                    raise Damaged("its subject is missing, or is somebody else's")
                cipher = ciphers[subject]
                if cipher is not None:
                    plain = opened(belongs_to, public, commitment, personal, cipher)
                    if plain[0] >= SCOPED_FROM:
                        fields[SPENDS] = [*fields[SPENDS], *scoped_spends(plain)]
                else:
                    self._check_closed(subject, personal, tenant)
            except (Damaged, TypeError) as error:  # of another type: SQLite's columns take anything
                kind = "reordered" if isinstance(error, _Misplaced) else "altered"
                self._findings.add(Finding(shard, block, log_id, seq, kind, str(error)))
                self.unread.add(tenant)
                if not fields:
                    leaves.append(leaf)
                    continue  # what it counts for cannot be told
            leaves.append(leaf)
            counted.append(named(fields))
        self.events += len(rows)
        self.last_at = last_at
        if self._uncounted is not None or self._gone is not None:
            counted = self._not_departed(shard, block, counted)
        try:
            self._account.add(self._sidecar, counted)
        except (TypeError, ValueError, AttributeError):
            pass  # a public part that was altered in a way that its columns do not show: its block says so
        return leaves

    def _check_closed(self, subject: int, personal: bytes | None, tenant: str) -> None:
        """
        Raises:
            Damaged: the personal part is not as it should be when nobody can open it.
        """
        if subject in self._reader.erased:
            self.erased_events += 1
            self.unread.add(tenant)
            if personal is not None:
                raise Damaged("it has a personal part, and its subject was erased")
        elif personal is None:
            raise Damaged("the personal part is missing, and its subject was not erased")
        elif self._reader.has_key:
            raise Damaged("the key of its subject is missing or was altered")

    def _not_departed(self, shard: int, block: int, counted: list[PublicEvent]) -> list[PublicEvent]:
        kept: list[PublicEvent] = []
        for event in counted:
            if self._gone is not None and not self._gone.missing(event.seq, event.seq):
                what = "the event was dropped with its month, and is here"
                self._findings.add(Finding(shard, block, self._log_id, event.seq, "inserted", what))
            if self._uncounted is None or self._uncounted.missing(event.seq, event.seq):
                kept.append(event)
        return kept


def _read_together(rows: Sequence[Row]) -> Sequence[list[Any]]:
    """The public fields of each row; empty when one cannot be read, which then must be found out."""
    try:
        return all_fields_of([row[PUBLIC_AT] for row in rows])
    except (Damaged, TypeError):
        return [[] for _ in rows]


class _Misplaced(Damaged):
    """An event stands in the place of another."""


def _compare(row: Row, fields: list[Any]) -> None:
    """
    Raises:
        Damaged: a column does not repeat what the public part says.
    """
    said = [storable(one) if type(one) is str else one for one in fields[1:UNITS]]
    for name, column, field in zip(COLUMNS, row, said, strict=False):
        if column != field:
            if name == "seq":
                raise _Misplaced(f"the event numbered {field} stands in its place")
            raise Damaged(f"column {name} is not what the public part says")
