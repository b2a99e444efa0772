"""The service: from method and request bytes to response bytes, or, when a lease ran dry, an awaitable of them.

A plain function owned by one event loop. It knows no transport: an edge hands it bytes and a deadline and sends back
what it returns. A check that is served from a lease awaits nothing: it is decided, its units are taken, its event is
in the log and its answer is encoded in one step. Decisions of a batch share one write to the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgpack
from google.protobuf.message import DecodeError

from licet.domain.catalog import UnavailableMode
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet.wire.usage import UsageEvent
from licet_sidecar.adapters.log_records import EVENT, frame
from licet_sidecar.adapters.usage_log import (
    UsageLog,
    UsageLogError,
)
from licet_sidecar.clock import Clock
from licet_sidecar.core.decision import BucketWait, Decision, LeaseWait, LoadWait, Wait
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry
from licet_sidecar.core.lease import Lease, RateShare
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.reservations import ReservationBook
from licet_sidecar.core.tenant import prepare
from licet_sidecar.ports import LinkDown
from licet_sidecar.services.answers import Answers, varint
from licet_sidecar.services.durability import DurabilityGate
from licet_sidecar.services.events import flags_of, spends_of
from licet_sidecar.services.idempotency import KEY_REUSED, RESERVE, Key, RecentAnswers, is_recorded_as, key_of
from licet_sidecar.services.leasing import LeasingService
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.refusals import Malformed, NotReady
from licet_sidecar.services.requests import parse_check
from licet_sidecar.services.reserving import Reserving
from licet_sidecar.services.syncing import SyncService
from licet_sidecar.services.tally import Tally

WAIT_S_MAX: Final = 2.0
"""Longest a check waits for a license or a lease, whatever its deadline."""

DEADLINE_SLACK_S: Final = 0.02
"""Kept back from a caller's deadline, so that the answer still arrives."""

BATCH_CHECKS_MAX: Final = 1_000

_APPROVED: Final = Effect.APPROVED
_CHECKS_TAG: Final = b"\x0a"  # field 1 of CheckBatchResponse, length-delimited


Answer = bytes | Awaitable[bytes]
StopOn = Callable[[int], bool]
Take = Callable[[Lease, int, int], bool]
"""Takes units of a lease at a boot time (ms); whether a refill is due."""
GiveBack = Callable[[Lease, int], None]


class Question(NamedTuple):
    """One check under way: what is asked, as parsed and as sent. ``key``: what a repeat is recognized by, if at all."""

    inquiry: Inquiry
    data: bytes
    key: Key | None


class ApprovalService:
    """``licet.v1.ApprovalService`` without its transport."""

    def __init__(
        self,
        engine: Engine,
        log: UsageLog,
        clock: Clock,
        link: LinkState,
        leasing: LeasingService,
        sync: SyncService,
        recent: RecentAnswers,
        tally: Tally,
        reservations: ReservationBook,
        gate: DurabilityGate,
    ) -> None:
        self._engine = engine
        self._log = log
        self._clock = clock
        self._leasing = leasing
        self._sync = sync
        self._recent = recent
        self._gate = gate
        self._tally = tally
        self._answers = Answers(engine, link)
        self._pack: Callable[[Any], bytes] = msgpack.Packer(use_bin_type=True).pack
        self._id_prefix = log.header.decision_prefix.hex()
        self._methods: dict[str, Callable[[bytes, float], Answer]] = {
            "Check": self.check,
            "CheckBatch": self.check_batch,
            "CheckStream": self.check,  # one message of the stream
        }
        self._streams: dict[str, Callable[[bytes], AsyncIterator[bytes]]] = {}
        self.reserving = Reserving(self, reservations, self._answers, engine, log, clock, leasing, recent, tally, gate)
        self._methods |= self.reserving.methods

    def handle(self, method: str, request: bytes, timeout_s: float) -> Answer:
        """Answers one call. ``timeout_s`` is what is left of the caller's deadline, in seconds.

        Raises (here or from the awaitable):
            Malformed: the request is not one, or a field of it is wrong.
            NotReady: nothing was synced yet.
            KeyError: no such method.
        """
        return self._methods[method](request, timeout_s)

    def register(self, methods: Mapping[str, Callable[[bytes, float], Answer]]) -> None:
        """Adds methods that another service answers."""
        self._methods.update(methods)

    def register_streams(self, streams: Mapping[str, Callable[[bytes], AsyncIterator[bytes]]]) -> None:
        """Adds methods that another service answers with a stream."""
        self._streams.update(streams)

    def stream(self, method: str, request: bytes) -> AsyncIterator[bytes]:
        """Answers one call with a stream. Raises as ``handle``, here or from the stream."""
        return self._streams[method](request)

    def check(self, data: bytes, timeout_s: float) -> Answer:
        """One check."""
        started_ns = time.perf_counter_ns()
        self.require_ready()
        try:
            inquiry = parse_check(pb.CheckRequest.FromString(data))
        except (InvalidInquiry, DecodeError) as error:
            raise Malformed(str(error)) from error
        question = Question(inquiry, data, key_of(inquiry))
        answer = self._earlier(question)
        if answer is not None:
            self._tally.idempotent_repeats += 1
            return self._gate.check(answer, inquiry.action, timeout_s)
        outcome = self.decide(inquiry, patient=True)
        if isinstance(outcome, Decision):
            answer = self._conclude([(question, outcome)], started_ns)[0]
        else:
            answer = self._later(question, outcome, started_ns, timeout_s)
        return self._gate.check(answer, inquiry.action, timeout_s)

    def check_batch(self, data: bytes, timeout_s: float) -> Answer:
        """Many checks, each its own decision. All are verified before the first is decided."""
        started_ns = time.perf_counter_ns()
        self.require_ready()
        try:
            request = pb.CheckBatchRequest.FromString(data)
        except DecodeError as error:
            raise Malformed(str(error)) from error
        if not 1 <= len(request.checks) <= BATCH_CHECKS_MAX:
            raise Malformed(f"checks: {len(request.checks)} were sent; send 1 to {BATCH_CHECKS_MAX}")
        questions: list[Question] = []
        by_key: dict[Key, Question] = {}
        for position, check in enumerate(request.checks):
            try:
                inquiry = parse_check(check)
                self._verify(inquiry)
            except InvalidInquiry as error:
                raise Malformed(f"checks[{position}].{error}") from error
            key = key_of(inquiry)
            question = Question(inquiry, check.SerializeToString() if key else b"", key)
            if key is not None:
                self._earlier(question)  # refuses a key that was used for another request
                same_key = by_key.setdefault(key, question)
                if same_key is not question and not _same_request(same_key.data, question.data):
                    raise Malformed(f"checks[{position}].{KEY_REUSED}")
            questions.append(question)
        stop_on = _STOP_ON.get(request.semantics)
        responses: list[bytes] = []
        position, waiting = self._advance(questions, 0, responses, stop_on, started_ns)
        if waiting is None:
            held = self._gate.batch(responses, [one.inquiry.action for one in questions[: len(responses)]], timeout_s)
            return _join(responses) if held is None else _joined_later(held)
        return self._check_rest(questions, position, waiting, responses, stop_on, timeout_s)

    # Deciding

    def decide(self, inquiry: Inquiry, *, patient: bool, take: Take = LeaseBook.spend) -> Decision | Wait:
        """Decides, and takes the units of an approval: whoever gets a decision must conclude it before any await.

        Raises:
            Malformed: the inquiry does not fit the action it names.
        """
        boot_ms = self._clock.boot_ms()
        try:
            outcome = self._engine.decide(inquiry, now_us=self._clock.now_us(), boot_ms=boot_ms, patient=patient)
        except InvalidInquiry as error:
            raise Malformed(str(error)) from error
        if isinstance(outcome, Decision) and not inquiry.peek:
            if outcome.effect is _APPROVED:
                if outcome.degraded:
                    self._leasing.overdraw(inquiry.tenant, outcome.spends)
                for lease, units in outcome.spends:
                    if units and take(lease, units, boot_ms):
                        self._leasing.refill_soon(inquiry.tenant)
                for share, units in outcome.rates:
                    share.take(units, boot_ms)
            if outcome.counted:
                # What is reserved is counted when it is used.
                outcome.counted = self.count(inquiry.tenant, outcome.counted) if take is LeaseBook.spend else ()
        return outcome

    def count(self, tenant: str, counted: Sequence[tuple[Lease, int]]) -> Sequence[tuple[Lease, int]]:
        """Takes units whether or not a lease covers them; what of it events record."""
        boot_ms = self._clock.boot_ms()
        spends: list[tuple[Lease, int]] = []
        for lease, units in counted:
            if not isinstance(lease, RateShare):
                spends.append((lease, units))
            elif not lease.take_what_is_there(units, boot_ms):
                self._leasing.ask_for(tenant, lease, units)
        if not all(LeaseBook.can_spend(lease, units, boot_ms) for lease, units in spends):
            self._leasing.overdraw(tenant, spends)
        for lease, units in spends:
            if LeaseBook.spend(lease, units, boot_ms):
                self._leasing.refill_soon(tenant)
        return spends

    def _later(self, question: Question, wait: Wait, started_ns: int, timeout_s: float) -> Awaitable[bytes]:
        later = self._check_later(question, wait, started_ns, timeout_s)
        return later if question.key is None else self._recent.join(question.key, question.data, later)

    async def _check_later(self, question: Question, wait: Wait, started_ns: int, timeout_s: float) -> bytes:
        decision = await self.decide_later(question.inquiry, wait, timeout_s)
        return self._conclude([(question, decision)], started_ns)[0]

    async def decide_later(
        self, inquiry: Inquiry, wait: Wait, timeout_s: float, take: Take = LeaseBook.spend
    ) -> Decision:
        """Waits for what is missing and decides again, until decided or out of time; otherwise as ``decide``."""
        started_ms = self._clock.boot_ms()
        deadline_ms = started_ms + int(1_000 * min(WAIT_S_MAX, max(0.0, timeout_s - DEADLINE_SLACK_S)))
        self._tally.lease_waits += 1
        outcome: Decision | Wait = wait
        while not isinstance(outcome, Decision):
            left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
            patient = left_s > 0
            try:
                if patient and isinstance(outcome, LoadWait):
                    await self._sync.load(outcome.tenant, left_s)
                elif patient and isinstance(outcome, LeaseWait):
                    await self._leasing.acquire(outcome, left_s)
                elif patient and isinstance(outcome, BucketWait):
                    await asyncio.sleep(min(left_s, outcome.wait_ms / 1_000))
            except (LinkDown, TimeoutError, ValueError):  # ValueError: what is published does not verify
                patient = False
            outcome = self.decide(inquiry, patient=patient, take=take)
        self._tally.lease_wait_sum_us += 1_000 * (self._clock.boot_ms() - started_ms)
        return outcome

    def _verify(self, inquiry: Inquiry) -> None:
        """Raises ``InvalidInquiry`` when the inquiry does not fit the action it names; takes nothing."""
        assert self._engine.rulebook is not None
        bound = self._engine.rulebook.action(inquiry.action)
        if bound is not None:
            prepare(bound, inquiry)

    # Batches

    def _advance(
        self,
        questions: Sequence[Question],
        position: int,
        responses: list[bytes],
        stop_on: StopOn | None,
        started_ns: int,
    ) -> tuple[int, Wait | Awaitable[bytes] | None]:
        """Answers the questions from ``position`` on, up to one that has to wait; that one's position, and its wait.

        The wait is ``None`` when all were answered, or ``stop_on`` said to stop.
        """
        decided: list[tuple[Question, Decision]] = []
        keys: set[Key] = set()
        waiting: Wait | Awaitable[bytes] | None = None
        stopped = False
        while position < len(questions) and not stopped:
            question = questions[position]
            if question.key is not None:
                if question.key in keys and decided:
                    responses.extend(self._conclude(decided, started_ns))  # so that the repeat finds its answer
                    decided = []
                    keys.clear()
                keys.add(question.key)
            earlier_answer = self._earlier(question)
            if earlier_answer is None:
                try:
                    outcome = self.decide(question.inquiry, patient=True)
                except Malformed:
                    # A bundle that came while the batch waited reads it differently. What was decided is recorded.
                    if decided:
                        self._conclude(decided, started_ns)
                    raise
                if not isinstance(outcome, Decision):
                    waiting = outcome
                    break
                decided.append((question, outcome))
                stopped = stop_on is not None and stop_on(_APPROVED if outcome.observed else outcome.effect)
            elif isinstance(earlier_answer, bytes):
                self._tally.idempotent_repeats += 1
                if decided:
                    responses.extend(self._conclude(decided, started_ns))
                    decided = []
                responses.append(earlier_answer)
                stopped = stop_on is not None and stop_on(_effect_of(earlier_answer))
            else:
                waiting = earlier_answer
                break
            position += 1
        if decided:
            responses.extend(self._conclude(decided, started_ns))
        return position, waiting

    async def _check_rest(
        self,
        questions: Sequence[Question],
        position: int,
        waiting: Wait | Awaitable[bytes] | None,
        responses: list[bytes],
        stop_on: StopOn | None,
        timeout_s: float,
    ) -> bytes:
        """Goes on with a batch of which one question waits."""
        deadline_ms = self._clock.boot_ms() + int(1_000 * timeout_s)
        while waiting is not None:
            if isinstance(waiting, LoadWait | LeaseWait | BucketWait):
                left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
                waiting = self._later(questions[position], waiting, time.perf_counter_ns(), left_s)
            responses.append(await waiting)
            if stop_on is not None and stop_on(_effect_of(responses[-1])):
                break
            position, waiting = self._advance(questions, position + 1, responses, stop_on, time.perf_counter_ns())
        left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
        held = self._gate.batch(responses, [one.inquiry.action for one in questions[: len(responses)]], left_s)
        return _join(responses if held is None else await held)

    # Concluding

    def _conclude(self, decided: Sequence[tuple[Question, Decision]], started_ns: int) -> list[bytes]:
        """Logs decisions with one write and encodes their answers; no await since the first of them was decided."""
        log, now_us = self._log, self._clock.now_us()
        first_seq = seq = log.last_seq + 1
        records = []
        for question, decision in decided:
            if not question.inquiry.peek:
                records.append(self._record(question.inquiry, decision, seq, now_us))
                seq += 1
        trouble = ""
        position = 0
        if records:
            try:
                position = log.append(records[0] if len(records) == 1 else b"".join(records), len(records))
            except UsageLogError as error:
                trouble = str(error)
                self._tally.log_failures += 1
        responses = []
        seq = first_seq
        tally = self._tally
        took_us = (time.perf_counter_ns() - started_ns) // (1_000 * len(decided))
        for question, decision in decided:
            decision_id = ""
            if not question.inquiry.peek:
                if trouble:
                    decision = self.unlogged(question.inquiry, decision, trouble)
                else:
                    decision_id = f"{self._id_prefix}{seq:016x}"
            response = self._answers.encode(decision, decision_id)
            if decision_id:
                if question.key is not None:
                    self._recent.remember(question.key, question.data, response, seq, position)
                position += len(records[seq - first_seq])
                seq += 1
            responses.append(response)
            tally.answered(decision.effect, decision.reason, took_us)
            if decision.stale:
                tally.stale_answers += 1
        return responses

    def _record(self, inquiry: Inquiry, decision: Decision, seq: int, now_us: int) -> bytes:
        later: tuple[Any, ...] = ()
        if decision.exposures or decision.priced_as or decision.overage or decision.access_request_id:
            later = _later_fields(decision)
        return frame(
            EVENT,
            self._pack(
                (
                    seq,
                    now_us,
                    inquiry.tenant,
                    inquiry.subject_type,
                    inquiry.subject_id,
                    inquiry.on_behalf_of,
                    inquiry.action,
                    decision.effect,
                    decision.reason,
                    decision.rule,
                    self._engine.revision,
                    decision.units,
                    decision.cost_nanos,
                    decision.currency,
                    flags_of(decision),
                    inquiry.idempotency_key,
                    inquiry.resource_type,
                    inquiry.resource_id,
                    decision.context,
                    spends_of(decision),
                    decision.shadow,
                    decision.feature_costs,
                    *later,
                )
            ),
        )

    def unlogged(
        self, inquiry: Inquiry, decision: Decision, why: str, give_back: GiveBack = LeaseBook.unspend
    ) -> Decision:
        """The log does not take the event: a denial stands, an approval is the action's to decide. Takes nothing."""
        for lease, units in decision.counted:
            LeaseBook.unspend(lease, units)
        if decision.effect is not _APPROVED:
            return decision
        for lease, units in decision.spends:
            give_back(lease, units)
        rulebook = self._engine.rulebook
        bound = rulebook.action(inquiry.action) if rulebook else None
        allowed = bound is not None and bound.action.on_unavailable.mode is UnavailableMode.ALLOW
        if allowed:
            self._tally.units_unlogged += sum(decision.units.values())
        replaced = Decision(
            _APPROVED if allowed else Effect.DENIED, Reason.USAGE_LOG_FULL, f"The usage could not be recorded: {why}."
        )
        replaced.degraded = True
        replaced.stale = decision.stale
        replaced.observed = not allowed and rulebook is not None and rulebook.observe
        return replaced

    def _earlier(self, question: Question) -> Answer | None:
        if question.key is None:
            return None
        earlier = self._recent.find(question.key)
        if earlier is None:
            return None
        request, answer = earlier
        if isinstance(request, UsageEvent):
            if request.kind != usage.EventKind.CHECK or not self.is_recorded_as(request, question.inquiry):
                raise Malformed(KEY_REUSED)
        elif request != question.data and (request[:1] == RESERVE or not _same_request(request, question.data)):
            raise Malformed(KEY_REUSED)
        return answer

    def is_recorded_as(self, event: UsageEvent, inquiry: Inquiry) -> bool:
        """Whether the inquiry is the one that an event with its key records.

        Raises:
            Malformed: it does not fit its action.
        """
        assert self._engine.rulebook is not None
        try:
            return is_recorded_as(event, inquiry, self._engine.rulebook)
        except InvalidInquiry as error:
            raise Malformed(str(error)) from error

    def require_ready(self) -> None:
        """Raises ``NotReady`` while there is nothing to decide from."""
        if not self._sync.ready.is_set():
            raise NotReady(f"this sidecar has no state to decide from yet: {self._sync.problem}")


def _later_fields(decision: Decision) -> tuple[Any, ...]:
    """The fields of an event from ``kind`` on, up to the last that is not empty, as ``usage.pack_event`` has them."""
    fields: tuple[Any, ...] = (usage.EventKind.CHECK, "", (), {}, decision.overage)
    if decision.access_request_id:
        return (*fields, {}, 0, decision.priced_as, decision.exposures, decision.access_request_id)
    if decision.exposures:
        return (*fields, {}, 0, decision.priced_as, decision.exposures)
    return (*fields, {}, 0, decision.priced_as) if decision.priced_as else fields


def _same_request(one: bytes, other: bytes) -> bool:
    """Whether two encodings say the same; the order of map entries is the encoder's choice."""
    return bool(pb.CheckRequest.FromString(one) == pb.CheckRequest.FromString(other))


def _effect_of(response: bytes) -> int:
    return int(pb.CheckResponse.FromString(response).effect)


def _join(responses: Sequence[bytes]) -> bytes:
    """``CheckBatchResponse`` of encoded answers."""
    parts: list[bytes] = []
    for response in responses:
        parts += (_CHECKS_TAG, varint(len(response)), response)
    return b"".join(parts)


async def _joined_later(held: Awaitable[list[bytes]]) -> bytes:
    return _join(await held)


_STOP_ON: Final[dict[int, StopOn]] = {
    pb.BATCH_SEMANTICS_DENY_ON_FIRST_DENY: lambda effect: effect != pb.EFFECT_APPROVED,
    pb.BATCH_SEMANTICS_PERMIT_ON_FIRST_PERMIT: lambda effect: effect == pb.EFFECT_APPROVED,
}

__all__ = ["ApprovalService", "Malformed", "NotReady"]
