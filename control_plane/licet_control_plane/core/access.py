"""Who may do what: roles, what a request needs, and the text of an API key. Pure.

A role is a set of needs, and nothing else decides: the table ``api/access.py`` says what each route needs. A caller
may be confined to one tenant on top of its role; see ``api/auth.py``.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from enum import Enum
from typing import Final


class Role(Enum):
    """What an API key, or a token's claims, make of a caller. The first four are people's and programs'."""

    ADMIN = "admin"
    OPERATOR = "operator"
    APPROVER = "approver"
    AUDITOR = "auditor"
    SIDECAR = "sidecar"


class Need(Enum):
    """What a request needs of its caller.

    ``READ``: what is in force, and how the deployment is. ``READ_RECORDS``: what was recorded of tenants and people,
    the audit trail included. ``CHANGE``: rules, licenses, quotas. ``APPROVE``: decide about access requests.
    ``MANAGE``: keys, and what cannot be undone. ``HAND_IN``: the second route of sidecars.
    """

    READ = "read"
    READ_RECORDS = "read records"
    CHANGE = "change"
    APPROVE = "approve"
    MANAGE = "manage"
    HAND_IN = "hand in"


MAY: Final[dict[Role, frozenset[Need]]] = {
    Role.ADMIN: frozenset(Need),
    Role.OPERATOR: frozenset({Need.READ, Need.READ_RECORDS, Need.CHANGE}),
    Role.APPROVER: frozenset({Need.READ, Need.APPROVE}),
    Role.AUDITOR: frozenset({Need.READ, Need.READ_RECORDS}),
    Role.SIDECAR: frozenset({Need.HAND_IN}),
}
"""Who grants is not who approves: an operator decides about no access request, and an approver changes no rule."""

ROLES_OF_PEOPLE: Final = tuple(role for role in Role if role is not Role.SIDECAR)

KEY_PREFIX: Final = "licet_"
KEY_ID_BYTES: Final = 6
SECRET_BYTES: Final = 32
_SECRET_CHARS: Final = 43
_CHECK_CHARS: Final = 6
_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KEY_PATTERN: Final = re.compile(r"licet_(?P<id>[0-9a-f]{12})_(?P<secret>[0-9A-Za-z]{43})(?P<check>[0-9A-Za-z]{6})")
"""For secret scanners: nothing else looks like it, and its last six characters are a checksum."""


def allowed(role: Role, need: Need) -> bool:
    """Whether a role has what a request needs."""
    return need in MAY[role]


def roles_with(need: Need) -> list[str]:
    """Names of the roles that have it, for messages."""
    return [role.value for role in Role if need in MAY[role]]


def key_text(id_: bytes, secret: bytes) -> str:
    """An API key: ``licet_<id>_<secret><checksum>``, from ``KEY_ID_BYTES`` and ``SECRET_BYTES`` random bytes."""
    body = f"{KEY_PREFIX}{id_.hex()}_{_base62(int.from_bytes(secret, 'big'), _SECRET_CHARS)}"
    return body + _check(body)


def key_id_of(text: str) -> str | None:
    """The id that stands in an API key; ``None`` of what has another form."""
    match = KEY_PATTERN.fullmatch(text)
    return match["id"] if match else None


def is_mistyped(text: str) -> bool:
    """Whether it looks like an API key and never was one: its checksum says so, and it need not be looked up."""
    match = KEY_PATTERN.fullmatch(text)
    return match is not None and _check(text[:-_CHECK_CHARS]) != match["check"]


def hash_of(key: str) -> str:
    """SHA-256, hex. A key is 256 random bits, so nothing slower is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def _check(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECK_CHARS)


def _base62(number: int, width: int) -> str:
    digits = ""
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits = _ALPHABET[digit] + digits
    return digits
