"""Random records of a catalog, for properties. Not always valid as documents; always what the programs can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

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
    rate_key,
)
from licet.domain.ids import LimitKey
from licet.domain.money import Price
from licet.domain.windows import Anchor, Period

NAMES: Final = ("a", "b", "c.d")
names = st.sampled_from(NAMES)
texts = st.sampled_from(("", "x", "y, z", "none"))
units = st.integers(0, 1_000_000)
patterns = st.lists(st.sampled_from(("*", "a", "c.*")), min_size=1, max_size=2, unique=True).map(tuple)

attributes = st.one_of(
    st.builds(Attribute, st.just(AttributeType.STRING), texts),
    st.builds(Attribute, st.just(AttributeType.INT), st.integers(-9, 9)),
    st.builds(Attribute, st.just(AttributeType.DOUBLE), st.floats(0, 9)),
    st.builds(Attribute, st.just(AttributeType.LIST), st.lists(texts, max_size=2)),
    st.builds(Attribute, st.sampled_from(AttributeType), st.none()),
)
prices = st.builds(
    Price, units, st.integers(1, 1_000), st.sampled_from(("USD", "EUR")), texts, st.dictionaries(names, units)
)
limits = st.builds(
    Limit,
    st.sampled_from([LimitKey(f"a:{name}") for name in ("month", "day", "x")]),
    units,
    st.sampled_from(Period),
    st.sampled_from(((), ("subject",), ("context.x", "subject"))),
    st.sampled_from(OnExceeded),
    st.sampled_from(Anchor),
    st.sampled_from(("", "USD", "EUR")),
    units,
    st.booleans(),
).map(lambda limit: replace(limit, key=rate_key(limit.key)) if limit.is_rate else limit)
entitlements = st.builds(Entitlement, st.none() | prices, st.lists(limits, max_size=3).map(tuple), units, units)
rules = st.builds(Rule, names, st.sampled_from(RuleEffect), texts, texts)
stages = st.builds(ApprovalStage, patterns, st.integers(1, 5), units, patterns, units)
random_documents: st.SearchStrategy[Document] = st.one_of(
    st.builds(Feature, names, texts, texts),
    st.builds(
        Action,
        names,
        st.dictionaries(st.sampled_from(("", "in", "out")), names, min_size=1),
        st.dictionaries(names, attributes, max_size=2),
        st.sampled_from(Durability),
        st.builds(OnUnavailable, st.sampled_from(UnavailableMode), units, units),
        st.builds(ReservationTerms, units, st.sampled_from(OnExpiry)),
    ),
    st.builds(Plan, names, st.dictionaries(names, entitlements, max_size=2), texts),
    st.builds(Policy, names, patterns, st.lists(rules, max_size=3).map(tuple), st.sampled_from(Enforcement)),
    st.builds(Role, names, patterns),
    st.builds(Flag, names, names, st.floats(0, 100), st.sampled_from(("tenant", "subject"))),
    st.builds(ApprovalChain, names, st.lists(stages, max_size=3).map(tuple)),
)
random_catalogs: st.SearchStrategy[Catalog] = st.lists(random_documents, max_size=6).map(Catalog.of)
