"""``Reserve``, ``CommitReservation``, ``CancelReservation``, ``ExtendReservation``, and what expires by itself.

A reservation is decided as a check is, by the same code, and holds its units instead of spending them. Its record and
the event of its decision go into the log with one write, before the answer leaves. Settling it is one write as well:
the event, then the units; when the log does not take the event, nothing was settled.

Concurrency: one event loop. A commit within its reservation awaits nothing. One that exceeds it waits for leases as a
check does, in a task of its own that later calls about the reservation join; the reservation cannot expire meanwhile.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from licet.domain.catalog import OnExpiry
from licet.domain.conditions import CONTEXT_PREFIX
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet.wire.registers import WINDOW_GRACE_S
from licet.wire.usage import EventKind
from licet_sidecar.adapters.log_records import EVENT, frame
from licet_sidecar.adapters.usage_log import (
    UsageLog,
    UsageLogError,
    reservation_record,
)
from licet_sidecar.clock import Clock
from licet_sidecar.core.decision import Decision, LeaseWait, Wait, add_cost
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry
from licet_sidecar.core.lease import Lease
from licet_sidecar.core.reservations import (
    EXPIRES_AFTER_S_MAX,
    EXPIRES_AFTER_S_MIN,
    OPEN_MAX,
    Hold,
    Outcome,
    Reservation,
    ReservationBook,
    ReservationState,
    hold,
    to_wire,
    unhold,
)
from licet_sidecar.logs import Logger
from licet_sidecar.ports import LinkDown
from licet_sidecar.services.answers import Answers
from licet_sidecar.services.durability import DurabilityGate
from licet_sidecar.services.idempotency import KEY_REUSED, RESERVE, Key, RecentAnswers, key_of
from licet_sidecar.services.leasing import LeasingService
from licet_sidecar.services.refusals import Malformed
from licet_sidecar.services.requests import parse_check, verify_tenant
from licet_sidecar.services.reservation_records import event_of, records_of
from licet_sidecar.services.tally import Tally

SETTLE_S_MAX: Final = 2.0
"""Longest a commit waits for what exceeds its reservation, whatever its deadline: as long as a check."""

EXPIRED_PER_STEP_MAX: Final = 500
"""Settled without a pause: about 10 ms, in which no check is answered."""

REPORTED_S_MAX: Final = 600
"""How long after its window closed a change to a lease is still tried to be reported; Redis takes it no more."""

_ID: Final = re.compile(r"[0-9a-f]{32}")
_US: Final = 1_000_000

Answer = bytes | Awaitable[bytes]
Found = Reservation | Outcome | None


class Deciding(Protocol):
    """What reserving needs of the service that decides checks."""

    def require_ready(self) -> None:
        """Raises ``NotReady``."""

    def decide(
        self, inquiry: Inquiry, *, patient: bool, take: Callable[[Lease, int, int], bool] = ...
    ) -> Decision | Wait:
        """See ``ApprovalService``."""

    def count(self, tenant: str, counted: Sequence[tuple[Lease, int]]) -> Sequence[tuple[Lease, int]]:
        """Takes units of limits in shadow."""
        ...

    async def decide_later(
        self, inquiry: Inquiry, wait: Wait, timeout_s: float, take: Callable[[Lease, int, int], bool] = ...
    ) -> Decision:
        """See ``ApprovalService``."""

    def unlogged(
        self, inquiry: Inquiry, decision: Decision, why: str, give_back: Callable[[Lease, int], None] = ...
    ) -> Decision:
        """See ``ApprovalService``."""

    def is_recorded_as(self, event: usage.UsageEvent, inquiry: Inquiry) -> bool:
        """See ``ApprovalService``."""


class Reserving:
    """Makes and settles reservations."""

    def __init__(
        self,
        deciding: Deciding,
        book: ReservationBook,
        answers: Answers,
        engine: Engine,
        log: UsageLog,
        clock: Clock,
        leasing: LeasingService,
        recent: RecentAnswers,
        tally: Tally,
        gate: DurabilityGate,
    ) -> None:
        self._gate = gate
        self._deciding = deciding
        self._book = book
        self._answers = answers
        self._engine = engine
        self._log = log
        self._clock = clock
        self._leasing = leasing
        self._recent = recent
        self._tally = tally
        self._logger = Logger("reserving")
        self._id_prefix = log.header.decision_prefix.hex()
        self._changed: dict[Lease, tuple[str, int]] = {}
        """Leases whose reserved units Redis has not been told yet: tenant, and boot time (ms) of the change."""
        self._commits: dict[str, asyncio.Task[None]] = {}
        """Commits that wait, by reservation."""
        self.methods: dict[str, Callable[[bytes, float], Answer]] = {
            "Reserve": self.reserve,
            "CommitReservation": self.commit,
            "CancelReservation": self.cancel,
            "ExtendReservation": self.extend,
        }
        for reservation in book.all():
            self._tell(reservation.tenant, reservation.holds)

    # Reserving

    def reserve(self, data: bytes, timeout_s: float) -> Answer:
        """Decides, and holds what is asked."""
        action, answer = self._reserve(data, timeout_s)
        return self._gate.message(pb.ReserveResponse, answer, action, timeout_s)

    def _reserve(self, data: bytes, timeout_s: float) -> tuple[str, Answer]:
        """(action, answer as decided)."""
        started_ns = time.perf_counter_ns()
        self._deciding.require_ready()
        try:
            request = pb.ReserveRequest.FromString(data)
        except DecodeError as error:
            raise Malformed(str(error)) from error
        try:
            inquiry = parse_check(request.check)
        except InvalidInquiry as error:
            raise Malformed(f"check.{error}") from error
        expires_after_us = _expires_after_us(request.expires_after) if request.HasField("expires_after") else 0
        key = key_of(inquiry)
        if key is not None and (answer := self._earlier(key, data, inquiry)) is not None:
            self._tally.idempotent_repeats += 1
            return inquiry.action, answer
        try:
            outcome = self._deciding.decide(inquiry, patient=True, take=hold)
        except Malformed as error:
            raise Malformed(f"check.{error}") from error
        if isinstance(outcome, Decision):
            return inquiry.action, self._conclude(inquiry, outcome, expires_after_us, key, data, started_ns)
        later = self._reserve_later(inquiry, outcome, expires_after_us, key, data, started_ns, timeout_s)
        return inquiry.action, later if key is None else self._recent.join(key, RESERVE + data, later)

    async def _reserve_later(
        self,
        inquiry: Inquiry,
        wait: Wait,
        expires_after_us: int,
        key: Key | None,
        data: bytes,
        started_ns: int,
        timeout_s: float,
    ) -> bytes:
        try:
            decision = await self._deciding.decide_later(inquiry, wait, timeout_s, take=hold)
        except Malformed as error:
            raise Malformed(f"check.{error}") from error
        return self._conclude(inquiry, decision, expires_after_us, key, data, started_ns)

    def _conclude(
        self, inquiry: Inquiry, decision: Decision, expires_after_us: int, key: Key | None, data: bytes, started_ns: int
    ) -> bytes:
        """Logs a decision to reserve and encodes its answer; no await since it was decided."""
        boot_ms = self._clock.boot_ms()
        reservation: Reservation | None = None
        decision_id = ""
        position = 0
        if not inquiry.peek:
            if self._book.is_full and decision.effect is Effect.APPROVED:
                decision = self._refused(decision)
            decision_id = f"{self._id_prefix}{self._log.last_seq + 1:016x}"
            if decision.effect is Effect.APPROVED or (decision.observed and not self._book.is_full):
                # None in observe mode for an action that does not exist: there is nothing to hold or to price.
                reservation = self._reservation(decision_id, inquiry, decision, expires_after_us, boot_ms)
            try:
                position = self._log_reserve(inquiry, decision, reservation)
            except UsageLogError as error:
                self._tally.log_failures += 1
                decision = self._deciding.unlogged(inquiry, decision, str(error), give_back=unhold)
                decision_id, reservation = "", None
        if reservation is not None and not decision.message and self._has_seats(reservation):
            decision.message = "The feature has seats, and a reservation takes none of them: AcquireSeat does."
        response = pb.ReserveResponse()
        response.decision.ParseFromString(self._answers.encode(decision, decision_id))
        if reservation is not None:
            self._book.add(reservation)
            self._tell(inquiry.tenant, reservation.holds)
            response.reservation_id = reservation.id
            response.expires_at.FromMicroseconds(reservation.expires_us)
        answer = response.SerializeToString()
        if key is not None and decision_id:
            self._recent.remember(key, RESERVE + data, answer, self._log.last_seq, position)
        took_us = (time.perf_counter_ns() - started_ns) // 1_000
        self._tally.answered(decision.effect, decision.reason, took_us)
        self._tally.stale_answers += decision.stale
        return answer

    def _has_seats(self, reservation: Reservation) -> bool:
        granted = (self._engine.entitlement(reservation.tenant, feature) for feature in reservation.meters.values())
        return any(entitlement is not None and entitlement.seats for entitlement in granted)

    def _refused(self, decision: Decision) -> Decision:
        for lease, units in decision.spends:
            unhold(lease, units)
        refused = Decision(
            Effect.DENIED,
            Reason.USAGE_LOG_FULL,
            f"This sidecar holds as many open reservations as its log takes, {self._book.open_count:,}"
            f" (at most {OPEN_MAX:,}): settle some.",
        )
        refused.units, refused.context, refused.stale = decision.units, decision.context, decision.stale
        refused.observed = self._engine.rulebook is not None and self._engine.rulebook.observe
        return refused

    def _reservation(
        self, id_: str, inquiry: Inquiry, decision: Decision, expires_after_us: int, boot_ms: int
    ) -> Reservation | None:
        assert self._engine.rulebook is not None
        bound = self._engine.rulebook.action(inquiry.action)
        if bound is None:
            return None
        terms = bound.action.reservation
        after_us = expires_after_us or terms.expires_after_s * _US
        inquiry.context = decision.context  # what is not declared is not kept
        reservation = Reservation(id_, inquiry, expires_us=self._clock.now_us() + after_us, made_ms=boot_ms)
        if bound.hides:
            # In memory the true values, for what a commit uses beyond the reservation; in the log what is recorded.
            inquiry.context = inquiry.declared
            reservation.hidden = bound.hidden(inquiry.declared)
        reservation.units = dict(decision.units)
        reservation.meters = dict(bound.action.meters)
        reservation.prices = decision.prices
        reservation.exposures = decision.exposures
        reservation.terms_s = terms.expires_after_s
        reservation.commits_on_expiry = terms.on_expiry is OnExpiry.COMMIT
        reservation.effect, reservation.reason, reservation.rule = decision.effect, decision.reason, decision.rule
        reservation.degraded, reservation.observed = decision.degraded, decision.observed
        if decision.effect is Effect.APPROVED:
            reservation.holds = tuple(_hold_of(lease, units, decision) for lease, units in decision.spends if units)
        reservation.reported = not reservation.holds
        return reservation

    def _log_reserve(self, inquiry: Inquiry, decision: Decision, reservation: Reservation | None) -> int:
        """The event's position in the log."""
        record = b""
        if reservation is not None:
            record = reservation_record(to_wire(reservation))
            reservation.size = len(record)
        event = self._event(EventKind.RESERVE, inquiry, decision)._replace(
            units={},
            cost_nanos=0,
            currency="",
            feature_costs={},
            spends=[],
            priced_as={},
            idempotency_key=inquiry.idempotency_key,
            units_held=dict(decision.units),
        )
        if reservation is not None:
            event = event._replace(
                held=[(one.lease.quota, one.units) for one in reservation.holds],
                expires_us=reservation.expires_us,
            )
        return self._log.append(record + frame(EVENT, usage.pack_event(event)), 1) + len(record)

    def _earlier(self, key: Key, data: bytes, inquiry: Inquiry) -> Answer | None:
        earlier = self._recent.find(key)
        if earlier is None:
            return None
        kept, answer = earlier
        if isinstance(kept, usage.UsageEvent):
            same = kept.kind == EventKind.RESERVE and self._deciding.is_recorded_as(kept, inquiry)
        else:
            request = kept[1:]
            same = kept[:1] == RESERVE and (
                request == data or pb.ReserveRequest.FromString(request) == pb.ReserveRequest.FromString(data)
            )
        if not same:
            raise Malformed(f"check.{KEY_REUSED}")
        return answer

    # Settling

    def commit(self, data: bytes, timeout_s: float) -> Answer:
        """Uses what was reserved: all, less, or more."""
        try:
            request = pb.CommitReservationRequest.FromString(data)
        except DecodeError as error:
            raise Malformed(str(error)) from error
        found = self._find(request.tenant, request.reservation_id)
        answer = self._commit_found(found, request, timeout_s)
        action = found.inquiry.action if isinstance(found, Reservation) else found.action if found else ""
        return self._gate.message(pb.CommitReservationResponse, answer, action, timeout_s)

    def _commit_found(self, found: Found, request: pb.CommitReservationRequest, timeout_s: float) -> Answer:
        if not isinstance(found, Reservation):
            return self._commit_answer(found)
        try:
            used = found.used_units(
                request.quantity if request.HasField("quantity") else None, dict(request.quantities)
            )
        except InvalidInquiry as error:
            raise Malformed(str(error)) from error
        if (task := self._commits.get(found.id)) is not None:
            return self._join(task, found, self._commit_answer)
        if found.is_certain(self._clock.boot_ms()) and (found.observed or not found.beyond(used)):
            return self._commit(found, used, None, {})
        task = self._begin_commit(found, used, timeout_s)
        return self._join(task, found, self._commit_answer)

    def cancel(self, data: bytes, timeout_s: float) -> Answer:
        """Frees what was reserved."""
        try:
            request = pb.CancelReservationRequest.FromString(data)
        except DecodeError as error:
            raise Malformed(str(error)) from error
        found = self._find(request.tenant, request.reservation_id)
        if isinstance(found, Reservation):
            if (task := self._commits.get(found.id)) is not None:
                return self._join(task, found, _cancel_answer)
            self._drop([found], EventKind.CANCEL)
            found = self._settled(found)
        return _cancel_answer(found)

    def extend(self, data: bytes, timeout_s: float) -> Answer:
        """Holds a reservation for longer, or less long, counted from now."""
        try:
            request = pb.ExtendReservationRequest.FromString(data)
        except DecodeError as error:
            raise Malformed(str(error)) from error
        after_us = _expires_after_us(request.expires_after) if request.HasField("expires_after") else 0
        found = self._find(request.tenant, request.reservation_id)
        if isinstance(found, Reservation) and (task := self._commits.get(found.id)) is not None:
            return self._join(task, found, _extend_answer)
        if isinstance(found, Reservation):
            self._extend(found, self._clock.now_us() + (after_us or found.terms_s * _US))
        return _extend_answer(found)

    def _extend(self, reservation: Reservation, expires_us: int) -> None:
        """When the log does not take it, the reservation expires when it was to: the answer says when."""
        before_us, reservation.expires_us = reservation.expires_us, expires_us
        record = reservation_record(to_wire(reservation))
        event = self._about(EventKind.EXTEND, reservation)._replace(expires_us=expires_us)
        try:
            self._log.append(record + frame(EVENT, usage.pack_event(event)), 1)
        except UsageLogError:
            self._tally.log_failures += 1
            reservation.expires_us = before_us
        else:
            self._book.expire_at(reservation, expires_us)

    def _find(self, tenant: str, id_: str) -> Found:
        """An open reservation that has not expired, or how it was settled."""
        try:
            verify_tenant(tenant)
        except InvalidInquiry as error:
            raise Malformed(str(error)) from error
        if _ID.fullmatch(id_) is None:
            raise Malformed("reservation_id: it is not the 32 hex digits that Reserve answers with")
        self._deciding.require_ready()
        found = self._book.find(tenant, id_)
        if isinstance(found, Reservation) and not found.settling and found.expires_us <= self._clock.now_us():
            self._expire(found)
            return self._book.find(tenant, id_)
        return found

    def _settled(self, reservation: Reservation) -> Found:
        return self._book.find(reservation.tenant, reservation.id)

    def _drop(self, reservations: Sequence[Reservation], kind: EventKind) -> bool:
        """Settles reservations without using them, with one write. False when the log does not take it."""
        seq = self._log.last_seq
        records = []
        for number, reservation in enumerate(reservations, 1):
            event = self._about(kind, reservation)._replace(seq=seq + number)
            records.append(frame(EVENT, usage.pack_event(event)))
        try:
            self._log.append(b"".join(records), len(records))
        except UsageLogError:
            self._tally.log_failures += 1
            return False
        boot_ms = self._clock.boot_ms()
        state = ReservationState.CANCELED if kind is EventKind.CANCEL else ReservationState.EXPIRED
        for reservation in reservations:
            self._book.settle(reservation, [(one, 0) for one in reservation.holds], boot_ms)
            self._book.remember(reservation.id, Outcome(reservation.tenant, state, b"", boot_ms))
            self._tell(reservation.tenant, reservation.holds)
            self._count(state.name.lower())
        return True

    # Committing

    def _commit(
        self,
        reservation: Reservation,
        used: Mapping[str, int],
        extra: Decision | None,
        beyond: Mapping[str, int],
        *,
        expired: bool = False,
    ) -> bytes:
        """Logs a commit, spends its units and encodes its answer. ``extra`` is the decision on what is ``beyond``.

        When the log does not take it nothing is settled, and the answer says that the reservation is held.
        """
        boot_ms = self._clock.boot_ms()
        extra_taken = extra is not None and extra.effect is Effect.APPROVED
        unfunded = {} if extra is None or extra_taken else dict(beyond)
        funded = {feature: units - unfunded.get(feature, 0) for feature, units in used.items()}
        shares = reservation.shares(funded)
        decision = self._commit_decision(reservation, funded, extra, unfunded)
        decision.spends = _merged(
            [*((one.lease, units) for one, units in shares), *(extra.spends if extra and extra_taken else ())]
        )
        decision.counted = _merged(
            [*self._count_late(reservation, decision), *(extra.counted if extra and extra_taken else ())]
        )
        overage = {one.lease.quota: over for one, units in shares if (over := one.lease.overage_held(units))}
        if extra is not None and extra_taken:
            overage.update({quota: overage.get(quota, 0) + over for quota, over in extra.overage.items()})
        if overage:
            decision.overage = overage
            if decision.reason is Reason.OK:
                decision.reason = Reason.OVERAGE
        event = self._event(EventKind.COMMIT, reservation.inquiry, decision)._replace(
            about=reservation.id, unfunded=unfunded, overage=overage
        )
        if expired:
            event = event._replace(flags=event.flags | usage.FLAG_EXPIRED)
        try:
            self._log.append(frame(EVENT, usage.pack_event(event)), 1)
        except UsageLogError as error:
            self._tally.log_failures += 1
            for lease, units in extra.spends if extra and extra_taken else ():
                lease.used -= units
            for lease, units in decision.counted:
                lease.used -= units
            return self._held_answer(str(error))
        observed = decision.observed
        response = pb.CommitReservationResponse(
            state=pb.RESERVATION_STATE_COMMITTED,
            committed=used if observed else funded,
            unfunded={} if observed else unfunded,
        )
        self._book.settle(reservation, shares, boot_ms)
        response.decision.ParseFromString(self._answers.encode(decision, f"{self._id_prefix}{self._log.last_seq:016x}"))
        answer = response.SerializeToString()
        outcome = Outcome(reservation.tenant, ReservationState.COMMITTED, answer, boot_ms, reservation.inquiry.action)
        self._book.remember(reservation.id, outcome)
        self._tell(reservation.tenant, reservation.holds)
        self._count("committed_on_expiry" if expired else "committed")
        self._tally.units_unfunded += sum(unfunded.values())
        return answer

    def _count_late(self, reservation: Reservation, decision: Decision) -> Sequence[tuple[Lease, int]]:
        """Limits in shadow count what was reserved when it is used, in the window of that moment; so do those that
        denied it, when observe mode let it through."""
        used = decision.units if reservation.observed else reservation.within(decision.units)
        if not any(used.values()):
            return ()
        inquiry = reservation.inquiry_for(used)
        now_us, boot_ms = self._clock.now_us(), self._clock.boot_ms()
        try:
            counted = self._engine.counting_late(inquiry, decision, now_us=now_us, boot_ms=boot_ms)
        except InvalidInquiry:  # the action was changed since
            return ()
        return self._deciding.count(reservation.tenant, counted) if counted else ()

    def _commit_decision(
        self,
        reservation: Reservation,
        funded: Mapping[str, int],
        extra: Decision | None,
        unfunded: Mapping[str, int],
    ) -> Decision:
        """What is recorded and answered: the reservation's decision, and what became of the part beyond it."""
        decision = Decision(Effect(reservation.effect), Reason(reservation.reason), "", reservation.rule)
        decision.degraded, decision.observed = reservation.degraded, reservation.observed
        decision.stale = self._engine.is_stale(self._clock.now_us())
        if extra is not None and not reservation.observed:
            decision.degraded |= extra.degraded
            decision.observed = extra.observed
            decision.shadow = extra.shadow
            if not unfunded or not any(funded.values()):  # else what was reserved was approved, and stays so
                decision.effect, decision.reason, decision.rule = extra.effect, extra.reason, extra.rule
                decision.message, decision.retry_after_s = extra.message, extra.retry_after_s
            else:
                what = " and ".join(f"{units:,} units of {feature}" for feature, units in unfunded.items())
                decision.message = f"Used beyond the reservation and not approved: {what}. {extra.message}"
        decision.units, decision.context, decision.prices = funded, reservation.context, reservation.prices
        decision.exposures = reservation.exposures
        if decision.effect is Effect.APPROVED:
            add_cost(decision)
        return decision

    def _begin_commit(
        self, reservation: Reservation, used: Mapping[str, int], timeout_s: float, *, expired: bool = False
    ) -> asyncio.Task[None]:
        reservation.settling = True
        task = asyncio.get_running_loop().create_task(
            self._commit_later(reservation, used, timeout_s, expired=expired), name="commit"
        )
        self._commits[reservation.id] = task
        task.add_done_callback(lambda done: self._commit_ended(reservation, done))
        return task

    def _commit_ended(self, reservation: Reservation, task: asyncio.Task[None]) -> None:
        self._commits.pop(reservation.id, None)
        reservation.settling = False
        if self._settled(reservation) is reservation:  # the log did not take it
            self._book.expire_at(reservation, reservation.expires_us)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._logger.error("a commit failed", reservation=reservation.id, error=repr(error))

    async def _commit_later(
        self, reservation: Reservation, used: Mapping[str, int], timeout_s: float, *, expired: bool
    ) -> None:
        """Commits what needs a decision, or an answer of Redis first."""
        deadline_ms = self._clock.boot_ms() + int(1_000 * min(SETTLE_S_MAX, timeout_s))
        await self._make_certain(reservation, deadline_ms)
        if not reservation.is_certain(self._clock.boot_ms()) and not self._give_up_units(reservation):
            return
        beyond = {} if reservation.observed else reservation.beyond(used)
        extra: Decision | None = None
        if beyond:
            inquiry = reservation.inquiry_for(beyond)
            extra = self._undecidable(reservation)
            try:
                outcome = extra or self._deciding.decide(inquiry, patient=True)
                if not isinstance(outcome, Decision):
                    left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
                    outcome = await self._deciding.decide_later(inquiry, outcome, left_s)
                extra = outcome
            except Malformed as error:  # the action was changed since, and does not take such a question any more
                extra = Decision(Effect.DENIED, Reason.UNKNOWN_ACTION, f"{error}.")
        self._commit(reservation, used, extra, beyond, expired=expired)

    async def _make_certain(self, reservation: Reservation, deadline_ms: int) -> None:
        """Waits, when rule 4 asks for it, until Redis has answered what it knows of the leases held."""
        while not reservation.is_certain(self._clock.boot_ms()):
            left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
            closed_s = self._clock.now_us() // _US - WINDOW_GRACE_S
            if left_s <= 0 or any(one.lease.end <= closed_s for one in reservation.holds):
                return  # too late, or Redis takes no call about that window any more
            asked = [one.lease.asked_ms for one in reservation.holds]
            wait = LeaseWait(reservation.tenant, tuple((one.lease, 0) for one in reservation.holds))
            try:
                await self._leasing.acquire(wait, left_s)
            except (LinkDown, TimeoutError):
                return
            if asked == [one.lease.asked_ms for one in reservation.holds]:
                return  # Redis takes no call about them any more

    def _give_up_units(self, reservation: Reservation) -> bool:
        """Frees what may have been given to others. False when the log does not take it: then it stays as it is."""
        before = reservation.holds
        reservation.holds, reservation.given_up = (), True
        record = reservation_record(to_wire(reservation))
        reservation.holds, reservation.given_up = before, False
        try:
            self._log.append(record, 0)
        except UsageLogError:
            self._tally.log_failures += 1
            return False
        self._book.give_up_units(reservation)
        self._tell(reservation.tenant, before)
        return True

    async def _join(
        self, task: asyncio.Task[None], reservation: Reservation, answer: Callable[[Found], bytes]
    ) -> bytes:
        """Waits for a commit under way; a caller that leaves does not end it."""
        await asyncio.wait([task])
        return answer(self._settled(reservation))

    async def stop(self) -> None:
        """Ends commits that wait; their reservations stay open."""
        tasks = list(self._commits.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Expiring

    async def upkeep(self) -> None:
        """Settles what expired, and sees to it that Redis learns what is held. To be called twice a second or so."""
        while True:
            if not self._expire_due():
                break
            await asyncio.sleep(0)  # checks between two steps
        self._note_reported()
        self._report()
        self._book.forget(self._clock.boot_ms())

    def _expire_due(self) -> bool:
        """Settles some of what is due. Whether there may be more."""
        due = self._book.due(self._clock.now_us(), EXPIRED_PER_STEP_MAX)
        canceled = [reservation for reservation in due if not reservation.commits_on_expiry]
        if canceled and not self._drop(canceled, EventKind.EXPIRE):
            self._postpone(due)
            return False
        for number, reservation in enumerate(due):
            if reservation.commits_on_expiry and not self._commit_expired(reservation):
                self._postpone([one for one in due[number:] if one.commits_on_expiry])
                return False
        return len(due) == EXPIRED_PER_STEP_MAX

    def _expire(self, reservation: Reservation) -> None:
        if not reservation.commits_on_expiry:
            self._drop([reservation], EventKind.EXPIRE)
        else:
            self._commit_expired(reservation)

    def _commit_expired(self, reservation: Reservation) -> bool:
        """Commits all that was reserved, or begins to. False when it has to be tried again."""
        used = reservation.units
        if reservation.is_certain(self._clock.boot_ms()) and not reservation.beyond(used):
            self._commit(reservation, used, None, {}, expired=True)
            return self._settled(reservation) is not reservation
        if self._engine.rulebook is None:
            return False
        self._begin_commit(reservation, used, SETTLE_S_MAX, expired=True)
        return True

    def _postpone(self, reservations: Sequence[Reservation]) -> None:
        for reservation in reservations:
            self._book.expire_at(reservation, reservation.expires_us)

    # Telling Redis

    def _tell(self, tenant: str, holds: Sequence[Hold]) -> None:
        """Reserved units changed: until Redis knows, others see units that are free as spent, or the reverse."""
        boot_ms = self._clock.boot_ms()
        for one in holds:
            one.lease.unsure = True
            self._changed[one.lease] = (tenant, boot_ms)
        if holds:
            self._leasing.refill_soon(tenant)

    def _report(self) -> None:
        now_s = self._clock.now_us() // _US
        for lease, (tenant, changed_ms) in list(self._changed.items()):
            if lease.asked_ms > changed_ms or now_s > lease.end + WINDOW_GRACE_S + REPORTED_S_MAX:
                del self._changed[lease]
            else:
                lease.unsure = True
                self._leasing.refill_soon(tenant)

    def _note_reported(self) -> None:
        """Logs which reservations Redis counts by now: after a restart they are certain without asking."""
        reported = self._book.newly_reported()
        if reported and self._log.has_room:
            records = b"".join(reservation_record(to_wire(reservation)) for reservation in reported)
            try:
                self._log.append(records, 0)
            except UsageLogError:  # Redis is asked again, then
                self._tally.log_failures += 1

    # Records and answers

    def _undecidable(self, reservation: Reservation) -> Decision | None:
        """A denial, when conditions read values that were not recorded and went with the process that had them."""
        bound = self._engine.rulebook.action(reservation.inquiry.action) if self._engine.rulebook else None
        if bound is None or not reservation.values_lost:
            return None
        lost = sorted(name for name in reservation.hidden if f"{CONTEXT_PREFIX}{name}" in bound.variables)
        if not lost:
            return None
        return Decision(
            Effect.DENIED,
            Reason.POLICY_ERROR,
            f"A condition reads {', '.join(lost)}, which is not recorded and was lost when the sidecar restarted.",
        )

    def records(self) -> list[bytes]:
        """Records of every open reservation, for the head of a new log segment."""
        return records_of(self._book)

    def _about(self, kind: EventKind, reservation: Reservation) -> usage.UsageEvent:
        """An event about a reservation that uses nothing."""
        decision = Decision(Effect.APPROVED, Reason.OK)
        decision.context = reservation.context
        return self._event(kind, reservation.inquiry, decision)._replace(about=reservation.id)

    def _event(self, kind: EventKind, inquiry: Inquiry, decision: Decision) -> usage.UsageEvent:
        """The next event of the log, about a decision."""
        return event_of(
            kind, inquiry, decision, self._log.last_seq + 1, at_us=self._clock.now_us(), revision=self._engine.revision
        )

    def _count(self, outcome: str) -> None:
        settled = self._tally.reservations_settled
        settled[outcome] = settled.get(outcome, 0) + 1

    def _held_answer(self, trouble: str) -> bytes:
        decision = Decision(
            Effect.DENIED, Reason.USAGE_LOG_FULL, f"The usage could not be recorded, nothing was committed: {trouble}."
        )
        response = pb.CommitReservationResponse(state=pb.RESERVATION_STATE_HELD)
        response.decision.ParseFromString(self._answers.encode(decision, ""))
        return response.SerializeToString()

    def _commit_answer(self, found: Found) -> bytes:
        if isinstance(found, Reservation):
            return self._held_answer("the usage log takes no more records")
        if found is not None and found.answer:
            return found.answer
        # Nothing was decided, so there is no reason either.
        state = ReservationState.UNKNOWN if found is None else found.state
        message = f"The reservation is {state.name.lower()}: nothing was committed."
        return pb.CommitReservationResponse(
            state=pb.ReservationState.ValueType(state),
            decision=pb.CheckResponse(effect=pb.EFFECT_DENIED, message=message, revision=self._engine.revision),
        ).SerializeToString()


def _hold_of(lease: Lease, units: int, decision: Decision) -> Hold:
    """What is held of a lease, for units of the feature that its limit counts."""
    feature, terms = lease.limit_key.partition(":")[0], lease.terms
    limit = lease.limit_key.removesuffix(f"+{terms.grant}") if terms.grant else lease.limit_key
    if not terms.currency:
        return Hold(lease, feature, limit, units)
    price, attribute = next((price, by) for name, price, by in decision.prices if name == feature)
    return Hold(lease, feature, limit, units, price, str(decision.context.get(attribute, "")) if attribute else "")


def _merged(spends: Sequence[tuple[Lease, int]]) -> list[tuple[Lease, int]]:
    """Each lease once."""
    units: dict[Lease, int] = {}
    for lease, count in spends:
        units[lease] = units.get(lease, 0) + count
    return list(units.items())


def _expires_after_us(duration: Duration) -> int:
    after_us = duration.seconds * _US + duration.nanos // 1_000
    if not EXPIRES_AFTER_S_MIN * _US <= after_us <= EXPIRES_AFTER_S_MAX * _US:
        raise Malformed(
            f"expires_after: {after_us / _US:g} s is not between {EXPIRES_AFTER_S_MIN} s and"
            f" {EXPIRES_AFTER_S_MAX} s (7 days)"
        )
    return after_us


def _cancel_answer(found: Found) -> bytes:
    return pb.CancelReservationResponse(state=_state_of(found)).SerializeToString()


def _extend_answer(found: Found) -> bytes:
    response = pb.ExtendReservationResponse(state=_state_of(found))
    if isinstance(found, Reservation):
        response.expires_at.FromMicroseconds(found.expires_us)
    return response.SerializeToString()


def _state_of(found: Found) -> pb.ReservationState.ValueType:
    if isinstance(found, Reservation):
        return pb.RESERVATION_STATE_HELD
    return pb.RESERVATION_STATE_UNKNOWN if found is None else pb.ReservationState.ValueType(found.state)
