"""Who asks, and whether they may: an API key or a token in ``Authorization: Bearer``.

``authenticate`` is the dependency of every route under ``/v1``. It finds the caller, holds it to ``api/access.py``,
and tells the audit trail who acts. A key is looked up in the database for each request, so that a revoked one opens
nothing from then on, whichever control plane is asked.

Failures are counted by address, in bounded memory. Whoever failed too often is answered 429 without being looked up,
but for credentials that this process admitted lately: a neighbor behind the same address is not shut out.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any, Final

import structlog
from fastapi import APIRouter, Depends, Query, Request

from licet_control_plane.api.access import Reach, Rule, rule_of
from licet_control_plane.api.openapi import described_router
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.requests import request_id
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.access import Role, allowed, hash_of, is_mistyped, roles_with
from licet_control_plane.core.attempts import Attempts, source_of
from licet_control_plane.core.claims import ClaimsRefused
from licet_control_plane.oidc import Issuer, IssuerUnavailable, TokenRefused
from licet_control_plane.store import access
from licet_control_plane.store.access import Origin
from licet_control_plane.store.database import DatabaseUnavailable, with_each_commit

log: Final = structlog.get_logger(__name__)

FAILURES_BURST: Final = 20
"""Failures of one address before it must wait; then one in three seconds."""
FAILURES_PER_S: Final = 1 / 3
ADMITTED_MAX: Final = 1_000
"""Credentials that are known to have been good, for addresses that must wait."""
TOKEN_DOTS: Final = 2
"""In a token; no API key has any."""
ISSUER_RETRY_S: Final = 10
CREDENTIAL_CHARS_MAX: Final = 256
DENIALS_BURST: Final = 20
"""Attempts of one caller or address that the audit trail has at once; then twenty an hour."""
DENIALS_PER_S: Final = 20 / 3_600
DENIALS_OF_ALL: Final = "all"
"""The bucket of all together: without it, as many addresses would fill the trail."""
DENIALS_OF_ALL_BURST: Final = 500
DENIALS_OF_ALL_PER_S: Final = 500 / 3_600


@dataclass(frozen=True, slots=True)
class Caller:
    """``name`` is what the audit trail calls them; ``tenant`` the only one they reach, empty for all."""

    name: str
    role: Role
    tenant: str = ""
    via: str = "api-key"
    credential: str = ""

    @property
    def identity(self) -> str:
        """Who it is, whatever credential they showed: a key's id, or an issuer's subject."""
        return "\n".join((self.via, self.credential, self.name if self.via == "oidc" else ""))

    def confine(self, tenant: str) -> str:
        """The tenant that a request is about: the one it names, which must be the caller's if that has only one.

        Raises:
            Problem: 403, whether the other one exists or not.
        """
        if self.tenant and tenant and tenant != self.tenant:
            raise _confined(self.tenant)
        return tenant or self.tenant


class Gate:
    """What authentication remembers between requests: one for each application."""

    def __init__(self) -> None:
        self.failures = Attempts(burst=FAILURES_BURST, per_s=FAILURES_PER_S)
        self.denials = Attempts(burst=DENIALS_BURST, per_s=DENIALS_PER_S)
        self.denials_of_all = Attempts(burst=DENIALS_OF_ALL_BURST, per_s=DENIALS_OF_ALL_PER_S)
        self._admitted: OrderedDict[str, None] = OrderedDict()

    def admitted(self, digest: str) -> None:
        """A credential was good."""
        self._admitted[digest] = None
        self._admitted.move_to_end(digest)
        if len(self._admitted) > ADMITTED_MAX:
            self._admitted.popitem(last=False)

    def refused(self, digest: str) -> None:
        """A credential is not good, or not any more."""
        self._admitted.pop(digest, None)

    def knows(self, digest: str) -> bool:
        """Whether a credential was good lately."""
        return digest in self._admitted


def plane_of(request: Request) -> ControlPlane:
    """The control plane behind the API."""
    plane: ControlPlane = request.app.state.plane
    return plane


async def authenticate(request: Request) -> Caller:
    """The caller of a request, who may make it.

    Raises:
        Problem: 401, nobody that is known; 403, somebody who may not; 429, an address that failed too often.
    """
    rule = rule_of(request.method, _path_of(request))
    tenant = request.path_params.get("tenant", "")
    try:
        caller = await identified(request)
    except Problem as unknown:
        if unknown.status in (401, 403) and rule.changes:
            nobody = Origin("", "", _address(request), request_id(request))
            await _denied(request, rule, nobody, by="", tenant=tenant, problem=unknown)
        raise
    origin = Origin(caller.via, caller.credential, _address(request), request_id(request), tenant or caller.tenant)
    access.acting.set(origin)
    problem = _refusal(caller, rule, tenant)
    if problem is not None:
        if rule.changes:
            await _denied(request, rule, origin, by=caller.name, tenant=tenant, problem=problem)
        raise problem
    return caller


def v1_router(prefix: str = "", *, tag: str) -> APIRouter:
    """A router under ``/v1`` whose every route authenticates. ``tag`` groups its routes in the description."""
    return described_router(f"/v1{prefix}", tag=tag, dependencies=[Depends(authenticate)])


async def identified(request: Request) -> Caller:
    """The caller of a request, whatever they may do; looked up once for each request.

    Raises:
        Problem: as for ``authenticate``, but for what they may not.
    """
    known: Caller | Problem | None = getattr(request.state, "caller", None)
    if known is None:
        try:
            known = await _caller(request)
        except Problem as problem:
            known = problem
        request.state.caller = known
    if isinstance(known, Problem):
        raise known
    return known


async def tenant_asked(
    caller: Annotated[Caller, Depends(authenticate)],
    tenant: Annotated[str, Query(description="Only of this tenant; empty for all that the caller reaches")] = "",
) -> str:
    """The parameter ``tenant`` of a list or a sum; the caller's own if that has only one."""
    storable(tenant, "tenant")
    return caller.confine(tenant)


def storable(text: str, name: str) -> str:
    """A text that is asked for in the database.

    Raises:
        Problem: 422, PostgreSQL has no text with this character in it.
    """
    if "\0" in text:
        raise Problem(422, f"{name}: it holds the character U+0000.", "Leave it out.")
    return text


CallerAsked = Annotated[Caller, Depends(authenticate)]
TenantAsked = Annotated[str, Depends(tenant_asked)]


def _refusal(caller: Caller, rule: Rule, tenant: str) -> Problem | None:
    """Why a caller may not, before anything is looked up: so it says nothing about what there is."""
    if not allowed(caller.role, rule.need):
        roles = " or ".join(roles_with(rule.need))
        return Problem(
            403,
            f"{caller.name} has the role {caller.role.value}, which may not do this.",
            f"Use a key of the role {roles}: an administrator makes one with licet api-key create.",
        )
    if caller.tenant and (rule.reach is Reach.DEPLOYMENT or (rule.reach is Reach.TENANT and tenant != caller.tenant)):
        return _confined(caller.tenant)
    return None


def _confined(tenant: str) -> Problem:
    return Problem(403, f"This key reaches the tenant {tenant} only.", "Use a key without a tenant for the rest.")


async def _caller(request: Request) -> Caller:
    scheme, _, credential = request.headers.get("authorization", "").partition(" ")
    credential = credential.strip()
    if scheme.lower() != "bearer" or not credential:
        raise Problem(401, "The request carries no API key.", "Send it as Authorization: Bearer licet_….")
    plane, gate = plane_of(request), gate_of(request)
    source, digest = source_of(_address(request)), hash_of(credential)
    wait_s = gate.failures.wait_s(source, plane.now_s())
    if wait_s and not gate.knows(digest):
        raise Problem(
            429,
            "Authentication failed too often from this address.",
            "Correct the key, and ask again later.",
            retry_after_s=math.ceil(wait_s),
        )
    found = await _found(plane, credential)
    if found is None:
        gate.refused(digest)
        gate.failures.take(source, plane.now_s())
        raise Problem(
            401,
            "The API key or token is not admitted.",
            "Use the key in the file admin-key in the server's state directory, or one made with it. Keys are revoked"
            " and expire: licet api-key list shows when. Why a token was refused is in the server's log.",
        )
    gate.admitted(digest)
    return found


async def _found(plane: ControlPlane, credential: str) -> Caller | None:
    """Whom a credential belongs to.

    Raises:
        Problem: a token that is good gives no role; or nothing can be said of it now.
    """
    if plane.issuer is not None and credential.count(".") == TOKEN_DOTS:
        return await _bearer(plane.issuer, credential)
    if is_mistyped(credential):
        return None
    now_us = plane.now_us()
    key = await plane.database.read(access.find, credential, now_us=now_us)
    if key is None:
        return None
    if key.last_used_at_us is None or now_us - key.last_used_at_us >= access.USED_EVERY_US:
        with contextlib.suppress(DatabaseUnavailable), with_each_commit(None):  # not worth refusing anybody
            await plane.database.write(access.note_use, key.id, now_us=now_us)
    return Caller(key.name, Role(key.role), key.tenant, "api-key", key.id)


async def _bearer(issuer: Issuer, token: str) -> Caller | None:
    try:
        found = await issuer.bearer(token)
    except TokenRefused as error:
        log.info("a token was refused", reason=str(error))
        return None
    except IssuerUnavailable as error:
        fix = "Look at the issuer and at --oidc-issuer; or use an API key."
        raise Problem(503, f"The token cannot be verified: {error}.", fix, retry_after_s=ISSUER_RETRY_S) from error
    except ClaimsRefused as error:
        raise Problem(403, str(error), error.fix) from error
    return Caller(found.name, found.role, found.tenant, "oidc", issuer.name[:CREDENTIAL_CHARS_MAX])


def gate_of(request: Request) -> Gate:
    """What authentication remembers."""
    gate: Gate = request.app.state.gate
    return gate


async def _denied(request: Request, rule: Rule, origin: Origin, *, by: str, tenant: str, problem: Problem) -> None:
    """Note in the audit trail that somebody tried what they may not. Bounded: the rest is counted only."""
    plane, gate = plane_of(request), gate_of(request)
    now_s = plane.now_s()
    who = by or source_of(origin.address)
    if not (gate.denials.take(who, now_s) and gate.denials_of_all.take(DENIALS_OF_ALL, now_s)):
        plane.denials_unrecorded += 1
        return
    access.acting.set(origin)
    what: dict[str, Any] = {"status": problem.status, "why": problem.detail, "request": rule.records or "?"}
    try:
        with with_each_commit(None):
            await plane.database.write(
                access.record,
                by=by or "unknown",
                action="access.denied",
                target=f"{request.method} {request.url.path}".replace("\0", "?")[:256],
                before=None,
                after=what,
                now_us=int(now_s * 1_000_000),
                tenant=tenant.replace("\0", "?")[:128],
            )
    except DatabaseUnavailable as error:
        log.error("a refused attempt could not be recorded", reason=str(error))


def _address(request: Request) -> str:
    """From where: what uvicorn made of it, which looks behind proxies that are trusted, and behind no others."""
    return request.client.host[:64] if request.client else ""


def _path_of(request: Request) -> str:
    """The route's path, as the table has it."""
    path: str = request.scope["route"].path
    return path
