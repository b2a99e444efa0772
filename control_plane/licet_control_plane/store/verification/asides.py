"""What was kept aside: conflicts are in no block, but sealed as events are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection, select

from licet_control_plane.core.accounting import storable
from licet_control_plane.core.sealed_events import Damaged, belonging, fields_of, opened
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.schema import conflicts
from licet_control_plane.store.subjects import EventReader
from licet_control_plane.store.verification.report import Finding

CONFLICTS_MAX: Final = 10_000
"""Rows that are looked at. One is already too many; whoever sent a million must not make verifying take a million."""


def check_conflicts(connection: Connection, ledger_key: LedgerKey | None) -> Iterator[Finding]:
    """Conflicts whose row does not fit what was sealed."""
    reader = EventReader(connection, ledger_key)
    query = select(conflicts).order_by(conflicts.c.log, conflicts.c.seq, conflicts.c.digest).limit(CONFLICTS_MAX)
    for row in connection.execute(query).all():
        log_id = reader.log_id(row.log)
        try:
            subject, seq, _, tenant, type = fields_of(bytes(row.public))[1:6]
            if (subject, seq) != (row.subject, row.seq):
                raise Damaged("it is of another subject or number than its public part")
            cipher = reader.ciphers([subject])[subject]
            if reader.owners.get(subject) != (tenant, storable(type)):
                raise Damaged("its subject is missing, or is somebody else's")
            if cipher is not None:
                opened(belonging(log_id), bytes(row.public), bytes(row.commitment), row.personal, cipher)
        except (Damaged, TypeError) as error:
            yield Finding(None, 0, log_id, row.seq, "conflict", f"a conflict kept aside was altered: {error}")
