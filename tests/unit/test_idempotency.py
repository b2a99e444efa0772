"""Repeated calls over restarts, rotations, acknowledgements and time: against an obvious model, and by example."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from licet.domain.catalog import Action, Attribute, AttributeType, Catalog, Entitlement, Feature, Plan
from licet.v1 import approval_pb2 as pb
from licet_sidecar.adapters.usage_log import RETAINED_S
from licet_sidecar.services import idempotency
from licet_sidecar.services.approval import Malformed
from tests.support.published import catalog, limit
from tests.support.sidecar import SIDECAR, FakeSidecar, World, ask, hurried, running


def content(*more: Any) -> Catalog:
    """An action that declares attributes, one that does not, and one with two meters."""
    plan = Plan("pro", {"free": Entitlement(), "reports": Entitlement(limits=(limit(1_000),))})
    return catalog(
        *(Feature(name) for name in plan.features),
        Action("free", {"": "free"}),
        Action(
            "typed",
            {"": "free"},
            {"share": Attribute(AttributeType.DOUBLE), "region": Attribute(AttributeType.STRING, "eu")},
        ),
        Action("twice", {"one": "free", "two": "reports"}),
        plan,
        *more,
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(content())
    made.license("acme")
    return made


@pytest.fixture
async def forgetful(world: World) -> AsyncIterator[FakeSidecar]:
    """A sidecar that has everything from its log."""
    async with running(world) as made:
        yield made


def forget(sidecar: FakeSidecar) -> None:
    """Puts the answers in memory out of mind."""
    sidecar.recent._answers.clear()
    sidecar.recent._order.clear()


def acknowledged(sidecar: FakeSidecar, world: World, watermark: int) -> None:
    """What a pulse does."""
    for header, last_seq in sidecar.log.logs():
        sidecar.log.release(SIDECAR, header.incarnation, min(last_seq, watermark), world.clock.boot_ms() / 1e3)
    sidecar.recent.expire()


# Against a model


@dataclass
class Call:
    """The last call that took a key."""

    quantity: int
    decision_id: str
    incarnation: int
    seq: int
    acknowledged_ms: int | None = None


class History:
    """A sidecar's lives, and what must be known in each moment."""

    def __init__(self, directory: Path) -> None:
        self.world = World(directory)
        self.world.push(content())
        self.world.license("acme")
        self.calls: dict[str, Call] = {}
        self.watermarks: dict[int, int] = {}
        self.incarnation = 0

    async def start(self) -> None:
        self.incarnation += 1
        self.sidecar = FakeSidecar(self.world, incarnation=self.incarnation)
        self.sidecar.start()
        await self.sidecar.synced()
        # What was past and deleted is gone; of the rest nobody wrote down when it was acknowledged.
        self.calls = {name: call for name, call in self.calls.items() if self._is_logged(call) or self.known(name)}
        for call in self.calls.values():
            call.acknowledged_ms = None

    def _is_logged(self, call: Call) -> bool:
        return any(
            segment.header.incarnation == call.incarnation and segment.header.first_seq <= call.seq <= segment.last_seq
            for segment in self.sidecar.log.segments
        )

    def known(self, name: str) -> Call | None:
        """The call that a repeat must get the answer of."""
        call = self.calls.get(name)
        if call is None or call.acknowledged_ms is None:
            return call
        is_past = call.acknowledged_ms + 1_000 * RETAINED_S <= self.world.clock.boot_ms()
        return None if is_past else call

    async def call(self, key: str, quantity: int, action: str) -> None:
        await self._ask([ask(action=action, quantity=quantity, idempotency_key=key)], batched=False)

    async def batch(self, keys: list[str]) -> None:
        if keys:
            await self._ask([ask(action="free", quantity=1, idempotency_key=key) for key in keys], batched=True)

    async def _ask(self, requests: list[pb.CheckRequest], *, batched: bool) -> None:
        self.pulse()
        sidecar = self.sidecar
        sidecar.engine.as_of_us = self.world.clock.us
        before = sidecar.log.last_seq

        async def asked() -> list[pb.CheckResponse]:
            return await sidecar.batch(requests) if batched else [await sidecar.check(requests[0])]

        names = [f"{request.action} {request.idempotency_key}" for request in requests]
        known = [self.known(name) for name in names]
        if any(call and call.quantity != asked_.quantity for call, asked_ in zip(known, requests, strict=True)):
            with pytest.raises(Malformed, match="idempotency_key"):
                await asked()
            assert sidecar.log.last_seq == before, "nothing was taken"
            return
        answers = await asked()
        made: dict[str, Call] = {}
        for name, request, answer in zip(names, requests, answers, strict=True):
            call = self.known(name) if name not in made else made[name]
            if call is None:
                seq = before + len(made) + 1
                assert answer.decision_id not in {one.decision_id for one in self.calls.values()}
                made[name] = Call(request.quantity, answer.decision_id, self.incarnation, seq)
            else:
                assert answer.decision_id == call.decision_id
        assert sidecar.log.last_seq == before + len(made)
        self.calls |= made

    def pulse(self) -> None:
        now_ms = self.world.clock.boot_ms()
        log = self.sidecar.log
        for header, _ in log.logs():
            log.release(SIDECAR, header.incarnation, self.watermarks.get(header.incarnation, 0), now_ms / 1e3)
        self.sidecar.recent.expire()
        for call in self.calls.values():
            if call.acknowledged_ms is None and call.seq <= self.watermarks.get(call.incarnation, 0):
                call.acknowledged_ms = now_ms

    def acknowledge(self, missing: int) -> None:
        for header, last_seq in self.sidecar.log.logs():
            before = self.watermarks.get(header.incarnation, 0)
            self.watermarks[header.incarnation] = max(before, last_seq - missing)
        self.pulse()

    def rotate(self) -> None:
        if self.sidecar.log.last_seq >= self.sidecar.log.segments[-1].header.first_seq:  # as only a full one is
            self.sidecar.log.rotate(self.sidecar.leasing.lease_records())

    async def restart(self, killed: bool) -> None:
        await (self.sidecar.kill() if killed else self.sidecar.stop())
        await self.start()
        await self.sidecar.recent.recover_older()

    def advance(self, seconds: float) -> None:
        self.world.advance(seconds)

    async def again_after(self, key: str, seconds: float) -> None:
        """A call, its acknowledgement, and the same call so much later: what chance alone brings about too rarely."""
        await self.call(key, 1, "free")
        self.acknowledge(0)
        self.advance(seconds)
        await self.call(key, 1, "free")


STEPS = st.one_of(
    st.tuples(st.just("call"), st.sampled_from("abc"), st.integers(0, 2), st.sampled_from(["free", "typed"])),
    st.tuples(st.just("call"), st.sampled_from("abc"), st.just(1), st.just("free")),
    st.tuples(st.just("rotate")),
    st.tuples(st.just("acknowledge"), st.integers(0, 3)),
    st.tuples(st.just("restart"), st.booleans()),
    st.tuples(st.just("advance"), st.sampled_from([0.001, 1, 300, RETAINED_S - 1, RETAINED_S])),
    st.tuples(st.just("again_after"), st.sampled_from("abc"), st.sampled_from([1, RETAINED_S - 1, RETAINED_S])),
    st.tuples(st.just("batch"), st.lists(st.sampled_from("abc"), max_size=4)),
)


@given(steps=st.lists(STEPS, max_size=30), answers_max=st.integers(1, 4), at_once=st.sampled_from([1, 3, 1_000]))
@settings(max_examples=150, deadline=None)
def test_any_history_answers_as_the_model_says(steps: list[tuple[Any, ...]], answers_max: int, at_once: int) -> None:
    async def play(directory: Path) -> None:
        history = History(directory)
        await history.start()
        try:
            for name, *arguments in steps:
                done = getattr(history, name)(*arguments)
                if done is not None:
                    await done
        finally:
            await history.sidecar.kill()
            history.sidecar.log.close()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        hurried(patch)
        patch.setattr(idempotency, "ANSWERS_MAX", answers_max)
        patch.setattr(idempotency, "KNOWN_AT_ONCE", at_once)
        asyncio.run(play(Path(directory)))


# By example


FIRST = ask(
    action="typed",
    quantity=3,
    idempotency_key="k",
    subject={"type": "user", "id": "ada", "on_behalf_of": "bob", "roles": ["member"]},
    resource=pb.Resource(type="report", id="r1"),
    context={"share": float("nan"), "undeclared": 7},
)


def changed(**changes: Any) -> pb.CheckRequest:
    request = pb.CheckRequest()
    request.CopyFrom(FIRST)
    for name, value in changes.items():
        target = request
        *path, last = name.split("__")
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return request


def with_context(name: str, value: str) -> pb.CheckRequest:
    request = changed()
    request.context[name].string_value = value
    return request


OTHERS = {
    "quantity": changed(quantity=4),
    "subject type": changed(subject__type="service"),
    "subject": changed(subject__id="eve"),
    "on behalf of": changed(subject__on_behalf_of=""),
    "resource type": changed(resource__type=""),
    "resource": changed(resource__id="r2"),
    "declared attribute": with_context("region", "us"),
}
ALIKE = {
    "the same": FIRST,
    "the default, said": with_context("region", "eu"),
    "undeclared attribute": with_context("undeclared", "x"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("after", ["in time", "in batches", "restart"])
async def test_a_key_is_refused_for_another_request_also_when_only_the_log_knows_it(
    world: World, other: pb.CheckRequest, after: str
) -> None:
    sidecar = FakeSidecar(world)
    sidecar.start()
    await sidecar.synced()
    await sidecar.check(FIRST)
    if after == "restart":
        await sidecar.kill()
        sidecar = FakeSidecar(world, incarnation=2)
        sidecar.start()
        await sidecar.synced()
    else:
        forget(sidecar)
    before = len(sidecar.events())
    with pytest.raises(Malformed, match="idempotency_key: it was used for another request"):
        await (sidecar.batch([ask(action="free"), other]) if after == "in batches" else sidecar.check(other))
    assert len(sidecar.events()) == before
    await sidecar.stop()


@pytest.mark.parametrize("same", ALIKE.values(), ids=ALIKE.keys())
async def test_what_an_event_does_not_tell_apart_is_the_same_request(
    forgetful: FakeSidecar, same: pb.CheckRequest
) -> None:
    first = await forgetful.check(FIRST)
    forget(forgetful)
    assert (await forgetful.check(same)).decision_id == first.decision_id
    assert len(forgetful.events()) == 1


async def test_an_honest_repeat_is_not_refused_because_a_new_bundle_reads_it_otherwise(world: World) -> None:
    async with running(world) as sidecar:
        first = await sidecar.check(FIRST)
        forget(sidecar)
        world.push(content(Action("typed", {"": "reports"}, {"region": Attribute(AttributeType.STRING, "us")})))
        await sidecar.synced()
        assert (await sidecar.check(FIRST)).decision_id == first.decision_id
        with pytest.raises(Malformed, match="idempotency_key"):
            await sidecar.check(OTHERS["subject"])
        world.push(content().__class__())  # no such action any more
        await sidecar.synced()
        assert (await sidecar.check(FIRST)).decision_id == first.decision_id


async def test_a_repeat_that_does_not_fit_its_action_is_malformed(forgetful: FakeSidecar) -> None:
    await forgetful.check(action="twice", quantities={"one": 1, "two": 2}, idempotency_key="k")
    forget(forgetful)
    with pytest.raises(Malformed, match="has no such meter"):
        await forgetful.check(action="twice", quantities={"three": 1}, idempotency_key="k")
    with pytest.raises(Malformed, match="another request"):
        await forgetful.check(action="twice", quantities={"one": 2, "two": 1}, idempotency_key="k")


async def test_a_denial_before_units_were_read_is_repeated(forgetful: FakeSidecar, world: World) -> None:
    first = await forgetful.check(ask("nobody", "free", quantity=3, idempotency_key="k"))
    assert first.reason == pb.REASON_NO_LICENSE
    forget(forgetful)
    again = await forgetful.check(ask("nobody", "free", quantity=3, idempotency_key="k"))
    assert (again.decision_id, again.reason) == (first.decision_id, pb.REASON_NO_LICENSE)


async def test_a_repeat_after_its_segment_is_gone_is_a_new_call(forgetful: FakeSidecar, world: World) -> None:
    first = await forgetful.check(FIRST)
    forgetful.log.rotate([])
    acknowledged(forgetful, world, 1)
    world.advance(RETAINED_S)
    acknowledged(forgetful, world, 1)
    assert len(forgetful.log.segments) == 1
    forgetful.engine.as_of_us = world.clock.us
    again = await forgetful.check(FIRST)
    assert again.decision_id != first.decision_id
    assert (await forgetful.check(FIRST)).decision_id == again.decision_id


async def test_a_damaged_record_is_not_an_answer(forgetful: FakeSidecar) -> None:
    first = await forgetful.check(FIRST)
    forget(forgetful)
    path = forgetful.log.segments[-1].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert (await forgetful.check(FIRST)).decision_id != first.decision_id


async def test_answers_of_every_segment_and_incarnation_are_known_at_last(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "KNOWN_AT_ONCE", 3)
    monkeypatch.setattr(idempotency, "EVENTS_PER_TURN", 2)
    given: dict[str, str] = {}
    for incarnation in (1, 2):
        sidecar = FakeSidecar(world, incarnation=incarnation)
        sidecar.start()
        await sidecar.synced()
        for number in range(8):
            key = f"{incarnation}-{number}"
            given[key] = (await sidecar.check(action="free", idempotency_key=key)).decision_id
            if number % 3 == 2:
                sidecar.log.rotate([])
        await sidecar.kill()
    async with running(world, incarnation=3) as sidecar:

        async def known() -> list[str]:
            found = []
            for key in given:
                if sidecar.recent.find(("acme", "free", key)) is not None:
                    answer = await sidecar.check(action="free", idempotency_key=key)
                    assert answer.decision_id == given[key]
                    found.append(key)
            return found

        assert await known() == ["2-3", "2-4", "2-5", "2-6", "2-7"], "the newest segments, before the first call"
        await sidecar.check(action="free", idempotency_key="3-0")
        await sidecar.recent.recover_older()
        assert await known() == list(given)
        assert len(sidecar.events()) == 1


async def test_what_is_put_together_from_the_log_says_that_it_was_observed(world: World) -> None:
    world.push(content(), observe=True)
    async with running(world) as sidecar:
        denied = ask("acme", "unknown", idempotency_key="k")
        first = await sidecar.check(denied)
        forget(sidecar)
        again = await sidecar.check(denied)
        assert (again.effect, again.metadata) == (first.effect, first.metadata)
        assert again.metadata["observed_effect"] == "DENIED"
