"""``RequestAccess``, ``GetAccessRequest`` and ``WatchAccessRequest`` over a sidecar whose Redis is a fake."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from licet.domain.approvals import Override, OverrideEffect, RequestEntry, RequestState, request_key
from licet.domain.catalog import Policy, Rule, RuleEffect
from licet.domain.outcomes import Effect
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import EventKind
from licet_sidecar.ports import LinkDown
from licet_sidecar.services import access
from licet_sidecar.services.refusals import Malformed, NotReady
from tests.support.published import OTHER_KEY, Signer, catalog, limit
from tests.support.sidecar import FakeSidecar, World, ask, hurried, running, until

S = 1_000_000
GUARD = Policy("guard", ("report.*",), (Rule("large", RuleEffect.REQUIRE_APPROVAL, "quantity > 10"),))
ANA = {"subject": {"type": "user", "id": "ana"}, "quantity": 50}
KEY = request_key("acme", ("user", "ana"), "", "report.export", "guard/large")
PENDING, APPROVED, DENIED, EXPIRED, UNKNOWN = (
    pb.ACCESS_REQUEST_STATE_PENDING,
    pb.ACCESS_REQUEST_STATE_APPROVED,
    pb.ACCESS_REQUEST_STATE_DENIED,
    pb.ACCESS_REQUEST_STATE_EXPIRED,
    pb.ACCESS_REQUEST_STATE_UNKNOWN,
)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    monkeypatch.setattr(access, "WATCH_TICK_S", 0.005)
    made = World(tmp_path)
    made.push(catalog(GUARD, limits=[limit(1_000)]))
    made.license("acme")
    return made


def entry(world: World, id_: str, state: RequestState, **changes: Any) -> RequestEntry:
    now_us = world.clock.us
    return replace(RequestEntry(id_, KEY, state, now_us, now_us + 3_600 * S, "ben", "fine"), **changes)


async def asked(sidecar: FakeSidecar, justification: str = "", **fields: Any) -> pb.RequestAccessResponse:
    request = pb.RequestAccessRequest(check=ask(**{**ANA, **fields}), justification=justification)
    return pb.RequestAccessResponse.FromString(await sidecar.call("RequestAccess", request))


async def got(sidecar: FakeSidecar, id_: str, tenant: str = "acme") -> pb.AccessRequest:
    request = pb.GetAccessRequestRequest(tenant=tenant, access_request_id=id_)
    return pb.AccessRequest.FromString(await sidecar.call("GetAccessRequest", request))


class Watch:
    """A watch under way: what it has said, and how it ended."""

    def __init__(self, sidecar: FakeSidecar, id_: str) -> None:
        self.seen: list[pb.AccessRequest] = []
        self._request = pb.GetAccessRequestRequest(tenant="acme", access_request_id=id_).SerializeToString()
        self.task = asyncio.get_running_loop().create_task(self._run(sidecar))

    async def _run(self, sidecar: FakeSidecar) -> None:
        async for message in sidecar.service.stream("WatchAccessRequest", self._request):
            self.seen.append(pb.AccessRequest.FromString(message))

    @property
    def states(self) -> list[int]:
        return [one.state for one in self.seen]


async def test_a_pending_answer_and_its_event_carry_the_request_that_an_explicit_one_adds_words_to(
    world: World,
) -> None:
    async with running(world) as sidecar:
        checked = await sidecar.check(**ANA)
        explicit = await asked(sidecar, "end of quarter")
        assert checked.effect == explicit.decision.effect == pb.EFFECT_PENDING
        assert checked.access_request_id == explicit.decision.access_request_id == explicit.request.id != ""
        assert (explicit.request.state, explicit.request.confirmed) == (PENDING, False)
        first, second = sidecar.events()
        assert (first.kind, first.effect, first.access_request_id) == (
            EventKind.CHECK, Effect.PENDING, checked.access_request_id,
        )  # fmt: skip
        assert (second.kind, second.justification, second.access_request_id) == (
            EventKind.REQUEST_ACCESS, "end of quarter", checked.access_request_id,
        )  # fmt: skip
        assert (second.units, second.units_held, second.spends) == ({}, {"reports": 50}, [])


@pytest.mark.parametrize("quantity", [5, 2_000])
async def test_what_no_approval_is_needed_for_or_would_help_is_not_asked_for(world: World, quantity: int) -> None:
    world.push(catalog(limits=[limit(1_000)]))
    async with running(world) as sidecar:
        response = await asked(sidecar, quantity=quantity)
        assert response.decision.effect == (pb.EFFECT_APPROVED if quantity == 5 else pb.EFFECT_DENIED)
        assert not response.HasField("request")
        assert sidecar.events() == []
        assert sidecar.used() == 0


async def test_a_reservation_that_needs_an_approval_asks_for_it(world: World) -> None:
    async with running(world) as sidecar:
        reserved = await sidecar.reserve(**ANA)
        (event,) = sidecar.events()
        assert event.access_request_id == reserved.decision.access_request_id != ""
        assert (event.kind, event.units_held) == (EventKind.RESERVE, {"reports": 50})


async def test_a_repeated_check_gets_the_request_of_the_first_also_after_a_restart(world: World) -> None:
    async with running(world) as sidecar:
        first = await sidecar.check(idempotency_key="k", **ANA)
        await sidecar.kill()
    async with running(world, incarnation=2) as sidecar:
        again = await sidecar.check(idempotency_key="k", **ANA)
        assert again.access_request_id == first.access_request_id != ""


async def test_a_client_in_a_loop_asks_for_one_request(world: World) -> None:
    async with running(world) as sidecar:
        ids = {(await sidecar.check(**ANA)).access_request_id for _ in range(200)}
        assert len(ids) == 1
        assert (await asked(sidecar)).request.id in ids


async def test_an_approval_is_heard_by_a_watch_and_lifts_the_rule_at_once(world: World) -> None:
    async with running(world) as sidecar:
        id_ = (await sidecar.check(**ANA)).access_request_id
        watch = Watch(sidecar, id_)
        await until(lambda: watch.states == [PENDING])
        world.license("acme", requests=(entry(world, id_, RequestState.PENDING, by="", reason=""),))
        await until(lambda: len(watch.seen) == 2)
        assert (watch.seen[1].state, watch.seen[1].confirmed) == (PENDING, True)
        world.license("acme", requests=(entry(world, id_, RequestState.APPROVED, units=70, feature="reports"),))
        await watch.task
        assert watch.states == [PENDING, PENDING, APPROVED]
        final = watch.seen[-1]
        assert (final.decided_by, final.reason, final.units) == ("ben", "fine", 70)
        assert final.ends_at.ToMicroseconds() == world.clock.us + 3_600 * S
        answer = await sidecar.check(**ANA)
        assert (answer.effect, answer.access_request_id) == (pb.EFFECT_APPROVED, id_)
        assert sidecar.events()[-1].access_request_id == id_
        assert (await sidecar.check(**ANA)).effect == pb.EFFECT_PENDING  # 70 units do not pay for it twice


async def test_units_of_an_approval_are_never_overspent_by_several_sidecars(world: World) -> None:
    units = RequestEntry("1" * 32, KEY, RequestState.APPROVED, world.clock.us, world.clock.us + 3_600 * S, units=55)
    world.license("acme", requests=(replace(units, feature="reports"),))
    async with running(world) as one, running(world, sidecar="6" * 32) as other:
        spent = 0
        for turn in range(12):
            answer = await (one, other)[turn % 2].check(subject=ANA["subject"], quantity=11)
            spent += 11 * (answer.effect == pb.EFFECT_APPROVED)
        assert spent == 55


async def test_a_request_that_nobody_decides_expires_by_the_sidecars_clock(world: World) -> None:
    id_ = "2" * 32
    world.license("acme", requests=(entry(world, id_, RequestState.PENDING),))
    async with running(world) as sidecar:
        assert (await got(sidecar, id_)).state == PENDING
        watch = Watch(sidecar, id_)
        await until(lambda: watch.states == [PENDING])
        world.advance(3_600)
        world.publisher.beat(world.clock.us)
        sidecar.hear_head()
        await watch.task
        assert watch.states == [PENDING, EXPIRED]
        assert (await got(sidecar, id_)).state == EXPIRED
        assert (await sidecar.check(**ANA)).access_request_id not in ("", id_)


async def test_while_redis_is_away_a_watch_says_so_and_never_guesses_how_it_ended(world: World) -> None:
    id_ = "2" * 32
    world.license("acme", requests=(entry(world, id_, RequestState.PENDING),))
    async with running(world) as sidecar:
        await got(sidecar, id_)
        watch = Watch(sidecar, id_)
        await until(lambda: watch.states == [PENDING])
        world.source.trouble = LinkDown("away")
        sidecar.link.failed(LinkDown("away"))
        await until(lambda: len(watch.seen) == 2)
        assert (watch.seen[1].state, watch.seen[1].degraded) == (PENDING, True)
        world.advance(3_600)
        with pytest.raises(NotReady, match="cannot be known"):
            await watch.task
        assert set(watch.states) == {PENDING}


async def test_a_watch_goes_on_when_redis_is_back(world: World) -> None:
    id_ = "2" * 32
    world.license("acme", requests=(entry(world, id_, RequestState.PENDING),))
    async with running(world) as sidecar:
        await got(sidecar, id_)
        watch = Watch(sidecar, id_)
        world.source.trouble = LinkDown("away")
        sidecar.link.failed(LinkDown("away"))
        await until(lambda: watch.seen and watch.seen[-1].degraded)
        world.source.trouble = None
        world.license("acme", requests=(entry(world, id_, RequestState.DENIED),))
        await watch.task
        assert watch.states[-1] == DENIED
        assert not watch.seen[-1].degraded


async def test_an_approval_and_an_override_end_by_themselves_while_redis_is_away(world: World) -> None:
    end_us = world.clock.us + 60 * S
    world.push(
        catalog(GUARD, limits=[limit(1_000)]),
        overrides=(Override("i", "report.*", OverrideEffect.DENY, end_us, "INC-1", "root", "acme", "eve"),),
    )
    world.license("acme", requests=(entry(world, "2" * 32, RequestState.APPROVED, until_us=end_us),))
    eve = {"subject": {"id": "eve"}}
    async with running(world) as sidecar:
        assert (await sidecar.check(**ANA)).effect == pb.EFFECT_APPROVED
        assert (await sidecar.check(**eve)).rule == "override/i"
        world.source.trouble = LinkDown("away")
        world.clock.advance(60)
        assert (await sidecar.check(**ANA)).effect == pb.EFFECT_PENDING
        assert (await sidecar.check(**eve)).rule == ""


async def test_a_stopping_sidecar_ends_its_watches(world: World) -> None:
    id_ = "2" * 32
    world.license("acme", requests=(entry(world, id_, RequestState.PENDING),))
    async with running(world) as sidecar:
        watch = Watch(sidecar, id_)
        await until(lambda: watch.states == [PENDING])
        sidecar.access.stop()
        with pytest.raises(NotReady, match="watch again"):
            await watch.task


async def test_a_watch_waits_a_little_for_a_request_that_another_sidecar_was_asked_for(world: World) -> None:
    id_ = "2" * 32
    async with running(world) as sidecar:
        assert (await got(sidecar, id_)).state == UNKNOWN
        watch = Watch(sidecar, id_)
        world.license("acme", requests=(entry(world, id_, RequestState.DENIED),))
        await watch.task
        assert watch.states == [DENIED]
        late = Watch(sidecar, "3" * 32)
        await until(lambda: sidecar.access._watches == 1)
        world.clock.advance(access.UNKNOWN_S_MAX)
        await late.task
        assert late.states == [UNKNOWN]


async def test_watches_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "WATCHES_MAX", 1)
    id_ = "2" * 32
    world.license("acme", requests=(entry(world, id_, RequestState.PENDING),))
    async with running(world) as sidecar:
        first = Watch(sidecar, id_)
        await until(lambda: first.states == [PENDING])
        with pytest.raises(NotReady, match="watch access requests already"):
            await Watch(sidecar, id_).task
        first.task.cancel()
        await asyncio.gather(first.task, return_exceptions=True)
        again = Watch(sidecar, id_)
        await until(lambda: again.states == [PENDING])
        again.task.cancel()
        await asyncio.gather(again.task, return_exceptions=True)


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("GetAccessRequest", pb.GetAccessRequestRequest(tenant="acme", access_request_id="x"), "access_request_id"),
        ("GetAccessRequest", pb.GetAccessRequestRequest(tenant="", access_request_id="1" * 32), "tenant"),
        ("RequestAccess", pb.RequestAccessRequest(check=ask(tenant="")), "check.tenant"),
        ("RequestAccess", pb.RequestAccessRequest(check=ask(), justification="x" * 301), "justification"),
    ],
)
async def test_a_malformed_request_is_refused_by_its_field(
    world: World, method: str, request_: Any, field: str
) -> None:
    async with running(world) as sidecar:
        with pytest.raises(Malformed, match=f"^{field}"):
            await sidecar.call(method, request_)


async def test_another_tenants_request_is_not_told(world: World) -> None:
    id_ = "2" * 32
    world.license("acme", requests=(entry(world, id_, RequestState.APPROVED),))
    world.license("other")
    async with running(world) as sidecar:
        assert (await got(sidecar, id_)).state == APPROVED
        assert (await got(sidecar, id_, "other")).state == UNKNOWN
        mine = (await sidecar.check(**ANA, tenant="other")).access_request_id
        assert (await got(sidecar, mine)).state == UNKNOWN


def read_again(sidecar: FakeSidecar) -> None:
    """Everything, as after a gap in the stream."""
    sidecar.sync._following.wants_resync = True
    sidecar.sync._resync_wanted.set()


async def test_forged_altered_and_old_documents_lift_nothing(world: World) -> None:
    id_, forger = "2" * 32, Signer(OTHER_KEY)
    async with running(world) as sidecar:
        world.license("acme", requests=(entry(world, id_, RequestState.APPROVED),))
        await sidecar.synced()
        assert (await sidecar.check(**ANA)).effect == pb.EFFECT_APPROVED
        approving = world.source.licenses["acme"]
        revision = world.license("acme", requests=(entry(world, id_, RequestState.REVOKED),))
        await sidecar.synced()
        assert (await sidecar.check(**ANA)).effect == pb.EFFECT_PENDING

        license_ = world._licenses["acme"]
        lifting = replace(license_, requests=(entry(world, id_, RequestState.APPROVED),))
        good = world.source.licenses["acme"]
        bundle = world.source.manifest
        free = Override("i", "*", OverrideEffect.ALLOW, world.clock.us + 60 * S, "mine", "eve")
        manifest, _ = forger.bundle(world._catalog, revision + 1, overrides=(free,))
        for document in (approving, forger.license(lifting, revision + 1), good[:-1] + bytes([good[-1] ^ 1])):
            rejected = sidecar.tally.documents_rejected
            world.source.licenses["acme"] = document
            read_again(sidecar)
            await until(lambda: sidecar.tally.documents_rejected > rejected)  # noqa: B023
            assert (await sidecar.check(**ANA)).effect == pb.EFFECT_PENDING
        world.source.licenses["acme"] = good
        rejected = sidecar.tally.documents_rejected
        world.source.manifest = manifest
        read_again(sidecar)
        await until(lambda: sidecar.tally.documents_rejected > rejected)
        assert (await sidecar.check(**ANA)).effect == pb.EFFECT_PENDING
        world.source.manifest = bundle


async def test_explain_says_which_approval_or_override_it_is_and_makes_no_request(world: World) -> None:
    async def explained(sidecar: FakeSidecar) -> pb.ExplainResponse:
        answer = await sidecar.call("Explain", pb.ExplainRequest(check=ask(**ANA)))
        return pb.ExplainResponse.FromString(answer)

    async with running(world) as sidecar:
        first = await explained(sidecar)
        assert (first.decision.effect, first.decision.access_request_id) == (pb.EFFECT_PENDING, "")
        assert sidecar.events() == []
        world.license("acme", requests=(entry(world, "2" * 32, RequestState.APPROVED, units=70, feature="reports"),))
        await sidecar.synced()
        lifted = await explained(sidecar)
        assert lifted.decision.effect == pb.EFFECT_APPROVED
        policies, quotas = lifted.steps[-2:]
        assert policies.outcome == pb.STEP_OUTCOME_PASSED
        assert "ben approved it for 70 units" in policies.found[0]
        assert "2" * 32 in policies.found[0]
        assert [one.limit for one in quotas.limits] == ["reports:month", "reports:approval+" + "2" * 32]
        await sidecar.check(**ANA)
        used_up = await explained(sidecar)
        assert used_up.decision.effect == pb.EFFECT_PENDING
        assert used_up.steps[-2].outcome == pb.STEP_OUTCOME_DECIDED
        deny = Override("i", "*", OverrideEffect.DENY, world.clock.us + 60 * S, "INC-1", "root")
        world.push(catalog(GUARD), overrides=(deny,))
        await sidecar.synced()
        denied = await explained(sidecar)
        assert (denied.steps[0].step, denied.steps[0].outcome) == ("override", pb.STEP_OUTCOME_DECIDED)
        assert "INC-1" in denied.steps[0].found[0]
