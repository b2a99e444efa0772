"""Access requests and break-glass overrides as both programs act on them: what is asked for, what lifts what. Pure.

An access request asks people to let one subject do one action although one rule (or one limit) wants an approval. Its
*key* says which of these it is about; its id says which time it was asked. Both are digests, so that every sidecar that
is asked the same comes to the same id without a word with anybody.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from licet.domain.ids import LimitKey

OPEN_MAX: Final = 200
"""Open requests of a tenant. Nobody reads more of them, and each opening publishes the tenant's document anew."""
LIVE_MAX: Final = 200
"""Approvals of a tenant that have not ended."""
CLOSED_MAX: Final = 500
"""Ended and denied requests that a tenant's document keeps, the newest, for who watches them."""
CLOSED_KEPT_US: Final = 24 * 3_600 * 1_000_000
"""How long it keeps them."""
EXPIRES_AFTER_S: Final = 24 * 3_600
"""When a request that nobody decides expires, unless its approval chain says ``deny_after``."""
QUIET_US: Final = 3_600 * 1_000_000
"""After a denial, asking the same again is answered with it for this long: a client in a loop does not ask people."""
TEXT_CHARS_MAX: Final = 300
"""Of a reason or a justification: it travels with every license document."""
CLOCK_BEHIND_US_MAX: Final = 300 * 1_000_000
"""How far a sidecar's clock may be behind the control plane's without missing an approval that was just given."""
OVERRIDES_MAX: Final = 100
"""Overrides in force at the same time; a check looks at each."""
OVERRIDE_S_MAX: Final = 24 * 3_600
"""Longest an override is in force. What is needed for longer is a policy."""
OVERRIDE_PREFIX: Final = "override/"
"""Of the ``rule`` of a decision that an override changed."""
_APPROVAL_KEY: Final = re.compile(r":approval\+[0-9a-f]{32}\Z")
_HOUR_US: Final = 3_600 * 1_000_000


class RequestState(StrEnum):
    """What became of an access request."""

    PENDING = "pending"
    APPROVED = "approved"
    """By everybody whose approval was needed; it may have ended since."""
    DENIED = "denied"
    EXPIRED = "expired"
    """Nobody decided in time."""
    REVOKED = "revoked"
    """Approved, and taken back."""


@dataclass(frozen=True, slots=True)
class RequestEntry:
    """A request as the tenant's license document tells sidecars of it. It names no subject.

    ``until_us`` is when a pending one expires, and when an approval ends (exclusive); ``at_us`` when it came to its
    state; both microseconds since the Unix epoch. ``units`` of ``feature`` are what an approval lifts its rule for, in
    all, and 0 for any number. ``by`` and ``reason`` are who decided, and why.
    """

    id: str
    key: str
    state: RequestState
    at_us: int
    until_us: int = 0
    by: str = ""
    reason: str = ""
    feature: str = ""
    units: int = 0

    def is_open(self, now_us: int) -> bool:
        """Whether it waits for somebody to decide."""
        return self.state is RequestState.PENDING and now_us < self.until_us

    def is_live(self, now_us: int) -> bool:
        """Whether it is approved, and in force: it may have begun a little later than ``now_us``, by another clock."""
        begun_us = self.at_us - CLOCK_BEHIND_US_MAX
        return self.state is RequestState.APPROVED and begun_us <= now_us < self.until_us

    def state_at(self, now_us: int) -> RequestState:
        """The state, with what time alone has done."""
        if self.state is RequestState.PENDING and now_us >= self.until_us:
            return RequestState.EXPIRED
        return self.state

    @property
    def limit_key(self) -> LimitKey:
        """The key that ``units`` are counted under, in registers like those of any limit."""
        return LimitKey(f"{self.feature}:approval+{self.id}")

    def to_wire(self) -> list[Any]:
        """As it is stored and travels."""
        state = self.state.value
        wire = [self.id, self.key, state, self.at_us, self.until_us, self.by, self.reason, self.feature, self.units]
        while not wire[-1]:
            wire.pop()
        return wire

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Self:
        """The inverse of ``to_wire``; what a newer writer appends is ignored.

        Raises:
            ValueError: an unknown state.
        """
        id_, key, state, at_us, *rest = wire[:9]
        return cls(id_, key, RequestState(state), at_us, *rest)


class OverrideEffect(StrEnum):
    """What an override answers."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True)
class Override:
    """Break glass: for a while, what ``action`` matches is allowed or denied, whatever documents say.

    ``action`` is a name, ``prefix.*`` or ``*``; ``tenant`` and ``subject`` (an id) narrow it, empty for all.
    ``ends_us`` is exclusive, microseconds since the Unix epoch.
    """

    id: str
    action: str
    effect: OverrideEffect
    ends_us: int
    reason: str
    by: str
    tenant: str = ""
    subject: str = ""

    @property
    def rule(self) -> str:
        """What a decision that it changed names as its rule."""
        return OVERRIDE_PREFIX + self.id

    def applies(self, tenant: str, subject: str, action: str, now_us: int) -> bool:
        """Whether it is in force for who asks what."""
        pattern = self.action
        return (
            now_us < self.ends_us
            and (not self.tenant or self.tenant == tenant)
            and (not self.subject or self.subject == subject)
            and (pattern in ("*", action) or (pattern.endswith(".*") and action.startswith(pattern[:-1])))
        )

    def to_wire(self) -> list[Any]:
        """As it is stored and travels."""
        effect = self.effect.value
        return [self.id, self.action, effect, self.ends_us, self.reason, self.by, self.tenant, self.subject]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Self:
        """The inverse of ``to_wire``; what a newer writer appends is ignored.

        Raises:
            ValueError: an unknown effect.
        """
        id_, action, effect, *rest = wire[:8]
        return cls(id_, action, OverrideEffect(effect), *rest)


def request_key(tenant: str, subject: tuple[str, str], on_behalf_of: str, action: str, rule: str) -> str:
    """32 hex digits: what is asked for. ``subject`` is (type, id), ``rule`` the rule or limit that wants approval."""
    return _digest(tenant, *subject, on_behalf_of, action, rule)


def is_approval_key(limit: str) -> bool:
    """Whether a limit key may be that of an approval's units; a grant of a limit named ``approval`` looks alike."""
    return bool(_APPROVAL_KEY.search(limit))


def request_id(key: str, previous: str, now_us: int) -> str:
    """32 hex digits: this time of asking for ``key``, after the request ``previous``; after none that is known, the
    hour tells one time from another. Longer ago than that, the document still has it."""
    return _digest(key, previous or str(now_us // _HOUR_US))


def counted_limits(entries: Iterable[RequestEntry]) -> dict[LimitKey, int]:
    """Amounts by key of approvals for so many units: published like those of limits."""
    return {entry.limit_key: entry.units for entry in entries if entry.units and entry.state is RequestState.APPROVED}


def kept_entries(entries: Iterable[RequestEntry], now_us: int) -> tuple[RequestEntry, ...]:
    """What a document keeps of its requests: those open and live, and those closed lately; the latest change last."""
    ordered = sorted(entries, key=lambda entry: entry.at_us)
    closed = [one for one in ordered if not one.is_open(now_us) and not one.is_live(now_us)]
    recent = [one for one in closed if max(one.at_us, one.until_us) > now_us - CLOSED_KEPT_US][-CLOSED_MAX:]
    dropped = {one.id for one in closed} - {one.id for one in recent}
    return tuple(one for one in ordered if one.id not in dropped)


def _digest(*parts: str) -> str:
    # Length-prefixed, so that ("a", "bc") and ("ab", "c") differ.
    joined = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(joined.encode(), digest_size=16, person=b"licet.request").hexdigest()
