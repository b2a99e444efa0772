"""The archive beside a real ledger: nothing is acknowledged without it, erasing reaches it, and it gives it back."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import Connection, select

from licet.wire.documents import ACK
from licet.wire.names import usage_shard
from licet.wire.usage import LostRange, UsageBatch, log_id
from licet_control_plane.api.app import make_app
from licet_control_plane.archive import follower, rebuilding
from licet_control_plane.archive.files import (
    ArchiveDamaged,
    ArchiveDirectory,
    ArchiveUnavailable,
    ShardArchive,
    files_of,
    read,
)
from licet_control_plane.archive.follower import Archive, ArchiveAhead
from licet_control_plane.archive.rebuilding import NotARebuild, rebuild
from licet_control_plane.archive.records import ArchivedBlock
from licet_control_plane.archive.subject_keys import SubjectKeyFiles
from licet_control_plane.bootstrap import _open_archive
from licet_control_plane.config import ServerConfig
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.sealed_events import ERASED
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.drain.worker import GROUP
from licet_control_plane.state_dir import LEDGER_KEY_FILE, StartError
from licet_control_plane.store import ledger, meta
from licet_control_plane.store.database import Database
from licet_control_plane.store.schema import (
    blocks,
    events,
    gaps,
    logs,
    ranges,
    register_spend,
    rollups,
    shards,
    subjects,
)
from licet_control_plane.store.subjects import SubjectKeys
from tests.support.command_line import CommandLine, licet_command
from tests.support.control_plane import NAMES, Deployment, deployment, until
from tests.support.ledger import verification_of
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

__all__ = ["licet_command"]

SIDECAR: Final = "a" * 32
OTHER: Final = "b" * 32
DEPLOYMENT: Final = "d" * 32
LEDGER_KEY: Final = LedgerKey(bytes(range(32)))
STREAM: Final = NAMES.usage(usage_shard(SIDECAR))


class Book:
    """A ledger with an archive, followed step by step."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "licet.db"
        self.archive_dir = directory / "archive"
        self.database = opened(self.path)
        self.keys = SubjectKeys(LEDGER_KEY)
        self.archive = self.follow()

    def follow(self) -> Archive:
        return Archive.open(
            ArchiveDirectory.claim(self.archive_dir), self.database, DEPLOYMENT, now_s=lambda: 1_790_000_000.0
        )

    def record(self, *batches: UsageBatch, shard: int = 0) -> None:
        decoded = [DecodedBatch.of(one.pack()) for one in batches]
        self.database.write_now(ledger.record, shard, decoded, keys=self.keys, now_us=7)

    async def archived(self) -> None:
        for shard in range(4):
            await self.archive.catch_up(shard)

    async def fill(self) -> None:
        """Two shards, four logs, a gap, subjects on behalf of others, quotas with scopes, several blocks."""
        self.record(batch(1, 4), batch(5, 6, subject_id="bob", on_behalf_of="ada"))
        self.record(batch(1, 3, sidecar=OTHER, tenant="globex", units={"in": 3, "out": 4}, feature_costs={"in": 5}))
        await self.archived()
        self.record(batch(9, 12, resource_id="report-7", spends=[("reports:user@00ff:1788220800", 2)]))
        self.record(batch(1, 2, sidecar="c" * 32), shard=1)
        self.record(batch(1, 2, sidecar="c" * 32, incarnation=2, previous=(1, 2)), shard=1)
        await self.archived()

    def close(self) -> None:
        self.archive.close()
        self.database.close()


def opened(path: Path) -> Database:
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.write_now(meta.ensure, deployment=DEPLOYMENT, now_us=1)
    return database


def contents(connection: Connection) -> dict[str, list[Any]]:
    """Everything that must be the same; when a log was first heard of, and in how many batches, need not."""
    tables = (events, blocks, rollups, register_spend, ranges, gaps, subjects)
    found = {
        table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key.columns))]
        for table in tables
    }
    of_logs = [column for column in logs.c if column.name not in ("log", "first_at")]
    found["logs"] = [tuple(row) for row in connection.execute(select(*of_logs).order_by(logs.c.log_id))]
    of_shards = (shards.c.shard, shards.c.events, shards.c.blocks, shards.c.head)
    begun = select(*of_shards).where(shards.c.blocks > 0)
    found["shards"] = [tuple(row) for row in connection.execute(begun.order_by(shards.c.shard))]
    return found


@pytest.fixture
async def book(tmp_path: Path) -> AsyncIterator[Book]:
    made = Book(tmp_path)
    yield made
    made.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Database]:
    made = opened(tmp_path / "rebuilt.db")
    yield made
    made.close()


async def test_an_empty_database_is_rebuilt_event_by_event(book: Book, empty: Database) -> None:
    await book.fill()
    steps = list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    assert (steps[-1].events, steps[-1].bytes_done) == (17, steps[-1].bytes_total)
    before = book.database.read_now(contents)
    assert before["ledger_events"]
    assert before["register_spend"]
    assert empty.read_now(contents) == before
    report = verification_of(empty, LEDGER_KEY)
    assert (report.events, report.findings, report.rollups_match) == (17, [], True)
    assert empty.read_now(meta.read).ledger_generation == 2


async def test_what_was_declared_lost_is_rebuilt_and_still_filled_by_what_comes_after_all(
    book: Book, empty: Database
) -> None:
    await book.fill()
    lost = (LostRange(7, 8, "damaged"), LostRange(20, 22, "damaged"))
    book.record(batch(13, 12, lost=lost))
    book.record(batch(21, 21))
    await book.archived()
    list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    assert empty.read_now(contents) == book.database.read_now(contents)
    report = verification_of(empty, LEDGER_KEY)
    assert report.findings == []
    assert [(gap.from_seq, gap.to_seq) for gap in report.lost] == [(7, 8), (20, 20), (22, 22)]
    decoded = DecodedBatch.of(batch(8, 8).pack())
    done = empty.write_now(ledger.record, 0, [decoded], keys=SubjectKeys(LEDGER_KEY), now_us=10)
    assert (done.inserted, done.lost) == (1, {log_id(SIDECAR, 1): [(7, 7), (20, 20), (22, 22)]})
    assert verification_of(empty, LEDGER_KEY).findings == []


async def test_somebody_who_was_only_in_a_conflict_is_erased_in_the_rebuilt_ledger_too(
    book: Book, empty: Database
) -> None:
    await book.fill()
    book.record(batch(4, 4, subject_id="mallory"))  # another event under the same number
    erased = book.database.write_now(ledger.erase, LEDGER_KEY, "acme", "user", "mallory", now_us=11)
    assert (len(erased.numbers), erased.events) == (1, 0)
    await book.archived()
    list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=12))
    assert empty.read_now(contents) == book.database.read_now(contents)
    assert verification_of(empty, LEDGER_KEY).findings == []
    decoded = DecodedBatch.of(batch(13, 13, subject_id="carol").pack())
    empty.write_now(ledger.record, 0, [decoded], keys=SubjectKeys(LEDGER_KEY), now_us=13)
    assert verification_of(empty, LEDGER_KEY).findings == [], "nobody gets the number of somebody who was erased"


async def test_a_log_in_the_chain_of_another_shard_is_rebuilt_whichever_chain_comes_first(
    book: Book, empty: Database
) -> None:
    """Somebody who can write the usage streams puts a batch where it does not belong."""
    book.record(batch(1, 2), shard=2)
    book.record(batch(3, 4), shard=0)
    await book.archived()
    list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    for database in (book.database, empty):
        report = verification_of(database, LEDGER_KEY)
        assert (report.findings, report.events, report.logs[0].watermark) == ([], 4, 4)


async def test_a_rebuilt_ledger_goes_on_where_the_archive_ends(book: Book, empty: Database) -> None:
    await book.fill()
    list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    book.archive.close()
    archive = Archive.open(ArchiveDirectory.claim(book.archive_dir), empty, DEPLOYMENT, now_s=lambda: 0.0)
    try:
        decoded = [DecodedBatch.of(one.pack()) for one in (batch(1, 4), batch(7, 8), batch(13, 14))]
        done = empty.write_now(ledger.record, 0, decoded, keys=SubjectKeys(LEDGER_KEY), now_us=10)
        assert (done.inserted, done.duplicates, done.watermarks) == (4, 4, {log_id(SIDECAR, 1): 14})
        await archive.catch_up(0)
    finally:
        archive.close()
    assert [one.number for one in read(book.archive_dir, 0, DEPLOYMENT)] == [1, 2, 3, 4]
    assert verification_of(empty, LEDGER_KEY).ok


async def test_an_interrupted_rebuild_and_a_restored_backup_are_gone_on_with(
    book: Book, empty: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await book.fill()
    monkeypatch.setattr(rebuilding, "EVENTS_MAX", 1)
    for taken in (1, 2):
        steps = rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9)
        for _ in range(taken):
            next(steps)
        steps.close()
    book.record(batch(13, 20, subject_id="later"))
    await book.archived()
    list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    assert empty.read_now(contents) == book.database.read_now(contents)
    assert list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9)) == []
    assert empty.read_now(meta.read).ledger_generation == 4


async def test_a_ledger_that_holds_something_else_is_refused(book: Book, empty: Database) -> None:
    await book.fill()
    decoded = [DecodedBatch.of(batch(1, 2, subject_id="eve").pack())]
    empty.write_now(ledger.record, 0, decoded, keys=SubjectKeys(LEDGER_KEY), now_us=7)
    before = empty.read_now(contents)
    with pytest.raises(NotARebuild, match="block 1 of shard 0"):
        list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    assert empty.read_now(contents) == before
    book.archive.close()
    with ExitStack() as stack:
        directory = ArchiveDirectory.claim(book.archive_dir)
        stack.callback(directory.close)
        with pytest.raises(ArchiveAhead, match="ends with block 3 of shard 0, and the ledger with block 1"):
            Archive.open(directory, empty, DEPLOYMENT, now_s=lambda: 0.0)


async def test_what_was_altered_in_the_archive_is_named_and_nothing_after_it_is_taken(
    book: Book, empty: Database
) -> None:
    await book.fill()
    records = list(read(book.archive_dir, 0, DEPLOYMENT))
    forged = ArchivedBlock.unpack(records[1].data)
    changed = forged.events[0]._replace(public=forged.events[0].public.replace(b"globex", b"acmeco"))
    records[1] = records[1]._replace(data=forged._replace(events=[changed, *forged.events[1:]]).pack())
    shutil.rmtree(book.archive_dir / "shard-0")
    again = ShardArchive.open(book.archive_dir, 0, DEPLOYMENT)
    again.append(1, [one.data for one in records], now_s=0)
    again.close()
    with pytest.raises(ArchiveDamaged, match=r"record 2: its events are not those"):
        list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    assert empty.read_now(contents)["ledger_events"] == []


async def test_without_the_keys_of_subjects_nothing_is_rebuilt_whose_numbers_would_be_given_again(
    book: Book, empty: Database
) -> None:
    await book.fill()
    book.archive.close()
    away = book.archive_dir.with_name("away")
    (book.archive_dir / "subject-keys").rename(away)
    with pytest.raises(ArchiveDamaged, match=r"record 1: subject 1, who is in it, is not in subject-keys"):
        list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    assert empty.read_now(contents)["ledger_events"] == []
    away.rename(book.archive_dir / "subject-keys")
    list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    assert empty.read_now(contents) == book.database.read_now(contents)


async def test_erasing_somebody_destroys_their_keys_in_the_archive_too(book: Book, empty: Database) -> None:
    await book.fill()
    stored = book.database.read_now(lambda connection: connection.execute(select(subjects)).all())
    gone = [bytes(row.key) for row in stored if row.number in erased_numbers(book)]
    assert gone
    held = b"".join(path.read_bytes() for path in book.archive_dir.rglob("*") if path.is_file())
    assert all(key in held for key in gone)
    erased = book.database.write_now(ledger.erase, LEDGER_KEY, "acme", "user", "bob", now_us=11)
    await book.archived()
    held = b"".join(path.read_bytes() for path in book.archive_dir.rglob("*") if path.is_file())
    assert not any(key in held for key in gone)
    assert b"bob" not in held
    list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=12))
    assert empty.read_now(contents) == book.database.read_now(contents)
    newest = empty.read_now(ledger.newest_events, "acme", ledger_key=LEDGER_KEY, limit=100)
    assert sum(one.subject_id == ERASED for one in newest) == erased.events == 2
    report = verification_of(empty, LEDGER_KEY)
    assert (report.findings, report.rollups_match, report.erased_events) == ([], True, 2)


def erased_numbers(book: Book) -> list[int]:
    """The numbers that erasing bob would erase, without doing it."""

    class Undone(Exception):
        pass

    found: list[int] = []

    def look(connection: Connection) -> None:
        found.extend(ledger.erase(connection, LEDGER_KEY, "acme", "user", "bob", now_us=1).numbers)
        raise Undone

    with pytest.raises(Undone):
        book.database.write_now(look)
    return found


async def test_a_subject_met_after_an_erasure_of_another_keeps_its_key(book: Book) -> None:
    await book.fill()
    book.database.write_now(ledger.erase, LEDGER_KEY, "acme", "user", "bob", now_us=11)
    book.record(batch(21, 22, subject_id="carol"))
    await book.archived()
    held = {subject.number: subject for subject in SubjectKeyFiles(book.archive_dir).all()}
    stored = book.database.read_now(lambda connection: connection.execute(select(subjects)).all())
    assert {row.number: (row.key, row.erased_at is None) for row in stored} == {
        number: (subject.key, subject.erased_at is None) for number, subject in held.items()
    }


async def test_what_was_committed_and_not_archived_is_archived_by_the_next_look(book: Book) -> None:
    await book.fill()
    book.archive.close()
    book.record(batch(13, 16))
    book.archive = book.follow()
    await book.archived()
    assert [one.number for one in read(book.archive_dir, 0, DEPLOYMENT)] == [1, 2, 3, 4]
    assert book.archive.counts.lag == {0: 0, 1: 0, 2: 0, 3: 0}


async def test_a_torn_record_is_archived_again(book: Book, empty: Database) -> None:
    await book.fill()
    book.archive.close()
    path = files_of(book.archive_dir / "shard-0")[-1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    book.archive = book.follow()
    await book.archived()
    list(rebuild(empty, book.archive_dir, DEPLOYMENT, LEDGER_KEY, now_us=9))
    assert empty.read_now(contents) == book.database.read_now(contents)


async def test_the_command_rebuilds_a_database_and_refuses_what_it_cannot(
    book: Book, tmp_path: Path, licet_command: CommandLine
) -> None:
    await book.fill()
    state = tmp_path / "state"
    arguments = ("ledger", "rebuild", "--from-archive", book.archive_dir, "--state-dir", state)
    without_key = licet_command(*arguments)
    assert (without_key.code, "ledger-key" in without_key.err) == (1, True)
    (state / LEDGER_KEY_FILE).write_text(LEDGER_KEY.secret.hex() + "\n")
    done = licet_command(*arguments, "--json")
    assert done.code == 0, done.err
    assert done.json == {"deployment": DEPLOYMENT, "ledger_generation": 2, "blocks": 5, "events": 17}
    again = licet_command(*arguments)
    assert (again.code, "nothing was changed" in again.out) == (0, True)
    rebuilt = Database(f"sqlite:///{state / 'licet.db'}")
    assert rebuilt.read_now(contents) == book.database.read_now(contents)
    rebuilt.close()
    nothing = licet_command("ledger", "rebuild", "--from-archive", tmp_path, "--state-dir", state)
    assert (nothing.code, "holds no archive" in nothing.err) == (1, True)
    path = files_of(book.archive_dir / "shard-0")[0]
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    (state / "licet.db").unlink()
    damaged = licet_command(*arguments)
    assert (damaged.code, str(path) in damaged.err) == (1, True)


async def test_a_server_does_not_start_with_an_archive_that_is_ahead_of_its_ledger(book: Book, tmp_path: Path) -> None:
    await book.fill()
    book.archive.close()
    config = ServerConfig(state_dir=tmp_path, archive_dir=book.archive_dir)
    fresh = opened(tmp_path / "restored.db")
    with pytest.raises(StartError, match="does not fit the ledger") as refused:
        _open_archive(config, fresh, DEPLOYMENT)
    assert "licet ledger rebuild --from-archive" in refused.value.fix
    other = opened(tmp_path / "other.db")
    with pytest.raises(StartError, match="belongs to shard 0 of deployment"):
        _open_archive(config, other, "e" * 32)


@pytest.fixture
async def running(tmp_path: Path, valkey_process: ValkeyProcess) -> AsyncIterator[Deployment]:
    async with deployment(tmp_path / "state", valkey_process.url, start=False) as made:
        made.archive_dir = tmp_path / "archive"
        await made.start()
        yield made


async def send(running: Deployment, one: UsageBatch) -> None:
    await running.redis.xadd(STREAM, {"b": one.pack()})


async def acked(running: Deployment, watermark: int) -> None:
    log = log_id(SIDECAR, 1)

    async def there() -> bool:
        data = await running.redis.hget(NAMES.acked(), log)
        return bool(data) and running.verifier.verify(data, kind=ACK, key=log).revision == watermark

    await until(there)


async def test_nothing_is_acknowledged_before_it_is_archived(
    running: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert running.archive_dir is not None
    await send(running, batch(1, 10))
    await acked(running, 10)
    append = ShardArchive.append

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise ArchiveUnavailable("No space left on device")

    monkeypatch.setattr(ShardArchive, "append", full)
    await send(running, batch(11, 20))
    await until(lambda: has_trouble(running))
    await until(lambda: has_events(running, 20))
    assert "No space left" in next(iter(running.plane.drain.trouble.values()))
    assert (await running.redis.xpending(STREAM, GROUP))["pending"] == 1
    await acked(running, 10)
    monkeypatch.setattr(ShardArchive, "append", append)
    await acked(running, 20)
    archived = [ArchivedBlock.unpack(one.data) for one in read(running.archive_dir, usage_shard(SIDECAR), DEPLOYMENT)]
    assert sum(len(one.events) for one in archived) == 20
    assert "licet_archive_failures_total" in running.plane.metrics.render().decode()


async def test_erasing_by_the_api_says_whether_the_archive_followed(
    running: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    await send(running, batch(1, 2, subject_id="bob"))
    await send(running, batch(3, 4, subject_id="eve"))
    await acked(running, 4)
    transport = httpx.ASGITransport(make_app(running.plane))
    headers = {"Authorization": f"Bearer {running.admin_key}"}
    path = "/v1/tenants/acme/subjects/erase"
    async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
        assert (await client.post(path, json={"type": "user", "id": "bob"})).json()["archive"] == "erased"

        def full(*_args: Any, **_kwargs: Any) -> None:
            raise ArchiveUnavailable("No space left on device")

        monkeypatch.setattr(follower.SubjectKeyFiles, "erase", full)
        erased = (await client.post(path, json={"type": "user", "id": "eve"})).json()
        assert (erased["events"], erased["archive"]) == (2, "waits: No space left on device")


async def has_trouble(running: Deployment) -> bool:
    return bool(running.plane.drain.trouble)


async def has_events(running: Deployment, count: int) -> bool:
    found: int = await running.plane.database.read(recorded)
    return found == count


def recorded(connection: Connection) -> int:
    return sum(connection.scalars(select(shards.c.events)))
