"""From ``CheckRequest`` messages to inquiries. Verifies form and sizes; names the field that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from licet.domain.catalog import AttributeValue
from licet.domain.ids import NAME_CHARS_MAX, TENANT_PATTERN, UNITS_MAX
from licet.v1 import approval_pb2 as pb
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry, TimestampUs, check_units

TEXT_BYTES_MAX: Final = 1_024
"""Ids of subjects and resources, and strings in attributes: enough for any URL, too little to hide a document."""
CONTEXT_BYTES_MAX: Final = 16_384
"""All attributes of a request together: they are logged with every decision."""
ENTRIES_MAX: Final = 64
IDEMPOTENCY_KEY_CHARS_MAX: Final = 128

_tenant_fits = TENANT_PATTERN.fullmatch
_known_tenants: set[str] = set()
_KNOWN_TENANTS_MAX: Final = 10_000


def parse_check(request: pb.CheckRequest) -> Inquiry:
    """The inquiry a request makes.

    Raises:
        InvalidInquiry: a required field is missing, or one is malformed or too large.
    """
    tenant, action = request.tenant, request.action
    verify_tenant(tenant)
    if not action:
        raise InvalidInquiry("action", "is empty; say what is asked, such as report.export")
    if len(action) > NAME_CHARS_MAX:
        raise InvalidInquiry("action", f"has {len(action)} characters; at most {NAME_CHARS_MAX} are accepted")
    inquiry = Inquiry(tenant, action)
    if request.HasField("quantity"):
        inquiry.quantity = check_units("quantity", request.quantity)
    if request.quantities:
        quantities = request.quantities
        inquiry.quantities = parsed = {meter: quantities[meter] for meter in quantities}
        for meter, units in parsed.items():
            if not 0 <= units <= UNITS_MAX:
                check_units(f"quantities[{meter!r}]", units)
        if len(inquiry.quantities) > ENTRIES_MAX:
            raise InvalidInquiry("quantities", f"has more than {ENTRIES_MAX} entries")
    if request.HasField("subject"):
        _parse_subject(inquiry, request.subject)
    if request.HasField("resource"):
        resource = request.resource
        inquiry.resource_type = _text("resource.type", resource.type)
        inquiry.resource_id = _text("resource.id", resource.id)
        if resource.attributes:
            inquiry.resource_attributes = _values("resource.attributes", resource.attributes)
    if request.context:
        inquiry.context = _values("context", request.context)
    key = request.idempotency_key
    if key:
        if len(key) > IDEMPOTENCY_KEY_CHARS_MAX:
            raise InvalidInquiry(
                "idempotency_key", f"has {len(key)} characters; at most {IDEMPOTENCY_KEY_CHARS_MAX} are accepted"
            )
        inquiry.idempotency_key = key
    mode = request.mode
    if mode == pb.MODE_PEEK:
        inquiry.peek = True
    elif mode > pb.MODE_PEEK or mode < 0:
        raise InvalidInquiry("mode", f"{mode} is not one of CONSUME and PEEK")
    return inquiry


def verify_tenant(tenant: str) -> None:
    """Refuses what cannot be a tenant's name.

    Raises:
        InvalidInquiry: it is not one.
    """
    if tenant in _known_tenants:
        return
    if not tenant:
        raise InvalidInquiry("tenant", "is empty; name the customer account that is asked for")
    if _tenant_fits(tenant) is None:
        raise InvalidInquiry(
            "tenant",
            f"{tenant[:140]!r} is not 1 to 128 letters, digits, dots, dashes and underscores,"
            " starting with a letter or digit",
        )
    if len(_known_tenants) >= _KNOWN_TENANTS_MAX:
        _known_tenants.clear()
    _known_tenants.add(tenant)


def _parse_subject(inquiry: Inquiry, subject: pb.Subject) -> None:
    inquiry.subject_type = _text("subject.type", subject.type)
    inquiry.subject_id = _text("subject.id", subject.id)
    if subject.on_behalf_of:
        inquiry.on_behalf_of = _text("subject.on_behalf_of", subject.on_behalf_of)
    if subject.roles:
        if len(subject.roles) > ENTRIES_MAX:
            raise InvalidInquiry("subject.roles", f"has more than {ENTRIES_MAX} entries")
        inquiry.roles = tuple(subject.roles)
    if subject.attributes:
        inquiry.subject_attributes = _values("subject.attributes", subject.attributes)


def _text(field: str, text: str) -> str:
    if len(text) > TEXT_BYTES_MAX:
        raise InvalidInquiry(field, f"has {len(text):,} characters; at most {TEXT_BYTES_MAX:,} are accepted")
    return text


def _values(field: str, values: Mapping[str, pb.Value]) -> dict[str, AttributeValue]:
    if len(values) > ENTRIES_MAX:
        raise InvalidInquiry(field, f"has {len(values)} entries; at most {ENTRIES_MAX} are accepted")
    parsed: dict[str, AttributeValue] = {}
    room = CONTEXT_BYTES_MAX
    for name in values:  # not .items(): the map's is several times slower
        value = values[name]
        plain: Any = value.string_value
        if plain:  # by far the most frequent: spare it the look at which kind it is
            room -= len(plain)
            parsed[name] = plain
            room -= len(name)
            if room >= 0:
                continue
        kind = value.WhichOneof("kind")
        if kind == "string_value":
            pass
        elif kind == "int_value":
            plain = value.int_value
        elif kind == "double_value":
            plain = value.double_value
        elif kind == "bool_value":
            plain = value.bool_value
        elif kind == "list_value":
            plain = list(value.list_value.values)
            room -= sum(map(len, plain))
        elif kind == "timestamp_value":
            sent = value.timestamp_value
            plain = TimestampUs(sent.seconds * 1_000_000 + sent.nanos // 1_000)
        else:
            raise InvalidInquiry(f"{field}.{name[:140]}", "has no value")
        room -= len(name)
        if room < 0:
            raise InvalidInquiry(
                f"{field}.{name[:140]}",
                f"the attributes together are larger than the {CONTEXT_BYTES_MAX:,} characters that are accepted",
            )
        parsed[name] = plain
    return parsed
