"""What the claims of a verified token make of its bearer. Pure.

A token gives no role by itself: the configuration says which values of which claim are which role. With a tenant claim
configured, a token without one is refused: nothing left out may mean everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from licet.domain.ids import TENANT_PATTERN
from licet_control_plane.core.access import Role

NAME_CHARS_MAX: Final = 120
ALL_TENANTS: Final = "*"
NAME_PREFIX: Final = "oidc:"
"""No API key has a colon in its name."""


class ClaimsRefused(Exception):
    """The token is good, and its bearer may nothing here. ``fix`` says what is to be configured."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class ClaimRules:
    """``roles``: values of ``role_claim`` and the role that each gives, the first that fits wins. Claims are named by
    their path, ``realm_access.roles``; ``tenant_claim`` empty: tokens reach every tenant."""

    roles: tuple[tuple[str, Role], ...]
    role_claim: str = "groups"
    tenant_claim: str = ""
    name_claim: str = "sub"


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whom a token belongs to."""

    name: str
    role: Role
    tenant: str


def bearer_of(claims: Mapping[str, Any], rules: ClaimRules) -> Bearer:
    """The bearer of a verified token.

    Raises:
        ClaimsRefused: the claims give no role, no name, or no tenant where one is asked for.
    """
    name = _at(claims, rules.name_claim)
    if not isinstance(name, str) or not name or not name.isprintable() or len(name) > NAME_CHARS_MAX:
        raise ClaimsRefused(
            f"The token's claim {rules.name_claim!r} names nobody.",
            f"It must be text of at most {NAME_CHARS_MAX} characters: look at --oidc-name-claim.",
        )
    held = _at(claims, rules.role_claim)
    values = (
        {held} if isinstance(held, str) else {one for one in held if isinstance(one, str)} if _is_list(held) else set()
    )
    role = next((role for value, role in rules.roles if value in values), None)
    if role is None:
        raise ClaimsRefused(
            f"The token's claim {rules.role_claim!r} gives no role.",
            "Put its bearer into a group that --oidc-roles of the server names.",
        )
    return Bearer(NAME_PREFIX + name, role, _tenant(claims, rules))


def _tenant(claims: Mapping[str, Any], rules: ClaimRules) -> str:
    if not rules.tenant_claim:
        return ""
    tenant = _at(claims, rules.tenant_claim)
    if tenant == ALL_TENANTS:
        return ""
    if not isinstance(tenant, str) or not TENANT_PATTERN.fullmatch(tenant):
        raise ClaimsRefused(
            f"The token's claim {rules.tenant_claim!r} names no tenant.",
            f"Let the issuer put the tenant's name there, or {ALL_TENANTS!r} for whoever reaches all.",
        )
    return tenant


def _at(claims: Mapping[str, Any], path: str) -> Any:
    """The value of a claim: under its whole name, or else by its path."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
