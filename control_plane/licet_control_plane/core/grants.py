"""Grants as operators ask for them, and amounts as they write them: units as a number, budgets as money. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from licet.domain.catalog import Grant, Limit, currency_of
from licet.domain.entitlements import RATE_MAX
from licet.domain.ids import UNITS_MAX
from licet.domain.money import format_budget, parse_budget
from licet.domain.windows import FOREVER_S
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.core.suggestion import did_you_mean

LIVE_MAX: Final = 64
"""Grants of a license that have not ended. A check may have to look at each, and takes from several in one step."""

KEPT_S: Final = 30 * 86_400
"""How long a grant that ended stays in its license, so that operators can still see what there was."""

PRIORITY_DEFAULT: Final = 100
"""The plan's allowance has 0: it goes first."""
PRIORITY_MAX: Final = 1_000

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED: Final = "subject"
"""Would make the key of a grant of ``day@context.team`` that of the limit ``day@context.team+subject``."""


@dataclass(frozen=True, slots=True)
class GrantAsked:
    """A grant to add. Without ``id`` it gets one; without ``starts_s`` it starts now.

    Either ``ends_s`` or ``lasts_s``, which counts from its start. ``amount`` is units, or money such as ``50.00 USD``.
    """

    limit: str
    amount: int | str
    id: str = ""
    starts_s: int | None = None
    ends_s: int | None = None
    lasts_s: int | None = None
    priority: int = PRIORITY_DEFAULT


def amount_of(written: int | str, limit: Limit, field: str) -> int:
    """Units, or the nanos of a budget.

    Raises:
        ChangeInvalid: money for a limit in units, units for one in money, money in another currency, or out of range.
    """
    if limit.currency:
        fix = f"Give money, such as '{format_budget(50_000_000_000, limit.currency)}'."
        if not isinstance(written, str):
            raise ChangeInvalid(field, f"{written} is not money, and {limit.key!r} is a budget", fix)
        try:
            nanos, currency = parse_budget(written)
        except ValueError as error:
            raise ChangeInvalid(field, str(error), fix) from error
        if currency != limit.currency:
            raise ChangeInvalid(field, f"{written!r} is not in {limit.currency}, as the budget {limit.key!r} is", fix)
        return nanos
    units_max = RATE_MAX if limit.is_rate else UNITS_MAX
    if not isinstance(written, int) or not 0 <= written <= units_max:
        raise ChangeInvalid(
            field, f"an amount of {written}, and {limit.key!r} counts whole units", f"Give 0 to {units_max}."
        )
    return written


def shown_amount(amount: int, limit: str) -> int | str:
    """An amount of the limit with this key, as ``amount_of`` reads it."""
    currency = currency_of(limit)
    return format_budget(amount, currency) if currency else amount


def grant_of(
    asked: GrantAsked, limits: Mapping[str, Limit], existing: Iterable[Grant], *, id_: str, now_s: int
) -> Grant:
    """The grant that was asked for, under limits that are in force. ``id_`` is its name when it was given none.

    Raises:
        ChangeInvalid: it cannot be, or there are ``LIVE_MAX`` already.
    """
    limit = limits.get(asked.limit)
    if limit is None:
        raise ChangeInvalid("limit", f"the license has no limit {asked.limit!r}", did_you_mean(asked.limit, limits))
    if limit.is_rate:
        raise ChangeInvalid(
            "limit", f"{limit.key!r} is a rate, which cannot be topped up", "Override it, or grant another limit."
        )
    amount = amount_of(asked.amount, limit, "amount")
    if amount < 1:
        raise ChangeInvalid("amount", f"a grant of {asked.amount}", "Give more than nothing.")
    if asked.id and (not _ID.fullmatch(asked.id) or asked.id == _RESERVED):
        raise ChangeInvalid(
            "id",
            f"{asked.id!r} cannot name a grant",
            f"Use up to 64 letters, digits, '-' and '_', starting with a letter or a digit; not {_RESERVED!r}.",
        )
    if abs(asked.priority) > PRIORITY_MAX:
        raise ChangeInvalid("priority", f"a priority of {asked.priority}", f"Give -{PRIORITY_MAX} to {PRIORITY_MAX}.")
    starts_s, ends_s = _term(asked, now_s)
    if sum(grant.ends_s > now_s for grant in existing) >= LIVE_MAX:
        raise ChangeInvalid(
            "limit", f"the license has {LIVE_MAX} grants that have not ended", "Revoke one, or raise the limit itself."
        )
    return Grant(asked.id or id_, limit.key, amount, starts_s, ends_s, asked.priority)


def is_same(grant: Grant, asked: GrantAsked) -> bool:
    """Whether what is asked is what was granted: then asking again is no mistake. What was left out does not differ."""
    currency = currency_of(grant.limit)
    try:
        amount = parse_budget(str(asked.amount)) if currency else (asked.amount, "")
    except ValueError:
        return False
    return (
        (asked.limit, amount, asked.priority) == (grant.limit, (grant.amount, currency), grant.priority)
        and asked.starts_s in (None, grant.starts_s)
        and asked.ends_s in (None, grant.ends_s)
        and asked.lasts_s in (None, grant.ends_s - grant.starts_s)
    )


def kept(grants: Iterable[Grant], now_s: int) -> tuple[Grant, ...]:
    """Those that have not ended, or not long ago."""
    return tuple(grant for grant in grants if grant.ends_s > now_s - KEPT_S)


def state_of(grant: Grant, now_s: float) -> str:
    """``scheduled``, ``live`` or ``expired``."""
    if now_s < grant.starts_s:
        return "scheduled"
    return "live" if now_s < grant.ends_s else "expired"


def _term(asked: GrantAsked, now_s: int) -> tuple[int, int]:
    if (asked.ends_s is None) == (asked.lasts_s is None):
        raise ChangeInvalid(
            "expires_at", "a grant ends either at an instant or after a time", "Give 'expires_at' or 'expires_after_s'."
        )
    starts_s = now_s if asked.starts_s is None else asked.starts_s
    ends_s = asked.ends_s if asked.ends_s is not None else starts_s + (asked.lasts_s or 0)
    field = "expires_at" if asked.lasts_s is None else "expires_after_s"
    if ends_s <= starts_s:
        raise ChangeInvalid(field, "the grant ends before it starts", "Let it end after it starts.")
    if ends_s <= now_s:
        raise ChangeInvalid(field, "the grant has ended already", "Let it end in the future.")
    if ends_s > FOREVER_S:
        raise ChangeInvalid(field, "the grant ends after the year 9998", "Let it end sooner.")
    return starts_s, ends_s
