"""Limits beyond the plain one: rates, budgets, soft limits, grants, and what happens when nothing can be leased."""

from __future__ import annotations

from dataclasses import replace

import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Entitlement,
    Grant,
    License,
    Limit,
    OnExceeded,
    OnUnavailable,
    Plan,
    UnavailableMode,
)
from licet.domain.ids import LimitKey
from licet.domain.money import Price
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Anchor, Period
from licet.wire.names import scope_digest
from licet.wire.registers import Pair
from licet_sidecar.core.decision import BucketWait, LeaseWait
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.lease import Lease, RateShare
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.rulebook import Rulebook
from tests.support.engine import (
    BOOT_MS,
    NOW_S,
    NOW_US,
    decided,
    engine_with,
    grant,
    inquiry,
    leased,
    outcome,
)
from tests.support.published import catalog, limit

ACME = License("acme", "pro", starts_s=NOW_S - 1_000)
MONTH = LimitKey("reports:month")


def plan_with(*limits: Limit, on_unavailable: OnUnavailable | None = None, price: Price | None = None) -> Catalog:
    action = Action(
        "report.export",
        {"": "reports"},
        {"model": Attribute(AttributeType.STRING, "")},
        on_unavailable=on_unavailable or OnUnavailable(),
    )
    return catalog(action, Plan("pro", {"reports": Entitlement(price=price, limits=limits)}))


# Soft limits


def soft(amount: int) -> Limit:
    return replace(limit(amount), on_exceeded=OnExceeded.OVERAGE)


def test_what_lies_beyond_a_soft_limit_is_marked_and_split() -> None:
    engine = engine_with(plan_with(soft(10)), ACME)
    (lease,) = leased(engine, inquiry(), {MONTH: 14})
    lease.over, lease.used = 4, 8
    assert decided(engine, inquiry(quantity=2)).overage == {}
    decision = decided(engine, inquiry(quantity=5))
    assert (decision.effect, decision.reason) == (Effect.APPROVED, Reason.OVERAGE)
    assert (decision.spends, decision.overage) == ([(lease, 5)], {lease.quota: 3})


def test_a_soft_limit_is_never_exhausted() -> None:
    engine = engine_with(plan_with(soft(10)), ACME)
    (lease,) = leased(engine, inquiry(), {MONTH: 0})
    lease.short_until_ms = BOOT_MS + 250
    assert outcome(engine, inquiry(quantity=1_000)) == LeaseWait("acme", ((lease, 1_000),))


# Approval


def test_a_limit_may_ask_for_an_approval() -> None:
    engine = engine_with(plan_with(replace(limit(10), on_exceeded=OnExceeded.REQUIRE_APPROVAL)), ACME)
    decision = decided(engine, inquiry(quantity=11))
    assert (decision.effect, decision.reason, decision.rule) == (Effect.PENDING, Reason.APPROVAL_REQUIRED, MONTH)
    assert decision.spends[0][1] == 0


# Budgets


PRICE = Price(8_000_000_000, 1_000_000, "USD", "context.model", {"large": 15_000_000_000})
BUDGET = replace(limit(10**9), key=LimitKey("reports:month.usd"), currency="USD")


@pytest.mark.parametrize(("model", "nanos"), [("", 24_000), ("large", 45_000)])
def test_a_budget_is_spent_at_the_price(model: str, nanos: int) -> None:
    engine = engine_with(plan_with(BUDGET, price=PRICE), ACME)
    (lease,) = leased(engine, inquiry(), {BUDGET.key: 10**6})
    decision = decided(engine, inquiry(quantity=3, context={"model": model}))
    assert (decision.reason, decision.spends) == (Reason.OK, [(lease, nanos)])


def test_what_a_budget_is_charged_is_never_less_than_the_cost() -> None:
    thirds = Price(1, 3, "USD")
    assert [thirds.charge_nanos(units) for units in (0, 1, 2, 3, 4)] == [0, 1, 1, 1, 2]


def test_a_budget_that_is_used_up_is_told_in_money() -> None:
    engine = engine_with(plan_with(BUDGET, price=PRICE), ACME)
    decision = decided(engine, inquiry(quantity=125_001))
    assert decision.reason is Reason.QUOTA_EXHAUSTED
    assert "1.000008 USD of reports were asked; the budget of 1.00 USD per month has 1.00 left" in decision.message


def test_a_charge_that_cannot_be_counted_is_too_much() -> None:
    engine = engine_with(plan_with(replace(BUDGET, on_exceeded=OnExceeded.OVERAGE), price=PRICE), ACME)
    assert decided(engine, inquiry(quantity=2**50)).reason is Reason.QUOTA_EXHAUSTED


# Windows of the license


def test_windows_may_follow_the_license() -> None:
    engine = engine_with(plan_with(replace(limit(10, Period.DAY), anchor=Anchor.LICENSE)), ACME)
    (lease,) = leased(engine, inquiry(), {})
    assert (lease.start, lease.end) == (ACME.starts_s, ACME.starts_s + 86_400)
    following = engine.window_after("acme", lease)
    assert following == (lease.end, lease.end + 86_400)


def test_a_term_is_one_window_whose_end_may_move() -> None:
    engine = engine_with(plan_with(limit(10, Period.TERM)), replace(ACME, ends_s=NOW_S + 100))
    (lease,) = leased(engine, inquiry(), {})
    assert (lease.start, lease.end) == (ACME.starts_s, NOW_S + 100)
    assert engine.window_after("acme", lease) is None
    renewed = engine_with(plan_with(limit(10, Period.TERM)), replace(ACME, ends_s=NOW_S + 900))
    engine.install_license(renewed.tenants["acme"])
    assert leased(engine, inquiry(), {}) == [lease]
    assert lease.end == NOW_S + 900


# Rates


def rate(amount: int, burst: int = 0) -> Limit:
    return replace(limit(amount, Period.SECOND), burst=burst)


def share_of(engine: Engine, milli: int, at_ms: int = BOOT_MS) -> RateShare:
    waiting = outcome(engine, inquiry(), boot_ms=at_ms)
    assert isinstance(waiting, LeaseWait)
    ((share, units),) = waiting.needs
    assert isinstance(share, RateShare)
    assert units == 1
    share.granted(milli, at_ms + 60_000, at_ms)
    return share


def taken(engine: Engine, at_ms: int, quantity: int = 1) -> bool:
    decision = decided(engine, inquiry(quantity=quantity), boot_ms=at_ms, patient=False)
    for share, units in decision.rates if decision.effect is Effect.APPROVED else ():
        share.take(units, at_ms)
    assert decision.effect is Effect.APPROVED or decision.reason is Reason.RATE_LIMITED
    return decision.effect is Effect.APPROVED


def test_a_new_share_is_empty_and_a_check_waits_for_it_to_fill() -> None:
    engine = engine_with(plan_with(rate(10)), ACME)
    share_of(engine, 10_000)
    assert outcome(engine, inquiry()) == BucketWait(100)
    assert taken(engine, BOOT_MS + 100)


def test_a_share_refills_at_its_rate_up_to_its_burst() -> None:
    engine = engine_with(plan_with(rate(10, burst=4)), ACME)
    share_of(engine, 5_000)  # half of the rate has half of the burst
    at_ms = BOOT_MS + 10_000
    assert [taken(engine, at_ms) for _ in range(3)] == [True, True, False]
    assert not taken(engine, at_ms + 199)
    assert taken(engine, at_ms + 200)


def test_too_fast_is_told_when_to_come_again() -> None:
    engine = engine_with(plan_with(rate(10, burst=4)), ACME)
    share_of(engine, 10_000)
    assert taken(engine, BOOT_MS + 5_000, 4)
    decision = decided(engine, inquiry(quantity=3), boot_ms=BOOT_MS + 5_000)
    assert (decision.effect, decision.reason, decision.rule) == (
        Effect.DENIED,
        Reason.RATE_LIMITED,
        "reports:second.rate",
    )
    assert decision.retry_after_s == 0.3


def test_more_than_the_burst_is_never_there() -> None:
    decision = decided(engine_with(plan_with(rate(10, burst=4)), ACME), inquiry(quantity=5))
    assert (decision.reason, decision.retry_after_s) == (Reason.RATE_LIMITED, 0)


def test_what_a_rate_denies_it_explains() -> None:
    engine = engine_with(plan_with(rate(10, burst=4)), ACME)
    assert "can never be approved at once" in decided(engine, inquiry(quantity=5)).message
    share_of(engine, 10_000)
    assert taken(engine, BOOT_MS + 5_000, 3)
    message = decided(engine, inquiry(quantity=3), boot_ms=BOOT_MS + 5_000).message
    assert "10 a second are allowed, 4 at once after a pause, and 1 are saved up here" in message


def test_a_rate_of_nothing_denies_at_once() -> None:
    decision = decided(engine_with(plan_with(rate(0, burst=5)), ACME), inquiry())
    assert (decision.effect, decision.reason, decision.retry_after_s) == (Effect.DENIED, Reason.RATE_LIMITED, 0)
    assert "none can be approved" in decision.message


def test_subjects_are_told_apart_whatever_their_names() -> None:
    engine = engine_with(plan_with(limit(10, scope=("subject",))), ACME)
    for type_, id_ in (("a/b", "c"), ("a", "b/c"), ("a%2Fb", "c"), ("", "a/b/c")):
        outcome(engine, inquiry(subject_type=type_, subject_id=id_))
    assert len(engine.leases.of("acme").leases) == 4


def test_a_plain_subject_has_the_scope_it_always_had() -> None:
    engine = engine_with(plan_with(limit(10, scope=("subject",))), ACME)
    outcome(engine, inquiry(subject_type="user", subject_id="a/b%"))
    ((_, scope),) = engine.leases.of("acme").leases
    assert scope == scope_digest(("user/a/b%",))


def test_a_share_whose_hold_is_over_holds_nothing() -> None:
    engine = engine_with(plan_with(rate(10)), ACME)
    share_of(engine, 10_000)
    assert isinstance(outcome(engine, inquiry(), boot_ms=BOOT_MS + 60_000), LeaseWait)


def test_a_rate_beside_a_quota_takes_both_or_none() -> None:
    engine = engine_with(plan_with(limit(100), rate(10)), ACME)
    waiting = outcome(engine, inquiry())
    assert isinstance(waiting, LeaseWait)
    (lease, _), (share, _) = waiting.needs
    assert isinstance(share, RateShare)
    grant(lease, 50)
    share.granted(10_000, BOOT_MS + 60_000, BOOT_MS)
    assert decided(engine, inquiry(), patient=False).reason is Reason.RATE_LIMITED
    decision = decided(engine, inquiry(), boot_ms=BOOT_MS + 1_000)
    assert (decision.spends, decision.rates) == ([(lease, 1)], [(share, 1)])


# Grants


def topped_up(*grants: Grant, allowance: Limit | None = None) -> tuple[Engine, dict[str, Lease]]:
    """An engine whose leases, by limit key, exist and hold nothing."""
    engine = engine_with(plan_with(allowance or limit(100)), replace(ACME, grants=grants))
    while True:
        waiting = outcome(engine, inquiry(quantity=10**6))
        held = {lease.limit_key: lease for lease in engine.leases.of("acme").all()}
        unknown = [lease for lease in held.values() if not lease.short_until_ms]
        for lease in unknown:
            lease.remaining, lease.short_until_ms = 0, BOOT_MS + 250
        if not unknown:
            assert isinstance(waiting, LeaseWait) is (allowance is not None)
            return engine, dict(held)


def top_up(id_: str, amount: int = 50, *, priority: int = 100, starts: int = -10, ends: int = 1_000) -> Grant:
    return Grant(id_, MONTH, amount, NOW_S + starts, NOW_S + ends, priority)


def spread(engine: Engine, quantity: int) -> list[tuple[str, int]]:
    return [(lease.limit_key, units) for lease, units in decided(engine, inquiry(quantity=quantity)).spends]


def test_grants_are_used_after_the_allowance_in_order() -> None:
    engine, held = topped_up(top_up("b", ends=2_000), top_up("a", ends=1_000), top_up("first", priority=5))
    for key, cap in {MONTH: 3, f"{MONTH}+first": 4, f"{MONTH}+a": 5, f"{MONTH}+b": 6}.items():
        grant(held[key], cap)
    assert spread(engine, 3) == [(MONTH, 3)]
    assert spread(engine, 15) == [(MONTH, 3), (f"{MONTH}+first", 4), (f"{MONTH}+a", 5), (f"{MONTH}+b", 3)]
    assert decided(engine, inquiry(quantity=19)).reason is Reason.QUOTA_EXHAUSTED


def test_a_grant_may_come_before_the_allowance() -> None:
    engine, held = topped_up(top_up("trial", priority=-1))
    grant(held[MONTH], 10)
    grant(held[f"{MONTH}+trial"], 4)
    assert spread(engine, 6) == [(MONTH, 2), (f"{MONTH}+trial", 4)]


def test_grants_count_only_while_they_last() -> None:
    engine, held = topped_up(top_up("over", starts=-100, ends=-1), top_up("later", starts=10))
    assert set(held) == {MONTH}
    assert decided(engine, inquiry(quantity=101)).reason is Reason.QUOTA_EXHAUSTED


def test_what_is_left_of_the_allowance_is_leased_together_with_the_grant() -> None:
    engine, held = topped_up(top_up("more"))
    allowance, more = held[MONTH], held[f"{MONTH}+more"]
    allowance.remaining, more.short_until_ms = 7, 0
    assert outcome(engine, inquiry(quantity=10)) == LeaseWait("acme", ((allowance, 7), (more, 3)))


def test_an_allowance_known_to_be_used_up_is_not_asked_for_again_and_again() -> None:
    engine, held = topped_up(top_up("more"))
    allowance, more = held[MONTH], held[f"{MONTH}+more"]
    grant(more, 50)
    allowance.short_until_ms, allowance.heard_ms, allowance.remaining = 0, BOOT_MS - 5_000, 0
    assert spread(engine, 1) == [(MONTH, 0), (f"{MONTH}+more", 1)]
    allowance.heard_ms = BOOT_MS - 60_000
    assert outcome(engine, inquiry()) == LeaseWait("acme", ((allowance, 1),))


@pytest.mark.parametrize("amount", [1_000, 100, 50])
def test_a_changed_allowance_is_asked_for_again_though_it_was_used_up(amount: int) -> None:
    # Also when the amount is the same: the limit may have been away meanwhile, and then nothing was left of it.
    engine, held = topped_up(top_up("more"))
    allowance, more = held[MONTH], held[f"{MONTH}+more"]
    for lease in (allowance, more):
        lease.heard_ms, lease.remaining, lease.short_until_ms = BOOT_MS - 100, 0, BOOT_MS + 100
    assert decided(engine, inquiry()).reason is Reason.QUOTA_EXHAUSTED
    engine.install_bundle(Rulebook(plan_with(limit(amount)), generation=1, revision=2, observe=False))
    assert outcome(engine, inquiry()) == LeaseWait("acme", ((allowance, 1),))


def test_beyond_a_soft_limit_and_its_grants_is_overage_of_the_limit() -> None:
    engine, held = topped_up(top_up("more"), allowance=soft(100))
    grant(held[f"{MONTH}+more"], 5)
    waiting = outcome(engine, inquiry(quantity=20))
    assert waiting == LeaseWait("acme", ((held[MONTH], 15),))


# When nothing can be leased


def alone(on_unavailable: OnUnavailable) -> tuple[Engine, Lease]:
    engine = engine_with(plan_with(limit(100), on_unavailable=on_unavailable), ACME)
    (lease,) = leased(engine, inquiry(), {MONTH: 0})
    return engine, lease


def without_lease(engine: Engine, quantity: int, now_us: int = NOW_US) -> Reason:
    decision = decided(engine, inquiry(quantity=quantity), patient=False, now_us=now_us)
    if decision.effect is Effect.APPROVED:
        assert decision.degraded
        for lease, units in decision.spends:
            LeaseBook.overdraw(lease, units, BOOT_MS)
            LeaseBook.spend(lease, units, BOOT_MS)
    return decision.reason


def test_capped_allows_so_many_units_of_each_quota() -> None:
    engine, lease = alone(OnUnavailable(UnavailableMode.CAPPED, units_max=5))
    assert [without_lease(engine, units) for units in (3, 3, 2, 1)] == [
        Reason.DEGRADED_ALLOW,
        Reason.DEGRADED_DENY,
        Reason.DEGRADED_ALLOW,
        Reason.DEGRADED_DENY,
    ]
    assert (lease.used, lease.degraded, lease.cap) == (5, 5, 0)


def test_last_known_goes_by_what_was_left_for_so_long() -> None:
    engine, lease = alone(OnUnavailable(UnavailableMode.LAST_KNOWN, for_s_max=60))
    lease.remaining, lease.pair = 5, Pair(1, "run")
    assert without_lease(engine, 6) is Reason.DEGRADED_DENY
    assert without_lease(engine, 4) is Reason.DEGRADED_ALLOW
    assert without_lease(engine, 2) is Reason.DEGRADED_DENY
    assert without_lease(engine, 1, NOW_US + 61_000_000) is Reason.DEGRADED_DENY


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (OnUnavailable(), Reason.STALE_POLICY),
        (OnUnavailable(UnavailableMode.ALLOW), Reason.OK),
        (OnUnavailable(UnavailableMode.CAPPED, units_max=5), Reason.OK),
        (OnUnavailable(UnavailableMode.LAST_KNOWN, for_s_max=600), Reason.OK),
        (OnUnavailable(UnavailableMode.LAST_KNOWN, for_s_max=300), Reason.STALE_POLICY),
    ],
)
def test_the_action_says_whether_stale_state_may_decide(mode: OnUnavailable, reason: Reason) -> None:
    engine, lease = alone(mode)
    engine.as_of_us = NOW_US - 301_000_000
    grant(lease, 10)
    decision = decided(engine, inquiry())
    assert (decision.reason, decision.stale) == (reason, True)


def test_what_was_approved_without_a_lease_is_told_to_redis_beyond_the_limit() -> None:
    book = LeaseBook(1)
    held = book.of("acme")
    engine, lease = alone(OnUnavailable(UnavailableMode.ALLOW))
    engine.leases.tenants["acme"] = held
    held.leases[(lease.limit_key, "")] = lease
    grant(lease, 3, until_ms=BOOT_MS + 60_000)
    lease.used = 2
    LeaseBook.overdraw(lease, 6, BOOT_MS)
    LeaseBook.spend(lease, 6, BOOT_MS)
    assert (lease.used, lease.degraded, lease.free) == (8, 5, -5)
    book.need(held, lease, 2)
    call = book.begin_call(held, revision=1, boot_ms=BOOT_MS)
    assert call is not None
    assert (call.asks[0].used, call.asks[0].cap, call.asks[0].min) == (8, 3, 2)
