"""An engine with a state put in by hand, for tables of decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from licet.domain.approvals import Override
from licet.domain.catalog import Catalog, License
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.lease import Lease
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.tenant import Tenant
from tests.support.fake_clock import START_US

NOW_US = START_US
NOW_S = NOW_US // 1_000_000
BOOT_MS = 1_000_000
STALENESS_US_MAX = 300_000_000


def engine_with(
    content: Catalog,
    *licenses: License,
    observe: bool = False,
    as_of_us: int = NOW_US,
    tenants_max: int = 100,
    overrides: tuple[Override, ...] = (),
) -> Engine:
    """Everything in force, confirmed a moment ago."""
    engine = Engine(LeaseBook(1), tenants_max=tenants_max, staleness_us_max=STALENESS_US_MAX)
    engine.install_bundle(Rulebook(content, generation=1, revision=1, observe=observe, overrides=overrides))
    for license_ in licenses:
        engine.install_license(Tenant(license_, generation=1, revision=1, document=b""))
    engine.as_of_us = as_of_us
    return engine


def inquiry(tenant: str = "acme", action: str = "report.export", **fields: Any) -> Inquiry:
    """A check, with the given fields set."""
    made = Inquiry(tenant, action)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def outcome(engine: Engine, one: Inquiry, *, now_us: int = NOW_US, boot_ms: int = BOOT_MS, patient: bool = True) -> Any:
    """A ``Decision`` or a ``Wait``."""
    return engine.decide(one, now_us=now_us, boot_ms=boot_ms, patient=patient)


def decided(engine: Engine, one: Inquiry, **when: Any) -> Decision:
    """The decision; nothing has to be waited for."""
    decision = outcome(engine, one, **when)
    assert isinstance(decision, Decision), decision
    return decision


def grant(lease: Lease, cap: int, *, remaining: int = 0, until_ms: int = BOOT_MS + 60_000) -> Lease:
    """Makes a lease hold ``cap`` units."""
    lease.cap, lease.remaining, lease.hold_until_ms = cap, remaining, until_ms
    return lease


def leased(engine: Engine, one: Inquiry, caps: Mapping[str, int], **when: Any) -> list[Lease]:
    """Asks once, so that the leases exist, and fills those of the given limit keys. All leases of the tenant."""
    outcome(engine, one, **when)
    held = engine.leases.of(one.tenant)
    for lease in held.all():
        if lease.limit_key in caps:
            grant(lease, caps[lease.limit_key])
    return list(held.all())
