"""Fields that many answers have, each described once, with its unit and range; and how a field is described.

Ranges are said, not checked: a number that cannot be is to be seen as it is, and not to become a 500.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Response
from pydantic import Field
from pydantic_core import to_json

from licet.domain.ids import TENANT_PATTERN


def said(text: str, **schema: Any) -> Any:
    """A field with its description; ``schema`` are further words of its JSON Schema, such as ``minimum``."""
    return Field(description=text, json_schema_extra=schema or None)


def sometimes(text: str, **schema: Any) -> Any:
    """A field that some answers have and others leave out: of routes with ``response_model_exclude_unset``."""

    def complete(made: dict[str, Any]) -> None:
        made.pop("default", None)  # it is left out, never answered
        made.update(schema)

    return Field(None, description=text, json_schema_extra=complete)


def unchecked(answer: dict[str, Any]) -> Response:
    """An answer that goes out as it is, for routes with long ones: its model only describes it.

    Checking a page of 5,000 events against its model would hold the event loop for 0.2 s; writing it takes 10 ms.
    """
    return Response(to_json(answer), media_type="application/json")


_SHA256: Final = "^[0-9a-f]{64}$"

Instant = Annotated[str, said("An instant, RFC 3339 in UTC, with microseconds when there are any", format="date-time")]
InstantUs = Annotated[int, said("An instant in microseconds since 1970-01-01T00:00:00Z", minimum=0)]
Revision = Annotated[int, said("A revision: they are numbered from 1, and only grow", minimum=0)]
Generation = Annotated[int, said("A generation: a database that was restored begins another", minimum=0)]
Count = Annotated[int, said("How many", minimum=0)]
Seq = Annotated[int, said("The number of an event in its log, from 1", minimum=0)]
Units = Annotated[int, said("Units of the feature", minimum=0)]
Tenant = Annotated[str, said("The tenant", pattern=f"^{TENANT_PATTERN.pattern}$")]
SidecarId = Annotated[str, said("The id of a sidecar, 32 hex digits")]
LogId = Annotated[str, said("A log: the sidecar and its incarnation")]
Sha256 = Annotated[str, said("SHA-256, in hex", pattern=_SHA256)]
Base64 = Annotated[str, said("Bytes in base64", contentEncoding="base64")]
MonthName = Annotated[str, said("A calendar month (UTC), such as 2026-10", pattern="^[0-9]{4}-[0-9]{2}$")]
MoneyText = Annotated[str, said("An exact decimal amount; text, as a number in JSON may be read as a float")]
Currency = Annotated[str, said("ISO 4217, such as USD")]
By = Annotated[str, said("Who: the name of an API key, or a subject of the issuer")]
