"""JSON Lines: answers too long, or too long in the making, for one piece of JSON."""

from __future__ import annotations

from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel


class JsonLines(StreamingResponse):
    """An answer of lines, each ended by a newline."""

    media_type = "application/jsonl"


def lines_of(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a route's description says of its lines: each is one ``model``, which only describes it."""
    return {200: {"model": model, "description": "JSON Lines; the schema is that of one line"}}
