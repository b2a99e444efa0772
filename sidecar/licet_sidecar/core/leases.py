"""Leases: the parts of quotas this sidecar holds, and the calls that move units between it and Redis.

Rules, from ``docs/adr/0002-registers-not-tokens.md``; the simulation removes each of them in turn and must fail:

1. A sidecar spends only while ``used + reserved + n <= cap`` and only before ``hold_until_ms``: ``HOLD_S`` after it
   *sent* its last answered call for that lease (boot-time clock, which runs on while the machine sleeps).
2. It raises its cap only from the answer to its outstanding call.
3. It lowers its cap, in its log, *before* a return is sent (``LeaseBook.begin_call`` lowers; the shell logs and sends).
   So with the first call about a lease: what that call is granted must be found again after a crash.
4. One outstanding call a tenant, repeated verbatim until it is answered. Calls are numbered; an answer with another
   number changes nothing.
5. After a loss (``STALE``, ``LEARN``) the next call asserts what is held; Redis grants nothing on it.
6. It forgets what it spent in a window only when Redis takes no call for that window any more, by the Redis clock: its
   own may step back over the window's end, or be ahead of the others'.
7. When a hold has ended, what was not spent or reserved is given up before anything else is said of that lease: it may
   have been sealed, or left out of learning, and be granted to somebody else.

A *rate* is leased as a share of it (``RateShare``): the same calls and rules, and nothing is ever spent of a share;
what a check takes comes out of the bucket that the share fills. Shares are not logged: a restart begins without.

Owned by one event loop. No I/O, no clock: ``now_s`` is wall time (seconds since the Unix epoch, for windows),
``boot_ms`` boot time (milliseconds, for holds).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Final

from licet.domain.ids import UNITS_MAX, LimitKey
from licet.wire.registers import WINDOW_GRACE_S, Pair, marker_name, parts_of_marker, quota_name
from licet_sidecar.core.lease import HOLD_MS, NO_PAIR, Kind, Lease, RateShare, Terms
from licet_sidecar.core.settling import Ask, Granted, Outcome, SettleAnswer, SettleCall, Status

IDLE_MS: Final = 300_000
"""A lease nobody spent from for this long goes back. Long, so that tenants met rarely are warm when met again;
whoever is short of units meanwhile calls them back at once."""

DEMAND_S: Final = 3
"""Seconds of recent demand a refill asks for. It is due when half is gone, and upkeep comes each 1.25 s: what is held
lasts for about two seconds, and does not run dry in between.
"""

RATE_IDLE_MS: Final = 10_000
"""A share of a rate that nobody used for this long goes back."""

DENIAL_KEPT_MS: Final = 250
"""How long "the quota has no more than this" is believed before Redis is asked again: bounds the calls of a tenant at
its limit to four a second and sidecar, and the delay until returned units are found."""

RATE_MIN: Final = 0.001
"""Units a second; demand below it counts as none."""

PREFETCH_S: Final = 2
"""How long before a window ends the next one's lease is taken, when there is demand."""

QUOTAS_PER_CALL_MAX: Final = 64
"""Quotas in a call that a check waits for. The script runs about 10 µs a quota, and blocks Redis meanwhile."""

QUOTAS_PER_BULK_CALL_MAX: Final = 256
"""Quotas in a call that no check waits for. With one call a round of upkeep, about 12,000 leases of one tenant are kept
alive; what is more lapses, and is leased again when it is asked for."""

EMPTY_KEPT_MS: Final = 10_000
"""How long a lease that holds nothing, and of which nothing was spent, is kept for what was heard of its quota."""


@dataclass(slots=True)
class TenantLeases:
    """Everything held for one tenant.

    ``leases``, by (limit key, scope digest): those of the windows that checks ask for. ``others``, by name of the
    quota: those of windows to come, taken ahead of need, and of ended ones, until Redis takes no more calls for them.
    """

    tenant: str
    pair: Pair = NO_PAIR
    leases: dict[tuple[LimitKey, str], Lease] = field(default_factory=dict)
    others: dict[str, Lease] = field(default_factory=dict)
    outstanding: SettleCall | None = None
    needs: dict[Lease, int] = field(default_factory=dict)
    """Units that checks wait for."""
    due: dict[Lease, None] = field(default_factory=dict)
    """Leases that the next calls are to speak of, in this order."""
    by_age: list[tuple[int, int, Lease]] = field(default_factory=list)
    """A heap of (when last asked about, a number, lease) of all that Redis has to know of, once each. What was asked
    about since is found further down when it comes to the top."""
    lowered: list[tuple[Lease, int]] = field(default_factory=list)
    """Leases whose cap the last ``begin_call`` lowered, and what it was."""
    why: str = ""

    def all(self) -> Iterator[Lease]:
        """Every lease, of whatever window."""
        yield from self.leases.values()
        yield from self.others.values()

    def find(self, quota: str) -> Lease | None:
        """The lease of a quota, by its name."""
        if (lease := self.others.get(quota)) is None:
            lease = self.leases.get(parts_of_marker(quota.rpartition(":")[0]))
        return lease if lease is not None and lease.quota == quota else None

    @property
    def holds_units(self) -> bool:
        """Whether anything would be lost by forgetting this tenant: units held, reserved or spent in open windows."""
        return any(lease.cap or lease.used or lease.unsure for lease in self.all())


class LeaseBook:
    """All leases of a sidecar, and the calls about them."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self._op = 0
        self._redis_ahead_ms: int | None = None
        self.live = 1
        """Sidecars that share the quotas, as last heard."""
        self.heard_ms = 0
        """When Redis was last heard, boot time; 0 before that."""
        self.tenants: dict[str, TenantLeases] = {}
        self._numbers = count()

    def of(self, tenant: str) -> TenantLeases:
        """The tenant's leases; made when there are none."""
        held = self.tenants.get(tenant)
        if held is None:
            held = self.tenants[tenant] = TenantLeases(tenant)
        return held

    def lease(
        self,
        held: TenantLeases,
        limit_key: LimitKey,
        scope: str,
        start: int,
        end: int,
        terms: Terms,
        boot_ms: int,
    ) -> Lease:
        """The lease for the window ``[start, end)``; an empty one when none is held."""
        key = (limit_key, scope)
        lease = held.leases.get(key)
        if lease is None or lease.start != start or isinstance(lease, RateShare) != (terms.kind is Kind.RATE):
            lease = self._lease_of_window(held, lease, limit_key, scope, start, end, terms)
        lease.end = end
        if lease.terms is not terms:
            raised = terms.amount - lease.amount
            # Of a lowered limit nothing is held back, nor of a soft one that became hard and may be leased past its
            # amount: what is not spent goes back, and is leased again if there is any.
            lease.wanted |= raised < 0 or (lease.kind is Kind.SOFT and terms.kind is Kind.HARD)
            # Of a raised one there is more than Redis last said, and what was all gone may not be any more.
            lease.remaining = max(0, lease.remaining + raised)
            lease.over = max(0, lease.over - max(0, raised)) if terms.kind is Kind.SOFT else 0
            lease.short_until_ms = lease.heard_ms = 0
            lease.adopt(terms, boot_ms)
        return lease

    @staticmethod
    def _lease_of_window(
        held: TenantLeases, lease: Lease | None, limit_key: LimitKey, scope: str, start: int, end: int, terms: Terms
    ) -> Lease:
        key = (limit_key, scope)
        wanted = held.others.pop(quota_name(limit_key, scope, start), None)
        if wanted is None or (wanted.kind is Kind.RATE) != (terms.kind is Kind.RATE):
            of_kind = RateShare if terms.kind is Kind.RATE else Lease
            wanted = of_kind(limit_key, scope, start, end, terms)
        if lease is not None:
            wanted.rate = lease.rate
            held.others[lease.quota] = lease  # rule 6
        held.leases[key] = wanted
        return wanted

    @staticmethod
    def can_spend(lease: Lease, units: int, boot_ms: int) -> bool:
        """Rule 1."""
        return lease.used + lease.reserved + units <= lease.cap and (units == 0 or boot_ms < lease.hold_until_ms)

    @staticmethod
    def known_short(lease: Lease, units: int, boot_ms: int) -> bool:
        """Whether Redis said, lately enough, that not even with the units others hold idle this can be had."""
        if isinstance(lease, RateShare):
            missing = lease.share_for(units) - lease.cap
            return boot_ms < lease.short_until_ms and missing > lease.remaining + lease.idle_elsewhere
        return boot_ms < lease.short_until_ms and units - max(0, lease.free) > lease.remaining + lease.idle_elsewhere

    @staticmethod
    def spend(lease: Lease, units: int, boot_ms: int) -> bool:
        """Takes ``units``; the caller has checked ``can_spend``. Whether a refill is due."""
        lease.used += units
        lease.spent_lately += units
        lease.spent_ms = boot_ms
        return lease.cap - lease.used - lease.reserved < lease.low_water

    @staticmethod
    def unspend(lease: Lease, units: int) -> None:
        """Gives back what ``spend`` took, when the decision could not be logged and was not answered."""
        lease.used -= units

    @staticmethod
    def overdraw(lease: Lease, units: int, boot_ms: int) -> None:
        """Notes that ``units`` are about to be taken that no lease covers. Redis is told of them later."""
        if boot_ms >= lease.hold_until_ms and lease.free > 0:
            lease.remaining += lease.free
            LeaseBook._lower(lease, boot_ms)  # rule 7
        beyond = units - max(0, lease.free)
        lease.degraded += beyond
        lease.remaining = max(0, lease.remaining - beyond)
        lease.spent_ms = boot_ms
        lease.unsure = True

    def need(self, held: TenantLeases, lease: Lease, units: int) -> None:
        """A check waits for ``units`` of ``lease``: the next call has to bring them."""
        if lease.dropped:  # while the check waited for something else
            lease = self._taken_back(held, lease)
        held.needs[lease] = max(held.needs.get(lease, 0), units)

    @staticmethod
    def _taken_back(held: TenantLeases, lease: Lease) -> Lease:
        """A dropped lease in the book again, or the one that took its place."""
        if (present := held.find(lease.quota)) is not None:
            return present
        lease.dropped = False
        if held.leases.setdefault((lease.limit_key, lease.scope), lease) is not lease:
            held.others[lease.quota] = lease
        return lease

    def note(self, held: TenantLeases, lease: Lease) -> None:
        """Redis has to be told of this lease, whatever was said of it before."""
        held.due[lease] = None
        self._age(held, lease)

    # Calls

    def begin_call(
        self,
        held: TenantLeases,
        *,
        revision: int,
        boot_ms: int,
        giving_back: bool = False,
        retiring: bool = False,
        since_ms: int = -1,
    ) -> SettleCall | None:
        """The next call for a tenant; ``None`` when one is outstanding or there is nothing to say.

        Acquires what waiting checks need, refills what runs low, speaks of what is due and of what no call after
        ``since_ms`` (boot time; a loss) was answered for. Units that are
        wanted elsewhere, idle, or (``giving_back``) all of them, are returned: their cap is lowered here, and the
        shell must log the leases whose cap was lowered, and those not logged yet, before it sends the call (rule 3).
        ``retiring`` also gives up the registers; the shell has made sure that this sidecar's id is never used again.
        """
        if held.outstanding is not None:
            return None
        asks: list[Ask] = []
        durable = False
        held.lowered.clear()
        for lease in self._by_urgency(held, boot_ms, since_ms, all_of_it=retiring):
            cap = lease.cap
            need = held.needs.pop(lease, 0)
            if boot_ms >= lease.hold_until_ms:
                self._lower(lease, boot_ms)  # rule 7
            if isinstance(lease, RateShare):
                want, least = self._share_asked(lease, need, boot_ms, giving_back or retiring)
            else:
                want, least = self._units_asked(lease, need, boot_ms, giving_back or retiring)
            kind = Kind.HARD if lease.within and lease.kind is Kind.SOFT else lease.kind
            known = lease.pair == held.pair and (lease.cap > 0 or lease.used + lease.reserved > 0)
            if lease.cap < cap:
                held.lowered.append((lease, cap))
            lease.unsure = True
            self._age(held, lease)
            durable |= lease.durable and want > 0
            asks.append(Ask(lease, lease.cap, lease.used, lease.reserved, want, least, lease.amount, kind, known))
        if not asks:
            return None
        self._op += 1
        held.outstanding = SettleCall(
            held.tenant, self._op, held.pair, revision, tuple(asks), boot_ms, durable, retiring
        )
        return held.outstanding

    def _units_asked(self, lease: Lease, need: int, boot_ms: int, giving_back: bool) -> tuple[int, int]:
        """(want, min) of a call; lowers the cap of what is returned."""
        demand = min(UNITS_MAX, round(lease.rate * DEMAND_S))
        if need:
            shortfall = max(0, need - max(0, lease.free))
            return max(shortfall, demand), shortfall
        if giving_back or lease.wanted or self._is_idle(lease, boot_ms):
            self._lower(lease, boot_ms)
            lease.wanted = False
        elif lease.free < lease.low_water:
            return max(1, demand), 0
        return 0, 0

    def _share_asked(self, share: RateShare, need: int, boot_ms: int, giving_back: bool) -> tuple[int, int]:
        """The same for a share of a rate. ``need``: units that the bucket must be able to hold."""
        wanted = max(share.share_wanted(), share.share_for(need))
        if need:  # what others need they call back, and what nobody uses goes back
            wanted = max(wanted, share.amount // self.live)
        if giving_back or (not need and self._is_idle(share, boot_ms)):
            share.lower(0, boot_ms)
        elif share.wanted:
            # Others lack some: whoever has more than a fair share keeps that, or what it uses if that is less.
            share.lower(max(min(wanted, share.amount // self.live), share.share_for(need)), boot_ms)
        elif wanted > share.cap:
            return wanted - share.cap, max(0, share.share_for(need) - share.cap)
        share.wanted = False
        return 0, 0

    @staticmethod
    def _lower(lease: Lease, boot_ms: int) -> None:
        """Gives up what is not spent or reserved."""
        if isinstance(lease, RateShare):
            lease.lower(0, boot_ms)
            return
        returned = max(0, lease.free)
        lease.cap -= returned
        lease.over = max(0, lease.over - returned)
        lease.low_water = 0

    def end_call(self, held: TenantLeases, call: SettleCall, answer: SettleAnswer, boot_ms: int) -> Outcome | None:
        """Takes an answer. ``None`` when it is not the answer to the outstanding call: it changes nothing (rule 4)."""
        if held.outstanding is not call or (answer.incarnation, answer.op) != (self.incarnation, call.op):
            return None
        held.outstanding = None
        self.heard(answer.redis_ms, boot_ms)
        if answer.status is not Status.OK:
            self._still_due(held, call)
        match answer.status:
            case Status.OK if call.retiring:
                for ask in call.asks:
                    self._drop(held, ask.lease)  # it is Redis' to count now
                return Outcome.SETTLED
            case Status.OK:
                return self._settled(held, call, answer, boot_ms)
            case Status.STALE:
                learned = answer.pair != held.pair
                held.pair = answer.pair
                held.why = "learning"
                self._doubt(held)
                return Outcome.AGAIN if learned else Outcome.ASK_CONTROL_PLANE
            case Status.LEARN:
                held.why = "mark-missing" if answer.about < 0 else "quota-lost"
                self._doubt(held)
                return Outcome.ASK_CONTROL_PLANE
            case Status.UNPUBLISHED:
                held.why = "unpublished"
                return Outcome.ASK_CONTROL_PLANE
            case Status.OUTDATED:
                # No refill until a check needs it again: the tenant's other leases are to be kept alive meanwhile.
                call.asks[answer.about].lease.low_water = 0
                return Outcome.SYNC
            case Status.CLOSED:
                ask = call.asks[answer.about]
                expected = ask.min > 0 and held.leases.get((ask.lease.limit_key, ask.lease.scope)) is ask.lease
                if not ask.lease.reserved:  # else its reservations are settled without Redis
                    self._drop(held, ask.lease)
                return Outcome.CLOCK if expected else Outcome.SETTLED
            case Status.EARLY:
                self._drop(held, call.asks[answer.about].lease)
                return Outcome.CLOCK
            case Status.SEALED if call.retiring:
                # By an earlier call of this kind, whose answer was lost with the server.
                self._drop(held, call.asks[answer.about].lease)
                return Outcome.SETTLED
            case Status.SEALED | Status.FENCED:
                return Outcome.REPLACED

    def abandon_call(self, held: TenantLeases, call: SettleCall) -> None:
        """Takes a call back that Redis refused as a whole without running it (out of memory, say)."""
        if held.outstanding is call:
            held.outstanding = None
            self._still_due(held, call)

    @staticmethod
    def _still_due(held: TenantLeases, call: SettleCall) -> None:
        """A call said nothing, so that what it was about is still to be said."""
        held.due.update((ask.lease, None) for ask in call.asks)

    def unasserted(self, since_ms: int, boot_ms: int) -> list[str]:
        """Tenants that hold something no call begun after ``since_ms`` (boot time) was answered for.

        An unanswered call from before counts: its answer may still be on its way, with units that were lost since.
        """
        return [
            tenant
            for tenant, held in self.tenants.items()
            if (held.outstanding is not None and held.outstanding.sent_boot_ms <= since_ms)
            or self._oldest_ms(held, boot_ms, since_ms + 1) <= since_ms
        ]

    def has_returned(self, held: TenantLeases, boot_ms: int) -> bool:
        """Whether nothing is held of a tenant's quotas that could be spent."""
        return held.outstanding is None and not self.returnable(held, boot_ms)

    def is_told(self, held: TenantLeases, boot_ms: int) -> bool:
        """Whether Redis knows everything about a tenant's leases that it still takes."""
        return held.outstanding is None and not self.sayable(held, boot_ms)

    def returnable(self, held: TenantLeases, boot_ms: int) -> list[Lease]:
        """Leases with units that could be spent, those with most of them first."""
        found = [lease for lease in held.all() if lease.free > 0 and self._is_sayable(lease, boot_ms)]
        found.sort(key=lambda lease: -lease.free)
        return found

    def sayable(self, held: TenantLeases, boot_ms: int) -> list[Lease]:
        """Leases that Redis still takes calls about, and has to know of."""
        return [lease for lease in held.all() if self._is_sayable(lease, boot_ms)]

    def is_unsaid(self, held: TenantLeases, boot_ms: int, since_ms: int) -> bool:
        """Whether there is more to say: what is due, or what no call after ``since_ms`` was answered for."""
        return bool(held.due) or self._oldest_ms(held, boot_ms, since_ms + 1) <= since_ms

    def heard(self, redis_ms: int, boot_ms: int) -> None:
        """The Redis clock showed ``redis_ms``, some time before ``boot_ms``."""
        self._redis_ahead_ms = redis_ms - boot_ms
        self.heard_ms = boot_ms

    def answered_after_ms(self, boot_ms: int) -> int:
        """An instant of the Redis clock after which everything held now was answered for; 0 when none is known."""
        if self._redis_ahead_ms is None:
            return 0
        after_ms = boot_ms
        for held in self.tenants.values():
            if held.outstanding is not None:
                after_ms = min(after_ms, held.outstanding.sent_boot_ms)
            after_ms = self._oldest_ms(held, boot_ms, after_ms)
        return max(0, after_ms + self._redis_ahead_ms)

    # Upkeep

    def tick(self, held: TenantLeases, now_s: int, boot_ms: int, elapsed_s: float) -> bool:
        """Once a second for each tenant held: measures demand, drops ended windows. Whether a call is due."""
        self.tick_some(held, list(held.all()), now_s, boot_ms, elapsed_s)
        return bool(held.due)

    def tick_some(
        self, held: TenantLeases, leases: Iterable[Lease], now_s: int, boot_ms: int, elapsed_s: float
    ) -> None:
        """``tick`` of a part of a tenant's leases, half a microsecond for each. What is due is in ``due``."""
        for lease in leases:
            if isinstance(lease, RateShare):
                if self._tick_share(lease, boot_ms, elapsed_s):
                    held.due[lease] = None
            elif now_s >= lease.end:
                # What was spent is in the ledger; what was not lapsed with the window.
                if not self._is_sayable(lease, boot_ms) and lease.reserved == 0 and not self._is_asked(held, lease):
                    self._drop(held, lease)
                continue
            else:
                if lease.rate or lease.spent_lately:
                    lease.rate = _settling((lease.rate + lease.spent_lately / elapsed_s) / 2)
                    lease.spent_lately = 0
                free = lease.cap - lease.used - lease.reserved
                if (
                    lease.wanted
                    or lease.unsure
                    or free < lease.low_water
                    or (free <= 0 and lease.said != lease.used + lease.reserved)
                    or (
                        (free > 0 or lease.reserved > 0)
                        and (self._is_idle(lease, boot_ms) or boot_ms >= lease.asked_ms + lease.keepalive_ms)
                    )
                ):
                    held.due[lease] = None
            if lease.cap or lease.used or lease.unsure:
                if not lease.aged:
                    self._age(held, lease)
            elif self._is_forgettable(lease, boot_ms) and not self._is_asked(held, lease):
                self._drop(held, lease)

    def _tick_share(self, share: RateShare, boot_ms: int, elapsed_s: float) -> bool:
        share.rate = _settling((share.rate + share.spent_lately / elapsed_s) / 2)
        share.spent_lately = 0
        if share.wanted or share.unsure or share.share_wanted() > share.cap:
            return True
        return share.cap > 0 and (self._is_idle(share, boot_ms) or boot_ms >= share.asked_ms + share.keepalive_ms)

    def prefetch(self, held: TenantLeases, lease: Lease, start: int, end: int) -> None:
        """Makes an empty lease for the window after ``lease``'s, so that the next call takes it ahead of need."""
        if quota_name(lease.limit_key, lease.scope, start) in held.others:
            return
        upcoming = Lease(lease.limit_key, lease.scope, start, end, lease.terms)
        upcoming.rate = lease.rate
        held.others[upcoming.quota] = upcoming
        held.needs[upcoming] = 1

    def restore(self, tenant: str, lease: Lease, boot_ms: int) -> None:
        """Takes up a lease of an earlier incarnation, from the log. It can be spent once a call was answered."""
        lease.hold_until_ms = 0
        lease.spent_ms = boot_ms
        lease.unsure = lease.logged = True
        held = self.of(tenant)
        held.others[lease.quota] = lease
        self.note(held, lease)

    def forget(self, tenant: str) -> None:
        """Drops a tenant whose units were all returned, or whose windows are over."""
        self.tenants.pop(tenant, None)

    @staticmethod
    def marker(lease: Lease) -> str:
        """Name of the lease's marker in the mark."""
        return marker_name(lease.limit_key, lease.scope)

    def _settled(self, held: TenantLeases, call: SettleCall, answer: SettleAnswer, boot_ms: int) -> Outcome:
        missed: list[tuple[Ask, Granted]] = []
        for ask, granted in zip(call.asks, answer.granted, strict=True):
            lease = ask.lease
            self._take_grant(lease, ask, granted, call.sent_boot_ms + HOLD_MS, boot_ms)
            lease.said = ask.used + ask.reserved
            lease.pair = call.pair
            lease.unsure = False
            if ask.min:
                lease.spent_ms = boot_ms
            lease.asked_ms = call.sent_boot_ms
            lease.remaining = max(0, granted.amount - granted.sum)
            lease.heard_ms = boot_ms if granted.amount == lease.amount else 0
            lease.held_elsewhere = max(0, granted.sum - granted.g)
            lease.used_elsewhere = max(0, granted.used - granted.u - ask.reserved)
            lease.idle_elsewhere = max(0, granted.sum - granted.used - (granted.g - ask.used - ask.reserved))
            if granted.wanted and not ask.want:
                lease.wanted = True
                if lease.free > 0:
                    held.due[lease] = None
            if ask.min and granted.g < max(ask.cap, ask.used + ask.reserved) + ask.min:
                missed.append((ask, granted))
        if not missed:
            return Outcome.SETTLED
        if answer.phase != "open":
            held.why = "learning"
            return Outcome.ASK_CONTROL_PLANE
        short = [(ask, granted) for ask, granted in missed if _room(ask, granted) < ask.min]
        if not short:
            return Outcome.AGAIN  # this call asserted or adopted
        hopeless = False
        for ask, granted in short:
            lease = ask.lease
            lease.short_until_ms = boot_ms + DENIAL_KEPT_MS
            hopeless |= _room(ask, granted) + lease.idle_elsewhere < ask.min
        return Outcome.SETTLED if hopeless else Outcome.RECALL

    @staticmethod
    def _take_grant(lease: Lease, ask: Ask, granted: Granted, hold_until_ms: int, boot_ms: int) -> None:
        if isinstance(lease, RateShare):
            share = granted.g
            if granted.sum > lease.amount and share > lease.cap:
                # The rate was lowered and the shares do not fit into it yet: the next call lowers this one's register.
                share, lease.wanted = lease.cap, True
            lease.granted(share, hold_until_ms, boot_ms)
            return
        lease.cap = granted.g
        lease.used += max(0, granted.u - ask.used)
        lease.hold_until_ms = hold_until_ms
        if ask.kind is Kind.SOFT and granted.d:
            beyond = min(granted.d, max(0, granted.sum - granted.amount))
            lease.over += beyond
            lease.wanted |= beyond > 0 and lease.kind is Kind.HARD  # it became hard while the call was under way
        # The next refill is due when half is gone: near the limit, where refills bring little, the number of calls then
        # stays logarithmic.
        lease.low_water = lease.free // 2

    def give_up_recall(self, asks: Iterable[Ask], boot_ms: int) -> None:
        """Others did not return what they hold in time: for a moment, count it as not to be had."""
        for ask in asks:
            if ask.min:
                ask.lease.idle_elsewhere = 0
                ask.lease.short_until_ms = boot_ms + DENIAL_KEPT_MS

    def _by_urgency(self, held: TenantLeases, boot_ms: int, since_ms: int, *, all_of_it: bool) -> list[Lease]:
        """Leases for the next call: those that a check waits for first, then what is due, then what is unsaid since
        ``since_ms``. Where a tenant has few, all go along that have anything to say: one call keeps them all alive.
        """
        most = QUOTAS_PER_CALL_MAX if held.needs else QUOTAS_PER_BULK_CALL_MAX
        chosen = dict.fromkeys(islice(held.needs, most))
        for lease in list(islice(held.due, 2 * most)):
            if len(chosen) == most:
                break
            del held.due[lease]
            if not lease.dropped and self._is_sayable(lease, boot_ms):
                chosen[lease] = None
        while len(chosen) < most and self._oldest_ms(held, boot_ms, since_ms + 1) <= since_ms:
            lease = heapq.heappop(held.by_age)[2]
            lease.aged = False  # until it is in the call
            chosen[lease] = None
        if len(chosen) < most and len(held.leases) + len(held.others) <= QUOTAS_PER_CALL_MAX:
            along = [
                lease
                for lease in held.all()
                if lease not in chosen and self._is_sayable(lease, boot_ms) and (all_of_it or not lease.is_reported)
            ]
            along.sort(key=lambda lease: lease.asked_ms)
            chosen.update(dict.fromkeys(along[: most - len(chosen)]))
        return list(chosen)

    def _age(self, held: TenantLeases, lease: Lease) -> None:
        if not lease.aged:
            lease.aged = True
            heapq.heappush(held.by_age, (lease.asked_ms, next(self._numbers), lease))

    def _oldest_ms(self, held: TenantLeases, boot_ms: int, at_most: int) -> int:
        """When the lease was asked about that was not for longest, of those that Redis has to know; or ``at_most``."""
        while held.by_age and held.by_age[0][0] < at_most:
            asked_ms, number, lease = held.by_age[0]
            if lease.dropped or not self._is_sayable(lease, boot_ms):
                heapq.heappop(held.by_age)
                lease.aged = False
            elif lease.asked_ms != asked_ms:
                heapq.heapreplace(held.by_age, (lease.asked_ms, number, lease))
            else:
                return asked_ms
        return at_most

    def _is_sayable(self, lease: Lease, boot_ms: int) -> bool:
        """Whether Redis has to know what is held of this lease, and still takes it."""
        if not (lease.cap or lease.used or lease.unsure):
            return False
        if self._redis_ahead_ms is None:
            return True
        return boot_ms + self._redis_ahead_ms < (lease.end + WINDOW_GRACE_S) * 1_000

    @staticmethod
    def _is_asked(held: TenantLeases, lease: Lease) -> bool:
        if lease in held.needs:
            return True
        return held.outstanding is not None and any(ask.lease is lease for ask in held.outstanding.asks)

    @staticmethod
    def _is_forgettable(lease: Lease, boot_ms: int) -> bool:
        """Whether nothing would be lost by dropping the lease, given that Redis has nothing of it."""
        heard_ms = max(lease.asked_ms, lease.heard_ms, lease.short_until_ms)
        return lease.is_empty and not lease.rate and boot_ms - heard_ms > EMPTY_KEPT_MS

    @staticmethod
    def _is_idle(lease: Lease, boot_ms: int) -> bool:
        idle_ms = RATE_IDLE_MS if lease.kind is Kind.RATE else IDLE_MS
        return lease.free > 0 and lease.reserved == 0 and boot_ms - lease.spent_ms > idle_ms

    def _doubt(self, held: TenantLeases) -> None:
        """Redis lost something: also what was returned may be in a register again."""
        for lease in held.all():
            lease.unsure = True
            if not lease.aged:
                self._age(held, lease)
        held.due = dict.fromkeys(held.all())

    @staticmethod
    def _drop(held: TenantLeases, lease: Lease) -> None:
        key = (lease.limit_key, lease.scope)
        if held.leases.get(key) is lease:
            del held.leases[key]
        elif held.others.get(lease.quota) is lease:
            del held.others[lease.quota]
        lease.dropped = True
        held.due.pop(lease, None)


def _room(ask: Ask, granted: Granted) -> int:
    """Units that nobody holds, and that may be granted on such a call."""
    return max(0, (UNITS_MAX if ask.kind is Kind.SOFT else granted.amount) - granted.sum)


def _settling(rate: float) -> float:
    """A demand that is as good as none is none."""
    return rate if rate >= RATE_MIN else 0.0
