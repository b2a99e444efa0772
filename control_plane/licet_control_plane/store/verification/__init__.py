"""Recounts the ledger from its rows: every hash, every column, every gap, and the sums.

``verify`` reads what the heads of the chains cover at its start; what is recorded meanwhile is left to the next time.
Blocks are checked in pieces by several processes. Changes nothing. What is checked, and what is not, of every table:
``README.md`` of the store.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Final

from licet.wire.signing import Verifier
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.checkpoints import Checkpoint
from licet_control_plane.store.database import read_only_engine
from licet_control_plane.store.verification.books import Books
from licet_control_plane.store.verification.pieces import Task, check
from licet_control_plane.store.verification.plan import Plan
from licet_control_plane.store.verification.pool import found_in_processes, rare_collections
from licet_control_plane.store.verification.report import Finding, Gap, LogFacts, Progress, Verification

__all__ = ["Finding", "Gap", "LogFacts", "Progress", "Verification", "verify"]

PROCESSES_MAX: Final = 8
INLINE_EVENTS_MAX: Final = 20_000
"""A ledger this small is read sooner than a process is started."""


def verify(
    url: str,
    ledger_key: LedgerKey | None,
    verifier: Verifier | None,
    *,
    given: Sequence[Checkpoint] = (),
    processes: int = 0,
) -> Generator[Progress | Verification, None, None]:
    """Check the ledger in the database at ``url``; yields progress, and the verification last.

    ``ledger_key`` ``None``: personal parts are not opened, and an alteration of them is not found. ``verifier`` checks
    the newest checkpoint in the database, and the exports of months that were dropped: without it what they say does
    not count. ``given`` checkpoints are checked too, their signatures by the caller. ``processes`` 0: as many as there
    are processors, at most ``PROCESSES_MAX``.

    Raises:
        OperationalError and others of SQLAlchemy: the database cannot be read.
    """
    engine = read_only_engine(url)
    try:
        with engine.connect() as connection, connection.begin():
            plan = Plan.read(connection, ledger_key, verifier)
        books = Books(plan)
        task = Task(plan.deployment, plan.departures.going, plan.departures.gone)
        yield Progress(0, plan.events)
        processes = processes or min(os.cpu_count() or 1, PROCESSES_MAX)
        if plan.events <= INLINE_EVENTS_MAX or processes == 1:
            for piece in plan.pieces:
                with rare_collections():
                    found = check(engine, piece, task, ledger_key)
                books.add(found)
                yield Progress(books.events, plan.events)
        else:
            secret = ledger_key.secret if ledger_key else None
            for found in found_in_processes(url, secret, plan, task, processes):
                books.add(found)
                yield Progress(books.events, plan.events)
        with engine.connect() as connection, connection.begin():
            yield books.closed(connection, ledger_key, verifier, given)
    finally:
        engine.dispose()
