"""The registry of sidecars over days: who left is forgotten, who may come back is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from licet.wire.registers import Pair
from licet_control_plane.core.fleet import GONE_S_MIN
from licet_control_plane.publisher.fleet import Fleet
from licet_control_plane.store.database import Database
from tests.support.control_plane import heartbeat

NOW_S = 1_790_000_000.0
CONTENTS = Pair(1, "run1")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    made.migrate()
    yield made
    made.close()


async def names(database: Database) -> set[str]:
    fleet = Fleet(database)
    await fleet.load()
    return set(fleet.sidecars)


async def test_who_retired_is_forgotten_after_a_day_and_who_died_is_not(database: Database) -> None:
    fleet = Fleet(database)
    retired, dead = heartbeat("a" * 32, retired=True), heartbeat("d" * 32)
    removed = await fleet.update({"a" * 32: retired, "d" * 32: dead}, CONTENTS, NOW_S)
    assert removed == ["a" * 32]
    assert [holder.sidecar for holder in fleet.holders()] == ["d" * 32]
    await fleet.update({"d" * 32: dead}, CONTENTS, NOW_S + GONE_S_MIN / 2)
    assert await names(database) == {"a" * 32, "d" * 32}
    await fleet.update({"d" * 32: dead}, CONTENTS, NOW_S + GONE_S_MIN + 1)
    assert await names(database) == set(fleet.sidecars) == {"d" * 32}
