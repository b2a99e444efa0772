"""How a check becomes a request and a response becomes a decision."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from licet.client.errors import InvalidRequest, SidecarError
from licet.client.messages import BATCH_CHECKS_MAX, batch_request, check_request, decision_of, decisions_of
from licet.client.model import Check, Cost, Resource, Semantics, Subject
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb


def test_carries_every_part_of_a_check() -> None:
    at = datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=2)))
    request = check_request(
        Check(
            tenant="acme",
            action="llm.generate",
            subject=Subject("ada", type="user", roles=["analyst"], attributes={"level": 3}, on_behalf_of="bob"),
            quantities={"input": 812, "output": 0},
            resource=Resource("r1", type="report", attributes={"draft": True}),
            context={"model": "m", "n": 5, "ratio": 0.5, "on": False, "at": at, "tags": ("a", "b"), "none": []},
            idempotency_key="k",
        )
    )
    assert request.tenant == "acme"
    assert request.action == "llm.generate"
    assert request.idempotency_key == "k"
    assert request.mode == pb.MODE_CONSUME
    assert not request.HasField("quantity")
    assert dict(request.quantities) == {"input": 812, "output": 0}
    assert (request.subject.id, request.subject.type, request.subject.on_behalf_of) == ("ada", "user", "bob")
    assert list(request.subject.roles) == ["analyst"]
    assert request.subject.attributes["level"].int_value == 3
    assert (request.resource.id, request.resource.type) == ("r1", "report")
    assert request.resource.attributes["draft"].bool_value is True
    assert {name: value.WhichOneof("kind") for name, value in request.context.items()} == {
        "model": "string_value",
        "n": "int_value",
        "ratio": "double_value",
        "on": "bool_value",
        "at": "timestamp_value",
        "tags": "list_value",
        "none": "list_value",
    }
    assert request.context["at"].timestamp_value.ToDatetime(UTC) == at
    assert list(request.context["tags"].list_value.values) == ["a", "b"]


def test_tells_a_quantity_of_zero_from_none() -> None:
    assert check_request(Check("t", "a", quantity=0)).HasField("quantity")
    assert not check_request(Check("t", "a")).HasField("quantity")


def test_takes_a_plain_string_as_the_id_of_subject_and_resource() -> None:
    request = check_request(Check("t", "a", subject="ada", resource="r1"))
    assert (request.subject.id, request.resource.id) == ("ada", "r1")


def test_peeks_when_asked_to() -> None:
    assert check_request(Check("t", "a", peek=True)).mode == pb.MODE_PEEK


def test_makes_a_fresh_idempotency_key_for_each_request() -> None:
    keys = {check_request(Check("t", "a")).idempotency_key for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 32 for key in keys)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("quantity", {"quantity": 1.5}),
        ("quantity", {"quantity": True}),
        ("quantity", {"quantity": "3"}),
        ("quantity", {"quantity": 2**63}),
        ("quantity", {"quantity": 1, "quantities": {"input": 1}}),
        ("quantities.input", {"quantities": {"input": 2.0}}),
        ("context.when", {"context": {"when": datetime(2024, 1, 1)}}),
        ("context.big", {"context": {"big": 2**63}}),
        ("context.nested", {"context": {"nested": {"a": 1}}}),
        ("context.tags", {"context": {"tags": [1, 2]}}),
        ("context.nothing", {"context": {"nothing": None}}),
        ("subject", {"subject": 7}),
        ("subject", {"subject": Subject("ada", roles=[1])}),  # type: ignore[list-item]
        ("subject.attributes.x", {"subject": Subject("ada", attributes={"x": None})}),  # type: ignore[dict-item]
        ("resource", {"resource": Resource(3)}),  # type: ignore[arg-type]
    ],
)
def test_names_the_field_that_cannot_be_sent(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(Check("acme", "a.b", **arguments))
    assert caught.value.field == field
    assert field in str(caught.value)


def test_refuses_a_tenant_that_is_no_string() -> None:
    with pytest.raises(InvalidRequest, match="tenant"):
        check_request(Check(5, "a"))  # type: ignore[arg-type]


def test_names_the_check_of_a_batch_that_is_malformed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        batch_request([Check("t", "a"), Check("t", "a", quantity=0.1)], Semantics.EXECUTE_ALL)  # type: ignore[arg-type]
    assert caught.value.field == "checks[1].quantity"


@pytest.mark.parametrize("size", [0, BATCH_CHECKS_MAX + 1])
def test_refuses_a_batch_of_impossible_size(size: int) -> None:
    with pytest.raises(InvalidRequest, match=r"1 to 1000"):
        batch_request([Check("t", "a")] * size, Semantics.EXECUTE_ALL)


@pytest.mark.parametrize("semantics", list(Semantics))
def test_sends_the_semantics_of_the_proto(semantics: Semantics) -> None:
    sent = batch_request([Check("t", "a")], semantics).semantics
    assert pb.BatchSemantics.Name(sent) == f"BATCH_SEMANTICS_{semantics.name}"


def test_reads_every_part_of_a_response() -> None:
    response = pb.CheckResponse(
        decision_id="ab" * 16,
        effect=pb.EFFECT_DENIED,
        reason=pb.REASON_QUOTA_EXHAUSTED,
        message="No units left.",
        rule="llm.tokens:month",
        revision=42,
        stale=True,
        degraded=True,
        cost=pb.Cost(amount_nanos=12_500, currency="USD"),
        access_request_id="ar",
        metadata={"variant": "b"},
    )
    response.as_of.FromMicroseconds(1_700_000_000_123_456)
    response.retry_after.FromMilliseconds(1_500)
    quota = response.quotas.add(feature="llm.tokens", window="month", limit=10, remaining=3, overage=True)
    quota.currency, quota.limit_key, quota.grant, quota.burst = "USD", "llm.tokens:month.usd", "extra", 4
    quota.scope.append("subject")
    quota.resets_at.FromSeconds(1_701_388_800)

    decision = decision_of(response)

    assert decision.effect is Effect.DENIED
    assert decision.reason is Reason.QUOTA_EXHAUSTED
    assert (decision.message, decision.rule, decision.revision) == ("No units left.", "llm.tokens:month", 42)
    assert decision.as_of == datetime.fromtimestamp(1_700_000_000, UTC).replace(microsecond=123_456)
    assert decision.retry_after == timedelta(seconds=1.5)
    assert decision.stale
    assert decision.degraded
    assert not decision.fallback
    assert decision.cost == Cost(12_500, "USD")
    assert str(decision.cost) == "0.0000125 USD"
    assert decision.cost is not None
    assert decision.cost.amount == Decimal("0.0000125")
    assert decision.decision_id == "ab" * 16
    assert decision.access_request_id == "ar"
    assert decision.metadata == {"variant": "b"}
    (parsed,) = decision.quotas
    assert (parsed.currency, parsed.limit_key, parsed.scope, parsed.grant_id, parsed.burst) == (
        *("USD", "llm.tokens:month.usd", ("subject",), "extra", 4),
    )
    assert (parsed.limit_amount, parsed.remaining_amount) == (Decimal("0.00000001"), Decimal("0.000000003"))
    assert (parsed.feature, parsed.window, parsed.limit, parsed.remaining, parsed.overage) == (
        "llm.tokens", "month", 10, 3, True,
    )  # fmt: skip
    assert parsed.resets_at == datetime(2023, 12, 1, tzinfo=UTC)


def test_reads_variants_of_flags_and_their_values() -> None:
    metadata = {"variant:new-editor": "canvas", "value:new-editor": '{"toolbar":"wide"}', "variant:bare": "on"}
    decision = decision_of(pb.CheckResponse(effect=pb.EFFECT_APPROVED, reason=pb.REASON_OK, metadata=metadata))
    assert decision.variant("new-editor") == "canvas"
    assert decision.variant_value("new-editor") == {"toolbar": "wide"}
    assert decision.variant_value("bare", default=7) == 7
    assert (decision.variant("unknown"), decision.variant("unknown", default="control")) == ("", "control")


def test_leaves_absent_parts_empty() -> None:
    decision = decision_of(pb.CheckResponse(effect=pb.EFFECT_APPROVED, reason=pb.REASON_OK))
    assert decision.as_of is None
    assert decision.cost is None
    assert decision.retry_after is None
    assert decision.quotas == ()
    assert decision.metadata == {}


@pytest.mark.parametrize("effect", list(Effect))
def test_is_true_only_when_approved(effect: Effect) -> None:
    decision = decision_of(pb.CheckResponse(effect=pb.Effect.ValueType(effect), reason=pb.REASON_OK))
    assert bool(decision) is decision.approved is (effect is Effect.APPROVED)


@pytest.mark.parametrize("reason", list(Reason))
def test_knows_every_reason_of_the_proto(reason: Reason) -> None:
    decision = decision_of(pb.CheckResponse(effect=pb.EFFECT_DENIED, reason=pb.Reason.ValueType(reason)))
    assert decision.reason is reason
    assert pb.Reason.Name(pb.Reason.ValueType(reason)) == f"REASON_{reason.name}"


def test_keeps_the_number_of_a_reason_from_a_newer_sidecar() -> None:
    decision = decision_of(pb.CheckResponse(effect=pb.EFFECT_DENIED, reason=pb.Reason.ValueType(77)))
    assert decision.effect is Effect.DENIED
    assert (decision.reason.value, decision.reason.name) == (77, "REASON_77")
    assert decision.reason not in list(Reason)


def test_does_not_guess_what_an_unknown_effect_means() -> None:
    with pytest.raises(SidecarError, match="upgrade"):
        decision_of(pb.CheckResponse(effect=pb.Effect.ValueType(9)))


def test_keeps_the_order_of_a_batch() -> None:
    responses = [pb.CheckResponse(effect=pb.EFFECT_APPROVED, reason=pb.REASON_OK, rule=str(n)) for n in range(3)]
    assert [d.rule for d in decisions_of(pb.CheckBatchResponse(decisions=responses))] == ["0", "1", "2"]
