"""Answers that wait for their event to be synced or shipped: with whom, how long, and what comes of it if not."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from licet.domain.catalog import (
    Action,
    Durability,
    Entitlement,
    Feature,
    OnUnavailable,
    Plan,
    Policy,
    Rule,
    RuleEffect,
    UnavailableMode,
)
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import UsageBatch
from licet_sidecar.ports import LinkDown, LinkFull
from tests.support.published import catalog, limit
from tests.support.sidecar import FakeSidecar, World, ask, hurried, running, until

SYNCED, SHIPPED = Durability.SYNCED, Durability.SHIPPED
ALLOW = OnUnavailable(UnavailableMode.ALLOW)


def content() -> Any:
    plan = Plan("pro", {"reports": Entitlement(limits=(limit(1_000),)), "free": Entitlement()})
    return catalog(
        Feature("free"),
        Action("plain", {"": "free"}),
        Action("synced", {"": "reports"}, durability=SYNCED),
        Action("shipped", {"": "reports"}, durability=SHIPPED),
        Action("synced.open", {"": "reports"}, durability=SYNCED, on_unavailable=ALLOW),
        Action("shipped.open", {"": "reports"}, durability=SHIPPED, on_unavailable=ALLOW),
        Policy("guard", ("*",), (Rule("huge", RuleEffect.DENY, "quantity > 100"),)),
        plan,
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(content())
    made.license("acme")
    return made


class Disk:
    """Holds every sync back until it is let go; ``syncs`` counts those that began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.syncs = 0
        self.error: OSError | None = None
        self._goes = threading.Event()

        def held(_: int) -> None:
            self.syncs += 1
            assert self._goes.wait(10)
            if self.error is not None:
                raise self.error

        monkeypatch.setattr(os, "fdatasync", held)

    def let_go(self) -> None:
        self._goes.set()


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as made:
        await made.check(action="plain")
        await made.check(action="shipped.open", quantity=0, mode=pb.MODE_PEEK)  # a lease is there from here on
        await made.check(action="synced.open")
        yield made


async def ship(sidecar: FakeSidecar) -> None:
    """What the loop does when somebody waits."""
    await sidecar.shipping.hand_over(sidecar.sink.ship)


def asked(sidecar: FakeSidecar, action: str, **fields: Any) -> asyncio.Task[pb.CheckResponse]:
    return asyncio.ensure_future(sidecar.check(action=action, **fields))


def shipped_seqs(sidecar: FakeSidecar) -> list[int]:
    batches = [UsageBatch.unpack(data) for data in sidecar.sink.batches]
    return [seq for one in batches for seq in range(one.first_seq, one.last_seq + 1)]


async def test_an_answer_at_logged_waits_for_nothing(sidecar: FakeSidecar) -> None:
    request = ask(action="plain").SerializeToString()
    assert isinstance(sidecar.service.handle("Check", request, 1.0), bytes)
    assert sidecar.log.synced_seq < sidecar.log.last_seq


async def test_an_answer_at_synced_leaves_after_its_event_is_on_disk(
    sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    waiting = asked(sidecar, "synced")
    await until(lambda: disk.syncs == 1)
    assert not waiting.done()
    disk.let_go()
    response = await waiting
    assert (response.effect, response.degraded) == (pb.EFFECT_APPROVED, False)
    assert sidecar.log.synced_seq == int(response.decision_id[16:], 16)


async def test_all_that_wait_share_one_sync(sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    first = asked(sidecar, "synced")
    await until(lambda: disk.syncs == 1)
    others = [asked(sidecar, "synced") for _ in range(50)]
    await until(lambda: sidecar.tally.durability_waits >= 51)
    disk.let_go()
    answers = await asyncio.gather(first, *others)
    assert {one.effect for one in answers} == {pb.EFFECT_APPROVED}
    assert disk.syncs == 2  # the second for those that came while the first ran


async def test_a_call_that_comes_as_a_sync_ends_begins_another(sidecar: FakeSidecar) -> None:
    gate = sidecar.service._gate
    await sidecar.check(action="synced")

    async def over() -> int:
        return 0

    ended = asyncio.ensure_future(over())
    await asyncio.wait([ended])
    gate._syncing = ended  # as it is between the end of a sync and its callback
    response = await asyncio.wait_for(sidecar.check(action="synced"), 5)
    assert (response.effect, response.degraded) == (pb.EFFECT_APPROVED, False)


async def test_an_answer_at_shipped_leaves_after_redis_has_its_batch(sidecar: FakeSidecar) -> None:
    waiting = asked(sidecar, "shipped")
    await until(sidecar.shipping.urgent.is_set)
    assert not waiting.done()
    await ship(sidecar)
    response = await waiting
    assert (response.effect, response.degraded) == (pb.EFFECT_APPROVED, False)
    assert int(response.decision_id[16:], 16) in shipped_seqs(sidecar)


async def test_a_denial_waits_as_an_approval_does(sidecar: FakeSidecar) -> None:
    waiting = asked(sidecar, "shipped", quantity=500)
    await until(sidecar.shipping.urgent.is_set)
    assert not waiting.done()
    await ship(sidecar)
    assert (await waiting).reason == pb.REASON_POLICY_DENIED


async def test_what_is_more_than_one_handing_over_takes_is_asked_for_again(
    sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("licet_sidecar.services.shipping.BATCH_EVENTS_MAX", 1)
    for _ in range(10):
        await sidecar.check(action="plain")
    waiting = asked(sidecar, "shipped")
    rounds = 0
    while not waiting.done():
        await asyncio.wait_for(sidecar.shipping.urgent.wait(), 5)
        sidecar.shipping.urgent.clear()
        await ship(sidecar)
        await asyncio.sleep(0)
        rounds += 1
    assert rounds > 1
    assert (await waiting).effect == pb.EFFECT_APPROVED


@pytest.mark.parametrize(
    ("action", "effect", "reason"),
    [
        ("shipped", pb.EFFECT_DENIED, pb.REASON_DEGRADED_DENY),
        ("shipped.open", pb.EFFECT_APPROVED, pb.REASON_OK),
    ],
)
async def test_without_redis_the_action_decides_and_the_units_are_taken_and_recorded(
    sidecar: FakeSidecar, action: str, effect: int, reason: int
) -> None:
    used, events = sidecar.used(), len(sidecar.events())
    waiting = asked(sidecar, action, quantity=3)
    await until(sidecar.shipping.urgent.is_set)
    sidecar.sink.trouble = LinkDown("gone")
    with pytest.raises(LinkDown):
        await ship(sidecar)
    response = await waiting
    assert (response.effect, response.reason, response.degraded) == (effect, reason, True)
    assert "not shipped yet: gone" in response.message
    assert bool(response.decision_id) is (effect == pb.EFFECT_APPROVED)
    assert (sidecar.used(), len(sidecar.events())) == (used + 3, events + 1)
    assert sidecar.events()[-1].effect == pb.EFFECT_APPROVED
    assert sidecar.tally.durability_missed == 1


async def test_while_redis_is_known_to_be_away_nobody_waits(sidecar: FakeSidecar) -> None:
    sidecar.link.failed(LinkDown("gone since noon"))
    response = await sidecar.check(action="shipped")
    assert "gone since noon" in response.message
    assert response.retry_after.seconds == 1
    assert not sidecar.shipping.urgent.is_set()


async def test_a_caller_out_of_time_is_told_that_it_is_recorded(sidecar: FakeSidecar) -> None:
    answer = await sidecar.call("Check", ask(action="shipped"), timeout_s=0.05)
    response = pb.CheckResponse.FromString(answer)
    assert (response.effect, response.reason) == (pb.EFFECT_DENIED, pb.REASON_DEGRADED_DENY)
    assert f"{sidecar.log.last_seq:016x}" in response.message
    await ship(sidecar)
    assert sidecar.log.last_seq in shipped_seqs(sidecar)  # it was recorded, and arrives


async def test_who_repeats_the_call_gets_the_answer_once_it_is_safe(sidecar: FakeSidecar) -> None:
    fields: Any = {"action": "shipped", "idempotency_key": "k", "quantity": 5}
    used = sidecar.used()
    missed = pb.CheckResponse.FromString(await sidecar.call("Check", ask(**fields), timeout_s=0.05))
    assert missed.effect == pb.EFFECT_DENIED
    again = asked(sidecar, **fields)
    await until(lambda: sidecar.tally.durability_waits == 3)
    await ship(sidecar)
    response = await again
    assert (response.effect, int(response.decision_id[16:], 16)) == (pb.EFFECT_APPROVED, sidecar.log.last_seq)
    assert sidecar.used() == used + 5
    request = ask(**fields).SerializeToString()
    assert isinstance(sidecar.service.handle("Check", request, 1.0), bytes)  # and from then on at once


async def test_a_repeat_after_a_restart_waits_for_the_log_of_before(world: World) -> None:
    fields: Any = {"action": "shipped", "idempotency_key": "k"}
    async with running(world) as before:
        await before.check(action="synced.open")
        missed = pb.CheckResponse.FromString(await before.call("Check", ask(**fields), timeout_s=0.05))
        assert missed.effect == pb.EFFECT_DENIED
    async with running(world, incarnation=2) as sidecar:
        again = asked(sidecar, **fields)
        await until(sidecar.shipping.urgent.is_set)
        assert not again.done()
        await ship(sidecar)
        assert (await again).effect == pb.EFFECT_APPROVED
        assert {one.tenant for one in sidecar.events()} == set()


@pytest.mark.parametrize(
    ("action", "effect", "reason"),
    [
        ("synced", pb.EFFECT_DENIED, pb.REASON_USAGE_LOG_FULL),
        ("synced.open", pb.EFFECT_APPROVED, pb.REASON_OK),
    ],
)
async def test_a_disk_that_does_not_sync_lets_the_action_decide(
    sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch, action: str, effect: int, reason: int
) -> None:
    disk = Disk(monkeypatch)
    disk.error = OSError(errno.EIO, "the disk failed")
    disk.let_go()
    response = await sidecar.check(action=action)
    assert (response.effect, response.reason, response.degraded) == (effect, reason, True)
    assert "not synced yet" in response.message
    assert "the disk failed" in response.message
    assert sidecar.tally.log_failures == 1


async def test_observe_mode_never_denies_for_want_of_durability(world: World) -> None:
    world.push(content(), observe=True)
    async with running(world) as sidecar:
        sidecar.link.failed(LinkDown("gone"))
        response = await sidecar.check(action="shipped")
        assert (response.effect, response.degraded) == (pb.EFFECT_APPROVED, True)


async def test_nothing_is_waited_for_what_was_not_logged(sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    await sidecar.check(action="shipped", mode=pb.MODE_PEEK)
    monkeypatch.setattr(sidecar.log, "_bytes_max", sidecar.log.total_bytes)
    assert (await sidecar.check(action="shipped")).reason == pb.REASON_USAGE_LOG_FULL
    assert not sidecar.shipping.urgent.is_set()


async def test_a_batch_leaves_when_all_of_it_is_safe(sidecar: FakeSidecar) -> None:
    waiting = asyncio.ensure_future(
        sidecar.batch([ask(action="plain"), ask(action="shipped"), ask(action="synced"), ask(action="shipped")])
    )
    await until(sidecar.shipping.urgent.is_set)
    assert not waiting.done()
    await ship(sidecar)
    assert [one.effect for one in await waiting] == [pb.EFFECT_APPROVED] * 4


async def test_a_batch_whose_lease_ran_dry_waits_too(sidecar: FakeSidecar) -> None:
    # All that is left: no lease has it, so that the batch waits for Redis first.
    waiting = asyncio.ensure_future(sidecar.batch([ask(action="shipped"), ask(action="shipped", quantity=90)]))
    await until(sidecar.shipping.urgent.is_set)
    await ship(sidecar)
    assert [one.effect for one in await waiting] == [pb.EFFECT_APPROVED] * 2


async def test_in_a_batch_only_what_is_not_safe_is_denied(sidecar: FakeSidecar) -> None:
    sidecar.link.failed(LinkDown("gone"))
    answers = await sidecar.batch([ask(action="plain"), ask(action="shipped"), ask(action="synced")])
    assert [one.reason for one in answers] == [pb.REASON_OK, pb.REASON_DEGRADED_DENY, pb.REASON_OK]


async def test_a_reservation_is_answered_when_it_is_shipped(sidecar: FakeSidecar) -> None:
    waiting = asyncio.ensure_future(sidecar.reserve(action="shipped", quantity=5))
    await until(sidecar.shipping.urgent.is_set)
    assert not waiting.done()
    await ship(sidecar)
    reserved = await waiting
    assert reserved.decision.effect == pb.EFFECT_APPROVED
    commit = asyncio.ensure_future(sidecar.commit(reserved.reservation_id, quantity=5))
    await until(lambda: sidecar.tally.durability_waits == 3)
    assert not commit.done()
    await ship(sidecar)
    committed = await commit
    assert (committed.state, committed.decision.degraded) == (pb.RESERVATION_STATE_COMMITTED, False)


async def test_a_reservation_that_is_not_shipped_in_time_stays_held_for_a_repeat(sidecar: FakeSidecar) -> None:
    sidecar.link.failed(LinkDown("gone"))
    refused = await sidecar.reserve(action="shipped", quantity=5, idempotency_key="r")
    assert (refused.decision.effect, refused.reservation_id) == (pb.EFFECT_DENIED, "")
    assert sidecar.reserved() == 5
    sidecar.link.succeeded()
    again = asyncio.ensure_future(sidecar.reserve(action="shipped", quantity=5, idempotency_key="r"))
    await until(sidecar.shipping.urgent.is_set)
    await ship(sidecar)
    assert (await again).reservation_id
    assert sidecar.reserved() == 5


async def test_a_commit_stands_and_says_when_it_is_not_safe(sidecar: FakeSidecar) -> None:
    waiting = asyncio.ensure_future(sidecar.reserve(action="shipped", quantity=5))
    await until(sidecar.shipping.urgent.is_set)
    await ship(sidecar)
    id_ = (await waiting).reservation_id
    sidecar.link.failed(LinkDown("gone"))
    committed = await sidecar.commit(id_, quantity=5)
    assert (committed.state, committed.decision.effect) == (pb.RESERVATION_STATE_COMMITTED, pb.EFFECT_APPROVED)
    assert committed.decision.degraded
    assert "not shipped yet" in committed.decision.message
    sidecar.link.succeeded()
    again = asyncio.ensure_future(sidecar.commit(id_, quantity=5))
    await until(lambda: sidecar.tally.durability_waits == 4)
    await ship(sidecar)
    assert "not shipped yet" not in (await again).decision.message


async def test_redis_over_its_bound_is_left_alone_and_nobody_waits(sidecar: FakeSidecar) -> None:
    sidecar.shipping.backlog_batches = 1_000
    assert await sidecar.shipping.next_batches() == []
    response = await sidecar.check(action="shipped")
    assert "1,000 batches wait in Redis" in response.message


async def test_a_full_redis_is_given_time(sidecar: FakeSidecar, world: World) -> None:
    waiting = asked(sidecar, "shipped.open")
    await until(sidecar.shipping.urgent.is_set)
    sidecar.sink.trouble = LinkFull("OOM")
    with pytest.raises(LinkFull):
        await ship(sidecar)
    assert "Redis is full" in (await waiting).message
    sidecar.sink.trouble = None
    await ship(sidecar)
    assert sidecar.sink.batches == []
    world.clock.advance(1.001)
    await ship(sidecar)
    assert shipped_seqs(sidecar) == list(range(1, sidecar.log.last_seq + 1))
