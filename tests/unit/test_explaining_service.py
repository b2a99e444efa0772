"""``Explain`` and ``ListEntitlements`` over a sidecar whose Redis is a fake: nothing is taken, nothing is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Enforcement,
    Feature,
    Flag,
    Grant,
    LicenseStatus,
    Policy,
    Role,
    Rule,
    RuleEffect,
)
from licet.domain.flags import Target, Variant
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet_sidecar.services import explaining
from licet_sidecar.services.refusals import Malformed
from tests.support.published import MONTHLY, catalog, limit
from tests.support.sidecar import FakeSidecar, World, ask, running

EMBARGO = Policy(
    "guard",
    ("report.*",),
    (
        Rule("embargo", RuleEffect.DENY, 'context.region == "xx"'),
        Rule("large", RuleEffect.REQUIRE_APPROVAL, "quantity > 10"),
    ),
)
EXPORT = Action("report.export", {"": "reports"}, {"region": Attribute(AttributeType.STRING, "")})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def guarded(*more: Any) -> Catalog:
    return catalog(EXPORT, EMBARGO, *more, limits=[limit(100), limit(5, Period.MINUTE, scope=("subject",))])


async def explained(sidecar: FakeSidecar, **fields: Any) -> pb.ExplainResponse:
    request = pb.ExplainRequest(check=ask(**fields))
    return pb.ExplainResponse.FromString(await sidecar.call("Explain", request))


async def entitled(sidecar: FakeSidecar, **fields: Any) -> pb.ListEntitlementsResponse:
    request = pb.ListEntitlementsRequest(**{"tenant": "acme", **fields})
    return pb.ListEntitlementsResponse.FromString(await sidecar.call("ListEntitlements", request))


async def told(sidecar: FakeSidecar) -> None:
    """What it has spent is known to Redis."""
    sidecar.world.advance(8)
    await sidecar.upkeep()


def outcomes(response: pb.ExplainResponse) -> dict[str, str]:
    return {step.step: pb.StepOutcome.Name(step.outcome).removeprefix("STEP_OUTCOME_") for step in response.steps}


async def test_an_approval_passes_every_step_and_shows_what_remains(world: World) -> None:
    world.push(guarded())
    world.license("acme")
    async with running(world) as sidecar:
        await sidecar.check(subject={"id": "ada"}, quantity=3)
        response = await explained(sidecar, subject={"id": "ada"}, quantity=2)
        assert response.decision.effect == pb.EFFECT_APPROVED
        assert response.decision.decision_id == ""
        assert outcomes(response) == dict.fromkeys(
            ("license", "action", "freshness", "entitlement", "flags", "roles", "policies", "quotas"), "PASSED"
        )
        month, minute = response.steps[-1].limits
        assert (month.limit, month.asked, month.known, month.quota.remaining) == ("reports:month", 2, True, 97)
        assert (minute.limit, minute.known, minute.quota.remaining) == ("reports:minute@subject", True, 2)
        assert minute.quota.HasField("resets_at")
        assert sidecar.used() == 2 * 3  # of each of the two limits: what the check took
        assert len(sidecar.events()) == 1
        answered = list(sidecar.tally.answers)
        await explained(sidecar, subject={"id": "ada"})
        assert list(sidecar.tally.answers) == answered


async def test_a_denial_names_its_step_and_the_later_ones_are_shown_all_the_same(world: World) -> None:
    world.push(guarded(Role("analyst", ("report.*",))))
    world.license("acme")
    async with running(world) as sidecar:
        response = await explained(sidecar, context={"region": "xx"}, quantity=50)
        assert response.decision.reason == pb.REASON_ROLE_REQUIRED
        found = outcomes(response)
        assert (found["flags"], found["roles"], found["policies"]) == ("PASSED", "DECIDED", "NOT_REACHED")
        policies = response.steps[6]
        assert [(rule.rule, rule.match) for rule in policies.rules] == [
            ("guard/embargo", pb.RULE_MATCH_MATCHED),
            ("guard/large", pb.RULE_MATCH_MATCHED),
        ]
        assert policies.rules[0].condition == 'context.region == "xx"'
        assert "Policy rule guard/embargo denies this." in policies.found
        assert not response.steps[7].limits[0].known


async def test_shadow_rules_and_failing_conditions_say_so(world: World) -> None:
    failing = Policy("odd", ("*",), (Rule("zero", RuleEffect.DENY, "1 / (quantity - 2) > 0"),), Enforcement.SHADOW)
    world.push(guarded(failing))
    world.license("acme")
    async with running(world) as sidecar:
        response = await explained(sidecar, quantity=2)
        assert response.decision.effect == pb.EFFECT_APPROVED
        zero = next(rule for rule in response.steps[6].rules if rule.rule == "odd/zero")
        assert (zero.shadow, zero.match) == (True, pb.RULE_MATCH_FAILED)
        assert "zero" in zero.problem


async def test_an_exhausted_quota_is_explained_by_the_limit(world: World) -> None:
    world.push(guarded())
    world.license("acme", overrides={MONTHLY: 3})
    async with running(world) as sidecar:
        await sidecar.check(subject={"id": "ada"}, quantity=3)
        response = await explained(sidecar, subject={"id": "bob"}, quantity=2)
        assert response.decision.reason == pb.REASON_QUOTA_EXHAUSTED
        assert outcomes(response)["quotas"] == "DECIDED"
        month = response.steps[7].limits[0]
        assert (month.quota.limit, month.quota.remaining, month.on_exceeded) == (3, 0, "deny")


async def test_a_tenant_without_a_license_and_an_unknown_action_stop_at_once(world: World) -> None:
    world.push(guarded())
    async with running(world) as sidecar:
        response = await explained(sidecar, tenant="nobody")
        assert outcomes(response) == {"license": "DECIDED", "action": "NOT_REACHED", "freshness": "NOT_REACHED"}
        world.license("acme", status=LicenseStatus.SUSPENDED)
        await sidecar.synced()
        assert outcomes(await explained(sidecar))["license"] == "DECIDED"
        world.license("acme")
        await sidecar.synced()
        response = await explained(sidecar, action="report.exprot")
        assert outcomes(response) == {"license": "PASSED", "action": "DECIDED", "freshness": "NOT_REACHED"}


async def test_a_malformed_check_is_named_where_it_is(world: World) -> None:
    world.push(guarded())
    world.license("acme")
    async with running(world) as sidecar:
        with pytest.raises(Malformed, match=r"^check\.tenant"):
            await explained(sidecar, tenant="")
        with pytest.raises(Malformed, match=r"^check\.context\.region"):
            await explained(sidecar, context={"region": 3})
        with pytest.raises(Malformed, match=r"^tenant"):
            await entitled(sidecar, tenant="")


async def test_entitlements_say_what_remains_without_taking_any(world: World) -> None:
    grant = Grant("extra", MONTHLY, 50, 0, 4_000_000_000)
    unsold = Action("other.do", {"": "other"})
    world.push(guarded(Feature("reports", "report", "Reports"), Feature("other"), unsold))
    world.license("acme", grants=(grant,), ends_s=4_000_000_000)
    async with running(world) as other, running(world, sidecar="6" * 32) as sidecar:
        await other.check(subject={"id": "ada"}, quantity=3)
        await told(other)
        response = await entitled(sidecar, subject=pb.Subject(id="ada"))
        assert (response.license.plan, response.license.status, response.license.in_force) == ("pro", "active", True)
        assert response.license.ends_at.seconds == 4_000_000_000
        (reports,) = response.entitlements
        assert (reports.feature, reports.title, reports.unit, reports.rolled_out) == (
            "reports", "Reports", "report", True,
        )  # fmt: skip
        assert {one.limit: (one.known, one.quota.limit, one.quota.remaining) for one in reports.limits} == {
            "reports:month": (True, 100, 97),
            "reports:month+extra": (True, 50, 50),
            "reports:minute@subject": (True, 5, 2),
        }
        assert [(one.action, one.effect) for one in response.actions] == [("report.export", pb.EFFECT_APPROVED)]
        assert sidecar.used() == 0
        assert sum(lease.cap for lease in sidecar.leases.of("acme").all()) == 0
        assert sidecar.events() == []
        assert response.revision == sidecar.engine.revision

        response = await entitled(sidecar)  # nobody in particular has no limit of a subject
        assert [one.limit for one in response.entitlements[0].limits] == ["reports:month", "reports:month+extra"]


async def test_what_remains_is_asked_again_after_a_moment(world: World) -> None:
    world.push(guarded())
    world.license("acme")
    async with running(world) as other, running(world, sidecar="6" * 32) as sidecar:
        assert (await entitled(sidecar)).entitlements[0].limits[0].quota.remaining == 100
        await other.check(subject={"id": "ada"}, quantity=4)
        await told(other)
        assert (await entitled(sidecar)).entitlements[0].limits[0].quota.remaining == 96


async def test_entitlements_follow_the_subject_and_what_is_known_of_the_context(world: World) -> None:
    world.push(guarded(Role("analyst", ("report.*",)), Flag("some", "reports", 0.0, "subject")))
    world.license("acme")
    async with running(world) as sidecar:
        response = await entitled(sidecar, subject=pb.Subject(id="ada", roles=["analyst"]))
        assert [one.reason for one in response.actions] == [pb.REASON_FEATURE_OFF]
        assert not response.entitlements[0].rolled_out
        world.push(guarded(Role("analyst", ("report.*",))))
        await sidecar.synced()
        reasons = {
            (role, region): (
                await entitled(
                    sidecar,
                    subject=pb.Subject(id="ada", roles=[role]),
                    context={"region": pb.Value(string_value=region)},
                )
            )
            .actions[0]
            .reason
            for role in ("analyst", "guest")
            for region in ("eu", "xx")
        }
        assert reasons == {
            ("analyst", "eu"): pb.REASON_OK,
            ("analyst", "xx"): pb.REASON_POLICY_DENIED,
            ("guest", "eu"): pb.REASON_ROLE_REQUIRED,
            ("guest", "xx"): pb.REASON_ROLE_REQUIRED,
        }


async def test_entitlements_show_what_flags_serve(world: World) -> None:
    variants = (Variant("canvas", 1, '{"wide":true}'),)
    targets = (Target("xx", "off", 'context.region == "xx"'),)
    world.push(guarded(Flag("plain", "reports"), Flag("varied", "reports", variants=variants, targeting=targets)))
    world.license("acme")
    async with running(world) as sidecar:
        response = await entitled(sidecar, context={"region": pb.Value(string_value="eu")})
        flags = [(one.flag, one.variant, one.value_json) for one in response.entitlements[0].flags]
        assert flags == [("plain", "on", ""), ("varied", "canvas", '{"wide":true}')]
        response = await entitled(sidecar, context={"region": pb.Value(string_value="xx")})
        assert [one.variant for one in response.entitlements[0].flags] == ["on", "off"]
        assert not response.entitlements[0].rolled_out


async def test_a_tenant_without_a_license_has_no_entitlements(world: World) -> None:
    world.push(guarded())
    async with running(world) as sidecar:
        response = await entitled(sidecar, tenant="nobody")
        assert not response.HasField("license")
        assert not response.entitlements
        assert not response.actions


async def test_a_long_list_of_actions_says_that_it_ends_early(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "ACTIONS_MAX", 3)
    monkeypatch.setattr(explaining, "ACTIONS_A_SLICE", 1)
    world.push(catalog(*(Action(f"report.a{number}", {"in": "reports", "out": "reports"}) for number in range(5))))
    world.license("acme")
    async with running(world) as sidecar:
        response = await entitled(sidecar)
        assert [one.action for one in response.actions] == ["report.a0", "report.a1", "report.a2"]
        assert response.actions_truncated


async def test_an_answer_never_mixes_two_bundles(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "ACTIONS_A_SLICE", 1)
    actions = [Action(f"report.a{number}", {"": "reports"}) for number in range(4)]
    world.push(catalog(*actions))
    world.license("acme")
    async with running(world) as sidecar:
        sidecar.service.require_ready()
        original = explaining.asyncio.sleep
        turns = 0

        async def sleep(seconds: float) -> None:
            nonlocal turns
            turns += 1
            if turns == 2:
                denied = Policy("no", ("*",), (Rule("all", RuleEffect.DENY),))
                world.push(catalog(*actions, denied))
                await sidecar.synced()
            await original(seconds)

        monkeypatch.setattr(explaining.asyncio, "sleep", sleep)
        response = await entitled(sidecar)
        assert {one.reason for one in response.actions} == {pb.REASON_POLICY_DENIED}
        assert response.revision == sidecar.engine.revision
