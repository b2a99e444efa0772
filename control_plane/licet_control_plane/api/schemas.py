"""``/v1/schemas``: JSON Schemas of documents, for editors, which send no key; there is nothing to hide in them."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from licet_control_plane.api.fields import said
from licet_control_plane.api.openapi import described_router
from licet_control_plane.api.problems import Problem
from licet_control_plane.core.documents.json_schema import KINDS, schema_of
from licet_control_plane.core.suggestion import did_you_mean

open_router = described_router("/v1/schemas", tag="schemas")


class SchemaPlace(BaseModel):
    """Where the schema of a kind is."""

    kind: str = said("Of documents, or Document for any of a bundle")
    url: str = said("Its path on this server")


class SchemaList(BaseModel):
    """The kinds of documents that have a schema."""

    items: list[SchemaPlace] = said("Document first")


class SchemaResponse(JSONResponse):
    """A JSON Schema."""

    media_type = "application/schema+json"


@open_router.get("", response_model=SchemaList)
async def list_schemas() -> dict[str, Any]:
    """The kinds of documents that have a schema; ``Document`` is any kind of a bundle."""
    return {"items": [{"kind": kind, "url": f"/v1/schemas/{kind}"} for kind in KINDS]}


@open_router.get("/{kind}", response_class=SchemaResponse, response_model=None)
async def get_schema(kind: str) -> SchemaResponse:
    """The JSON Schema (2020-12) of a kind."""
    if kind not in KINDS:
        raise Problem(404, f"There is no kind {kind!r}.", did_you_mean(kind, KINDS))
    return SchemaResponse(schema_of(kind))
