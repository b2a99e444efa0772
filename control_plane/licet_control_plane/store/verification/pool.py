"""Checks pieces in processes of their own, so that whoever else works in this one is not held up."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Final

from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store.database import read_only_engine
from licet_control_plane.store.verification.pieces import Found, Task, check
from licet_control_plane.store.verification.plan import Piece, Plan

_here: dict[str, Any] = {}
"""Of a process of the pool: its engine, its ledger key, and the task."""
GARBAGE_AFTER: Final = 200_000
"""Objects that are made before garbage is looked for: rows are many, short-lived, and in no cycles."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Garbage is looked for rarely meanwhile: it is a sixth of the time otherwise, and finds nothing."""
    before = gc.get_threshold()
    gc.set_threshold(GARBAGE_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def found_in_processes(url: str, secret: bytes | None, plan: Plan, task: Task, processes: int) -> Iterator[Found]:
    """What each piece came to, as they are done."""
    # Spawned: a fork would share the threads' locks, and SQLite's connections, with this process.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(url, secret, task))
    try:
        waiting = iter(plan.pieces)
        running: set[Future[Found]] = set()
        while True:
            # A few ahead, so that whoever stops listening ends the work soon.
            while len(running) < 2 * processes and (piece := next(waiting, None)) is not None:
                running.add(pool.submit(_check, piece))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(url: str, secret: bytes | None, task: Task) -> None:
    gc.set_threshold(GARBAGE_AFTER)
    _here["engine"] = read_only_engine(url)
    _here["key"] = LedgerKey(secret) if secret else None
    _here["task"] = task


def _check(piece: Piece) -> Found:
    return check(_here["engine"], piece, _here["task"], _here["key"])
