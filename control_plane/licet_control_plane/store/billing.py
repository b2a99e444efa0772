"""What an invoice is computed from: billed units, what quotas took, and the terms that held; and what is still missing.

Reads only; each function sees one committed state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgpack
from sqlalchemy import Connection, func, or_, select

from licet.domain.catalog import Catalog, License
from licet.domain.catalog_wire import license_from_wire
from licet.domain.windows import Window
from licet.wire.documents import BUNDLE, BUNDLE_KEY, LICENSE
from licet.wire.registers import parts_of_marker
from licet.wire.signing import read_own
from licet_control_plane.core.billing import (
    OVERAGE_WINDOW_S_MAX,
    Billed,
    Invoice,
    Terms,
    invoice,
    longest_window_s,
    priced_limits,
    window_spends,
)
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.store import bundles as bundle_store
from licet_control_plane.store.schema import billed, bundles, logs, ranges, register_spend, revisions

_US: Final = 1_000_000
_PLAN: Final = "Plan"


@dataclass(frozen=True, slots=True)
class Missing:
    """Events of a log that the ledger knows of and does not have."""

    log_id: str
    from_seq: int
    to_seq: int


def invoice_of(connection: Connection, tenant: str, month: Window) -> Invoice | None:
    """The invoice of a tenant; ``None`` for one that never had a license and used nothing."""
    units = [
        Billed(row.feature, row.priced_as, row.revision, int(row.units))
        for row in connection.execute(select(billed).where(billed.c.tenant == tenant, billed.c.month == month.start))
    ]
    terms = _terms(connection, tenant, month, min((row.revision for row in units), default=None))
    if not units and all(one.license is None for one in terms):
        return None
    limits = priced_limits(terms)
    spends = window_spends(_spends(connection, tenant, month, set(limits), longest_window_s(limits.values())))
    return invoice(tenant, month, terms, units, spends)


def missing(connection: Connection, *, since_us: int) -> list[Missing]:
    """Gaps of logs that had events at ``since_us`` or later: what lies between, and lost ends of predecessors."""
    found: list[Missing] = []
    rows = connection.execute(select(logs).order_by(logs.c.sidecar, logs.c.incarnation)).all()
    above = _ranges(connection)
    watermarks = {(row.sidecar, row.incarnation): row.watermark for row in rows}
    for row in rows:
        if row.last_at < since_us:
            continue
        recorded = RecordedSeqs(row.watermark, above.get(row.log, ()))
        found += (Missing(row.log_id, first, last) for first, last in recorded.holes())
        reached = watermarks.get((row.sidecar, row.previous_incarnation), 0)
        if reached < row.previous_last_seq:
            found.append(Missing(f"{row.sidecar}:{row.previous_incarnation}", reached + 1, row.previous_last_seq))
    return found


def _ranges(connection: Connection) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for log, first, last in connection.execute(select(ranges)):
        found.setdefault(log, []).append((first, last))
    return found


def _spends(
    connection: Connection, tenant: str, month: Window, keys: Collection[str], window_s_max: int
) -> Iterator[tuple[str, str, int]]:
    """Limit, quota and billable units of each sidecar, of windows that may end in the month, of limits whose key is one
    of ``keys``."""
    if not keys:
        return
    rows = connection.execute(
        select(register_spend.c.quota, register_spend.c.units - register_spend.c.observed).where(
            register_spend.c.tenant == tenant,
            register_spend.c.window_start >= month.start - window_s_max,
            register_spend.c.window_start < month.end,
            or_(*(func.substr(register_spend.c.quota, 1, len(key)) == key for key in sorted(keys))),
        )
    )
    for quota, units in rows:
        limit, _ = parts_of_marker(quota.rpartition(":")[0])
        if limit in keys:
            yield limit, quota, int(units)


# Terms


def _terms(connection: Connection, tenant: str, month: Window, oldest: int | None) -> list[Terms]:
    """What held for the tenant, by revision: from ``oldest`` on, and since the longest window that ends in the month
    began, up to the month's end and the newest.
    """
    since_us = (month.start - OVERAGE_WINDOW_S_MAX) * _US
    changes = [
        *_changes(connection, LICENSE, tenant, since_us, oldest),
        *_changes(connection, BUNDLE, BUNDLE_KEY, since_us, oldest),
    ]
    licenses = _licenses(connection, [revision for revision, _, kind in changes if kind == LICENSE])
    plans = {name for one in licenses.values() for name in (one.plan, *one.addons)}
    catalogs = dict(_catalogs(connection, [revision for revision, _, kind in changes if kind == BUNDLE], plans))
    terms: list[Terms] = []
    license_: License | None = None
    catalog = Catalog()
    for revision, at_us, kind in sorted(changes):
        if kind == LICENSE:
            license_ = licenses[revision]
        elif revision in catalogs:
            catalog = catalogs[revision]
        else:
            continue  # none of the tenant's plans is different
        terms.append(Terms(revision, at_us, license_, catalog))
    return terms


def _changes(
    connection: Connection, kind: str, key: str, since_us: int, oldest: int | None
) -> list[tuple[int, int, str]]:
    """Revision, time and kind of the documents of a key, from the one that was in force at both bounds on."""
    rows = connection.execute(
        select(revisions.c.revision, revisions.c.at)
        .where(revisions.c.kind == kind, revisions.c.key == key)
        .order_by(revisions.c.revision)
    ).all()
    before = [row.revision for row in rows if row.at <= since_us and (oldest is None or row.revision <= oldest)]
    first = before[-1] if before else 0
    return [(row.revision, row.at, kind) for row in rows if row.revision >= first]


def _licenses(connection: Connection, numbers: Collection[int]) -> dict[int, License]:
    rows = connection.execute(
        select(revisions.c.revision, revisions.c.document).where(revisions.c.revision.in_(list(numbers)))
    )
    return {revision: license_from_wire(read_own(bytes(document)).payload) for revision, document in rows}


def _catalogs(
    connection: Connection, numbers: Collection[int], names: Collection[str]
) -> Iterator[tuple[int, Catalog]]:
    """The plans of ``names`` in each bundle in which one of them is not what it was in the bundle before."""
    rows = connection.execute(
        select(bundles.c.revision, bundles.c.documents, bundles.c.chunks)
        .where(bundles.c.revision.in_(list(numbers)))
        .order_by(bundles.c.revision)
    )
    known: Mapping[str, str] | None = None
    changed: list[tuple[int, tuple[str, ...]]] = []
    for revision, documents, chunks in rows:
        digests = {name: digest for kind, name, digest in msgpack.unpackb(documents) if kind == _PLAN and name in names}
        if digests != known:
            changed.append((revision, tuple(msgpack.unpackb(chunks))))
            known = digests
    for revision, chunks in changed:
        catalog = bundle_store.catalog_of(connection, chunks)
        yield revision, Catalog(plans={name: catalog.plans[name] for name in names if name in catalog.plans})
