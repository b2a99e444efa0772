"""The store on a real SQLite and a real PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, func, insert, select, text, update

from licet.domain.catalog import Grant, License
from licet.domain.ids import LimitKey
from licet.domain.windows import Period
from licet.wire.signing import Statement
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.core.webhook_events import THRESHOLD
from licet_control_plane.store import (
    idempotency,
    ledger,
    licenses,
    marks,
    meta,
    publisher_lease,
    revisions,
    webhooks,
)
from licet_control_plane.store.database import Database, DatabaseUnavailable
from licet_control_plane.store.schema import events, metadata, ranges, rollups, webhook_messages
from licet_control_plane.store.schema import licenses as licenses_table
from licet_control_plane.store.schema import publisher_lease as publisher_lease_table
from licet_control_plane.store.subjects import SubjectKeys
from tests.support.ledger import verification_of
from tests.support.usage import batch

KEYS = SubjectKeys(LedgerKey(bytes(32)))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    made.migrate()
    made.write_now(meta.ensure, deployment="d", now_us=1)
    yield made
    made.close()


def sign(statement: Statement) -> bytes:
    return repr(statement).encode()


def append(connection: Connection, key: str = "acme") -> int:
    return revisions.append(connection, kind="license", key=key, payload={}, sign=sign, now_us=1, by="test")


def test_the_migrations_make_exactly_the_schema(database: Database) -> None:
    def is_ours(_object: object, name: str | None, kind: str, *_: object) -> bool:
        return not (kind == "table" and name and name.startswith(f"{events.name}_"))  # a partition

    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_object": is_ours})
        assert compare_metadata(context, metadata) == []


def emptied(connection: Connection) -> None:
    """Tests get databases that were migrated; this one is as it was before."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
        return
    found = MetaData()
    found.reflect(connection)
    found.drop_all(connection)


def test_licenses_of_an_older_version_are_kept_and_looked_after_from_then_on(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = command.upgrade
    with closing(Database(database_url)) as database:
        database.write_now(emptied)
        with monkeypatch.context() as patched:
            patched.setattr(command, "upgrade", lambda config, _head: upgrade(config, "0004"))
            database.migrate()
        old = (
            "INSERT INTO licenses"
            " (tenant, plan, status, starts_s, ends_s, addons, overrides, grants, revision, updated_at)"
            " VALUES (:tenant, 'pro', 'active', 0, :ends_s, '{}', '{}', '[]', 1, 1)"
        )
        rows = [{"tenant": "ends", "ends_s": 1_000}, {"tenant": "open", "ends_s": 0}]
        database.write_now(lambda connection: connection.execute(text(old), rows))
        database.migrate()
        for tenant, ends_s in (("ends", 1_000), ("open", 0)):
            stored = database.read_now(licenses.get, tenant)
            assert stored is not None
            assert stored.license == License(tenant, "pro", ends_s=ends_s)
        assert database.read_now(licenses.due, now_s=1, limit=10) == ["ends"]


def test_migrating_again_changes_nothing(database: Database) -> None:
    append_once = database.write_now(append)
    database.migrate()
    assert database.read_now(meta.read).revision == append_once


def test_licenses_keep_their_grants_and_older_rows_have_none(database: Database) -> None:
    def row_before_grants(connection: Connection) -> None:
        values = {"plan": "pro", "status": "active", "starts_s": 0, "ends_s": 0, "addons": "{}", "overrides": "{}"}
        connection.execute(insert(licenses_table).values(tenant="old", **values, revision=1, updated_at=1))

    database.write_now(row_before_grants)
    grant = Grant("g", LimitKey("reports:month"), 5, 1, 2, -3)
    granted = License("new", "pro", grants=(grant,))
    database.write_now(licenses.save, granted, revision=2, now_us=1, new=True)
    found = database.read_now(licenses.of_tenants, ["old", "new"])
    assert (found["old"].license, found["new"].license) == (License("old", "pro"), granted)


def test_revisions_of_concurrent_writers_have_no_gaps_and_commit_in_order(database: Database) -> None:
    seen: list[int] = []

    def write() -> None:
        for _ in range(20):
            seen.append(database.write_now(append))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(1, 81))


def test_a_failed_change_uses_up_no_revision(database: Database) -> None:
    def fails(connection: Connection) -> None:
        append(connection)
        raise RuntimeError("after the revision was allocated")

    with pytest.raises(RuntimeError):
        database.write_now(fails)
    assert database.write_now(append) == 1


def test_last_published_stops_at_the_first_that_is_not(database: Database) -> None:
    for _ in range(5):
        database.write_now(append)
    assert database.read_now(revisions.last_published) == 0
    database.write_now(revisions.mark_published, up_to=3, now_us=2)
    assert database.read_now(revisions.last_published) == 3
    assert [row.revision for row in database.read_now(revisions.outbox, after=3, limit=10)] == [4, 5]


def test_the_newest_documents_are_those_at_a_revision(database: Database) -> None:
    for key in ("a", "b", "a", "c", "a"):
        database.write_now(append, key)
    newest = database.read_now(revisions.newest, "license", up_to=4, limit=10)
    assert [(row.key, row.revision) for row in newest] == [("a", 3), ("b", 2), ("c", 4)]
    page = database.read_now(revisions.newest, "license", up_to=4, after_key="a", limit=1)
    assert [row.key for row in page] == ["b"]


def test_an_intended_mark_is_new_only_once(database: Database) -> None:
    assert database.write_now(marks.intend, ["a", "b"], now_us=1) == {"a", "b"}
    assert database.write_now(marks.intend, ["b", "c"], now_us=1) == {"c"}


def test_a_reader_after_a_failed_one_sees_what_was_committed_since(database: Database, database_url: str) -> None:
    database.write_now(append)
    writer = Database(database_url)  # its connections are never the reader's
    kept = []

    def fails(connection: Connection) -> None:
        result = connection.execute(select(meta.meta))
        kept.append(result)  # a query left in the middle, and still referenced
        raise RuntimeError

    with pytest.raises(RuntimeError):
        database.read_now(fails)
    writer.write_now(append)
    writer.close()
    assert database.read_now(meta.read).revision == 2


def test_a_failing_disk_is_unavailable_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    database = Database(f"sqlite:///{tmp_path / 'a-file' / 'licet.db'}")
    with pytest.raises(DatabaseUnavailable):
        database.migrate()
    database.close()


def test_a_ledger_transaction_that_fails_halfway_leaves_nothing(database: Database) -> None:
    good = DecodedBatch.of(batch(1, 5).pack())
    bad = DecodedBatch.of(batch(6, 7, action=None).pack())
    with pytest.raises(Exception, match="action"):
        database.write_now(ledger.record, 0, [good, bad], keys=KEYS, now_us=1)
    assert database.read_now(lambda connection: connection.execute(select(events)).all()) == []
    done = database.write_now(ledger.record, 0, [good], keys=KEYS, now_us=1)
    assert (done.inserted, done.watermarks) == (5, {f"{'a' * 32}:1": 5})


def test_a_worker_that_resumes_after_its_batch_was_claimed_bills_nothing_twice(database: Database) -> None:
    paused = [DecodedBatch.of(batch(1, 5).pack()), DecodedBatch.of(batch(6, 9).pack())]
    database.write_now(ledger.record, 0, paused, keys=KEYS, now_us=1)
    done = database.write_now(ledger.record, 0, paused, keys=KEYS, now_us=2)
    assert (done.inserted, done.duplicates, done.conflicts) == (0, 9, 0)


def test_out_of_order_batches_leave_no_ranges_behind(database: Database) -> None:
    for first in (21, 11, 31, 1):
        database.write_now(ledger.record, 0, [DecodedBatch.of(batch(first, first + 9).pack())], keys=KEYS, now_us=1)
    done = database.write_now(ledger.record, 0, [DecodedBatch.of(batch(35, 45).pack())], keys=KEYS, now_us=1)
    assert list(done.watermarks.values()) == [45]
    assert database.read_now(lambda connection: connection.execute(select(ranges)).all()) == []


def test_only_licenses_of_changed_plans_and_with_addons_are_looked_at(database: Database) -> None:
    from licet.domain.catalog import License

    for tenant, plan, addons in (("a", "pro", {}), ("b", "free", {}), ("c", "free", {"pro": 1})):
        license_ = License(tenant, plan, addons=addons)
        database.write_now(licenses.save, license_, revision=1, now_us=1, new=True)
    found = database.read_now(licenses.holding, {"pro"}, after="", limit=10)
    assert [stored.license.tenant for stored in found] == ["a", "c"]


def lease(database: Database, holder: str, now_s: float = 1_000) -> str:
    return database.write_now(publisher_lease.take, holder, now_us=int(now_s * 1_000_000))


def test_who_has_the_publishers_lease_keeps_it_and_nobody_else_gets_it(database: Database) -> None:
    assert [lease(database, who) for who in ("one", "two", "one")] == ["one"] * 3


def test_a_lease_that_ended_or_was_given_back_is_there_for_the_next(database: Database) -> None:
    lease(database, "one")
    database.write_now(lambda connection: connection.execute(update(publisher_lease_table).values(ends_at=1)))
    assert lease(database, "two") == "two"
    assert lease(database, "one") == "two"
    database.write_now(publisher_lease.give_back, "one")  # not the holder's to give
    assert lease(database, "one") == "two"
    database.write_now(publisher_lease.give_back, "two")
    assert lease(database, "one") == "one"


def test_of_many_that_want_the_lease_at_once_one_has_it(database: Database, database_url: str) -> None:
    answers: list[tuple[str, str]] = []

    def want(who: str) -> None:
        mine = Database(database_url)
        answers.append((who, lease(mine, who)))
        mine.close()

    threads = [threading.Thread(target=want, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({holder for _, holder in answers}) == 1
    assert sum(who == holder for who, holder in answers) == 1


def test_sums_of_what_was_asked_in_vain_end_at_the_largest_number(database: Database) -> None:
    for seq in range(1, 4):
        asked = DecodedBatch.of(batch(seq, seq, units={"reports": 2**62}, effect=2, spends=[]).pack())
        database.write_now(ledger.record, 0, [asked], keys=KEYS, now_us=1)
    assert database.read_now(lambda connection: connection.execute(select(rollups.c.units)).scalar_one()) == 2**63 - 1
    assert verification_of(database, KEYS.ledger_key).rollups_match


def test_a_key_is_begun_by_the_first_alone(database: Database) -> None:
    begun = [database.write_now(idempotency.begin, "caller", "key", "request", now_us=1) for _ in range(2)]
    assert begun == [idempotency.Standing.NEW, idempotency.Standing.RUNNING]


def test_a_threshold_is_told_by_the_first_alone(database: Database) -> None:
    hook = webhooks.Webhook("wh_1", "https://example.com/", (THRESHOLD,), (80,), "", 1, "test")
    database.write_now(webhooks.add, hook)
    reached = [webhooks.Reached("reports:monthly:0", 80, Period.MONTH, 10, {})]
    for _ in range(2):
        assert database.write_now(webhooks.announce_thresholds, "acme", reached, now_us=1) == 0
    assert len(database.write_now(webhooks.deliveries, "wh_1", before=0, limit=10)) == 1


def test_thresholds_that_find_no_room_are_dropped_and_counted_and_events_of_licenses_are_not(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "WAITING_MAX", 2)
    hook = webhooks.Webhook("wh_1", "https://example.com/", (THRESHOLD, "license.expired"), (80,), "", 1, "test")
    database.write_now(webhooks.add, hook)
    reached = [webhooks.Reached(f"reports:monthly@{n}:0", 80, Period.MONTH, 10, {}) for n in range(5)]
    assert database.write_now(webhooks.announce_thresholds, "acme", reached[:1], now_us=1) == 0
    assert database.write_now(webhooks.announce_thresholds, "acme", reached, now_us=1) == 3
    database.write_now(webhooks.announce, "license.expired", "acme", {}, now_us=1)
    (found,) = database.read_now(webhooks.every)
    assert (found.waiting, found.dropped) == (3, 3)


def test_thresholds_that_were_delivered_are_forgotten_sooner_than_the_rest(database: Database) -> None:
    hook = webhooks.Webhook("wh_1", "https://example.com/", (THRESHOLD, "license.expired"), (80,), "", 1, "test")
    database.write_now(webhooks.add, hook)
    reached = [webhooks.Reached(f"reports:monthly@{n}:0", 80, Period.MONTH, 10, {}) for n in range(2)]
    database.write_now(webhooks.announce_thresholds, "acme", reached, now_us=1)
    database.write_now(webhooks.announce, "license.expired", "acme", {}, now_us=1)
    for number in (1, 3):
        database.write_now(webhooks.delivered, "wh_1", number, status=204, attempts=1, now_us=2)
    late_us = (webhooks.THRESHOLDS_KEPT_S + 1) * 1_000_000
    database.write_now(webhooks.sweep, now_us=late_us)
    left = database.read_now(webhooks.deliveries, "wh_1", before=0, limit=10)
    assert [one.message.number for one in left] == [3, 2]
    count = select(func.count()).select_from(webhook_messages)
    assert database.read_now(lambda connection: connection.scalar(count)) == 2
