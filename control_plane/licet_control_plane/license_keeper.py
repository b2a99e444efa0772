"""Does what licenses want done by themselves when it is due: renews them, changes their plan, cancels them at the end
of their term, and says that a term ends or has ended.

Any number of control planes may run it: each license is looked at again in the transaction that changes it, under the
lock of all changes, so that whoever comes second finds nothing due. A term that ended while nobody ran is renewed as
soon as somebody does, once for each period that passed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import structlog
from sqlalchemy import Connection

from licet.domain.catalog import License
from licet_control_plane.changes import Changes
from licet_control_plane.core.lifecycle import Due, Move, moved, next_due, renewed_by_itself
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.core.webhook_events import EXPIRED, EXPIRING, license_data
from licet_control_plane.redis_link import backoff_s
from licet_control_plane.store import licenses, meta, webhooks
from licet_control_plane.store.database import Database, DatabaseUnavailable

LOOK_S: Final = 1.0
"""How late a change of plan may be. Looking is one read of an index that is nearly always empty."""
LICENSES_MAX: Final = 50
"""Of one transaction, some 20 ms: others write in between."""
BY: Final = "control-plane"
"""Who did it, in the audit trail."""

log: Final = structlog.get_logger(__name__)


class LicenseKeeper:
    """``run`` is the task. Counts since the start."""

    def __init__(self, database: Database, changes: Changes, *, now_s: Callable[[], float]) -> None:
        self.renewals = 0
        self.failures = 0
        self._database = database
        self._changes = changes
        self._now_s = now_s

    async def run(self) -> None:
        """Look until cancelled."""
        failures = 0
        while True:
            try:
                found = await self.look()
                failures = 0
            except DatabaseUnavailable as error:
                failures += 1
                self.failures += 1
                log.warning("licenses are not looked after", reason=str(error))
                await asyncio.sleep(backoff_s(failures))
                continue
            if not found:
                await asyncio.sleep(LOOK_S)

    async def look(self) -> int:
        """Do what is due for the first few licenses. Returns how many they were.

        Raises:
            DatabaseUnavailable: the database is away; what was not done is done the next time.
        """
        tenants = await self._database.read(licenses.due, now_s=int(self._now_s()), limit=LICENSES_MAX)
        if tenants:
            done = await self._database.write(self._do, tenants)
            self.renewals += done.count(Due.RENEW)
            self._changes.wake()
        return len(tenants)

    def _do(self, connection: Connection, tenants: list[str]) -> list[Due]:
        meta.lock(connection)
        return [due for tenant in tenants if (due := self._do_one(connection, tenant)) is not None]

    def _do_one(self, connection: Connection, tenant: str) -> Due | None:
        now_s = int(self._now_s())
        stored = licenses.get(connection, tenant)
        if stored is None:
            return None
        notice_s = self._changes.notice_s
        found = next_due(stored.license, stored.notices, notice_s=notice_s)
        if found is None or found[0] > now_s:  # somebody else did it meanwhile, or nobody had worked it out yet
            licenses.note(connection, tenant, stored.notices, due_s=found[0] if found else None)
            return None
        due = found[1]
        alter = partial(self._changes.alter, connection, tenant, by=BY)
        match due:
            case Due.RENEW:
                try:
                    alter(_renew, action="license.renew")
                except ChangeInvalid as error:
                    log.error("a license cannot renew itself", tenant=tenant, reason=str(error), fix=error.fix)
                    alter(_renew_by_hand, action="license.renew_failed")
            case Due.CANCEL:
                alter(lambda license_, now: moved(license_, Move.CANCEL, now), action="license.cancel")
            case Due.CHANGE_PLAN:
                try:
                    alter(_change_plan, action="license.change_plan")
                except ChangeInvalid as error:
                    log.error("a change of plan cannot be made", tenant=tenant, reason=str(error), fix=error.fix)
                    alter(lambda license_, _: replace(license_, planned=None), action="license.change_plan_failed")
            case Due.SAY_EXPIRING | Due.SAY_EXPIRED:
                expiring = due is Due.SAY_EXPIRING
                field = "expiring_for_s" if expiring else "expired_for_s"
                notices = stored.notices._replace(**{field: stored.license.ends_s})
                following = next_due(stored.license, notices, notice_s=notice_s)
                licenses.note(connection, tenant, notices, due_s=following[0] if following else None)
                data = license_data(stored.license, revision=stored.revision)
                webhooks.announce(connection, EXPIRING if expiring else EXPIRED, tenant, data, now_us=now_s * 1_000_000)
        return due


def _renew(license_: License, _now_s: float) -> License:
    return renewed_by_itself(license_)


def _renew_by_hand(license_: License, _now_s: float) -> License:
    assert license_.renewal is not None
    return replace(license_, renewal=replace(license_.renewal, auto=False))


def _change_plan(license_: License, _now_s: float) -> License:
    assert license_.planned is not None
    return replace(license_, plan=license_.planned.plan, planned=None)
