"""What a ``StateSource`` promises, held to by the fake and by Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest
import redis.asyncio as aioredis

from licet.wire.names import RedisNames
from licet.wire.registers import RUN_SECTIONS, Pair, run_of
from licet_sidecar.adapters.redis_link import connect
from licet_sidecar.adapters.redis_state_source import CHANGES_PER_READ_MAX, KEYS_PER_READ_MAX, RedisStateSource
from licet_sidecar.core.sync import Change
from licet_sidecar.ports import LinkDown, LinkRefused, StateSource
from tests.support.control_plane import WAIT_S_MAX
from tests.support.fake_state_source import FakeStateSource
from tests.support.valkey import ValkeyProcess, free_port

NAMES = RedisNames("contract")


class Shelf(Protocol):
    """Where a test puts what a control plane would publish."""

    source: StateSource

    async def run_id(self) -> str: ...
    async def put_head(self, head: bytes) -> None: ...
    async def put_manifest(self, manifest: bytes) -> None: ...
    async def put_chunks(self, chunks: Mapping[str, bytes]) -> None: ...
    async def put_license(self, tenant: str, document: bytes) -> None: ...
    async def put_pair(self, tenant: str, pair: Pair) -> None: ...
    async def announce(self, *changes: Change) -> None: ...


class FakeShelf:
    def __init__(self) -> None:
        self.source = FakeStateSource()

    async def run_id(self) -> str:
        return self.source.run_id

    async def put_head(self, head: bytes) -> None:
        self.source.head = head

    async def put_manifest(self, manifest: bytes) -> None:
        self.source.manifest = manifest

    async def put_chunks(self, chunks: Mapping[str, bytes]) -> None:
        self.source.chunks.update(chunks)

    async def put_license(self, tenant: str, document: bytes) -> None:
        self.source.licenses[tenant] = document

    async def put_pair(self, tenant: str, pair: Pair) -> None:
        self.source.pairs[tenant] = pair

    async def announce(self, *changes: Change) -> None:
        for change in changes:
            self.source.announce(change)


class RedisShelf:
    def __init__(self, url: str) -> None:
        self.redis: aioredis.Redis = aioredis.Redis.from_url(url)
        self.clients = [connect(url), connect(url, timeout_s=7.0)]
        self.source = RedisStateSource(*self.clients, NAMES, url)

    async def run_id(self) -> str:
        return run_of(await self.redis.execute_command("INFO", *RUN_SECTIONS))

    async def put_head(self, head: bytes) -> None:
        await self.redis.set(NAMES.head(), head)

    async def put_manifest(self, manifest: bytes) -> None:
        await self.redis.set(NAMES.bundle(), manifest)

    async def put_chunks(self, chunks: Mapping[str, bytes]) -> None:
        for digest, chunk in chunks.items():
            await self.redis.set(NAMES.chunk(digest), chunk)

    async def put_license(self, tenant: str, document: bytes) -> None:
        await self.redis.set(NAMES.license(tenant), document)

    async def put_pair(self, tenant: str, pair: Pair) -> None:
        await self.redis.hset(NAMES.limits(tenant), mapping={"epoch": pair.epoch, "run": pair.run})

    async def announce(self, *changes: Change) -> None:
        async with self.redis.pipeline() as pipeline:
            for change in changes:
                pipeline.xadd(NAMES.changes(), {"kind": change.kind, "key": change.key}, id=f"{change.revision}-0")
            await pipeline.execute()

    async def close(self) -> None:
        for client in (self.redis, *self.clients):
            await client.aclose()


@pytest.fixture(params=["fake", "redis"])
async def shelf(request: pytest.FixtureRequest) -> AsyncIterator[Shelf]:
    if request.param == "fake":
        yield FakeShelf()
        return
    valkey: ValkeyProcess = request.getfixturevalue("valkey_process")
    made = RedisShelf(valkey.url)
    yield made
    await made.close()


async def test_nothing_is_there_before_it_is_published(shelf: Shelf) -> None:
    source, run_id = shelf.source, await shelf.run_id()
    assert await source.read_head() == (None, run_id)
    assert await source.read_manifest() == (None, run_id)
    assert await source.read_chunks(["ab"]) == [None]
    assert await source.read_licenses(["acme"]) == ([None], run_id)
    assert await source.read_license("acme") == (None, Pair(0, ""), None, run_id)
    assert await source.read_changes(0, 1) == ([], run_id)


async def test_documents_come_back_byte_for_byte(shelf: Shelf) -> None:
    source, raw = shelf.source, bytes(range(256))
    await shelf.put_head(b"head" + raw)
    await shelf.put_manifest(b"manifest" + raw)
    await shelf.put_license("acme", b"license" + raw)
    await shelf.put_pair("acme", Pair(7, "abc"))
    run_id = await shelf.run_id()
    assert run_id
    assert await source.read_head() == (b"head" + raw, run_id)
    assert await source.read_manifest() == (b"manifest" + raw, run_id)
    assert await source.read_license("acme") == (b"license" + raw, Pair(7, "abc"), b"head" + raw, run_id)


async def test_chunks_come_in_the_order_they_were_asked_for(shelf: Shelf) -> None:
    await shelf.put_chunks({"aa": b"1", "bb": b"2", "cc": b"3"})
    assert await shelf.source.read_chunks(["cc", "xx", "aa", "aa"]) == [b"3", None, b"1", b"1"]
    assert await shelf.source.read_chunks([]) == []


async def test_more_licenses_than_fit_in_one_read_come_in_order(shelf: Shelf) -> None:
    tenants = [f"t{number}" for number in range(KEYS_PER_READ_MAX + 3)]
    for tenant in tenants[::2]:
        await shelf.put_license(tenant, tenant.encode())
    expected = [None if number % 2 else tenant.encode() for number, tenant in enumerate(tenants)]
    assert await shelf.source.read_licenses(tenants) == (expected, await shelf.run_id())


async def test_changes_after_a_revision_come_in_order(shelf: Shelf) -> None:
    changes = [Change(1, "bundle", "bundle"), Change(2, "license", "acme"), Change(5, "license", "globex")]
    await shelf.announce(*changes)
    run_id = await shelf.run_id()
    assert await shelf.source.read_changes(0, 1) == (changes, run_id)
    assert await shelf.source.read_changes(1, 1) == (changes[1:], run_id)
    assert await shelf.source.read_changes(3, 1) == (changes[2:], run_id)
    assert await shelf.source.read_changes(5, 1) == ([], run_id)


async def test_a_reading_waits_for_the_first_change(shelf: Shelf) -> None:
    reading = asyncio.ensure_future(shelf.source.read_changes(0, 10_000))
    await asyncio.sleep(0.01)
    assert not reading.done()
    await shelf.announce(Change(1, "license", "acme"))
    assert await asyncio.wait_for(reading, WAIT_S_MAX) == ([Change(1, "license", "acme")], await shelf.run_id())


async def test_a_reading_that_was_given_up_does_not_disturb_the_next(shelf: Shelf) -> None:
    for _ in range(3):
        reading = asyncio.ensure_future(shelf.source.read_changes(0, 10_000))
        await asyncio.sleep(0.005)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    await shelf.announce(Change(1, "license", "acme"))
    found, _ = await shelf.source.read_changes(0, 1_000)
    assert found == [Change(1, "license", "acme")]


async def test_many_can_read_at_once(shelf: Shelf) -> None:
    tenants = [f"t{number}" for number in range(100)]
    for tenant in tenants:
        await shelf.put_license(tenant, tenant.encode())
    found = await asyncio.gather(*(shelf.source.read_license(tenant) for tenant in tenants))
    assert [document for document, *_ in found] == [tenant.encode() for tenant in tenants]


# Of Redis alone


@pytest.fixture
async def real(valkey_process: ValkeyProcess) -> AsyncIterator[RedisShelf]:
    made = RedisShelf(valkey_process.url)
    yield made
    await made.close()


async def test_a_long_stream_comes_in_pieces(real: RedisShelf) -> None:
    changes = [Change(number, "license", f"t{number}") for number in range(1, CHANGES_PER_READ_MAX + 11)]
    await real.announce(*changes)
    first, _ = await real.source.read_changes(0, 1)
    rest, _ = await real.source.read_changes(first[-1].revision, 1)
    assert (first + rest, len(first)) == (changes, CHANGES_PER_READ_MAX)


async def test_an_entry_of_somebody_else_is_a_change_of_nothing(real: RedisShelf) -> None:
    await real.redis.xadd(NAMES.changes(), {"a": "b"}, id="1-0")
    changes, _ = await real.source.read_changes(0, 1)
    assert changes == [Change(1, "", "")]


async def test_a_key_of_another_type_is_trouble_that_names_redis(real: RedisShelf) -> None:
    await real.redis.lpush(NAMES.bundle(), "x")
    with pytest.raises(LinkRefused, match=r"WRONGTYPE.*LICET_REDIS_PREFIX"):
        await real.source.read_manifest()


async def test_a_server_that_is_away_and_comes_back(real: RedisShelf, valkey_process: ValkeyProcess) -> None:
    before = await real.run_id()
    await real.put_manifest(b"m")
    valkey_process.kill()
    for _ in range(3):
        with pytest.raises(LinkDown, match="cannot be reached"):
            await real.source.read_head()
        with pytest.raises(LinkDown):
            await real.source.read_changes(0, 1)
    valkey_process.start()
    head, run_id = await real.source.read_head()
    assert (head, run_id != before) == (None, True)


async def test_a_reading_ends_when_its_server_does(real: RedisShelf, valkey_process: ValkeyProcess) -> None:
    reading = asyncio.ensure_future(real.source.read_changes(0, 5_000))
    await asyncio.sleep(0.02)
    valkey_process.kill()
    with pytest.raises(LinkDown):
        await asyncio.wait_for(reading, WAIT_S_MAX)


async def test_a_paused_server_is_given_up_within_the_timeout(valkey_process: ValkeyProcess) -> None:
    client = connect(valkey_process.url, timeout_s=0.1)
    source = RedisStateSource(client, client, NAMES, valkey_process.url)
    await source.read_head()
    valkey_process.pause()
    with pytest.raises(LinkDown):
        await source.read_head()
    valkey_process.resume()
    await source.read_head()
    await client.aclose()


@pytest.mark.parametrize("given", ["", ":wrong@", "nobody:wrong@"], ids=["none", "wrong", "unknown user"])
async def test_a_refused_login_says_what_to_check_and_tells_no_password(tmp_path: Path, given: str) -> None:
    server = ValkeyProcess(tmp_path / "valkey", password="right")
    server.start()
    url = f"redis://{given}127.0.0.1:{server.port}/0"
    client = connect(url)
    source = RedisStateSource(client, client, NAMES, url)
    with pytest.raises(LinkRefused, match="LICET_REDIS_URL") as caught:
        await source.read_head()
    assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
    await client.aclose()
    server.kill()


async def test_a_missing_permission_is_named(valkey_process: ValkeyProcess) -> None:
    admin: aioredis.Redis = aioredis.Redis.from_url(valkey_process.url)
    await admin.execute_command("ACL", "SETUSER", "weak", "on", ">pw", "~*", "+@all", "-xread", "-get")
    url = f"redis://weak:pw@127.0.0.1:{valkey_process.port}/0"
    client = connect(url)
    source = RedisStateSource(client, client, NAMES, url)
    with pytest.raises(LinkRefused, match="permission"):
        await source.read_changes(0, 1)
    with pytest.raises(LinkRefused, match="permission"):
        await source.read_manifest()
    with pytest.raises(LinkRefused, match="permission"):
        await source.read_head()
    await client.aclose()
    await admin.aclose()


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://127.0.0.1/", "redis://127.0.0.1:port/0"])
async def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(LinkRefused, match="give redis://host:port/0"):
        connect(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@127.0.0.1:1/0",
        "redis://user:secret@127.0.0.1:1/0",
        "redis://user:sec/secret@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password=secret",
        "redis://user:a@secret@127.0.0.1:1/0",
    ],
)
async def test_no_message_tells_a_password(url: str) -> None:
    async def attempt() -> None:
        client = connect(url)
        try:
            await RedisStateSource(client, client, NAMES, url).read_head()
        finally:
            await client.aclose()

    with pytest.raises((LinkDown, LinkRefused)) as caught:
        await attempt()
    assert "secret" not in str(caught.value)


async def test_nobody_listening_is_trouble_at_once() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    client = connect(url)
    with pytest.raises(LinkDown, match="cannot be reached"):
        await RedisStateSource(client, client, NAMES, url).read_head()
    await client.aclose()
