"""The service from bytes to bytes: bad input, batches, repeats, a log that is full, and the encoding of answers."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Entitlement,
    Feature,
    Flag,
    OnUnavailable,
    Plan,
    Policy,
    Rule,
    RuleEffect,
    UnavailableMode,
)
from licet.domain.ids import UNITS_MAX
from licet.domain.money import NANOS, Price
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Period, window_at
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import FLAG_DEGRADED, FLAG_OBSERVED, FLAG_STALE, pack_event
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.lease import Lease, Terms
from licet_sidecar.services.answers import Answers, varint
from licet_sidecar.services.approval import Malformed, NotReady
from licet_sidecar.services.link import LinkState
from tests.support.published import catalog, limit
from tests.support.sidecar import SIDECAR, FakeSidecar, LinkDown, World, ask, hurried, running, until


def content(*more: Any, amount: int = 1_000) -> Catalog:
    """An action of one meter, one of two, one that is allowed when in doubt, and a priced one."""
    plan = Plan(
        "pro",
        {
            "reports": Entitlement(limits=(limit(amount),)),
            "input": Entitlement(limits=(limit(amount, feature="input"),)),
            "output": Entitlement(limits=(limit(amount, feature="output"),)),
            "open": Entitlement(limits=(limit(amount, feature="open"),)),
            "free": Entitlement(),
            "priced": Entitlement(price=Price(8 * NANOS, 1_000, "USD")),
        },
    )
    return catalog(
        *(Feature(name) for name in plan.features),
        Action("llm.generate", {"input": "input", "output": "output"}),
        Action("llm.twice", {"one": "free", "two": "free"}),
        Action("open", {"": "open"}, on_unavailable=OnUnavailable(UnavailableMode.ALLOW)),
        Action("free", {"": "free"}),
        Action("priced", {"": "priced"}),
        Action(
            "typed",
            {"": "free"},
            {
                "model": Attribute(AttributeType.STRING),
                "size": Attribute(AttributeType.INT),
                "share": Attribute(AttributeType.DOUBLE),
                "urgent": Attribute(AttributeType.BOOL),
                "tags": Attribute(AttributeType.LIST),
                "at": Attribute(AttributeType.TIMESTAMP),
                "region": Attribute(AttributeType.STRING, "eu"),
            },
        ),
        Action("guarded", {"": "free"}),
        Policy(
            "guard",
            ("guarded",),
            (
                Rule("large", RuleEffect.REQUIRE_APPROVAL, "quantity > 10", "finance"),
                Rule("huge", RuleEffect.DENY, "quantity > 100"),
            ),
        ),
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
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    async with running(world) as made:
        yield made


# Bad input

_MANY = {f"name{number}": "x" for number in range(65)}

BAD_INPUT: list[tuple[str, pb.CheckRequest, str]] = [
    ("empty tenant", ask(tenant=""), "tenant: is empty"),
    ("tenant with a brace", ask(tenant="a{b}"), "tenant: "),
    ("tenant too long", ask(tenant="a" * 129), "tenant: "),
    ("tenant that begins with a dash", ask(tenant="-a"), "tenant: "),
    ("tenant with a line break", ask(tenant="acme\n"), "tenant: "),
    ("empty action", ask(action=""), "action: is empty"),
    ("action too long", ask(action="a" * 129), "action: has 129 characters"),
    ("negative quantity", ask(quantity=-1), "quantity: -1 "),
    ("quantity of 2^53", ask(quantity=2**53), f"quantity: {2**53} "),
    ("negative quantities", ask(action="llm.generate", quantities={"input": -5}), "quantities['input']: -5 "),
    ("quantities of 2^53", ask(action="llm.generate", quantities={"input": 2**53}), "quantities['input']: "),
    ("both", ask(action="llm.generate", quantity=1, quantities={"input": 1}), "quantity: give either"),
    ("unknown meter", ask(action="llm.generate", quantities={"inputs": 1}), "quantities['inputs']: "),
    ("meter of an action without meters", ask(quantities={"reports": 1}), "quantities['reports']: "),
    ("no meter of two", ask(action="llm.generate"), "quantities: "),
    ("one quantity for two meters", ask(action="llm.generate", quantity=3), "quantity: "),
    ("too many meters", ask(quantities={f"m{number}": 1 for number in range(65)}), "quantities"),
    ("sum of 2^53", ask(action="llm.twice", quantities={"one": UNITS_MAX, "two": 1}), "quantities"),
    ("long idempotency key", ask(idempotency_key="k" * 129), "idempotency_key: has 129 characters"),
    ("unknown mode", ask(mode=7), "mode: 7 "),  # type: ignore[arg-type]
    ("context of many", ask(context=_MANY), "context: has 65 entries"),
    ("large context", ask(context={"big": "x" * 16_385}), "context.big: "),
    ("large context in parts", ask(context={f"p{n}": "x" * 1_000 for n in range(17)}), "context.p"),
    ("long list", ask(context={"tags": ("x" * 100,) * 200}), "context.tags: "),
    ("long subject id", ask(subject={"id": "x" * 1_025}), "subject.id: has 1,025 characters"),
    ("long subject type", ask(subject={"type": "x" * 1_025}), "subject.type: "),
    ("long on_behalf_of", ask(subject={"on_behalf_of": "x" * 1_025}), "subject.on_behalf_of: "),
    ("many roles", ask(subject={"roles": ["x"] * 65}), "subject.roles: "),
    (
        "many subject attributes",
        ask(subject={"attributes": {name: pb.Value(string_value="x") for name in _MANY}}),
        "subject.attributes: ",
    ),
    (
        "empty subject attribute",
        ask(subject={"attributes": {"team": pb.Value()}}),
        "subject.attributes.team: has no value",
    ),
    ("long resource id", ask(resource=pb.Resource(id="x" * 1_025)), "resource.id: "),
    (
        "empty resource attribute",
        ask(resource=pb.Resource(attributes={"owner": pb.Value()})),
        "resource.attributes.owner: has no value",
    ),
    ("number for a string", ask(action="typed", context={"model": 4}), "context.model: string is declared, int"),
    ("string for a number", ask(action="typed", context={"size": "4"}), "context.size: int is declared, string"),
    ("bool for a number", ask(action="typed", context={"size": True}), "context.size: int is declared, bool"),
    ("double for an int", ask(action="typed", context={"size": 1.5}), "context.size: int is declared, double"),
    ("string for a double", ask(action="typed", context={"share": "1"}), "context.share: double is declared"),
    ("int for a bool", ask(action="typed", context={"urgent": 1}), "context.urgent: bool is declared, int"),
    ("string for a list", ask(action="typed", context={"tags": "a"}), "context.tags: list is declared, string"),
    ("string for a time", ask(action="typed", context={"at": "now"}), "context.at: timestamp is declared, string"),
    ("time for an int", ask(action="typed", context={"size": Timestamp(seconds=5)}), "context.size: int is declared"),
    ("int for a time", ask(action="typed", context={"at": 5}), "context.at: timestamp is declared, int was sent"),
    (
        "time beyond year 9999",
        ask(action="typed", context={"at": Timestamp(seconds=2**60)}),
        "context.at: ",
    ),
]


@pytest.mark.parametrize(
    ("request_", "expected"), [case[1:] for case in BAD_INPUT], ids=[case[0] for case in BAD_INPUT]
)
async def test_bad_input_names_the_field(sidecar: FakeSidecar, request_: pb.CheckRequest, expected: str) -> None:
    with pytest.raises(Malformed) as caught:
        await sidecar.check(request_)
    assert str(caught.value).startswith(expected)
    assert len(str(caught.value)) < 500
    assert (sidecar.events(), sidecar.used()) == ([], 0)


async def test_the_name_of_a_huge_meter_does_not_fill_the_message(sidecar: FakeSidecar) -> None:
    with pytest.raises(Malformed) as caught:
        await sidecar.check(action="llm.generate", quantities={"m" * 100_000: 1})
    assert str(caught.value).startswith("quantities['mmm")
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("method", ["Check", "CheckBatch", "CheckStream"])
async def test_bytes_that_are_no_message_are_malformed(sidecar: FakeSidecar, method: str) -> None:
    for garbage in (b"\xff", b"\x0a\xff", b"\x00" * 40, b"\x0a\x02\xff\xfe"):
        with pytest.raises(Malformed):
            await _given(sidecar.service.handle(method, garbage, 1.0))


async def test_a_tenant_that_is_not_text_is_malformed(sidecar: FakeSidecar) -> None:
    with pytest.raises(Malformed):
        await _given(sidecar.service.handle("Check", b"\x0a\x02\xff\xfe\x1a\x01a", 1.0))


async def test_an_unknown_method_is_a_key_error(sidecar: FakeSidecar) -> None:
    with pytest.raises(KeyError):
        sidecar.service.handle("Forget", b"", 1.0)


async def test_nothing_is_decided_before_the_first_state(tmp_path: Path) -> None:
    async with running(World(tmp_path)) as sidecar:
        with pytest.raises(NotReady, match="no state to decide from"):
            await sidecar.check()


async def test_a_quantity_whose_cost_is_beyond_any_price_is_still_answered(sidecar: FakeSidecar) -> None:
    response = await sidecar.check(action="priced", quantity=UNITS_MAX)
    assert response.effect == pb.EFFECT_APPROVED
    assert response.cost.amount_nanos > 0


async def test_undeclared_attributes_are_neither_judged_nor_recorded(sidecar: FakeSidecar) -> None:
    await sidecar.check(action="typed", context={"model": "a", "ssn": "123"})
    assert sidecar.events()[0].context == {"model": "a", "region": "eu"}


async def test_declared_attributes_are_recorded_with_their_types(sidecar: FakeSidecar) -> None:
    at = Timestamp(seconds=1_700_000_000, nanos=5_000)
    sent = {"model": "", "size": -7, "share": 2.5, "urgent": False, "tags": ("a", "b"), "at": at, "region": "us"}
    await sidecar.check(action="typed", context=sent)
    assert sidecar.events()[0].context == {
        "model": "",
        "size": -7,
        "share": 2.5,
        "urgent": False,
        "tags": ["a", "b"],
        "at": 1_700_000_000_000_005,
        "region": "us",
    }


# Answers and events


async def test_an_approval_says_everything_it_should(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.check()  # brings the license and the lease
    response = await sidecar.check(quantity=10)
    end = window_at(Period.MONTH, world.clock.us // 1_000_000).end
    assert len(response.decision_id) == 32
    assert (response.effect, response.reason) == (pb.EFFECT_APPROVED, pb.REASON_OK)
    assert response.revision == 2
    assert response.as_of.ToMicroseconds() == world.clock.us
    assert (response.stale, response.degraded) == (False, False)
    assert (response.message, response.rule, response.access_request_id) == ("", "", "")
    assert not response.HasField("cost")
    assert not response.HasField("retry_after")
    (quota,) = response.quotas
    assert (quota.feature, quota.window, quota.limit) == ("reports", "month", 1_000)
    assert quota.remaining == 1_000 - 11
    assert (quota.resets_at.seconds, quota.overage) == (end, False)


async def test_an_approval_is_one_event_with_what_it_took(sidecar: FakeSidecar, world: World) -> None:
    request = ask(
        quantity=3,
        idempotency_key="job-1",
        subject={"type": "user", "id": "ada", "on_behalf_of": "bob", "roles": ["analyst"]},
        resource=pb.Resource(type="report", id="r1"),
    )
    response = await sidecar.check(request)
    (event,) = sidecar.events()
    start = window_at(Period.MONTH, world.clock.us // 1_000_000).start
    assert (event.seq, event.at_us, event.tenant, event.action) == (1, world.clock.us, "acme", "report.export")
    assert (event.subject_type, event.subject_id, event.on_behalf_of) == ("user", "ada", "bob")
    assert (event.resource_type, event.resource_id, event.idempotency_key) == ("report", "r1", "job-1")
    assert (event.effect, event.reason, event.rule) == (Effect.APPROVED, Reason.OK, "")
    assert (event.revision, event.units, event.flags) == (2, {"reports": 3}, 0)
    assert event.spends == [[f"reports:month:{start}", 3]]
    assert response.decision_id == f"{sidecar.log.header.decision_prefix.hex()}{event.seq:016x}"


async def test_a_denial_says_when_to_ask_again_and_what_is_left(sidecar: FakeSidecar, world: World) -> None:
    response = await sidecar.check(quantity=1_001)
    now_s = world.clock.us // 1_000_000
    assert (response.effect, response.reason) == (pb.EFFECT_DENIED, pb.REASON_QUOTA_EXHAUSTED)
    assert response.rule == "reports:month"
    assert "1,001" in response.message
    assert response.retry_after.seconds == window_at(Period.MONTH, now_s).end - now_s
    assert [(quota.feature, quota.remaining) for quota in response.quotas] == [("reports", 1_000)]


async def test_a_denial_is_recorded_and_takes_nothing(sidecar: FakeSidecar) -> None:
    await sidecar.check(quantity=1_001)
    (event,) = sidecar.events()
    assert (event.effect, event.reason) == (Effect.DENIED, Reason.QUOTA_EXHAUSTED)
    assert (event.units, event.spends) == ({"reports": 1_001}, [])
    assert sidecar.used() == 0


async def test_a_pending_answer_names_the_rule(sidecar: FakeSidecar) -> None:
    response = await sidecar.check(action="guarded", quantity=50)
    assert (response.effect, response.reason) == (pb.EFFECT_PENDING, pb.REASON_APPROVAL_REQUIRED)
    assert response.rule == "guard/large"
    assert response.message


async def test_a_price_becomes_a_cost_in_the_answer_and_in_the_event(sidecar: FakeSidecar) -> None:
    response = await sidecar.check(action="priced", quantity=250)
    assert (response.cost.amount_nanos, response.cost.currency) == (2 * NANOS, "USD")
    (event,) = sidecar.events()
    assert (event.cost_nanos, event.currency) == (2 * NANOS, "USD")


@pytest.mark.parametrize(
    ("action", "model", "priced_as", "exposures"),
    [
        ("priced", "", {}, {}),
        ("modeled", "small", {"modeled": "small"}, {}),
        ("modeled", "unheard of", {}, {}),
        ("flagged", "", {}, {"new-editor": "on"}),
        ("modeled-flagged", "small", {"modeled": "small"}, {"new-editor": "on"}),
    ],
)
async def test_an_event_says_by_what_it_was_priced_and_its_flags(
    world: World, action: str, model: str, priced_as: dict[str, str], exposures: dict[str, str]
) -> None:
    by_model = Price(NANOS, 1, "USD", "context.model", {"small": 1})
    attributes = {"model": Attribute(AttributeType.STRING, "")}
    world.push(
        content(
            Feature("modeled"),
            Feature("flagged"),
            Flag("new-editor", "flagged"),
            Action("modeled", {"": "modeled"}, attributes),
            Action("flagged", {"": "flagged"}),
            Action("modeled-flagged", {"a": "modeled", "b": "flagged"}, attributes),
            Plan(
                "pro",
                {"priced": Entitlement(Price(1, 1, "USD")), "modeled": Entitlement(by_model), "flagged": Entitlement()},
            ),
        )
    )
    async with running(world) as sidecar:
        quantities = {"a": 2, "b": 1} if action == "modeled-flagged" else {}
        context = {"model": model} if "modeled" in action else {}
        response = await sidecar.check(action=action, quantities=quantities, context=context)
        assert response.effect == pb.EFFECT_APPROVED
        (event,) = sidecar.events()
        assert (event.priced_as, event.exposures) == (priced_as, exposures)
        # The sidecar packs a check by hand; it must be what pack_event makes.
        (data,) = sidecar.packed_events()
        assert pack_event(event) == data


async def test_several_meters_are_taken_together(sidecar: FakeSidecar) -> None:
    response = await sidecar.check(action="llm.generate", quantities={"input": 5, "output": 7})
    assert [(quota.feature, quota.remaining) for quota in response.quotas] == [("input", 995), ("output", 993)]
    (event,) = sidecar.events()
    assert event.units == {"input": 5, "output": 7}


async def test_several_meters_are_taken_all_or_none(sidecar: FakeSidecar) -> None:
    response = await sidecar.check(action="llm.generate", quantities={"input": 5, "output": 1_001})
    assert (response.reason, response.rule) == (pb.REASON_QUOTA_EXHAUSTED, "output:month")
    assert sidecar.used() == 0


async def test_a_check_that_a_lease_covers_answers_bytes(sidecar: FakeSidecar) -> None:
    await sidecar.check()
    answer = sidecar.service.handle("Check", ask().SerializeToString(), 1.0)
    assert isinstance(answer, bytes)


async def test_a_check_that_needs_a_lease_answers_an_awaitable(sidecar: FakeSidecar) -> None:
    answer = sidecar.service.handle("Check", ask().SerializeToString(), 1.0)
    assert inspect.isawaitable(answer)
    assert pb.CheckResponse.FromString(await answer).effect == pb.EFFECT_APPROVED


async def test_answers_are_degraded_while_redis_is_away(sidecar: FakeSidecar) -> None:
    await sidecar.check()
    sidecar.link.failed(LinkDown("gone"))
    response = await sidecar.check()
    assert (response.effect, response.degraded) == (pb.EFFECT_APPROVED, True)


async def test_stale_answers_say_so_and_are_recorded_so(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.check(action="open")
    world.clock.us += 301_000_000
    response = await sidecar.check(action="open")
    assert (response.effect, response.stale) == (pb.EFFECT_APPROVED, True)
    assert sidecar.events()[-1].flags & FLAG_STALE


async def test_a_stale_sidecar_denies_what_must_not_be_guessed(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.check()
    world.clock.us += 301_000_000
    response = await sidecar.check()
    assert (response.effect, response.reason, response.stale) == (pb.EFFECT_DENIED, pb.REASON_STALE_POLICY, True)


@pytest.mark.parametrize(
    ("action", "effect", "reason"),
    [
        ("open", pb.EFFECT_APPROVED, pb.REASON_DEGRADED_ALLOW),
        ("report.export", pb.EFFECT_DENIED, pb.REASON_DEGRADED_DENY),
    ],
)
async def test_without_a_lease_and_without_redis_the_action_decides(
    sidecar: FakeSidecar, action: str, effect: int, reason: int
) -> None:
    await sidecar.check(action="free")  # the license is here, leases are not
    sidecar.link.failed(LinkDown("gone"))
    response = await sidecar.check(action=action)
    assert (response.effect, response.reason, response.degraded) == (effect, reason, True)
    event = sidecar.events()[-1]
    assert event.flags & FLAG_DEGRADED
    assert event.units == {_feature(action): 1}
    # What was approved without a lease is counted all the same: Redis is told when it answers.
    assert sum(units for _, units in event.spends) == (effect == pb.EFFECT_APPROVED)


async def test_a_caller_without_time_is_answered_by_what_is_here(sidecar: FakeSidecar) -> None:
    response = pb.CheckResponse.FromString(await sidecar.call("Check", ask(), timeout_s=0.0))
    assert (response.effect, response.reason) == (pb.EFFECT_DENIED, pb.REASON_DEGRADED_DENY)


async def test_observe_mode_answers_approved_and_records_the_denial(world: World) -> None:
    world.push(content(), observe=True)
    async with running(world) as sidecar:
        response = await sidecar.check(action="guarded", quantity=500)
        assert (response.effect, response.reason) == (pb.EFFECT_APPROVED, pb.REASON_POLICY_DENIED)
        assert response.metadata["observed_effect"] == "DENIED"
        (event,) = sidecar.events()
        assert (event.effect, event.flags & FLAG_OBSERVED) == (Effect.DENIED, FLAG_OBSERVED)


# PEEK


async def test_a_peek_takes_and_records_nothing(sidecar: FakeSidecar) -> None:
    await sidecar.check(quantity=10)
    response = await sidecar.check(quantity=20, mode=pb.MODE_PEEK)
    assert (response.effect, response.decision_id) == (pb.EFFECT_APPROVED, "")
    assert response.quotas[0].remaining == 990
    assert (len(sidecar.events()), sidecar.used()) == (1, 10)


async def test_a_peek_is_not_a_repeat_and_is_not_repeated(sidecar: FakeSidecar) -> None:
    first = await sidecar.check(idempotency_key="k")
    peeked = await sidecar.check(idempotency_key="k", mode=pb.MODE_PEEK)
    again = await sidecar.check(idempotency_key="k")
    assert peeked.decision_id == ""
    assert again.decision_id == first.decision_id


async def test_a_peek_that_is_denied_says_why(sidecar: FakeSidecar) -> None:
    response = await sidecar.check(quantity=1_001, mode=pb.MODE_PEEK)
    assert (response.reason, sidecar.events()) == (pb.REASON_QUOTA_EXHAUSTED, [])


# Batches


def _good(quantity: int = 1) -> pb.CheckRequest:
    return ask(action="free", quantity=quantity)


def _denied() -> pb.CheckRequest:
    return ask(action="guarded", quantity=500)


def _pending() -> pb.CheckRequest:
    return ask(action="guarded", quantity=50)


_A, _D, _P = pb.EFFECT_APPROVED, pb.EFFECT_DENIED, pb.EFFECT_PENDING


@pytest.mark.parametrize(
    ("semantics", "checks", "expected"),
    [
        (pb.BATCH_SEMANTICS_UNSPECIFIED, "gdpg", [_A, _D, _P, _A]),
        (pb.BATCH_SEMANTICS_EXECUTE_ALL, "dgpd", [_D, _A, _P, _D]),
        (pb.BATCH_SEMANTICS_DENY_ON_FIRST_DENY, "ggdg", [_A, _A, _D]),
        (pb.BATCH_SEMANTICS_DENY_ON_FIRST_DENY, "gpg", [_A, _P]),
        (pb.BATCH_SEMANTICS_DENY_ON_FIRST_DENY, "ggg", [_A, _A, _A]),
        (pb.BATCH_SEMANTICS_PERMIT_ON_FIRST_PERMIT, "dpgg", [_D, _P, _A]),
        (pb.BATCH_SEMANTICS_PERMIT_ON_FIRST_PERMIT, "dd", [_D, _D]),
    ],
)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_a_batch_stops_where_its_semantics_say(
    sidecar: FakeSidecar, semantics: Any, checks: str, expected: list[int], warm: bool
) -> None:
    if warm:
        await sidecar.check(action="free")
    made = {"g": _good, "d": _denied, "p": _pending}
    decisions = await sidecar.batch([made[letter]() for letter in checks], semantics)
    assert [decision.effect for decision in decisions] == expected
    assert len(sidecar.events()) == len(expected) + warm


async def test_decisions_of_a_batch_are_numbered_in_order(sidecar: FakeSidecar) -> None:
    await sidecar.check(action="free")
    decisions = await sidecar.batch([_good(), _denied(), _good()])
    assert [int(decision.decision_id[16:], 16) for decision in decisions] == [2, 3, 4]


async def test_checks_of_a_batch_see_what_those_before_took(sidecar: FakeSidecar) -> None:
    await sidecar.check()
    decisions = await sidecar.batch([ask(quantity=400), ask(quantity=400), ask(quantity=400)])
    assert [decision.effect for decision in decisions] == [_A, _A, _D]
    assert sidecar.used() == 801


async def test_a_peek_in_a_batch_takes_and_records_nothing(sidecar: FakeSidecar) -> None:
    await sidecar.check(action="free")
    decisions = await sidecar.batch([_good(), ask(action="free", mode=pb.MODE_PEEK), _good()])
    assert [bool(decision.decision_id) for decision in decisions] == [True, False, True]
    assert len(sidecar.events()) == 3


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (ask(tenant=""), "tenant"),
        (ask(quantity=-1), "quantity"),
        (ask(action="llm.generate", quantities={"inputs": 1}), "quantities['inputs']"),
        (ask(action="typed", context={"size": "4"}), "context.size"),
        (ask(action="llm.twice", quantities={"one": UNITS_MAX, "two": 1}), "quantities"),
    ],
    ids=["tenant", "quantity", "meter", "context", "sum"],
)
async def test_a_bad_check_in_a_batch_takes_nothing(
    sidecar: FakeSidecar, bad: pb.CheckRequest, field: str, warm: bool
) -> None:
    if warm:
        await sidecar.check()
    before = sidecar.used()
    with pytest.raises(Malformed) as caught:
        await sidecar.batch([ask(), bad])
    assert str(caught.value).startswith(f"checks[1].{field}")
    assert (sidecar.used(), len(sidecar.events())) == (before, warm)


async def test_a_reused_key_in_a_batch_takes_nothing(sidecar: FakeSidecar) -> None:
    await sidecar.check(quantity=2, idempotency_key="k")
    with pytest.raises(Malformed, match="idempotency_key"):
        await sidecar.batch([ask(quantity=5), ask(quantity=3, idempotency_key="k")])
    assert (sidecar.used(), len(sidecar.events())) == (2, 1)


async def test_a_key_used_twice_in_a_batch_for_different_requests_leaves_log_and_leases_agreed(
    sidecar: FakeSidecar,
) -> None:
    await sidecar.check()
    with pytest.raises(Malformed, match="idempotency_key"):
        await sidecar.batch(
            [ask(quantity=5), ask(quantity=7, idempotency_key="k"), ask(quantity=3, idempotency_key="k")]
        )
    assert sidecar.used() == sum(units for event in sidecar.events() for _, units in event.spends)


async def test_a_repeat_within_a_batch_is_answered_once(sidecar: FakeSidecar) -> None:
    await sidecar.check()
    one, two = await sidecar.batch([ask(idempotency_key="k"), ask(idempotency_key="k")])
    assert one == two
    assert (sidecar.used(), len(sidecar.events())) == (2, 2)


@pytest.mark.parametrize("count", [0, 1_001])
async def test_a_batch_has_between_one_and_a_thousand_checks(sidecar: FakeSidecar, count: int) -> None:
    with pytest.raises(Malformed, match=f"checks: {count} "):
        await sidecar.batch([_good()] * count)


async def test_a_batch_of_a_thousand_is_served(sidecar: FakeSidecar) -> None:
    assert len(await sidecar.batch([_good()] * 1_000)) == 1_000


async def test_a_warm_batch_answers_bytes(sidecar: FakeSidecar) -> None:
    await sidecar.check()
    request = pb.CheckBatchRequest(checks=[ask(), ask()])
    assert isinstance(sidecar.service.handle("CheckBatch", request.SerializeToString(), 1.0), bytes)


async def test_a_batch_over_several_tenants_loads_each(sidecar: FakeSidecar, world: World) -> None:
    world.license("globex")
    world.license("initech", "free")
    decisions = await sidecar.batch([ask(), ask("globex"), ask("initech"), ask("nobody")])
    assert [decision.reason for decision in decisions] == [
        pb.REASON_OK,
        pb.REASON_OK,
        pb.REASON_NOT_ENTITLED,
        pb.REASON_NO_LICENSE,
    ]


# Repeats


async def test_a_repeated_call_gets_the_same_answer_and_takes_nothing(sidecar: FakeSidecar) -> None:
    first = await sidecar.check(quantity=3, idempotency_key="k")
    again = await sidecar.check(quantity=3, idempotency_key="k")
    assert again == first
    assert (sidecar.used(), len(sidecar.events())) == (3, 1)


async def test_a_repeated_denial_stays_a_denial(sidecar: FakeSidecar) -> None:
    first = await sidecar.check(quantity=1_001, idempotency_key="k")
    assert await sidecar.check(quantity=1_001, idempotency_key="k") == first
    assert len(sidecar.events()) == 1


async def test_calls_with_one_key_that_wait_at_the_same_time_are_one(sidecar: FakeSidecar) -> None:
    first, second = await asyncio.gather(
        sidecar.check(quantity=3, idempotency_key="k"), sidecar.check(quantity=3, idempotency_key="k")
    )
    assert first == second
    assert (sidecar.used(), len(sidecar.events())) == (3, 1)


@pytest.mark.parametrize("leaving", [0, 1], ids=["first", "joiner"])
async def test_a_caller_that_leaves_does_not_end_what_another_waits_for(sidecar: FakeSidecar, leaving: int) -> None:
    callers = [asyncio.ensure_future(sidecar.check(quantity=3, idempotency_key="k")) for _ in range(2)]
    await asyncio.sleep(0)
    callers[leaving].cancel()
    assert (await callers[1 - leaving]).effect == pb.EFFECT_APPROVED
    assert (sidecar.used(), len(sidecar.events())) == (3, 1)


async def test_a_caller_that_left_finds_its_answer_when_it_comes_back(sidecar: FakeSidecar) -> None:
    leaves = asyncio.ensure_future(sidecar.check(quantity=3, idempotency_key="k"))
    await asyncio.sleep(0)
    leaves.cancel()
    await until(lambda: sidecar.log.last_seq == 1)
    response = await sidecar.check(quantity=3, idempotency_key="k")
    assert int(response.decision_id[16:], 16) == 1
    assert (sidecar.used(), len(sidecar.events())) == (3, 1)


@pytest.mark.parametrize(
    "other",
    [
        ask(quantity=4, idempotency_key="k"),
        ask(quantity=3, idempotency_key="k", subject={"type": "user", "id": "eve"}),
        ask(quantity=3, idempotency_key="k", resource=pb.Resource(id="r2")),
        ask(quantity=3, idempotency_key="k", context={"region": "us"}),
        ask(quantity=3, idempotency_key="k", context={"model": "eu"}),
    ],
    ids=["quantity", "subject", "resource", "value", "attribute"],
)
async def test_a_key_is_refused_for_another_request(sidecar: FakeSidecar, other: pb.CheckRequest) -> None:
    await sidecar.check(quantity=3, idempotency_key="k", context={"region": "eu"})
    with pytest.raises(Malformed, match="idempotency_key: it was used for another request"):
        await sidecar.check(other)
    assert sidecar.used() == 3


async def test_a_key_counts_for_one_tenant_and_action(sidecar: FakeSidecar, world: World) -> None:
    world.license("globex")
    await sidecar.check(idempotency_key="k")
    await sidecar.check(action="open", idempotency_key="k")
    await sidecar.check(ask("globex", idempotency_key="k"))
    assert len(sidecar.events()) == 3


async def test_a_key_is_forgotten_ten_minutes_past_its_acknowledgement(sidecar: FakeSidecar, world: World) -> None:
    async def asked() -> str:
        sidecar.log.release(SIDECAR, 1, acknowledged, world.clock.boot_ms() / 1e3)
        sidecar.recent.expire()
        sidecar.engine.as_of_us = world.clock.us
        return (await sidecar.check(action="free", idempotency_key="k")).decision_id

    acknowledged = 0
    first = await asked()
    world.advance(100_000)  # the control plane is away
    assert await asked() == first
    acknowledged = 1
    assert await asked() == first
    world.advance(599)
    assert await asked() == first
    world.advance(1)
    assert await asked() != first


async def test_a_repeat_after_a_restart_is_recognized_from_the_log(world: World) -> None:
    before = FakeSidecar(world)
    before.start()
    await before.synced()
    first = await before.check(quantity=3, idempotency_key="k")
    denied = await before.check(quantity=2_000, idempotency_key="other")
    priced = await before.check(action="priced", quantity=250, idempotency_key="priced")
    await before.kill()
    async with running(world, incarnation=2) as after:
        again = await after.check(quantity=3, idempotency_key="k")
        denied_again = await after.check(quantity=2_000, idempotency_key="other")
        priced_again = await after.check(action="priced", quantity=250, idempotency_key="priced")
        for one, two in ((first, again), (denied, denied_again), (priced, priced_again)):
            assert (one.decision_id, one.effect, one.reason, one.revision, one.rule, one.cost) == (
                two.decision_id,
                two.effect,
                two.reason,
                two.revision,
                two.rule,
                two.cost,
            )
        assert (after.used(), after.events()) == (3, [])


async def test_an_observed_denial_is_still_answered_approved_after_a_restart(world: World) -> None:
    world.push(content(), observe=True)
    before = FakeSidecar(world)
    before.start()
    await before.synced()
    first = await before.check(action="guarded", quantity=500, idempotency_key="k")
    await before.kill()
    async with running(world, incarnation=2) as after:
        again = await after.check(action="guarded", quantity=500, idempotency_key="k")
        assert (again.effect, again.decision_id) == (pb.EFFECT_APPROVED, first.decision_id)


async def test_an_answer_that_was_not_logged_is_not_repeated(sidecar: FakeSidecar, monkeypatch: Any) -> None:
    await sidecar.check()
    _fill(sidecar, monkeypatch)
    assert (await sidecar.check(idempotency_key="k")).reason == pb.REASON_USAGE_LOG_FULL
    monkeypatch.undo()
    assert (await sidecar.check(idempotency_key="k")).reason == pb.REASON_OK


# The log is full


def _fill(sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar.log, "_bytes_max", sidecar.log.total_bytes)


@pytest.mark.parametrize(
    ("action", "effect"),
    [("report.export", pb.EFFECT_DENIED), ("open", pb.EFFECT_APPROVED), ("free", pb.EFFECT_DENIED)],
)
async def test_a_full_log_lets_the_action_decide(
    sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch, action: str, effect: int
) -> None:
    await sidecar.check(action=action)
    before = sidecar.used()
    _fill(sidecar, monkeypatch)
    response = await sidecar.check(action=action)
    assert (response.effect, response.reason) == (effect, pb.REASON_USAGE_LOG_FULL)
    assert (response.decision_id, response.degraded) == ("", True)
    assert "maximum" in response.message
    assert (sidecar.used(), len(sidecar.events())) == (before, 1)


async def test_what_was_approved_unlogged_is_counted(sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    await sidecar.check(action="open")
    _fill(sidecar, monkeypatch)
    await sidecar.check(action="open", quantity=7)
    await sidecar.check(quantity=7)
    assert (sidecar.tally.units_unlogged, sidecar.tally.log_failures > 0) == (7, True)


async def test_a_denial_stands_when_the_log_is_full(sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    await sidecar.check(action="free")
    _fill(sidecar, monkeypatch)
    response = await sidecar.check(action="guarded", quantity=500)
    assert (response.effect, response.reason, response.decision_id) == (pb.EFFECT_DENIED, pb.REASON_POLICY_DENIED, "")


async def test_a_full_log_keeps_an_answer_stale(
    sidecar: FakeSidecar, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sidecar.check(action="open")
    _fill(sidecar, monkeypatch)
    world.clock.us += 301_000_000
    response = await sidecar.check(action="open")
    assert (response.reason, response.stale) == (pb.REASON_USAGE_LOG_FULL, True)


async def test_observe_mode_never_denies_even_with_a_full_log(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.push(content(), observe=True)
    async with running(world) as sidecar:
        await sidecar.check()
        _fill(sidecar, monkeypatch)
        response = await sidecar.check()
        assert (response.effect, response.reason) == (pb.EFFECT_APPROVED, pb.REASON_USAGE_LOG_FULL)


async def test_a_batch_that_does_not_fit_in_the_log_takes_nothing(
    sidecar: FakeSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sidecar.check()
    before = sidecar.used()
    monkeypatch.setattr(sidecar.log, "_bytes_max", sidecar.log.total_bytes + 50)
    decisions = await sidecar.batch([ask(), ask()])
    assert {decision.reason for decision in decisions} == {pb.REASON_USAGE_LOG_FULL}
    assert sidecar.used() == before


# Encoding


def _decided(**fields: Any) -> Decision:
    decision = Decision(
        fields.pop("effect", Effect.APPROVED), fields.pop("reason", Reason.OK), *fields.pop("said", ("", ""))
    )
    for name, value in fields.items():
        setattr(decision, name, value)
    return decision


def _lease(amount: int, cap: int, used: int, remaining: int, idle: int = 0) -> Lease:
    start, end = window_at(Period.MONTH, 1_790_000_000)
    lease = Lease(limit(amount).key, "", start, end, Terms(amount, window="month"))
    lease.cap, lease.used, lease.remaining, lease.idle_elsewhere = cap, used, remaining, idle
    return lease


OVER: Final = _lease(10, 40, 12, 0)

CASES: list[tuple[str, Decision]] = [
    ("plain", _decided()),
    ("denied", _decided(effect=Effect.DENIED, reason=Reason.POLICY_DENIED, said=("No.", "guard/rule"))),
    ("pending", _decided(effect=Effect.PENDING, reason=Reason.APPROVAL_REQUIRED, said=("Ask.", "guard/large"))),
    ("stale", _decided(stale=True)),
    ("degraded", _decided(degraded=True)),
    ("cost", _decided(cost_nanos=123_456_789_012, currency="USD")),
    ("largest cost", _decided(cost_nanos=2**63 - 1, currency="EUR")),
    ("retry", _decided(effect=Effect.DENIED, reason=Reason.QUOTA_EXHAUSTED, retry_after_s=86_400)),
    ("observed", _decided(effect=Effect.DENIED, reason=Reason.NOT_ENTITLED, observed=True)),
    ("quota", _decided(spends=[(_lease(1_000, 100, 1, 900), 1)])),
    ("empty quota", _decided(spends=[(_lease(1, 1, 1, 0), 1)])),
    ("overspent quota", _decided(spends=[(_lease(10, 0, 5, 0), 0)])),
    ("past a soft limit", _decided(spends=[(OVER, 1)])),
    ("more than is unused", _decided(spends=[(_lease(10, 5, 4, 9), 1)])),
    ("idle elsewhere", _decided(spends=[(_lease(10, 2, 2, 3, 4), 0)])),
    ("largest quota", _decided(spends=[(_lease(UNITS_MAX, 300, 0, UNITS_MAX - 300), 0)])),
    ("overage", _decided(reason=Reason.OVERAGE, spends=[(OVER, 9)], overage={OVER.quota: 4})),
    ("two quotas", _decided(spends=[(_lease(1_000, 128, 0, 0), 1), (_lease(16_384, 0, 0, 16_384), 2)])),
    (
        "everything",
        _decided(
            effect=Effect.DENIED,
            reason=Reason.QUOTA_EXHAUSTED,
            said=("Käse, 日本 and 𝄞.", "reports:month"),
            stale=True,
            degraded=True,
            observed=True,
            retry_after_s=1,
            cost_nanos=1,
            currency="USD",
            spends=[(_lease(1_000, 100, 0, 900), 1)],
        ),
    ),
]


@pytest.mark.parametrize("decision_id", ["", "0123456789abcdef" * 2], ids=["unrecorded", "recorded"])
@pytest.mark.parametrize("decision", [case[1] for case in CASES], ids=[case[0] for case in CASES])
async def test_the_assembled_encoding_equals_the_message(
    sidecar: FakeSidecar, decision: Decision, decision_id: str
) -> None:
    link = LinkState()
    link.succeeded()
    answers = Answers(sidecar.engine, link)
    for _ in range(2):  # the second time from what was kept
        encoded = answers.encode(decision, decision_id)
        assert pb.CheckResponse.FromString(encoded) == _built(sidecar, decision, decision_id)


async def test_the_assembled_encoding_follows_the_state(sidecar: FakeSidecar, world: World) -> None:
    link = LinkState()
    link.succeeded()
    answers = Answers(sidecar.engine, link)
    answers.encode(_decided(), "")
    sidecar.engine.revision, sidecar.engine.as_of_us = 77, 1_999_999
    assert pb.CheckResponse.FromString(answers.encode(_decided(), "")) == _built(sidecar, _decided(), "")
    link.failed(LinkDown("gone"))
    assert pb.CheckResponse.FromString(answers.encode(_decided(), "")).degraded


async def test_a_changed_limit_is_encoded_anew(sidecar: FakeSidecar) -> None:
    answers = Answers(sidecar.engine, sidecar.link)
    lease = _lease(1_000, 100, 0, 900)
    answers.encode(_decided(spends=[(lease, 1)]), "")
    lease.adopt(lease.terms._replace(amount=500), 0)
    assert pb.CheckResponse.FromString(answers.encode(_decided(spends=[(lease, 1)]), "")).quotas[0].limit == 500


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 16_383, 16_384, 2**31, 2**53 - 1, 2**63 - 1])
def test_varints_are_those_of_protobuf(number: int) -> None:
    assert b"\x18" + varint(number) == pb.QuotaState(limit=number or 0).SerializeToString() or number == 0
    assert varint(0) == b"\x00"


def _built(sidecar: FakeSidecar, decision: Decision, decision_id: str) -> pb.CheckResponse:
    response = pb.CheckResponse(
        decision_id=decision_id,
        effect=int(Effect.APPROVED if decision.observed else decision.effect),  # type: ignore[arg-type]
        reason=int(decision.reason),  # type: ignore[arg-type]
        message=decision.message,
        rule=decision.rule,
        revision=sidecar.engine.revision,
        stale=decision.stale,
        degraded=decision.degraded,
    )
    response.as_of.FromMicroseconds(sidecar.engine.as_of_us)
    for lease, _ in decision.spends:
        quota = response.quotas.add(
            feature="reports",
            window="month",
            limit=lease.amount,
            remaining=max(
                0,
                min(
                    lease.remaining + lease.idle_elsewhere + max(0, lease.cap - lease.used),
                    lease.amount - lease.used_elsewhere - lease.used,
                ),
            ),
            limit_key="reports:month",
            scope=lease.terms.scope,
            overage=lease.quota in decision.overage,
        )
        quota.resets_at.seconds = lease.end
    if decision.cost_nanos:
        response.cost.amount_nanos, response.cost.currency = decision.cost_nanos, decision.currency
    if decision.retry_after_s:
        response.retry_after.seconds = decision.retry_after_s
    if decision.observed:
        response.metadata["observed_effect"] = decision.effect.name
    return response


def _feature(action: str) -> str:
    return {"report.export": "reports"}.get(action, action)


async def _given(answer: Any) -> bytes:
    return answer if isinstance(answer, bytes) else await answer
