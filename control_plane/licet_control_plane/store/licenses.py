"""Licenses, one row a tenant."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, or_, select, update

from licet.domain.catalog import License, LicenseStatus, grants_from_wire, grants_to_wire
from licet_control_plane.store.schema import licenses


@dataclass(frozen=True, slots=True)
class StoredLicense:
    """A license, the revision that published it, and when it was changed (microseconds)."""

    license: License
    revision: int
    updated_at_us: int


def get(connection: Connection, tenant: str) -> StoredLicense | None:
    """The license of a tenant."""
    row = connection.execute(select(licenses).where(licenses.c.tenant == tenant)).first()
    return _stored(row) if row else None


def save(connection: Connection, license_: License, *, revision: int, now_us: int, new: bool) -> None:
    """Insert or replace a tenant's license."""
    values = {
        "plan": license_.plan,
        "status": license_.status.value,
        "starts_s": license_.starts_s,
        "ends_s": license_.ends_s,
        "addons": json.dumps(dict(license_.addons)),
        "overrides": json.dumps(dict(license_.overrides)),
        "grants": json.dumps(grants_to_wire(license_.grants)),
        "revision": revision,
        "updated_at": now_us,
    }
    if new:
        connection.execute(insert(licenses).values(tenant=license_.tenant, **values))
    else:
        connection.execute(update(licenses).where(licenses.c.tenant == license_.tenant).values(**values))


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
    """Plans that licenses hold, with how many do and the name of one."""
    rows = connection.execute(
        select(licenses.c.plan, func.count(), func.min(licenses.c.tenant)).group_by(licenses.c.plan)
    )
    return {plan: (count, tenant) for plan, count, tenant in rows}


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
    )
    return StoredLicense(license_, row.revision, row.updated_at)
