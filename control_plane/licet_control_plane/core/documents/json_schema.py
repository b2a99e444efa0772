"""JSON Schema of every kind of document, for editors: made from the models that validate, so that both say the same.

A schema tells of one document alone, and of less than ``validate`` does: names that exist, conditions and what fits
together across documents are beyond it. What it refuses, ``validate`` refuses. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from licet_control_plane.core.documents.licenses import KIND as LICENSE
from licet_control_plane.core.documents.licenses import LicenseSource
from licet_control_plane.core.documents.schema import API_VERSION
from licet_control_plane.core.documents.sources import SOURCE_OF_KIND
from licet_control_plane.core.documents.suites import KIND as SUITE
from licet_control_plane.core.documents.suites import SuiteSource

ANY: Final = "Document"
"""The name of the schema for files whose documents are of any kind of a bundle."""

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_GROUPED: Final = {"type": "string", "pattern": "^[0-9]+(_[0-9]+)+$"}
_REF: Final = "#/$defs/"
_MODELS: Final[dict[str, type[BaseModel]]] = {**SOURCE_OF_KIND, SUITE: SuiteSource, LICENSE: LicenseSource}

KINDS: Final = (ANY, *_MODELS)


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a kind, or of ``ANY``. A new value each time.

    Raises:
        KeyError: there is no such kind.
    """
    if kind == ANY:
        body: dict[str, Any] = {
            "type": "object",
            "required": ["kind"],
            "properties": {"kind": {"enum": list(SOURCE_OF_KIND)}},
            "allOf": [
                {"if": {"properties": {"kind": {"const": one}}, "required": ["kind"]}, "then": {"$ref": f"{_REF}{one}"}}
                for one in SOURCE_OF_KIND
            ],
        }
        needed = {one: _headed(one) for one in SOURCE_OF_KIND}
        description = "Any document of a Licet bundle."
    else:
        _MODELS[kind]  # or KeyError
        body, needed = _headed(kind), {}
        description = f"A Licet document of the kind {kind}."
    definitions = {**needed, **_reachable({"of": [body, needed]})}
    made = {"$schema": _DIALECT, "$id": f"urn:licet:v1:{kind}", "title": kind, "description": description, **body}
    tidied: dict[str, Any] = {name: _tidied(part) for name, part in (made | {"$defs": definitions}).items()}
    return tidied


@cache
def _generated() -> tuple[dict[str, str], dict[str, Any]]:
    """The definition of each kind by name, and all definitions."""
    references, whole = models_json_schema([(model, "validation") for model in _MODELS.values()])
    names = {kind: references[model, "validation"]["$ref"].removeprefix(_REF) for kind, model in _MODELS.items()}
    return names, whole["$defs"]


def _headed(kind: str) -> dict[str, Any]:
    """A kind's fields, with those that every document has."""
    names, definitions = _generated()
    body = dict(definitions[names[kind]])
    body["properties"] = {"apiVersion": {"const": API_VERSION}, "kind": {"const": kind}, **body["properties"]}
    body["required"] = ["kind", *body.get("required", ())]
    body.pop("title", None)
    body.pop("description", None)
    return body


def _tidied(part: Any) -> Any:
    """A part of a schema as a new value, without what is noise in an editor, and with what editors see otherwise."""
    if isinstance(part, list):
        return [_tidied(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {
        name: _tidied(value)
        for name, value in part.items()
        if not (name == "title" and isinstance(value, str)) and not (name == "default" and value is None)
    }
    if "patternProperties" in kept:
        kept["additionalProperties"] = False  # a key of another form is wrong, and not just unknown
    # To YAML 1.2, and so to editors, a number with underscores is a text.
    return {"anyOf": [kept, _GROUPED]} if kept.get("type") == "integer" else kept


def _reachable(part: Any) -> dict[str, Any]:
    """The definitions that a part of a schema needs, and those that they need."""
    _, definitions = _generated()
    found: dict[str, Any] = {}
    pending = list(_references(part))
    while pending:
        name = pending.pop()
        if name not in found and name in definitions and name not in SOURCE_OF_KIND:
            found[name] = definitions[name]
            pending += _references(definitions[name])
    return dict(sorted(found.items()))


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(ref := part.get("$ref"), str):
            yield ref.removeprefix(_REF)
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            yield from _references(item)
