"""The order of a decision, as tables: what is wrong earlier in it is what is answered."""

from __future__ import annotations

from typing import Any

import pytest

from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Entitlement,
    Feature,
    Flag,
    License,
    LicenseStatus,
    OnUnavailable,
    Plan,
    Policy,
    Role,
    Rule,
    RuleEffect,
    UnavailableMode,
)
from licet.domain.flags import bucket_of, includes
from licet.domain.money import NANOS, Price
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Period
from licet_sidecar.core.decision import LeaseWait, LoadWait
from licet_sidecar.core.engine import ABSENT_MS, ABSENT_TENANTS_MAX, BOUND_ACTIONS_MAX, Engine
from licet_sidecar.core.inquiry import InvalidInquiry, TimestampUs
from tests.support.engine import (
    BOOT_MS,
    NOW_S,
    NOW_US,
    STALENESS_US_MAX,
    decided,
    engine_with,
    grant,
    inquiry,
    leased,
    outcome,
)
from tests.support.published import catalog, limit

ACME = License("acme", "pro")
GONE = License("acme", "pro", LicenseStatus.CANCELED)
SUSPENDED = License("acme", "pro", LicenseStatus.SUSPENDED)
ENDED = License("acme", "pro", ends_s=NOW_S)
LATER = License("acme", "pro", starts_s=NOW_S + 60)
FREE = License("acme", "free")

OFF = Flag("off", "reports", percent=0.0)
PERSONAL = Flag("personal", "reports", percent=0.0, by="subject")
ANALYST = Role("analyst", ("report.*",))
DENY = Policy("p", ("*",), (Rule("no", RuleEffect.DENY),))
BROKEN = Policy("p", ("*",), (Rule("broken", RuleEffect.DENY, "1 / quantity > 0"),))
ASK = Policy("p", ("*",), (Rule("ask", RuleEffect.REQUIRE_APPROVAL, approval="boss"),))
ONE_A_MONTH = Plan("pro", {"reports": Entitlement(limits=(limit(1),))})
OPEN = Action("report.export", {"": "reports"}, on_unavailable=OnUnavailable(UnavailableMode.ALLOW))

STALE = {"now_us": NOW_US + STALENESS_US_MAX + 1}
NOTHING: dict[str, Any] = {}

# Each row has one thing more wrong than the next; the first thing wrong in the order is answered.
TABLE: list[tuple[str, list[Any], License, dict[str, Any], dict[str, Any], Effect, Reason, str]] = [
    ("canceled", [OFF, ANALYST, DENY, ONE_A_MONTH], GONE, NOTHING, STALE, Effect.DENIED, Reason.NO_LICENSE, ""),
    ("not begun", [OFF, ANALYST, DENY, ONE_A_MONTH], LATER, NOTHING, NOTHING, Effect.DENIED, Reason.NO_LICENSE, ""),
    ("suspended", [OFF, ANALYST, DENY], SUSPENDED, NOTHING, STALE, Effect.DENIED, Reason.TENANT_SUSPENDED, ""),
    ("ended", [OFF, ANALYST, DENY, ONE_A_MONTH], ENDED, NOTHING, STALE, Effect.DENIED, Reason.LICENSE_EXPIRED, ""),
    ("ended, unknown action", [], ENDED, {"action": "x"}, NOTHING, Effect.DENIED, Reason.LICENSE_EXPIRED, ""),
    ("unknown action", [DENY], ACME, {"action": "x"}, NOTHING, Effect.DENIED, Reason.UNKNOWN_ACTION, ""),
    ("stale", [OFF, ANALYST, DENY, ONE_A_MONTH], FREE, NOTHING, STALE, Effect.DENIED, Reason.STALE_POLICY, ""),
    ("not entitled", [OFF, ANALYST, DENY, ONE_A_MONTH], FREE, NOTHING, NOTHING, Effect.DENIED, Reason.NOT_ENTITLED, ""),
    ("unknown plan", [], License("acme", "x"), NOTHING, NOTHING, Effect.DENIED, Reason.NOT_ENTITLED, ""),
    ("flag", [OFF, ANALYST, DENY, ONE_A_MONTH], ACME, NOTHING, NOTHING, Effect.DENIED, Reason.FEATURE_OFF, "off"),
    ("personal", [PERSONAL, ANALYST, DENY], ACME, NOTHING, NOTHING, Effect.DENIED, Reason.FEATURE_OFF, "personal"),
    ("role", [ANALYST, DENY], ACME, {"roles": ("cook",)}, NOTHING, Effect.DENIED, Reason.ROLE_REQUIRED, ""),
    ("deny", [DENY, ONE_A_MONTH], ACME, {"quantity": 2}, NOTHING, Effect.DENIED, Reason.POLICY_DENIED, "p/no"),
    ("error", [BROKEN, ONE_A_MONTH], ACME, {"quantity": 0}, NOTHING, Effect.DENIED, Reason.POLICY_ERROR, "p/broken"),
    ("approval", [ASK, ONE_A_MONTH], ACME, {"quantity": 2}, NOTHING, Effect.PENDING, Reason.APPROVAL_REQUIRED, "p/ask"),
    ("quota", [ONE_A_MONTH], ACME, {"quantity": 2}, NOTHING, Effect.DENIED, Reason.QUOTA_EXHAUSTED, "reports:month"),
    ("no lease", [ONE_A_MONTH], ACME, NOTHING, {"patient": False}, Effect.DENIED, Reason.DEGRADED_DENY, ""),
    ("open", [ONE_A_MONTH, OPEN], ACME, NOTHING, {"patient": False}, Effect.APPROVED, Reason.DEGRADED_ALLOW, ""),
    ("stale, open", [OPEN], ACME, NOTHING, STALE, Effect.APPROVED, Reason.OK, ""),
    ("all well", [ANALYST], ACME, {"roles": ("analyst",)}, NOTHING, Effect.APPROVED, Reason.OK, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("documents", "license_", "fields", "when", "effect", "reason", "rule"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_the_first_thing_wrong_is_answered(
    documents: list[Any],
    license_: License,
    fields: dict[str, Any],
    when: dict[str, Any],
    effect: Effect,
    reason: Reason,
    rule: str,
) -> None:
    decision = decided(engine_with(catalog(*documents), license_), inquiry(**fields), **when)
    assert (decision.effect, decision.reason, decision.rule) == (effect, reason, rule)
    assert decision.stale == (when is STALE)
    assert decision.degraded == (reason in (Reason.DEGRADED_ALLOW, Reason.DEGRADED_DENY))
    assert bool(decision.message) == (reason is not Reason.OK)


# The license


@pytest.mark.parametrize(
    ("starts_s", "ends_s", "reason"),
    [
        (0, 0, Reason.OK),
        (NOW_S, 0, Reason.OK),
        (NOW_S, NOW_S + 1, Reason.OK),
        (NOW_S + 1, 0, Reason.NO_LICENSE),
        (0, NOW_S, Reason.LICENSE_EXPIRED),
        (0, NOW_S + 1, Reason.OK),
        (NOW_S - 2, NOW_S - 1, Reason.LICENSE_EXPIRED),
    ],
)
def test_a_term_includes_its_start_and_not_its_end(starts_s: int, ends_s: int, reason: Reason) -> None:
    license_ = License("acme", "pro", starts_s=starts_s, ends_s=ends_s)
    assert decided(engine_with(catalog(), license_), inquiry()).reason is reason


@pytest.mark.parametrize("offset_us", [-1, 0, 999_999])
def test_a_term_ends_at_the_microsecond(offset_us: int) -> None:
    engine = engine_with(catalog(), License("acme", "pro", ends_s=NOW_S + 10))
    reason = decided(engine, inquiry(), now_us=(NOW_S + 10) * 1_000_000 + offset_us).reason
    assert reason is (Reason.OK if offset_us < 0 else Reason.LICENSE_EXPIRED)


def test_a_license_that_begins_later_says_when_to_ask_again() -> None:
    decision = decided(engine_with(catalog(), LATER), inquiry())
    assert decision.retry_after_s == 60


def test_a_tenant_that_is_not_here_is_loaded_first() -> None:
    assert outcome(engine_with(catalog()), inquiry()) == LoadWait("acme")


@pytest.mark.parametrize(
    ("documents", "action", "effect", "reason"),
    [
        ([], "report.export", Effect.DENIED, Reason.DEGRADED_DENY),
        ([OPEN], "report.export", Effect.APPROVED, Reason.DEGRADED_ALLOW),
        ([], "x", Effect.DENIED, Reason.UNKNOWN_ACTION),
    ],
)
def test_a_tenant_that_cannot_be_loaded_is_the_actions_to_decide(
    documents: list[Any], action: str, effect: Effect, reason: Reason
) -> None:
    decision = decided(engine_with(catalog(*documents)), inquiry(action=action, quantity=3), patient=False)
    assert (decision.effect, decision.reason, decision.spends) == (effect, reason, [])
    assert dict(decision.units) == ({"reports": 3} if action != "x" else {})


def test_an_absence_is_answered_until_it_is_forgotten() -> None:
    engine = engine_with(catalog())
    engine.install_absence("acme", BOOT_MS)
    assert decided(engine, inquiry()).reason is Reason.NO_LICENSE
    assert decided(engine, inquiry(), boot_ms=BOOT_MS + ABSENT_MS - 1).reason is Reason.NO_LICENSE
    assert outcome(engine, inquiry(), boot_ms=BOOT_MS + ABSENT_MS) == LoadWait("acme")
    engine.install_absence("acme", BOOT_MS)
    engine.forget_absence("acme")
    assert outcome(engine, inquiry()) == LoadWait("acme")


def test_absences_are_bounded() -> None:
    engine = engine_with(catalog())
    for number in range(ABSENT_TENANTS_MAX + 1):
        engine.install_absence(f"t{number}", BOOT_MS)
    assert outcome(engine, inquiry("t0")) == LoadWait("t0")
    assert decided(engine, inquiry("t1")).reason is Reason.NO_LICENSE


def test_an_absence_replaces_a_license() -> None:
    engine = engine_with(catalog(), ACME)
    engine.install_absence("acme", BOOT_MS)
    assert decided(engine, inquiry()).reason is Reason.NO_LICENSE


def test_the_least_recently_asked_makes_room() -> None:
    engine = engine_with(catalog(), *(License(name, "pro") for name in "abc"), tenants_max=3)
    decided(engine, inquiry("a"))
    evicted = engine.install_license(engine_with(catalog(), License("d", "pro")).tenants["d"])
    assert (evicted, list(engine.tenants)) == (["b"], ["c", "a", "d"])


# Entitlements


def test_an_addon_entitles() -> None:
    addon = Plan("extra", {"reports": Entitlement()})
    decision = decided(engine_with(catalog(addon), License("acme", "free", addons={"extra": 1})), inquiry())
    assert decision.reason is Reason.OK


@pytest.mark.parametrize(
    ("license_", "amount"),
    [
        (License("acme", "pro"), 10),
        (License("acme", "pro", addons={"extra": 2}), 10 + 2 * 5),
        (License("acme", "pro", overrides={"reports:month": 7}), 7),
        (License("acme", "pro", addons={"extra": 2}, overrides={"reports:month": 3}), 3),
        (License("acme", "pro", overrides={"reports:day": 3}), 10),
    ],
    ids=["plan", "addons", "override", "both", "other key"],
)
def test_limits_follow_from_plan_addons_and_overrides(license_: License, amount: int) -> None:
    content = catalog(
        Plan("pro", {"reports": Entitlement(limits=(limit(10),))}),
        Plan("extra", {"reports": Entitlement(limits=(limit(5),))}),
    )
    engine = engine_with(content, license_)
    assert decided(engine, inquiry(quantity=amount + 1)).reason is Reason.QUOTA_EXHAUSTED
    waiting = outcome(engine, inquiry(quantity=amount))
    assert isinstance(waiting, LeaseWait)
    assert [(lease.amount, units) for lease, units in waiting.needs] == [(amount, amount)]


def test_a_pushed_bundle_rebinds_every_tenant() -> None:
    engine = engine_with(catalog(), ACME)
    assert decided(engine, inquiry()).reason is Reason.OK
    engine.install_bundle(engine_with(catalog(DENY)).rulebook)  # type: ignore[arg-type]
    assert decided(engine, inquiry()).reason is Reason.POLICY_DENIED


def test_a_changed_license_counts_from_the_next_check() -> None:
    engine = engine_with(catalog(), ACME)
    decided(engine, inquiry())
    engine.install_license(engine_with(catalog(), FREE).tenants["acme"])
    assert decided(engine, inquiry()).reason is Reason.NOT_ENTITLED


def test_every_feature_of_an_action_must_be_entitled() -> None:
    action = Action("both", {"a": "reports", "b": "other"})
    decision = decided(engine_with(catalog(action), ACME), inquiry(action="both", quantities={"a": 1}))
    assert decision.reason is Reason.NOT_ENTITLED


# Flags and roles


def _included(flag: Flag, holder: str) -> bool:
    return includes(flag.percent, bucket_of(flag.name, holder))


@pytest.mark.parametrize("by", ["tenant", "subject"])
def test_a_rollout_reaches_about_its_share_and_always_the_same(by: str) -> None:
    flag = Flag("new", "reports", percent=20.0, by=by)
    names = [f"holder{number}" for number in range(2_000)]
    reached = {name for name in names if _included(flag, name)}
    assert 300 < len(reached) < 500
    assert reached == {name for name in names if _included(flag, name)}


def test_a_larger_rollout_keeps_those_it_had() -> None:
    names = [f"holder{number}" for number in range(500)]
    reached: set[str] = set()
    for percent in (0.0, 0.5, 5.0, 20.0, 60.0, 99.99, 100.0):
        now = {name for name in names if _included(Flag("new", "reports", percent), name)}
        assert reached <= now
        reached = now
    assert reached == set(names)


def test_two_rollouts_do_not_pick_the_same() -> None:
    names = [f"holder{number}" for number in range(500)]
    one, two = ({n for n in names if _included(Flag(flag, "reports", 50.0), n)} for flag in ("a", "b"))
    assert 50 < len(one & two) < 200


def test_a_rollout_by_tenant_decides_for_the_tenant() -> None:
    flag = Flag("new", "reports", percent=50.0)
    tenants = [f"t{number}" for number in range(40)]
    engine = engine_with(catalog(flag), *(License(name, "pro") for name in tenants))
    for name in tenants:
        reason = decided(engine, inquiry(name)).reason
        assert reason is (Reason.OK if _included(flag, name) else Reason.FEATURE_OFF)


def test_a_rollout_by_subject_decides_for_the_subject() -> None:
    flag = Flag("new", "reports", percent=50.0, by="subject")
    engine = engine_with(catalog(flag), ACME)
    for number in range(40):
        reason = decided(engine, inquiry(subject_id=f"s{number}")).reason
        assert reason is (Reason.OK if _included(flag, f"s{number}") else Reason.FEATURE_OFF)


def test_a_flag_of_another_feature_does_not_matter() -> None:
    assert decided(engine_with(catalog(Flag("off", "other", 0.0)), ACME), inquiry()).reason is Reason.OK


def test_a_decision_says_which_flags_it_was_subject_to() -> None:
    flags = (
        Flag("a-all", "reports"),
        Flag("b-mine", "reports", by="subject"),
        Flag("elsewhere", "other"),
    )
    assert decided(engine_with(catalog(*flags), ACME), inquiry()).exposures == {"a-all": "on", "b-mine": "on"}
    assert decided(engine_with(catalog(*flags), FREE), inquiry()).exposures == {}
    assert decided(engine_with(catalog(*flags), SUSPENDED), inquiry()).exposures == {}
    assert decided(engine_with(catalog(), ACME), inquiry()).exposures == {}


@pytest.mark.parametrize(
    ("flags", "exposures"),
    [
        ((OFF, Flag("on", "reports")), {"off": "off"}),
        ((Flag("before", "reports"), OFF, PERSONAL), {"before": "on", "off": "off"}),
        ((Flag("on", "reports"), PERSONAL), {"on": "on", "personal": "off"}),
    ],
)
def test_flags_are_exposed_up_to_the_one_that_denies(flags: tuple[Flag, ...], exposures: dict[str, str]) -> None:
    decision = decided(engine_with(catalog(*flags), ACME), inquiry())
    assert (decision.reason, decision.exposures) == (Reason.FEATURE_OFF, exposures)


@pytest.mark.parametrize(
    ("roles", "held", "allowed"),
    [
        ([], (), True),
        ([ANALYST], (), False),
        ([ANALYST], ("analyst",), True),
        ([ANALYST], ("cook", "analyst"), True),
        ([ANALYST, Role("admin", ("*",))], ("admin",), True),
        ([Role("cook", ("kitchen.*",))], (), True),
        ([Role("cook", ("kitchen.*",))], ("cook",), True),
        ([Role("exact", ("report.export",))], ("exact",), True),
        ([Role("prefix", ("report",))], (), True),
    ],
)
def test_an_action_that_roles_name_needs_one_of_them(roles: list[Role], held: tuple[str, ...], allowed: bool) -> None:
    reason = decided(engine_with(catalog(*roles), ACME), inquiry(roles=held)).reason
    assert reason is (Reason.OK if allowed else Reason.ROLE_REQUIRED)


# Age


def test_staleness_begins_past_the_bound() -> None:
    engine = engine_with(catalog(), ACME)
    assert not decided(engine, inquiry(), now_us=NOW_US + STALENESS_US_MAX).stale
    late = decided(engine, inquiry(), now_us=NOW_US + STALENESS_US_MAX + 1)
    assert (late.stale, late.reason) == (True, Reason.STALE_POLICY)


def test_a_clock_that_steps_back_makes_nothing_stale() -> None:
    assert not decided(engine_with(catalog(), ACME), inquiry(), now_us=NOW_US - 3_600_000_000).stale


# Observe mode


@pytest.mark.parametrize(
    ("documents", "effect", "reason"),
    [
        ([DENY], Effect.DENIED, Reason.POLICY_DENIED),
        ([ASK], Effect.PENDING, Reason.APPROVAL_REQUIRED),
        ([], Effect.APPROVED, Reason.OK),
    ],
)
def test_observing_keeps_the_real_decision_and_marks_what_would_be_denied(
    documents: list[Any], effect: Effect, reason: Reason
) -> None:
    decision = decided(engine_with(catalog(*documents), ACME, observe=True), inquiry())
    assert (decision.effect, decision.reason, decision.observed) == (effect, reason, effect is not Effect.APPROVED)


def test_observing_covers_tenants_without_a_license() -> None:
    engine = engine_with(catalog(), observe=True)
    engine.install_absence("acme", BOOT_MS)
    assert decided(engine, inquiry()).observed


# Context, meters and prices


TYPED = Action(
    "report.export",
    {"": "reports"},
    {
        "region": Attribute(AttributeType.STRING, "eu"),
        "size": Attribute(AttributeType.INT),
        "share": Attribute(AttributeType.DOUBLE, 0.5),
        "at": Attribute(AttributeType.TIMESTAMP),
    },
)


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ({}, {"region": "eu", "share": 0.5}),
        ({"region": "us", "size": 3}, {"region": "us", "size": 3, "share": 0.5}),
        ({"share": 2}, {"region": "eu", "share": 2.0}),
        ({"region": ""}, {"region": "", "share": 0.5}),
        ({"other": "x"}, {"region": "eu", "share": 0.5}),
        ({"at": TimestampUs(0)}, {"region": "eu", "share": 0.5, "at": 0}),
    ],
)
def test_declared_attributes_are_filled_in_and_others_dropped(sent: dict[str, Any], seen: dict[str, Any]) -> None:
    decision = decided(engine_with(catalog(TYPED), ACME), inquiry(context=sent))
    assert decision.context == seen


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({"region": 1}, "context.region"),
        ({"size": "1"}, "context.size"),
        ({"size": 1.0}, "context.size"),
        ({"size": True}, "context.size"),
        ({"size": 2**63}, "context.size"),
        ({"share": "1"}, "context.share"),
        ({"at": TimestampUs(253_402_300_800_000_000)}, "context.at"),
        ({"at": TimestampUs(-62_135_596_800_000_001)}, "context.at"),
    ],
)
def test_a_wrong_type_names_the_field(sent: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInquiry) as caught:
        outcome(engine_with(catalog(TYPED), ACME), inquiry(context=sent))
    assert caught.value.field == field


def test_a_wrong_type_is_malformed_also_for_an_ended_license() -> None:
    with pytest.raises(InvalidInquiry):
        outcome(engine_with(catalog(TYPED), ENDED), inquiry(context={"size": "1"}))


TWO = Action("llm", {"input": "in", "output": "out"})
SAME = Action("same", {"a": "in", "b": "in"})


@pytest.mark.parametrize(
    ("action", "fields", "units"),
    [
        ("report.export", {}, {"reports": 1}),
        ("report.export", {"quantity": 0}, {"reports": 0}),
        ("report.export", {"quantity": 7}, {"reports": 7}),
        ("report.export", {"quantities": {"": 4}}, {"reports": 4}),
        ("llm", {"quantities": {"input": 2, "output": 3}}, {"in": 2, "out": 3}),
        ("llm", {"quantities": {"output": 3}}, {"out": 3}),
        ("same", {"quantities": {"a": 2, "b": 3}}, {"in": 5}),
    ],
)
def test_units_are_counted_by_feature(action: str, fields: dict[str, Any], units: dict[str, int]) -> None:
    plan = Plan("pro", {"reports": Entitlement(), "in": Entitlement(), "out": Entitlement()})
    engine = engine_with(catalog(TWO, SAME, plan, Feature("in"), Feature("out")), ACME)
    assert decided(engine, inquiry(action=action, **fields)).units == units


@pytest.mark.parametrize(
    ("context", "cost_nanos"),
    [({}, 8 * NANOS), ({"model": "large"}, 80 * NANOS), ({"model": "unheard of"}, 8 * NANOS)],
)
def test_a_price_by_attribute_picks_its_amount(context: dict[str, Any], cost_nanos: int) -> None:
    price = Price(8 * NANOS, 1_000, "USD", "context.model", {"large": 80 * NANOS})
    content = catalog(
        Action("report.export", {"": "reports"}, {"model": Attribute(AttributeType.STRING)}),
        Plan("pro", {"reports": Entitlement(price)}),
    )
    decision = decided(engine_with(content, ACME), inquiry(quantity=1_000, context=context))
    assert (decision.cost_nanos, decision.currency) == (cost_nanos, "USD")
    assert decision.priced_as == ({"reports": "large"} if cost_nanos == 80 * NANOS else {})


def test_costs_of_several_meters_are_added() -> None:
    plan = Plan("pro", {"in": Entitlement(Price(NANOS, 1, "EUR")), "out": Entitlement(Price(3 * NANOS, 1, "EUR"))})
    decision = decided(
        engine_with(catalog(TWO, plan), ACME), inquiry(action="llm", quantities={"input": 2, "output": 5})
    )
    assert (decision.cost_nanos, decision.currency) == (17 * NANOS, "EUR")


# Bounds


def test_invented_actions_are_not_remembered_without_end() -> None:
    actions = [Action(f"a{number}", {"": "reports"}) for number in range(BOUND_ACTIONS_MAX + 10)]
    engine = engine_with(catalog(*actions), ACME)
    for action in actions:
        assert decided(engine, inquiry(action=action.name)).reason is Reason.OK
    decided(engine, inquiry(action="invented"))
    assert len(engine.tenants["acme"].actions) == BOUND_ACTIONS_MAX


# Quotas


def _limited(*limits: Any) -> Catalog:
    return catalog(Plan("pro", {"reports": Entitlement(limits=limits)}))


def test_a_lease_that_covers_is_spent_and_nothing_is_waited_for() -> None:
    engine = engine_with(_limited(limit(100)), ACME)
    (lease,) = leased(engine, inquiry(), {"reports:month": 10})
    decision = decided(engine, inquiry(quantity=10))
    assert (decision.reason, decision.spends) == (Reason.OK, [(lease, 10)])
    assert lease.used == 0  # deciding takes nothing


@pytest.mark.parametrize(("cap", "used", "reserved", "asked"), [(10, 10, 0, 1), (10, 0, 0, 11), (10, 4, 4, 3)])
def test_a_lease_that_does_not_cover_is_waited_for(cap: int, used: int, reserved: int, asked: int) -> None:
    engine = engine_with(_limited(limit(100)), ACME)
    (lease,) = leased(engine, inquiry(), {"reports:month": cap})
    lease.used, lease.reserved = used, reserved
    assert outcome(engine, inquiry(quantity=asked)) == LeaseWait("acme", ((lease, asked),))


def test_a_hold_that_ended_is_waited_for() -> None:
    engine = engine_with(_limited(limit(100)), ACME)
    (lease,) = leased(engine, inquiry(), {"reports:month": 10})
    assert decided(engine, inquiry(), boot_ms=lease.hold_until_ms - 1).reason is Reason.OK
    assert isinstance(outcome(engine, inquiry(), boot_ms=lease.hold_until_ms), LeaseWait)


def test_nothing_asked_needs_no_lease() -> None:
    assert decided(engine_with(_limited(limit(1)), ACME), inquiry(quantity=0)).reason is Reason.OK
    assert decided(engine_with(_limited(limit(0)), ACME), inquiry(quantity=0)).reason is Reason.OK


def test_more_than_the_limit_is_denied_without_asking() -> None:
    decision = decided(engine_with(_limited(limit(100)), ACME), inquiry(quantity=101))
    assert decision.reason is Reason.QUOTA_EXHAUSTED
    assert decision.retry_after_s > 0


def test_what_redis_said_lately_denies_without_asking() -> None:
    engine = engine_with(_limited(limit(100)), ACME)
    (lease,) = leased(engine, inquiry(), {"reports:month": 3})
    lease.remaining, lease.idle_elsewhere, lease.short_until_ms = 2, 1, BOOT_MS + 250
    assert isinstance(outcome(engine, inquiry(quantity=6)), LeaseWait)
    assert decided(engine, inquiry(quantity=7)).reason is Reason.QUOTA_EXHAUSTED
    assert isinstance(outcome(engine, inquiry(quantity=7), boot_ms=BOOT_MS + 250), LeaseWait)


def test_all_limits_must_have_room_and_none_is_touched_otherwise() -> None:
    engine = engine_with(_limited(limit(100), limit(5, Period.MINUTE)), ACME)
    month, minute = leased(engine, inquiry(), {"reports:month": 50, "reports:minute": 5})
    minute.used, minute.remaining, minute.short_until_ms = 5, 0, BOOT_MS + 250
    decision = decided(engine, inquiry())
    assert (decision.reason, decision.rule) == (Reason.QUOTA_EXHAUSTED, "reports:minute")
    assert decision.retry_after_s == minute.end - NOW_S
    assert (month.used, decision.spends) == (0, [(minute, 0)])


def test_all_leases_that_ran_dry_are_waited_for_together() -> None:
    engine = engine_with(_limited(limit(100), limit(50, Period.MINUTE), limit(70, Period.DAY)), ACME)
    month, minute, day = leased(engine, inquiry(), {"reports:minute": 9})
    assert outcome(engine, inquiry(quantity=5)) == LeaseWait("acme", ((month, 5), (day, 5)))
    assert minute.cap == 9


def test_a_limit_over_a_scope_counts_each_value_apart() -> None:
    engine = engine_with(_limited(limit(10, scope=("subject",))), ACME)
    ada, bob = ({"subject_type": "user", "subject_id": name} for name in ("ada", "bob"))
    (lease,) = leased(engine, inquiry(**ada), {"reports:month@subject": 10})
    assert decided(engine, inquiry(**ada)).spends == [(lease, 1)]
    waiting = outcome(engine, inquiry(**bob))
    assert isinstance(waiting, LeaseWait)
    ((other, _),) = waiting.needs
    assert other.quota != lease.quota
    robot = outcome(engine, inquiry(subject_type="robot", subject_id="ada"))
    assert isinstance(robot, LeaseWait)


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"team": "a"}, {"team": "a"}, True),
        ({"team": "a"}, {"team": "b"}, False),
        ({}, {"team": "none"}, True),
        ({"team": "a", "other": "x"}, {"team": "a", "other": "y"}, True),
    ],
)
def test_a_scope_over_the_context_takes_defaults_and_ignores_the_rest(
    one: dict[str, Any], two: dict[str, Any], same: bool
) -> None:
    action = Action("report.export", {"": "reports"}, {"team": Attribute(AttributeType.STRING, "none")})
    plan = Plan("pro", {"reports": Entitlement(limits=(limit(10, scope=("context.team",)),))})
    engine = engine_with(catalog(action, plan), ACME)
    waits = [outcome(engine, inquiry(context=context)) for context in (one, two)]
    assert (waits[0] == waits[1]) is same


def test_a_window_that_ended_gives_way_to_the_next() -> None:
    engine = engine_with(_limited(limit(100, Period.MINUTE)), ACME)
    (lease,) = leased(engine, inquiry(), {"reports:minute": 100})
    assert decided(engine, inquiry(), now_us=lease.end * 1_000_000 - 1).reason is Reason.OK
    waiting = outcome(engine, inquiry(), now_us=lease.end * 1_000_000)
    assert isinstance(waiting, LeaseWait)
    assert waiting.needs[0][0].start == lease.end


def test_a_lowered_limit_does_not_take_back_what_was_leased() -> None:
    engine = engine_with(_limited(limit(100)), ACME)
    (lease,) = leased(engine, inquiry(), {"reports:month": 50})
    lease.used = 40
    engine.install_bundle(engine_with(_limited(limit(20))).rulebook)  # type: ignore[arg-type]
    decision = decided(engine, inquiry(quantity=10))
    assert (decision.reason, lease.amount) == (Reason.OK, 20)


def test_each_feature_of_an_action_has_its_own_limits() -> None:
    plan = Plan(
        "pro",
        {
            "in": Entitlement(limits=(limit(10, feature="in"),)),
            "out": Entitlement(limits=(limit(5, feature="out"),)),
        },
    )
    engine = engine_with(catalog(TWO, plan), ACME)
    into, out = leased(
        engine, inquiry(action="llm", quantities={"input": 1, "output": 1}), {"in:month": 10, "out:month": 5}
    )
    decision = decided(engine, inquiry(action="llm", quantities={"input": 7, "output": 2}))
    assert decision.spends == [(into, 7), (out, 2)]
    short = decided(engine, inquiry(action="llm", quantities={"input": 7, "output": 6}))
    assert (short.reason, short.rule) == (Reason.QUOTA_EXHAUSTED, "out:month")


def test_an_unmetered_feature_takes_no_lease() -> None:
    decision = decided(engine_with(catalog(), ACME), inquiry(quantity=10**15))
    assert (decision.reason, decision.spends) == (Reason.OK, [])


def test_no_lease_of_several_leaves_the_others_untaken() -> None:
    engine = engine_with(_limited(limit(100), limit(50, Period.MINUTE)), ACME)
    leased(engine, inquiry(), {"reports:month": 100})
    decision = decided(engine, inquiry(), patient=False)
    assert (decision.reason, decision.spends) == (Reason.DEGRADED_DENY, [])


def test_leases_that_were_forgotten_are_made_anew() -> None:
    engine: Engine = engine_with(_limited(limit(100)), ACME)
    (lease,) = leased(engine, inquiry(), {"reports:month": 10})
    engine.leases.forget("acme")
    waiting = outcome(engine, inquiry())
    assert isinstance(waiting, LeaseWait)
    assert waiting.needs[0][0] is not lease
    grant(waiting.needs[0][0], 5)
    assert decided(engine, inquiry()).reason is Reason.OK


@pytest.mark.parametrize(
    ("offset_us", "reason", "marked"),
    [
        (-1, Reason.OK, False),
        (0, Reason.OK, True),
        (60_000_000 - 1, Reason.OK, True),
        (60_000_000, Reason.LICENSE_EXPIRED, False),
    ],
)
def test_a_license_in_its_grace_answers_and_says_until_when(offset_us: int, reason: Reason, marked: bool) -> None:
    engine = engine_with(catalog(), License("acme", "pro", ends_s=NOW_S, grace_s=60))
    decision = decided(engine, inquiry(), now_us=NOW_S * 1_000_000 + offset_us)
    assert (decision.reason, decision.grace_until_s) == (reason, NOW_S + 60 if marked else 0)
    assert ("answers until" in decision.message) == marked


def test_a_license_that_was_canceled_at_its_end_has_no_grace() -> None:
    engine = engine_with(catalog(), License("acme", "pro", ends_s=NOW_S, grace_s=60, cancels=True))
    assert decided(engine, inquiry()).reason is Reason.LICENSE_EXPIRED


def test_a_suspended_license_is_not_marked_as_in_its_grace() -> None:
    suspended = License("acme", "pro", status=LicenseStatus.SUSPENDED, ends_s=NOW_S, grace_s=60)
    decision = decided(engine_with(catalog(), suspended), inquiry())
    assert (decision.reason, decision.grace_until_s) == (Reason.TENANT_SUSPENDED, 0)
