"""Whoever can write the database cannot change the ledger unseen: every column of every table, and attacks in several
steps, over both databases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from sqlalchemy import Connection, LargeBinary, String, Table, delete, insert, select, update

from licet.wire.signing import SigningKey, Statement, Verifier
from licet.wire.usage import LostRange
from licet_control_plane.core.chain import Block, Drop, drops_of
from licet_control_plane.store import dead_letters, ledger, sinks
from licet_control_plane.store.dead_letters import Letter
from licet_control_plane.store.exports import KIND, digest_of
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.retention import MonthRefused
from licet_control_plane.store.schema import (
    blocks,
    checkpoints,
    conflicts,
    events,
    exports,
    gaps,
    logs,
    metadata,
    ranges,
    register_spend,
    remnants,
    rollups,
    shards,
    subjects,
)
from licet_control_plane.store.sinks import Place
from licet_control_plane.store.verification import Finding
from tests.support.ledger_book import KEY, LATER_US, Book
from tests.support.usage import batch

MAY, JUNE = Month(2026, 5), Month(2026, 6)
OTHER: Final = "b" * 32
A_LOG: Final = "a" * 32 + ":2"

FOUND_AS: Final = {
    "ledger_shards": {"head", "removed"},
    "ledger_logs": {"log", "inserted"},
    "ledger_ranges": {"log"},
    "ledger_gaps": {"gap", "log"},
    "ledger_subjects": {"subject", "altered", "conflict"},
    "ledger_events": {"altered", "removed", "inserted", "reordered"},
    "ledger_blocks": {"block", "removed", "head"},
    "ledger_checkpoints": {"checkpoint"},
    "ledger_exports": {"export"},
    "ledger_remnants": {"altered", "block"},
    "ledger_conflicts": {"conflict"},
    "ledger_rollups": {"sum"},
    "ledger_rollup_days": {"sum"},
    "ledger_exposures": {"sum"},
    "ledger_billed": {"sum"},
    "register_spend": {"sum"},
}
"""Kinds of findings that name an alteration of a table's rows."""

NOT_COVERED: Final = {
    ("ledger_shards", "batches"): "a count of what came, for reports: no promise rests on it",
    ("ledger_subjects", "number"): "found where an event or an erasure names it",
    ("ledger_subjects", "created_at"): "for reports: no promise rests on it",
    ("ledger_checkpoints", "older"): "the newest says all that an older one said",
    ("ledger_exports", "id"): "an order of rows",
    ("ledger_exports", "at"): "when its arrival was confirmed: in the audit trail",
    ("ledger_exports", "by"): "who confirmed it: in the audit trail",
    ("ledger_conflicts", "digest"): "tells repeats of a conflict from another one",
    ("ledger_conflicts", "at"): "for reports: no promise rests on it",
    ("ledger_dead_letters", ""): "not recorded yet, or never; each body has its digest beside it",
    ("event_sinks", ""): "how far somebody else is who is told of events",
}
"""Columns that the README says are not covered; "" stands for all of a table."""


@pytest.fixture
def book(database_url: str) -> Iterator[Book]:
    made = Book(database_url)
    yield made
    made.database.close()


def spends(month: Month) -> list[tuple[str, int]]:
    return [
        (f"reports:month:{month.start_us // 1_000_000}", 1),
        (f"reports:user@00ff:{month.start_us // 1_000_000}", 1),
    ]


def fill(book: Book) -> None:
    """Something in every table: a month that is gone, with a block that it shares; losses, and some that came after
    all; what is recorded out of order; an erasure; a conflict; flags; a dead letter."""
    may: dict[str, Any] = {"at_us": MAY.end_us - 1_000, "spends": spends(MAY)}
    june: dict[str, Any] = {"at_us": JUNE.start_us + 1_000, "spends": spends(JUNE), "exposures": {"new": "on"}}
    book.record(batch(1, 5, **may), batch(6, 9, **june), batch(10, 11, subject_id="bob", **june))
    book.record(batch(1, 4, sidecar=OTHER, tenant="globex", **june))
    book.record(batch(1, 3, incarnation=2, previous=(1, 11), **june), shard=1)
    lost = (LostRange(4, 9, "damaged"), LostRange(20, 21, "damaged"))
    book.record(batch(10, 12, incarnation=2, previous=(1, 11), lost=lost, **june), shard=1)
    book.record(batch(6, 7, incarnation=2, previous=(1, 11), **june), shard=1)
    book.erase("bob")
    book.export(MAY)
    assert book.drop(MAY) == 5
    book.checkpoint()


@pytest.fixture
def full(book: Book) -> Book:
    fill(book)
    found = book.verified()
    assert (found.findings, found.dropped, found.rollups_match) == ([], {"2026-05": 5}, True)
    assert [(gap.from_seq, gap.to_seq) for gap in found.lost] == [(4, 5), (8, 9), (20, 21)]
    return book


def findings(book: Book) -> list[Finding]:
    return book.verified().findings


def run(book: Book, *statements: Any) -> None:
    def work(connection: Connection) -> None:
        for statement in statements:
            connection.execute(statement)

    book.database.write_now(work)


def rows(book: Book, table: Table) -> list[Any]:
    return book.database.read_now(
        lambda connection: list(connection.execute(select(table).order_by(*table.primary_key)))
    )


def changed(table: Table, column: str, old: Any) -> Any:
    """Another value of the same type."""
    kind = table.c[column].type
    if isinstance(kind, LargeBinary):
        return bytes([old[0] ^ 1]) + old[1:] if old else b"\1"
    if isinstance(kind, String):  # Text too
        return (old[:-1] + chr(ord(old[-1]) ^ 1)) if old else "x"
    return (old or 0) + 1_000


def at(table: Table, row: Any, **changes: Any) -> Any:
    """The condition that names a row, once it was changed."""
    condition: Any = None
    for column in table.primary_key:
        one = column == changes.get(column.name, getattr(row, column.name))
        condition = one if condition is None else condition & one
    return condition


def columns_of(table: Table) -> list[str]:
    return [column.name for column in table.columns]


LEDGER_TABLES: Final = sorted(
    name for name in metadata.tables if name.startswith("ledger_") or name in ("register_spend", "event_sinks")
)


def test_every_table_of_the_ledger_is_covered_or_said_not_to_be() -> None:
    assert {*FOUND_AS, *(table for table, column in NOT_COVERED if not column)} == set(LEDGER_TABLES)


@pytest.mark.parametrize("part", range(4))
def test_a_change_of_any_column_of_any_table_is_named(full: Book, part: int) -> None:
    full.record(batch(1, 1, resource_id="another", sidecar=OTHER, tenant="globex", at_us=JUNE.start_us + 1_000))
    assert [one.kind for one in findings(full)] == []
    missed, over = [], []
    for name, kinds in list(FOUND_AS.items())[part::4]:
        table = metadata.tables[name]
        there = rows(full, table)
        assert there, name
        for column in columns_of(table):
            row = next((one for one in reversed(there) if getattr(one, column) is not None), there[-1])
            old = getattr(row, column)
            new = changed(table, column, bytes(old) if isinstance(old, memoryview) else old)
            run(full, update(table).where(at(table, row)).values({column: new}))
            found = {one.kind for one in findings(full)}
            run(full, update(table).where(at(table, row, **{column: new})).values({column: old}))
            if (name, column) in NOT_COVERED:
                over += [(name, column, found)] if found and column != "number" else []
            elif not found & kinds:
                missed.append((name, column, row, found))
    assert missed == []
    assert over == [], "covered after all: take it from the list, and from the README"
    assert findings(full) == []


@pytest.mark.parametrize("table", [gaps, ranges, exports, remnants, register_spend, rollups, logs, shards, subjects])
def test_a_row_that_is_removed_is_missed(full: Book, table: Table) -> None:
    row = rows(full, table)[0 if table is shards else -1]  # the last shard has nothing yet
    run(full, delete(table).where(at(table, row)))
    assert findings(full)


@pytest.mark.parametrize(
    "values",
    [
        (gaps, {"first_seq": 500, "last_seq": 501, "reason": "damaged", "at": 7}),
        (ranges, {"first_seq": 500, "last_seq": 501}),
    ],
)
def test_a_row_that_is_made_up_is_named(full: Book, values: tuple[Table, dict[str, Any]]) -> None:
    table, columns = values
    run(full, insert(table).values(log=1, **columns))
    assert {"gap", "log"} & {one.kind for one in findings(full)}


def test_spend_that_is_made_up_is_named(full: Book) -> None:
    quota = f"reports:month:{JUNE.start_us // 1_000_000}"
    row = {
        "tenant": "nobody",
        "quota": quota,
        "sidecar": OTHER,
        "window_start": JUNE.start_us // 1_000_000,
        "units": 1,
        "observed": 0,
    }
    run(full, insert(register_spend).values(row))
    assert [one.what.split(":")[0] for one in findings(full)] == ["register_spend nobody, reports"]


# --- months that are made to disappear --------------------------------------------------------------------------------


def remove(book: Book, month: Month) -> None:
    run(book, delete(events).where(events.c.at >= month.start_us, events.c.at < month.end_us))


def forged(book: Book, *, key: SigningKey, month: Month = JUNE, deployment: str = "d" * 32) -> dict[str, Any]:
    """A row of an export that nobody made, with everything that the database can give."""
    found: dict[str, list[list[int]]] = {}
    count = 0
    for row in book.rows("SELECT log_id, seq, at FROM ledger_events JOIN ledger_logs USING (log)"):
        if month.start_us <= row.at < month.end_us:
            found.setdefault(row.log_id, []).append([row.seq, row.seq])
            count += 1
    payload = {"sha256": "0" * 64, "ranges": found, "blocks": []}
    document = key.sign(Statement(deployment, KIND, str(month), 1, count, payload))
    return {
        "month": str(month),
        "events": count,
        "sha256": "0" * 64,
        "document": document,
        "at": 1,
        "by": "admin",
        "begun_at": 7,
        "dropped": count,
        "dropped_at": 8,
    }


def test_an_export_that_another_key_signed_lets_nothing_disappear(full: Book) -> None:
    run(full, insert(exports).values(forged(full, key=SigningKey.generate())))
    remove(full, JUNE)
    kinds = [one.kind for one in findings(full)]
    assert kinds.count("removed") == 18
    assert "export" in kinds


def test_an_export_of_another_deployment_lets_nothing_disappear(full: Book) -> None:
    run(full, insert(exports).values(forged(full, key=KEY, deployment="e" * 32)))
    remove(full, JUNE)
    assert [one.kind for one in findings(full)].count("removed") == 18


def test_an_honest_export_that_nobody_ordered_to_drop_is_told_from_one_that_was(full: Book) -> None:
    made = full.export(JUNE)
    remove(full, JUNE)
    gone = {"begun_at": 7, "dropped": made.events, "dropped_at": 8}
    run(full, update(exports).where(exports.c.month == "2026-06").values(gone))
    whats = [one.what for one in findings(full) if one.kind == "export"]
    assert whats == [
        "the export of 2026-06 (number 2) began to be dropped: no block says so",
        "the export of 2026-06 (number 2) is gone: no block says so",
    ]


def test_nothing_else_goes_with_a_month_that_is_dropped(full: Book) -> None:
    run(full, delete(events).where(events.c.seq == 9, events.c.at >= JUNE.start_us))
    assert [one.seq for one in findings(full) if one.kind == "removed"] == [9]


def test_a_block_that_lost_a_part_still_proves_the_rest(full: Book) -> None:
    """Without the ledger key nothing but the root tells that an event was replaced as a whole."""
    (row,) = full.rows("SELECT public, commitment FROM ledger_events WHERE seq = 7 AND tenant = 'acme' AND log = 1")
    other = bytes(row.commitment[:-1]) + bytes([row.commitment[-1] ^ 1])
    run(full, update(events).where(events.c.log == 1, events.c.seq == 7).values(commitment=other))
    found = full.verified(key=None).findings
    assert [(one.kind, one.shard, one.block) for one in found] == [("altered", 0, 1)]


def test_an_event_that_was_dropped_cannot_be_put_back_altered(full: Book) -> None:
    (row,) = [one for one in rows(full, events) if (one.log, one.seq) == (1, 6)]
    put = row._asdict() | {"seq": 3, "at": MAY.end_us - 1_000}
    run(full, insert(events).values(put))
    assert {"reordered", "export"} <= {one.kind for one in findings(full)}


def test_sums_of_a_month_that_is_gone_are_what_they_were(full: Book) -> None:
    may = rollups.c.hour < JUNE.start_us // 1_000_000
    run(full, update(rollups).where(may).values(units=rollups.c.units + 1))
    assert [one.what for one in findings(full)] == [
        "the sums of 2026-05, less the events of it that are here, are not what they were when it was dropped"
    ]


def test_a_late_event_of_a_month_that_is_gone_leaves_its_sums_provable(full: Book) -> None:
    full.record(batch(12, 13, at_us=MAY.start_us, spends=spends(MAY)))
    assert findings(full) == []
    full.export(MAY)
    assert full.drop(MAY) == 2
    found = full.verified()
    assert (found.findings, found.dropped) == ([], {"2026-05": 7})
    run(full, update(rollups).where(rollups.c.hour < JUNE.start_us // 1_000_000).values(units=rollups.c.units + 1))
    assert [one.kind for one in findings(full)] == ["sum"]


def test_two_months_that_share_a_block_go_one_after_the_other(full: Book) -> None:
    assert rows(full, remnants)
    full.export(JUNE)
    full.drop(JUNE)
    found = full.verified()
    assert (found.findings, found.events, found.dropped) == ([], 0, {"2026-05": 5, "2026-06": 18})
    assert rows(full, remnants) == [], "blocks that are gone whole need nothing"


def test_a_month_goes_under_a_new_key_and_both_are_needed_to_verify(full: Book) -> None:
    full.key = SigningKey.generate()
    full.export(JUNE)
    full.drop(JUNE)
    both = Verifier([KEY.public_key, full.key.public_key])
    assert full.verified(verifier=both).findings == []
    kinds = [one.kind for one in full.verified(verifier=Verifier([full.key.public_key])).findings]
    assert kinds.count("removed") == 5


def test_a_drop_of_a_forged_export_is_refused(full: Book) -> None:
    row = forged(full, key=SigningKey.generate()) | {"begun_at": None, "dropped": 0, "dropped_at": None}
    run(full, insert(exports).values(row))
    with pytest.raises(MonthRefused, match="counts no more"):
        full.drop(JUNE)
    assert findings(full)[0].kind == "export"


def test_a_month_that_lacks_an_event_is_not_dropped(full: Book) -> None:
    full.export(JUNE)
    run(full, delete(events).where(events.c.log == 1, events.c.seq == 8))
    with pytest.raises(MonthRefused, match="lacks 1 events of its export"):
        full.drop(JUNE)


def test_without_a_public_key_what_was_dropped_counts_as_removed(full: Book) -> None:
    kinds = [one.kind for one in full.verified(verifier=None).findings]
    assert (kinds.count("removed"), "export" in kinds) == (5, True)


def test_a_drop_that_the_chain_says_and_the_row_does_not_is_named(full: Book) -> None:
    digest = digest_of(bytes(rows(full, exports)[0].document))
    run(full, update(exports).values(dropped_at=None, dropped=5))
    whats = [one.what for one in findings(full)]
    assert whats == ["the export of 2026-05 (number 1) is gone: its row does not say so, or another time"]
    assert Drop("2026-05", digest, b"", True) in drops_of(Block._make(rows(full, blocks)[4]))


# --- losses -----------------------------------------------------------------------------------------------------------


def test_what_came_after_it_was_declared_lost_cannot_be_lost_again(full: Book) -> None:
    """An event is removed, and a gap put in its place."""
    (log,) = [row.log for row in rows(full, logs) if row.log_id == A_LOG]
    run(
        full,
        delete(events).where(events.c.log == log, events.c.seq == 6),
        insert(gaps).values(log=log, first_seq=6, last_seq=6, reason="damaged", at=7),
    )
    found = findings(full)
    assert ("removed", 6) in [(one.kind, one.seq) for one in found]
    assert ("gap", 6) in [(one.kind, one.seq) for one in found]


def test_a_loss_that_nobody_wants_to_know_of_is_named(full: Book) -> None:
    run(full, delete(gaps).where(gaps.c.first_seq == 8))
    assert [(one.kind, one.log_id, one.seq) for one in findings(full)] == [("gap", A_LOG, 8)]


def test_declarations_alone_make_a_block_and_repeats_of_them_none(book: Book) -> None:
    for _ in range(2):
        book.record(batch(1, 0, lost=(LostRange(1, 3, "damaged"),)))
    assert [(row.number, row.events) for row in rows(book, blocks)] == [(1, 0)]
    found = book.verified()
    assert (found.findings, [(gap.from_seq, gap.to_seq, gap.why) for gap in found.lost]) == ([], [(1, 3, "damaged")])


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_what_an_erased_subject_spent_counts_and_less_than_the_others_is_found(full: Book) -> None:
    mine = (register_spend.c.tenant == "acme") & (register_spend.c.window_start == JUNE.start_us // 1_000_000)
    scoped = mine & register_spend.c.quota.contains("@") & (register_spend.c.units > 1)
    run(full, update(register_spend).where(scoped).values(units=register_spend.c.units + 1))
    assert findings(full) == [], "nobody can tell any more what the erased one spent there"
    run(full, update(register_spend).where(scoped).values(units=1))
    assert {one.kind for one in findings(full)} == {"sum"}


def test_a_prefix_of_decisions_that_was_swapped_between_logs_is_named(full: Book) -> None:
    run(full, update(logs).where(logs.c.log_id == A_LOG).values(decision_prefix=b"prefix99"))
    (found,) = findings(full)
    assert (found.log_id, found.what) == (A_LOG, "its decision_prefix is not what the block says that names it first")


def test_a_conflict_that_was_altered_is_named(full: Book) -> None:
    full.record(batch(1, 1, resource_id="another", sidecar=OTHER, tenant="globex", at_us=JUNE.start_us + 1_000))
    assert full.verified().conflicts == 1
    run(full, update(conflicts).values(commitment=bytes(32)))
    assert [one.kind for one in findings(full)] == ["conflict"]


def test_what_is_not_covered_is_not_taken_for_tampering(full: Book) -> None:
    full.database.write_now(
        dead_letters.keep, 0, [Letter("1-0", b"body", "cannot be read", A_LOG, 30, 31)], now_us=LATER_US
    )
    full.database.write_now(sinks.move, "events", 0, Place(1, 2), now_us=LATER_US)
    for name in ("ledger_dead_letters", "event_sinks"):
        table = metadata.tables[name]
        (row,) = rows(full, table)
        for column in columns_of(table):
            old = getattr(row, column)
            run(full, update(table).where(at(table, row)).values({column: changed(table, column, old)}))
            run(full, delete(table), insert(table).values(row._asdict()))
    run(full, delete(checkpoints).where(checkpoints.c.number < 0))
    assert findings(full) == []
    assert full.database.read_now(ledger.spend_of, ["acme"], window_start_min=0)
