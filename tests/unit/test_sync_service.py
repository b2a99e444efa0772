"""Syncing: what is published takes force in order and whole; what is lost, old or forged changes nothing."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from licet.domain.catalog import License, LicenseStatus, Policy, Rule, RuleEffect
from licet.v1 import approval_pb2 as pb
from licet.wire import documents, envelope
from licet.wire.documents import Manifest
from licet_sidecar.adapters.usage_log import UsageLogError
from licet_sidecar.core.sync import Change
from licet_sidecar.ports import LinkRefused
from licet_sidecar.services import syncing
from licet_sidecar.services.syncing import SNAPSHOT_FILE
from tests.support.fake_state_source import FakePublisher, FakeStateSource
from tests.support.published import OTHER_KEY, Signer, catalog
from tests.support.sidecar import FakeSidecar, LinkDown, World, ask, hurried, running, until

NO = Policy("no", ("*",), (Rule("all", RuleEffect.DENY),))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(catalog())
    made.license("acme")
    return made


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as made:
        yield made


async def reason(sidecar: FakeSidecar, tenant: str = "acme") -> str:
    response = await sidecar.check(ask(tenant, mode=pb.MODE_PEEK))
    return pb.Reason.Name(response.reason).removeprefix("REASON_")


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


# What is published takes force


async def test_a_pushed_bundle_takes_force_at_once(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar) == "OK"
    await sidecar.synced(world.push(catalog(NO)))
    assert await reason(sidecar) == "POLICY_DENIED"
    assert sidecar.tally.resyncs == 1


async def test_a_changed_license_takes_force_at_once(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar) == "OK"
    await sidecar.synced(world.license("acme", "free"))
    assert await reason(sidecar) == "NOT_ENTITLED"


async def test_a_change_of_a_tenant_that_is_not_held_reads_nothing(sidecar: FakeSidecar, world: World) -> None:
    await until(lambda: world.source.reads[-1] == "read_changes")
    before = len([read for read in world.source.reads if read != "read_changes"])
    await sidecar.synced(world.license("globex"))
    assert len([read for read in world.source.reads if read != "read_changes"]) == before


async def test_only_chunks_that_changed_are_read(sidecar: FakeSidecar, world: World) -> None:
    wanted: list[str] = []
    read = world.source.read_chunks

    async def counting(digests: Any) -> Any:
        wanted.extend(digests)
        return await read(digests)

    world.source.read_chunks = counting  # type: ignore[method-assign]
    await sidecar.synced(world.push(catalog(NO)))
    assert len(wanted) == 1


async def test_an_empty_deployment_is_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried(monkeypatch)
    world = World(tmp_path)
    world.publisher.beat(world.clock.us)
    async with running(world) as sidecar:
        assert await reason(sidecar) == "NO_LICENSE"
        world.push(catalog())
        await sidecar.synced(world.license("acme"))
        assert await reason(sidecar) == "OK"


async def test_nothing_is_ready_before_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried(monkeypatch)
    world = World(tmp_path)
    world.publisher.push(catalog())
    async with running(world) as sidecar:
        await until(lambda: "no head" in sidecar.sync.problem)
        assert not sidecar.sync.ready.is_set()
        world.publisher.beat(world.clock.us)
        await sidecar.synced()


async def test_who_starts_while_something_is_pushed_is_not_stale_until_the_next_head(world: World) -> None:
    world.publisher.push(catalog(NO))  # and the head still speaks of what was before
    async with running(world) as sidecar:
        assert await reason(sidecar) == "POLICY_DENIED"
        assert not sidecar.engine.is_stale(world.clock.us)


async def test_documents_that_arrive_before_their_change_wait_for_it(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar) == "OK"
    world.publisher.push(catalog(NO), announce=False)
    world.source.announce(Change(4, "license", "acme"))  # a gap, so that everything is read while 3 is not announced
    await until(lambda: sidecar.tally.resyncs == 2)
    await turns(50)
    assert (sidecar.engine.revision, await reason(sidecar)) == (2, "OK")
    world.source.changes[-1:] = []
    world.publisher.announce()
    await sidecar.synced(3)
    assert await reason(sidecar) == "POLICY_DENIED"


async def test_a_license_newer_than_the_changes_read_waits_for_them(sidecar: FakeSidecar, world: World) -> None:
    world.publisher.license(License("globex", "pro"), announce=False)
    waiting = asyncio.ensure_future(reason(sidecar, "globex"))
    await turns(50)
    assert not waiting.done()
    assert "globex" not in sidecar.engine.tenants
    world.publisher.announce()
    assert await waiting == "OK"


async def test_two_documents_read_for_one_change_are_of_one_revision(sidecar: FakeSidecar, world: World) -> None:
    """While the bundle of revision 3 is read, revision 4 replaces the license: both or neither."""
    assert await reason(sidecar) == "OK"

    async def meanwhile() -> None:
        del world.source.between["read_manifest"]
        world.publisher.license(License("acme", "free"))

    world.source.between["read_manifest"] = meanwhile
    seen: set[tuple[int, str]] = set()
    world.push(catalog(NO))
    while sidecar.engine.revision < 4:
        seen.add((sidecar.engine.revision, await reason(sidecar)))
        await asyncio.sleep(0)
    seen.add((sidecar.engine.revision, await reason(sidecar)))
    assert seen <= {(2, "OK"), (3, "POLICY_DENIED"), (4, "NOT_ENTITLED")}


# Gaps


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_lost_change_is_noticed_and_everything_read_again(
    sidecar: FakeSidecar, world: World, lost: int
) -> None:
    assert await reason(sidecar) == "OK"
    source = world.source
    held, source.changes = source.changes, []
    world.push(catalog())
    world.license("globex")
    world.license("acme", "free")
    new = [change for position, change in enumerate(source.changes) if position != lost]
    source.changes = []
    for change in held + new:
        source.announce(change)
    if lost == 2:  # nothing follows on it: the heads tell
        for _ in range(3):
            world.publisher.beat(world.clock.us)
            sidecar.hear_head()
        source.announce(Change(2, "license", "acme"))
    await until(lambda: sidecar.engine.revision >= 5 or lost == 2)
    if lost == 2:
        await sidecar.synced(5)
    assert await reason(sidecar) == "NOT_ENTITLED"
    assert sidecar.tally.resyncs == 2


async def test_a_repeated_change_is_noticed(sidecar: FakeSidecar, world: World) -> None:
    world.source.announce(Change(4, "license", "acme"))
    world.publisher.revision = 4
    world.publisher.beat(world.clock.us)
    await sidecar.synced(4)
    assert sidecar.tally.resyncs == 2


async def test_a_change_of_an_unknown_kind_leads_to_a_resync(sidecar: FakeSidecar, world: World) -> None:
    world.publisher.revision = 3
    world.source.announce(Change(3, "resync", ""))
    world.publisher.beat(world.clock.us)
    await sidecar.synced(3)
    assert sidecar.tally.resyncs == 2


# Loads


async def test_a_change_during_a_load_is_not_missed(sidecar: FakeSidecar, world: World) -> None:
    async def meanwhile() -> None:
        del world.source.between["read_license"]
        revision = world.license("acme", "free")
        await until(lambda: sidecar.engine.revision == revision)

    world.source.between["read_license"] = meanwhile
    assert await reason(sidecar) == "NOT_ENTITLED"


async def test_a_license_made_during_a_load_is_not_missed(sidecar: FakeSidecar, world: World) -> None:
    async def meanwhile() -> None:
        del world.source.between["read_license"]
        revision = world.license("globex")
        await until(lambda: sidecar.engine.revision == revision)

    world.source.between["read_license"] = meanwhile
    assert await reason(sidecar, "globex") == "OK"


async def test_a_new_license_ends_a_remembered_absence(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar, "globex") == "NO_LICENSE"
    assert await reason(sidecar, "globex") == "NO_LICENSE"
    assert sidecar.tally.license_loads == 1
    await sidecar.synced(world.license("globex"))
    assert await reason(sidecar, "globex") == "OK"


async def test_an_absence_is_believed_for_a_while_only(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar, "globex") == "NO_LICENSE"
    world.advance(31)
    assert await reason(sidecar, "globex") == "NO_LICENSE"
    assert sidecar.tally.license_loads == 2


async def test_a_resync_believes_no_absence(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar, "globex") == "NO_LICENSE"
    world.publisher.license(License("globex", "pro"), announce=False)  # its change is lost
    world.license("initech")
    await sidecar.synced()
    assert await reason(sidecar, "globex") == "OK"


async def test_what_the_server_before_did_not_have_is_not_believed_once_another_is_followed(
    sidecar: FakeSidecar, world: World
) -> None:
    """While everything is read from the server that took over, a load is answered by the one before."""
    source = world.source
    before = source.head, dict(source.licenses), source.run_id

    async def meanwhile() -> None:
        del source.between["read_manifest"]
        after = source.head, source.licenses, source.run_id
        source.head, source.licenses, source.run_id = before
        assert await reason(sidecar, "globex") == "NO_LICENSE"
        source.head, source.licenses, source.run_id = after

    source.between["read_manifest"] = meanwhile
    source.run_id, source.changes = "run2", []
    revision = world.publisher.license(License("globex", "pro"), announce=False)
    world.publisher.beat(world.clock.us)
    source.announce(Change(revision, "resync", ""))  # names no tenant
    await until(lambda: sidecar.engine.revision == revision)
    assert await reason(sidecar, "globex") == "OK"


async def test_nothing_is_loaded_where_heads_went_back_without_another_run(sidecar: FakeSidecar, world: World) -> None:
    """Redis was emptied, and filled again by a control plane whose database was restored from a backup."""
    world.license("globex")
    await sidecar.synced()
    sidecar.hear_head()
    world.advance(1)
    world.source.licenses.clear()
    world.source.pairs.clear()
    world.publisher.revision -= 1
    world.publisher.beat(world.clock.us)
    assert await reason(sidecar, "globex") == "DEGRADED_DENY"


async def test_many_checks_of_a_cold_tenant_load_it_once(sidecar: FakeSidecar) -> None:
    assert set(await asyncio.gather(*(reason(sidecar) for _ in range(20)))) == {"OK"}
    assert sidecar.tally.license_loads == 1


async def test_absence_on_a_server_nobody_checked_is_not_believed(sidecar: FakeSidecar, world: World) -> None:
    world.source.run_id = "run2"  # a failover; the head still speaks of the server before
    assert await reason(sidecar, "globex") == "DEGRADED_DENY"
    world.source.head = None
    assert await reason(sidecar, "initech") == "DEGRADED_DENY"
    world.publisher.beat(world.clock.us)
    assert await reason(sidecar, "globex") == "NO_LICENSE"


async def test_a_caller_that_leaves_does_not_end_the_load_of_others(sidecar: FakeSidecar) -> None:
    one, two = (asyncio.ensure_future(reason(sidecar)) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    assert await two == "OK"


async def test_licenses_beyond_the_bound_make_room_least_recently_asked_first(world: World) -> None:
    for tenant in ("b", "c"):
        world.license(tenant)
    async with running(world, tenants_max=2) as sidecar:
        for tenant in ("acme", "b", "acme", "c"):
            assert await reason(sidecar, tenant) == "OK"
        assert list(sidecar.engine.tenants) == ["acme", "c"]


# What must not be believed


def _truncated(world: World) -> bytes:
    return world.source.licenses["acme"][:-5]


def _flipped(world: World) -> bytes:
    data = bytearray(world.source.licenses["acme"])
    data[-3] ^= 1
    return bytes(data)


def _other_tenants(world: World) -> bytes:
    return world.publisher.signer.license(License("globex", "pro"), world.publisher.revision + 1)


def _older(world: World) -> bytes:
    return world.publisher.signer.license(License("acme", "pro"), 1)


def _other_key(world: World) -> bytes:
    return Signer(OTHER_KEY).license(License("acme", "pro"), world.publisher.revision + 1)


def _other_deployment(world: World) -> bytes:
    return Signer(deployment="e" * 32).license(License("acme", "pro"), world.publisher.revision + 1)


def _older_generation(world: World) -> bytes:
    return Signer(generation=0).license(License("acme", "pro"), 99)


def _bundle(world: World) -> bytes:
    assert world.source.manifest is not None
    return world.source.manifest


def _no_document(_: World) -> bytes:
    return b"\x93\x01\xa6signed\x01"


FORGED: list[Callable[[World], bytes]] = [
    _truncated,
    _flipped,
    _other_tenants,
    _older,
    _other_key,
    _other_deployment,
    _older_generation,
    _bundle,
    _no_document,
]


@pytest.mark.parametrize("forged", FORGED)
async def test_a_license_that_must_not_be_believed_changes_no_answer_and_is_counted(
    sidecar: FakeSidecar, world: World, forged: Callable[[World], bytes]
) -> None:
    await sidecar.synced(world.license("acme", "free"))
    assert await reason(sidecar) == "NOT_ENTITLED"
    rejected = sidecar.tally.documents_rejected
    world.source.licenses["acme"] = forged(world)
    world.publisher.revision += 1
    world.source.announce(Change(world.publisher.revision, "license", "acme"))
    await until(lambda: sidecar.tally.documents_rejected > rejected + 2)
    assert (await reason(sidecar), sidecar.engine.revision) == ("NOT_ENTITLED", 3)
    await sidecar.synced(world.license("acme"))
    assert await reason(sidecar) == "OK"


@pytest.mark.parametrize("forged", [one for one in FORGED if one is not _older])  # nothing newer is held yet
async def test_a_license_that_must_not_be_believed_is_not_loaded(
    sidecar: FakeSidecar, world: World, forged: Callable[[World], bytes]
) -> None:
    world.source.licenses["acme"] = forged(world)
    assert await reason(sidecar) == "DEGRADED_DENY"
    assert sidecar.tally.documents_rejected > 0
    assert "acme" not in sidecar.engine.tenants
    world.publisher.license(License("acme", "pro"))
    await sidecar.synced()
    assert await reason(sidecar) == "OK"


def _no_manifest(source: FakeStateSource, _: FakePublisher) -> None:
    source.manifest = None


def _missing_chunk(source: FakeStateSource, publisher: FakePublisher) -> None:
    manifest, chunks = publisher.signer.bundle(catalog(NO), publisher.revision)
    source.manifest = manifest
    for digest in set(chunks) - set(publisher.signer.bundle(catalog(), 1)[1]):
        source.chunks.pop(digest, None)


def _altered_chunk(source: FakeStateSource, publisher: FakePublisher) -> None:
    manifest, chunks = publisher.signer.bundle(catalog(NO), publisher.revision)
    source.manifest = manifest
    for digest in set(chunks) - set(publisher.signer.bundle(catalog(), 1)[1]):
        source.chunks[digest] = envelope.pack("chunk", [])


def _license_as_manifest(source: FakeStateSource, _: FakePublisher) -> None:
    source.manifest = source.licenses["acme"]


def _manifest_of_another_key(source: FakeStateSource, publisher: FakePublisher) -> None:
    source.manifest, chunks = Signer(OTHER_KEY).bundle(catalog(NO), publisher.revision)
    source.chunks.update(chunks)


def _older_manifest(source: FakeStateSource, publisher: FakePublisher) -> None:
    source.manifest, chunks = publisher.signer.bundle(catalog(NO), 0)
    source.chunks.update(chunks)


def _unknown_document(source: FakeStateSource, publisher: FakePublisher) -> None:
    chunk = envelope.pack("chunk", [{"kind": "Oracle", "name": "x"}])
    manifest = Manifest((documents.digest_of(chunk),))
    source.chunks[manifest.chunks[0]] = chunk
    source.manifest = publisher.signer.document("bundle", "bundle", publisher.revision, manifest.to_payload())


@pytest.mark.parametrize(
    "spoil",
    [
        _no_manifest,
        _missing_chunk,
        _altered_chunk,
        _license_as_manifest,
        _manifest_of_another_key,
        _older_manifest,
        _unknown_document,
    ],
)
async def test_a_bundle_that_must_not_be_believed_changes_no_answer_and_is_counted(
    sidecar: FakeSidecar, world: World, spoil: Callable[[FakeStateSource, FakePublisher], None]
) -> None:
    assert await reason(sidecar) == "OK"
    rejected = sidecar.tally.documents_rejected
    world.publisher.revision += 1
    spoil(world.source, world.publisher)
    world.source.announce(Change(world.publisher.revision, "bundle", "bundle"))
    await until(lambda: sidecar.tally.documents_rejected > rejected + 2)
    assert (await reason(sidecar), sidecar.engine.revision) == ("OK", 2)
    await sidecar.synced(world.push(catalog(NO)))
    assert await reason(sidecar) == "POLICY_DENIED"


async def test_a_wrong_public_key_never_becomes_ready_and_says_why(world: World) -> None:
    sidecar = FakeSidecar(world, public_keys=(OTHER_KEY,))
    sidecar.start()
    await until(lambda: sidecar.tally.documents_rejected > 3)
    assert not sidecar.sync.ready.is_set()
    assert world.publisher.signer.key.key_id in sidecar.sync.problem
    assert "configure the control plane's public key" in sidecar.sync.problem
    await sidecar.stop()


async def test_while_a_key_is_rotated_both_are_believed(world: World) -> None:
    async with running(world, public_keys=(OTHER_KEY, world.publisher.signer.key)) as sidecar:
        world.publisher.signer.key = OTHER_KEY
        await sidecar.synced(world.license("acme", "free"))
        assert await reason(sidecar) == "NOT_ENTITLED"


# Age


async def test_heads_alone_advance_the_age(sidecar: FakeSidecar, world: World) -> None:
    world.advance(10)
    await sidecar.synced(world.license("globex"))
    begun = world.clock.us - 10_000_000
    assert sidecar.engine.as_of_us == begun
    sidecar.hear_head()
    assert sidecar.engine.as_of_us == world.clock.us


async def test_the_age_never_goes_back(sidecar: FakeSidecar, world: World) -> None:
    early = world.publisher.beat(world.clock.us - 5_000_000)
    sidecar.hear_head(early)
    assert sidecar.engine.as_of_us == world.clock.us


async def test_a_wiped_server_and_its_silence_do_not_advance_the_age(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar) == "OK"
    before = sidecar.engine.as_of_us
    head = world.source.head
    world.source.changes.clear()
    world.source.run_id = "run2"
    world.advance(400)
    sidecar.hear_head(head, run_id="run2")
    assert (sidecar.engine.as_of_us, sidecar.tally.heads_ignored) == (before, 1)
    assert (await sidecar.check(ask(mode=pb.MODE_PEEK))).stale
    world.publisher.beat(world.clock.us)
    sidecar.hear_head()  # of another server: everything is read again
    await until(lambda: sidecar.engine.as_of_us == world.clock.us)
    assert not (await sidecar.check(ask(mode=pb.MODE_PEEK))).stale


@pytest.mark.parametrize(
    "forged",
    [
        lambda world: Signer(OTHER_KEY).head(2, "run1", world.clock.us),
        lambda world: Signer().document("head", "head", 2, {"at_us": 1}),
        lambda world: Signer().document("head", "head", 2, None),
        lambda world: Signer().document("license", "head", 2, {}),
        lambda world: world.source.head[:-1],
        lambda world: b"",
    ],
    ids=["other key", "field missing", "no fields", "no head", "truncated", "empty"],
)
async def test_a_head_that_must_not_be_believed_is_counted(
    sidecar: FakeSidecar, world: World, forged: Callable[[World], bytes]
) -> None:
    before = sidecar.engine.as_of_us
    world.advance(10)
    sidecar.sync.take_head(syncing.PulseReport(forged(world), {}, "run1"))
    assert (sidecar.engine.as_of_us, sidecar.tally.documents_rejected) == (before, 1)


async def test_a_failover_to_an_older_server_is_not_followed(sidecar: FakeSidecar, world: World) -> None:
    older = dict(world.source.licenses), world.source.manifest, list(world.source.changes)
    await sidecar.synced(world.license("acme", "free"))
    assert await reason(sidecar) == "NOT_ENTITLED"
    source = world.source
    source.licenses, source.manifest, source.changes = dict(older[0]), older[1], older[2]
    source.run_id = "run2"
    source.head = world.publisher.signer.head(2, "run2", world.clock.us)
    sidecar.hear_head()
    source.announce(Change(9, "license", "acme"))  # whatever makes it read again
    await until(lambda: sidecar.tally.documents_rejected > 1)
    assert (await reason(sidecar), sidecar.engine.revision) == ("NOT_ENTITLED", 3)


# Generations


async def test_a_new_generation_replaces_everything(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar) == "OK"
    world.source.changes.clear()
    restored = FakePublisher(world.source, Signer(generation=2))
    restored.push(catalog())
    restored.license(License("acme", "free"))
    restored.beat(world.clock.us)
    sidecar.hear_head()
    await until(lambda: sidecar.engine.generation == 2)
    assert (sidecar.engine.revision, await reason(sidecar)) == (2, "NOT_ENTITLED")


async def test_a_load_that_saw_a_new_generation_first_does_not_mix_it_in(sidecar: FakeSidecar, world: World) -> None:
    world.publisher.revision = 50
    world.source.announce(Change(50, "resync", ""))
    world.push(catalog())
    world.license("acme")
    await sidecar.synced()
    restored = FakePublisher(world.source, Signer(generation=2))
    world.source.changes.clear()
    restored.push(catalog(NO))
    restored.license(License("acme", "pro"))
    restored.beat(world.clock.us)
    waiting = asyncio.ensure_future(reason(sidecar))
    await turns(50)
    assert "acme" not in sidecar.engine.tenants or sidecar.engine.generation == 2
    sidecar.hear_head()
    world.source.announce(Change(99, "resync", ""))  # wakes the reader
    assert await waiting == "POLICY_DENIED"
    assert sidecar.engine.generation == 2


async def test_a_load_that_waits_for_a_revision_of_an_ended_generation_ends(sidecar: FakeSidecar, world: World) -> None:
    world.publisher.revision = 99
    world.publisher.license(License("acme", "pro"), announce=False)  # 100, whose change will never come
    waiting = asyncio.ensure_future(reason(sidecar))
    await turns(50)
    assert not waiting.done()
    restored = FakePublisher(world.source, Signer(generation=2))
    world.source.changes.clear()
    restored.push(catalog())
    restored.license(License("acme", "free"))
    restored.beat(world.clock.us)
    sidecar.hear_head()
    world.source.announce(Change(77, "resync", ""))
    assert await waiting == "NOT_ENTITLED"


# The link


async def test_state_stays_in_force_while_redis_is_away(sidecar: FakeSidecar, world: World) -> None:
    assert await reason(sidecar) == "OK"
    world.source.fail(LinkDown("gone"))
    await until(lambda: not sidecar.link.up)
    response = await sidecar.check(ask(mode=pb.MODE_PEEK))
    assert (response.reason, response.degraded, response.stale) == (pb.REASON_OK, True, False)
    world.source.fail(None)
    await sidecar.synced(world.license("acme", "free"))
    assert await reason(sidecar) == "NOT_ENTITLED"


async def test_the_trouble_before_the_first_state_is_told(world: World) -> None:
    world.source.fail(LinkDown("Redis at redis://nowhere cannot be reached"))
    sidecar = FakeSidecar(world)
    sidecar.start()
    await until(lambda: "cannot be reached" in sidecar.sync.problem)
    assert not sidecar.sync.ready.is_set()
    world.source.fail(None)
    await sidecar.synced()
    assert sidecar.sync.problem == ""
    await sidecar.stop()


async def test_a_license_that_may_not_be_read_counts_as_redis_away(sidecar: FakeSidecar, world: World) -> None:
    world.license("globex")
    await sidecar.synced()
    world.source.fail(LinkRefused("Redis lacks a permission for this user"))
    assert await reason(sidecar, "globex") == "DEGRADED_DENY"
    assert sidecar.tally.documents_rejected == 0
    world.source.fail(None)
    sidecar.link.succeeded()
    assert await reason(sidecar, "globex") == "OK"


async def test_a_revision_that_cannot_be_noted_is_not_acted_on(
    sidecar: FakeSidecar, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await reason(sidecar) == "OK"

    def full(*_: Any) -> None:
        raise UsageLogError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(sidecar.log, "append", full)
        world.license("acme", "free")
        await until(lambda: sidecar.tally.documents_rejected > 2)
        assert (await reason(sidecar), sidecar.engine.revision) == ("OK", 2)
    await sidecar.synced()
    assert await reason(sidecar) == "NOT_ENTITLED"


# The disk


async def _lived(world: World, *, save: bool = True, asked: tuple[str, ...] = ("acme",), **settings: Any) -> None:
    """One life of a sidecar that ends by SIGKILL."""
    sidecar = FakeSidecar(world, **settings)
    sidecar.start()
    await sidecar.synced()
    for tenant in asked:
        await reason(sidecar, tenant)
    if save:
        await sidecar.sync.save_snapshot()
    await sidecar.kill()


async def test_a_restart_serves_from_disk_while_redis_is_down(world: World) -> None:
    await _lived(world)
    world.source.fail(LinkDown("gone"))
    async with running(world, incarnation=2) as sidecar:
        assert sidecar.sync.ready.is_set()
        response = await sidecar.check(ask(mode=pb.MODE_PEEK))
        assert (response.reason, response.revision, response.stale) == (pb.REASON_OK, 2, False)
        assert response.as_of.ToMicroseconds() == world.clock.us


async def test_a_restart_from_disk_goes_on_with_what_is_published(world: World) -> None:
    await _lived(world)
    sidecar = FakeSidecar(world, incarnation=2)
    assert sidecar.sync.ready.is_set()
    world.license("acme", "free")
    sidecar.start()
    await sidecar.synced()
    assert await reason(sidecar) == "NOT_ENTITLED"
    await sidecar.stop()


async def test_a_restart_knows_only_tenants_that_were_asked_about(world: World) -> None:
    world.license("globex")
    await _lived(world)
    world.source.fail(LinkDown("gone"))
    async with running(world, incarnation=2) as sidecar:
        await until(lambda: not sidecar.link.up)
        assert [await reason(sidecar, tenant) for tenant in ("acme", "globex")] == ["OK", "DEGRADED_DENY"]


async def test_a_snapshot_older_than_what_was_acted_on_is_not_served(world: World) -> None:
    sidecar = FakeSidecar(world)
    sidecar.start()
    await sidecar.synced()
    await sidecar.sync.save_snapshot()
    await sidecar.synced(world.license("acme", "free"))  # acted on, and killed before it was saved
    await sidecar.kill()
    world.source.fail(LinkDown("gone"))
    again = FakeSidecar(world, incarnation=2)
    again.start()
    await until(lambda: "gone" in again.sync.problem)
    assert not again.sync.ready.is_set()
    # Whose state it was is known all the same, for the heartbeat to say.
    assert (again.sync.state.deployment, again.sync.state.floor) == (sidecar.sync.state.deployment, (1, 3))
    world.source.fail(None)
    await again.synced()
    assert await reason(again) == "NOT_ENTITLED"
    await again.stop()


async def test_redis_older_than_what_was_acted_on_is_not_served(world: World) -> None:
    await _lived(world, save=False)
    world.source.licenses.clear()
    older = FakePublisher(world.source)
    world.source.changes.clear()
    older.push(catalog())
    older.beat(world.clock.us)
    sidecar = FakeSidecar(world, incarnation=2)
    sidecar.start()
    await until(lambda: "acted on 2 before" in sidecar.sync.problem)
    assert not sidecar.sync.ready.is_set()
    await sidecar.stop()


async def test_a_revoked_license_does_not_come_back_from_disk(world: World) -> None:
    """Evicted, revoked while nobody looked, restarted without Redis: the disk must not remember it."""
    world.license("b")
    world.license("c")
    sidecar = FakeSidecar(world, tenants_max=2)
    sidecar.start()
    await sidecar.synced()
    await reason(sidecar, "acme")
    await sidecar.sync.save_snapshot()
    for tenant in ("b", "c"):
        await reason(sidecar, tenant)  # acme makes room
    await sidecar.synced(world.license("acme", status=LicenseStatus.CANCELED))
    await sidecar.sync.save_snapshot()
    await sidecar.kill()
    world.source.fail(LinkDown("gone"))
    async with running(world, incarnation=2, tenants_max=2) as again:
        await until(lambda: not again.link.up)
        assert await reason(again, "acme") == "DEGRADED_DENY"
        assert await reason(again, "b") == "OK"


async def test_a_license_revoked_in_force_stays_revoked_on_disk(world: World) -> None:
    sidecar = FakeSidecar(world)
    sidecar.start()
    await sidecar.synced()
    await reason(sidecar)
    await sidecar.synced(world.license("acme", status=LicenseStatus.SUSPENDED))
    await sidecar.sync.save_snapshot()
    await sidecar.kill()
    world.source.fail(LinkDown("gone"))
    async with running(world, incarnation=2) as again:
        assert await reason(again) == "TENANT_SUSPENDED"


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"\xff" + data[1:]])
async def test_a_damaged_snapshot_is_as_good_as_none(world: World, damage: Callable[[bytes], bytes]) -> None:
    await _lived(world)
    path = world.directory / SNAPSHOT_FILE
    path.write_bytes(damage(path.read_bytes()))
    sidecar = FakeSidecar(world, incarnation=2)
    assert not sidecar.sync.ready.is_set()
    sidecar.start()
    await sidecar.synced()
    assert await reason(sidecar) == "OK"
    await sidecar.stop()


async def test_a_snapshot_of_another_key_is_not_served(world: World) -> None:
    await _lived(world)
    sidecar = FakeSidecar(world, incarnation=2, public_keys=(OTHER_KEY,))
    assert not sidecar.sync.ready.is_set()
    assert "public key" in sidecar.sync.problem
    await sidecar.stop()


async def test_a_snapshot_somebody_put_another_license_into_is_not_served(world: World) -> None:
    await _lived(world)
    path = world.directory / SNAPSHOT_FILE
    body = syncing.unpack_snapshot(path.read_bytes())
    body["licenses"].append(Signer(OTHER_KEY).license(License("evil", "pro"), 2))
    path.write_bytes(syncing.pack_snapshot(body))
    sidecar = FakeSidecar(world, incarnation=2)
    assert not sidecar.sync.ready.is_set()
    await sidecar.stop()


async def test_licenses_newer_than_the_snapshot_are_left_out(world: World) -> None:
    await _lived(world)
    path = world.directory / SNAPSHOT_FILE
    body = syncing.unpack_snapshot(path.read_bytes())
    body["licenses"] = [Signer().license(License("acme", "free"), 3)]
    path.write_bytes(syncing.pack_snapshot(body))
    world.source.fail(LinkDown("gone"))
    async with running(world, incarnation=2) as sidecar:
        await until(lambda: not sidecar.link.up)
        assert await reason(sidecar) == "DEGRADED_DENY"


async def test_a_full_log_does_not_keep_a_sidecar_from_starting_from_disk(world: World) -> None:
    await _lived(world)
    world.source.fail(LinkDown("gone"))
    async with running(world, incarnation=2, log_bytes_max=1) as sidecar:
        assert sidecar.sync.ready.is_set()
        assert await reason(sidecar) == "OK"


async def test_a_snapshot_that_cannot_be_noted_is_not_served_and_ends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = FakeSidecar(world)
    sidecar.start()
    await sidecar.synced()
    await sidecar.sync.save_snapshot()
    await sidecar.kill()
    for path in world.directory.glob("usage-*"):
        path.unlink()

    def full(*_: Any) -> None:
        raise UsageLogError("the disk is full")

    monkeypatch.setattr("licet_sidecar.adapters.usage_log.UsageLog.append", full)
    again = FakeSidecar(world, incarnation=2)
    assert not again.sync.ready.is_set()
    assert "the disk is full" in again.sync.problem
    await again.stop()


async def test_a_quiet_deployment_is_not_stale_after_a_restart_without_redis(world: World) -> None:
    """Nothing changed for an hour, and heads said so each second: the disk knows."""
    sidecar = FakeSidecar(world)
    sidecar.start()
    await sidecar.synced()
    await reason(sidecar)
    for _ in range(60):
        world.advance(60)
        world.publisher.beat(world.clock.us)
        sidecar.hear_head()
        await sidecar.sync.save_snapshot()
    await sidecar.kill()
    world.source.fail(LinkDown("gone"))
    async with running(world, incarnation=2) as again:
        assert (await again.check(ask(mode=pb.MODE_PEEK))).stale is False


async def test_an_unchanged_snapshot_is_not_written_again(
    sidecar: FakeSidecar, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sidecar.sync.save_snapshot()
    names: list[str] = []
    monkeypatch.setattr(sidecar.directory, "write_atomically", lambda name, _: names.append(name))
    for _ in range(3):
        world.advance(1)
        world.publisher.beat(world.clock.us)
        sidecar.hear_head()
        await sidecar.sync.save_snapshot()
    assert SNAPSHOT_FILE not in names


# Anything at all


@pytest.mark.parametrize("seed", range(60))
async def test_no_history_mixes_revisions_or_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """After each turn of the loop: bundle and licenses in force are the newest up to the revision in force."""
    hurried(monkeypatch)
    monkeypatch.setattr(syncing, "BLOCK_MS", 1)
    rng = random.Random(seed)
    world = World(tmp_path)
    source, publisher = world.source, world.publisher
    history: dict[str, list[int]] = {}
    pending: list[Change] = []
    tenants = ["a", "b", "c"]

    def publish(kind: str, key: str) -> None:
        """Documents first; their changes follow in order, later."""
        if kind == "bundle":
            policy = Policy(f"p{publisher.revision + 1}", ("*",), ())
            publisher.push(catalog(policy), announce=False)
        else:
            publisher.license(License(key, rng.choice(["pro", "free"])), announce=False)
        history.setdefault(key, []).append(publisher.revision)
        pending.append(Change(publisher.revision, kind, key))

    def announce() -> None:
        while pending:
            source.announce(pending.pop(0))

    def newest(key: str, revision: int) -> int:
        return max((one for one in history.get(key, []) if one <= revision), default=0)

    publish("bundle", "bundle")
    for tenant in tenants:
        publish("license", tenant)
    announce()
    publisher.beat(world.clock.us)
    sidecar = FakeSidecar(world, tenants_max=2)
    sidecar.start()
    await sidecar.synced()
    asked: list[asyncio.Future[Any]] = []
    last = sidecar.engine.revision
    for _ in range(60):
        match rng.randrange(9):
            case 0:
                publish("bundle", "bundle")
            case 1 | 2:
                publish("license", rng.choice(tenants))
            case 3:
                announce()
            case 4:
                announce()
                world.advance(1)
                publisher.beat(world.clock.us)
                sidecar.hear_head()
            case 5:
                if source.changes and rng.random() < 0.5:
                    del source.changes[rng.randrange(len(source.changes))]
            case 6:
                source.fail(LinkDown("gone") if source.trouble is None else None)
            case _:
                asked.append(asyncio.ensure_future(reason(sidecar, rng.choice(tenants))))
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
            engine = sidecar.engine
            assert engine.revision >= last, seed
            last = engine.revision
            assert engine.rulebook is not None
            assert engine.rulebook.revision == newest("bundle", last), seed
            for name, tenant in engine.tenants.items():
                assert tenant.revision == newest(name, last), (seed, name, last)
    source.fail(None)
    announce()
    for turn in itertools.count():
        if sidecar.engine.revision == publisher.revision:
            break
        publisher.beat(world.clock.us + turn)
        sidecar.hear_head()
        await asyncio.sleep(0.002)
        assert turn < 2_000, seed
    await asyncio.wait_for(asyncio.gather(*asked), 5)
    await sidecar.stop()
