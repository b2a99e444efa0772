"""A bundle is taken in by small steps: what is known is not decoded or compiled again, and rules are found by name."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.domain.catalog import Action, Catalog, Feature, Policy, Rule, RuleEffect, matches
from licet.domain.conditions import ConditionEnvironment
from licet.wire.documents import chunk_catalog, digest_of
from licet_sidecar.core.patterns import ByPattern
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.services import unpacking
from licet_sidecar.services.slices import in_slices
from licet_sidecar.services.unpacking import Unpacking

words = st.lists(st.sampled_from(["a", "b", "aa"]), min_size=1, max_size=3).map(".".join)
patterns = st.one_of(words, words.map(lambda word: f"{word}.*"), st.just("*"))


@given(st.lists(st.lists(patterns, max_size=3), max_size=5), words)
def test_finds_by_name_what_asking_each_pattern_finds(many: list[list[str]], name: str) -> None:
    index: ByPattern[int] = ByPattern()
    for number, some in enumerate(many):
        index.add(some, number)
    assert index.matching(name) == [number for number, some in enumerate(many) if matches(some, name)]


def guarded(*conditions: str) -> Catalog:
    rules = tuple(Rule(f"r{place}", RuleEffect.DENY, when) for place, when in enumerate(conditions))
    actions = [Action(name, {"": "f"}) for name in ("a.x", "a.y", "b")]
    return Catalog.of([Feature("f"), *actions, Policy("p", ("a.*",), rules)])


def rulebook(content: Catalog) -> Rulebook:
    return Rulebook(content, generation=1, revision=1, observe=False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources as they are compiled."""
    sources: list[str] = []
    compile_ = ConditionEnvironment.compile

    def noting(self: ConditionEnvironment, source: str) -> object:
        sources.append(source)
        return compile_(self, source)

    monkeypatch.setattr(ConditionEnvironment, "compile", noting)
    return sources


def test_a_condition_is_compiled_once_for_all_actions_that_declare_the_same(compiled: list[str]) -> None:
    book = rulebook(guarded("quantity > 1", "quantity > 2"))
    for name in ("a.x", "a.y", "b"):
        book.action(name)
    assert compiled == ["quantity > 1", "quantity > 2"]


def test_what_is_in_use_is_compiled_ahead_and_only_where_it_changed(compiled: list[str]) -> None:
    before = rulebook(guarded("quantity > 1", "nonsense(", "quantity > 2"))
    assert before.action("a.x") is not None
    compiled.clear()
    after = rulebook(guarded("quantity > 1", "nonsense(", "quantity > 3"))
    for _ in after.warmed(before):
        pass
    assert compiled == ["quantity > 3"]
    bound = after.action("a.x")
    assert bound is not None
    assert [(rule.condition.source if rule.condition else "", bool(rule.broken)) for rule in bound.rules] == [
        ("quantity > 1", False),
        ("", True),
        ("quantity > 3", False),
    ]
    assert compiled == ["quantity > 3"]


def test_steps_that_are_not_taken_change_nothing() -> None:
    before = rulebook(guarded("quantity > 1"))
    before.action("a.x")
    for taken in range(4):
        after = rulebook(guarded("quantity > 1", "quantity > 2"))
        steps = after.warmed(before)
        for _ in range(taken):
            next(steps, None)
        steps.close()  # type: ignore[attr-defined]
        bound = after.action("a.y")
        assert bound is not None
        assert len(bound.rules) == 2


async def test_a_chunk_is_decoded_once_however_many_bundles_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = unpacking.documents_of_chunk

    def noting(chunk: bytes, digest: str) -> object:
        decoded.append(digest)
        return decode(chunk, digest)

    monkeypatch.setattr(unpacking, "documents_of_chunk", noting)
    first = Catalog.of([Feature(f"f{number}") for number in range(2_000)])
    second = Catalog.of([*first.documents(), replace(first.features["f7"], unit="other")])
    unpacker = Unpacking()
    for content in (first, second):
        chunks = {digest_of(chunk): chunk for chunk in chunk_catalog(content)}
        await unpacker.unpack(list(chunks), chunks)
        assert unpacker.catalog(list(chunks), chunks) == content
    assert len(decoded) == len(chunk_catalog(first)) + 1


def test_a_chunk_that_is_not_the_named_one_is_refused() -> None:
    (chunk,) = chunk_catalog(Catalog.of([Feature("f")]))
    (other,) = chunk_catalog(Catalog.of([Feature("g")]))
    with pytest.raises(ValueError, match="not those that the manifest names"):
        Unpacking().catalog([digest_of(chunk)], {digest_of(chunk): other})


async def test_a_chunk_that_was_altered_is_refused_also_when_the_right_one_was_seen() -> None:
    (chunk,) = chunk_catalog(Catalog.of([Feature("f")]))
    digest, unpacker = digest_of(chunk), Unpacking()
    await unpacker.unpack([digest], {digest: chunk})
    with pytest.raises(ValueError, match="not those that the manifest names"):
        await unpacker.unpack([digest], {digest: chunk[:-1] + b"?"})


async def test_others_have_their_turn_between_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("licet_sidecar.services.slices.SLICE_S", 0.0)
    turns: list[str] = []

    async def other() -> None:
        for _ in range(3):
            turns.append("other")
            await asyncio.sleep(0)

    def steps():  # type: ignore[no-untyped-def]
        for _ in range(3):
            turns.append("step")
            yield

    await asyncio.gather(in_slices(steps()), other())
    assert turns[:4] == ["step", "other", "step", "other"]
