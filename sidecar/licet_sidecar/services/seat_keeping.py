"""Keeps the seats this sidecar answers for: makes the calls about them, renews them, and logs what becomes of them.

What is asked for one tenant while a call is under way goes with the next one. Renewals of all tenants go together.

Concurrency: everything runs on one event loop. ``SeatBook`` allows one call a tenant; a tenant's ``_serve`` task or
the upkeep sends it. Policy is in ``core.seats``; this module awaits and logs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

import msgpack

from licet.domain.outcomes import Effect, Reason
from licet.wire import usage
from licet.wire.registers import Pair
from licet.wire.usage import EventKind, UsageEvent
from licet_sidecar.adapters.log_records import EVENT, frame
from licet_sidecar.adapters.usage_log import (
    UsageLog,
    UsageLogError,
    seat_record,
)
from licet_sidecar.clock import Clock
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.seats import (
    RENEW_MS,
    UNDECIDED,
    Change,
    ChangeKind,
    Ending,
    Result,
    Room,
    Seat,
    SeatAnswer,
    SeatAsk,
    SeatBook,
    SeatCall,
    TenantSeats,
    Verb,
    Who,
    Wish,
)
from licet_sidecar.logs import Logger
from licet_sidecar.ports import CallRefused, LeaseStore, LinkDown, LinkRefused, SeatStore
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.tally import Tally

ASK_WAIT_S: Final = 0.05
"""How long to wait for the control plane to look at a tenant before calling again."""

RETRY_MS: Final = 2_000
"""While Redis is away, how often upkeep tries: a try may take as long as a command's timeout."""

UPKEEP_TENANTS_MAX: Final = 512
"""Tenants called about in one round of upkeep: with a renewal each 20 s, enough for 10,000."""

_NO_ROOM: Final = Room(0, 0)


class SeatKeeper:
    """The seats of one sidecar."""

    def __init__(
        self,
        engine: Engine,
        book: SeatBook,
        store: SeatStore,
        marks: LeaseStore,
        log: UsageLog,
        clock: Clock,
        link: LinkState,
        tally: Tally,
    ) -> None:
        """``marks`` asks the control plane to look at a tenant's mark."""
        self._engine = engine
        self.book = book
        self._store = store
        self._marks = marks
        self._log = log
        self._clock = clock
        self._link = link
        self._tally = tally
        self._logger = Logger("seats")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._waiters: dict[tuple[str, Wish], list[asyncio.Future[Result]]] = {}
        self._sending: set[str] = set()
        self._again: set[str] = set()
        self._retry_ms = 0
        self._to_assert: Pair | None = None
        self.asserted = Pair(0, "")
        self.on_asserted: Callable[[], None] = lambda: None
        self.urgent = asyncio.Event()
        """Set when upkeep should not wait for its turn: seats stay closed everywhere until all have asserted."""

    # For holders

    def vouched(self, tenant: str, seat_id: str) -> Seat | None:
        """The seat, when this sidecar answers for it now."""
        seat = self.book.find(tenant, seat_id)
        return seat if seat is not None and SeatBook.vouches(seat, self._clock.boot_ms()) else None

    def room(self, tenant: str, feature: str) -> Room:
        """A feature's seats and holders, as Redis last said."""
        held = self.book.tenants.get(tenant)
        return held.room.get(feature, _NO_ROOM) if held else _NO_ROOM

    def count(self) -> None:
        """Brings the metric up to date."""
        self._tally.seats_held = self.book.held(self._clock.boot_ms())

    async def settled(self, tenant: str, ask: SeatAsk, deadline_ms: int) -> Result:
        """Asks until there is a result that decides.

        Raises:
            LinkDown, LinkRefused: Redis does not answer, or refuses the call.
            TimeoutError: nothing was decided in time.
        """
        left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
        async with asyncio.timeout(max(0.0, left_s)):
            while True:
                if not self._link.up:
                    raise LinkDown(self._link.trouble)
                self.book.want(self.book.of(tenant), ask)
                waiting = self._wait_for(tenant, ask.wish)
                self._start(tenant)
                result = await waiting
                if result not in UNDECIDED:
                    return result
                await asyncio.sleep(ASK_WAIT_S)

    async def given_back(self, seat: Seat, deadline_ms: int) -> Result:
        """Ends a seat for its holder, and waits until Redis knows."""
        waiting = self._wait_for(seat.tenant, (seat.id, Verb.RELEASE))
        self.end(seat, Ending.RELEASED)
        async with asyncio.timeout(max(0.0, (deadline_ms - self._clock.boot_ms()) / 1_000)):
            return await waiting

    def end(self, seat: Seat, ending: Ending) -> None:
        """Stops answering for a seat, and gives it back."""
        self.book.end(seat, ending, self._clock.boot_ms())
        self._start(seat.tenant)

    # Upkeep

    def assert_all(self, epoch: int, run: str) -> None:
        """The server or the epoch changed: say what is held, for every tenant."""
        pair = Pair(epoch, run)
        if pair not in (self.asserted, self._to_assert):
            self._to_assert = pair
            self.book.doubt()
            self._retry_ms = 0
            self.urgent.set()

    async def upkeep(self) -> None:
        """One round: takes back what silent holders had, renews what is due, asserts after a loss."""
        boot_ms = self._clock.boot_ms()
        asserting = self._to_assert
        for held in list(self.book.tenants.values()):
            self._log_changes(self.book.tick(held, boot_ms))
        self.book.tidy(boot_ms)
        self.count()
        if self._link.up or boot_ms >= self._retry_ms:
            await self._renew_due(boot_ms, asserting=asserting is not None)
        if asserting is None or self._to_assert != asserting:
            return
        if not self.book.unasserted(self._clock.boot_ms()):
            self.asserted, self._to_assert = asserting, None
            self.on_asserted()

    async def _renew_due(self, boot_ms: int, *, asserting: bool) -> None:
        tenants = list(self.book.tenants.values())
        if not asserting and not any(self.book.is_due(held, boot_ms) for held in tenants):
            return
        calls: list[tuple[TenantSeats, SeatCall]] = []
        for held in tenants:
            if len(calls) == UPKEEP_TENANTS_MAX:
                break
            if held.tenant in self._tasks or not self.book.is_due(held, boot_ms, age_ms=RENEW_MS // 2):
                continue
            call = self.book.begin_call(held, revision=self._engine.revision, boot_ms=boot_ms)
            if call is not None:
                calls.append((held, call))
        if calls:
            await self._send(calls)

    def restore(self, tenant: str, packed: bytes) -> None:
        """Takes up a seat from the log of an earlier incarnation."""
        feature, holder, who = msgpack.unpackb(packed)
        boot_ms = self._clock.boot_ms()
        self.book.restore(Seat(tenant, feature, holder, Who(*who), boot_ms), boot_ms)

    def records(self) -> list[bytes]:
        """Records of every seat, for the head of a new log segment."""
        return [
            record_of(seat) for held in self.book.tenants.values() for seat in held.seats.values() if not seat.lapsed
        ]

    async def stop(self) -> None:
        """Ends all calls under way. Seats stay held: a restart takes them up, or else they end by themselves."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # Calling

    def _wait_for(self, tenant: str, wish: Wish) -> asyncio.Future[Result]:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault((tenant, wish), []).append(future)
        return future

    def _wake(self, tenant: str, wish: Wish, result: Result | Exception) -> bool:
        """Hands a result to those that wait for it. Whether anybody did."""
        anybody = False
        for future in self._waiters.pop((tenant, wish), ()):
            if future.done():
                continue
            anybody = True
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        return anybody

    def _start(self, tenant: str) -> None:
        if tenant in self._tasks or tenant in self._sending:
            self._again.add(tenant)
        else:
            task = asyncio.get_running_loop().create_task(self._serve(tenant), name=f"seats {tenant}")
            self._tasks[tenant] = task
            task.add_done_callback(lambda done: self._ended(tenant, done))

    def _ended(self, tenant: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(tenant, None)
        if task.cancelled():
            return
        held = self.book.tenants.get(tenant)
        if (error := task.exception()) is not None:
            self._logger.error("a call about seats failed", tenant=tenant, error=repr(error))
            if held is not None and held.outstanding is not None:
                self.book.abandon_call(held, held.outstanding)
            for waiting_tenant, wish in list(self._waiters):
                if waiting_tenant == tenant:
                    self._wake(tenant, wish, LinkDown(str(error)))
        self._go_on(tenant)

    def _go_on(self, tenant: str) -> None:
        """Calls again when somebody asked for a call while one was under way."""
        if tenant in self._again:
            self._again.discard(tenant)
            if self._link.up:
                self._start(tenant)

    async def _serve(self, tenant: str) -> None:
        """Calls for one tenant until nobody waits any more."""
        while (held := self.book.tenants.get(tenant)) is not None:
            call = self.book.begin_call(held, revision=self._engine.revision, boot_ms=self._clock.boot_ms())
            if call is None:
                return
            self._again.discard(tenant)
            again = await self._send([(held, call)])
            if not again and (tenant not in self._again or not self._link.up):
                return
            if held.why and not again:
                await asyncio.sleep(ASK_WAIT_S)

    async def _send(self, calls: Sequence[tuple[TenantSeats, SeatCall]]) -> bool:
        """Makes calls and takes their answers. Whether one of them should be made again at once."""
        self._tally.seat_calls += len(calls)
        self._sending.update(held.tenant for held, _ in calls)
        answers: Sequence[SeatAnswer | Exception]
        try:
            answers = await self._store.call([call for _, call in calls])
            self._link.succeeded()
        except (LinkDown, LinkRefused) as error:
            if self._link.failed(error, refused=isinstance(error, LinkRefused)):
                self._logger.warning("Redis does not answer; seats are kept for a while", error=str(error))
            self._retry_ms = self._clock.boot_ms() + RETRY_MS
            answers = [error] * len(calls)
        finally:
            self._sending.difference_update(held.tenant for held, _ in calls)
        again = False
        for (held, call), answer in zip(calls, answers, strict=True):
            again |= self._take(held, call, answer)
            if held.tenant not in self._tasks:
                self._go_on(held.tenant)
        for held, _ in calls:
            if held.why and self._link.up:
                try:
                    await self._marks.ask(held.tenant, held.why)
                except (LinkDown, LinkRefused) as error:
                    self._link.failed(error)
        return again

    def _take(self, held: TenantSeats, call: SeatCall, answer: SeatAnswer | Exception) -> bool:
        tenant = held.tenant
        if isinstance(answer, Exception):
            self.book.abandon_call(held, call)
            if isinstance(answer, CallRefused):
                self._logger.error("a call about seats was refused", tenant=tenant, why=str(answer))
            for ask in call.asks:
                self._wake(tenant, ask.wish, answer)
            return False
        end = self.book.end_call(held, call, answer, self._clock.boot_ms())
        if end is None:
            return False
        self._log_changes(end.changes)
        for wish, result in end.results.items():
            if wish in held.wanted:
                continue  # asked once more since; that answer is for all
            anybody = self._wake(tenant, wish, result)
            seat = held.seats.get(wish[0])
            if wish[1] is Verb.ACQUIRE and result is Result.HELD and not anybody and seat is not None:
                self.end(seat, Ending.RELEASED)  # who asked has left, and was told nothing
        return end.again

    # Logging

    def _log_changes(self, changes: Sequence[Change]) -> None:
        for change in changes:
            match change.kind:
                case ChangeKind.TAKEN_OVER:
                    self.append(change.seat, None, record_of(change.seat))
                case ChangeKind.REGAINED:
                    self.append(change.seat, EventKind.SEAT_ACQUIRE, record_of(change.seat))
                case ChangeKind.RECLAIMED:
                    self._tally.seats_reclaimed += 1
                    self.append(change.seat, EventKind.SEAT_RECLAIM, end_record_of(change.seat))
                case ChangeKind.FORGOTTEN:
                    self.append(change.seat, None, end_record_of(change.seat))

    def append(self, seat: Seat, kind: EventKind | None, record: bytes) -> None:
        """Logs what happened to a seat with no answer to wait for it; a full log loses the event, and counts that."""
        event = b"" if kind is None else self._event_of(seat, kind, self._log.last_seq + 1)
        try:
            self._log.append(event + record, 1 if event else 0)
        except UsageLogError:
            self._tally.log_failures += 1
            with contextlib.suppress(UsageLogError):
                self._log.append(record, 0)  # there is room kept for this

    def _event_of(self, seat: Seat, kind: EventKind, seq: int) -> bytes:
        inquiry = Inquiry(seat.tenant, seat.who.action)
        inquiry.subject_type, inquiry.subject_id = seat.who.subject_type, seat.who.subject_id
        inquiry.on_behalf_of = seat.who.on_behalf_of
        decision = Decision(Effect.APPROVED, Reason.OK)
        decision.degraded = not self._link.up
        return self.event(inquiry, decision, kind, seat, seq)

    def event(self, inquiry: Inquiry, decision: Decision, kind: EventKind, seat: Seat | None, seq: int) -> bytes:
        """The framed usage event of a decision about a seat."""
        flags = (
            (usage.FLAG_STALE if decision.stale else 0)
            | (usage.FLAG_DEGRADED if decision.degraded else 0)
            | (usage.FLAG_OBSERVED if decision.observed else 0)
        )
        event = UsageEvent(
            seq=seq,
            at_us=self._clock.now_us(),
            tenant=inquiry.tenant,
            subject_type=inquiry.subject_type,
            subject_id=inquiry.subject_id,
            on_behalf_of=inquiry.on_behalf_of,
            action=inquiry.action,
            effect=decision.effect,
            reason=decision.reason,
            rule=decision.rule,
            revision=self._engine.revision,
            units={},
            cost_nanos=0,
            currency="",
            flags=flags,
            idempotency_key=inquiry.idempotency_key,
            resource_type=inquiry.resource_type,
            resource_id=inquiry.resource_id,
            context=dict(decision.context),
            spends=[],
            shadow=list(decision.shadow),
            kind=kind,
            about=seat.id if seat else "",
            exposures=decision.exposures,
            access_request_id=decision.access_request_id,
        )
        return frame(EVENT, usage.pack_event(event))


def record_of(seat: Seat) -> bytes:
    """The log's record that a seat is answered for."""
    return seat_record(seat.tenant, seat.id, msgpack.packb((seat.feature, seat.holder, tuple(seat.who))))


def end_record_of(seat: Seat) -> bytes:
    """The log's record that it is not any more."""
    return seat_record(seat.tenant, seat.id, b"")
