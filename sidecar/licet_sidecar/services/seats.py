"""``AcquireSeat``, ``RenewSeat`` and ``ReleaseSeat``: from request bytes to response bytes.

A heartbeat is answered from memory; acquiring, and whatever concerns a seat that is not vouched for here, asks Redis
through the ``SeatKeeper``. Owned by one event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from licet.domain.catalog import UnavailableMode
from licet.domain.ids import TENANT_PATTERN
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet.wire.usage import EventKind
from licet_sidecar.adapters.usage_log import UsageLog, UsageLogError
from licet_sidecar.clock import Clock
from licet_sidecar.core.decision import Decision, LoadWait
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry
from licet_sidecar.core.seats import Ending, Result, Seat, SeatAsk, SeatBook, Verb, Who, holder_digest, split_seat_id
from licet_sidecar.ports import LinkDown, LinkRefused
from licet_sidecar.services.answers import Answers
from licet_sidecar.services.approval import DEADLINE_SLACK_S, WAIT_S_MAX, Answer, Malformed, NotReady
from licet_sidecar.services.durability import DurabilityGate
from licet_sidecar.services.idempotency import Key, RecentAnswers
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.requests import parse_check
from licet_sidecar.services.seat_keeping import SeatKeeper, end_record_of, record_of
from licet_sidecar.services.syncing import SyncService
from licet_sidecar.services.tally import Tally

HEARTBEAT_MS_DEFAULT: Final = 60_000
"""For seats whose plan says nothing; documents always do."""

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
        keeper: SeatKeeper,
        log: UsageLog,
        clock: Clock,
        link: LinkState,
        sync: SyncService,
        recent: RecentAnswers,
        tally: Tally,
        gate: DurabilityGate,
    ) -> None:
        self._gate = gate
        self._engine = engine
        self._keeper = keeper
        self._log = log
        self._clock = clock
        self._link = link
        self._sync = sync
        self._recent = recent
        self._tally = tally
        self._answers = Answers(engine, link)

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
                asked = earlier[0]
                if not isinstance(asked, bytes) or pb.AcquireSeatRequest.FromString(asked) != request:
                    raise Malformed(_KEY_REUSED)
                if not isinstance(earlier[1], bytes) or self._stands(inquiry.tenant, earlier[1]):
                    self._tally.idempotent_repeats += 1
                    return self._gate.message(pb.AcquireSeatResponse, earlier[1], inquiry.action, timeout_s)
        under_way = self._acquire(inquiry, key, data, timeout_s)
        answer = under_way if key is None else self._recent.join(key, data, under_way)
        return self._gate.message(pb.AcquireSeatResponse, answer, inquiry.action, timeout_s)

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
        seat = self._keeper.vouched(inquiry.tenant, ask.seat_id)
        if seat is None:
            try:
                result = await self._keeper.settled(inquiry.tenant, ask, deadline_ms)
            except (LinkDown, LinkRefused, TimeoutError) as error:
                decision = self._unavailable(inquiry, decision, error)
                return self._conclude(inquiry, decision, None, key, data, started_ns)
            # What was decided on may have changed meanwhile; an answer comes from one revision.
            decision = await self._access(inquiry, 0)
            seat = self._keeper.vouched(inquiry.tenant, ask.seat_id)
            if result is Result.FULL and decision.effect is _APPROVED and not decision.degraded:
                self._tally.seats_denied += 1
                decision = self._no_seat(inquiry.tenant, feature, decision)
            elif decision.effect is not _APPROVED and seat is not None:
                self._keeper.end(seat, Ending.RELEASED)
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
        room = self._keeper.room(tenant, feature)
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
        seq = position = 0
        if not inquiry.peek:
            seq = self._log.last_seq + 1
            records = self._keeper.event(inquiry, decision, EventKind.SEAT_ACQUIRE, seat, seq)
            if seat is not None:
                records += record_of(seat)
            try:
                position = self._log.append(records, 1)
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
            room = self._keeper.room(inquiry.tenant, feature)
            response.seats, response.seats_taken = room.seats, room.taken
        encoded: bytes = response.SerializeToString()
        if key is not None and decision_id:
            self._recent.remember(key, data, encoded, seq, position)
        self._tally.answered(decision.effect, decision.reason, (time.perf_counter_ns() - started_ns) // 1_000)
        self._tally.stale_answers += decision.stale
        self._keeper.count()
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
            self._keeper.end(seat, Ending.RELEASED)
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
        return not seat_id or self._keeper.vouched(tenant, seat_id) is not None

    # Renewing and releasing

    def renew(self, data: bytes, timeout_s: float) -> Answer:
        """A heartbeat."""
        request = _parsed(pb.RenewSeatRequest, data)
        tenant, seat_id = request.tenant, request.seat_id
        named = split_seat_id(seat_id)
        if named is None:
            return _renewed(pb.SEAT_STATE_UNKNOWN)
        seat = self._keeper.vouched(tenant, seat_id)
        if seat is not None:
            SeatBook.hear(seat, self._clock.boot_ms())
            return self._held(seat)
        held = self._keeper.book.tenants.get(tenant)
        ending = self._keeper.book.ended(tenant, seat_id)
        if held is not None and seat_id in held.leaving and ending is not None:
            return _renewed(_STATES[ending], degraded=not self._link.up)
        return self._renew(tenant, SeatAsk(Verb.TAKE, *named), self._deadline_ms(timeout_s))

    async def _renew(self, tenant: str, ask: SeatAsk, deadline_ms: int) -> bytes:
        """A heartbeat for a seat that is not vouched for here: Redis knows whether anybody has it."""
        known = self._keeper.book.find(tenant, ask.seat_id)
        if known is not None:
            SeatBook.hear(known, self._clock.boot_ms())
        ending = self._keeper.book.ended(tenant, ask.seat_id)
        lapsed = known is not None and known.lapsed
        try:
            await self._keeper.settled(tenant, ask, deadline_ms)
        except (LinkDown, LinkRefused, TimeoutError) as error:
            if lapsed or ending is Ending.RECLAIMED:
                return _renewed(pb.SEAT_STATE_RECLAIMED, degraded=True)
            raise NotReady(
                f"whether the seat is held cannot be said just now: {str(error) or 'there was no answer in time'}"
            ) from error
        seat = self._keeper.vouched(tenant, ask.seat_id)
        if seat is not None:
            return self._held(seat)
        ending = self._keeper.book.ended(tenant, ask.seat_id)
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
        ending = self._keeper.book.ended(tenant, take.seat_id)
        seat = self._keeper.vouched(tenant, take.seat_id)
        if seat is None and ending is Ending.RELEASED:
            return _released(pb.SEAT_STATE_RELEASED)  # said again
        if seat is None:
            # Another sidecar answers for it, or did. Only its own one can release a seat, so this one becomes that.
            try:
                await self._keeper.settled(tenant, take, deadline_ms)
            except (LinkDown, LinkRefused, TimeoutError) as error:
                raise NotReady(
                    f"the seat cannot be released just now: {str(error) or 'there was no answer in time'};"
                    " without renewals it ends by itself"
                ) from error
            seat = self._keeper.book.find(tenant, take.seat_id)
            if seat is None:
                ending = self._keeper.book.ended(tenant, take.seat_id)
                return _released(_STATES[ending] if ending else pb.SEAT_STATE_UNKNOWN)
        self._tally.seats_released += 1
        self._keeper.append(seat, EventKind.SEAT_RELEASE, end_record_of(seat))
        try:
            while seat is not None and await self._keeper.given_back(seat, deadline_ms) is Result.MOVED:
                await self._keeper.settled(tenant, take, deadline_ms)  # it had moved since this sidecar last asked
                seat = self._keeper.book.find(tenant, take.seat_id)
        except (LinkDown, LinkRefused, TimeoutError):
            pass  # the holder is done all the same; upkeep tells Redis, or the hold ends by itself
        self._keeper.count()
        return _released(pb.SEAT_STATE_RELEASED)

    def _deadline_ms(self, timeout_s: float) -> int:
        return self._clock.boot_ms() + int(1_000 * min(WAIT_S_MAX, max(0.0, timeout_s - DEADLINE_SLACK_S)))

    def _expires_us(self, seat: Seat) -> int:
        """When the seat is lost unless the holder is heard of again; while Redis is away not later than the hold."""
        ends_ms = seat.silent_ms if self._link.up else min(seat.silent_ms, seat.hold_until_ms)
        return self._clock.now_us() + 1_000 * (ends_ms - self._clock.boot_ms())


_STATES: Final = {Ending.RELEASED: pb.SEAT_STATE_RELEASED, Ending.RECLAIMED: pb.SEAT_STATE_RECLAIMED}


def _key_of(inquiry: Inquiry) -> Key | None:
    if not inquiry.idempotency_key or inquiry.peek:
        return None
    return (inquiry.tenant, f"{inquiry.action}#seat", inquiry.idempotency_key)  # apart from the keys of checks


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
