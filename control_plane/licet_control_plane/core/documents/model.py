"""What the models of all documents share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Source(BaseModel):
    """Unknown fields are errors, and nothing changes after it was read.

    Defaults are validated too: that is how a validator sees that a field was left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def one_of(*names: str) -> ConfigDict:
    """Tells schemas for editors that exactly one of the fields is written; validators see to it themselves."""
    return ConfigDict(json_schema_extra={"oneOf": [{"required": [name]} for name in names]})
