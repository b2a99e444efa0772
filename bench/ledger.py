"""How fast the ledger answers when it is large: a year of events, put in by the ledger transaction itself.

The events are made here, not drained from Redis; from the transaction on everything is what a server does. One tenant
has a fifth of all events, in every hour of the year, so that its year is as large as a year gets.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, event, text

from licet.domain.catalog import Action, Attribute, AttributeType, Catalog, Entitlement, Feature, License, Plan
from licet.domain.money import NANOS, Fee, Price, Step, TierMode, Tiers
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Period, Window, window_at
from licet.wire.signing import SigningKey
from licet.wire.usage import EventKind, UsageBatch, UsageEvent, pack_event
from licet_control_plane.changes import Changes
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import billing, event_reports, ledger, meta, usage_reports
from licet_control_plane.store.database import Database
from licet_control_plane.store.event_reports import EventFilter
from licet_control_plane.store.subjects import SubjectKeys
from licet_control_plane.store.usage_reports import Interval, Order

EVENTS: Final = 10_000_000
EVENTS_SMALL: Final = 100_000
TENANTS: Final = 40
LOGS: Final = 8
YEAR: Final = window_at(Period.YEAR, 1_767_225_600)  # 2026
OCTOBER: Final = window_at(Period.MONTH, 1_790_812_800)
BATCH_EVENTS: Final = 100_000
"""In one transaction, as many as a drain worker takes at most."""
ROUNDS: Final = 7
BUSY: Final = "tenant-0"
_US: Final = 1_000_000

_LEDGER_KEY: Final = LedgerKey(bytes(32))
_CATALOG: Final = Catalog.of(
    [
        Feature("llm.tokens", "token"),
        Feature("reports", "report"),
        Action("llm.generate", {"": "llm.tokens"}, {"model": Attribute(AttributeType.STRING)}),
        Action("report.export", {"": "reports"}),
        Action("report.share", {"": "reports"}),
        Plan(
            "pro",
            {
                "llm.tokens": Entitlement(
                    Price(
                        8 * NANOS,
                        1_000_000,
                        "USD",
                        "context.model",
                        {"small": NANOS},
                        Tiers(
                            TierMode.GRADUATED,
                            (Step(10**9, 8 * NANOS, 0, {"small": NANOS}), Step(0, 6 * NANOS, 0, {"small": NANOS})),
                        ),
                    ),
                    included=1_000_000,
                ),
                "reports": Entitlement(Price(NANOS // 10, 1, "USD")),
            },
            fee=Fee(49 * NANOS, "USD"),
        ),
    ]
)


@dataclass(frozen=True, slots=True)
class Answered:
    """Milliseconds of wall time of one question, and how many rows its answer has."""

    first_ms: float
    best_ms: float
    median_ms: float
    rows: int


@dataclass(slots=True)
class Results:
    """What was built, and how fast it answers. Sizes in bytes; ``plans`` as SQLite explains them."""

    events: int = 0
    build_s: float = 0
    events_per_s: float = 0
    file_bytes: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    busy_rows: dict[str, int] = field(default_factory=dict)
    answers: dict[str, Answered] = field(default_factory=dict)
    plans: dict[str, list[str]] = field(default_factory=dict)


def run(events: int, *, directory: Path | None = None) -> Results:
    """Builds a ledger of ``events`` events in a temporary directory, asks it, and removes it."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="licet-bench-") as temporary:
        database = Database(f"sqlite:///{Path(temporary) / 'licet.db'}")
        try:
            database.migrate()
            database.write_now(meta.ensure, deployment="bench", now_us=YEAR.start * _US)
            revision = asyncio.run(_publish(database))
            results = _built(database, events, revision)
            results.file_bytes = sum(path.stat().st_size for path in Path(temporary).iterdir())
            _ask(database, results)
        finally:
            database.close()
    return results


async def _publish(database: Database) -> int:
    changes = Changes(database, SigningKey.generate(), wake=asyncio.Event(), now_s=lambda: float(YEAR.start))
    await changes.push(_CATALOG, [], by="bench")
    return (await changes.create_license(License(BUSY, "pro"), by="bench")).revision


def _built(database: Database, events: int, revision: int) -> Results:
    started = time.perf_counter()
    recording_s = 0.0
    made = _events(events, revision)
    seqs = [0] * LOGS
    keys = SubjectKeys(_LEDGER_KEY)
    for number in itertools.count():
        chunk = list(itertools.islice(made, BATCH_EVENTS))
        if not chunk:
            break
        log = number % LOGS
        numbered = [one._replace(seq=seq) for seq, one in enumerate(chunk, seqs[log] + 1)]
        seqs[log] += len(chunk)
        packed = tuple(map(pack_event, numbered))
        first = numbered[0].seq
        batch = UsageBatch(f"sidecar-{log}", 1, 0, 0, bytes(8), first, first + len(packed) - 1, packed)
        begun = time.perf_counter()
        database.write_now(
            ledger.record, log % 4, [DecodedBatch(batch, numbered)], keys=keys, now_us=numbered[-1].at_us
        )
        recording_s += time.perf_counter() - begun
        _progress((number + 1) * BATCH_EVENTS, events)
    return Results(events=events, build_s=time.perf_counter() - started, events_per_s=events / recording_s)


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r  {min(done, of):,} of {of:,} events", end="" if done < of else "\n", file=sys.stderr, flush=True)


def _events(count: int, revision: int) -> Iterator[UsageEvent]:
    """Spread over the year in order of time, as drains see them; the same ones each time."""
    rng = random.Random(7)
    choose = rng.random
    step_us = (YEAR.end - YEAR.start) * _US // count
    kinds = (
        ("llm.generate", "llm.tokens", Effect.APPROVED, Reason.OK),
        ("llm.generate", "llm.tokens", Effect.DENIED, Reason.QUOTA_EXHAUSTED),
        ("report.export", "reports", Effect.APPROVED, Reason.OK),
        ("report.share", "reports", Effect.APPROVED, Reason.OK),
        ("report.share", "reports", Effect.DENIED, Reason.FEATURE_OFF),
        ("llm.generate", "llm.tokens", Effect.APPROVED, Reason.OVERAGE),
    )
    for number in range(count):
        tenant = BUSY if choose() < 0.2 else f"tenant-{1 + int((TENANTS - 1) * choose() ** 2)}"
        action, feature, effect, reason = kinds[int(6 * choose())]
        approved = effect is Effect.APPROVED
        units = 1 + int(2_000 * choose())
        yield UsageEvent(
            seq=0,
            at_us=YEAR.start * _US + number * step_us,
            tenant=tenant,
            subject_type="user",
            subject_id=f"user-{int(400 * choose())}",
            on_behalf_of="",
            action=action,
            effect=effect.value,
            reason=reason.value,
            rule="",
            revision=revision,
            units={feature: units},
            cost_nanos=units * 8_000 if approved else 0,
            currency="USD" if approved else "",
            flags=0,
            idempotency_key=f"request-{number}",
            resource_type="",
            resource_id="",
            context={"model": "small"} if feature == "llm.tokens" else {},
            spends=[(f"{feature}:month:{OCTOBER.start}", units)] if approved else [],
            shadow=[],
            kind=EventKind.CHECK,
            priced_as={feature: "small"} if approved and feature == "llm.tokens" else {},
            exposures={"sharing": "on" if approved else "off"} if action == "report.share" else {},
        )


# Asking


def _ask(database: Database, results: Results) -> None:
    tables = ("ledger_events", "ledger_rollups", "ledger_rollup_days", "ledger_exposures", "ledger_billed")
    for table in tables:
        results.rows[table] = database.read_now(_count, table, "")
    for table in tables[1:]:
        results.busy_rows[table] = database.read_now(_count, table, BUSY)
    year = Interval(YEAR.start * _US, YEAR.end * _US)
    october = Interval(OCTOBER.start * _US, OCTOBER.end * _US)
    of_busy = {"tenant": BUSY, "interval": year}
    questions: dict[str, Callable[[Connection], Any]] = {
        "a tenant's year by month, feature and effect": lambda connection: usage_reports.summary(
            connection, by=["month", "feature", "effect"], **of_busy
        )[0],
        "a tenant's year by day": lambda connection: usage_reports.summary(connection, by=["day"], **of_busy)[0],
        "a tenant's year by feature, action and reason": lambda connection: usage_reports.summary(
            connection, by=["feature", "action", "effect", "reason"], **of_busy
        )[0],
        "a tenant's year by flag and variant": lambda connection: usage_reports.summary(
            connection, by=["flag", "variant", "effect"], **of_busy
        )[0],
        "a tenant's month by hour": lambda connection: usage_reports.summary(
            connection, by=["hour"], tenant=BUSY, interval=october
        )[0],
        "a tenant's invoice of a month": lambda connection: _lines(connection, OCTOBER),
        "a tenant's denials of a month, with subjects": lambda connection: usage_reports.denied(
            connection, tenant=BUSY, interval=october
        ),
        "the ten largest tenants of a month": lambda connection: usage_reports.top(
            connection, by="tenant", order=Order.UNITS, interval=october
        ),
        "the ten largest tenants of the year": lambda connection: usage_reports.top(
            connection, by="tenant", order=Order.UNITS, interval=year
        ),
        "the newest 100 events of a tenant": lambda connection: event_reports.newest(
            connection, _LEDGER_KEY, EventFilter(tenant=BUSY), limit=100
        )[0],
        "a page of 1,000 events": lambda connection: event_reports.page(
            connection, _LEDGER_KEY, EventFilter(), event_reports.begin(connection), limit=1_000
        )[0],
    }
    for name, question in questions.items():
        results.answers[name] = _answered(database, question)
        results.plans[name] = database.read_now(_plan, question)


def _lines(connection: Connection, month: Window) -> Any:
    made = billing.invoice_of(connection, BUSY, month)
    assert made is not None
    return made.lines


def _answered(database: Database, question: Callable[[Connection], Any]) -> Answered:
    database.engine.dispose()  # so that the first round finds none of SQLite's own cache
    times: list[float] = []
    answer: Any = ()
    for _ in range(ROUNDS):
        started = time.perf_counter()
        answer = database.read_now(question)
        times.append(1_000 * (time.perf_counter() - started))
    return Answered(times[0], min(times), statistics.median(times), len(answer))


def _count(connection: Connection, table: str, tenant: str) -> int:
    where = "WHERE tenant = :tenant" if tenant else ""
    return int(connection.scalar(text(f"SELECT count(*) FROM {table} {where}"), {"tenant": tenant}) or 0)


def _plan(connection: Connection, question: Callable[[Connection], Any]) -> list[str]:
    """How SQLite reads its tables for a question."""
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", note)
    question(connection)
    event.remove(connection, "before_cursor_execute", note)
    steps: list[str] = []
    for statement, parameters in statements:
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        steps += [row[3] for row in rows if "ledger_" in row[3] or "register_" in row[3]]
    return list(dict.fromkeys(steps))
