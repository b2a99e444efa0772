"""Documents keep their meaning on the wire, and their place in the bundle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from licet.domain.catalog import (
    Action,
    ApprovalChain,
    ApprovalStage,
    Attribute,
    AttributeType,
    Catalog,
    Document,
    Durability,
    Enforcement,
    Entitlement,
    Feature,
    Flag,
    Grant,
    License,
    LicenseStatus,
    Limit,
    OnExceeded,
    OnExpiry,
    OnUnavailable,
    Plan,
    Policy,
    ReservationTerms,
    Role,
    Rule,
    RuleEffect,
    UnavailableMode,
    budget_key,
    currency_of,
    grant_key,
    matches,
    rate_key,
)
from licet.domain.catalog_wire import document_from_wire, document_to_wire, license_from_wire, license_to_wire
from licet.domain.flags import RolloutStep, Target, Variant
from licet.domain.ids import NAME_PATTERN, UNITS_MAX, LimitKey
from licet.domain.money import AMOUNT_NANOS_MAX, Fee, Price, Step, TierMode, Tiers
from licet.domain.redaction import RecordMode
from licet.domain.windows import Anchor, Period
from licet.wire.documents import CHUNK_COUNT, catalog_of_chunks, chunk_catalog, digest_of

names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: len(name) <= 32)
texts = st.text(max_size=12)
units = st.integers(0, UNITS_MAX)
nanos = st.integers(0, AMOUNT_NANOS_MAX)
seconds = st.integers(0, 366 * 86_400)
patterns = st.lists(st.one_of(names, names.map("{}.*".format), st.just("*")), max_size=3).map(tuple)

attributes = st.one_of(
    st.builds(Attribute, st.just(AttributeType.STRING), texts),
    st.builds(Attribute, st.just(AttributeType.INT), st.integers(-(2**63), 2**63 - 1)),
    st.builds(Attribute, st.just(AttributeType.DOUBLE), st.floats(allow_nan=False)),
    st.builds(Attribute, st.just(AttributeType.LIST), st.lists(texts, max_size=2)),
    st.builds(Attribute, st.sampled_from(AttributeType), st.none()),
)
actions = st.builds(
    Action,
    names,
    st.dictionaries(texts, names, min_size=1, max_size=3),
    st.dictionaries(names, attributes, max_size=3),
    st.sampled_from(Durability),
    st.builds(OnUnavailable, st.sampled_from(UnavailableMode), units, seconds),
    st.builds(ReservationTerms, seconds, st.sampled_from(OnExpiry)),
)
steps = st.builds(Step, units, nanos, nanos, st.dictionaries(texts, nanos, max_size=2))
tiers = st.builds(Tiers, st.sampled_from(TierMode), st.lists(steps, min_size=1, max_size=2).map(tuple))
amounts = st.dictionaries(texts, nanos, max_size=2)
prices = st.builds(Price, nanos, st.integers(1, UNITS_MAX), st.just("USD"), texts, amounts, st.none() | tiers)
fees = st.builds(Fee, nanos, st.just("USD"))
overage_prices = st.builds(Price, nanos, st.integers(1, UNITS_MAX), st.just("USD"))
limits = st.builds(
    Limit,
    texts.map(LimitKey),
    units,
    st.sampled_from(Period),
    st.lists(texts, max_size=2).map(tuple),
    st.sampled_from(OnExceeded),
    st.sampled_from(Anchor),
    st.sampled_from(["", "USD", "EUR"]),
    units,
    st.booleans(),
    st.none() | overage_prices,
).map(lambda limit: replace(limit, key=rate_key(LimitKey("f:second"))) if limit.is_rate else limit)
grants = st.builds(Grant, names, texts.map(LimitKey), units, units, units, st.integers(-1_000, 1_000))
entitlements = st.builds(
    Entitlement,
    st.none() | prices,
    st.lists(limits, max_size=2, unique_by=lambda limit: limit.key).map(tuple),
    st.integers(0, 100),
    seconds,
    included=units,
)
rules = st.builds(Rule, names, st.sampled_from(RuleEffect), texts, texts)
approvers = st.lists(texts, max_size=2).map(tuple)
stages = st.builds(ApprovalStage, approvers, st.integers(1, 5), seconds, approvers, seconds)
documents: st.SearchStrategy[Document] = st.one_of(
    st.builds(Feature, names, texts, texts),
    actions,
    st.builds(Plan, names, st.dictionaries(names, entitlements, max_size=2), texts, st.none() | fees),
    st.builds(Policy, names, patterns, st.lists(rules, max_size=2).map(tuple), st.sampled_from(Enforcement)),
    st.builds(Role, names, patterns),
    st.builds(
        Flag,
        names,
        names,
        st.floats(0, 100),
        st.sampled_from(["tenant", "subject"]),
        enabled=st.booleans(),
        starts_s=seconds,
        ends_s=seconds,
        steps=st.lists(st.builds(RolloutStep, seconds, st.floats(0, 100)), max_size=2).map(tuple),
        variants=st.lists(st.builds(Variant, names, units, texts), max_size=2).map(tuple),
        targeting=st.lists(st.builds(Target, names, names, texts), max_size=2).map(tuple),
    ),
    st.builds(ApprovalChain, names, st.lists(stages, max_size=2).map(tuple)),
)
licenses = st.builds(
    License,
    names,
    names,
    st.sampled_from(LicenseStatus),
    units,
    units,
    st.dictionaries(names, st.integers(1, 9), max_size=2),
    st.dictionaries(texts, units, max_size=2),
    st.lists(grants, max_size=3).map(tuple),
)


def over_the_wire(body: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(body))


@given(documents)
def test_a_document_survives_the_wire(document: Document) -> None:
    assert document_from_wire(over_the_wire(document_to_wire(document))) == document


@given(licenses)
def test_a_license_survives_the_wire(license_: License) -> None:
    assert license_from_wire(over_the_wire(license_to_wire(license_))) == license_


@given(documents)
def test_what_a_newer_writer_adds_is_ignored(document: Document) -> None:
    assert document_from_wire({**document_to_wire(document), "from_the_future": [1]}) == document


def test_an_attribute_that_is_not_recorded_stops_a_reader_that_would_record_it() -> None:
    kept = Action("x", {"": "f"}, {"a": Attribute(AttributeType.STRING)})
    hashed = Action("x", {"": "f"}, {"a": Attribute(AttributeType.STRING, None, RecordMode.HASH)})
    assert document_to_wire(kept)["attributes"] == {"a": ["string", None]}  # as before there was anything to hide
    assert document_to_wire(hashed)["attributes"] == {"a": ["string", None, "hash"]}
    assert document_from_wire(over_the_wire(document_to_wire(hashed))) == hashed


def test_documents_of_an_older_writer_have_the_defaults() -> None:
    action = Action("a", {"": "f"})
    older = document_to_wire(action)
    del older["reservation"]
    assert document_from_wire(older) == action
    assert action.reservation == ReservationTerms(15 * 60, OnExpiry.CANCEL)

    plan = Plan("p", {"f": Entitlement(limits=(Limit(LimitKey("f:month"), 5, Period.MONTH),))})
    older = document_to_wire(plan)
    older["features"]["f"][1] = [written[:5] for written in older["features"]["f"][1]]
    assert document_from_wire(over_the_wire(older)) == plan


def test_what_a_newer_writer_appends_to_a_limit_is_ignored() -> None:
    limit = Limit(LimitKey("f:second.rate"), 5, Period.SECOND, burst=9, durable=True)
    newer = document_to_wire(Plan("p", {"f": Entitlement(limits=(limit,))}))
    newer["features"]["f"][1][0].append("from the future")
    assert document_from_wire(over_the_wire(newer)) == Plan("p", {"f": Entitlement(limits=(limit,))})


def test_a_license_of_an_older_writer_has_no_grants() -> None:
    older = license_to_wire(License("acme", "pro"))
    del older["grants"]
    assert license_from_wire(over_the_wire(older)) == License("acme", "pro")


def test_the_key_of_a_grant_names_its_limit_and_itself() -> None:
    assert (
        Grant("spring", LimitKey("f:month"), 1, 2, 3).key
        == grant_key(LimitKey("f:month"), "spring")
        == "f:month+spring"
    )


@pytest.mark.parametrize(
    "name", ["month", "usd", "minute@subject", "day@context.usd", "day@context.usd+subject", "day@context.team"]
)
def test_the_key_of_a_budget_tells_its_currency(name: str) -> None:
    units = LimitKey(f"api.usd:{name}")
    assert currency_of(units) == ""
    assert budget_key(units, "USD") == f"{units}.usd"
    assert currency_of(budget_key(units, "EUR")) == "EUR"


@pytest.mark.parametrize(
    "wire",
    [
        {"kind": "Hologram", "name": "x"},
        {"kind": "Policy", "name": "x", "actions": ["*"], "enforcement": "sometimes", "rules": []},
        {"kind": "Policy", "name": "x", "actions": ["*"], "enforcement": "enforce", "rules": [["r", "maybe", "", ""]]},
    ],
)
def test_what_is_only_half_understood_is_refused(wire: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Hologram|sometimes|maybe"):
        document_from_wire(wire)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.lists(documents, max_size=8))
def test_a_catalog_survives_being_cut_into_chunks(bundle: list[Document]) -> None:
    catalog = Catalog.of(bundle)
    chunks = chunk_catalog(catalog)
    assert catalog_of_chunks(chunks, [digest_of(chunk) for chunk in chunks]) == catalog


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.lists(documents, max_size=8), st.randoms(use_true_random=False))
def test_chunks_do_not_depend_on_the_order_of_documents(bundle: list[Document], random: Any) -> None:
    distinct = list(Catalog.of(bundle).documents())
    shuffled = random.sample(distinct, len(distinct))
    assert chunk_catalog(Catalog.of(shuffled)) == chunk_catalog(Catalog.of(distinct))


def test_one_changed_document_changes_one_chunk() -> None:
    features: list[Document] = [Feature(f"feature-{number}") for number in range(2_000)]
    before = chunk_catalog(Catalog.of(features))
    after = chunk_catalog(Catalog.of([*features, Feature("feature-7", title="changed")]))
    assert len(before) <= CHUNK_COUNT
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1


def test_altered_or_missing_chunks_are_refused() -> None:
    chunks = chunk_catalog(Catalog.of([Feature("a"), Feature("b"), Feature("c")]))
    digests = [digest_of(chunk) for chunk in chunks]
    for wrong in ([*chunks[:-1], chunks[-1] + b"\0"], chunks[:-1], chunks[::-1]):
        with pytest.raises(ValueError, match="manifest"):
            catalog_of_chunks(wrong, digests)


def test_a_later_document_replaces_an_earlier_one_of_its_kind_and_name() -> None:
    catalog = Catalog.of([Feature("a", title="old"), Role("a", ("*",)), Feature("a", title="new")])
    assert catalog == Catalog(features={"a": Feature("a", title="new")}, roles={"a": Role("a", ("*",))})


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("report.view", "report.view", True),
        ("report.view", "report.viewer", False),
        ("report.*", "report.view", True),
        ("report.*", "report.admin.delete", True),
        ("report.*", "report", False),
        ("report.*", "reports.view", False),
        ("*", "anything.at.all", True),
    ],
)
def test_patterns_match_names_below_their_prefix(pattern: str, name: str, expected: bool) -> None:
    assert matches([pattern], name) is expected


@pytest.mark.parametrize(
    ("key", "per"),
    [
        ("f:cap", Period.SECOND),
        ("f:cap.rate", Period.TERM),
        ("f:second@context.rate", Period.SECOND),
    ],
)
def test_a_limit_whose_key_says_that_something_else_is_counted_is_not_acted_on(key: str, per: Period) -> None:
    written = document_to_wire(Plan("p", {"f": Entitlement(limits=(Limit(LimitKey(key), 5, per),))}))
    with pytest.raises(ValueError, match="not what its key says"):
        document_from_wire(written)


@pytest.mark.parametrize(
    ("key", "per"),
    [
        ("f:month@context.rate", Period.MONTH),
        ("f:month@context.a+context.rate", Period.MONTH),
        ("f:second@context.rate.rate", Period.SECOND),
        ("a.rate:month", Period.MONTH),
    ],
)
def test_an_attribute_named_rate_is_no_rate(key: str, per: Period) -> None:
    plan = Plan("p", {"f": Entitlement(limits=(Limit(LimitKey(key), 5, per),))})
    assert document_from_wire(document_to_wire(plan)) == plan
