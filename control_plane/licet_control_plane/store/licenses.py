"""Licenses, one row a tenant."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, or_, select, update

from licet.domain.approvals import RequestEntry
from licet.domain.catalog import License, LicenseStatus, PlannedPlan
from licet.domain.catalog_wire import grants_from_wire, grants_to_wire, renewal_from_wire, renewal_to_wire
from licet_control_plane.core.lifecycle import NO_NOTICES, Notices
from licet_control_plane.store.schema import licenses


@dataclass(frozen=True, slots=True)
class StoredLicense:
    """A license, the revision that published it, when it was changed (microseconds), and what was said of its term."""

    license: License
    revision: int
    updated_at_us: int
    notices: Notices = NO_NOTICES


def get(connection: Connection, tenant: str) -> StoredLicense | None:
    """The license of a tenant."""
    row = connection.execute(select(licenses).where(licenses.c.tenant == tenant)).first()
    return _stored(row) if row else None


def save(
    connection: Connection, license_: License, *, revision: int, now_us: int, new: bool, due_s: int | None = None
) -> None:
    """Insert or replace a tenant's license. ``due_s``: when something is to be done with it by itself."""
    values = {
        "plan": license_.plan,
        "status": license_.status.value,
        "starts_s": license_.starts_s,
        "ends_s": license_.ends_s,
        "addons": json.dumps(dict(license_.addons)),
        "overrides": json.dumps(dict(license_.overrides)),
        "grants": json.dumps(grants_to_wire(license_.grants)),
        "requests": json.dumps([entry.to_wire() for entry in license_.requests]),
        "grace_s": license_.grace_s,
        "cancels": license_.cancels,
        "renewal": json.dumps(renewal_to_wire(license_.renewal)) if license_.renewal else "",
        "planned_plan": license_.planned.plan if license_.planned else "",
        "planned_s": license_.planned.at_s if license_.planned else 0,
        "due_s": due_s,
        "revision": revision,
        "updated_at": now_us,
    }
    if new:
        connection.execute(insert(licenses).values(tenant=license_.tenant, **values))
    else:
        connection.execute(update(licenses).where(licenses.c.tenant == license_.tenant).values(**values))


def due(connection: Connection, *, now_s: int, limit: int) -> list[str]:
    """Tenants of licenses that something is to be done with, the longest due first."""
    rows = connection.execute(
        select(licenses.c.tenant).where(licenses.c.due_s <= now_s).order_by(licenses.c.due_s).limit(limit)
    )
    return [row.tenant for row in rows]


def note(connection: Connection, tenant: str, notices: Notices, *, due_s: int | None) -> None:
    """Remember what was said of a license's term, and when something is to be done with it next."""
    values = {**notices._asdict(), "due_s": due_s}
    connection.execute(update(licenses).where(licenses.c.tenant == tenant).values(**values))


def page(
    connection: Connection, *, tenant: str = "", plan: str = "", status: str = "", after: str = "", limit: int = 100
) -> list[StoredLicense]:
    """Licenses by tenant, after ``after``; ``tenant``: of this one only."""
    query = select(licenses).where(licenses.c.tenant > after).order_by(licenses.c.tenant).limit(limit)
    if tenant:
        query = query.where(licenses.c.tenant == tenant)
    if plan:
        query = query.where(licenses.c.plan == plan)
    if status:
        query = query.where(licenses.c.status == status)
    return [_stored(row) for row in connection.execute(query)]


def holding(connection: Connection, plans: Collection[str], *, after: str, limit: int) -> list[StoredLicense]:
    """Licenses by tenant that hold one of ``plans``, and all those with add-ons; after ``after``."""
    query = select(licenses).where(
        licenses.c.tenant > after, or_(licenses.c.plan.in_(list(plans)), licenses.c.addons != "{}")
    )
    return [_stored(row) for row in connection.execute(query.order_by(licenses.c.tenant).limit(limit))]


def of_tenants(connection: Connection, tenants: Iterable[str]) -> dict[str, StoredLicense]:
    """The licenses of some tenants, at most a few hundred."""
    rows = connection.execute(select(licenses).where(licenses.c.tenant.in_(list(tenants))))
    return {row.tenant: _stored(row) for row in rows}


def plans_in_use(connection: Connection) -> dict[str, tuple[int, str]]:
    """Plans that licenses hold or change to later, with how many do and the name of one."""
    found: dict[str, tuple[int, str]] = {}
    for column in (licenses.c.planned_plan, licenses.c.plan):
        rows = connection.execute(
            select(column, func.count(), func.min(licenses.c.tenant)).where(column != "").group_by(column)
        )
        for plan, count, tenant in rows:
            found[plan] = (found.get(plan, (0, ""))[0] + count, tenant)
    return found


def count(connection: Connection) -> int:
    """How many there are."""
    return connection.scalar(select(func.count()).select_from(licenses)) or 0


def _stored(row: Row[Any]) -> StoredLicense:
    license_ = License(
        tenant=row.tenant,
        plan=row.plan,
        status=LicenseStatus(row.status),
        starts_s=row.starts_s,
        ends_s=row.ends_s,
        addons=json.loads(row.addons),
        overrides=json.loads(row.overrides),
        grants=grants_from_wire(json.loads(row.grants)),
        requests=tuple(RequestEntry.from_wire(entry) for entry in json.loads(row.requests)),
        grace_s=row.grace_s,
        cancels=row.cancels,
        renewal=renewal_from_wire(json.loads(row.renewal)) if row.renewal else None,
        planned=PlannedPlan(row.planned_plan, row.planned_s) if row.planned_plan else None,
    )
    notices = Notices(row.expiring_for_s, row.expired_for_s)
    return StoredLicense(license_, row.revision, row.updated_at, notices)
