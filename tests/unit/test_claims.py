"""What claims of a verified token make of its bearer."""

from __future__ import annotations

from typing import Any

import pytest

from licet_control_plane.core.access import Role
from licet_control_plane.core.claims import Bearer, ClaimRules, ClaimsRefused, bearer_of

ROLES = (("licet-admins", Role.ADMIN), ("licet-ops", Role.OPERATOR))
RULES = ClaimRules(ROLES)
OF_TENANTS = ClaimRules(ROLES, role_claim="realm.roles", tenant_claim="https://licet/tenant", name_claim="email")


@pytest.mark.parametrize(
    ("groups", "role"),
    [
        ("licet-ops", Role.OPERATOR),
        (["staff", "licet-ops"], Role.OPERATOR),
        (["licet-ops", "licet-admins"], Role.ADMIN),
    ],
)
def test_the_first_configured_group_that_is_held_gives_the_role(groups: Any, role: Role) -> None:
    assert bearer_of({"sub": "ada", "groups": groups}, RULES) == Bearer("oidc:ada", role, "")


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": "ada"},
        {"sub": "ada", "groups": []},
        {"sub": "ada", "groups": ["admin"]},
        {"sub": "ada", "groups": {"licet-admins": True}},
        {"sub": "ada", "groups": [["licet-admins"]]},
        {"groups": "licet-admins"},
        {"sub": "", "groups": "licet-admins"},
        {"sub": "a\nb", "groups": "licet-admins"},
        {"sub": "x" * 121, "groups": "licet-admins"},
        {"sub": 7, "groups": "licet-admins"},
    ],
)
def test_claims_that_give_no_role_or_no_name_are_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(ClaimsRefused):
        bearer_of(claims, RULES)


@pytest.mark.parametrize(("tenant", "reaches"), [("acme", "acme"), ("*", "")])
def test_paths_and_the_tenant_claim_are_followed(tenant: str, reaches: str) -> None:
    claims = {"email": "ada@x", "realm": {"roles": ["licet-ops"]}, "https://licet/tenant": tenant}
    assert bearer_of(claims, OF_TENANTS) == Bearer("oidc:ada@x", Role.OPERATOR, reaches)


@pytest.mark.parametrize("tenant", [None, "", ["acme"], "a b", 7])
def test_a_tenant_claim_that_is_asked_for_and_names_none_is_refused(tenant: Any) -> None:
    claims = {"email": "ada@x", "realm": {"roles": "licet-ops"}, "https://licet/tenant": tenant}
    with pytest.raises(ClaimsRefused, match="names no tenant"):
        bearer_of(claims, OF_TENANTS)
