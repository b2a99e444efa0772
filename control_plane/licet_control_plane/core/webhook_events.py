"""What webhooks tell: types of events, what is in them, and where they may be sent. Pure.

Source: CloudEvents 1.0.2, structured JSON; Standard Webhooks 1.0 for the signature (``core/cloud_events.py``).
"""

from __future__ import annotations

import base64
import hmac
import json
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from licet.domain.catalog import License, LicenseStatus
from licet.domain.windows import Period
from licet_control_plane.core.cloud_events import SECRET_PREFIX
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.core.subject_keys import LedgerKey

CREATED: Final = "license.created"
CHANGED: Final = "license.changed"
SUSPENDED: Final = "license.suspended"
RESUMED: Final = "license.resumed"
RENEWED: Final = "license.renewed"
CANCELED: Final = "license.canceled"
EXPIRING: Final = "license.expiring"
EXPIRED: Final = "license.expired"
THRESHOLD: Final = "quota.threshold"
TEST: Final = "webhook.test"
"""Only when somebody asks for it."""
TYPES: Final = (CREATED, CHANGED, SUSPENDED, RESUMED, RENEWED, CANCELED, EXPIRING, EXPIRED, THRESHOLD)

CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"
TYPE_PREFIX: Final = "dev.licet."
THRESHOLDS: Final = (80, 100)
PERCENT_MAX: Final = 1_000
"""Ten times a soft limit."""
WINDOWS: Final = (Period.MINUTE, Period.HOUR, Period.DAY, Period.WEEK, Period.MONTH, Period.YEAR)
"""What the shortest window can be whose thresholds a webhook is told; a term is as long as any."""
SHORTEST_WINDOW: Final = Period.HOUR
"""Of a minute that is over when its message comes nobody wants to know, least of all for each subject."""
URL_CHARACTERS_MAX: Final = 2_000
BACKOFF_S: Final = (5, 60, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Between attempts: at once, and over some three days. Then it is given up, and can be delivered again by hand."""
_NAT64: Final = IPv6Network("64:ff9b::/96")
_OF_CLOUDS: Final = frozenset(
    ip_address(one) for one in ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
)
"""Where machines of AWS (IPv6), Alibaba, Azure and Oracle get their credentials or settings; not link-local, as the
usual 169.254.169.254 is, and that of Azure not even private."""


def change_type(old: License | None, new: License, action: str) -> str:
    """The type of event for a change of a license. ``action``: as the audit trail has it."""
    if old is None:
        return CREATED
    if new.status is not old.status:
        if new.status is LicenseStatus.SUSPENDED:
            return SUSPENDED
        return CANCELED if new.status is LicenseStatus.CANCELED else RESUMED
    return RENEWED if action == "license.renew" else CHANGED


def license_data(license_: License, *, revision: int) -> dict[str, Any]:
    """A license in an event, as it is after it."""
    planned = license_.planned
    return {
        "tenant": license_.tenant,
        "plan": license_.plan,
        "status": license_.status.value,
        "starts_at": _instant(license_.starts_s),
        "ends_at": _instant(license_.ends_s),
        "answers_until": _instant(license_.stops_s),
        "auto_renew": license_.renews_itself,
        "cancels": license_.cancels,
        "planned": {"plan": planned.plan, "at": _instant(planned.at_s)} if planned else None,
        "addons": dict(license_.addons),
        "revision": revision,
    }


def body_of(deployment: str, id_: str, type_: str, tenant: str, at_us: int, data: dict[str, Any]) -> bytes:
    """The body of a request: one CloudEvent. ``id_`` is the same whenever it is sent again."""
    event = {
        "specversion": "1.0",
        "id": id_,
        "source": f"urn:licet:{deployment}",
        "type": TYPE_PREFIX + type_,
        "subject": tenant,
        "time": datetime.fromtimestamp(at_us / 1_000_000, UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": data,
    }
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()


def secret_of_webhook(key: LedgerKey, webhook: str, nonce: str) -> bytes:
    """What signs the requests to a webhook: 32 bytes that follow from the ledger's key, so no database has them. With
    another ``nonce`` it is another secret, and without the nonce nobody can work it out again."""
    named = f"{webhook} {nonce}" if nonce else webhook
    return hmac.digest(key.secret, b"licet ledger key v1: webhook " + named.encode(), "sha256")


def written_secret(secret: bytes) -> str:
    """A secret as Standard Webhooks writes it."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def may_connect(address: str, *, private: bool) -> bool:
    """Whether a webhook may be sent to this IP address. ``private``: also within one's own network."""
    found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = IPv4Address(int(found) & 0xFFFF_FFFF)
        found = inner or found
    if found.is_multicast or found.is_unspecified or found.is_link_local or found in _OF_CLOUDS:
        return False  # also where clouds keep their credentials
    return private or found.is_global


def checked_url(url: str, *, private: bool) -> str:
    """The address of a webhook.

    Raises:
        ChangeInvalid: it is none, or one that nothing may be sent to.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise ChangeInvalid("url", f"{url!r} is no URL", "Give one such as https://example.com/hooks.") from error
    if not host or parts.scheme not in ("https", "http") or not url.isascii() or len(url) > URL_CHARACTERS_MAX:
        raise ChangeInvalid("url", f"{url[:100]!r} is no URL", "Give one such as https://example.com/hooks.")
    if not url.isprintable() or " " in url or parts.username is not None or parts.fragment:
        raise ChangeInvalid(
            "url", "it has a user, a fragment or blanks", "Leave them out: requests are signed, see the secret."
        )
    try:
        host.encode("idna")  # as looking it up does
    except UnicodeError as error:
        fix = "Separate its labels, of 1 to 63 characters, by single dots."
        raise ChangeInvalid("url", f"{host[:100]!r} is no name of a machine", fix) from error
    is_loopback = host == "localhost"
    try:
        address = ip_address(host)
    except ValueError:
        allowed = private or not is_loopback
    else:
        is_loopback = address.is_loopback
        allowed = may_connect(host, private=private)
    if not allowed:
        raise ChangeInvalid(
            "url",
            f"{host} is within a private network",
            "Give a public address, or allow private ones: licet server --webhooks-private.",
        )
    if parts.scheme == "http" and not is_loopback:
        raise ChangeInvalid("url", "http is readable on the way", "Use https; http only on this machine.")
    return url


def retry_at_us(attempts: int, now_us: int, jitter: float) -> int | None:
    """When to try again after ``attempts`` in vain, microseconds; ``None`` for never. ``jitter``: 0 to 1."""
    if attempts > len(BACKOFF_S):
        return None
    return now_us + int(BACKOFF_S[attempts - 1] * (0.9 + 0.2 * jitter) * 1_000_000)


def crossed(units: int, amount: int, percents: frozenset[int]) -> list[int]:
    """Which percentages of an amount were reached. Of nothing, nothing is."""
    return sorted(percent for percent in percents if amount > 0 and units * 100 >= amount * percent)


def is_told(per: Period, shortest: Period) -> bool:
    """Whether a webhook is told of windows of ``per`` that is told of ``shortest`` and longer ones."""
    lengths = list(Period)
    return lengths.index(per) >= lengths.index(shortest)


def instant_of(at_s: int) -> str:
    """Seconds since the Unix epoch as RFC 3339."""
    return datetime.fromtimestamp(at_s, UTC).isoformat().replace("+00:00", "Z")


def _instant(at_s: int) -> str | None:
    return instant_of(at_s) if at_s else None
