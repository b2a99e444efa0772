"""Rotating the signing key: who signs what, what is refused, and that all that is published is signed anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from licet.wire.documents import ACK, HEAD, HEAD_KEY, Manifest
from licet.wire.signing import SigningKey, Statement, Verifier, signed_with
from licet_control_plane.audit_keeper import AUDIT_HEAD_FILE
from licet_control_plane.signing_keys import SigningKeys
from licet_control_plane.state_dir import StartError
from licet_control_plane.store import revisions, signing_keys
from licet_control_plane.store.database import DatabaseUnavailable
from tests.support.control_plane import NAMES, deployment, heartbeat, until
from tests.support.site import Site
from tests.support.valkey import ValkeyProcess

PATH = "/v1/signing-keys"


@pytest.fixture
async def site(tmp_path: Path, valkey_process: ValkeyProcess) -> AsyncIterator[Site]:
    async with deployment(tmp_path / "state", valkey_process.url) as running:
        yield Site(running)


async def _keys(site: Site) -> dict[str, dict[str, Any]]:
    return {item["state"]: item for item in (await site.ask("GET", PATH)).json()["items"]}


async def _rotated(site: Site, **body: Any) -> dict[str, Any]:
    """A new key, active, and everything signed with it."""
    assert (await site.ask("POST", PATH)).status_code == 201
    done = await site.ask("POST", f"{PATH}/rotate", **body)
    assert done.status_code == 200, done.text

    async def resigned() -> dict[str, Any] | None:
        active = (await _keys(site))["active"]
        return active if active["resigned_at"] else None

    found: dict[str, Any] = await until(resigned)
    return found


async def test_everything_published_is_signed_anew_and_verifies_with_the_new_key_alone(site: Site) -> None:
    running = site.running
    await running.push()
    for number in range(3):
        await running.license(f"t{number}")
    await running.headed(4)
    old = running.key
    ack = Statement("d" * 32, ACK, "a" * 32 + ":1", 1, 17, {"lost": []})
    await running.redis.hset(NAMES.acked(), ack.key, old.sign(ack))
    active = await _rotated(site)
    only_new = Verifier([active["public_key"]])

    async def published() -> bool:
        documents = [await running.redis.get(NAMES.bundle())]
        documents += [await running.redis.get(NAMES.license(f"t{number}")) for number in range(3)]
        documents += [await running.redis.get(NAMES.head()), await running.redis.hget(NAMES.acked(), ack.key)]
        return all(document and signed_with(document) == active["id"] for document in documents)

    await until(published)
    head = only_new.verify(await running.redis.get(NAMES.head()), kind=HEAD, key=HEAD_KEY)
    assert head.generation == 1
    assert only_new.verify(await running.redis.hget(NAMES.acked(), ack.key), kind=ACK, key=ack.key) == ack
    for number in range(3):
        document = await running.redis.get(NAMES.license(f"t{number}"))
        assert only_new.verify(document, kind="license", key=f"t{number}").payload["plan"] == "pro"
    assert (await site.verified())["ok"]
    checkpoint = await site.ask("GET", "/v1/audit/head")
    assert checkpoint.json()["public_key"] == active["public_key"]


async def test_an_override_in_force_stays_so_under_the_new_key(site: Site) -> None:
    await site.running.push()
    body = {"action": "report.*", "effect": "deny", "expires_after_s": 3_600, "reason": "a leak", "id": "inc-1"}
    assert (await site.ask("POST", "/v1/overrides", **body)).status_code == 201
    active = await _rotated(site)

    async def published() -> bytes | None:
        document: bytes | None = await site.running.redis.get(NAMES.bundle())
        return document if document and signed_with(document) == active["id"] else None

    found = Verifier([active["public_key"]]).verify(await until(published), kind="bundle", key="bundle")
    assert [one.id for one in Manifest.from_payload(found.payload).overrides] == ["inc-1"]


async def test_a_live_sidecar_that_does_not_know_the_next_key_is_in_the_way(site: Site) -> None:
    running = site.running
    sidecar = "5" * 32
    old = running.plane.key.active.key_id

    async def heard(*keys: str) -> None:
        beat = heartbeat(sidecar, keys=keys)
        await running.redis.hset(NAMES.sidecars(), sidecar, beat.pack())

        async def known() -> bool:
            found = running.plane.fleet.sidecars.get(sidecar)
            return found is not None and found.heartbeat == beat

        await until(known)

    await heard(old)
    following = (await site.ask("POST", PATH)).json()
    assert (following["state"], following["trusted_by"], following["not_trusted_by"]) == ("next", 0, 1)
    assert (await site.ask("POST", PATH)).status_code == 409
    refused = await site.ask("POST", f"{PATH}/rotate")
    assert refused.status_code == 409
    assert sidecar in refused.text
    await heard(old, following["id"])
    assert (await site.ask("POST", f"{PATH}/rotate")).status_code == 200
    assert (await site.ask("POST", f"{PATH}/{following['id']}/retire")).status_code == 409

    async def resigned() -> bool:
        return (await _keys(site))["active"]["resigned_at"] is not None

    await until(resigned)
    await heard(old, following["id"])
    refused = await site.ask("POST", f"{PATH}/{old}/retire")
    assert refused.status_code == 409
    assert "still trust" in refused.text
    await heard(following["id"])
    retired = await site.ask("POST", f"{PATH}/{old}/retire")
    assert retired.json()["state"] == "retired"
    stored = await running.plane.database.read(signing_keys.stored)
    assert [one.private is None for one in stored] == [True, False]
    assert (await site.ask("GET", PATH)).json()["trust"] == [following["public_key"]]
    assert (await site.ask("POST", f"{PATH}/nobody/retire")).status_code == 404


async def test_a_control_plane_that_has_yet_to_follow_cannot_publish_with_the_old_key(site: Site) -> None:
    running = site.running
    await running.push()
    late = running.key
    await _rotated(site)
    with pytest.raises(DatabaseUnavailable, match="rotated"):
        await running.plane.database.write(
            revisions.append, kind="license", key="acme", payload={}, sign=late.sign, now_us=1, by="late"
        )
    assert await running.license("acme")


async def test_a_head_that_was_kept_under_a_key_that_is_retired_by_now_is_still_held_to(
    tmp_path: Path, site: Site
) -> None:
    file = tmp_path / "state" / AUDIT_HEAD_FILE
    old = next(iter((await _keys(site)).values()))
    await site.ask("POST", "/v1/api-keys", name="k", role="auditor")
    assert (await site.ask("GET", "/v1/audit/head")).status_code == 200
    kept = file.read_bytes()
    await _rotated(site)
    file.write_bytes(kept)  # as another control plane has it that did not sign since
    assert (await site.ask("POST", f"{PATH}/{old['id']}/retire")).status_code == 200
    assert (await site.verified())["ok"]
    assert (await site.ask("GET", "/v1/audit/head")).status_code == 200
    file.write_bytes(kept)
    assert (await site.verified())["ok"]


async def test_the_database_decides_at_a_start_and_another_deployments_key_does_not_start(site: Site) -> None:
    running = site.running
    active = await _rotated(site)
    await running.stop()
    await running.start()
    assert running.plane.public_key == active["public_key"]
    database, ledger_key = running.plane.database, running.ledger_key
    with pytest.raises(StartError, match="not one of this database"):
        await asyncio.to_thread(SigningKeys.open, database, ledger_key, SigningKey.generate())
    adopted = SigningKey.generate()
    keys = await asyncio.to_thread(lambda: SigningKeys.open(database, ledger_key, adopted, may_replace=True))
    assert keys.public_key == adopted.public_key
    assert len(keys.trusted) == 3


async def test_keys_are_written_down_for_those_who_read_them(tmp_path: Path, site: Site) -> None:
    kept: list[tuple[str, list[str]]] = []
    site.running.plane.key._keep = lambda key, trusted: kept.append((key.public_key, trusted))
    first = site.running.plane.public_key
    active = await _rotated(site)
    following = active["public_key"]
    assert kept[-3:] == [
        (first, [first, following]),
        (following, [following, first]),
        (following, [following]),
    ]
