"""``/v1/signing-keys``: a new key, signing with it, and retiring the old one, while everything goes on."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Final, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict

from licet.wire.signing import SigningKey, key_id_of
from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.fields import Count, Instant, said
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us
from licet_control_plane.audit_keeper import HeadUnreadable
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.fleet import State
from licet_control_plane.store import signing_keys
from licet_control_plane.store.database import DatabaseUnavailable
from licet_control_plane.store.signing_keys import NEXT, PREVIOUS, KeyStateRefused, StoredKey

router = v1_router("/signing-keys", tag="signing-keys")

NAMED_MAX: Final = 10
"""Sidecars that a refusal names."""


class Forced(BaseModel):
    """``force``: also while live sidecars are in the way; they will refuse what is published."""

    model_config = ConfigDict(extra="forbid")

    force: bool = False


class SigningKeyView(BaseModel):
    """A key that signs, signed, or will sign what is published."""

    id: str = said("A digest of the public key")
    public_key: str = said("ed25519: and base64, as sidecars are given it")
    state: Literal["next", "active", "previous", "retired"] = said("Only the active one signs")
    created_at: Instant
    activated_at: Instant | None = said("Since when it signs; null for never")
    resigned_at: Instant | None = said("When all that is published was signed with it; null while it is not")
    retired_at: Instant | None = said("When its private half was destroyed; null for never")
    trusted_by: Annotated[Count, said("How many live sidecars trust it")]
    not_trusted_by: Annotated[Count, said("How many live sidecars do not")]


class SigningKeyList(BaseModel):
    """Every key there ever was."""

    items: list[SigningKeyView] = said("In the order in which they were made")
    trust: list[str] = said("The public keys that sidecars should have now")


@router.get("", response_model=SigningKeyList)
async def list_signing_keys(request: Request) -> dict[str, Any]:
    """Every key there ever was, and ``trust``: the public keys that sidecars should have now."""
    plane = plane_of(request)
    await plane.key.refresh()
    return {"items": [_described(plane, one) for one in plane.key.stored], "trust": plane.key.trusted}


@router.post("", status_code=201, response_model=SigningKeyView)
async def generate_signing_key(request: Request, caller: CallerAsked) -> dict[str, Any]:
    """Make the next key. Nothing is signed with it yet: sidecars are to be given its public half first."""
    plane = plane_of(request)
    try:
        made = await plane.database.write(
            signing_keys.add, SigningKey.generate(), plane.ledger_key, by=caller.name, now_us=plane.now_us()
        )
    except KeyStateRefused as error:
        raise Problem(409, str(error), error.fix) from error
    await plane.key.refresh()
    return _described(plane, made)


@router.post("/rotate", response_model=SigningKeyView)
async def rotate_signing_keys(request: Request, body: Forced, caller: CallerAsked) -> dict[str, Any]:
    """Sign with the next key from now on, and sign anew all that is published; ``resigned_at``: since when it is."""
    plane = plane_of(request)
    await plane.key.refresh()
    following = next((one for one in plane.key.stored if one.state == NEXT), None)
    if following is not None and not body.force and (late := _live(plane, following.id, trusting=False)):
        raise Problem(
            409,
            f"{len(late)} live sidecars do not trust the next key {following.id}: {', '.join(late[:NAMED_MAX])}.",
            "Give them both public keys (licet signing-key list --trust); they take them up in a second. Ask again.",
        )
    try:
        active = await plane.database.write(signing_keys.activate, by=caller.name, now_us=plane.now_us())
    except KeyStateRefused as error:
        raise Problem(409, str(error), error.fix) from error
    await plane.key.refresh()
    return _described(plane, active)


@router.post("/{key}/retire", response_model=SigningKeyView)
async def retire_signing_key(request: Request, key: str, body: Forced, caller: CallerAsked) -> dict[str, Any]:
    """Destroy the private half of the previous key, or of a next one that is not wanted."""
    plane = plane_of(request)
    await plane.key.refresh()
    known = next((one for one in plane.key.stored if one.id == key), None)
    if known is None:
        raise Problem(404, f"There is no signing key {key!r}.", "GET /v1/signing-keys lists them.")
    if known.state == PREVIOUS and not body.force and (late := _live(plane, key, trusting=True)):
        raise Problem(
            409,
            f"{len(late)} live sidecars still trust {key}: {', '.join(late[:NAMED_MAX])}.",
            "Take its public key away from them (licet signing-key list --trust shows what they need), and ask again.",
        )
    try:
        retired = await plane.database.write(signing_keys.retire, key, by=caller.name, now_us=plane.now_us())
    except KeyStateRefused as error:
        raise Problem(409, str(error), error.fix) from error
    await plane.key.refresh()
    # The newest head of the audit trail may be the old key's, which nobody believes from here on. Where this fails, its
    # keeper goes on trying, and says so.
    with contextlib.suppress(HeadUnreadable, OSError, DatabaseUnavailable):
        await plane.audit.sign()
    return _described(plane, retired)


def _live(plane: ControlPlane, key: str, *, trusting: bool) -> list[str]:
    """Live sidecars that trust a key, or those that do not."""
    now_s = plane.now_s()
    return [
        name
        for name, one in sorted(plane.fleet.sidecars.items())
        if one.state(now_s) is State.LIVE and (key in one.heartbeat.keys) == trusting
    ]


def _described(plane: ControlPlane, key: StoredKey) -> dict[str, Any]:
    assert key.id == key_id_of(key.public_key)
    return {
        "id": key.id,
        "public_key": key.public_key,
        "state": key.state,
        "created_at": format_us(key.created_at_us),
        "activated_at": format_us(key.activated_at_us),
        "resigned_at": format_us(key.resigned_at_us),
        "retired_at": format_us(key.retired_at_us),
        "trusted_by": len(_live(plane, key.id, trusting=True)),
        "not_trusted_by": len(_live(plane, key.id, trusting=False)),
    }
