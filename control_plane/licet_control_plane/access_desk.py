"""Access requests at work: opened when the ledger has them, decided by people, ended by time. One transaction each:
the request, the license document that tells sidecars of it, and the line in the audit trail.

One task opens and expires; decisions come from the API. All of it may run in several control planes at once: the row
lock under which revisions are allocated puts them in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog
from sqlalchemy import Connection

from licet.domain.approvals import LIVE_MAX, OPEN_MAX, RequestState, kept_entries
from licet.domain.catalog import ApprovalStage, Catalog, License
from licet.domain.entitlements import entitlements_of
from licet_control_plane.changes import Changes, LicenseUnknown
from licet_control_plane.core import access_requests as core
from licet_control_plane.core.access_requests import AccessRequest, Principal, Terms
from licet_control_plane.core.grants import GrantAsked, grant_of
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.store import access, licenses, meta
from licet_control_plane.store import access_requests as store
from licet_control_plane.store.access_requests import StoredRequest
from licet_control_plane.store.database import Database, DatabaseUnavailable

OPENED_MAX: Final = 500
"""Requests opened in one transaction."""
LOOK_S: Final = 1.0
"""Between looks at what has expired; what is asked for is opened at once."""
FORGET_EVERY_S: Final = 3_600.0
SIDECARS: Final = "sidecars"
"""Who opens a request, and lets it expire, in the audit trail."""

log = structlog.get_logger(__name__)


class RequestUnknown(Exception):
    """There is no such request; the argument is its id."""


@dataclass(slots=True)
class DeskCounts:
    """Since the start. ``refused``: found no room among the open ones of their tenant."""

    opened: int = 0
    expired: int = 0
    refused: int = 0


class AccessDesk:
    """``run`` is the task. ``asked`` is set when the ledger has new requests; ``wake`` has what is made published."""

    def __init__(
        self, database: Database, changes: Changes, *, wake: asyncio.Event, now_s: Callable[[], float]
    ) -> None:
        self._database = database
        self._changes = changes
        self._wake = wake
        self._now_s = now_s
        self.asked = asyncio.Event()
        self.counts = DeskCounts()

    async def run(self) -> None:
        """Open and expire until cancelled."""
        loop = asyncio.get_running_loop()
        forgot_s = -FORGET_EVERY_S
        while True:
            try:
                self.asked.clear()
                while await self._step():
                    pass
                if loop.time() - forgot_s >= FORGET_EVERY_S:
                    await self._database.write(store.forget_old, self._now_us())
                    forgot_s = loop.time()
            except DatabaseUnavailable as error:
                log.warning("access requests wait", reason=str(error))
            try:
                # Not wait_for: before Python 3.12 it can swallow a cancellation that comes as the event is set.
                async with asyncio.timeout(LOOK_S):
                    await self.asked.wait()
            except TimeoutError:
                pass

    async def approve(self, id_: str, by: Principal, terms: Terms, reason: str) -> StoredRequest:
        """Say yes. Repeated by the same person with the same terms it changes nothing.

        Raises:
            RequestUnknown: there is none.
            NotAllowed, NotPossible, ChangeInvalid: see ``core.access_requests.approved``.
            LicenseUnknown: its tenant has no license any more.
        """
        return await self._decide(id_, by, "approve", lambda one, now: core.approved(one, by, terms, reason, now))

    async def deny(self, id_: str, by: Principal, reason: str) -> StoredRequest:
        """Say no. Repeated and raised as ``approve``."""
        return await self._decide(id_, by, "deny", lambda one, now: core.denied(one, by, reason, now))

    async def revoke(self, id_: str, by: Principal, reason: str) -> StoredRequest:
        """Take an approval back; what was used under it stays used. Repeated and raised as ``approve``."""
        return await self._decide(id_, by, "revoke", lambda one, now: core.revoked(one, by, reason, now))

    async def _decide(
        self, id_: str, by: Principal, what: str, step: Callable[[AccessRequest, int], AccessRequest]
    ) -> StoredRequest:
        stored = await self._database.write(self._decided, id_, by, what, step)
        self._wake.set()
        return stored

    def _decided(
        self,
        connection: Connection,
        id_: str,
        by: Principal,
        what: str,
        step: Callable[[AccessRequest, int], AccessRequest],
    ) -> StoredRequest:
        meta.lock(connection)
        stored = store.get(connection, id_)
        if stored is None:
            raise RequestUnknown(id_)
        before, now_us = stored.request, self._now_us()
        after = step(before, now_us)
        if after == before:
            return stored
        revision = stored.revision
        if after.entry() != before.entry():
            revision = self._tell(connection, [after], by=by.name, now_us=now_us)
        store.save(connection, after, revision=revision)
        access.record(
            connection,
            by=by.name,
            action=f"access_request.{what}",
            target=f"{after.tenant}/{after.id}",
            before=_audited(before),
            after=_audited(after),
            now_us=now_us,
            tenant=after.tenant,
        )
        return StoredRequest(after, revision)

    async def _step(self) -> bool:
        """Whether there may be more to do."""
        now_us = self._now_us()
        waiting = await self._database.read(store.asked, 1)
        overdue = await self._database.read(store.due, now_us, 1)
        if waiting:
            opened, expired, refused = await self._database.write(self._open)
            self.counts.opened += opened
            self.counts.expired += expired
            self.counts.refused += refused
            if opened:
                self._wake.set()
        if overdue:
            self.counts.expired += await self._database.write(self._expire)
        return bool(waiting or overdue)

    def _open(self, connection: Connection) -> tuple[int, int, int]:
        """Opened, expired before they could be, and refused."""
        meta.lock(connection)
        now_us = self._now_us()
        by_tenant: dict[str, list[AccessRequest]] = {}
        for one in store.asked(connection, OPENED_MAX):
            by_tenant.setdefault(one.tenant, []).append(one)
        catalog = self._changes.catalog_in_force(connection) if by_tenant else Catalog()
        counts = [0, 0, 0]
        for tenant, asked in by_tenant.items():
            stored = licenses.get(connection, tenant)
            room = OPEN_MAX - sum(one.is_open(now_us) for one in stored.license.requests) if stored else 0
            opened: list[AccessRequest] = []
            for one in asked:
                request = core.opened(one, *_chain_of(one.rule, catalog), now_us)
                if request.state is not RequestState.PENDING:
                    store.save(connection, request)
                    counts[1] += 1
                elif len(opened) < room:
                    opened.append(request)
            full = [one.id for one in asked if one.id not in {o.id for o in opened}]
            store.drop(connection, full)
            counts[2] += len(full)
            if opened:
                revision = self._tell(connection, opened, by=SIDECARS, now_us=now_us)
                for request in opened:
                    store.save(connection, request, revision=revision)
                    self._audit_opened(connection, request, now_us)
                counts[0] += len(opened)
        return counts[0], counts[1], counts[2] - counts[1]

    def _expire(self, connection: Connection) -> int:
        meta.lock(connection)
        now_us = self._now_us()
        overdue = store.due(connection, now_us, OPENED_MAX)
        for before in overdue:
            after = core.expired(before, now_us)
            store.save(connection, after)  # sidecars know the time themselves
            access.record(
                connection,
                by=SIDECARS,
                action="access_request.expire",
                target=f"{after.tenant}/{after.id}",
                before=_audited(before),
                after=_audited(after),
                now_us=now_us,
                tenant=after.tenant,
            )
        return len(overdue)

    def _audit_opened(self, connection: Connection, request: AccessRequest, now_us: int) -> None:
        access.record(
            connection,
            by=SIDECARS,
            action="access_request.open",
            target=f"{request.tenant}/{request.id}",
            before=None,
            after=_audited(request),
            now_us=now_us,
            tenant=request.tenant,
        )

    def _tell(self, connection: Connection, changed: Iterable[AccessRequest], *, by: str, now_us: int) -> int:
        """Put the requests, and the grant that the approval of a limit is, in the tenant's license; its revision."""
        requests = list(changed)
        stored = licenses.get(connection, requests[0].tenant)
        if stored is None:
            raise LicenseUnknown(requests[0].tenant)
        license_ = stored.license
        told = {one.id for one in requests}
        entries = [one for one in license_.requests if one.id not in told]
        for one in requests:
            if one.state is RequestState.APPROVED and sum(entry.is_live(now_us) for entry in entries) >= LIVE_MAX:
                raise ChangeInvalid(
                    "id", f"{LIVE_MAX} approvals of {one.tenant} have not ended", "Revoke one, or change the policy."
                )
            entries.append(one.entry())
            license_ = self._with_grant(connection, license_, one)
        license_ = replace(license_, requests=kept_entries(entries, now_us))
        published = self._changes.publish(connection, stored, license_, by=by, now_us=now_us, message="access request")
        if license_.grants != stored.license.grants:
            # A top-up like any other. Requests themselves are nothing that events say of a license.
            self._changes.announce(connection, stored, published, action="grant.add")
        return published.revision

    def _with_grant(self, connection: Connection, license_: License, request: AccessRequest) -> License:
        """An approved request that a limit wanted is a top-up of that limit; one that was revoked is none."""
        if not request.names_limit:
            return license_
        others = tuple(grant for grant in license_.grants if grant.id != request.id)
        if request.state is not RequestState.APPROVED:
            return replace(license_, grants=others)
        entitled = entitlements_of(license_, self._changes.catalog_in_force(connection)).values()
        limits: dict[str, Any] = {limit.key: limit for one in entitled for limit in one.limits}
        asked = GrantAsked(
            limit=request.rule,
            amount=request.money_approved or request.units_approved,
            id=request.id,
            starts_s=request.changed_at // 1_000_000,
            ends_s=-(-request.ends_at // 1_000_000),
        )
        grant = grant_of(asked, limits, others, id_=request.id, now_s=request.changed_at // 1_000_000)
        return replace(license_, grants=(*others, grant))

    def _now_us(self) -> int:
        return int(self._now_s() * 1_000_000)


def principal(name: str, role: str, tenant: str, members: Mapping[str, Iterable[str]]) -> Principal:
    """Who a caller is to the chains; ``members`` of groups by name."""
    return Principal(name, role, core.groups_of(name, members), tenant)


def _chain_of(rule: str, catalog: Catalog) -> tuple[str, tuple[ApprovalStage, ...]]:
    """The chain that a rule names; ``("", ())`` for none, as for a limit."""
    policy, _, name = rule.partition("/")
    document = catalog.policies.get(policy)
    found = next((one for one in document.rules if one.name == name), None) if document else None
    chain = catalog.approval_chains.get(found.approval) if found else None
    return (chain.name, chain.stages) if chain else ("", ())


def _audited(request: AccessRequest) -> dict[str, Any]:
    """What the audit trail keeps. No subject: a name there would outlive its erasure."""
    return {
        "state": request.state.value,
        "action": request.action,
        "rule": request.rule,
        "chain": request.chain,
        "stage": request.stage + 1,
        "votes": list(request.votes),
        "expires_at_us": request.expires_at,
        "ends_at_us": request.ends_at,
        "units": request.money_approved or request.units_approved,
        "decided_by": request.decided_by,
        "reason": request.reason,
    }
