"""Catalogs written back as documents say the same, whatever they hold."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from licet.domain.catalog import Action, Attribute, AttributeType, Catalog, Document, Feature
from licet_control_plane.core.documents import SourceFile, validate
from licet_control_plane.core.documents.writing import stamped, to_source, write_files
from tests.support.documents import catalog_of

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "catalog").glob("*.yaml"))
EVERYTHING = """\
kind: Feature
name: llm.tokens
unit: token
title: 'Tokens: "all" of them'
---
kind: Action
name: llm.generate
meters: {input: llm.tokens, output: llm.tokens}
attributes:
  model: string
  region: {type: string, default: "no"}
  count: {type: int, default: -3}
  share: {type: double, default: 1.0e-7}
  fast: {type: bool, default: false}
  tags: {type: list, default: ["1e5", "null"]}
  until: {type: timestamp, default: "2026-01-31T00:00:00.000001+01:00"}
  email: {type: string, record: hash}
  iban: {type: string, default: "none", record: redact}
durability: synced
on_unavailable: {mode: capped, units_max: 7}
reservation: {expires_after: 90s, on_expiry: commit}
---
kind: Action
name: llm.look
attributes: {region: {type: string, default: ""}}
feature: llm.tokens
on_unavailable: {mode: last_known, for_max: 36h}
---
kind: Plan
name: pro
title: Pro
fee: "49.00 USD"
features:
  llm.tokens:
    price: {amount: "8.000000001", per_units: 1_000, currency: USD, by: context.region, amounts: {"1e5": "0.60"}}
    included: 100
    limits:
      - amount: 10
        per: month
        anchor: license
        on_exceeded: overage
        overage_price: {amount: "0.01", per_units: 10, currency: USD}
        durable: true
        name: monthly
        enforcement: shadow
      - {spend: "2.50 USD", per: month, scope: [subject, context.region]}
      - {amount: 5, per: second, burst: 9}
    seats: 3
    heartbeat: 90s
---
kind: Plan
name: tiered
features:
  llm.tokens:
    price:
      currency: USD
      per_units: 1_000
      by: context.region
      tiers:
        mode: volume
        steps:
          - {up_to: 1_000_000, amount: "8.00", amounts: {"1e5": "0.60"}}
          - {amount: "6.00", flat: "5.00"}
---
kind: Policy
name: guard
enforcement: shadow
actions: [llm.*, "*"]
rules:
  - {name: first, effect: allow}
  - name: second
    effect: require_approval
    approval: finance
    when: |
      quantity > 3 &&
        subject.id != "it's"
---
kind: Role
name: analyst
actions: ["*"]
---
kind: Flag
name: some
feature: llm.tokens
rollout: {percent: 12.34, by: subject}
enabled: false
starts: "2027-01-01T00:00:00+01:00"
ends: "2028-01-01T00:00:00Z"
schedule:
  - {at: "2027-01-15T09:00:00Z", percent: 50}
  - {at: "2027-02-15T09:00:00Z", percent: 99.99}
variants:
  plain: 50
  text: {weight: 3, value: "yes"}
  rich: {weight: 0, value: {b: 1.5, a: [1, null, "x"], on: true}}
targeting:
  - {name: staff, when: 'subject.type == "staff"', serve: rich}
  - {name: rest, serve: "off"}
---
kind: ApprovalChain
name: finance
stages:
  - {approvers: [user:a, user:b], need: 2, escalate_after: 30m, escalate_to: [group:cfo], deny_after: 24h}
"""


def rewritten(catalog: Catalog) -> Catalog:
    found = validate(write_files(catalog))
    assert [str(error) for error in found.errors] == []
    assert found.catalog is not None
    return found.catalog


def test_the_examples_say_the_same_when_written_back() -> None:
    catalog = catalog_of(*(path.read_text() for path in EXAMPLES))
    assert rewritten(catalog) == catalog


def test_everything_a_document_can_say_is_written() -> None:
    catalog = catalog_of(EVERYTHING)
    assert rewritten(catalog) == catalog
    unsaid = _fields_at_their_default(catalog)
    assert unsaid == set(), "let EVERYTHING use these fields, and write them in core/documents/writing"


def test_each_document_carries_its_version() -> None:
    for document in catalog_of(EVERYTHING).documents():
        assert to_source(document)["apiVersion"] == "licet/v1"


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_survives(text: str) -> None:
    action = Action("a", {"": "f"}, {"x": Attribute(AttributeType.STRING, text)})
    documents: list[Document] = [Feature("f", title=text), action]
    assert rewritten(Catalog.of(documents)) == Catalog.of(documents)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("kind: Feature\nname: a\n", "apiVersion: licet/v1\nkind: Feature\nname: a\n"),
        ("# why\n\nkind: Feature # x\nname: a", "# why\n\napiVersion: licet/v1\nkind: Feature # x\nname: a"),
        ("---\n  kind: Feature\n  name: a\n", "---\n  apiVersion: licet/v1\n  kind: Feature\n  name: a\n"),
        ("{kind: Feature, name: a}\n", "{apiVersion: licet/v1, kind: Feature, name: a}\n"),
        ("--- {kind: Feature, name: a}\n", "--- {apiVersion: licet/v1, kind: Feature, name: a}\n"),
        (
            "kind: Feature\nname: a\n---\napiVersion: licet/v1\nkind: Feature\nname: b\n---\nname: c\nkind: Feature\n",
            "apiVersion: licet/v1\nkind: Feature\nname: a\n---\napiVersion: licet/v1\nkind: Feature\nname: b\n"
            "---\napiVersion: licet/v1\nname: c\nkind: Feature\n",
        ),
        ("? kind\n: Feature\n", "? kind\n: Feature\n"),  # a way to write that nobody uses stays as it is
        ("kind: [\n", "kind: [\n"),
    ],
)
def test_the_version_is_added_and_nothing_else_changes(written: str, expected: str) -> None:
    made = stamped(SourceFile("a.yaml", written)).text
    assert made == expected
    assert stamped(SourceFile("a.yaml", made)).text == made


def test_the_examples_keep_their_comments_when_the_version_is_added() -> None:
    files = [SourceFile(path.name, path.read_text()) for path in EXAMPLES]
    made = [stamped(file) for file in files]
    assert validate(made).catalog == validate(files).catalog
    for file, after in zip(files, made, strict=True):
        assert [line for line in after.text.splitlines() if line != "apiVersion: licet/v1"] == file.text.splitlines()
        assert after.text.count("apiVersion: licet/v1") == file.text.count("\nkind: ")


def _fields_at_their_default(catalog: Catalog) -> set[str]:
    """Fields that no record of the catalog has at another value than the one it has anyway."""
    at_default: dict[str, bool] = {}

    def look(record: Any) -> None:
        for one in fields(record):
            value = getattr(record, one.name)
            default = one.default if one.default is not MISSING else None
            name = f"{type(record).__name__}.{one.name}"
            said = value != default and not (one.default_factory is not MISSING and not value)
            at_default[name] = at_default.get(name, True) and not said
            below = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            for item in below:
                if is_dataclass(item):
                    look(item)

    for document in catalog.documents():
        look(document)
    # A plan has no grants: those are the license's.
    return {name for name, unsaid in at_default.items() if unsaid} - {"Entitlement.grants"}
