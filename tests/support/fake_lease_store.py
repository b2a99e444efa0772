"""Quota registers in plain Python: what ``settle.lua`` and the publisher's scripts promise, and a store over them.

Written from the protocol (``docs/adr/0002-registers-not-tokens.md``) and the scripts' headers, not from the scripts:
sums are never stored but added up when asked for, so that a script that loses count answers differently. Time stands
still unless a test moves ``now_ms``; another ``run_id`` is another Redis server.

``without`` takes a rule out. The simulation must notice each: a rule nobody misses is a rule nobody tests.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

from licet.wire.registers import HOLD_MARGIN_S, HOLD_S, WINDOW_GRACE_S, Marker, Pair
from licet_control_plane.publisher.marks import KeptQuota
from licet_sidecar.core.lease import Kind
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.settling import Ask, Granted, SettleAnswer, SettleCall, Status
from licet_sidecar.ports import CallRefused

UNITS_MAX: Final = 2**53 - 1
WANTED_MS: Final = 2_000
GENEROUS_SHARE: Final = 64
FAIR_SHARE: Final = 2
LEARNING: Final = "learning"
OPEN: Final = "open"
NEVER: Final = Pair(0, "0")
"""The pair of a register that no sidecar asserted: the ledger filled it."""


class Rule(Enum):
    """What the scripts must do; each can be left out."""

    LEARN_ON_NEW_RUN = auto()
    """1. Another run id puts the mark in learning."""
    CHECK_PAIR = auto()
    """1. A call under another pair than the mark's is ``STALE``."""
    UNPUBLISHED = auto()
    """1. A call that knows newer limits than the mark gets nothing."""
    OUTDATED = auto()
    """2. A limit that newer ones replaced is not taken for one that is used up."""
    MARKERS = auto()
    """1. A marker without its hash is a loss."""
    CLOSE = auto()
    """2. A window that is over takes no calls."""
    SAID = auto()
    """2. While learning, a hash that something was said into is missed."""
    KNOWN = auto()
    """2. A register that must be there and is not was folded: its sidecar is ``SEALED``."""
    FENCE = auto()
    """3. A call older than the register's last is refused."""
    REPEAT = auto()
    """3. The same call again gets the same answer."""
    ASSERT_EXACTLY = auto()
    """4. Under a new pair a register becomes what its sidecar says it is."""
    ASSERT_GRANTS_NOTHING = auto()
    """4. The call that asserts is granted nothing."""
    ADOPT = auto()
    """5. Where more is registered than the caller knows of, the answer tells, and grants nothing."""
    FLOOR = auto()
    """5. A return never takes a register below what is spent and reserved."""
    ONLY_OPEN = auto()
    """5. Nothing is granted while learning."""
    WITHIN_AMOUNT = auto()
    """5. A grant leaves the sum within the amount."""
    ALL_OR_NOTHING = auto()
    """5. If one quota of a call falls short, no quota is granted anything."""
    REMEMBER_SPENT = auto()
    """4. What was reported as spent stays spent."""
    OPEN_SAME_PAIR = auto()
    """*open* works only under the pair that was learned."""
    OPEN_NOT_OLDER = auto()
    """*open* does not replace newer limits by older ones."""
    FILL_SAID = auto()
    """*fill* does not make a hash again that something was said into."""
    OPEN_SAID = auto()
    """*open* does not open when a hash is missing that something was said into."""
    SHARES_END = auto()
    """A share of a rate that is over is not raised again by its sidecar, which may still believe in it."""
    SWEEP_LATE = auto()
    """A share is taken back only when its holder may not use it any more."""
    SEAL_LATE = auto()
    """*seal* touches only what may not be spent any more."""
    SEAL_FLOOR = auto()
    """*seal* leaves what was spent and reserved."""
    RELEASE = auto()
    """*release* frees what came back with an older state and nobody holds."""
    FILL_UNASSERTED = auto()
    """*fill* leaves registers alone that asserted themselves."""


@dataclass(slots=True)
class FakeRegister:
    """What one quota knows of one sidecar."""

    g: int = 0
    u: int = 0
    h: int = 0
    incarnation: int = 0
    op: int = 0
    pair: Pair = NEVER
    d: int = 0
    sealed: bool = False
    time_ms: int = 0


@dataclass(slots=True)
class FakeQuota:
    """One quota hash."""

    base: int = 0
    wanted_ms: int = 0
    registers: dict[str, FakeRegister] = field(default_factory=dict)

    @property
    def sum(self) -> int:
        """Units that are not to be had."""
        return self.base + sum(register.g for register in self.registers.values())

    @property
    def used(self) -> int:
        """Units spent or reserved, as last reported."""
        return self.base + sum(register.u + register.h for register in self.registers.values())


@dataclass(slots=True)
class FakeMark:
    """One tenant's mark."""

    pair: Pair
    phase: str
    since_ms: int
    revision: int = 0
    amounts: dict[str, int] = field(default_factory=dict)
    markers: dict[str, Marker] = field(default_factory=dict)


@dataclass(slots=True)
class Contents:
    """All a server holds; a deep copy of it is a snapshot."""

    marks: dict[str, FakeMark] = field(default_factory=dict)
    quotas: dict[tuple[str, str], FakeQuota] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry:
    """One quota of a call under way: ``register`` as it will be written, unless the call is refused; ``others`` is
    the sum without it.
    """

    ask: Ask
    quota: FakeQuota
    register: FakeRegister
    others: int
    asserting: bool
    repeated: bool
    grant: int = 0
    short: bool = False
    lacks: bool = False
    swept: list[str] = field(default_factory=list)
    retired: bool = False


class _Refused(Exception):
    def __init__(self, status: Status, about: int = -1) -> None:
        self.status = status
        self.about = about


class FakeRegisters:
    """A Redis server with nothing but quota registers in it."""

    def __init__(self, *, now_ms: int, run_id: str = "run1", without: frozenset[Rule] = frozenset()) -> None:
        self.now_ms = now_ms
        self.run_id = run_id
        self.without = without
        self.contents = Contents()
        self.asks: list[tuple[str, str]] = []
        self.listeners: list[asyncio.Queue[tuple[str, str, list[str]]]] = []

    # Faults

    def snapshot(self) -> Contents:
        """What a replica holds at this moment."""
        return copy.deepcopy(self.contents)

    def restart(self, run_id: str) -> None:
        """Another process with the same contents."""
        self.run_id = run_id

    def wipe(self, run_id: str) -> None:
        """Another process that holds nothing."""
        self.run_id = run_id
        self.contents = Contents()

    def roll_back(self, snapshot: Contents, run_id: str) -> None:
        """A failover to a replica that had fallen behind."""
        self.run_id = run_id
        self.contents = copy.deepcopy(snapshot)

    def lose_quota(self, tenant: str, quota: str) -> None:
        """One hash is gone, and the mark is not."""
        self.contents.quotas.pop((tenant, quota), None)

    def lose_mark(self, tenant: str) -> None:
        """The mark is gone, and the quotas are not."""
        self.contents.marks.pop(tenant, None)

    # The sidecar's script

    def settle(self, sidecar: str, incarnation: int, call: SettleCall, live: int) -> SettleAnswer:
        """One call, wholly or not at all.

        Raises:
            CallRefused: an amount is no integer in [0, 2^53).
        """
        mark = self.contents.marks.get(call.tenant)
        try:
            granted = self._settle(mark, sidecar, incarnation, call, max(1, live))
            status, about = Status.OK, -1
        except _Refused as refused:
            granted = ()
            status, about = refused.status, refused.about
        return SettleAnswer(
            status=status,
            incarnation=incarnation,
            op=call.op,
            pair=mark.pair if mark else Pair(0, ""),
            phase=mark.phase if mark else "",
            redis_ms=self.now_ms,
            granted=granted,
            about=about,
        )

    def _settle(
        self, mark: FakeMark | None, sidecar: str, incarnation: int, call: SettleCall, live: int
    ) -> tuple[Granted, ...]:
        if mark is None:
            raise _Refused(Status.LEARN)
        self._notice_new_run(mark)
        if call.pair != mark.pair and self._has(Rule.CHECK_PAIR):
            raise _Refused(Status.STALE)
        markers = dict(mark.markers)
        entries = [
            self._examine(mark, markers, sidecar, incarnation, call, ask, about) for about, ask in enumerate(call.asks)
        ]
        if not all(entry.repeated for entry in entries):
            self._move(mark, incarnation, call, entries, live)
            mark.markers = markers
            for entry in entries:
                self._write(call.tenant, sidecar, entry)
        return tuple(self._granted(mark, entry) for entry in entries)

    def _examine(
        self,
        mark: FakeMark,
        markers: dict[str, Marker],
        sidecar: str,
        incarnation: int,
        call: SettleCall,
        ask: Ask,
        about: int,
    ) -> _Entry:
        for units in (ask.cap, ask.used, ask.reserved, ask.want, ask.min, ask.amount, ask.used + ask.reserved):
            if units != int(units) or not 0 <= units <= UNITS_MAX:
                raise CallRefused(f"LICET quota {about + 1}: units must be integers from 0 to 2^53 - 1")
        lease = ask.lease
        now_s = self.now_ms // 1_000
        if now_s >= lease.end + WINDOW_GRACE_S and self._has(Rule.CLOSE):
            raise _Refused(Status.CLOSED, about)
        if lease.start > now_s + WINDOW_GRACE_S:
            raise _Refused(Status.EARLY, about)
        replaced = mark.revision > call.revision and lease.limit_key not in mark.amounts
        if replaced and mark.phase == OPEN and (ask.want or ask.min) and self._has(Rule.OUTDATED):
            raise _Refused(Status.OUTDATED, about)
        quota = self.contents.quotas.get((call.tenant, lease.quota))
        name = LeaseBook.marker(lease)
        markers[name] = self._marker_for(mark, markers.get(name), ask, quota is not None, about)
        quota = quota or FakeQuota()
        old = quota.registers.get(sidecar)
        if old is None:
            # Who holds nothing has nothing to assert.
            asserting = ask.cap > 0 or ask.used + ask.reserved > 0
            if ask.known and ask.kind is Kind.RATE:
                asserting = False
            elif ask.known and self._has(Rule.KNOWN):
                raise _Refused(Status.SEALED, about)
            return _Entry(ask, quota, FakeRegister(), quota.sum, asserting=asserting, repeated=False)
        if old.sealed and not (call.retiring and (old.incarnation, old.op) == (incarnation, call.op)):
            raise _Refused(Status.SEALED, about)
        if (old.incarnation, old.op) > (incarnation, call.op) and self._has(Rule.FENCE):
            raise _Refused(Status.FENCED, about)
        repeated = (old.incarnation, old.op) == (incarnation, call.op) and self._has(Rule.REPEAT)
        others = quota.sum - old.g
        return _Entry(ask, quota, replace(old), others, asserting=old.pair != mark.pair, repeated=repeated)

    def _marker_for(self, mark: FakeMark, marker: Marker | None, ask: Ask, exists: bool, about: int) -> Marker:
        """What becomes of a limit's marker."""
        lease = ask.lease
        says_ms = mark.since_ms if mark.phase == LEARNING else 0
        if marker is None:
            return Marker(lease.start, lease.end, 0, says_ms, 0)
        if lease.start > marker.start:
            return Marker(lease.start, lease.end, marker.start, says_ms, marker.said_ms)
        if marker.previous_start < lease.start < marker.start:
            return Marker(marker.start, marker.end, lease.start, marker.said_ms, says_ms)
        said_ms = _said_ms(marker, lease.start)
        if not exists:
            lost = mark.phase == OPEN and self._has(Rule.MARKERS)
            if lost or (mark.phase == LEARNING and said_ms == mark.since_ms and self._has(Rule.SAID)):
                raise _Refused(Status.LEARN, about)
        if mark.phase == LEARNING and said_ms != mark.since_ms:
            marker = _saying(marker, lease.start, mark.since_ms)
        return marker._replace(end=lease.end) if lease.start == marker.start else marker

    def _move(self, mark: FakeMark, incarnation: int, call: SettleCall, entries: Sequence[_Entry], live: int) -> None:
        grants = mark.phase == OPEN or not self._has(Rule.ONLY_OPEN)
        for entry in entries:
            ask, register = entry.ask, entry.register
            if entry.repeated:
                grants = False
                continue
            acquiring = ask.want > 0 or ask.min > 0
            u = max(ask.used, register.u) if self._has(Rule.REMEMBER_SPENT) else ask.used
            floor = u + ask.reserved if self._has(Rule.FLOOR) else 0
            holds = max(ask.cap, floor)
            if entry.asserting and self._has(Rule.ASSERT_EXACTLY):
                g = holds
                grants = grants and not (acquiring and self._has(Rule.ASSERT_GRANTS_NOTHING))
            elif acquiring and register.g > ask.cap and self._has(Rule.ADOPT):
                g = max(register.g, floor)
                grants = False
            elif ask.kind is Kind.RATE and not entry.asserting and self._has(Rule.SHARES_END):
                g = min(register.g, ask.cap)
            elif entry.asserting:
                g = max(register.g, floor)
            else:
                g = holds
            if entry.others + g > UNITS_MAX:
                raise CallRefused("LICET: all sidecars together would hold more than 2^53 - 1 units")
            entry.register = FakeRegister(g, u, ask.reserved, incarnation, call.op, mark.pair, time_ms=self.now_ms)
            entry.retired = call.retiring and not ask.reserved and ask.kind is not Kind.RATE
        if grants:
            self._grant(mark, call, entries, live)

    def _grant(self, mark: FakeMark, call: SettleCall, entries: Sequence[_Entry], live: int) -> None:
        for about, entry in enumerate(entries):
            ask = entry.ask
            if ask.want == 0 and ask.min == 0:
                continue
            amount = mark.amounts.get(ask.lease.limit_key)
            if mark.revision < call.revision and amount != ask.amount and self._has(Rule.UNPUBLISHED):
                raise _Refused(Status.UNPUBLISHED, about)
            remaining = max(0, (amount or 0) - entry.others - entry.register.g)
            if ask.kind is Kind.RATE and remaining < max(ask.want, ask.min):
                entry.swept = self._over(entry.quota, ask)
                entry.others -= sum(entry.quota.registers[name].g for name in entry.swept)
                remaining = max(0, (amount or 0) - entry.others - entry.register.g)
            room = UNITS_MAX - entry.others - entry.register.g if ask.kind is Kind.SOFT else remaining
            entry.short = room < ask.min
            if entry.short and self._has(Rule.WITHIN_AMOUNT):
                continue
            if ask.kind is Kind.RATE:
                entry.grant = max(ask.want, ask.min)
                if self._has(Rule.WITHIN_AMOUNT):
                    entry.grant = min(remaining, entry.grant)
                entry.lacks = entry.grant < ask.want
                continue
            if ask.kind is Kind.SOFT and remaining < ask.min:
                entry.grant = min(room, max(ask.want, ask.min))
                continue
            generous = max(ask.want, remaining // (GENEROUS_SHARE * live))
            share = max(ask.min, min(generous, remaining // (FAIR_SHARE * live)))
            entry.grant = min(share, remaining) if self._has(Rule.WITHIN_AMOUNT) else max(share, ask.want)
        refused = any(entry.short for entry in entries) and self._has(Rule.ALL_OR_NOTHING)
        for entry in entries:
            if not refused:
                entry.register.d = entry.grant
                entry.register.g += entry.grant

    def _over(self, quota: FakeQuota, ask: Ask) -> list[str]:
        """Sidecars whose share of a rate is over."""
        after_ms = 1_000 * (HOLD_S + HOLD_MARGIN_S) if self._has(Rule.SWEEP_LATE) else 1_000
        return [name for name, one in quota.registers.items() if one.g and one.time_ms + after_ms < self.now_ms]

    def _write(self, tenant: str, sidecar: str, entry: _Entry) -> None:
        if entry.repeated:
            return
        lease = entry.ask.lease
        for name in entry.swept:
            entry.quota.registers[name].g = 0
        if entry.retired:
            entry.quota.base += entry.register.g
            entry.quota.registers[sidecar] = replace(entry.register, g=0, u=0, d=entry.register.g, sealed=True)
        else:
            entry.quota.registers[sidecar] = entry.register
        if entry.short or entry.lacks:
            entry.quota.wanted_ms = self.now_ms + WANTED_MS
        self.contents.quotas[(tenant, lease.quota)] = entry.quota

    def _granted(self, mark: FakeMark, entry: _Entry) -> Granted:
        register, quota = entry.register, entry.quota
        amount = mark.amounts.get(entry.ask.lease.limit_key, 0)
        wanted = quota.wanted_ms > self.now_ms
        return Granted(register.g, register.d, register.u, amount, quota.sum, quota.used, wanted)

    # The publisher's scripts

    def touch_mark(self, tenant: str) -> FakeMark | None:
        """What a mark says; one last used on another server learns."""
        mark = self.contents.marks.get(tenant)
        if mark is not None:
            self._notice_new_run(mark)
        return copy.deepcopy(mark)

    def begin(self, tenant: str, epoch: int) -> str | None:
        """Makes a mark, in learning, where there is none. The run id when it did."""
        if tenant in self.contents.marks:
            return None
        self.contents.marks[tenant] = FakeMark(Pair(epoch, self.run_id), LEARNING, self.now_ms)
        return self.run_id

    def relearn(self, tenant: str, old_epoch: int, epoch: int) -> str | None:
        """Puts a mark of ``old_epoch`` in learning under a greater one. The run id when it did."""
        mark = self.contents.marks.get(tenant)
        if mark is None or mark.pair.epoch != old_epoch or epoch <= old_epoch:
            return None
        since_ms = max(self.now_ms, mark.since_ms + 1)
        mark.pair, mark.phase, mark.since_ms = Pair(epoch, self.run_id), LEARNING, since_ms
        return self.run_id

    def fill(self, tenant: str, pair: Pair, sidecar: str, units: int, quota: str, marker: str, window: Marker) -> bool:
        """While learning, counts what the ledger knows a sidecar spent, unless it said so itself.

        ``quota`` is the quota's name; of ``window`` only start and end are read.
        """
        mark = self.contents.marks.get(tenant)
        if mark is None or mark.pair != pair or mark.phase != LEARNING:
            return False
        if self.now_ms // 1_000 >= window.end + WINDOW_GRACE_S:
            return False
        if self._lost_in_this_phase(mark, tenant, quota, marker, window.start):
            return False
        registers = self.contents.quotas[(tenant, quota)].registers if (tenant, quota) in self.contents.quotas else {}
        register = replace(registers.get(sidecar, FakeRegister()))
        if register.sealed or (register.pair == pair and self._has(Rule.FILL_UNASSERTED)):
            return False
        if units <= register.u and self._has(Rule.FILL_UNASSERTED):
            return False
        register.u = units
        register.g = max(register.g, units + register.h) if self._has(Rule.FILL_UNASSERTED) else units + register.h
        others = sum(one.g for name, one in registers.items() if name != sidecar)
        if others + register.g > UNITS_MAX:
            return False
        self.contents.quotas.setdefault((tenant, quota), FakeQuota()).registers[sidecar] = register
        self._say(mark, marker, window)
        return True

    def fill_base(self, tenant: str, pair: Pair, units: int, quota: str, marker: str, window: Marker) -> bool:
        """While learning, counts in the base what the ledger knows retired sidecars spent."""
        mark = self.contents.marks.get(tenant)
        if mark is None or mark.pair != pair or mark.phase != LEARNING:
            return False
        if self.now_ms // 1_000 >= window.end + WINDOW_GRACE_S:
            return False
        if self._lost_in_this_phase(mark, tenant, quota, marker, window.start):
            return False
        found = self.contents.quotas.get((tenant, quota), FakeQuota())
        if units <= found.base:
            return False
        self.contents.quotas[(tenant, quota)] = found
        found.base = units
        self._say(mark, marker, window)
        return True

    def release(self, tenant: str, pair: Pair, quota: str, sidecar: str) -> bool:
        """While learning, frees what a register holds and its sidecar, which has said all it holds, does not."""
        mark = self.contents.marks.get(tenant)
        if mark is None or mark.pair != pair or mark.phase != LEARNING or not self._has(Rule.RELEASE):
            return False
        found = self.contents.quotas.get((tenant, quota))
        register = found.registers.get(sidecar) if found else None
        if register is None or register.sealed or register.pair == pair or register.g <= register.u:
            return False
        register.g, register.h = register.u, 0
        return True

    def open(
        self, tenant: str, pair: Pair, revision: int, amounts: Mapping[str, int], quotas: Sequence[KeptQuota] = ()
    ) -> bool | None:
        """Ends learning under ``pair``; of ``quotas``, those that are missing are made, empty. ``None``: one of them
        was lost while it was learned, and has to be learned again.
        """
        mark = self.contents.marks.get(tenant)
        if mark is None or mark.phase != LEARNING:
            return False
        if self._has(Rule.OPEN_SAME_PAIR) and not (pair == mark.pair and mark.pair.run == self.run_id):
            return False
        if mark.revision > revision and self._has(Rule.OPEN_NOT_OLDER):
            return False
        missing = [kept for kept in quotas if (tenant, kept.name) not in self.contents.quotas]
        for kept in missing:
            marker = mark.markers.get(kept.marker)
            said = marker is not None and _said_ms(marker, kept.window_start) == mark.since_ms
            if said and self._has(Rule.OPEN_SAID):
                return None
        mark.phase, mark.since_ms, mark.revision, mark.amounts = OPEN, self.now_ms, revision, dict(amounts)
        for kept in missing:
            self.contents.quotas[(tenant, kept.name)] = FakeQuota()
        return True

    def publish_limits(self, tenant: str, revision: int, amounts: Mapping[str, int]) -> str:
        """Replaces the limits by those of a newer revision: ``OK``, ``NOMARK`` or ``OLDER``."""
        mark = self.contents.marks.get(tenant)
        if mark is None:
            return "NOMARK"
        if mark.revision > revision:
            return "OLDER"
        mark.revision, mark.amounts = revision, dict(amounts)
        return "OK"

    def seal(self, tenant: str, pair: Pair, quota: str, sidecar: str, units: int) -> bool:
        """Takes a silent register out of its sidecar's hands: what it spent (``units`` by the ledger) and reserved
        becomes part of the base, the rest is free. Whether it did.
        """
        mark = self.contents.marks.get(tenant)
        found = self.contents.quotas.get((tenant, quota))
        if mark is None or mark.pair != pair or mark.phase != OPEN or mark.pair.run != self.run_id or found is None:
            return False
        register = found.registers.get(sidecar)
        silent_ms = 1_000 * (HOLD_S + HOLD_MARGIN_S) if self._has(Rule.SEAL_LATE) else 1_000
        if register is None or register.sealed or self.now_ms - register.time_ms <= silent_ms:
            return False
        floor = register.u + register.h if self._has(Rule.SEAL_FLOOR) else 0
        counted = max(floor, units)
        found.base += counted
        found.registers[sidecar] = FakeRegister(
            incarnation=register.incarnation,
            op=register.op,
            pair=register.pair,
            d=counted,
            sealed=True,
            time_ms=self.now_ms,
        )
        return True

    def forget_sealed(self, tenant: str, quota: str) -> None:
        """Tombstones go."""
        registers = self.contents.quotas[(tenant, quota)].registers
        for name in [name for name, one in registers.items() if one.sealed]:
            del registers[name]

    # Inside

    def _notice_new_run(self, mark: FakeMark) -> None:
        if mark.pair.run != self.run_id and self._has(Rule.LEARN_ON_NEW_RUN):
            mark.pair, mark.phase, mark.since_ms = Pair(mark.pair.epoch, self.run_id), LEARNING, self.now_ms

    def _lost_in_this_phase(self, mark: FakeMark, tenant: str, quota: str, marker: str, start: int) -> bool:
        if (tenant, quota) in self.contents.quotas or not self._has(Rule.FILL_SAID):
            return False
        return marker in mark.markers and _said_ms(mark.markers[marker], start) == mark.since_ms

    @staticmethod
    def _say(mark: FakeMark, marker: str, window: Marker) -> None:
        """Something was said into a hash in this phase."""
        old = mark.markers.get(marker)
        if old is None:
            mark.markers[marker] = Marker(window.start, window.end, 0, mark.since_ms, 0)
        elif window.start > old.start:
            mark.markers[marker] = Marker(window.start, window.end, old.start, mark.since_ms, old.said_ms)
        elif old.previous_start < window.start < old.start:
            mark.markers[marker] = Marker(old.start, old.end, window.start, old.said_ms, mark.since_ms)
        else:
            mark.markers[marker] = _saying(old, window.start, mark.since_ms)

    def _has(self, rule: Rule) -> bool:
        return rule not in self.without


def _said_ms(marker: Marker, start: int) -> int:
    if start == marker.start:
        return marker.said_ms
    return marker.previous_said_ms if start == marker.previous_start else 0


def _saying(marker: Marker, start: int, since_ms: int) -> Marker:
    if start == marker.start:
        return marker._replace(said_ms=since_ms)
    return marker._replace(previous_said_ms=since_ms) if start == marker.previous_start else marker


class FakeLeaseStore:
    """The ``LeaseStore`` of one sidecar."""

    def __init__(self, registers: FakeRegisters, *, sidecar: str, incarnation: int) -> None:
        self._registers = registers
        self._sidecar = sidecar
        self._incarnation = incarnation

    async def settle(self, calls: Sequence[SettleCall], live: int) -> list[SettleAnswer | Exception]:
        """See ``LeaseStore``."""
        answers: list[SettleAnswer | Exception] = []
        for call in calls:
            try:
                answers.append(self._registers.settle(self._sidecar, self._incarnation, call, live))
            except CallRefused as error:
                answers.append(error)
        return answers

    async def ask(self, tenant: str, why: str) -> None:
        """See ``LeaseStore``."""
        self._registers.asks.append((tenant, why))

    async def recall(self, tenant: str, quotas: Sequence[str]) -> None:
        """See ``LeaseStore``."""
        for listener in self._registers.listeners:
            listener.put_nowait((self._sidecar, tenant, list(quotas)))

    async def recalls(self) -> AsyncIterator[tuple[str, list[str]]]:
        """See ``LeaseStore``."""
        mine: asyncio.Queue[tuple[str, str, list[str]]] = asyncio.Queue()
        self._registers.listeners.append(mine)
        try:
            while True:
                sidecar, tenant, quotas = await mine.get()
                if sidecar != self._sidecar:
                    yield tenant, quotas
        finally:
            self._registers.listeners.remove(mine)
