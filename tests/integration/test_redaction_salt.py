"""The salt of hashed attributes: made with the database, the same in every bundle, also of a new generation."""

from __future__ import annotations

from pathlib import Path

from licet.domain.redaction import SALT_BYTES
from licet.wire.documents import BUNDLE, BUNDLE_KEY, Manifest
from licet_control_plane.store import meta
from tests.support.control_plane import deployment
from tests.support.valkey import ValkeyProcess


async def test_every_bundle_carries_the_salt_of_the_deployment(tmp_path: Path, valkey_process: ValkeyProcess) -> None:
    async with deployment(tmp_path / "state", valkey_process.url) as running:
        salt = (await running.plane.database.read(meta.read)).redaction_salt
        assert len(salt) == SALT_BYTES
        for amount in (1, 2):
            await running.headed(await running.push(amount))
            statement = await running.document(BUNDLE, BUNDLE_KEY)
            assert statement is not None
            assert Manifest.from_payload(statement.payload).salt == salt
        await running.stop()
        await running.start(new_generation=True)
        await running.headed(statement.revision + 1)
        again = await running.document(BUNDLE, BUNDLE_KEY)
        assert again is not None
        assert again.generation == statement.generation + 1
        assert Manifest.from_payload(again.payload).salt == salt
