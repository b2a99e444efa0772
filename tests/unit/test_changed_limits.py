"""Limits changed in mid-flight, through the whole service: nothing leased before is taken for something else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from licet.domain.catalog import Catalog, Limit, OnExceeded, rate_key
from licet.domain.ids import LimitKey
from licet.domain.windows import FOREVER_S, Period
from licet.v1 import approval_pb2 as pb
from licet_sidecar.core.lease import Kind, RateShare, Terms
from licet_sidecar.core.leases import LeaseBook
from tests.support.published import catalog, limit
from tests.support.sidecar import FakeSidecar, World, hurried, running

CAP = LimitKey("reports:cap")


def rate(amount: int, burst: int, key: LimitKey = CAP) -> Catalog:
    return catalog(limits=[Limit(rate_key(key), amount, Period.SECOND, burst=burst)])


def term(amount: int) -> Catalog:
    return catalog(limits=[Limit(CAP, amount, Period.TERM)])


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


async def changed(sidecar: FakeSidecar, content: Catalog) -> None:
    await sidecar.synced(sidecar.world.push(content))


async def first(sidecar: FakeSidecar, **fields: Any) -> pb.CheckResponse:
    """A check whose bucket may have to fill first."""
    asking = asyncio.ensure_future(sidecar.check(**fields))
    for _ in range(20):
        await asyncio.sleep(0)
    sidecar.world.advance(0.2)
    return await asking


async def approved(sidecar: FakeSidecar, checks: int, quantity: int = 1) -> int:
    answers = [await sidecar.check(quantity=quantity) for _ in range(checks)]
    return quantity * sum(answer.effect == pb.EFFECT_APPROVED for answer in answers)


async def test_a_rate_that_becomes_a_hard_limit_leaves_no_units_behind(sidecar: FakeSidecar) -> None:
    await changed(sidecar, rate(50, 50))
    assert (await first(sidecar)).effect == pb.EFFECT_APPROVED
    await changed(sidecar, term(20))
    assert await approved(sidecar, 100) == 20
    await changed(sidecar, rate(50, 50))
    assert (await first(sidecar)).effect == pb.EFFECT_APPROVED
    await changed(sidecar, term(20))
    assert await approved(sidecar, 10) == 0


async def test_a_hard_limit_that_becomes_a_rate_is_one(sidecar: FakeSidecar) -> None:
    await changed(sidecar, term(20))
    assert await approved(sidecar, 1) == 1
    await changed(sidecar, rate(5, 5))
    assert (await first(sidecar)).effect == pb.EFFECT_APPROVED
    sidecar.world.advance(10)
    assert await approved(sidecar, 20) == 5


def test_a_lease_is_never_taken_for_a_share_nor_a_share_for_a_lease() -> None:
    book = LeaseBook(1)
    held = book.of("acme")
    share = book.lease(held, CAP, "", 0, FOREVER_S, Terms(50_000, Kind.RATE, burst=50), 1)
    lease = book.lease(held, CAP, "", 0, FOREVER_S, Terms(20), 2)
    assert isinstance(share, RateShare)
    assert not isinstance(lease, RateShare)
    assert isinstance(book.lease(held, CAP, "", 0, FOREVER_S, Terms(9_000, Kind.RATE), 3), RateShare)


async def test_a_lowered_rate_lets_no_more_than_the_burst_through(sidecar: FakeSidecar) -> None:
    await changed(sidecar, rate(1_000, 1_000))
    assert (await first(sidecar)).effect == pb.EFFECT_APPROVED
    sidecar.world.advance(9)
    await changed(sidecar, rate(1, 1_000))
    assert await approved(sidecar, 20, 100) == 1_000
    sidecar.world.advance(9)
    assert await approved(sidecar, 20) == 9


async def test_a_raised_burst_is_filled_from_then_on(sidecar: FakeSidecar) -> None:
    await changed(sidecar, rate(10, 10))
    assert (await first(sidecar)).effect == pb.EFFECT_APPROVED
    sidecar.world.advance(9)
    await changed(sidecar, rate(10, 100))
    assert await approved(sidecar, 100) == 10
    sidecar.world.advance(1)
    assert await approved(sidecar, 100) == 10


def test_each_share_of_a_lowered_rate_is_the_same_part_of_it() -> None:
    share = RateShare(CAP, "", 0, FOREVER_S, Terms(1_000_000, Kind.RATE, burst=1_000))
    share.granted(250_000, 60_000, 1_000)
    assert share.level(2_000) == 250_000_000
    share.adopt(Terms(1_000, Kind.RATE, burst=100), 2_000)
    assert (share.cap, share.level(2_000)) == (250, 25_000_000)


async def test_a_soft_limit_that_becomes_hard_gives_back_what_lies_past_it(sidecar: FakeSidecar) -> None:
    soft = replace(limit(10), on_exceeded=OnExceeded.OVERAGE)
    await changed(sidecar, catalog(limits=[soft]))
    assert await approved(sidecar, 8) == 8
    assert (await sidecar.check(quantity=40)).effect == pb.EFFECT_APPROVED
    (lease,) = sidecar.leases.of("acme").leases.values()
    lease.cap += 5  # leased ahead of need, past the amount
    lease.over += 5
    sidecar.world.registers.contents.quotas[("acme", lease.quota)].registers["5" * 32].g += 5
    await changed(sidecar, catalog(limits=[limit(10)]))
    await sidecar.check()
    sidecar.world.advance(1)
    await sidecar.upkeep()
    assert lease.free == 0
    assert (await sidecar.check()).reason == pb.REASON_QUOTA_EXHAUSTED


async def test_what_is_left_of_a_lowered_limit_is_what_was_not_used(sidecar: FakeSidecar) -> None:
    def said(answer: pb.CheckResponse) -> list[tuple[int, int]]:
        return [(quota.limit, quota.remaining) for quota in answer.quotas]

    await changed(sidecar, catalog(limits=[limit(1_000)]))
    for _ in range(3):
        last = await sidecar.check()
    assert said(last) == [(1_000, 997)]
    await changed(sidecar, catalog(limits=[limit(40)]))
    assert said(await sidecar.check()) == [(40, 36)]
    await changed(sidecar, catalog(limits=[limit(2)]))
    assert said(await sidecar.check(mode=pb.MODE_PEEK)) == [(2, 0)]
