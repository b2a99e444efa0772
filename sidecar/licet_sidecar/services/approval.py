"""The service: from method and request bytes to response bytes, or, when a lease ran dry, an awaitable of them.

A plain function owned by one event loop. It knows no transport: an edge hands it bytes and a deadline and sends back
what it returns. A check that is served from a lease awaits nothing: it is decided, logged and answered in one step.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgpack
from google.protobuf.message import DecodeError

from licet.domain.catalog import UnavailableMode
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet_sidecar.adapters.usage_log import EVENT, UsageLog, UsageLogError, frame
from licet_sidecar.clock import Clock
from licet_sidecar.core.engine import Decision, Engine, LoadWait, Wait
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry, declared_context, meter_units
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.ports import LinkDown
from licet_sidecar.services.answers import Answers, varint
from licet_sidecar.services.idempotency import RecentAnswers, fingerprint
from licet_sidecar.services.leasing import LeasingService
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.requests import parse_check
from licet_sidecar.services.syncing import SyncService
from licet_sidecar.services.tally import Tally

WAIT_S_MAX: Final = 2.0
"""Longest a check waits for a license or a lease, whatever its deadline."""

DEADLINE_SLACK_S: Final = 0.02
"""Kept back from a caller's deadline, so that the answer still arrives."""

BATCH_CHECKS_MAX: Final = 1_000


class NotReady(Exception):
    """Nothing was synced yet, so nothing can be decided: gRPC ``UNAVAILABLE``."""


class Malformed(Exception):
    """The request is malformed: gRPC ``INVALID_ARGUMENT``. The message names the field."""


Answer = bytes | Awaitable[bytes]


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
    ) -> None:
        self._engine = engine
        self._log = log
        self._clock = clock
        self._link = link
        self._leasing = leasing
        self._sync = sync
        self._recent = recent
        self._tally = tally
        self._answers = Answers(engine, link)
        self._pack: Callable[[Any], bytes] = msgpack.Packer(use_bin_type=True).pack
        self._methods: dict[str, Callable[[bytes, float], Answer]] = {
            "Check": self.check,
            "CheckBatch": self.check_batch,
            "CheckStream": self.check,  # one message of the stream
        }

    def handle(self, method: str, request: bytes, timeout_s: float) -> Answer:
        """Answers one call. ``timeout_s`` is what is left of the caller's deadline, in seconds.

        Raises (here or from the awaitable):
            Malformed: the request is not one, or a field of it is wrong.
            NotReady: nothing was synced yet.
            KeyError: no such method.
        """
        return self._methods[method](request, timeout_s)

    def check(self, data: bytes, timeout_s: float) -> Answer:
        """One check."""
        started_ns = time.perf_counter_ns()
        self._require_ready()
        try:
            request = pb.CheckRequest.FromString(data)
            inquiry = parse_check(request)
        except (InvalidInquiry, DecodeError) as error:
            raise Malformed(str(error)) from error
        return self._check(inquiry, started_ns, timeout_s)

    def check_batch(self, data: bytes, timeout_s: float) -> Answer:
        """Many checks, each its own decision. All are verified before the first is decided."""
        started_ns = time.perf_counter_ns()
        self._require_ready()
        try:
            request = pb.CheckBatchRequest.FromString(data)
        except DecodeError as error:
            raise Malformed(str(error)) from error
        if not 1 <= len(request.checks) <= BATCH_CHECKS_MAX:
            raise Malformed(f"checks: {len(request.checks)} were sent; send 1 to {BATCH_CHECKS_MAX}")
        inquiries = []
        for position, check in enumerate(request.checks):
            try:
                inquiry = parse_check(check)
                self._verify(inquiry)
            except InvalidInquiry as error:
                raise Malformed(f"checks[{position}].{error}") from error
            inquiries.append(inquiry)
        stop_on = _STOP_ON.get(request.semantics)
        return self._check_all(inquiries, stop_on, started_ns, timeout_s)

    # One check

    def _check(self, inquiry: Inquiry, started_ns: int, timeout_s: float) -> Answer:
        key: tuple[str, str, str] | None = None
        print_ = 0
        if inquiry.idempotency_key and not inquiry.peek:
            key = (inquiry.tenant, inquiry.action, inquiry.idempotency_key)
            print_ = fingerprint(inquiry)
            earlier = self._earlier(key, print_)
            if earlier is not None:
                return earlier
        outcome = self._decide(inquiry, patient=True)
        if type(outcome) is Decision:
            response = self._conclude(inquiry, outcome, started_ns)
            if key is not None:
                self._recent.remember(key, print_, response, self._clock.boot_ms())
            return response
        waiting = self._check_later(inquiry, outcome, started_ns, timeout_s)
        return waiting if key is None else self._recent.join(key, print_, waiting, self._clock)

    async def _check_later(self, inquiry: Inquiry, wait: Wait | Decision, started_ns: int, timeout_s: float) -> bytes:
        decision = await self._resolve(inquiry, wait, timeout_s)
        return self._conclude(inquiry, decision, started_ns)

    async def _resolve(self, inquiry: Inquiry, wait: Wait | Decision, timeout_s: float) -> Decision:
        """Waits for what is missing and decides again, until decided or out of time."""
        started_ms = self._clock.boot_ms()
        deadline_ms = started_ms + int(1_000 * min(WAIT_S_MAX, max(0.0, timeout_s - DEADLINE_SLACK_S)))
        self._tally.lease_waits += 1
        while type(wait) is not Decision:
            left_s = (deadline_ms - self._clock.boot_ms()) / 1_000
            try:
                if left_s <= 0:
                    raise TimeoutError
                if type(wait) is LoadWait:
                    await self._sync.load(wait.tenant, left_s)
                else:
                    await self._leasing.acquire(wait, left_s)  # type: ignore[arg-type]  # the other of the two waits
                patient = True
            except (LinkDown, TimeoutError):
                patient = False
            except ValueError:  # what was published does not verify: as good as not there
                patient = False
            wait = self._decide(inquiry, patient=patient)
        self._tally.lease_wait_sum_us += 1_000 * (self._clock.boot_ms() - started_ms)
        return wait

    def _decide(self, inquiry: Inquiry, *, patient: bool) -> Decision | Wait:
        try:
            return self._engine.decide(
                inquiry, now_us=self._clock.now_us(), boot_ms=self._clock.boot_ms(), patient=patient
            )
        except InvalidInquiry as error:
            raise Malformed(str(error)) from error

    def _verify(self, inquiry: Inquiry) -> None:
        """Raises ``InvalidInquiry`` when the inquiry does not fit the action it names; takes nothing."""
        assert self._engine.rulebook is not None
        bound = self._engine.rulebook.action(inquiry.action)
        if bound is not None:
            meter_units(bound.action, bound.only_meter, inquiry)
            declared_context(bound.action, inquiry)

    def _conclude(self, inquiry: Inquiry, decision: Decision, started_ns: int) -> bytes:
        """Logs, takes the units, encodes the answer: one step, without an await."""
        if inquiry.peek:
            response = self._answers.encode(decision, "")
            self._count(decision, started_ns)
            return response
        seq = self._log.last_seq + 1
        record = self._record(inquiry, decision, seq)
        try:
            self._log.append(record, 1)
        except UsageLogError as error:
            return self._unlogged(inquiry, decision, str(error), started_ns)
        self._take(inquiry, decision)
        response = self._answers.encode(decision, usage.decision_id(self._log.header.decision_prefix, seq))
        self._count(decision, started_ns)
        return response

    def _take(self, inquiry: Inquiry, decision: Decision) -> None:
        if decision.effect is Effect.APPROVED and decision.spends:
            boot_ms = self._clock.boot_ms()
            for lease, units in decision.spends:
                if units and LeaseBook.spend(lease, units, boot_ms):
                    self._leasing.refill_soon(inquiry.tenant)

    def _record(self, inquiry: Inquiry, decision: Decision, seq: int) -> bytes:
        flags = (
            (usage.FLAG_STALE if decision.stale else 0)
            | (usage.FLAG_DEGRADED if decision.degraded else 0)
            | (usage.FLAG_OBSERVED if decision.observed else 0)
        )
        approved = decision.effect is Effect.APPROVED
        return frame(
            EVENT,
            self._pack(
                (
                    seq,
                    self._clock.now_us(),
                    inquiry.tenant,
                    inquiry.subject_type,
                    inquiry.subject_id,
                    inquiry.on_behalf_of,
                    inquiry.action,
                    int(decision.effect),
                    int(decision.reason),
                    decision.rule,
                    self._engine.revision,
                    decision.units,
                    decision.cost_nanos,
                    decision.currency,
                    flags,
                    inquiry.idempotency_key,
                    inquiry.resource_type,
                    inquiry.resource_id,
                    decision.context,
                    [(lease.quota, units) for lease, units in decision.spends if units] if approved else [],
                    decision.shadow,
                )
            ),
        )

    def _unlogged(self, inquiry: Inquiry, decision: Decision, why: str, started_ns: int) -> bytes:
        """The log does not take the event: a denial stands, an approval is the action's to decide. Takes nothing."""
        self._tally.log_failures += 1
        if decision.effect is Effect.APPROVED:
            rulebook = self._engine.rulebook
            bound = rulebook.action(inquiry.action) if rulebook else None
            allowed = bound is not None and bound.action.on_unavailable.mode is UnavailableMode.ALLOW
            self._tally.units_unlogged += sum(decision.units.values()) if allowed else 0
            effect = Effect.APPROVED if allowed else Effect.DENIED
            decision = Decision(effect, Reason.USAGE_LOG_FULL, f"The usage could not be recorded: {why}.")
            decision.degraded = True
        response = self._answers.encode(decision, "")
        self._count(decision, started_ns)
        return response

    def _count(self, decision: Decision, started_ns: int) -> None:
        if decision.stale:
            self._tally.stale_answers += 1
        self._tally.answered(decision.effect, decision.reason, (time.perf_counter_ns() - started_ns) // 1_000)

    # Batches

    def _check_all(
        self, inquiries: Sequence[Inquiry], stop_on: Callable[[int], bool] | None, started_ns: int, timeout_s: float
    ) -> Answer:
        responses: list[bytes] = []
        for position, inquiry in enumerate(inquiries):
            answer = self._check(inquiry, started_ns, timeout_s)
            if not isinstance(answer, bytes):
                return self._check_rest(inquiries, position, answer, responses, stop_on, timeout_s)
            responses.append(answer)
            if stop_on is not None and stop_on(_effect_of(answer)):
                break
            started_ns = time.perf_counter_ns()
        return _join(responses)

    async def _check_rest(
        self,
        inquiries: Sequence[Inquiry],
        position: int,
        pending: Awaitable[bytes],
        responses: list[bytes],
        stop_on: Callable[[int], bool] | None,
        timeout_s: float,
    ) -> bytes:
        deadline_ms = self._clock.boot_ms() + int(1_000 * timeout_s)
        responses.append(await pending)
        for inquiry in inquiries[position + 1 :]:
            if stop_on is not None and stop_on(_effect_of(responses[-1])):
                break
            left_s = max(0.0, (deadline_ms - self._clock.boot_ms()) / 1_000)
            answer = self._check(inquiry, time.perf_counter_ns(), left_s)
            responses.append(answer if isinstance(answer, bytes) else await answer)
        return _join(responses)

    def _earlier(self, key: tuple[str, str, str], print_: int) -> Answer | None:
        earlier = self._recent.find(key)
        if earlier is None:
            return None
        known, answer = earlier
        if known not in (print_, 0):
            raise Malformed(
                "idempotency_key: it was used for another request; use a new key for each action, and the same one"
                " only to repeat it"
            )
        self._tally.idempotent_repeats += 1
        return answer

    def _require_ready(self) -> None:
        if not self._sync.ready.is_set():
            raise NotReady(f"this sidecar has no state to decide from yet: {self._sync.problem}")


def _effect_of(response: bytes) -> int:
    return int(pb.CheckResponse.FromString(response).effect)


def _join(responses: Sequence[bytes]) -> bytes:
    """``CheckBatchResponse`` of encoded answers: field 1, length-delimited, repeated."""
    parts: list[bytes] = []
    for response in responses:
        parts += (b"\x0a", varint(len(response)), response)
    return b"".join(parts)


_STOP_ON: Final[dict[int, Callable[[int], bool]]] = {
    pb.DENY_ON_FIRST_DENY: lambda effect: effect != pb.EFFECT_APPROVED,
    pb.PERMIT_ON_FIRST_PERMIT: lambda effect: effect == pb.EFFECT_APPROVED,
}
