"""``AcquireSeat``, ``RenewSeat``, ``ReleaseSeat``, and the upkeep of the seats this sidecar answers for.

A heartbeat is answered from memory; acquiring, and whatever concerns a seat that is not vouched for here, asks Redis.
What is asked for one tenant while a call is under way goes with the next one. Renewals of all tenants go together.

Concurrency: everything runs on one event loop. ``SeatBook`` allows one call a tenant; a tenant's ``_serve`` task or
the upkeep sends it. Policy is in ``core.seats``; this module awaits, logs and answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgpack
from google.protobuf.message import DecodeError

from licet.domain.catalog import UnavailableMode
from licet.domain.ids import TENANT_PATTERN
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet.wire.registers import Pair
from licet.wire.usage import EventKind, UsageEvent
from licet_sidecar.adapters.usage_log import EVENT, UsageLog, UsageLogError, frame, seat_record
from licet_sidecar.clock import Clock
from licet_sidecar.core.engine import Decision, Engine, LoadWait
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry
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
    holder_digest,
    split_seat_id,
)
from licet_sidecar.logs import Logger
from licet_sidecar.ports import CallRefused, LeaseStore, LinkDown, LinkRefused, SeatStore
from licet_sidecar.services.answers import Answers
from licet_sidecar.services.approval import (
    DEADLINE_SLACK_S,
    WAIT_S_MAX,
    Answer,
    Malformed,
    NotReady,
)
from licet_sidecar.services.idempotency import Key, RecentAnswers
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.requests import parse_check
from licet_sidecar.services.syncing import SyncService
from licet_sidecar.services.tally import Tally

HEARTBEAT_MS_DEFAULT: Final = 60_000
"""For seats whose plan says nothing; documents always do."""

ASK_WAIT_S: Final = 0.05
"""How long to wait for the control plane to look at a tenant before calling again."""

RETRY_MS: Final = 2_000
"""While Redis is away, how often upkeep tries: a try may take as long as a command's timeout."""

UPKEEP_TENANTS_MAX: Final = 512
"""Tenants called about in one round of upkeep: with a renewal each 20 s, enough for 10,000."""

SEAT_ID_CHARS_MAX: Final = 256
_Named = TypeVar("_Named", pb.RenewSeatRequest, pb.ReleaseSeatRequest)
_APPROVED: Final = Effect.APPROVED
_KEY_REUSED: Final = (
    "check.idempotency_key: it was used for another request; use a new key for each seat, and the same one only to"
    " repeat it"
)


class SeatService:
    """Seats, without the transport."""

    def __init__(
        self,
        engine: Engine,
        book: SeatBook,
        store: SeatStore,
        marks: LeaseStore,
        log: UsageLog,
        clock: Clock,
        link: LinkState,
        sync: SyncService,
        recent: RecentAnswers,
        tally: Tally,
    ) -> None:
        """``marks`` asks the control plane to look at a tenant's mark."""
        self._engine = engine
        self._book = book
        self._store = store
        self._marks = marks
        self._log = log
        self._clock = clock
        self._link = link
        self._sync = sync
        self._recent = recent
        self._tally = tally
        self._answers = Answers(engine, link)
        self._logger = Logger("seats")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._waiters: dict[tuple[str, Wish], list[asyncio.Future[Result]]] = {}
        self._sending: set[str] = set()
        self._retry_ms = 0
        self._to_assert: Pair | None = None
        self.asserted = Pair(0, "")
        self.on_asserted: Callable[[], None] = lambda: None
        self.urgent = asyncio.Event()
        """Set when upkeep should not wait for its turn: seats stay closed everywhere until all have asserted."""

    def methods(self) -> dict[str, Callable[[bytes, float], Answer]]:
        """What it answers, by method of ``licet.v1.ApprovalService``."""
        return {"AcquireSeat": self.acquire, "RenewSeat": self.renew, "ReleaseSeat": self.release}

    # Acquiring

    def acquire(self, data: bytes, timeout_s: float) -> Answer:
        """Decides as ``Check`` does up to the quotas, then takes a seat."""
        if not self._sync.ready.is_set():
            raise NotReady(f"this sidecar has no state to decide from yet: {self._sync.problem}")
        try:
            request = pb.AcquireSeatRequest.FromString(data)
        except DecodeError as error:
            raise Malformed(str(error)) from error
        try:
            inquiry = parse_check(request.check)
        except InvalidInquiry as error:
            raise Malformed(f"check.{error}") from error
        if not inquiry.subject_id:
            raise Malformed("check.subject.id: is empty; a seat has a holder: say who")
        if inquiry.quantities or inquiry.quantity not in (None, 1):
            raise Malformed("check.quantity: a holder has one seat; leave it out")
        key = _key_of(inquiry)
        if key is not None:
            earlier = self._recent.find(key)
            if earlier is not None:
                if earlier[0] != data and pb.AcquireSeatRequest.FromString(earlier[0]) != request:
                    raise Malformed(_KEY_REUSED)
                if not isinstance(earlier[1], bytes) or self._stands(inquiry.tenant, earlier[1]):
                    self._tally.idempotent_repeats += 1
                    return earlier[1]
        under_way = self._acquire(inquiry, key, data, timeout_s)
        return under_way if key is None else self._recent.join(key, data, under_way)

    async def _acquire(self, inquiry: Inquiry, key: Key | None, data: bytes, timeout_s: float) -> bytes:
        started_ns = time.perf_counter_ns()
        deadline_ms = self._deadline_ms(timeout_s)
        decision = await self._access(inquiry, deadline_ms)
        feature, seats, who = self._seats_of(inquiry)
        if decision.effect is not _APPROVED or decision.degraded:
            return self._conclude(inquiry, decision, None, key, data, started_ns)
        if not seats:
            plan = self._engine.tenants[inquiry.tenant].license.plan
            decision = self._refusal(
                decision, Reason.NOT_ENTITLED, f"Plan {plan} grants {feature} without seats: ask with Check."
            )
            return self._conclude(inquiry, decision, None, key, data, started_ns)
        ask = SeatAsk(
            Verb.LOOK if inquiry.peek else Verb.ACQUIRE,
            feature,
            holder_digest(inquiry.subject_type, inquiry.subject_id),
            who,
            seats,
        )
        seat = self._vouched(inquiry.tenant, ask.seat_id)
        if seat is None:
            try:
                result = await self._settled(inquiry.tenant, ask, deadline_ms)
            except (LinkDown, LinkRefused, TimeoutError) as error:
                decision = self._unavailable(inquiry, decision, error)
                return self._conclude(inquiry, decision, None, key, data, started_ns)
            # What was decided on may have changed meanwhile; an answer comes from one revision.
            decision = await self._access(inquiry, 0)
            seat = self._vouched(inquiry.tenant, ask.seat_id)
            if result is Result.FULL and decision.effect is _APPROVED and not decision.degraded:
                self._tally.seats_denied += 1
                decision = self._no_seat(inquiry.tenant, feature, decision)
            elif decision.effect is not _APPROVED and seat is not None:
                self._end(seat, Ending.RELEASED)
                seat = None
            elif seat is None and not inquiry.peek and decision.effect is _APPROVED:
                decision = self._unavailable(inquiry, decision, TimeoutError("it ended before it was answered"))
        if inquiry.peek:
            seat = None
        elif seat is not None:
            SeatBook.hear(seat, self._clock.boot_ms())
            seat.who = who
        return self._conclude(inquiry, decision, seat, key, data, started_ns, feature)

    async def _access(self, inquiry: Inquiry, deadline_ms: int) -> Decision:
        """The decision up to the quotas. Waits until ``deadline_ms`` (boot time) for the tenant's license."""
        while True:
            left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
            try:
                outcome = self._engine.decide_access(
                    inquiry, now_us=self._clock.now_us(), boot_ms=self._clock.boot_ms(), patient=left_s > 0
                )
            except InvalidInquiry as error:
                raise Malformed(f"check.{error}") from error
            if isinstance(outcome, Decision):
                return outcome
            assert isinstance(outcome, LoadWait), "quotas are left alone"
            try:
                await self._sync.load(outcome.tenant, left_s)
            except (LinkDown, TimeoutError, ValueError):  # ValueError: what is published does not verify
                deadline_ms = 0

    def _seats_of(self, inquiry: Inquiry) -> tuple[str, int, Who]:
        """(feature, number of seats, whose the seat would be); the number is 0 when the feature has none."""
        feature = next(iter(inquiry.units), "")
        entitlement = self._engine.entitlement(inquiry.tenant, feature)
        seats = entitlement.seats if entitlement else 0
        heartbeat_ms = 1_000 * entitlement.heartbeat_s if entitlement else 0
        who = Who(
            inquiry.subject_type,
            inquiry.subject_id,
            inquiry.on_behalf_of,
            inquiry.action,
            heartbeat_ms or HEARTBEAT_MS_DEFAULT,
        )
        return feature, seats, who

    def _no_seat(self, tenant: str, feature: str, decision: Decision) -> Decision:
        room = self._room(tenant, feature)
        denied = self._refusal(
            decision,
            Reason.SEAT_UNAVAILABLE,
            f"All {room.seats:,} seats of {feature} are taken ({room.taken:,} holders).",
            f"{feature}#seats",
        )
        denied.retry_after_s = max(1, -(-room.ends_in_ms // 1_000))
        return denied

    def _unavailable(self, inquiry: Inquiry, decision: Decision, error: Exception) -> Decision:
        """Redis cannot be asked for a seat: the action's ``on_unavailable`` decides. An approval comes without one."""
        rulebook = self._engine.rulebook
        bound = rulebook.action(inquiry.action) if rulebook else None
        why = f"No seat could be had: {str(error) or 'there was no answer in time'}."
        if bound is not None and bound.action.on_unavailable.mode is UnavailableMode.ALLOW:
            allowed = Decision(_APPROVED, Reason.DEGRADED_ALLOW, f"{why} The action allows that, without a seat.")
            allowed.stale, allowed.shadow, allowed.context = decision.stale, decision.shadow, decision.context
            allowed.degraded = True
            return allowed
        denied = self._refusal(decision, Reason.DEGRADED_DENY, f"{why} The action denies then.")
        denied.degraded = True
        return denied

    def _refusal(self, decision: Decision, reason: Reason, message: str, rule: str = "") -> Decision:
        """What becomes of an approval without a seat. Observed, the caller is answered APPROVED, also without one."""
        denied = Decision(Effect.DENIED, reason, message, rule)
        denied.stale, denied.shadow, denied.context = decision.stale, decision.shadow, decision.context
        denied.observed = self._engine.rulebook is not None and self._engine.rulebook.observe
        return denied

    def _conclude(
        self,
        inquiry: Inquiry,
        decision: Decision,
        seat: Seat | None,
        key: Key | None,
        data: bytes,
        started_ns: int,
        feature: str = "",
    ) -> bytes:
        """Logs and encodes an answer. The seat, if any, is the answer's."""
        decision_id = ""
        if not inquiry.peek:
            seq = self._log.last_seq + 1
            records = self._event(inquiry, decision, EventKind.SEAT_ACQUIRE, seat, seq)
            if seat is not None:
                records += _record(seat)
            try:
                self._log.append(records, 1)
                decision_id = usage.decision_id(self._log.header.decision_prefix, seq)
            except UsageLogError as error:
                self._tally.log_failures += 1
                decision, seat = self._unlogged(inquiry, decision, seat, error)
        response = pb.AcquireSeatResponse(
            decision=pb.CheckResponse.FromString(self._answers.encode(decision, decision_id))
        )
        if seat is not None:
            self._tally.seats_acquired += 1
            response.seat_id = seat.id
            response.heartbeat.FromMilliseconds(seat.who.heartbeat_ms)
            response.expires_at.FromMicroseconds(self._expires_us(seat))
        if feature:
            room = self._room(inquiry.tenant, feature)
            response.seats, response.seats_taken = room.seats, room.taken
        encoded: bytes = response.SerializeToString()
        if key is not None and decision_id:
            self._recent.remember(key, data, encoded, self._clock.boot_ms())
        self._tally.answered(decision.effect, decision.reason, (time.perf_counter_ns() - started_ns) // 1_000)
        self._tally.stale_answers += decision.stale
        self._count()
        return encoded

    def _unlogged(
        self, inquiry: Inquiry, decision: Decision, seat: Seat | None, error: UsageLogError
    ) -> tuple[Decision, Seat | None]:
        """The log does not take the event: a denial stands, an approval is the action's to decide."""
        if decision.effect is not _APPROVED:
            return decision, None
        rulebook = self._engine.rulebook
        bound = rulebook.action(inquiry.action) if rulebook else None
        allowed = bound is not None and bound.action.on_unavailable.mode is UnavailableMode.ALLOW
        if seat is not None and not allowed:
            self._end(seat, Ending.RELEASED)
        replaced = Decision(
            _APPROVED if allowed else Effect.DENIED, Reason.USAGE_LOG_FULL, f"The seat could not be recorded: {error}."
        )
        replaced.degraded = True
        replaced.stale = decision.stale
        replaced.observed = not allowed and rulebook is not None and rulebook.observe
        return replaced, seat if allowed else None

    def _stands(self, tenant: str, answer: bytes) -> bool:
        """Whether an earlier answer may be given again: an approval only while its seat is held."""
        seat_id = pb.AcquireSeatResponse.FromString(answer).seat_id
        return not seat_id or self._vouched(tenant, seat_id) is not None

    # Renewing and releasing

    def renew(self, data: bytes, timeout_s: float) -> Answer:
        """A heartbeat."""
        request = _parsed(pb.RenewSeatRequest, data)
        tenant, seat_id = request.tenant, request.seat_id
        named = split_seat_id(seat_id)
        if named is None:
            return _renewed(pb.SEAT_STATE_UNKNOWN)
        seat = self._vouched(tenant, seat_id)
        if seat is not None:
            SeatBook.hear(seat, self._clock.boot_ms())
            return self._held(seat)
        held = self._book.tenants.get(tenant)
        ending = self._book.ended(tenant, seat_id)
        if held is not None and seat_id in held.leaving and ending is not None:
            return _renewed(_STATES[ending], degraded=not self._link.up)
        return self._renew(tenant, SeatAsk(Verb.TAKE, *named), self._deadline_ms(timeout_s))

    async def _renew(self, tenant: str, ask: SeatAsk, deadline_ms: int) -> bytes:
        """A heartbeat for a seat that is not vouched for here: Redis knows whether anybody has it."""
        known = self._book.find(tenant, ask.seat_id)
        if known is not None:
            SeatBook.hear(known, self._clock.boot_ms())
        ending = self._book.ended(tenant, ask.seat_id)
        lapsed = known is not None and known.lapsed
        try:
            await self._settled(tenant, ask, deadline_ms)
        except (LinkDown, LinkRefused, TimeoutError) as error:
            if lapsed or ending is Ending.RECLAIMED:
                return _renewed(pb.SEAT_STATE_RECLAIMED, degraded=True)
            raise NotReady(
                f"whether the seat is held cannot be said just now: {str(error) or 'there was no answer in time'}"
            ) from error
        seat = self._vouched(tenant, ask.seat_id)
        if seat is not None:
            return self._held(seat)
        ending = self._book.ended(tenant, ask.seat_id)
        return _renewed(_STATES[ending] if ending else pb.SEAT_STATE_UNKNOWN)

    def _held(self, seat: Seat) -> bytes:
        response = pb.RenewSeatResponse(state=pb.SEAT_STATE_HELD, degraded=not self._link.up)
        response.expires_at.FromMicroseconds(self._expires_us(seat))
        encoded: bytes = response.SerializeToString()
        return encoded

    def release(self, data: bytes, timeout_s: float) -> Answer:
        """The holder is done."""
        request = _parsed(pb.ReleaseSeatRequest, data)
        tenant, seat_id = request.tenant, request.seat_id
        named = split_seat_id(seat_id)
        if named is None:
            return _released(pb.SEAT_STATE_UNKNOWN)
        return self._release(tenant, SeatAsk(Verb.TAKE, *named), self._deadline_ms(timeout_s))

    async def _release(self, tenant: str, take: SeatAsk, deadline_ms: int) -> bytes:
        ending = self._book.ended(tenant, take.seat_id)
        seat = self._vouched(tenant, take.seat_id)
        if seat is None and ending is Ending.RELEASED:
            return _released(pb.SEAT_STATE_RELEASED)  # said again
        if seat is None:
            # Another sidecar answers for it, or did. Only its own one can release a seat, so this one becomes that.
            try:
                await self._settled(tenant, take, deadline_ms)
            except (LinkDown, LinkRefused, TimeoutError) as error:
                raise NotReady(
                    f"the seat cannot be released just now: {str(error) or 'there was no answer in time'};"
                    " without renewals it ends by itself"
                ) from error
            seat = self._book.find(tenant, take.seat_id)
            if seat is None:
                ending = self._book.ended(tenant, take.seat_id)
                return _released(_STATES[ending] if ending else pb.SEAT_STATE_UNKNOWN)
        self._tally.seats_released += 1
        self._append(seat, EventKind.SEAT_RELEASE, _end_record(seat))
        try:
            while seat is not None and await self._given_back(seat, deadline_ms) is Result.MOVED:
                await self._settled(tenant, take, deadline_ms)  # it had moved since this sidecar last asked
                seat = self._book.find(tenant, take.seat_id)
        except (LinkDown, LinkRefused, TimeoutError):
            pass  # the holder is done all the same; upkeep tells Redis, or the hold ends by itself
        self._count()
        return _released(pb.SEAT_STATE_RELEASED)

    async def _given_back(self, seat: Seat, deadline_ms: int) -> Result:
        """Ends a seat for its holder, and waits until Redis knows."""
        waiting = self._wait_for(seat.tenant, (seat.id, Verb.RELEASE))
        self._end(seat, Ending.RELEASED)
        async with asyncio.timeout(max(0.0, (deadline_ms - self._clock.boot_ms()) / 1_000)):
            return await waiting

    # Upkeep

    def assert_all(self, epoch: int, run: str) -> None:
        """The server or the epoch changed: say what is held, for every tenant."""
        pair = Pair(epoch, run)
        if pair not in (self.asserted, self._to_assert):
            self._to_assert = pair
            self._book.doubt()
            self._retry_ms = 0
            self.urgent.set()

    async def upkeep(self) -> None:
        """One round: takes back what silent holders had, renews what is due, asserts after a loss."""
        boot_ms = self._clock.boot_ms()
        asserting = self._to_assert
        for held in list(self._book.tenants.values()):
            self._log_changes(self._book.tick(held, boot_ms))
        self._book.tidy(boot_ms)
        self._count()
        if self._link.up or boot_ms >= self._retry_ms:
            await self._renew_due(boot_ms, asserting=asserting is not None)
        if asserting is None or self._to_assert != asserting:
            return
        if not self._book.unasserted(self._clock.boot_ms()):
            self.asserted, self._to_assert = asserting, None
            self.on_asserted()

    async def _renew_due(self, boot_ms: int, *, asserting: bool) -> None:
        tenants = list(self._book.tenants.values())
        if not asserting and not any(self._book.is_due(held, boot_ms) for held in tenants):
            return
        calls: list[tuple[TenantSeats, SeatCall]] = []
        for held in tenants:
            if len(calls) == UPKEEP_TENANTS_MAX:
                break
            if held.tenant in self._tasks or not self._book.is_due(held, boot_ms, age_ms=RENEW_MS // 2):
                continue
            call = self._book.begin_call(held, revision=self._engine.revision, boot_ms=boot_ms)
            if call is not None:
                calls.append((held, call))
        if calls:
            await self._send(calls)

    def restore(self, tenant: str, packed: bytes) -> None:
        """Takes up a seat from the log of an earlier incarnation."""
        feature, holder, who = msgpack.unpackb(packed)
        boot_ms = self._clock.boot_ms()
        self._book.restore(Seat(tenant, feature, holder, Who(*who), boot_ms), boot_ms)

    def records(self) -> list[bytes]:
        """Records of every seat, for the head of a new log segment."""
        return [
            _record(seat) for held in self._book.tenants.values() for seat in held.seats.values() if not seat.lapsed
        ]

    async def stop(self) -> None:
        """Ends all calls under way. Seats stay held: a restart takes them up, or else they end by themselves."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # Calling

    async def _settled(self, tenant: str, ask: SeatAsk, deadline_ms: int) -> Result:
        """Asks until there is a result that decides.

        Raises:
            LinkDown, LinkRefused: Redis does not answer, or refuses the call.
            TimeoutError: nothing was decided in time.
        """
        held = self._book.of(tenant)
        while True:
            if not self._link.up:
                raise LinkDown(self._link.trouble)
            left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
            if left_s <= 0:
                raise TimeoutError(f"this tenant's seats are being put together again ({held.why})" if held.why else "")
            held = self._book.of(tenant)
            self._book.want(held, ask)
            waiting = self._wait_for(tenant, ask.wish)
            self._start(tenant)
            async with asyncio.timeout(left_s):
                result = await waiting
                if result not in UNDECIDED:
                    return result
                await asyncio.sleep(ASK_WAIT_S)

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
        if tenant not in self._tasks and tenant not in self._sending:
            task = asyncio.get_running_loop().create_task(self._serve(tenant), name=f"seats {tenant}")
            self._tasks[tenant] = task
            task.add_done_callback(lambda done: self._ended(tenant, done))

    def _ended(self, tenant: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(tenant, None)
        if task.cancelled():
            return
        held = self._book.tenants.get(tenant)
        if (error := task.exception()) is not None:
            self._logger.error("a call about seats failed", tenant=tenant, error=repr(error))
            if held is not None and held.outstanding is not None:
                self._book.abandon_call(held, held.outstanding)
            for waiting_tenant, wish in list(self._waiters):
                if waiting_tenant == tenant:
                    self._wake(tenant, wish, LinkDown(str(error)))
        elif held is not None and held.wanted and self._link.up:
            self._start(tenant)

    async def _serve(self, tenant: str) -> None:
        """Calls for one tenant until nobody waits any more."""
        while (held := self._book.tenants.get(tenant)) is not None:
            call = self._book.begin_call(held, revision=self._engine.revision, boot_ms=self._clock.boot_ms())
            if call is None:
                return
            again = await self._send([(held, call)])
            if not again and (not held.wanted or not self._link.up):
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
            self._book.abandon_call(held, call)
            if isinstance(answer, CallRefused):
                self._logger.error("a call about seats was refused", tenant=tenant, why=str(answer))
            for ask in call.asks:
                self._wake(tenant, ask.wish, answer)
            return False
        end = self._book.end_call(held, call, answer, self._clock.boot_ms())
        if end is None:
            return False
        self._log_changes(end.changes)
        for wish, result in end.results.items():
            if wish in held.wanted:
                continue  # asked once more since; that answer is for all
            anybody = self._wake(tenant, wish, result)
            seat = held.seats.get(wish[0])
            if wish[1] is Verb.ACQUIRE and result is Result.HELD and not anybody and seat is not None:
                self._end(seat, Ending.RELEASED)  # who asked has left, and was told nothing
        return end.again

    def _end(self, seat: Seat, ending: Ending) -> None:
        self._book.end(seat, ending, self._clock.boot_ms())
        self._start(seat.tenant)

    # Looking

    def _vouched(self, tenant: str, seat_id: str) -> Seat | None:
        seat = self._book.find(tenant, seat_id)
        return seat if seat is not None and SeatBook.vouches(seat, self._clock.boot_ms()) else None

    def _room(self, tenant: str, feature: str) -> Room:
        held = self._book.tenants.get(tenant)
        return held.room.get(feature, _NO_ROOM) if held else _NO_ROOM

    def _deadline_ms(self, timeout_s: float) -> int:
        return self._clock.boot_ms() + int(1_000 * min(WAIT_S_MAX, max(0.0, timeout_s - DEADLINE_SLACK_S)))

    def _expires_us(self, seat: Seat) -> int:
        """When the seat is lost unless the holder is heard of again; while Redis is away not later than the hold."""
        ends_ms = seat.silent_ms if self._link.up else min(seat.silent_ms, seat.hold_until_ms)
        return self._clock.now_us() + 1_000 * (ends_ms - self._clock.boot_ms())

    def _count(self) -> None:
        self._tally.seats_held = self._book.held(self._clock.boot_ms())

    # Logging

    def _log_changes(self, changes: Sequence[Change]) -> None:
        for change in changes:
            match change.kind:
                case ChangeKind.TAKEN_OVER:
                    self._append(change.seat, None, _record(change.seat))
                case ChangeKind.REGAINED:
                    self._append(change.seat, EventKind.SEAT_ACQUIRE, _record(change.seat))
                case ChangeKind.RECLAIMED:
                    self._tally.seats_reclaimed += 1
                    self._append(change.seat, EventKind.SEAT_RECLAIM, _end_record(change.seat))
                case ChangeKind.FORGOTTEN:
                    self._append(change.seat, None, _end_record(change.seat))

    def _append(self, seat: Seat, kind: EventKind | None, record: bytes) -> None:
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
        decision = Decision(_APPROVED, Reason.OK)
        decision.degraded = not self._link.up
        return self._event(inquiry, decision, kind, seat, seq)

    def _event(self, inquiry: Inquiry, decision: Decision, kind: EventKind, seat: Seat | None, seq: int) -> bytes:
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
        )
        return frame(EVENT, usage.pack_event(event))


_NO_ROOM: Final = Room(0, 0)
_STATES: Final = {Ending.RELEASED: pb.SEAT_STATE_RELEASED, Ending.RECLAIMED: pb.SEAT_STATE_RECLAIMED}


def _key_of(inquiry: Inquiry) -> Key | None:
    if not inquiry.idempotency_key or inquiry.peek:
        return None
    return (inquiry.tenant, f"{inquiry.action}#seat", inquiry.idempotency_key)  # apart from the keys of checks


def _record(seat: Seat) -> bytes:
    return seat_record(seat.tenant, seat.id, msgpack.packb((seat.feature, seat.holder, tuple(seat.who))))


def _end_record(seat: Seat) -> bytes:
    return seat_record(seat.tenant, seat.id, b"")


def _parsed(kind: type[_Named], data: bytes) -> _Named:
    """A request that names a tenant and a seat."""
    try:
        request = kind.FromString(data)
    except DecodeError as error:
        raise Malformed(str(error)) from error
    if TENANT_PATTERN.fullmatch(request.tenant) is None:
        raise Malformed(f"tenant: {request.tenant[:140]!r} is not one; name the customer account the seat is of")
    if not request.seat_id:
        raise Malformed("seat_id: is empty; send the one that AcquireSeat answered")
    if len(request.seat_id) > SEAT_ID_CHARS_MAX:
        raise Malformed(f"seat_id: has {len(request.seat_id):,} characters; at most {SEAT_ID_CHARS_MAX} are accepted")
    return request


def _renewed(state: pb.SeatState.ValueType, *, degraded: bool = False) -> bytes:
    encoded: bytes = pb.RenewSeatResponse(state=state, degraded=degraded).SerializeToString()
    return encoded


def _released(state: pb.SeatState.ValueType) -> bytes:
    encoded: bytes = pb.ReleaseSeatResponse(state=state).SerializeToString()
    return encoded
