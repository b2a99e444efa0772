"""What a sidecar holds of one quota: units of a window, or a share of a rate. The rules are in ``leases``. Pure."""

from __future__ import annotations

import zlib
from enum import StrEnum
from typing import Final, NamedTuple

from licet.domain.entitlements import RATE_SCALE
from licet.domain.ids import UNITS_MAX, LimitKey
from licet.wire.registers import HOLD_S, Pair, quota_name

HOLD_MS: Final = HOLD_S * 1_000

KEEPALIVE_MS: Final = HOLD_MS // 3
"""A held lease is settled at least this often, so that two lost calls in a row do not end the hold."""

RATE_HEADROOM: Final = 1.25
"""A share asked for is this much more than the demand measured, so that a rising demand is not refused at once."""

TOKENS_EACH: Final = RATE_SCALE * 1_000
"""A unit in a bucket that fills by thousandths of a unit a second each millisecond."""

NO_PAIR: Final = Pair(0, "")


class Kind(StrEnum):
    """How a quota is leased."""

    HARD = "hard"
    """Never past its amount."""
    SOFT = "soft"
    """Past its amount too: overage."""
    RATE = "rate"
    """As shares, of units a second."""


class Terms(NamedTuple):
    """What a limit says about its leases. ``amount`` in units, in nanos, or in thousandths of a unit a second.

    ``durable``: a grant is spent only when it is on disk and on replicas. ``burst``, of a rate: units at once.
    ``window``, ``currency``, ``grant`` and ``scope`` are for the answers: the period's name, of a budget its currency,
    of a grant its id, and the paths that it counts separately by.
    """

    amount: int
    kind: Kind = Kind.HARD
    durable: bool = False
    burst: int = 0
    window: str = ""
    currency: str = ""
    grant: str = ""
    scope: tuple[str, ...] = ()


class Lease:
    """What this sidecar holds of one quota. Units in [0, 2^53).

    ``cap`` is what it may spend in all, ``used`` what it has spent, ``reserved`` what is held for actions under way;
    ``used`` is above ``cap`` only by what was approved while nothing could be leased, or let through by observe mode:
    ``degraded`` in all in this window. ``over`` is the part of ``cap`` that lies beyond a soft limit.
    ``amount`` is the limit as last published here; ``remaining`` what Redis last said nobody holds,
    ``held_elsewhere`` what others hold and those that are gone have spent, ``used_elsewhere`` what of that was spent or
    reserved, and ``idle_elsewhere`` the rest of it, unless they were asked for it in vain. ``unsure`` while the
    register may hold more than ``cap``:
    a call about it was not answered, or Redis lost something. ``heard_ms``: when ``remaining`` was (boot time; 0: not
    since the limit is what it is). ``logged`` once the log knows of this lease.
    ``pair`` is what the last call about it was answered under. ``within``: a soft limit that has grants left, so that
    nothing past its amount is leased. ``said`` the units spent and reserved it told of.
    ``aged`` while the tenant's leases by age list it, ``dropped`` once the book has let it go.
    """

    __slots__ = (
        "aged",
        "amount",
        "asked_ms",
        "cap",
        "degraded",
        "dropped",
        "durable",
        "end",
        "heard_ms",
        "held_elsewhere",
        "hold_until_ms",
        "idle_elsewhere",
        "keepalive_ms",
        "kind",
        "limit_key",
        "logged",
        "low_water",
        "over",
        "pair",
        "quota",
        "rate",
        "remaining",
        "reserved",
        "said",
        "scope",
        "short_until_ms",
        "spent_lately",
        "spent_ms",
        "start",
        "terms",
        "unsure",
        "used",
        "used_elsewhere",
        "wanted",
        "within",
    )

    def __init__(self, limit_key: LimitKey, scope: str, start: int, end: int, terms: Terms) -> None:
        self.limit_key = limit_key
        self.scope = scope
        self.start = start
        self.end = end
        self._adopt(terms)
        self.quota = quota_name(limit_key, scope, start)
        # Spread over half of the time, so that what was leased together is not kept alive in one burst.
        self.keepalive_ms = KEEPALIVE_MS - zlib.crc32(self.quota.encode()) % (KEEPALIVE_MS // 2)
        self.cap = 0
        self.used = 0
        self.reserved = 0
        self.hold_until_ms = 0
        self.asked_ms = 0
        self.heard_ms = 0
        self.remaining = terms.amount
        self.idle_elsewhere = 0
        self.held_elsewhere = 0
        self.used_elsewhere = 0
        self.short_until_ms = 0
        self.low_water = 0
        self.rate = 0.0
        self.spent_lately = 0
        self.spent_ms = 0
        self.wanted = False
        self.within = False
        self.unsure = False
        self.logged = False
        self.pair = NO_PAIR
        self.said = 0
        self.aged = self.dropped = False
        self.over = 0
        self.degraded = 0

    def adopt(self, terms: Terms, boot_ms: int) -> None:
        """Takes over what the limit says now."""
        self._adopt(terms)

    def _adopt(self, terms: Terms) -> None:
        self.terms = terms
        self.amount = terms.amount
        self.kind = terms.kind
        self.durable = terms.durable

    @property
    def unused(self) -> int:
        """What of the amount nobody has spent or reserved, as last heard."""
        return max(0, self.amount - self.used_elsewhere - self.used - self.reserved)

    @property
    def left(self) -> int:
        """Units left for all sidecars together, as last known."""
        own = self.used + self.reserved  # written out: every answer says it of every quota
        free = self.cap - own
        known = self.remaining + self.idle_elsewhere + (free if free > 0 else 0)
        unused = self.amount - self.used_elsewhere - own
        return known if known < unused else unused if unused > 0 else 0

    @property
    def is_heard_of(self) -> bool:
        """Whether Redis ever answered a call about it, in this process or before."""
        return self.pair != NO_PAIR

    @property
    def countable(self) -> int:
        """Units that can be taken until all sidecars together, as last heard, hold more than can be counted."""
        return UNITS_MAX - self.held_elsewhere - self.used - self.reserved

    @property
    def free(self) -> int:
        """Units that can be spent while the hold lasts; negative after degraded approvals."""
        return self.cap - self.used - self.reserved

    @property
    def is_reported(self) -> bool:
        """Whether Redis knows all of it and nothing is left of it: nothing is to be said until that is lost."""
        return not (self.unsure or self.reserved or self.free > 0) and self.said == self.used

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held or was spent, for all that is known here and in Redis."""
        return not (self.cap or self.used or self.reserved or self.unsure)

    def overage(self, units: int) -> int:
        """How many of ``units``, if spent next, lie beyond the limit, as far as is known here."""
        return min(units, self._beyond(units))

    def overage_held(self, units: int) -> int:
        """The same for units that are reserved already."""
        return min(units, self._beyond(0))

    def _beyond(self, units: int) -> int:
        if not self.over:
            return 0
        return max(0, self.used + self.reserved + units - (self.cap - self.over))

    def __repr__(self) -> str:
        return f"Lease({self.quota} cap={self.cap} used={self.used} reserved={self.reserved})"


class RateShare(Lease):
    """A share of a rate: ``cap`` thousandths of a unit a second, that fill a bucket of as much of the burst.

    Over any time t all sidecars together approve at most rate * t + burst: shares never sum to more than the rate, a
    bucket holds at most its share of the burst, and a new one is empty. When the rate is lowered, each share becomes
    the same part of what is left (``adopt``), and none grows until all of them fit into it.
    """

    __slots__ = ("burst", "filled_ms", "since_ms", "spare", "spare_ms", "tokens")

    tokens: int
    """Millionths of a unit in the bucket when it was last filled (``filled_ms``, boot time)."""

    def __init__(self, limit_key: LimitKey, scope: str, start: int, end: int, terms: Terms) -> None:
        super().__init__(limit_key, scope, start, end, terms)
        self.tokens = 0
        self.filled_ms = 0
        self.since_ms = 0
        """When there last was no share, boot time: the bucket of a young one is still filling."""
        self.spare = 0
        self.spare_ms = 0

    def adopt(self, terms: Terms, boot_ms: int) -> None:
        """See ``Lease``. What filled the bucket so far did so under the terms there were."""
        self.level(boot_ms)
        before = self.amount
        self._adopt(terms)
        if terms.amount < before:
            self.cap = min(self.cap, before) * terms.amount // before
        self.tokens = min(self.tokens, self._capacity())

    def _adopt(self, terms: Terms) -> None:
        super()._adopt(terms)
        self.burst = terms.burst

    def level(self, boot_ms: int) -> int:
        """Fills the bucket up to now, and says what is in it, in millionths of a unit."""
        until_ms = min(boot_ms, self.hold_until_ms)
        if until_ms > self.filled_ms:
            self.tokens = min(self._capacity(), self.tokens + self.cap * (until_ms - self.filled_ms))
        self.filled_ms = boot_ms
        return self.tokens if boot_ms < self.hold_until_ms else 0

    def spare_level(self, rate: int, burst: int, boot_ms: int) -> int:
        """What is in the bucket that stands in while no share can be had, in millionths of a unit.

        It holds ``burst`` units, and fills with ``rate`` thousandths a second from when the last share was over.
        """
        since_ms = max(self.spare_ms, self.hold_until_ms)
        self.spare = min(burst * TOKENS_EACH, self.spare + rate * max(0, boot_ms - since_ms))
        self.spare_ms = boot_ms
        return self.spare

    def take(self, units: int, boot_ms: int) -> None:
        """Takes ``units``: of the share, or, when that does not have them, of what stands in for it."""
        if self.level(boot_ms) >= units * TOKENS_EACH:
            self.tokens -= units * TOKENS_EACH
        else:
            self.spare = max(0, self.spare - units * TOKENS_EACH)
        self.spent_lately += units
        self.spent_ms = boot_ms

    def take_what_is_there(self, units: int, boot_ms: int) -> bool:
        """Takes ``units`` of the share when it has them; else they are demand. Whether there is a share at all."""
        if self.level(boot_ms) >= units * TOKENS_EACH:
            self.take(units, boot_ms)
        else:
            self.refused(units)
            self.spent_ms = boot_ms
        return boot_ms < self.hold_until_ms

    def refused(self, units: int) -> None:
        """Units that were asked and not there: demand, too."""
        self.spent_lately += units

    def wait_ms(self, units: int, boot_ms: int) -> int | None:
        """Until the bucket holds ``units``, at the present share; ``None`` when it never will."""
        if units * TOKENS_EACH > self._capacity():
            return None
        missing = units * TOKENS_EACH - self.level(boot_ms)
        return max(0, -(-missing // self.cap)) if self.cap else None

    def share_for(self, units: int) -> int:
        """The smallest share whose bucket can hold ``units``."""
        return min(self.amount, -(-units * self.amount // max(1, self.burst)))

    def share_wanted(self) -> int:
        """A share for the demand that was measured."""
        return min(self.amount, round(self.rate * RATE_HEADROOM * RATE_SCALE))

    def lower(self, share: int, boot_ms: int) -> None:
        """Gives up all but ``share``, and what the bucket then cannot hold."""
        self.level(boot_ms)
        self.cap = min(self.cap, share)
        self.tokens = min(self.tokens, self._capacity())

    def granted(self, share: int, hold_until_ms: int, boot_ms: int) -> None:
        """Another share from now on."""
        self.level(boot_ms)
        if not self.cap:
            self.since_ms = boot_ms
        self.hold_until_ms = hold_until_ms
        self.cap = share
        self.tokens = min(self.tokens, self._capacity())

    def _capacity(self) -> int:
        return self.burst * TOKENS_EACH * min(self.cap, self.amount) // self.amount if self.amount else 0
