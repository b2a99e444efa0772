"""Runs the lease book's calls: at once for checks that wait, in batches for upkeep.

Concurrency: everything runs on one event loop. ``LeaseBook`` allows one outstanding call a tenant; ``_sending`` says
whose call is being sent right now, so that upkeep and waiting checks do not send it twice at a time. A call that was
not answered is sent again verbatim, by whoever comes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from licet.wire.registers import Pair
from licet_sidecar.adapters.usage_log import UsageLog, UsageLogError, lease_record
from licet_sidecar.clock import Clock
from licet_sidecar.core.decision import LeaseWait
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.lease import Kind, Lease
from licet_sidecar.core.leases import PREFETCH_S, LeaseBook, TenantLeases
from licet_sidecar.core.settling import Outcome, SettleAnswer, SettleCall, Status
from licet_sidecar.logs import Logger
from licet_sidecar.ports import CallRefused, LeaseStore, LinkDown, LinkRefused, Unconfirmed
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.tally import Tally

RECALL_WAITS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.04)
"""How long to wait for others to return idle units before asking again; after the last, the check is denied."""

ASK_WAIT_S: Final = 0.05
"""How long to wait for the control plane to look at a tenant before calling again."""

SYNC_WAIT_S: Final = 0.05
"""How long to wait for a published change to arrive before deciding, and calling, again. A check does so for as long as
it waits for anything (``WAIT_S_MAX``); then nothing could be leased, and the action's ``on_unavailable`` decides."""

GIVE_BACK_IDLE_ROUNDS_MAX: Final = 4
"""Rounds in a row, when giving back, that told Redis nothing: a pair that has to be learned takes one, say."""

TICKED_AT_ONCE: Final = 250
"""Leases looked through without a pause: a quarter of a millisecond or so, in which no check is answered."""

UPKEEP_TENANTS_MAX: Final = 512
"""Tenants settled in one round of upkeep: with a keepalive each 20 s, enough for 10,000 held tenants."""


class LeasingService:
    """Acquires, refills, keeps alive and returns leases."""

    def __init__(
        self,
        engine: Engine,
        store: LeaseStore,
        log: UsageLog,
        clock: Clock,
        link: LinkState,
        tally: Tally,
        *,
        on_replaced: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._book: LeaseBook = engine.leases
        self._store = store
        self._log = log
        self._clock = clock
        self._link = link
        self._tally = tally
        self._on_replaced = on_replaced
        self._logger = Logger("leasing")
        self._sending: dict[str, asyncio.Event] = {}
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._recall_tries: dict[str, int] = {}
        self._refills: set[str] = set()
        self._ticked_ms = 0
        self._to_assert: Pair | None = None
        self._to_assert_since_ms = 0
        self.asserted = Pair(0, "")
        self.urgent = asyncio.Event()
        """Set when upkeep should not wait for its turn: leases stay closed everywhere until all have asserted."""
        self.on_asserted: Callable[[], None] = lambda: None

    # For checks

    async def acquire(self, wait: LeaseWait, timeout_s: float) -> None:
        """Returns when it is worth deciding again: leases moved, or they cannot be had.

        Raises:
            LinkDown: Redis does not answer.
            TimeoutError: nothing came in time.
        """
        if not self._link.up:
            raise LinkDown(self._link.trouble)
        held = self._book.of(wait.tenant)
        for lease, units in wait.needs:
            self._book.need(held, lease, units)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(wait.tenant, []).append(future)
        self._start(wait.tenant)
        async with asyncio.timeout(timeout_s):
            await future

    def overdraw(self, tenant: str, spends: Sequence[tuple[Lease, int]]) -> None:
        """Prepares to take units that no lease covers; Redis is told as soon as it answers.

        The log has to know of every lease that is spent from: after a restart, its events alone say what was spent.
        """
        boot_ms = self._clock.boot_ms()
        held = self._book.of(tenant)
        self._logged(held, [lease for lease, _ in spends if not lease.logged])
        for lease, units in spends:
            if not LeaseBook.can_spend(lease, units, boot_ms):
                LeaseBook.overdraw(lease, units, boot_ms)
                self._book.note(held, lease)
        self.refill_soon(tenant)

    def ask_for(self, tenant: str, lease: Lease, units: int) -> None:
        """Leases ``units`` with the next upkeep, as far as they can be had; nobody waits for them."""
        self._book.need(self._book.of(tenant), lease, units)
        self.refill_soon(tenant)

    def refill_soon(self, tenant: str) -> None:
        """A lease of the tenant runs low: refill it with the next upkeep, ahead of need."""
        self._refills.add(tenant)

    # For upkeep

    def recalled(self, tenant: str, quotas: Iterable[str]) -> None:
        """Another sidecar lacks units of these quotas: return what is idle, at once."""
        held = self._book.tenants.get(tenant)
        if held is None:
            return
        found = False
        for quota in quotas:
            lease = held.find(quota)
            if lease is not None and lease.free > 0:
                lease.wanted = True
                held.due[lease] = None
                found = True
        if found:
            self._start(tenant)

    def assert_all(self, epoch: int, run: str) -> None:
        """The server or the epoch changed: say what is held, for every tenant."""
        pair = Pair(epoch, run)
        if pair not in (self.asserted, self._to_assert):
            self._to_assert = pair
            self._to_assert_since_ms = self._clock.boot_ms()
            self.urgent.set()

    async def upkeep(self) -> None:
        """One round: refills what runs low, keeps holds alive, returns what is idle, asserts after a loss."""
        now_s, boot_ms = self._clock.now_us() // 1_000_000, self._clock.boot_ms()
        asserting, since_ms = self._to_assert, self._to_assert_since_ms
        due: dict[str, None] = dict.fromkeys(self._book.unasserted(since_ms, boot_ms) if asserting else ())
        due.update(dict.fromkeys(self._refills))
        self._refills.clear()
        if boot_ms - self._ticked_ms >= 1_000:
            due.update(dict.fromkeys(await self._tick(now_s, boot_ms)))
        calls: list[tuple[TenantLeases, SettleCall]] = []
        for tenant in list(due)[:UPKEEP_TENANTS_MAX]:
            held = self._book.tenants.get(tenant)
            if held is None or tenant in self._sending or tenant in self._tasks:
                continue
            call = held.outstanding or self._begin(held, boot_ms)
            if call is not None:
                calls.append((held, call))
        told = await self._send_all(calls)
        if asserting is None or self._to_assert != asserting:
            return
        # Not before every lease was answered for: one whose tenant was busy, that was not in its call, or that a call
        # from before the loss may still bring, would be granted to others.
        if not self._book.unasserted(since_ms, self._clock.boot_ms()):
            self.asserted, self._to_assert = asserting, None
            self.on_asserted()
        elif told:
            self.urgent.set()  # not all fitted in

    async def give_back_all(self, until_ms: int) -> int:
        """Returns what is not spent or reserved, until ``until_ms`` (boot time). How many tenants still hold some."""
        await self.stop()
        left = await self._say_to_all(self._book.returnable, until_ms, retiring=False)
        if left:
            units = sum(max(0, lease.free) for held in left for lease in held.all())
            self._logger.warning(
                "stopping with leases that could not be returned; they are taken up when a sidecar starts on this state"
                " directory again, or reclaimed",
                tenants=len(left),
                units=units,
            )
        return len(left)

    async def retire(self, until_ms: int) -> int:
        """Gives up all registers; this sidecar's id is never used again. How many tenants could not be told all."""
        left = await self._say_to_all(self._book.sayable, until_ms, retiring=True)
        if left:
            self._logger.warning(
                "stopping with registers that could not be given up; what they say was spent stays counted",
                tenants=len(left),
            )
        return len(left)

    def lease_records(self) -> list[bytes]:
        """Records of everything held, for the head of a new log segment."""
        return [
            lease_record(tenant, lease)
            for tenant, held in self._book.tenants.items()
            for lease in held.all()
            if lease.logged
        ]

    async def stop(self) -> None:
        """Ends all calls under way."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # Inside

    async def _say_to_all(
        self, unsaid: Callable[[TenantLeases, int], list[Lease]], until_ms: int, *, retiring: bool
    ) -> list[TenantLeases]:
        """Calls for every tenant, as long as that brings anything. Those of which something is ``unsaid`` after all."""
        left = list(self._book.tenants.values())
        for held in left:
            held.due.clear()
        idle_rounds = 0
        while left and idle_rounds < GIVE_BACK_IDLE_ROUNDS_MAX and self._clock.boot_ms() < until_ms and self._link.up:
            calls: list[tuple[TenantLeases, SettleCall]] = []
            for held in list(left):
                boot_ms = self._clock.boot_ms()
                held.needs.clear()
                if not held.due:
                    held.due = dict.fromkeys(unsaid(held, boot_ms))
                call = held.outstanding or self._begin(held, boot_ms, giving_back=True, retiring=retiring)
                if call is not None:
                    calls.append((held, call))
                elif not unsaid(held, boot_ms):
                    left.remove(held)
            told = await self._send_all(calls)
            idle_rounds = 0 if told else idle_rounds + 1
        boot_ms = self._clock.boot_ms()
        return [held for held in left if held.outstanding is not None or unsaid(held, boot_ms)]

    def _start(self, tenant: str) -> None:
        if tenant not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._serve(tenant), name=f"lease {tenant}")
            self._tasks[tenant] = task
            task.add_done_callback(lambda done: self._ended(tenant, done))

    def _ended(self, tenant: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(tenant, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._logger.error("leasing failed", tenant=tenant, error=repr(error))
            self._wake(tenant, LinkDown(str(error)))
        held = self._book.tenants.get(tenant)
        if held is not None and held.needs and self._waiters.get(tenant) and self._link.up:
            self._start(tenant)

    async def _serve(self, tenant: str) -> None:
        """Calls for one tenant until no check waits any more."""
        while True:
            held = self._book.tenants.get(tenant)
            if held is None:
                self._wake(tenant)
                return
            if (sending := self._sending.get(tenant)) is not None:
                await sending.wait()  # upkeep is sending this tenant's call
                continue
            call = held.outstanding or self._begin(held, self._clock.boot_ms())
            if call is None:
                self._wake(tenant)
                return
            try:
                outcome = await self._send_one(held, call)
            except Unconfirmed as error:
                if self._waiters.get(tenant):
                    continue
                self._logger.warning("a durable lease waits", tenant=tenant, why=str(error))
                return
            except (LinkDown, LinkRefused) as error:
                self._wake(tenant, LinkDown(str(error)))
                return  # upkeep sends the call again
            await self._follow(held, call, outcome)
            self._wake(tenant)
            await asyncio.sleep(0)  # woken checks decide, and say what they still need
            if not held.needs and not any(lease.wanted and lease.free for lease in held.due):
                return

    async def _follow(self, held: TenantLeases, call: SettleCall, outcome: Outcome | None) -> None:
        tenant = held.tenant
        if outcome is Outcome.RECALL:
            tries = self._recall_tries.get(tenant, 0)
            if tries >= len(RECALL_WAITS_S):
                self._recall_tries.pop(tenant, None)
                self._book.give_up_recall(call.asks, self._clock.boot_ms())
                return
            self._recall_tries[tenant] = tries + 1
            self._tally.recalls += 1
            await self._quietly(self._store.recall(tenant, [ask.lease.quota for ask in call.asks if ask.min]))
            await asyncio.sleep(RECALL_WAITS_S[tries])
            # What is idle elsewhere is on its way: until Redis was asked again nothing is known to be short.
            for ask in call.asks:
                ask.lease.short_until_ms = 0
            return
        self._recall_tries.pop(tenant, None)
        if outcome is Outcome.ASK_CONTROL_PLANE:
            await self._quietly(self._store.ask(tenant, held.why))
            await asyncio.sleep(ASK_WAIT_S)
        elif outcome is Outcome.SYNC:
            await asyncio.sleep(SYNC_WAIT_S)
        elif outcome is Outcome.CLOCK:
            self._logger.error(
                "the clocks of this machine and of Redis differ by more than the grace; no lease can be had",
                tenant=tenant,
            )
            await asyncio.sleep(ASK_WAIT_S)
        elif outcome is Outcome.REPLACED:
            self._on_replaced(f"the registers of this sidecar for tenant {tenant} were sealed or taken over")

    async def _send_one(self, held: TenantLeases, call: SettleCall) -> Outcome | None:
        with self._marked_sending([held]):
            (answer,) = await self._settle([call])
        if isinstance(answer, Exception):
            self._tally.settle_failures += 1
            if isinstance(answer, CallRefused):
                self._refused(held, call, answer)
            raise answer
        return self._take(held, call, answer)

    async def _send_all(self, calls: Sequence[tuple[TenantLeases, SettleCall]]) -> int:
        """Sends calls of upkeep. How many said what they had to say."""
        if not calls:
            return 0
        try:
            with self._marked_sending([held for held, _ in calls]):
                answers = await self._settle([call for _, call in calls])
        except (LinkDown, LinkRefused):
            return 0
        told = 0
        for (held, call), answer in zip(calls, answers, strict=True):
            if isinstance(answer, Exception):
                self._tally.settle_failures += 1
                if isinstance(answer, CallRefused):
                    self._refused(held, call, answer)
                continue
            outcome = self._take(held, call, answer)
            told += answer.status is Status.OK
            if outcome is Outcome.REPLACED:
                self._on_replaced(f"the registers of this sidecar for tenant {held.tenant} were sealed or taken over")
            elif outcome is Outcome.ASK_CONTROL_PLANE:
                await self._quietly(self._store.ask(held.tenant, held.why))
            elif outcome is Outcome.AGAIN:
                self._refills.add(held.tenant)
                if self._to_assert is not None:
                    self.urgent.set()
        return told

    @contextmanager
    def _marked_sending(self, tenants: Sequence[TenantLeases]) -> Iterator[None]:
        sent = asyncio.Event()
        self._sending.update((held.tenant, sent) for held in tenants)
        try:
            yield
        finally:
            for held in tenants:
                self._sending.pop(held.tenant, None)
            sent.set()

    async def _settle(self, calls: Sequence[SettleCall]) -> list[SettleAnswer | Exception]:
        self._tally.settle_calls += len(calls)
        try:
            answers = await self._store.settle(calls, self._book.live)
        except (LinkDown, LinkRefused) as error:
            self._tally.settle_failures += 1
            self._link_failed(error)
            raise
        failures = [answer for answer in answers if isinstance(answer, Exception) and _concerns_the_link(answer)]
        if failures:
            self._link_failed(failures[0])
        else:
            self._link.succeeded()
        return answers

    def _link_failed(self, error: Exception) -> None:
        if self._link.failed(error, refused=isinstance(error, LinkRefused)):
            self._logger.warning("Redis does not answer; leases and cache carry on", error=str(error))

    def _begin(
        self, held: TenantLeases, boot_ms: int, *, giving_back: bool = False, retiring: bool = False
    ) -> SettleCall | None:
        call = self._book.begin_call(
            held,
            revision=self._engine.revision,
            boot_ms=boot_ms,
            giving_back=giving_back,
            retiring=retiring,
            since_ms=-1 if self._to_assert is None else self._to_assert_since_ms,
        )
        if call is not None:
            first = dict.fromkeys(ask.lease for ask in call.asks if not ask.lease.logged)
            first.update((lease, None) for lease, _ in held.lowered)
            if not self._logged(held, [lease for lease in first if lease.kind is not Kind.RATE]):
                # A return that is not in the log must not be sent: a restart would spend the units again.
                for lease, cap in held.lowered:
                    lease.cap = cap
                self._book.abandon_call(held, call)
                return None
        return call

    def _take(self, held: TenantLeases, call: SettleCall, answer: SettleAnswer) -> Outcome | None:
        caps = {ask.lease: ask.lease.cap for ask in call.asks}
        outcome = self._book.end_call(held, call, answer, self._clock.boot_ms())
        # A raised cap that is not logged costs nothing but units: a restart knows less than it holds, and is told.
        moved = [lease for lease, cap in caps.items() if lease.cap != cap and lease.kind is not Kind.RATE]
        self._logged(held, moved)
        return outcome

    def _refused(self, held: TenantLeases, call: SettleCall, error: CallRefused) -> None:
        """The call would be refused for ever; the next one may not be."""
        self._logger.error(
            "a call to Redis was refused; its units stay where they are", tenant=held.tenant, why=str(error)
        )
        self._book.abandon_call(held, call)

    def _logged(self, held: TenantLeases, leases: Sequence[Lease]) -> bool:
        if not leases:
            return True
        try:
            self._log.append(b"".join(lease_record(held.tenant, lease) for lease in leases), 0)
        except UsageLogError:
            self._tally.log_failures += 1
            return False
        for lease in leases:
            lease.logged = True
        return True

    async def _tick(self, now_s: int, boot_ms: int) -> list[str]:
        """Once a second. Checks are answered between two slices."""
        elapsed_s = max(1.0, (boot_ms - self._ticked_ms) / 1_000) if self._ticked_ms else 1.0
        self._ticked_ms = boot_ms
        due = []
        ticked = 0
        for tenant, held in list(self._book.tenants.items()):
            leases = list(held.all())
            for start in range(0, len(leases), TICKED_AT_ONCE):
                some = leases[start : start + TICKED_AT_ONCE]
                for lease in some:
                    if lease.rate > 0 and lease.end - PREFETCH_S <= now_s < lease.end:
                        self._prefetch(tenant, held, lease)
                self._book.tick_some(held, some, now_s, boot_ms, elapsed_s)
                ticked += len(some)
                if ticked >= TICKED_AT_ONCE:
                    ticked = 0
                    await asyncio.sleep(0)
            if held.due or held.outstanding is not None or held.needs:
                due.append(tenant)
            elif not held.holds_units and tenant not in self._engine.tenants and tenant not in self._waiters:
                self._book.forget(tenant)
        return due

    def _prefetch(self, tenant: str, held: TenantLeases, lease: Lease) -> None:
        following = self._engine.window_after(tenant, lease)
        if following is not None and held.leases.get((lease.limit_key, lease.scope)) is lease:
            self._book.prefetch(held, lease, *following)

    def _wake(self, tenant: str, error: Exception | None = None) -> None:
        for future in self._waiters.pop(tenant, ()):
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    async def _quietly(self, call: Awaitable[None]) -> None:
        """Awaits something whose loss costs only time."""
        try:
            await call
        except (LinkDown, LinkRefused) as error:
            self._link.failed(error)


def _concerns_the_link(error: Exception) -> bool:
    """Whether an answer says that Redis cannot serve, and not only that this call has to be repeated or given up."""
    return isinstance(error, LinkDown | LinkRefused) and not isinstance(error, Unconfirmed | CallRefused)
