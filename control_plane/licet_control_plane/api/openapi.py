"""What ``/v1/openapi.json`` says beyond what routes say by themselves: who may ask, and every error as a problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.params import Depends
from fastapi.routing import APIRoute

from licet_control_plane.api.problems import KINDS, MEDIA_TYPE

_ERRORS: Final = {
    400: "The request cannot be read",
    401: "No API key, or not one that is admitted",
    403: "The key may not do this",
    404: "There is no such thing",
    409: "It cannot be done as things are",
    412: "It was changed meanwhile, or is there already",
    413: "The body is too large",
    422: "A field or a document is wrong; each is listed",
    429: "Too many requests",
    500: "The server failed",
    503: "The database or Redis does not serve; try again",
}
assert _ERRORS.keys() <= KINDS.keys()

PROBLEM: Final[dict[str, Any]] = {
    "type": "object",
    "description": "An error as RFC 9457 has it. `type` is stable; `fix` says what to do.",
    "required": ["type", "title", "status", "detail", "fix"],
    "properties": {
        "type": {
            "type": "string",
            "description": "Stable, for programs: `docs/api.md` lists them",
            "pattern": "^urn:licet:problem:[a-z-]+$",
            "examples": ["urn:licet:problem:license-unknown"],
        },
        "title": {"type": "string", "description": "The name of the status"},
        "status": {"type": "integer", "description": "The HTTP status"},
        "detail": {"type": "string", "description": "What was wrong: a sentence for people"},
        "fix": {"type": "string", "description": "What to do: sentences for people"},
        "errors": {
            "type": "array",
            "description": "What is wrong with each document or field",
            "items": {
                "type": "object",
                "required": ["file", "line", "column", "path", "message", "fix"],
                "properties": {
                    "file": {"type": "string"},
                    "line": {"type": "integer"},
                    "column": {"type": "integer"},
                    "path": {"type": "string"},
                    "message": {"type": "string"},
                    "fix": {"type": "string"},
                },
            },
        },
    },
}


def operation_id(route: APIRoute) -> str:
    """The name of the function that answers: unique, as ``describe`` sees to."""
    return route.name


def described_router(prefix: str = "", *, tag: str, dependencies: Sequence[Depends] = ()) -> APIRouter:
    """A router whose routes the description groups under ``tag`` and names as they are named here."""
    return APIRouter(prefix=prefix, tags=[tag], dependencies=dependencies, generate_unique_id_function=operation_id)


def describe(app: FastAPI) -> None:
    """Complete the description of an application whose routes are all there."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's own documentation extends it


def _complete(found: dict[str, Any]) -> dict[str, Any]:
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)  # FastAPI's own, which is never answered
    schemas["Problem"] = PROBLEM
    components["securitySchemes"] = {
        "apiKey": {"type": "http", "scheme": "bearer", "description": "An API key, `licet_…`."}
    }
    components["responses"] = {
        f"Problem{status}": {
            "description": meaning,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, meaning in _ERRORS.items()
    }
    ids: set[str] = set()
    for path, item in found["paths"].items():
        for method, operation in item.items():
            assert operation["operationId"] not in ids, f"two operations are called {operation['operationId']}"
            ids.add(operation["operationId"])
            _only_models(operation["responses"])
            operation["responses"].pop("422", None)
            if not path.startswith("/v1/"):
                continue
            operation["security"] = [{"apiKey": []}]
            for status in _ERRORS:
                operation["responses"][str(status)] = {"$ref": f"#/components/responses/Problem{status}"}
            if method == "get":
                operation["responses"]["304"] = {"description": "It is what If-None-Match names"}
            if method == "post":
                operation.setdefault("parameters", []).append(_IDEMPOTENCY_KEY)
    return found


def _only_models(responses: dict[str, Any]) -> None:
    """Of what is not JSON, FastAPI says that it is a string, beside the model that describes it."""
    for answer in responses.values():
        for content in answer.get("content", {}).values():
            schema = content.get("schema", {})
            if "$ref" in schema:
                content["schema"] = {"$ref": schema["$ref"]}


_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same request with the same key is done once, and answered the same for a day.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!#-~]+$"},
}
