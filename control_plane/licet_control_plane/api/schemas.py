"""``/v1/schemas``: JSON Schemas of documents, for editors, which send no key; there is nothing to hide in them."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from licet_control_plane.api.openapi import described_router
from licet_control_plane.api.problems import Problem
from licet_control_plane.core.documents.json_schema import KINDS, schema_of
from licet_control_plane.core.suggestion import did_you_mean

open_router = described_router("/v1/schemas", tag="schemas")


@open_router.get("")
async def list_schemas() -> dict[str, Any]:
    """The kinds of documents that have a schema; ``Document`` is any kind of a bundle."""
    return {"items": [{"kind": kind, "url": f"/v1/schemas/{kind}"} for kind in KINDS]}


@open_router.get("/{kind}", response_class=JSONResponse)
async def get_schema(kind: str) -> JSONResponse:
    """The JSON Schema (2020-12) of a kind."""
    if kind not in KINDS:
        raise Problem(404, f"There is no kind {kind!r}.", did_you_mean(kind, KINDS))
    return JSONResponse(schema_of(kind), media_type="application/schema+json")
