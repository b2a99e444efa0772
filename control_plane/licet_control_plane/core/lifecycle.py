"""The life of a license: its stages, the moves between them, and what is due by itself. Pure.

A stage follows from the status, the term and the clock; only the status is stored. ``MOVES`` says for each stage and
move what comes of it: a stage, ``SAME`` when the license is there already (so that every move can be repeated), or why
it is refused.

A term is renewed in place: its end moves by one period, counted from the anchor of the renewal, so that what ended on a
31st ends on the last day of each shorter month and on the 31st again. Nothing else begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, NamedTuple

from licet.domain.catalog import License, LicenseStatus, Renewal
from licet.domain.windows import FOREVER_S, Anchor, Period, window_of
from licet_control_plane.core.refusal import ChangeInvalid

PERIODS: Final = (Period.DAY, Period.WEEK, Period.MONTH, Period.YEAR)
"""What a license can be renewed by."""
PERIODS_MAX: Final = 120
"""Periods of one renewal: ten years of months."""
GRACE_S_MAX: Final = 366 * 86_400
"""A year: longer is not grace but a term."""
RENEW_AHEAD_S: Final = 3_600
"""Licenses renew themselves an hour before their term ends: a control plane that is away for less is not noticed."""


class Stage(StrEnum):
    """Where a license is in its life."""

    SCHEDULED = "scheduled"
    ACTIVE = "active"
    GRACE = "grace"
    EXPIRED = "expired"
    SUSPENDED = "suspended"
    CANCELED = "canceled"


class Move(StrEnum):
    """What can be done with a license."""

    SUSPEND = "suspend"
    RESUME = "resume"
    CANCEL = "cancel"
    CANCEL_AT_END = "cancel at the end of the term"
    REINSTATE = "reinstate"
    RENEW = "renew"
    CHANGE = "change"
    """Its plan, term, add-ons or overrides."""


class MoveRefused(Exception):
    """A license cannot make a move from where it is; the message says why, ``fix`` what to do."""

    def __init__(self, stage: Stage, move: Move, why: str, fix: str) -> None:
        super().__init__(why)
        self.stage = stage
        self.move = move
        self.fix = fix


@dataclass(frozen=True, slots=True)
class No:
    """A move that is refused: why, and what to do instead."""

    why: str
    fix: str


class _Same:
    """The license is there already: nothing changes, and that is no error."""


SAME: Final = _Same()
Outcome = Stage | _Same | No

_GONE: Final = No("it was canceled", "Bring it back first: PUT or PATCH it with the status active.")
_ENDED: Final = No("its term has ended", "Renew it first, or give it another end.")
_NOT_CANCELED: Final = No("it was not canceled", "Resume one that is suspended; renew one that has ended.")

MOVES: Final[Mapping[Stage, Mapping[Move, Outcome]]] = {
    Stage.SCHEDULED: {
        Move.SUSPEND: Stage.SUSPENDED,
        Move.RESUME: SAME,
        Move.CANCEL: Stage.CANCELED,
        Move.CANCEL_AT_END: Stage.SCHEDULED,
        Move.REINSTATE: SAME,
        Move.RENEW: Stage.SCHEDULED,
        Move.CHANGE: Stage.SCHEDULED,
    },
    Stage.ACTIVE: {
        Move.SUSPEND: Stage.SUSPENDED,
        Move.RESUME: SAME,
        Move.CANCEL: Stage.CANCELED,
        Move.CANCEL_AT_END: Stage.ACTIVE,
        Move.REINSTATE: SAME,
        Move.RENEW: Stage.ACTIVE,
        Move.CHANGE: Stage.ACTIVE,
    },
    Stage.GRACE: {
        Move.SUSPEND: Stage.SUSPENDED,
        Move.RESUME: SAME,
        Move.CANCEL: Stage.CANCELED,
        Move.CANCEL_AT_END: No("its term has ended already", "Cancel it now."),
        Move.REINSTATE: SAME,
        Move.RENEW: Stage.ACTIVE,
        Move.CHANGE: Stage.GRACE,
    },
    Stage.EXPIRED: {
        Move.SUSPEND: _ENDED,
        Move.RESUME: _ENDED,
        Move.CANCEL: Stage.CANCELED,
        Move.CANCEL_AT_END: No("its term has ended already", "Cancel it now."),
        Move.REINSTATE: _NOT_CANCELED,
        Move.RENEW: Stage.ACTIVE,
        Move.CHANGE: Stage.EXPIRED,
    },
    Stage.SUSPENDED: {
        Move.SUSPEND: SAME,
        Move.RESUME: Stage.ACTIVE,
        Move.CANCEL: Stage.CANCELED,
        Move.CANCEL_AT_END: Stage.SUSPENDED,
        Move.REINSTATE: _NOT_CANCELED,
        Move.RENEW: Stage.SUSPENDED,
        Move.CHANGE: Stage.SUSPENDED,
    },
    Stage.CANCELED: {
        Move.SUSPEND: _GONE,
        Move.RESUME: _GONE,
        Move.CANCEL: SAME,
        Move.CANCEL_AT_END: SAME,
        Move.REINSTATE: Stage.ACTIVE,
        Move.RENEW: _GONE,
        Move.CHANGE: _GONE,
    },
}
"""Of a stage that follows from the clock, ``ACTIVE`` stands for whichever of the first four its term gives."""


def stage_of(license_: License, now_s: float) -> Stage:
    """Where a license is at an instant, seconds since the Unix epoch."""
    if license_.status is LicenseStatus.SUSPENDED:
        return Stage.SUSPENDED
    if license_.status is LicenseStatus.CANCELED:
        return Stage.CANCELED
    if now_s < license_.starts_s:
        return Stage.SCHEDULED
    if not license_.ends_s or now_s < license_.ends_s:
        return Stage.ACTIVE
    return Stage.GRACE if now_s < license_.stops_s else Stage.EXPIRED


def check_move(license_: License, move: Move, now_s: float) -> bool:
    """Whether the move changes the license; not, when it is there already.

    Raises:
        MoveRefused: it cannot be made from where the license is.
    """
    stage = stage_of(license_, now_s)
    outcome = MOVES[stage][move]
    if isinstance(outcome, No):
        raise MoveRefused(stage, move, outcome.why, outcome.fix)
    return outcome is not SAME


def moved(license_: License, move: Move, now_s: float) -> License:
    """The license after a move that needs nothing but itself; the same when it is there already.

    Raises:
        MoveRefused: it cannot be made from where the license is.
        ChangeInvalid: it has no end to be canceled at.
    """
    changes = check_move(license_, move, now_s)
    if move is Move.RESUME and license_.status is LicenseStatus.ACTIVE:
        return replace(license_, cancels=False)  # it stays after all, and renews itself if it did
    if not changes:
        return license_
    match move:
        case Move.SUSPEND:
            return replace(license_, status=LicenseStatus.SUSPENDED)
        case Move.RESUME | Move.REINSTATE:
            return replace(license_, status=LicenseStatus.ACTIVE)
        case Move.CANCEL:
            return replace(
                license_, status=LicenseStatus.CANCELED, cancels=False, planned=None, renewal=_by_hand(license_.renewal)
            )
        case Move.CANCEL_AT_END:
            if not license_.ends_s:
                raise ChangeInvalid(
                    "at", "the license has no end to be canceled at", "Cancel it now, or give it one with ends_at."
                )
            return replace(license_, cancels=True)
    raise ValueError(f"{move} needs more than the license")


def move_to(license_: License, status: LicenseStatus, now_s: float) -> License:
    """The license with another status, by the move that leads there. Raises as ``moved``."""
    if status is license_.status:
        return license_
    if status is LicenseStatus.SUSPENDED:
        return moved(license_, Move.SUSPEND, now_s)
    if status is LicenseStatus.CANCELED:
        return moved(license_, Move.CANCEL, now_s)
    return moved(license_, Move.REINSTATE if license_.status is LicenseStatus.CANCELED else Move.RESUME, now_s)


def renewed(license_: License, now_s: float, periods: int = 1) -> License:
    """The license with its term longer by some of its periods.

    Raises:
        MoveRefused: it was canceled.
        ChangeInvalid: it has no end or no period, or has ended so long ago that it would end in the past again.
    """
    check_move(license_, Move.RENEW, now_s)
    if not license_.ends_s:
        raise ChangeInvalid("ends_at", "the license has no end, so there is nothing to renew", "Leave it as it is.")
    if license_.renewal is None:
        fix = f"Give it one of {', '.join(PERIODS)}, or another end with ends_at."
        raise ChangeInvalid("renewal_period", "the license has no period to be renewed by", fix)
    ends_s = license_.ends_s
    for _ in range(periods):
        ends_s = _next_end(license_.renewal, ends_s)
    if ends_s <= now_s:
        raise ChangeInvalid(
            "periods",
            "renewed by so little the license would still have ended",
            "Give more periods, or another end with ends_at.",
        )
    # Who had canceled it asked for these periods, not for all that follow.
    renewal = _by_hand(license_.renewal) if license_.cancels else license_.renewal
    return _with_end_of_grace(replace(license_, ends_s=ends_s, cancels=False, renewal=renewal))


def renewed_by_itself(license_: License) -> License:
    """The license with its term longer by one period, also when that lies in the past: each is renewed by itself.

    Raises:
        ChangeInvalid: the term would end after the year 9998.
    """
    assert license_.renewal is not None
    return _with_end_of_grace(replace(license_, ends_s=_next_end(license_.renewal, license_.ends_s)))


def with_fields(license_: License, fields: Mapping[str, Any], now_s: float) -> License:
    """The license with some fields replaced: ``plan``, ``status``, ``starts_s``, ``ends_s``, ``addons``, ``grace_s``,
    ``period`` (``None`` for none) and ``auto``.

    Raises:
        MoveRefused: the status cannot be reached, or nothing can be changed, from where it is.
        ChangeInvalid: it could not be renewed like that.
    """
    status = fields.get("status", license_.status)
    if status is not LicenseStatus.CANCELED:
        license_ = move_to(license_, status, now_s)
    changed = replace(license_, **{name: fields[name] for name in _PLAIN if name in fields})
    if changed.plan != license_.plan:
        changed = replace(changed, planned=None)
    if not 0 <= changed.grace_s <= GRACE_S_MAX:
        raise ChangeInvalid("grace_s", f"a grace of {changed.grace_s} s", f"Give 0 to {GRACE_S_MAX}: up to a year.")
    changed = _with_end_of_grace(_with_renewal_fields(license_, changed, fields))
    if (changed.renewal, changed.ends_s) != (license_.renewal, license_.ends_s):
        _check_catching_up(changed, now_s)
    if changed != license_:
        check_move(license_, Move.CHANGE, now_s)
    return move_to(changed, status, now_s)


_PLAIN: Final = ("plan", "starts_s", "ends_s", "addons", "grace_s")


def _with_renewal_fields(before: License, license_: License, fields: Mapping[str, Any]) -> License:
    old = before.renewal
    period = fields.get("period", old.period if old else None)
    auto = fields.get("auto", bool(old and old.auto and period))
    if fields.get("auto") and license_.cancels:
        raise ChangeInvalid(
            "auto_renew", "the license is canceled at the end of its term", "Resume it first: that takes it back."
        )
    is_as_before = old is not None and (old.period, before.starts_s, before.ends_s) == (
        period,
        license_.starts_s,
        license_.ends_s,
    )
    if not is_as_before:
        return with_renewal(license_, period, auto=auto)
    assert old is not None
    return replace(license_, renewal=replace(old, auto=auto))  # the anchor stays: what was renewed keeps its day


def with_renewal(license_: License, period: Period | None, *, auto: bool) -> License:
    """The license, renewed by ``period`` (``None``: by none), counted from its start if its end fits that, else from
    its end.

    Raises:
        ChangeInvalid: it could not be renewed like that.
    """
    if period is None:
        if auto:
            raise ChangeInvalid(
                "auto_renew",
                "a license without a period cannot renew itself",
                f"Give renewal_period, one of {', '.join(PERIODS)}.",
            )
        return replace(license_, renewal=None)
    if period not in PERIODS:
        raise ChangeInvalid(
            "renewal_period", f"{period.value!r} is no period of a term", f"One of {', '.join(PERIODS)}."
        )
    if not license_.ends_s:
        if not license_.starts_s:
            raise ChangeInvalid(
                "renewal_period", "a license without start and end has no term to renew", "Give starts_at or ends_at."
            )
        license_ = replace(license_, ends_s=_next_end(Renewal(period, license_.starts_s), license_.starts_s))
    starts_fits = license_.starts_s and _is_boundary(period, license_.starts_s, license_.ends_s)
    anchor_s = license_.starts_s if starts_fits else license_.ends_s
    return replace(license_, renewal=Renewal(period, anchor_s, auto))


class Notices(NamedTuple):
    """The ends of term (seconds) that were announced ahead, and said to have passed; 0 for none."""

    expiring_for_s: int = 0
    expired_for_s: int = 0


NO_NOTICES: Final = Notices()


class Due(StrEnum):
    """What a license wants done by itself, in the order in which it is done when several are due."""

    CHANGE_PLAN = "change plan"
    RENEW = "renew"
    CANCEL = "cancel"
    SAY_EXPIRING = "say that it expires"
    SAY_EXPIRED = "say that it expired"


def next_due(license_: License, notices: Notices, *, notice_s: int) -> tuple[int, Due] | None:
    """What is due next and when, seconds since the Unix epoch; ``None`` for nothing. ``notice_s``: how long before the
    end of a term that is not renewed by itself it is announced."""
    if license_.status is LicenseStatus.CANCELED:
        return None
    found: list[tuple[int, Due]] = []
    if license_.planned:
        found.append((license_.planned.at_s, Due.CHANGE_PLAN))
    if license_.ends_s:
        if license_.cancels:
            found.append((license_.ends_s, Due.CANCEL))
        elif license_.renews_itself:
            found.append((license_.ends_s - RENEW_AHEAD_S, Due.RENEW))
        elif notices.expired_for_s != license_.ends_s:
            found.append((license_.stops_s, Due.SAY_EXPIRED))
        if not license_.renews_itself and license_.ends_s not in notices:
            found.append((license_.ends_s - notice_s, Due.SAY_EXPIRING))
    return min(found, key=_when, default=None)


def _when(due: tuple[int, Due]) -> tuple[int, int]:
    return due[0], list(Due).index(due[1])


def _by_hand(renewal: Renewal | None) -> Renewal | None:
    return replace(renewal, auto=False) if renewal else None


def _next_end(renewal: Renewal, ends_s: int) -> int:
    try:
        following = window_of(renewal.period, Anchor.LICENSE, ends_s, starts_s=renewal.anchor_s or ends_s, ends_s=0).end
    except (ValueError, OverflowError):
        following = FOREVER_S
    if following >= FOREVER_S:
        raise ChangeInvalid("ends_at", "the term would end after the year 9998", "Leave the end out: it never ends.")
    return following


def _check_catching_up(license_: License, now_s: float) -> None:
    """Each period that passed is a renewal of its own, with its revision and its line in the audit trail.

    Raises:
        ChangeInvalid: one that renews itself ended so long ago that it would be more than ``PERIODS_MAX`` of them.
    """
    if license_.renewal is None or not license_.renews_itself:
        return
    ends_s = license_.ends_s
    for _ in range(PERIODS_MAX):
        if ends_s > now_s:
            return
        ends_s = _next_end(license_.renewal, ends_s)
    if ends_s <= now_s:
        raise ChangeInvalid(
            "ends_at",
            f"the license would have to renew itself more than {PERIODS_MAX} times to reach today",
            "Give it a later end.",
        )


def _with_end_of_grace(license_: License) -> License:
    """The license, whose grace ends at an instant that can be said.

    Raises:
        ChangeInvalid: it does not.
    """
    if license_.stops_s > license_.ends_s and license_.stops_s >= FOREVER_S:
        raise ChangeInvalid(
            "grace_s", "the grace would end after the year 9998", "Leave the end out: then it never ends."
        )
    return license_


def _is_boundary(period: Period, anchor_s: int, at_s: int) -> bool:
    if at_s <= anchor_s:
        return False
    try:
        return window_of(period, Anchor.LICENSE, at_s, starts_s=anchor_s, ends_s=0).start == at_s
    except (ValueError, OverflowError):
        return False
