"""The ledger's chain, on a real database: whatever is changed by SQL is found, and what is erased is gone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from licet.wire.signing import SigningKey
from licet.wire.usage import UsageBatch, UsageEvent
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.sealed_events import ERASED, UNREADABLE
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import checkpoints, ledger
from licet_control_plane.store.subjects import SubjectKeys
from licet_control_plane.store.verification import Finding, Verification, verify
from tests.support.ledger_book import LEDGER_KEY, VERIFIER, Book
from tests.support.usage import batch, event, packed

OTHER: Final = "b" * 32


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    made = Book(f"sqlite:///{tmp_path}/licet.db")
    yield made
    made.database.close()


@pytest.fixture
def full(book: Book) -> Book:
    """Two shards, two logs, several blocks, a checkpoint."""
    book.record(batch(1, 4), batch(5, 6, subject_id="bob", on_behalf_of="ada"))
    book.record(batch(1, 3, sidecar=OTHER, tenant="globex"))
    book.record(batch(7, 9, resource_id="report-7", spends=[("reports:user@00ff:1788220800", 1)]))
    book.record(batch(1, 2, sidecar="c" * 32), shard=1)
    book.checkpoint()
    assert book.verified().ok
    return book


BLOBS: Final = {
    "ledger_events": ("public", "commitment", "personal"),
    "ledger_blocks": ("ranges", "erased", "root", "previous", "hash"),
}
OTHERS: Final = {
    "ledger_events": (
        *("log", "seq", "at", "tenant", "subject", "subject_type", "action", "effect", "reason", "rule", "revision"),
        "units_total",
    ),
    "ledger_blocks": ("shard", "number", "generation", "at", "events", "first_at", "last_at"),
}
KEYS: Final = {"ledger_events": ("log", "seq"), "ledger_blocks": ("shard", "number")}


def where(table: str, row: Any) -> str:
    return " AND ".join(f"{name} = {getattr(row, name)}" for name in KEYS[table])


def found_after(book: Book, statement: str, undo: str, **values: Any) -> Verification:
    """What verifying finds after a change by SQL, which is undone."""
    assert book.sql(statement, **values) == 1
    try:
        return book.verified()
    finally:
        book.sql(undo, **values)


@pytest.mark.parametrize(("table", "condition"), [("ledger_events", "seq = 7"), ("ledger_blocks", "number = 3")])
def test_a_change_of_any_byte_of_an_event_or_a_block_is_found(full: Book, table: str, condition: str) -> None:
    (row,) = full.rows(f"SELECT * FROM {table} WHERE {condition}")
    missed = []
    for column in BLOBS[table]:
        old = bytes(getattr(row, column))
        for index in range(0, len(old), 2):  # every other one: each takes a verification
            new = old[:index] + bytes([old[index] ^ (1 << index % 8)]) + old[index + 1 :]
            found = found_after(
                full,
                f"UPDATE {table} SET {column} = :new WHERE {where(table, row)}",
                f"UPDATE {table} SET {column} = :old WHERE {where(table, row)}",
                old=old,
                new=new,
            )
            first = found.findings[0] if found.findings else None
            named = first is not None and (first.seq == 7 if table == "ledger_events" else 3 <= first.block <= 4)
            if found.ok or not named:
                missed.append((column, index, first))
    assert missed == []
    assert full.verified().ok


@pytest.mark.parametrize("table", ["ledger_events", "ledger_blocks"])
def test_a_change_of_any_column_of_any_row_is_found(full: Book, table: str) -> None:
    chance = random.Random(7)
    missed = []
    for row in full.rows(f"SELECT * FROM {table}"):
        for column in (*BLOBS[table], *OTHERS[table]):
            old = getattr(row, column)
            new: Any
            if isinstance(old, bytes):
                index = chance.randrange(len(old))
                new = old[:index] + bytes([old[index] ^ chance.randrange(1, 256)]) + old[index + 1 :]
            elif isinstance(old, int):
                new = old + 100
            else:
                new = old[:-1] + "é"
            moved = column in KEYS[table]
            changed = (
                where(table, row).replace(f"{column} = {old}", f"{column} = {new}") if moved else where(table, row)
            )
            found = found_after(
                full,
                f"UPDATE {table} SET {column} = :new WHERE {where(table, row)}",
                f"UPDATE {table} SET {column} = :old WHERE {changed}",
                old=old,
                new=new,
            )
            if found.ok or (table == "ledger_events" and found.findings[0].seq not in (row.seq, 0)):
                missed.append((column, row, found.findings[:1]))
    assert missed == []
    assert full.verified().ok


def in_blocks(found: Verification) -> list[Finding]:
    """Findings but for those that only follow from them: the sums, and what the log says."""
    return [one for one in found.findings if one.block]


def test_the_first_event_that_was_altered_is_named(full: Book) -> None:
    full.sql("UPDATE ledger_events SET units_total = 9 WHERE seq IN (5, 8) AND tenant = 'acme' AND log = 1")
    found = full.verified()
    assert [(one.kind, one.shard, one.block, one.log_id, one.seq) for one in found.findings] == [
        ("altered", 0, 1, "a" * 32 + ":1", 5),
        ("altered", 0, 3, "a" * 32 + ":1", 8),
    ]


def test_a_public_part_that_was_rewritten_with_its_columns_is_named_to_the_event(full: Book) -> None:
    (row,) = full.rows("SELECT public FROM ledger_events WHERE log = 1 AND seq = 3")
    public = row.public.replace(b"report.export", b"report.import")
    full.sql("UPDATE ledger_events SET public = :p, action = 'report.import' WHERE log = 1 AND seq = 3", p=public)
    found = full.verified()
    assert [(one.kind, one.block, one.seq) for one in in_blocks(found)] == [("altered", 1, 3)]
    # Without the ledger key the block is named, and its first event.
    found = full.verified(key=None)
    assert [(one.kind, one.block) for one in in_blocks(found)] == [("altered", 1)]


def test_removed_events_are_named(full: Book) -> None:
    full.sql("DELETE FROM ledger_events WHERE log = 1 AND seq IN (2, 9)")
    found = full.verified()
    assert [(one.kind, one.block, one.seq) for one in in_blocks(found)] == [("removed", 1, 2), ("removed", 3, 9)]


def test_an_inserted_event_is_named(full: Book) -> None:
    columns = "log, {seq}, {at}, tenant, subject, subject_type, action, effect, reason, rule, revision, units_total"
    copy = f"INSERT INTO ledger_events SELECT {columns}, public, commitment, personal FROM ledger_events WHERE "
    full.sql(copy.format(seq="40", at="at") + "log = 1 AND seq = 9")
    found = full.verified()
    assert [(one.kind, one.log_id, one.seq) for one in found.findings] == [("inserted", "a" * 32 + ":1", 40)]
    full.sql("DELETE FROM ledger_events WHERE seq = 40")
    full.sql(copy.format(seq="seq", at="at + 1") + "log = 1 AND seq = 4")
    found = full.verified()
    assert ("inserted", 1, 4) in [(one.kind, one.block, one.seq) for one in found.findings]


def test_events_that_changed_places_are_named(full: Book) -> None:
    full.sql("UPDATE ledger_events SET seq = 99 WHERE log = 1 AND seq = 2")
    full.sql("UPDATE ledger_events SET seq = 2 WHERE log = 1 AND seq = 3")
    full.sql("UPDATE ledger_events SET seq = 3 WHERE log = 1 AND seq = 99")
    found = full.verified()
    assert [(one.kind, one.block, one.seq) for one in found.findings] == [("reordered", 1, 2), ("reordered", 1, 3)]


def test_events_of_two_logs_that_changed_places_are_named(full: Book) -> None:
    logs = full.rows("SELECT log FROM ledger_logs ORDER BY log")
    first, second = logs[0].log, logs[1].log
    for old, new in ((first, 99), (second, first), (99, second)):
        full.sql("UPDATE ledger_events SET log = :new WHERE log = :old AND seq = 2", old=old, new=new)
    found = full.verified()
    assert [(one.kind, one.block, one.seq) for one in in_blocks(found)] == [("altered", 1, 2), ("altered", 2, 2)]


def test_the_end_of_a_chain_that_was_cut_off_is_found(full: Book) -> None:
    """Also when the head and the log were made to fit: the checkpoint in the database shows it, and sums do."""
    (last,) = full.rows("SELECT * FROM ledger_blocks WHERE shard = 0 AND number = 2")
    full.sql("DELETE FROM ledger_events WHERE log = 1 AND seq >= 7")
    full.sql("DELETE FROM ledger_blocks WHERE shard = 0 AND number = 3")
    found = full.verified()
    assert ("removed", 0, 3) in [(one.kind, one.shard, one.block) for one in found.findings]
    full.sql("UPDATE ledger_shards SET blocks = 2, head = :head WHERE shard = 0", head=last.hash)
    full.sql("UPDATE ledger_logs SET watermark = 6 WHERE log = 1")
    assert [one.kind for one in full.verified().findings if one.kind not in ("sum", "log", "head")] == ["checkpoint"]


def test_a_chain_that_was_rewritten_as_a_whole_is_found_with_a_checkpoint(tmp_path: Path) -> None:
    books = [Book(f"sqlite:///{tmp_path}/{name}") for name in ("honest.db", "rewritten.db")]
    try:
        for book, units in zip(books, (5, 1), strict=True):
            book.record(batch(1, 3, units={"reports": units}))
        honest, rewritten = books
        kept = honest.checkpoint()
        assert rewritten.verified().ok
        assert honest.verified(given=[kept]).ok
        found = rewritten.verified(given=[kept])
        assert [(one.kind, one.shard, one.block) for one in found.findings] == [("checkpoint", 0, 1)]
    finally:
        for book in books:
            book.database.close()


def test_a_checkpoint_still_holds_after_more_was_recorded(full: Book) -> None:
    kept = full.checkpoint()
    assert full.checkpoint().number == kept.number, "nothing was recorded, so nothing was signed"
    full.record(batch(10, 12))
    assert full.verified(given=[kept]).ok
    assert full.checkpoint().number == kept.number + 1


def test_a_checkpoint_that_another_key_signed_is_found(full: Book) -> None:
    forged = SigningKey.generate()
    full.sql("DELETE FROM ledger_checkpoints")
    assert full.database.write_now(checkpoints.make, forged, now_us=1)
    assert [one.kind for one in full.verified().findings] == ["checkpoint"]


def test_a_ledger_of_another_deployment_does_not_fit_a_checkpoint(full: Book) -> None:
    kept = full.checkpoint()
    full.sql("UPDATE meta SET deployment = 'e'")
    assert "checkpoint" in [one.kind for one in full.verified(given=[kept]).findings]


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("UPDATE ledger_shards SET head = x'00' WHERE shard = 0", "head"),
        ("UPDATE ledger_shards SET blocks = 4 WHERE shard = 0", "removed"),
        ("UPDATE ledger_shards SET blocks = 2 WHERE shard = 0", "head"),
        ("UPDATE ledger_logs SET watermark = 8 WHERE log = 1", "log"),
        ("UPDATE ledger_logs SET log_id = 'x:1' WHERE log = 1", "log"),
        ("DELETE FROM ledger_logs WHERE log = 1", "log"),
        ("INSERT INTO ledger_ranges VALUES (1, 20, 21)", "log"),
        ("UPDATE ledger_subjects SET key = NULL WHERE number = 1", "subject"),
        ("UPDATE ledger_subjects SET tag = x'00' WHERE number = 1", "subject"),
        ("UPDATE ledger_subjects SET erased_at = 1 WHERE number = 1", "subject"),
        ("DELETE FROM ledger_subjects WHERE number = 1", "altered"),
        ("UPDATE ledger_events SET personal = NULL WHERE log = 1 AND seq = 1", "altered"),
        ("UPDATE ledger_checkpoints SET document = x'00'", "checkpoint"),
        ("UPDATE ledger_events SET public = 'no bytes' WHERE log = 1 AND seq = 2", "altered"),
        ("UPDATE ledger_events SET at = 'no number' WHERE log = 1 AND seq = 2", "altered"),
        ("UPDATE ledger_events SET personal = 7 WHERE log = 1 AND seq = 2", "altered"),
    ],
)
def test_what_surrounds_the_events_is_held_to_them(full: Book, statement: str, kind: str) -> None:
    full.sql(statement)
    assert kind in [one.kind for one in full.verified().findings]


def test_sums_that_were_altered_are_found(full: Book) -> None:
    full.sql("UPDATE ledger_rollups SET units = units + 1 WHERE tenant = 'globex'")
    found = full.verified()
    assert (found.ok, found.rollups_match, [one.kind for one in found.findings]) == (False, False, ["sum"])
    assert "ledger_rollups 1789999200, globex, reports" in found.findings[0].what


def test_without_the_ledger_key_everything_but_personal_parts_is_checked(full: Book) -> None:
    found = full.verified(key=None)
    assert (found.ok, found.opened, found.checkpoints) == (True, False, 1)
    full.sql("UPDATE ledger_events SET personal = NULL WHERE log = 1 AND seq = 1")
    assert [one.seq for one in full.verified(key=None).findings] == [1]


def test_another_ledger_key_opens_nothing(full: Book) -> None:
    found = full.verified(key=LedgerKey(bytes(32)))
    assert {one.kind for one in found.findings} == {"subject", "altered"}


def test_several_processes_find_the_same(full: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("licet_control_plane.store.verification.INLINE_EVENTS_MAX", 0)
    monkeypatch.setattr("licet_control_plane.store.verification.plan.PIECE_BLOCKS", 1)
    assert full.verified(processes=2).ok
    full.sql("UPDATE ledger_events SET rule = 'x' WHERE log = 1 AND seq = 8")
    found = full.verified(processes=2)
    assert [(one.kind, one.seq) for one in found.findings] == [("altered", 8)]
    assert found.heads == full.verified(processes=1).heads


def test_progress_reaches_the_end(full: Book) -> None:
    url = full.url
    *steps, last = verify(url, LEDGER_KEY, VERIFIER, processes=1)
    assert isinstance(last, Verification)
    assert steps[0] == (0, 14)
    assert steps[-1] == (14, 14)


def test_what_is_recorded_and_erased_while_it_is_verified_does_not_disturb(full: Book) -> None:
    steps = verify(full.url, LEDGER_KEY, VERIFIER, processes=1)
    assert next(steps) == (0, 14)
    full.record(batch(12, 20), batch(4, 5, sidecar=OTHER, tenant="globex"))
    full.erase("bob")
    full.checkpoint()
    *_, last = steps
    assert isinstance(last, Verification)
    assert (last.ok, last.events) == (True, 14)
    after = full.verified()
    assert (after.findings, after.rollups_match, after.events, after.erased_events) == ([], True, 25, 2)
    assert [(gap.from_seq, gap.to_seq) for gap in after.gaps] == [(10, 11)]


# --- batches in any order ---------------------------------------------------------------------------------------------


def test_repeats_make_no_block(full: Book) -> None:
    before = full.rows("SELECT shard, number, hash FROM ledger_blocks ORDER BY shard, number")
    done = full.record(batch(1, 4), batch(7, 9, resource_id="report-7", spends=[("reports:user@00ff:1788220800", 1)]))
    assert (done.inserted, done.duplicates, done.conflicts) == (0, 7, 0)
    assert full.rows("SELECT shard, number, hash FROM ledger_blocks ORDER BY shard, number") == before


def test_a_block_covers_only_what_was_inserted_with_it(book: Book) -> None:
    book.record(batch(1, 3), batch(6, 8))
    book.record(batch(1, 10))
    ranges = [chain_ranges(row) for row in book.rows("SELECT ranges FROM ledger_blocks ORDER BY number")]
    log = "a" * 32 + ":1"
    assert ranges == [[(log, 1, 3), (log, 6, 8)], [(log, 4, 5), (log, 9, 10)]]
    assert book.verified().ok


def chain_ranges(row: Any) -> list[tuple[str, int, int]]:
    import msgpack

    return [tuple(one) for one in msgpack.unpackb(row.ranges)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deliveries=st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9), st.booleans()), min_size=1, max_size=4),
        min_size=1,
        max_size=8,
    )
)
def test_late_repeated_and_overlapping_batches_leave_one_chain(
    tmp_path_factory: pytest.TempPathFactory, deliveries: list[list[tuple[int, int, bool]]]
) -> None:
    book = Book(f"sqlite:///{tmp_path_factory.mktemp('ledger')}/licet.db")
    try:
        seen: set[tuple[bool, int]] = set()
        for delivery in deliveries:
            sent = [batch(first, first + more, sidecar=OTHER if other else "a" * 32) for first, more, other in delivery]
            done = book.record(*sent)
            new = {(other, seq) for first, more, other in delivery for seq in range(first, first + more + 1)} - seen
            assert done.inserted == len(new)
            assert done.conflicts == 0
            seen |= new
            book.keys = SubjectKeys(LEDGER_KEY)  # another worker
        found = book.verified()
        assert found.events == len(seen)
        assert (found.findings, found.rollups_match, found.conflicts) == ([], True, 0)
    finally:
        book.database.close()


# --- personal data ----------------------------------------------------------------------------------------------------

NAMES: Final = [b"ada-lovelace", b"grace-hopper", b"order-4711", b"report-secret", b"north-wing", b"c0ffee0ddf00d"]


@pytest.fixture
def personal(book: Book) -> Book:
    book.record(
        batch(
            1,
            5,
            subject_id="ada-lovelace",
            on_behalf_of="grace-hopper",
            idempotency_key="order-4711",
            resource_id="report-secret",
            context={"site": "north-wing"},
            spends=[("reports:user@c0ffee0ddf00d:1788220800", 1)],
        ),
        batch(6, 7, subject_id="bob"),
    )
    book.record(batch(5, 5, subject_id="ada-lovelace", context={"site": "north-wing"}))  # a conflict
    return book


def files(book: Book) -> bytes:
    directory = Path(book.url.removeprefix("sqlite:///")).parent
    return b"".join(path.read_bytes() for path in directory.glob("licet.db*"))


def test_nothing_personal_is_readable_in_the_database(personal: Book) -> None:
    personal.sql("DELETE FROM register_spend")  # keeps names of quotas, and their digests, as the documents say
    stored = files(personal)
    assert b"report.export" in stored, "this test reads what is stored"
    # The deleted rows of quotas are overwritten; the log of the database may keep them until it is emptied.
    assert [name for name in NAMES[:-1] if name in stored] == []


def test_everything_about_somebody_is_exported(personal: Book) -> None:
    found = personal.about("ada-lovelace")
    assert [one.event.seq for one in found if not one.conflict] == [1, 2, 3, 4, 5]
    assert [one.event.seq for one in found if one.conflict] == [5]
    assert found[0].event.context == {"site": "north-wing"}
    assert found[0].event.spends == [["reports:user@c0ffee0ddf00d:1788220800", 1]]
    assert [one.event.seq for one in personal.about("grace-hopper")] == [1, 2, 3, 4, 5], "others acted on their behalf"
    assert personal.about("nobody") == []
    assert personal.about("ada-lovelace", tenant="globex") == []


def test_erasing_somebody_keeps_the_chain_and_the_sums(personal: Book) -> None:
    kept = personal.checkpoint()
    erased = personal.erase("ada-lovelace")
    assert (len(erased.numbers), erased.events) == (2, 5)
    found = personal.verified(given=[kept])
    assert (found.findings, found.rollups_match, found.erased_events, found.erased_subjects) == ([], True, 5, 2)
    assert personal.about("ada-lovelace") == []
    newest = personal.database.read_now(ledger.newest_events, "acme", ledger_key=LEDGER_KEY, limit=10)
    assert [one.subject_id for one in newest] == ["bob"] * 2 + [ERASED] * 5
    assert {one.units["reports"] for one in newest} == {1}
    assert (newest[-1].idempotency_key, newest[-1].context, newest[-1].spends) == ("", {}, [])
    assert personal.rows("SELECT personal FROM ledger_conflicts") == [(None,)]


def test_erasing_somebody_erases_what_others_did_on_their_behalf(personal: Book) -> None:
    assert personal.erase("grace-hopper").events == 5
    assert personal.verified().findings == []


def test_an_altered_event_of_an_erased_subject_is_still_found(personal: Book) -> None:
    personal.erase("ada-lovelace")
    (row,) = personal.rows("SELECT public FROM ledger_events WHERE seq = 3")
    public = row.public.replace(b"report.export", b"report.import")
    personal.sql("UPDATE ledger_events SET public = :p, action = 'report.import' WHERE seq = 3", p=public)
    assert [(one.kind, one.block) for one in in_blocks(personal.verified())] == [("altered", 1)]


def test_an_erasure_that_nobody_recorded_is_found(personal: Book) -> None:
    personal.sql("UPDATE ledger_subjects SET key = NULL, tag = NULL, principal = NULL, erased_at = 5 WHERE number = 1")
    personal.sql("UPDATE ledger_events SET personal = NULL WHERE subject = 1")
    assert [one.kind for one in personal.verified().findings] == ["subject"]


def test_an_erasure_that_was_undone_is_found(personal: Book) -> None:
    (row,) = personal.rows("SELECT tag, key FROM ledger_subjects WHERE number = 1")
    personal.erase("ada-lovelace")
    personal.sql("UPDATE ledger_subjects SET tag = :t, key = :k, erased_at = NULL WHERE number = 1", t=row[0], k=row[1])
    assert "subject" in {one.kind for one in personal.verified().findings}


def test_erasing_nobody_changes_nothing(personal: Book) -> None:
    before = personal.rows("SELECT * FROM ledger_blocks")
    assert personal.erase("nobody") == ledger.Erased([], 0)
    assert personal.rows("SELECT * FROM ledger_blocks") == before


def test_events_of_an_erased_subject_that_come_again_are_the_same(personal: Book) -> None:
    personal.erase("bob")
    done = personal.record(batch(6, 7, subject_id="bob"))
    assert (done.inserted, done.duplicates, done.conflicts) == (0, 2, 0)
    assert personal.about("bob") == [], "a repeat must not bring them back"


def test_an_erased_subject_that_acts_again_has_another_key(personal: Book) -> None:
    other_worker = SubjectKeys(LEDGER_KEY)
    decoded = DecodedBatch.of(batch(8, 8, subject_id="bob").pack())
    personal.database.write_now(ledger.record, 0, [decoded], keys=other_worker, now_us=1)
    personal.erase("bob")
    for worker, seq in ((personal.keys, 9), (other_worker, 10)):
        decoded = DecodedBatch.of(batch(seq, seq, subject_id="bob").pack())
        personal.database.write_now(ledger.record, 0, [decoded], keys=worker, now_us=1)
    assert [one.event.seq for one in personal.about("bob")] == [9, 10]
    found = personal.verified()
    assert (found.findings, found.erased_events) == ([], 3)


def test_a_key_made_in_a_transaction_that_failed_is_not_used(book: Book) -> None:
    good = DecodedBatch.of(batch(1, 1, subject_id="eve").pack())
    bad = DecodedBatch.of(batch(2, 2, subject_id="eve", action=None).pack())
    with pytest.raises(TypeError, match="where an action"):
        book.database.write_now(ledger.record, 0, [good, bad], keys=book.keys, now_us=1)
    book.record(batch(1, 2, subject_id="eve"))
    assert book.verified().ok
    assert [one.event.seq for one in book.about("eve")] == [1, 2]


def test_a_conflict_is_told_by_personal_fields_alone(book: Book) -> None:
    book.record(batch(1, 3))
    done = book.record(batch(1, 3, resource_id="another"))
    assert (done.duplicates, done.conflicts) == (0, 3)
    done = book.record(batch(1, 3, resource_id="another"), batch(1, 3))
    assert (done.duplicates, done.conflicts) == (3, 3)
    assert len(book.rows("SELECT 1 FROM ledger_conflicts")) == 3, "the same conflict is kept once"


def test_an_event_that_comes_again_after_it_was_altered_is_kept_as_evidence(book: Book) -> None:
    book.record(batch(1, 3))
    book.sql("UPDATE ledger_events SET personal = :p WHERE seq = 2", p=os.urandom(60))
    assert book.record(batch(1, 3)).conflicts == 1


def test_fields_that_a_newer_sidecar_appended_are_kept_sealed(book: Book) -> None:
    import msgpack

    whole = batch(1, 1)
    fields = msgpack.unpackb(packed(event(1)), strict_map_key=False)
    empty = [UsageEvent._field_defaults[name] for name in UsageEvent._fields[len(fields) :]]
    longer = msgpack.packb([*fields, *empty, "secret-of-tomorrow"], default=dict)
    newer = UsageBatch(whole.sidecar, 1, 0, 0, whole.decision_prefix, 1, 1, (longer,))
    book.record(newer)
    assert b"secret-of-tomorrow" not in files(book)
    assert book.record(newer).duplicates == 1
    assert book.verified().ok


def test_a_report_without_the_ledger_key_says_so(book: Book) -> None:
    from licet_control_plane.store.subjects import EventReader

    book.record(batch(1, 1))

    def read(connection: Connection) -> list[str]:
        rows = connection.execute(text("SELECT log, subject, public, commitment, personal FROM ledger_events")).all()
        return [one.subject_id for one in EventReader(connection, None).read(rows)]

    assert book.database.read_now(read) == [UNREADABLE]
