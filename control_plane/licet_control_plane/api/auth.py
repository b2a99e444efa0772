"""Who asks: an API key in ``Authorization: Bearer``."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from fastapi import Request

from licet_control_plane.api.problems import Problem
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.store import access


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose key it is; ``name`` is what the audit trail calls them."""

    name: str
    role: str


def plane_of(request: Request) -> ControlPlane:
    """The control plane behind the API."""
    plane: ControlPlane = request.app.state.plane
    return plane


async def authenticate(request: Request) -> Caller:
    """The caller of a request that people and programs make.

    Raises:
        Problem: 401, no key or not one that is admitted; 403, a sidecar's.
    """
    caller = await authenticate_any(request)
    if caller.role == access.SIDECAR:
        raise Problem(403, "A sidecar's key is not admitted here.", "Use an administrator's key.")
    return caller


async def authenticate_any(request: Request) -> Caller:
    """The caller of a request that sidecars make too.

    Raises:
        Problem: 401, no key or not one that is admitted.
    """
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise Problem(401, "The request carries no API key.", "Send it as Authorization: Bearer licet_….")
    digest = access.hash_of(key.strip())
    found = None
    for admitted in await plane_of(request).database.read(access.keys):
        # Every key is compared, in constant time: how long it takes tells nothing.
        if hmac.compare_digest(admitted.hash, digest):
            found = admitted
    if found is None:
        raise Problem(
            401,
            "The API key is not admitted.",
            "Use the key in the file admin-key in the server's state directory, or one made with it.",
        )
    return Caller(found.name, found.role)
