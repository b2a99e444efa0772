"""``/v1/api-keys``: made, shown once, listed, revoked."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Final, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from licet.domain.ids import TENANT_PATTERN
from licet_control_plane.api.auth import CallerAsked, plane_of, storable, v1_router
from licet_control_plane.api.fields import Instant, said
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us, parse_us
from licet_control_plane.core.access import KEY_ID_BYTES, SECRET_BYTES, Role, key_text
from licet_control_plane.store import access
from licet_control_plane.store.access import ApiKey, KeyNameTaken, KeyUnknown

router = v1_router("/api-keys", tag="api-keys")

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
"""No colon: names of tokens' subjects have one, so that the two never meet in the audit trail."""


class NewKey(BaseModel):
    """``tenant``: the only one the key reaches. ``expires_at``: from when on it opens nothing."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    role: Role
    tenant: str = ""
    expires_at: str | None = None


class KeyView(BaseModel):
    """An API key, without its text."""

    id: str = said("A part of the key, which is no secret")
    name: str = said("What the audit trail calls its holder")
    role: Role = said("What it may do")
    tenant: str | None = said("The only one it reaches; null for all")
    state: Literal["active", "expired", "revoked"] = said("Only an active one opens anything")
    created_at: Instant
    created_by: str | None = said("Who made it; null for the first start")
    expires_at: Instant | None = said("From when on it opens nothing; null for never")
    revoked_at: Instant | None = said("When it was revoked; null for never")
    last_used_at: Instant | None = said("To within a minute; null for never")


class CreatedKey(KeyView):
    """With its text, which is not shown again."""

    key: str = said("What goes into Authorization: Bearer")


class KeyList(BaseModel):
    """Every key there ever was."""

    items: list[KeyView] = said("By id")


@router.post("", status_code=201, response_model=CreatedKey)
async def create_key(request: Request, body: NewKey, caller: CallerAsked) -> dict[str, Any]:
    """Make a key. ``key`` is in this answer and in no other: only its hash is kept."""
    plane = plane_of(request)
    now_us = plane.now_us()
    if body.tenant and not TENANT_PATTERN.fullmatch(body.tenant):
        raise Problem(422, f"tenant: {body.tenant!r} cannot name a tenant.", "Look at the spelling.")
    if body.tenant and body.role is Role.SIDECAR:
        raise Problem(422, "tenant: a sidecar serves every tenant.", "Leave the tenant out.")
    expires_at_us = parse_us(body.expires_at, "expires_at") if body.expires_at is not None else None
    if expires_at_us is not None and expires_at_us <= now_us:
        raise Problem(422, f"expires_at: {body.expires_at} is over.", "Give a later time, or none.")
    key = key_text(secrets.token_bytes(KEY_ID_BYTES), secrets.token_bytes(SECRET_BYTES))
    try:
        made = await plane.database.write(
            access.create_key,
            name=body.name,
            role=body.role.value,
            key=key,
            tenant=body.tenant,
            expires_at_us=expires_at_us,
            by=caller.name,
            now_us=now_us,
        )
    except KeyNameTaken as error:
        raise Problem(409, f"There is, or was, a key {str(error)!r}.", "Give this one another name.") from error
    return {**_described(made, now_us), "key": key}


@router.get("", response_model=KeyList)
async def list_keys(request: Request) -> dict[str, Any]:
    """Every key there ever was, without its text: revoked and expired ones stay, as the audit trail names them."""
    plane = plane_of(request)
    now_us = plane.now_us()
    return {"items": [_described(key, now_us) for key in await plane.database.read(access.keys)]}


@router.delete("/{key}", response_model=KeyView)
async def revoke_key(request: Request, key: str, caller: CallerAsked) -> dict[str, Any]:
    """Revoke a key, by its id or its name: the next request with it is refused, by every control plane."""
    plane = plane_of(request)
    now_us = plane.now_us()
    try:
        revoked = await plane.database.write(access.revoke_key, storable(key, "key"), by=caller.name, now_us=now_us)
    except KeyUnknown as error:
        raise Problem(404, f"There is no key {str(error)!r}.", "GET /v1/api-keys lists them.") from error
    return _described(revoked, now_us)


def _described(key: ApiKey, now_us: int) -> dict[str, Any]:
    if key.revoked_at_us is not None:
        state = "revoked"
    else:
        state = "active" if key.is_admitted(now_us) else "expired"
    return {
        "id": key.id,
        "name": key.name,
        "role": key.role,
        "tenant": key.tenant or None,
        "state": state,
        "created_at": format_us(key.created_at_us),
        "created_by": key.created_by or None,
        "expires_at": format_us(key.expires_at_us),
        "revoked_at": format_us(key.revoked_at_us),
        "last_used_at": format_us(key.last_used_at_us),
    }
