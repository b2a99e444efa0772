"""Decisions by the engine alone: one bundle, licenses put in by hand, and quotas that nobody else draws on.

What ``licet policy test`` and ``licet policy simulate`` ask, through ``licet_sidecar.evaluate``. The decision is the
engine's; only where a sidecar would lease units from Redis, here the whole quota is at hand. Pure: time comes in as
an argument, and may be any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from licet.domain.catalog import Catalog, License
from licet.domain.entitlements import RATE_SCALE
from licet.domain.ids import UNITS_MAX
from licet.domain.outcomes import Effect
from licet_sidecar.core.decision import Decision, LeaseWait
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.lease import TOKENS_EACH, Kind, Lease, RateShare
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.rules import Traced, trace_rules
from licet_sidecar.core.tenant import BoundLimit, Tenant, bind_action, scope_of

_FOREVER_MS: Final = 2**62
_OTHERS_MAX: Final = 64
"""Quotas of other windows kept for a tenant: what is asked may be a little out of order."""
_ROUNDS_MAX: Final = 4
"""A decision that waits is made again once all that it lacks is there."""


class UnknownLimit(ValueError):
    """The license has no such limit; the arguments are its key and the keys there are."""


@dataclass(frozen=True, slots=True)
class QuotaUsed:
    """One quota after a decision. ``amount``, ``used`` and ``remaining``: units, or nanos of a budget."""

    limit: str
    amount: int
    used: int
    remaining: int
    overage: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A decision, the quotas it looked at, and, when asked for, what each rule said."""

    decision: Decision
    quotas: list[QuotaUsed]
    rules: list[Traced] = field(default_factory=list)


class Evaluator:
    """One bundle in force. Not for use from two threads."""

    def __init__(self, catalog: Catalog, *, observe: bool = False) -> None:
        self._rulebook = Rulebook(catalog, generation=1, revision=1, observe=observe)
        self._engine = self._new_engine()

    @property
    def rulebook(self) -> Rulebook:
        """The bundle, bound to its actions."""
        return self._rulebook

    def begin(self, license_: License | None) -> None:
        """Forgets all licenses and everything used; then there is at most this license."""
        self._engine = self._new_engine()
        if license_ is not None:
            self._engine.install_license(Tenant(license_, generation=1, revision=1, document=b""))

    def use(self, tenant: str, limit_key: str, units: int, who: Inquiry, now_us: int) -> None:
        """Counts ``units`` as used of a limit or grant in its window at ``now_us``; scopes are read from ``who``.

        Raises:
            UnknownLimit: the license has none with that key.
        """
        limits = self._limits(tenant)
        if limit_key not in limits:
            raise UnknownLimit(limit_key, sorted(limits))
        limit = limits[limit_key]
        held = self._engine.leases.of(tenant)
        scope = scope_of(limit.scope, who, who.context) if limit.scope else ""
        window = limit.window_at(now_us // 1_000_000)
        lease = self._engine.leases.lease(held, limit.key, scope, *window, limit.terms, now_us // 1_000)
        self._fill(lease, now_us // 1_000)
        if isinstance(lease, RateShare):
            lease.take(units, now_us // 1_000)
        else:
            lease.used += units

    def ask(self, inquiry: Inquiry, now_us: int, *, trace: bool = False) -> Evaluated:
        """Decides, and takes what an approval takes, unless the inquiry only peeks.

        Raises:
            InvalidInquiry: the request does not fit the action it names.
        """
        engine, boot_ms = self._engine, now_us // 1_000
        engine.as_of_us = now_us
        if inquiry.tenant not in engine.tenants:
            engine.install_absence(inquiry.tenant, boot_ms)
        for round_ in range(_ROUNDS_MAX):
            outcome = engine.decide(inquiry, now_us=now_us, boot_ms=boot_ms, patient=round_ < _ROUNDS_MAX - 1)
            if isinstance(outcome, Decision):
                break
            if isinstance(outcome, LeaseWait):
                for lease, _ in outcome.needs:
                    self._fill(lease, boot_ms)
        assert isinstance(outcome, Decision), "an impatient decision never waits"
        if not inquiry.peek:
            if outcome.effect is Effect.APPROVED:
                for lease, units in outcome.spends:
                    LeaseBook.spend(lease, units, boot_ms)
                for share, units in outcome.rates:
                    share.take(units, boot_ms)
            for lease, units in outcome.counted:
                if not isinstance(lease, RateShare):
                    LeaseBook.spend(lease, units, boot_ms)
                elif not lease.take_what_is_there(units, boot_ms):
                    self._fill(lease, boot_ms)
        taken = dict.fromkeys(lease for lease, _ in (*outcome.spends, *outcome.counted))
        quotas = [_used(lease, outcome.overage.get(lease.quota, 0)) for lease in taken]
        quotas += [_used(share, 0) for share, _ in outcome.rates]
        self._forget_old_windows(inquiry.tenant)
        return Evaluated(outcome, quotas, self._trace(inquiry, now_us) if trace else [])

    def _new_engine(self) -> Engine:
        engine = Engine(LeaseBook(1), tenants_max=1_000, staleness_us_max=_FOREVER_MS)
        engine.install_bundle(self._rulebook)
        return engine

    def _trace(self, inquiry: Inquiry, now_us: int) -> list[Traced]:
        tenant, bound = self._engine.tenants.get(inquiry.tenant), self._rulebook.action(inquiry.action)
        if tenant is None or bound is None or inquiry.prepared_for is not bound:
            return []
        return trace_rules(bound, tenant.license, inquiry, now_us)

    def _limits(self, tenant: str) -> Mapping[str, BoundLimit]:
        """Every limit and grant of a tenant's license, by key."""
        found = self._engine.tenants.get(tenant)
        if found is None:
            return {}
        nothing = Inquiry(tenant, "-")
        self._engine.decide(nothing, now_us=0, boot_ms=0, patient=False)  # binds the license to the bundle
        limits: dict[str, BoundLimit] = {}
        for feature, granted in found.entitlements.items():
            for limit in granted.limits:
                own = BoundLimit.with_grants(feature, limit, granted, found.license)
                limits |= {pool.key: pool for pool in own.pools or (own,)}
        # The same terms as the actions', or a lease would be taken for one of a limit that was changed.
        for name in self._rulebook.catalog.actions:
            bound = self._rulebook.action(name)
            if bound is None:
                continue
            plan = found.actions.setdefault(name, bind_action(found, bound))
            for limit_ in plan.all_limits:
                limits |= {pool.key: pool for pool in limit_.pools or (limit_,)}
        return limits

    @staticmethod
    def _fill(lease: Lease, boot_ms: int) -> None:
        """Nobody else holds anything: all of the quota is here, and that is known."""
        is_new = lease.hold_until_ms != _FOREVER_MS
        lease.hold_until_ms = lease.short_until_ms = _FOREVER_MS
        lease.remaining = lease.idle_elsewhere = 0
        lease.heard_ms = 1
        if not is_new:
            return
        if isinstance(lease, RateShare):
            lease.cap = lease.amount
            lease.tokens = lease.burst * TOKENS_EACH
            lease.filled_ms = boot_ms
            lease.since_ms = -_FOREVER_MS
        elif lease.kind is Kind.SOFT:
            lease.cap = UNITS_MAX
            lease.over = UNITS_MAX - lease.amount
        else:
            lease.cap = lease.amount

    def _forget_old_windows(self, tenant: str) -> None:
        held = self._engine.leases.tenants.get(tenant)
        if held is None or len(held.others) <= _OTHERS_MAX:
            return
        for lease in sorted(held.others.values(), key=lambda lease: lease.end)[: len(held.others) - _OTHERS_MAX]:
            del held.others[lease.quota]


def _used(lease: Lease, overage: int) -> QuotaUsed:
    if isinstance(lease, RateShare):
        return QuotaUsed(lease.limit_key, lease.amount // RATE_SCALE, 0, lease.tokens // TOKENS_EACH, 0)
    return QuotaUsed(
        lease.limit_key, lease.amount, lease.used, max(0, lease.amount - lease.used - lease.reserved), overage
    )
