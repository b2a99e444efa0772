"""A check as the core sees it: the request after its form was verified, before anything was decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from licet.domain.catalog import Action, AttributeType, AttributeValue
from licet.domain.ids import NAME_CHARS_MAX, UNITS_MAX

_NONE: Final[Mapping[str, Any]] = {}

TIMESTAMP_US_MIN: Final = -62_135_596_800_000_000
TIMESTAMP_US_MAX: Final = 253_402_300_799_999_999
"""Years 1 to 9999, the range of ``google.protobuf.Timestamp`` and of what conditions can compare."""


class TimestampUs(int):
    """A timestamp as it was sent: microseconds since the Unix epoch, and not to be taken for a number."""


class InvalidInquiry(ValueError):
    """The request is malformed. ``field`` names the offending field as the caller wrote it; never a denial."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Inquiry:
    """One check. ``quantity`` is ``None`` when absent; ``quantities`` maps meters to units, empty when absent."""

    __slots__ = (
        "access_only",
        "action",
        "context",
        "declared",
        "idempotency_key",
        "on_behalf_of",
        "peek",
        "prepared_for",
        "quantities",
        "quantity",
        "resource_attributes",
        "resource_id",
        "resource_type",
        "roles",
        "subject_attributes",
        "subject_id",
        "subject_type",
        "tenant",
        "units",
    )

    def __init__(self, tenant: str, action: str) -> None:
        self.tenant = tenant
        self.action = action
        self.quantity: int | None = None
        self.quantities: Mapping[str, int] = _NONE
        self.subject_type = ""
        self.subject_id = ""
        self.on_behalf_of = ""
        self.roles: Sequence[str] = ()
        self.subject_attributes: Mapping[str, Any] = _NONE
        self.resource_type = ""
        self.resource_id = ""
        self.resource_attributes: Mapping[str, Any] = _NONE
        self.context: Mapping[str, AttributeValue] = _NONE
        self.idempotency_key = ""
        self.peek = False
        self.access_only = False
        """Decide up to the quotas, and leave those alone."""
        self.prepared_for: object = None
        """The action under which ``units`` (by feature) and ``declared`` (attributes) were read."""
        self.units: Mapping[str, int] = _NONE
        self.declared: Mapping[str, AttributeValue] = _NONE


_ACCEPTED: Final[Mapping[AttributeType, tuple[type, ...]]] = {
    AttributeType.STRING: (str,),
    AttributeType.INT: (int,),
    AttributeType.DOUBLE: (float, int),
    AttributeType.BOOL: (bool,),
    AttributeType.LIST: (list,),
    AttributeType.TIMESTAMP: (TimestampUs,),
}

_RANGES: Final[Mapping[AttributeType, tuple[int, int, str]]] = {
    AttributeType.INT: (-(2**63), 2**63 - 1, "an integer of 64 bits"),
    AttributeType.TIMESTAMP: (TIMESTAMP_US_MIN, TIMESTAMP_US_MAX, "a time between the years 1 and 9999"),
}


def meter_units(action: Action, only_meter: str | None, inquiry: Inquiry) -> dict[str, int]:
    """Units asked of each meter of the action.

    Raises:
        InvalidInquiry: a quantity for an action of several meters, both fields at once, or an unknown meter.
    """
    quantities = inquiry.quantities
    if not quantities:
        if only_meter is None:
            raise InvalidInquiry(
                "quantities" if inquiry.quantity is None else "quantity",
                f"action {action.name} has the meters {', '.join(sorted(action.meters))}:"
                " say how many units of each in `quantities`",
            )
        return {only_meter: 1 if inquiry.quantity is None else inquiry.quantity}
    if inquiry.quantity is not None:
        raise InvalidInquiry("quantity", "give either `quantity` or `quantities`, not both")
    for meter in quantities:
        if meter not in action.meters:
            known = ", ".join(sorted(name for name in action.meters if name)) or "only one: use `quantity`"
            raise InvalidInquiry(
                f"quantities[{meter[:NAME_CHARS_MAX]!r}]", f"action {action.name} has no such meter; it has {known}"
            )
    return dict(quantities)


def declared_context(action: Action, inquiry: Inquiry) -> dict[str, AttributeValue]:
    """The attributes that the action declares, defaults filled in; others are not looked at and not recorded.

    Raises:
        InvalidInquiry: an attribute of the wrong type, or out of its range.
    """
    given = inquiry.context
    values: dict[str, AttributeValue] = {}
    for name, spec in action.attributes.items():
        value = given.get(name)
        if value is None:
            if spec.default is not None:
                values[name] = spec.default
            continue
        accepted = _ACCEPTED[spec.type]
        if type(value) not in accepted:
            raise InvalidInquiry(f"context.{name}", f"{spec.type.value} is declared, {_type_name(value)} was sent")
        if isinstance(value, int) and spec.type in _RANGES:
            least, most, range_ = _RANGES[spec.type]
            if not least <= value <= most:
                raise InvalidInquiry(f"context.{name}", f"is not {range_}")
        values[name] = float(value) if spec.type is AttributeType.DOUBLE else value  # type: ignore[arg-type]  # checked above
    return values


def check_units(field: str, units: int) -> int:
    """``units`` when it can be counted.

    Raises:
        InvalidInquiry: negative, or 2^53 and more.
    """
    if 0 <= units <= UNITS_MAX:
        return units
    raise InvalidInquiry(field, f"{units} is not between 0 and {UNITS_MAX} (2^53 - 1)")


def _type_name(value: object) -> str:
    names: Mapping[type, str] = {
        str: "string",
        int: "int",
        float: "double",
        bool: "bool",
        list: "list",
        TimestampUs: "timestamp",
    }
    return names.get(type(value), type(value).__name__)
