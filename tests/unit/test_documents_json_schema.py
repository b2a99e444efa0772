"""Schemas for editors: they take what people write and validation takes, and refuse nothing that validation takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from jsonschema import Draft202012Validator

from licet_control_plane.core.documents.findings import Findings
from licet_control_plane.core.documents.json_schema import ANY, KINDS, schema_of
from licet_control_plane.core.documents.reading import SourceFile, read
from licet_control_plane.core.documents.sources import SOURCE_OF_KIND
from tests.support.documents import validated

TOP: Final = Path(__file__).parents[2]
EXAMPLES: Final = sorted((TOP / "examples" / "catalog").rglob("*.yaml"))
VALIDATORS: Final = {kind: Draft202012Validator(schema_of(kind)) for kind in KINDS}


class _EditorLoader(yaml.SafeLoader):
    """As an editor reads YAML 1.2: a number with underscores is a text, and so is a date."""


_EditorLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith((":timestamp", ":int", ":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_EditorLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), None)
_EditorLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), None)


def documented() -> list[str]:
    """The complete documents of the documentation, beside the examples."""
    text = (TOP / "docs" / "documents.md").read_text()
    return [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]


TEXTS: Final = [path.read_text() for path in EXAMPLES] + documented()


def as_we_read(text: str) -> list[Any]:
    findings = Findings()
    documents, _ = read(SourceFile("1.yaml", text), findings)
    assert not findings.errors()
    return [document.root.plain() for document in documents]


def as_editors_read(text: str) -> list[Any]:
    return [one for one in yaml.load_all(text, _EditorLoader) if one is not None]


def problems(document: Any, kind: str) -> list[str]:
    return [error.message for error in VALIDATORS[kind].iter_errors(document)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_sound_schema_that_stands_alone(kind: str) -> None:
    schema = schema_of(kind)
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:licet:v1:{kind}"
    assert "kind" in schema["required"]
    references = str(schema).split("'$ref': '#/$defs/")[1:]
    assert {one.partition("'")[0] for one in references} <= schema["$defs"].keys()


@pytest.mark.parametrize("reader", [as_we_read, as_editors_read])
def test_every_document_of_the_examples_and_the_documentation_passes(reader: Any) -> None:
    seen = set()
    for text in TEXTS:
        for document in reader(text):
            kind = document["kind"]
            seen.add(kind)
            assert problems(document, kind) == [], (kind, document)
            if kind in SOURCE_OF_KIND:
                assert problems(document, ANY) == []
    assert seen >= set(KINDS) - {ANY}


def test_what_is_misspelled_missing_or_of_another_type_fails_wherever_it_is() -> None:
    tried = 0
    for text in TEXTS:
        for document in as_we_read(text):
            for mutant in (
                {**document, "naem": "x"},
                {**document, "kind": "Plam"},
                {**document, "apiVersion": "licet/v2"},
                {name: value for name, value in document.items() if name != "name"},
                {name: value for name, value in document.items() if name != "kind"},
                *({**document, name: {"of": ["another", "type"]}} for name in document),
            ):
                if mutant == document:
                    continue  # a license has no name
                tried += 1
                assert problems(mutant, document["kind"]), mutant
    assert tried > 200


PLAN: Final = {"kind": "Plan", "name": "p", "features": {"f": {}}}


@pytest.mark.parametrize(
    "entitlement",
    [
        {"limit": []},
        {"limits": [{"per": "month"}]},
        {"limits": [{"amount": 1, "spend": "5.00 USD", "per": "month"}]},
        {"limits": [{"amount": -1, "per": "month"}]},
        {"limits": [{"amount": "5", "per": "month"}]},
        {"limits": [{"amount": 1.5, "per": "month"}]},
        {"limits": [{"amount": 1, "per": "mont"}]},
        {"limits": [{"amount": 1, "per": "month", "scope": ["team"]}]},
        {"limits": [{"spend": "5.00", "per": "month"}]},
        {"price": {"amount": 8.5, "currency": "USD"}},
        {"price": {"amount": "8.00", "currency": "usd"}},
        {"price": {"currency": "USD"}},
        {"seats": 0},
        {"seats": 1, "heartbeat": 60},
    ],
)
def test_what_the_schema_refuses_validation_refuses(entitlement: Any) -> None:
    assert problems({**PLAN, "features": {"f": entitlement}}, "Plan")
    result = validated(
        "{kind: Feature, name: f}", yaml.safe_dump({**PLAN, "features": {"f": entitlement}}, default_flow_style=False)
    )
    assert result.errors


def test_a_name_of_another_form_fails_as_a_key_too() -> None:
    assert problems({**PLAN, "features": {"Not A Name": {}}}, "Plan")
    assert problems({"kind": "Role", "name": "r", "actions": ["a b"]}, "Role")
    assert problems({"kind": "Action", "name": "a", "feature": "f", "meters": {"x": "f"}}, "Action")
