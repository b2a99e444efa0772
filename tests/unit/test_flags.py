"""Feature flags: who is in, which variant they get, and that neither ever moves anybody without need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Document,
    Entitlement,
    Feature,
    License,
    Plan,
)
from licet.domain.catalog_wire import document_from_wire, document_to_wire
from licet.domain.flags import (
    Flag,
    RolloutStep,
    Target,
    Variant,
    bucket_of,
    includes,
    variant_of,
)
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb
from licet.wire.documents import catalog_of_chunks, chunk_catalog, digest_of
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.explanation import explain
from licet_sidecar.services.answers import Answers
from licet_sidecar.services.link import LinkState
from tests.support.engine import NOW_S, NOW_US, decided, engine_with, inquiry

HOLDERS = [f"holder-{number}" for number in range(4_000)]
ACME = License("acme", "pro")
CONTROL, CANVAS = Variant("control", 50), Variant("canvas", 50, '{"toolbar":"wide"}')


def world(*flags: Flag) -> Catalog:
    documents: list[Document] = [
        Feature("reports"),
        Action("report.export", {"": "reports"}, {"region": Attribute(AttributeType.STRING)}),
        Plan("pro", {"reports": Entitlement()}),
        *flags,
    ]
    return Catalog.of(documents)


def asked(flag: Flag, *, now_us: int = NOW_US, **fields: object) -> Decision:
    """The decision under that flag alone."""
    return decided(engine_with(world(flag), ACME, as_of_us=now_us), inquiry(**fields), now_us=now_us)


def served(flag: Flag, *, now_us: int = NOW_US, **fields: object) -> str:
    return asked(flag, now_us=now_us, **fields).exposures[flag.name]


# The choices by name


@pytest.mark.parametrize(
    ("flag", "holder", "bucket"),
    [
        ("new-editor", "acme", 4_493),
        ("new-editor", "globex", 6_409),
        ("exports-rollout", "globex", 256),
        ("new-editor", "", 5_181),
        ("new-editor", "user:josé", 3_876),
    ],
)
def test_a_bucket_is_for_ever(flag: str, holder: str, bucket: int) -> None:
    assert bucket_of(flag, holder) == bucket


def test_a_variant_is_for_ever() -> None:
    flag = Flag("new-editor", "editor", variants=(Variant("control", 50), Variant("canvas", 30), Variant("grid", 20)))
    picked = {holder: variant_of(flag, holder) for holder in ("acme", "globex", "initech", "umbrella", "hooli", "")}
    assert {holder: one.name for holder, one in picked.items() if one} == {
        "acme": "grid",
        "globex": "control",
        "initech": "canvas",
        "umbrella": "control",
        "hooli": "control",
        "": "control",
    }


def test_variants_have_the_shares_of_their_weights() -> None:
    flag = Flag("f", "reports", variants=(Variant("a", 1), Variant("b", 3), Variant("c", 6), Variant("d", 0)))
    shares = Counter(one.name for holder in HOLDERS if (one := variant_of(flag, holder)))
    for name, share in (("a", 0.1), ("b", 0.3), ("c", 0.6)):
        assert abs(shares[name] / len(HOLDERS) - share) < 0.03
    assert "d" not in shares


weights = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 1_000), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from("abcde"), st.integers(0, 1_000))
def test_a_changed_weight_moves_nobody_between_the_other_variants(
    before: Mapping[str, int], changed: str, weight: int
) -> None:
    after = {**before, changed: weight}
    for holder in HOLDERS[:200]:
        one, other = (_pick(shares, holder) for shares in (before, after))
        assert one == other or changed in (one, other)
        if weight >= before.get(changed, 0):
            assert one != changed or other == changed  # who has it keeps it when its share grows


@settings(max_examples=60, deadline=None)
@given(weights, st.randoms(use_true_random=False))
def test_the_order_of_variants_and_the_unit_of_weights_move_nobody(before: Mapping[str, int], rng: object) -> None:
    names = sorted(before, key=lambda _: rng.random())  # type: ignore[attr-defined]
    for holder in HOLDERS[:100]:
        assert _pick({name: 1_000 * before[name] for name in names}, holder) == _pick(before, holder)


def _pick(shares: Mapping[str, int], holder: str) -> str | None:
    found = variant_of(Flag("f", "reports", variants=tuple(Variant(*share) for share in shares.items())), holder)
    return found.name if found else None


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 100), st.floats(0, 100))
def test_a_growing_percentage_keeps_all_it_had(one: float, other: float) -> None:
    fewer, more = sorted((one, other))
    for holder in HOLDERS[:200]:
        bucket = bucket_of("f", holder)
        assert not includes(fewer, bucket) or includes(more, bucket)


# The order: switch, time, targeting, rollout


def test_a_flag_that_is_switched_off_serves_nobody_whatever_else_it_says() -> None:
    flag = Flag("f", "reports", enabled=False, targeting=(Target("all", "on"),), variants=(CONTROL,))
    decision = asked(flag)
    assert (decision.reason, decision.rule, decision.exposures) == (Reason.FEATURE_OFF, "f", {"f": "off"})
    assert decision.message == "reports is switched off."


@pytest.mark.parametrize(("after_s", "expected"), [(-1, "off"), (0, "on"), (99, "on"), (100, "off"), (10_000, "off")])
def test_a_flag_is_on_from_its_start_to_its_end(after_s: int, expected: str) -> None:
    flag = Flag("f", "reports", starts_s=NOW_S, ends_s=NOW_S + 100)
    assert served(flag, now_us=(NOW_S + after_s) * 1_000_000) == expected


@pytest.mark.parametrize(("after_s", "percent"), [(-1, 0), (0, 30), (9, 30), (10, 80), (20, 100)])
def test_a_schedule_needs_no_push(after_s: int, percent: int) -> None:
    steps = (RolloutStep(NOW_S, 30), RolloutStep(NOW_S + 10, 80), RolloutStep(NOW_S + 20, 100))
    flag = Flag("f", "reports", 0, "subject", steps=steps)
    engine = engine_with(world(flag), ACME)
    for holder in HOLDERS[:100]:
        now_us = (NOW_S + after_s) * 1_000_000
        decision = decided(engine, inquiry(subject_id=holder), now_us=now_us)
        assert (decision.effect is Effect.APPROVED) == includes(percent, bucket_of("f", holder))


@pytest.mark.parametrize("by", ["tenant", "subject"])
def test_a_denial_that_time_alone_will_change_says_when(by: str) -> None:
    holder = next(one for one in HOLDERS if 3_000 <= bucket_of("f", one) < 8_000)
    steps = (RolloutStep(NOW_S - 5, 30), RolloutStep(NOW_S + 10, 80))
    flag = Flag("f", "reports", 0, by, steps=steps)
    engine = engine_with(world(flag), License(holder, "pro"))
    assert decided(engine, inquiry(holder, subject_id=holder)).retry_after_s == 10
    late = Flag("f", "reports", 0, by, starts_s=NOW_S + 5, steps=steps)
    engine = engine_with(world(late), License(holder, "pro"))
    assert decided(engine, inquiry(holder, subject_id=holder)).retry_after_s == 10
    never = Flag("f", "reports", 0, by, steps=steps[:1])
    engine = engine_with(world(never), License(holder, "pro"))
    assert decided(engine, inquiry(holder, subject_id=holder)).retry_after_s == 0


def test_the_first_targeting_rule_that_matches_decides() -> None:
    flag = Flag(
        "f",
        "reports",
        0,
        variants=(CONTROL, CANVAS, Variant("beta", 0)),
        targeting=(
            Target("banned", "off", '"banned" in subject.roles'),
            Target("staff", "beta", '"staff" in subject.roles'),
            Target("members", "on", '"member" in subject.roles'),
        ),
    )
    assert served(flag, roles=("banned", "staff")) == "off"
    assert served(flag, roles=("member", "staff")) == "beta"
    weighted = variant_of(flag, "acme")
    assert weighted is not None
    assert served(flag, roles=("member",)) == weighted.name
    assert served(flag, roles=()) == "off"


@pytest.mark.parametrize(("serve", "expected"), [("off", "off"), ("on", "on")])
def test_a_condition_that_fails_lets_nobody_in(serve: str, expected: str) -> None:
    broken = Target("broken", serve, 'context.region == "eu"')  # not sent, and no default
    engine = engine_with(world(Flag("f", "reports", targeting=(broken,))), ACME)
    assert decided(engine, inquiry()).exposures == {"f": expected}  # "on" by the rollout of 100 %
    assert engine.targeting_failures == 1
    closed = engine_with(world(Flag("f", "reports", 0, targeting=(broken,))), ACME)
    assert decided(closed, inquiry()).reason is Reason.FEATURE_OFF


def test_targeting_of_a_tenants_flag_is_asked_for_each_check() -> None:
    engine = engine_with(world(Flag("f", "reports", 0, targeting=(Target("now", "on", "now > timestamp(0)"),))), ACME)
    assert decided(engine, inquiry()).effect is Effect.APPROVED
    target = Target("eu", "on", 'context.region == "eu"')
    engine = engine_with(world(Flag("f", "reports", 0, targeting=(target,))), ACME)
    effects = [decided(engine, inquiry(context={"region": region})).effect for region in ("eu", "us", "eu")]
    assert effects == [Effect.APPROVED, Effect.DENIED, Effect.APPROVED]


def test_flags_of_the_tenant_are_looked_at_before_those_of_the_subject() -> None:
    mine = Flag("a", "reports", 0, "subject")
    timed = Flag("b", "reports", 100, starts_s=NOW_S + 1)
    plain = Flag("c", "reports", 0)
    engine = engine_with(world(mine, timed, plain), ACME)
    decision = decided(engine, inquiry())
    assert (decision.rule, decision.exposures) == ("b", {"b": "off"})


# What is told


def test_an_answer_carries_the_variant_and_its_value() -> None:
    flags = (
        Flag("new-editor", "reports", variants=(CANVAS,)),
        Flag("palette", "reports", by="subject", variants=(Variant("dark", 1, '"#000"'), Variant("light", 0))),
        Flag("plain", "reports"),
    )
    engine = engine_with(world(*flags), ACME)
    decision = decided(engine, inquiry())
    for _ in range(2):  # the second answer is put together from what the first made
        answer = pb.CheckResponse.FromString(Answers(engine, LinkState()).encode(decision, ""))
        assert dict(answer.metadata) == {
            "variant:new-editor": "canvas",
            "value:new-editor": '{"toolbar":"wide"}',
            "variant:palette": "dark",
            "value:palette": '"#000"',
        }
    assert decision.exposures == {"new-editor": "canvas", "palette": "dark", "plain": "on"}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (Flag("f", "reports", 20), "Flag f (20 % by tenant) does not include this tenant (bucket 9,782 of 10,000)."),
        (Flag("f", "reports"), "Flag f (100 % by tenant) includes this tenant (bucket 9,782 of 10,000)."),
        (
            Flag("f", "reports", variants=(CANVAS,)),
            "Flag f (100 % by tenant) includes this tenant (bucket 9,782 of 10,000) and serves canvas.",
        ),
        (Flag("f", "reports", enabled=False), "Flag f serves off: it is switched off (enabled: false)."),
        (Flag("f", "reports", starts_s=4_000_000_000), "Flag f serves off: it starts at 2096-10-02T07:06:40+00:00."),
        (Flag("f", "reports", ends_s=1_000_000_000), "Flag f serves off: it ended at 2001-09-09T01:46:40+00:00."),
        (Flag("f", "reports", targeting=(Target("t", "on"),)), "Flag f is on: the targeting rule t matches."),
        (
            Flag("f", "reports", targeting=(Target("t", "off", 'context.region == "eu"'),)),
            "Flag f: the condition of the targeting rule t failed.",
        ),
    ],
)
def test_an_explanation_says_what_decided(flag: Flag, said: str) -> None:
    engine = engine_with(world(flag), ACME)
    question = inquiry()
    decision = decided(engine, question)
    (step,) = [step for step in explain(engine, question, decision, now_us=NOW_US) if step.name == "flags"]
    assert said in step.found
    assert step.objects == (decision.reason is Reason.FEATURE_OFF)


# On the wire


MANY_FACED = Flag(
    "f",
    "reports",
    20,
    "subject",
    enabled=False,
    starts_s=1,
    ends_s=9,
    steps=(RolloutStep(3, 40.5),),
    variants=(CONTROL, CANVAS),
    targeting=(Target("staff", "canvas", "true"),),
)


@pytest.mark.parametrize("flag", [Flag("f", "reports", 20.0, "subject"), MANY_FACED])
def test_a_flag_survives_its_travel(flag: Flag) -> None:
    chunks = chunk_catalog(Catalog.of([flag]))
    assert catalog_of_chunks(chunks, [digest_of(chunk) for chunk in chunks]).flags == {"f": flag}


def test_a_plain_flag_travels_as_it_always_did() -> None:
    wire = {"kind": "Flag", "name": "f", "feature": "reports", "percent": 20.0, "by": "tenant"}
    assert document_to_wire(Flag("f", "reports", 20.0)) == wire
    assert document_from_wire(wire) == Flag("f", "reports", 20.0)


@pytest.mark.parametrize("flag", [Flag("f", "reports", enabled=False), MANY_FACED])
def test_a_sidecar_that_knows_only_percentages_refuses_any_other_flag(flag: Flag) -> None:
    kinds_known_before = {"Feature", "Action", "Plan", "Policy", "Role", "Flag", "ApprovalChain"}
    assert document_to_wire(flag)["kind"] not in kinds_known_before  # it raises for a kind that it does not know
