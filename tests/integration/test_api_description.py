"""The REST API against its own description: what schemathesis makes of it is answered as it says, and never by a 500.

``LICET_API_EXAMPLES=200`` looks deeper.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from licet_control_plane.api import problems
from tests.support.api_server import ApiServer, api_server
from tests.support.valkey import ValkeyProcess

EXAMPLES: Final = int(os.environ.get("LICET_API_EXAMPLES", "2"))
CHECKS: Final = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
BUNDLE: Final = """\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Plan
name: pro
features: {reports: {limits: [{amount: 100, per: month}, {amount: 5, per: second}]}}
"""
KNOWN: Final = {"tenant": "acme", "plan": "pro", "revision": 1, "month": "2026-10"}
"""Path parameters that name something that is there."""


@pytest.fixture
def served(tmp_path: Path, valkey_process: ValkeyProcess) -> Iterator[ApiServer]:
    with api_server(tmp_path / "state", valkey_process.url, api_rate=0.0) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        with httpx.Client(base_url=server.url, headers=headers, trust_env=False) as client:
            pushed = client.post("/v1/bundles", json={"documents": [{"path": "a.yaml", "content": BUNDLE}]})
            assert pushed.status_code == 201, pushed.text
            assert client.post("/v1/licenses", json={"tenant": "acme", "plan": "pro"}).status_code == 201
        yield server


DOCUMENTS: Final = {("GET", "/v1/schemas/{kind}")}
"""What answers a document of another language, here JSON Schema."""
JSON: Final = ("application/json", "application/jsonl", "application/schema+json")


def _described(served: ApiServer) -> Any:
    return schemathesis.openapi.from_url(
        f"{served.url}/v1/openapi.json", headers={"Authorization": f"Bearer {served.key}"}
    )


def test_every_operation_has_its_own_id_tags_and_a_schema_of_what_it_takes_and_answers(served: ApiServer) -> None:
    description = _described(served).raw_schema
    assert description["openapi"].startswith("3.1")
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, item in description["paths"].items()
        for method, operation in item.items()
    ]
    ids = [operation["operationId"] for _, operation in operations]
    assert len(ids) == len(set(ids))
    for name, operation in operations:
        assert operation["tags"], name
        assert operation["summary"], name
        assert any(status.startswith("2") for status in operation["responses"]), name
        if "/v1/" in name:
            assert operation["security"] == [{"apiKey": []}], name
            assert {"401", "404", "422", "429", "500"} <= operation["responses"].keys(), name
    assert not [name for name in json.dumps(description).split() if "HTTPValidationError" in name]


def test_every_answer_has_a_model_and_every_field_of_it_says_what_it_is(served: ApiServer) -> None:
    description = _described(served).raw_schema
    schemas = description["components"]["schemas"]
    answered: set[str] = set()
    for path, item in description["paths"].items():
        for method, operation in item.items():
            for status, answer in operation["responses"].items():
                for media_type, content in answer.get("content", {}).items():
                    if not status.startswith("2") or media_type not in JSON or (method.upper(), path) in DOCUMENTS:
                        continue
                    assert list(content["schema"]) == ["$ref"], f"{method.upper()} {path} {status} has no model"
                    answered |= _models(content["schema"], schemas)
    lacking = [
        f"{name}.{field}"
        for name in sorted(answered)
        for field, schema in schemas[name].get("properties", {}).items()
        if not _says_what_it_is(schema, schemas)
    ]
    assert not lacking, lacking
    assert all(schemas[name].get("description") for name in answered)


def test_the_documentation_has_every_type_of_problem() -> None:
    source = Path(problems.__file__).parent
    kinds = {kind for path in source.glob("*.py") for kind in re.findall(r'kind="([a-z-]+)"', path.read_text())}
    kinds |= {*problems.KINDS.values()} | set(
        re.findall(r'"(access-request-[a-z]+)"', Path(problems.__file__).read_text())
    )
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert [kind for kind in sorted(kinds) if f"`{kind}`" not in text] == []


def _models(schema: Any, schemas: Any, found: frozenset[str] = frozenset()) -> set[str]:
    """Names of the models that a schema is made of."""
    names: set[str] = set()
    if isinstance(schema, dict):
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in found:
                names |= {name} | _models(schemas[name], schemas, found | {name})
        for one in schema.values():
            names |= _models(one, schemas, found)
    elif isinstance(schema, list):
        for one in schema:
            names |= _models(one, schemas, found)
    return names


def _says_what_it_is(schema: Any, schemas: Any) -> bool:
    """Whether a field has a description: its own, or that of its only model, or of what it is when it is not null."""
    if "description" in schema:
        return True
    if "$ref" in schema:
        return "description" in schemas[schema["$ref"].rpartition("/")[2]]
    options = [one for one in schema.get("anyOf", []) if one != {"type": "null"}]
    return bool(options) and all(_says_what_it_is(one, schemas) for one in options)


def test_whatever_the_description_allows_is_answered_as_it_says(served: ApiServer) -> None:
    description = _described(served)
    failures: list[str] = []
    for found in description.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            derandomize=EXAMPLES <= 2,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(), known=st.booleans())
        def answered(case: Case, known: bool) -> None:
            if known:
                case.path_parameters.update({name: KNOWN[name] for name in case.path_parameters if name in KNOWN})
            case.call_and_validate(checks=CHECKS)

        try:
            answered()
        except BaseExceptionGroup as group:
            failures += [f"{operation.label}: {error}" for error in group.exceptions]
    assert not failures, "\n\n".join(failures)
