"""What it costs to record an event in the ledger on SQLite, and to verify it: CPU time of one process; and how many a
second all processors together verify of a larger one.

Recording is what one drain worker does with a batch once it has it: unpack, seal, insert, sum up, append the block.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.measure import Cost, cpu_cost
from licet.wire.usage import UsageBatch
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import ledger, meta
from licet_control_plane.store.database import Database
from licet_control_plane.store.subjects import SubjectKeys
from licet_control_plane.store.verification import Verification, verify
from tests.support.usage import event, packed

BATCH_EVENTS: Final = 500
BATCHES: Final = 16
ROUNDS: Final = 12
ROUNDS_LARGE: Final = 60
SUBJECTS: Final = 10_000
TENANTS: Final = 100


@dataclass(frozen=True, slots=True)
class Proof:
    """CPU microseconds an event. ``verify_quick``: personal parts left closed. ``verified_per_s``: events a second, by
    the clock, of ``verified_events``, starting the processes included.
    """

    record: Cost
    record_new_subjects: Cost
    verify: float
    verify_quick: float
    events: int
    bytes_an_event: float
    verified_per_s: float
    verified_events: int


def run() -> Proof:
    """Fill a ledger twice: with events of some subjects, and with events each of another; verify the first."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger.db"
        key = LedgerKey(secrets.token_bytes(32))
        record = _record(path, key, SUBJECTS)
        new = _record(Path(directory) / "new.db", key, 2**40)
        costs = []
        for opened in (key, None):
            started = time.process_time_ns()
            counted = _verified(path, opened, processes=1)
            costs.append((time.process_time_ns() - started) / 1_000 / counted)
        large = Path(directory) / "large.db"
        _record(large, key, SUBJECTS, rounds=ROUNDS_LARGE)
        began = time.perf_counter()
        verified = _verified(large, key, processes=0)
        return Proof(
            record,
            new,
            costs[0],
            costs[1],
            counted,
            path.stat().st_size / counted,
            verified / (time.perf_counter() - began),
            verified,
        )


def _verified(path: Path, key: LedgerKey | None, *, processes: int) -> int:
    *_, last = verify(f"sqlite:///{path}", key, None, processes=processes)
    assert isinstance(last, Verification)
    assert last.ok
    return last.events


def _record(path: Path, key: LedgerKey, subjects: int, *, rounds: int = ROUNDS) -> Cost:
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.write_now(meta.ensure, deployment="d" * 32, now_us=1)
    keys = SubjectKeys(key)
    batches = list(_rounds(subjects, rounds))

    def one(number: int) -> None:
        decoded = [DecodedBatch.of(data) for data in batches[number]]
        database.write_now(ledger.record, 0, decoded, keys=keys, now_us=number)

    cost = cpu_cost(one, per_round=1, rounds=rounds, units=BATCHES * BATCH_EVENTS)
    database.close()
    return cost


def _rounds(subjects: int, rounds: int) -> Iterator[list[bytes]]:
    """Batches of four sidecars, as they come out of the stream."""
    first = dict.fromkeys((f"{number:032x}" for number in range(4)), 1)
    person = 0
    for _ in range(rounds):
        batches = []
        for sidecar in list(first) * (BATCHES // len(first)):
            start = first[sidecar]
            first[sidecar] += BATCH_EVENTS
            events = []
            for seq in range(start, start + BATCH_EVENTS):
                person = (person + 7_919) % subjects
                events.append(packed(event(seq, tenant=f"t{person % TENANTS}", subject_id=f"user-{person}")))
            last = start + BATCH_EVENTS - 1
            batches.append(UsageBatch(sidecar, 1, 0, 0, b"prefix00", start, last, tuple(events)).pack())
        yield batches
