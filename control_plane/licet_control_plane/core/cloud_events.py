"""Usage events as CloudEvents, and the signature of a request with them. Pure.

Source: CloudEvents 1.0.2, JSON format, batched mode; Standard Webhooks 1.0 for the signature.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterable
from typing import Any, Final

from licet.wire.usage import UsageEvent
from licet_control_plane.core.event_view import event_json

CONTENT_TYPE: Final = "application/cloudevents-batch+json; charset=utf-8"
TYPE_PREFIX: Final = "dev.licet.usage."
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - how a secret begins, not one
SECRET_BYTES_MIN: Final = 24
"""What Standard Webhooks asks for at least."""
_PERSONAL: Final = ("idempotency_key", "context", "about")


def cloud_event(
    deployment: str, log_id: str, decision_prefix: bytes, event: UsageEvent, *, personal: bool
) -> dict[str, Any]:
    """One event. Its ``id`` is the decision's, unique in its ``source``: whoever saw one before can pass it over.

    Without ``personal`` nothing of what the ledger keeps under a subject's key is in it.
    """
    data = event_json(log_id, decision_prefix, event)
    if not personal:
        for name in _PERSONAL:
            del data[name]
        data["subject"] = {"type": event.subject_type}
        data["resource"] = {"type": event.resource_type}
    return {
        "specversion": "1.0",
        "id": data["decision_id"],
        "source": f"urn:licet:{deployment}",
        "type": TYPE_PREFIX + data["kind"].lower(),
        "subject": event.tenant,
        "time": data["at"],
        "datacontenttype": "application/json",
        "data": data,
    }


def body_of(events: Iterable[dict[str, Any]]) -> bytes:
    """A request's body: a JSON array of CloudEvents."""
    return json.dumps(list(events), separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def secret_of(text: str) -> bytes:
    """The key of a secret as it is written: ``whsec_`` and base64, or any other text as it is.

    Raises:
        ValueError: not base64, or shorter than ``SECRET_BYTES_MIN`` bytes.
    """
    text = text.strip()
    if text.startswith(SECRET_PREFIX):
        try:
            key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
        except ValueError as error:
            raise ValueError(f"what follows {SECRET_PREFIX} is not base64") from error
    else:
        key = text.encode()
    if len(key) < SECRET_BYTES_MIN:
        raise ValueError(f"it has {len(key)} bytes; {SECRET_BYTES_MIN} are the least")
    return key


def signed_headers(secrets: Iterable[bytes], id_: str, at_s: int, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks, with a signature of each secret: a receiver takes one that has any it knows.
    ``id_`` is the same whenever the same content is sent again."""
    signed = f"{id_}.{at_s}.".encode() + body
    digests = (hmac.digest(secret, signed, hashlib.sha256) for secret in secrets)
    return {
        "content-type": CONTENT_TYPE,
        "webhook-id": id_,
        "webhook-timestamp": str(at_s),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }
