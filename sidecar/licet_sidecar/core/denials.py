"""Decisions that need words: each says what was asked, what stands in its way, and when to come again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from licet.domain.approvals import Override, RequestEntry
from licet.domain.catalog import License, LicenseStatus, OnExceeded, UnavailableMode
from licet.domain.entitlements import RATE_SCALE
from licet.domain.ids import UNITS_MAX
from licet.domain.money import format_nanos
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import FOREVER_S, Window
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.lease import TOKENS_EACH, Lease, RateShare
from licet_sidecar.core.rulebook import BoundAction, Rulebook
from licet_sidecar.core.rules import approval_wanted
from licet_sidecar.core.tenant import BoundLimit, prepare


def license_problem(license_: License, now_us: int) -> Decision | None:
    """The denial by a license that is not in force; ``None`` when it is."""
    now_s = now_us // 1_000_000
    if license_.status is LicenseStatus.SUSPENDED:
        return Decision(Effect.DENIED, Reason.TENANT_SUSPENDED, f"The license of {license_.tenant} is suspended.")
    if license_.status is LicenseStatus.CANCELED:
        return Decision(Effect.DENIED, Reason.NO_LICENSE, f"The license of {license_.tenant} was canceled.")
    if now_s < license_.starts_s:
        starts = datetime.fromtimestamp(license_.starts_s, UTC).isoformat()
        problem = Decision(Effect.DENIED, Reason.NO_LICENSE, f"The license of {license_.tenant} starts at {starts}.")
        problem.retry_after_s = license_.starts_s - now_s
        return problem
    if license_.ends_s and now_s >= license_.stops_s:
        ended = datetime.fromtimestamp(license_.ends_s, UTC).isoformat()
        return Decision(Effect.DENIED, Reason.LICENSE_EXPIRED, f"The license of {license_.tenant} ended at {ended}.")
    return None


def in_grace(decision: Decision, license_: License) -> None:
    """Marks what a license answers although its term has ended."""
    decision.grace_until_s = license_.stops_s
    if not decision.message:
        ended, stops = (datetime.fromtimestamp(at, UTC).isoformat() for at in (license_.ends_s, license_.stops_s))
        decision.message = f"The license of {license_.tenant} ended at {ended} and answers until {stops}."


def unknown_action(inquiry: Inquiry) -> Decision:
    """No bundle has it."""
    return Decision(Effect.DENIED, Reason.UNKNOWN_ACTION, f"No action {inquiry.action} is published.")


def unavailable(bound: BoundAction, why: str) -> Decision:
    """What is missing cannot be had: the action's ``on_unavailable`` decides."""
    if bound.action.on_unavailable.mode is UnavailableMode.ALLOW:
        decision = Decision(Effect.APPROVED, Reason.DEGRADED_ALLOW, f"{why} The action allows that.")
    else:
        decision = Decision(Effect.DENIED, Reason.DEGRADED_DENY, f"{why} The action denies then.")
    decision.degraded = True
    return decision


def denied_by(override: Override, rulebook: Rulebook, inquiry: Inquiry) -> Decision:
    """Whoever the tenant is: its license is not looked at."""
    message = f"Denied by {override.rule} of {override.by}: {override.reason}."
    decision = Decision(Effect.DENIED, Reason.POLICY_DENIED, message, override.rule)
    decision.overridden = True
    bound = rulebook.action(inquiry.action)
    if bound is not None:
        prepare(bound, inquiry)
        decision.units, decision.context = inquiry.units, bound.recorded(inquiry.declared)
    return decision


def note_override(decision: Decision, override: Override, lifted: Decision) -> None:
    """Says which override allowed it, and what would have been answered without."""
    said = f"Allowed by {override.rule} of {override.by}: {override.reason}. Otherwise: {lifted.message}"
    decision.rule, decision.message = override.rule, f"{said} {decision.message}".rstrip()


def note_approvals(decision: Decision, approvals: Sequence[tuple[str, RequestEntry]]) -> None:
    """Says which approval allowed it; of one whose units do not suffice, that its rule wants another."""
    if decision.effect is Effect.APPROVED:
        decision.access_request_id = approvals[0][1].id
        return
    for rule, entry in approvals:
        if entry.units and decision.rule == entry.limit_key:
            lease = decision.spends[0][0]
            left = min(lease.unused, lease.remaining + max(0, lease.free))
            decision.rule, decision.spends = rule, []
            decision.message = (
                f"{approval_wanted(rule)} Of the {entry.units:,} units that {entry.by} approved, {left:,} are left."
            )


def exceeded(limit: BoundLimit, lease: Lease, asked: int, window: Window, now_s: int) -> Decision:
    """The limit has less left than was asked: denied, or for people to approve."""
    left = min(lease.unused, lease.remaining + max(0, lease.free))
    currency = limit.terms.currency
    if currency:
        what = f"{format_nanos(asked)} {currency} of {limit.feature} were asked; the budget of"
        what += f" {format_nanos(lease.amount)} {currency} per {limit.terms.window} has {format_nanos(left)} left."
    else:
        what = f"{asked:,} units of {limit.feature} were asked; the limit of {lease.amount:,}"
        what += f" per {limit.terms.window} has {left:,} left."
    if limit.on_exceeded is OnExceeded.REQUIRE_APPROVAL:
        denied = Decision(Effect.PENDING, Reason.APPROVAL_REQUIRED, f"{what} More needs an approval.", limit.key)
    else:
        denied = Decision(Effect.DENIED, Reason.QUOTA_EXHAUSTED, what, limit.key)
        if window.end < FOREVER_S:
            denied.retry_after_s = window.end - now_s
    denied.spends = [(lease, 0)]
    return denied


def uncountable(limit: BoundLimit, lease: Lease, asked: int, window: Window, now_s: int) -> Decision:
    """More than can be counted, which no limit is so soft as to allow."""
    currency = limit.terms.currency
    most = f"{format_nanos(UNITS_MAX)} {currency}" if currency else f"{UNITS_MAX:,} units"
    what = f"{format_nanos(asked)} {currency}" if currency else f"{asked:,} units"
    denied = Decision(
        Effect.DENIED,
        Reason.QUOTA_EXHAUSTED,
        f"{what} of {limit.feature} were asked; with them more than {most} would be counted per"
        f" {limit.terms.window}, which is the most there can be.",
        limit.key,
    )
    if window.end < FOREVER_S and asked <= UNITS_MAX:
        denied.retry_after_s = window.end - now_s
    denied.spends = [(lease, 0)]
    return denied


def rate_limited(limit: BoundLimit, lease: Lease, asked: int, boot_ms: int) -> Decision:
    """More than the rate and what was saved up of it allow."""
    assert isinstance(lease, RateShare)
    rate, burst = limit.terms.amount // RATE_SCALE, limit.terms.burst
    what = f"{asked:,} units of {limit.feature} were asked; {rate:,} a second are allowed, {burst:,} at once"
    if asked > burst:
        what += ": so many can never be approved at once."
    elif not rate:
        what += ": none can be approved."
    else:
        saved = lease.level(boot_ms) // TOKENS_EACH
        what += f" after a pause, and {saved:,} are saved up here."
    limited = Decision(Effect.DENIED, Reason.RATE_LIMITED, what, limit.key)
    if asked <= burst and rate:
        wait_ms = lease.wait_ms(asked, boot_ms)
        limited.retry_after_s = 1 if wait_ms is None else wait_ms / 1_000
    limited.spends = [(lease, 0)]
    return limited
