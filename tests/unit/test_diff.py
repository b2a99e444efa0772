"""The difference of two catalogs: empty for equal ones, and every change is there, in words."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from licet.domain.catalog import Catalog, Document, Plan
from licet.domain.catalog_wire import document_from_wire, document_to_wire
from licet_control_plane.core.diff import Change, diff
from licet_control_plane.core.documents import SourceFile, validate
from tests.support.random_catalogs import random_catalogs, random_documents

EXAMPLES = Path(__file__).parents[2] / "examples" / "catalog"

quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def catalog(*texts: str) -> Catalog:
    found = validate([SourceFile(f"{number}.yaml", text) for number, text in enumerate(texts)])
    assert not found.errors, found.errors
    assert found.catalog is not None
    return found.catalog


BASE = """\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
attributes:
  region: {type: string, default: ""}
"""
PLAN = """\
kind: Plan
name: pro
features:
  reports:
    price: {amount: "8.00", per_units: 1_000, currency: USD}
    limits:
      - {amount: 100, per: month}
"""
POLICY = """\
kind: Policy
name: guard-exports
actions: [report.*]
rules:
  - {name: embargo, effect: deny, when: 'context.region == "xx"'}
  - {name: large, effect: deny, when: 'quantity > 10'}
"""


def said(before: str, after: str) -> list[str]:
    return [str(one) for one in diff(catalog(BASE, PLAN, POLICY), catalog(BASE, *_replaced(before, after)))]


def _replaced(before: str, after: str) -> tuple[str, str]:
    assert (PLAN + POLICY).count(before) == 1
    return PLAN.replace(before, after), POLICY.replace(before, after)


def test_says_what_changes_in_the_words_of_the_documents() -> None:
    assert said("amount: 100,", "amount: 200,") == ["plan pro: reports: limit month 100 -> 200"]
    assert said('"xx"', '"yy"') == ["rule guard-exports/embargo: condition changed"]
    assert said("name: large, effect: deny", "name: large, effect: allow") == [
        "rule guard-exports/large: effect deny -> allow"
    ]
    assert said('"8.00"', '"9.50"') == ["plan pro: reports: price 8.00 USD -> 9.50 USD"]
    assert said("per: month}", "per: month, on_exceeded: overage}") == [
        "plan pro: reports: limit month: on_exceeded deny -> overage"
    ]
    assert said("      - {amount: 100, per: month}", "      - {spend: '5.00 USD', per: month}") == [
        "plan pro: reports: limit month removed (100 per month, then deny)",
        "plan pro: reports: limit month.usd added (5.00 USD per month, then deny)",
    ]
    assert said("actions: [report.*]", "enforcement: shadow\nactions: [report.*]") == [
        "policy guard-exports: enforcement enforce -> shadow"
    ]
    assert said("  - {name: large, effect: deny, when: 'quantity > 10'}\n", "") == [
        "rule guard-exports/large removed (deny when quantity > 10)"
    ]


def test_the_order_of_rules_is_a_difference_and_the_order_of_files_is_none() -> None:
    lines = POLICY.splitlines()
    swapped = "\n".join([*lines[:4], lines[5], lines[4]])
    (found,) = diff(catalog(BASE, PLAN, POLICY), catalog(BASE, PLAN, swapped))
    assert (found.path, found.before, found.after) == (
        ("order",), "rule embargo, rule large", "rule large, rule embargo",
    )  # fmt: skip
    assert diff(catalog(BASE, PLAN, POLICY), catalog(POLICY, "# a comment\n" + PLAN, BASE)) == []


def test_documents_that_come_and_go_are_one_difference_each() -> None:
    (found,) = diff(catalog(BASE), catalog(BASE, PLAN))
    assert (str(found), found.change) == ("plan pro added", Change.ADDED)
    (found,) = diff(catalog(BASE, PLAN), catalog(BASE))
    assert (str(found), found.change) == ("plan pro removed", Change.REMOVED)


@quick
@given(random_catalogs)
def test_equal_catalogs_have_no_difference(one: Catalog) -> None:
    again = Catalog.of(document_from_wire(document_to_wire(document)) for document in one.documents())
    assert diff(one, again) == []


@quick
@given(random_catalogs, random_catalogs)
def test_different_catalogs_always_have_one(one: Catalog, other: Catalog) -> None:
    found = diff(one, other)
    assert bool(found) == (one != other)
    assert all(str(difference) for difference in found)
    assert {(d.kind, d.name) for d in found} == {
        (type(d).__name__, d.name)
        for d in (*one.documents(), *other.documents())
        if _named(one, d) != _named(other, d)
    }  # fmt: skip


@quick
@given(random_documents, st.data())
def test_every_changed_field_is_reported(document: Document, data: st.DataObject) -> None:
    changed = _mutated(document, data)
    found = diff(Catalog.of([document]), Catalog.of([changed]))
    assert bool(found) == (changed != document)


def test_every_field_of_the_example_shows_when_it_changes() -> None:
    before = catalog(*(path.read_text() for path in sorted(EXAMPLES.glob("*.yaml"))))
    for document in before.documents():
        for one in fields(document):
            value = getattr(document, one.name)
            other = {str: "other.name", float: 1.5}.get(type(value))
            if one.name == "name" or other is None:
                continue
            after = Catalog.of([*before.documents(), replace(document, **{one.name: other})])
            (found,) = diff(before, after)
            assert (found.name, found.path) == (document.name, (one.name,))


def _named(one: Catalog, document: Document) -> Document | None:
    return next((d for d in one.documents() if type(d) is type(document) and d.name == document.name), None)


def _mutated(record: Any, data: st.DataObject) -> Any:
    """The record with one field, anywhere in it, taken from another record of its type."""
    choices = [one.name for one in fields(record) if not (one.name == "name" and isinstance(record, Document))]
    name = data.draw(st.sampled_from(choices))
    value = getattr(record, name)
    if is_dataclass(value) and data.draw(st.booleans()):
        return replace(record, **{name: _mutated(value, data)})
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return replace(record, **{name: (_mutated(value[0], data), *value[1:])})
    if isinstance(value, dict) and value:
        key = next(iter(value))
        item = value[key]
        changed = _mutated(item, data) if is_dataclass(item) else f"{item}x" if isinstance(item, str) else item + 1
        return replace(record, **{name: {**value, key: changed}})
    if isinstance(value, bool):
        return replace(record, **{name: not value})
    if isinstance(value, int | float):
        return replace(record, **{name: value + 1 if value < 2**53 else 0})
    if isinstance(value, str) and type(value) is str:
        return replace(record, **{name: f"{value}x"})
    return record


def test_a_plan_can_be_told_from_one_that_only_looks_alike() -> None:
    assert diff(Catalog.of([Plan("a", {}, "b")]), Catalog.of([Plan("a", {}, "c")]))
