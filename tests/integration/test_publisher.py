"""The publisher on a real server: what is published, in which order, and what a loss of Redis leads to."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from licet.domain.catalog import Catalog, Entitlement, Feature, LicenseStatus, Limit, Plan, seats_key
from licet.domain.catalog_wire import license_from_wire
from licet.domain.ids import LimitKey
from licet.domain.windows import Period, window_at
from licet.wire.documents import Manifest, catalog_of_chunks
from licet.wire.signing import Statement
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.grants import GrantAsked
from licet_control_plane.publisher.documents import RedisDocuments
from licet_control_plane.store import ledger
from licet_control_plane.store.revisions import Revision
from tests.support.control_plane import MONTHLY, NAMES, Deployment, catalog, deployment, heartbeat, until
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess


@pytest.fixture
async def running(
    tmp_path: Path, valkey_process: ValkeyProcess, long_suite_database_url: str
) -> AsyncIterator[Deployment]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=long_suite_database_url) as made:
        yield made


async def test_publishes_chunks_manifest_and_change_of_a_bundle(running: Deployment) -> None:
    revision = await running.push(100)
    statement, head = await running.headed(revision)
    assert head.run_id == await running.run_id()
    assert head.live == 1
    assert statement.deployment == "d" * 32
    document = await running.document("bundle", "bundle")
    assert document is not None
    manifest = Manifest.from_payload(document.payload)
    chunks = [await running.redis.get(NAMES.chunk(digest)) for digest in manifest.chunks]
    assert catalog_of_chunks(chunks, manifest.chunks) == catalog(100)
    assert await running.changes() == [(1, "bundle", "bundle")]


async def test_a_new_license_has_an_open_mark_with_its_limits(running: Deployment) -> None:
    await running.push(100)
    revision = await running.license("acme")
    await running.headed(revision)
    mark = await running.opened("acme")
    assert mark.amounts == {MONTHLY: 100}
    assert mark.revision == revision
    document = await running.document("license", "acme")
    assert document is not None
    assert document.revision == revision
    assert document.payload["plan"] == "pro"


async def test_grants_rates_and_seats_are_published_beside_the_limits(running: Deployment) -> None:
    rate = Limit(LimitKey("reports:second.rate"), 5, Period.SECOND, burst=20)
    limits = (Limit(MONTHLY, 100, Period.MONTH), rate)
    plan = Plan("pro", {"reports": Entitlement(limits=limits), "editor": Entitlement(seats=25, heartbeat_s=60)})
    changes = running.plane.changes
    await changes.push(Catalog.of([Feature("reports"), Feature("editor"), plan]), [], by="test")
    await running.license("acme")
    limits_alone = {MONTHLY: 100, rate.key: 5_000, seats_key("editor"): 25}
    assert (await running.opened("acme")).amounts == limits_alone

    asked = GrantAsked(MONTHLY, 1_000, "order-17", lasts_s=3_600)
    stored, grant, _ = await changes.add_grant("acme", asked, by="test")
    await running.headed(stored.revision)
    mark = await running.opened("acme")
    assert (mark.amounts, mark.revision) == ({**limits_alone, grant.key: 1_000}, stored.revision)
    document = await running.document("license", "acme")
    assert document is not None
    assert license_from_wire(document.payload).grants == (grant,)
    assert (await running.changes())[-1] == (stored.revision, "license", "acme")

    repeated, _, new = await changes.add_grant("acme", asked, by="test")
    assert (repeated.revision, new) == (stored.revision, False)

    revoked = await changes.revoke_grant("acme", "order-17", by="test")
    await running.headed(revoked.revision)
    assert (await running.opened("acme")).amounts == limits_alone


async def test_a_grant_is_there_again_after_a_wipe(running: Deployment) -> None:
    await running.push(100)
    await running.license("acme")
    stored, grant, _ = await running.plane.changes.add_grant("acme", GrantAsked(MONTHLY, 7, lasts_s=3_600), by="test")
    await running.headed(stored.revision)
    await running.redis.flushall()
    await running.headed(stored.revision, epoch=2)
    assert (await running.opened("acme", epoch=2)).amounts == {MONTHLY: 100, grant.key: 7}


async def test_a_bundle_changes_the_limits_of_its_tenants_before_its_change_is_announced(running: Deployment) -> None:
    await running.push(100)
    await running.license("acme")
    revision = await running.push(40)
    await running.headed(revision)
    mark = await running.opened("acme")
    assert (mark.amounts, mark.revision) == ({MONTHLY: 40}, revision)


async def test_a_push_reaches_redis_in_a_fraction_of_a_second(running: Deployment) -> None:
    await running.headed(0)
    begun = time.monotonic()
    revision = await running.push(1)
    await until(lambda: _is_last(running, revision))
    assert time.monotonic() - begun < 0.5


async def test_a_chunk_that_no_manifest_needs_expires_and_one_that_comes_back_stays(running: Deployment) -> None:
    await running.push(1)
    first = Manifest.from_payload((await until(lambda: running.document("bundle", "bundle"))).payload).chunks
    await running.push(2)
    await running.headed(await running.push(3))
    current = Manifest.from_payload((await until(lambda: running.document("bundle", "bundle"))).payload).chunks
    outdated = set(first) - set(current)
    assert outdated
    for digest in outdated:
        assert 0 < await running.redis.ttl(NAMES.chunk(digest)) <= 3_600
    await running.headed(await running.push(1))
    for digest in first:
        assert await running.redis.ttl(NAMES.chunk(digest)) == -1


async def test_a_wiped_server_gets_everything_back_under_a_new_epoch(running: Deployment) -> None:
    await running.push(100)
    await running.license("acme")
    last = await running.license("globex")
    _, before = await running.headed(last)
    await running.redis.flushall()
    statement, head = await running.headed(last, epoch=before.epoch + 1)
    assert statement.revision == last
    assert await running.changes() == [(last, "resync", "")]
    assert await running.document("license", "acme")
    assert await running.document("bundle", "bundle")
    mark = await running.opened("acme", epoch=head.epoch)
    assert mark.amounts == {MONTHLY: 100}


async def test_changes_go_on_in_order_after_a_wipe(running: Deployment) -> None:
    await running.push(100)
    await running.headed(await running.license("acme"))
    await running.redis.flushall()
    last = await running.license("globex")
    await running.headed(last)
    revisions = [revision for revision, _, _ in await running.changes()]
    assert revisions[-1] == last
    assert revisions == sorted(set(revisions))


async def test_a_restarted_server_with_its_data_only_learns(running: Deployment, valkey_process: ValkeyProcess) -> None:
    await running.push(100)
    last = await running.license("acme")
    _, before = await running.headed(last)
    changes = await running.changes()
    await asyncio.to_thread(valkey_process.restart)
    run_id = await until(running.run_id)
    _, head = await running.headed(last, run_id=run_id)
    assert head.epoch == before.epoch
    assert await running.changes() == changes

    async def open_under_the_new_run() -> bool:
        mark = await running.mark("acme")
        return mark is not None and mark.is_open and mark.pair.run == run_id

    await until(open_under_the_new_run)


async def test_learning_waits_for_a_sidecar_that_has_not_asserted(running: Deployment) -> None:
    await running.push(100)
    last = await running.license("acme")
    await running.headed(last)
    beating = asyncio.create_task(_beat(running, asserts=False))
    await until(lambda: _knows(running, "a" * 32))
    await running.redis.flushall()
    _, head = await running.headed(last, epoch=2)
    await until(lambda: _waits_for(running, "a" * 32))
    mark = await running.mark("acme")
    assert mark is not None
    assert not mark.is_open
    beating.cancel()
    beating = asyncio.create_task(_beat(running, asserts=True))
    await running.opened("acme", epoch=head.epoch)
    beating.cancel()


async def test_opening_counts_what_the_ledger_knows_was_spent(running: Deployment) -> None:
    await running.push(100)
    last = await running.license("acme")
    await running.headed(last)
    start, end = window_at(Period.MONTH, int(time.time()))
    spent = DecodedBatch.of(batch(1, 30, sidecar="b" * 32, spends=[(f"{MONTHLY}:{start}", 2)]).pack())
    await running.plane.database.write(ledger.record, 0, [spent], keys=running.keys, now_us=1)
    await running.redis.flushall()
    await running.headed(last, epoch=2)
    mark = await running.opened("acme", epoch=2)
    quota = await running.redis.hgetall(NAMES.quota("acme", f"{MONTHLY}:{start}"))
    assert quota[b"sum"] == b"60"
    assert mark.markers[MONTHLY][:2] == (start, end)


async def test_a_lost_mark_is_begun_again_in_learning_when_a_sidecar_asks(running: Deployment) -> None:
    await running.push(100)
    await running.headed(await running.license("acme"))
    await running.redis.delete(NAMES.limits("acme"))
    await running.redis.xadd(NAMES.asks(), {"tenant": "acme", "why": "mark-missing"})
    mark = await until(lambda: running.mark("acme"))
    assert mark.pair.epoch == 2
    await running.opened("acme", epoch=2)
    await until(lambda: _answered_asks(running))


async def test_a_lost_quota_puts_its_tenant_in_learning(running: Deployment) -> None:
    await running.push(100)
    await running.license("acme")
    await running.headed(await running.license("globex"))
    await running.redis.xadd(NAMES.asks(), {"tenant": "acme", "why": "quota-lost"})
    await running.opened("acme", epoch=2)
    other = await running.mark("globex")
    assert other is not None
    assert other.pair.epoch == 1
    await running.headed(0, epoch=2)


async def test_an_ask_about_nobodys_tenant_makes_no_mark(running: Deployment) -> None:
    await running.push(100)
    await running.headed(await running.license("acme"))
    await running.redis.xadd(NAMES.asks(), {"tenant": "nobody", "why": "mark-missing"})
    await until(lambda: _answered_asks(running))
    await running.headed(0)
    assert await running.mark("nobody") is None


async def test_another_deployments_redis_stops_the_publisher(tmp_path: Path, valkey_process: ValkeyProcess) -> None:
    async with deployment(tmp_path / "state", valkey_process.url, start=False) as made:
        await made.redis.set(NAMES.epoch(), "somebody-else:7")
        plane = await made.start()
        await until(lambda: _state(made, "stopped"))
        assert "somebody-else" in plane.publisher.status.reason
        assert plane.publisher.status.fix
        assert await made.head() is None


async def test_a_restored_database_does_not_publish_until_a_new_generation(
    tmp_path: Path, valkey_process: ValkeyProcess
) -> None:
    state, backup = tmp_path / "state", tmp_path / "backup"
    async with deployment(state, valkey_process.url) as made:
        await made.push(100)
        await made.headed(await made.license("acme"))
        await made.stop()
        shutil.copytree(state, backup)
        await made.start()
        newest = await made.license("after-the-backup")
        await made.headed(newest)
        await made.stop()
        shutil.rmtree(state)
        shutil.copytree(backup, state)

        await made.start()
        await until(lambda: _state(made, "stopped"))
        assert "--new-generation" in made.plane.publisher.status.fix
        await made.stop()

        await made.start(new_generation=True)
        statement, _ = await made.headed(newest + 1)
        assert statement.generation == 2
        document = await made.document("license", "acme")
        assert document is not None
        assert document.version > (1, newest)
        withdrawn = await made.document("license", "after-the-backup")
        assert withdrawn is not None
        assert withdrawn.payload["status"] == LicenseStatus.CANCELED
        assert withdrawn.revision > newest
        await made.stop()
        await made.start()
        newest = await made.license("globex")
        await made.headed(newest)
        await made.stop()

        # The same backup once more, which knows nothing of that generation: it is not to be begun twice.
        shutil.rmtree(state)
        shutil.copytree(backup, state)
        await made.start(new_generation=True)
        statement, _ = await made.headed(newest + 1)
        assert statement.generation == 3


async def beat(running: Deployment, sidecar: str, **changes: Any) -> None:
    await running.redis.hset(NAMES.sidecars(), sidecar, heartbeat(sidecar, **changes).pack())


async def test_a_sidecar_that_acted_on_more_stops_the_publisher_until_a_new_generation(running: Deployment) -> None:
    await running.push(100)
    newest = await running.license("acme")
    await running.headed(newest)
    deployment = running.plane.publisher._meta.deployment
    await beat(running, "a" * 32, deployment="of another", acted_generation=1, acted_revision=newest + 9)
    await beat(running, "b" * 32, deployment=deployment, acted_generation=10_000, acted_revision=1)
    await beat(running, "c" * 32, deployment=deployment, acted_generation=1, acted_revision=newest)
    await running.headed(await running.license("globex"))
    assert running.plane.publisher.status.state == "publishing"

    await beat(running, "d" * 32, deployment=deployment, acted_generation=4, acted_revision=1)
    await until(lambda: _state(running, "stopped"))
    status = running.plane.publisher.status
    assert f"{'d' * 32}' ('127.0.0.1:7420') acted on revision 1 of generation 4" in status.reason
    assert "--new-generation" in status.fix
    await running.stop()
    await running.start(new_generation=True)
    statement, _ = await running.headed(newest + 4)
    assert statement.generation == 5


async def test_a_head_that_names_more_than_was_published_stops_the_publisher(running: Deployment) -> None:
    await running.push(100)
    newest = await running.license("acme")
    await running.headed(newest)
    publisher = running.plane.publisher
    await running.stop()
    statement = Statement(publisher._meta.deployment, "head", "head", 1, newest + 1, {})
    await running.redis.set(NAMES.head(), publisher._key.sign(statement))
    await running.start()
    await until(lambda: _state(running, "stopped"))
    assert f"is at revision {newest + 1}" in running.plane.publisher.status.reason


async def test_nothing_of_the_generation_before_is_written_once_another_begins(running: Deployment) -> None:
    await running.push(100)
    await running.headed(await running.license("acme"))
    await running.stop()
    await running.redis.flushall()
    newest = 40
    entry = {"kind": "license", "key": "ghost", "digest": ""}
    await running.redis.xadd(NAMES.changes(), entry, f"{newest}-0")
    written: list[tuple[int, int]] = []
    set_documents = RedisDocuments.set_documents

    async def noted(self: RedisDocuments, deployment: str, rows: Sequence[Revision]) -> None:
        written.extend((row.generation, row.revision) for row in rows)
        await set_documents(self, deployment, rows)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RedisDocuments, "set_documents", noted)
        await running.start(new_generation=True)
        await running.headed(newest + 2)
    assert written == [(2, newest + 1), (2, newest + 2)]


async def test_what_a_lost_database_left_behind_is_removed_after_a_loss(running: Deployment) -> None:
    await running.push(100)
    revision = await running.license("acme")
    await running.headed(revision)
    publisher = running.plane.publisher
    statement = Statement(publisher._meta.deployment, "license", "ghost", 1, revision + 1, {})
    async with running.redis.pipeline(transaction=True) as pipe:
        pipe.flushall()
        pipe.set(NAMES.license("ghost"), publisher._key.sign(statement))
        pipe.set(NAMES.license("odd"), b"not signed")
        await pipe.execute()
    await running.headed(revision, epoch=2)
    assert await running.redis.get(NAMES.license("ghost")) is None
    assert await running.document("license", "acme") is not None


async def test_a_document_is_never_replaced_by_an_older_one(running: Deployment) -> None:
    await running.push(100)
    await running.headed(await running.license("acme"))
    old = await running.redis.get(NAMES.license("acme"))
    await running.plane.changes.update_license("acme", {"status": LicenseStatus.SUSPENDED}, if_seen=None, by="test")
    await running.headed(3)
    new = await running.redis.get(NAMES.license("acme"))
    assert new != old
    await running.plane.publisher._copier.republish("d" * 32)
    assert await running.redis.get(NAMES.license("acme")) == new


async def test_a_different_change_under_a_revision_stops_the_publisher(running: Deployment) -> None:
    await running.headed(0)
    await running.redis.xadd(NAMES.changes(), {"kind": "license", "key": "x", "digest": "other"}, "1-0")
    await running.push(100)
    await until(lambda: _state(running, "stopped"))
    assert "revision 1" in running.plane.publisher.status.reason


async def test_publishes_again_what_a_killed_publisher_had_announced(running: Deployment) -> None:
    await running.push(100)
    await running.headed(await running.license("acme"))
    await running.stop()

    def forget(connection: object) -> None:
        from licet_control_plane.store.schema import revisions

        connection.execute(revisions.update().values(published_at=None))  # type: ignore[attr-defined]

    from licet_control_plane.store.database import Database

    database = Database(running.plane.config.database)
    database.write_now(forget)
    database.close()
    before = await running.changes()
    await running.redis.delete(NAMES.head())
    await running.start()
    await running.headed(2)
    assert await running.changes() == before


async def test_a_server_that_starts_without_redis_publishes_once_it_is_there(
    tmp_path: Path, valkey_process: ValkeyProcess
) -> None:
    valkey_process.stop()
    async with deployment(tmp_path / "state", valkey_process.url) as made:
        await until(lambda: _state(made, "waiting"))
        assert not made.plane.publisher.status.connected
        revision = await made.push(100)
        await asyncio.to_thread(valkey_process.start)
        await made.headed(revision)


async def test_a_sidecar_that_leaves_is_not_waited_for(running: Deployment) -> None:
    await running.push(100)
    last = await running.license("acme")
    await running.headed(last)
    beating = asyncio.create_task(_beat(running, asserts=False))
    await until(lambda: _knows(running, "a" * 32))
    beating.cancel()
    await running.redis.hdel(NAMES.sidecars(), "a" * 32)
    await until(lambda: _is_gone(running, "a" * 32))
    await running.redis.flushall()
    await running.opened("acme", epoch=2)


async def _beat(running: Deployment, *, asserts: bool) -> None:
    while True:
        head = await running.head()
        pair = (head[1].epoch, head[1].run_id) if head and asserts else (0, "")
        beat = heartbeat("a" * 32, asserted_epoch=pair[0], asserted_run=pair[1], asserted_ms=2**52)
        await running.redis.hset(NAMES.sidecars(), "a" * 32, beat.pack())
        await asyncio.sleep(0.2)


async def _knows(running: Deployment, sidecar: str) -> bool:
    return sidecar in running.plane.fleet.sidecars


async def _is_gone(running: Deployment, sidecar: str) -> bool:
    return running.plane.fleet.sidecars[sidecar].gone


async def _waits_for(running: Deployment, sidecar: str) -> bool:
    return sidecar in running.plane.publisher.status.waited_for


async def _state(running: Deployment, state: str) -> bool:
    return running.plane.publisher.status.state == state


async def _is_last(running: Deployment, revision: int) -> bool:
    changes = await running.changes()
    return bool(changes) and changes[-1][0] == revision


async def _answered_asks(running: Deployment) -> bool:
    return await running.redis.xlen(NAMES.asks()) == 0 and not running.plane.asks.waiting
