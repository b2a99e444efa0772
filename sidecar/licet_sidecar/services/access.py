"""``RequestAccess``, ``GetAccessRequest`` and ``WatchAccessRequest``: asking people, and hearing what they said.

A request is made by an event in the log, as every decision is: nothing is sent from here, and what Redis or the control
plane are doing meanwhile does not matter. What people decided comes back with the tenant's license document. A watch
looks at what is in force whenever that changes, and each second at whether it is still known to be current.
Owned by one event loop.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Final

from google.protobuf.message import DecodeError

from licet.domain.approvals import TEXT_CHARS_MAX, RequestEntry, RequestState
from licet.domain.outcomes import Effect
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet_sidecar.adapters.log_records import EVENT, frame
from licet_sidecar.adapters.usage_log import UsageLog, UsageLogError
from licet_sidecar.clock import Clock
from licet_sidecar.core.access_requests import NO_REQUESTS, key_for
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry, InvalidInquiry
from licet_sidecar.ports import LinkDown
from licet_sidecar.services.answers import Answers
from licet_sidecar.services.approval import Answer, ApprovalService
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.refusals import Malformed, NotReady
from licet_sidecar.services.requests import parse_check, verify_tenant
from licet_sidecar.services.reservation_records import event_of
from licet_sidecar.services.syncing import SyncService

WATCHES_MAX: Final = 1_000
"""At the same time: each is an open call, and looked at each second."""
WATCH_TICK_S: Final = 1.0
LOAD_S_MAX: Final = 2.0
UNKNOWN_S_MAX: Final = 5.0
"""How long a watch waits for a request that another sidecar was asked for a moment ago."""

_ID: Final = re.compile(r"[0-9a-f]{32}")
_STATES: Final = {
    RequestState.PENDING: pb.ACCESS_REQUEST_STATE_PENDING,
    RequestState.APPROVED: pb.ACCESS_REQUEST_STATE_APPROVED,
    RequestState.DENIED: pb.ACCESS_REQUEST_STATE_DENIED,
    RequestState.EXPIRED: pb.ACCESS_REQUEST_STATE_EXPIRED,
    RequestState.REVOKED: pb.ACCESS_REQUEST_STATE_REVOKED,
}


class AccessService:
    """Access requests, without the transport."""

    def __init__(
        self,
        approval: ApprovalService,
        engine: Engine,
        log: UsageLog,
        clock: Clock,
        link: LinkState,
        sync: SyncService,
    ) -> None:
        self._approval = approval
        self._engine = engine
        self._log = log
        self._clock = clock
        self._link = link
        self._sync = sync
        self._answers = Answers(engine, link)
        self._watches = 0
        self._stopping = False

    def methods(self) -> dict[str, Callable[[bytes, float], Answer]]:
        """What it answers, by method of ``licet.v1.ApprovalService``."""
        return {"RequestAccess": self.request_access, "GetAccessRequest": self.get}

    def streams(self) -> dict[str, Callable[[bytes], AsyncIterator[bytes]]]:
        """What it answers with a stream, likewise."""
        return {"WatchAccessRequest": self.watch}

    def stop(self) -> None:
        """Ends the watches: the sidecar drains."""
        self._stopping = True

    def request_access(self, data: bytes, timeout_s: float) -> Answer:
        """Asks for an approval, when that is what a check lacks.

        Raises:
            Malformed: the request is, or its justification is too long.
        """
        self._approval.require_ready()
        try:
            request = pb.RequestAccessRequest.FromString(data)
            inquiry = parse_check(request.check)
        except InvalidInquiry as error:
            raise Malformed(f"check.{error}") from error
        except DecodeError as error:
            raise Malformed(str(error)) from error
        if len(request.justification) > TEXT_CHARS_MAX:
            said = f"has {len(request.justification)} characters; at most {TEXT_CHARS_MAX} are accepted"
            raise Malformed(f"justification: {said}")
        inquiry.peek = True
        return self._request_access(inquiry, request.justification, timeout_s)

    async def _request_access(self, inquiry: Inquiry, justification: str, timeout_s: float) -> bytes:
        try:
            outcome = self._approval.decide(inquiry, patient=True)
            if not isinstance(outcome, Decision):
                outcome = await self._approval.decide_later(inquiry, outcome, timeout_s)
        except Malformed as error:
            raise Malformed(f"check.{error}") from error
        response = pb.RequestAccessResponse()
        if outcome.effect is Effect.PENDING and not outcome.observed:
            self._record(inquiry, outcome, justification)
        response.decision.ParseFromString(self._answers.encode(outcome, ""))
        if outcome.access_request_id and outcome.effect is not Effect.APPROVED:
            response.request.CopyFrom(self._seen(inquiry.tenant, outcome.access_request_id))
        return response.SerializeToString()

    def _record(self, inquiry: Inquiry, decision: Decision, justification: str) -> None:
        """Puts the request in the log, under the id that a check would be answered; there may be no room for one."""
        now_us, tenant = self._clock.now_us(), self._engine.tenants.get(inquiry.tenant)
        known = tenant.requests if tenant is not None else NO_REQUESTS
        key = key_for(inquiry, decision.rule)
        asked = self._engine.requests.ask(known, inquiry.tenant, key, now_us, records=True)
        decision.access_request_id = asked.id
        if not asked.id:
            return
        seq, revision = self._log.last_seq + 1, self._engine.revision
        event = event_of(usage.EventKind.REQUEST_ACCESS, inquiry, decision, seq, at_us=now_us, revision=revision)
        event = event._replace(units={}, units_held=dict(decision.units), justification=justification)
        try:
            self._log.append(frame(EVENT, usage.pack_event(event)), 1)
        except UsageLogError as error:
            raise NotReady(f"the request could not be recorded: {error}") from error

    def get(self, data: bytes, timeout_s: float) -> Answer:
        """What became of a request.

        Raises:
            Malformed: the request is.
        """
        tenant, id_ = self._parse(data)
        if tenant in self._engine.tenants:
            return self._seen(tenant, id_).SerializeToString()
        return self._get_later(tenant, id_, timeout_s)

    async def _get_later(self, tenant: str, id_: str, timeout_s: float) -> bytes:
        await self._load(tenant, timeout_s)
        return self._seen(tenant, id_).SerializeToString()

    async def watch(self, data: bytes) -> AsyncIterator[bytes]:
        """What becomes of a request, now and at each change, up to its end.

        Raises:
            Malformed: the request is.
            NotReady: it ended, by its time, while nobody could say how; too many watch; or the sidecar drains.
        """
        tenant, id_ = self._parse(data)
        if self._watches >= WATCHES_MAX:
            raise NotReady(f"{WATCHES_MAX:,} calls watch access requests already; ask with GetAccessRequest")
        self._watches += 1
        try:
            sent: pb.AccessRequest | None = None
            patient_until_ms = self._clock.boot_ms() + int(1_000 * UNKNOWN_S_MAX)
            while True:
                await self._load(tenant, LOAD_S_MAX)
                seen = self._seen(tenant, id_)
                unknown = seen.state == pb.ACCESS_REQUEST_STATE_UNKNOWN
                waits = unknown and self._clock.boot_ms() < patient_until_ms
                if not waits and (sent is None or not _is_same(seen, sent)):
                    yield seen.SerializeToString()
                    sent = seen
                if not waits and seen.state != pb.ACCESS_REQUEST_STATE_PENDING:
                    return
                if self._stopping:
                    raise NotReady("this sidecar stops; watch again")
                left_s = (seen.expires_at.ToMicroseconds() - self._clock.now_us()) / 1e6
                if not waits and left_s <= 0:
                    raise NotReady("the request's time is over, and whether it was decided cannot be known now")
                await self._sync.changed_within(WATCH_TICK_S if waits else max(0.01, min(WATCH_TICK_S, left_s)))
        finally:
            self._watches -= 1

    def _parse(self, data: bytes) -> tuple[str, str]:
        self._approval.require_ready()
        try:
            request = pb.GetAccessRequestRequest.FromString(data)
            verify_tenant(request.tenant)
        except (InvalidInquiry, DecodeError) as error:
            raise Malformed(str(error)) from error
        if not _ID.fullmatch(request.access_request_id):
            raise Malformed("access_request_id: is not one; send the 32 hex digits that a PENDING answer carries")
        return request.tenant, request.access_request_id

    async def _load(self, tenant: str, timeout_s: float) -> None:
        if tenant not in self._engine.tenants:
            with contextlib.suppress(LinkDown, TimeoutError, ValueError):
                await self._sync.load(tenant, min(LOAD_S_MAX, timeout_s))

    def _seen(self, tenant: str, id_: str) -> pb.AccessRequest:
        engine, now_us = self._engine, self._clock.now_us()
        seen = pb.AccessRequest(id=id_, tenant=tenant, revision=engine.revision, degraded=not self._link.up)
        seen.as_of.FromMicroseconds(engine.as_of_us)
        seen.stale = engine.is_stale(now_us)
        loaded = engine.tenants.get(tenant)
        entry = loaded.requests.get(id_) if loaded is not None else None
        if entry is not None:
            _describe(seen, entry, now_us)
        elif (until_us := engine.requests.until_us(tenant, id_)) > now_us:
            seen.state = pb.ACCESS_REQUEST_STATE_PENDING
            seen.expires_at.FromMicroseconds(until_us)
        else:
            seen.state = pb.ACCESS_REQUEST_STATE_UNKNOWN
        return seen


def _describe(seen: pb.AccessRequest, entry: RequestEntry, now_us: int) -> None:
    state = entry.state_at(now_us)
    if state is RequestState.EXPIRED and (seen.stale or seen.degraded):
        state = entry.state  # somebody may have decided in time: it was not heard
    seen.state = _STATES[state]
    seen.confirmed = True
    seen.decided_by, seen.reason, seen.units = entry.by, entry.reason, entry.units
    if entry.state is RequestState.PENDING:
        seen.expires_at.FromMicroseconds(entry.until_us)
    elif entry.state is RequestState.APPROVED:
        seen.approved_at.FromMicroseconds(entry.at_us)
        seen.ends_at.FromMicroseconds(entry.until_us)


def _is_same(one: pb.AccessRequest, other: pb.AccessRequest) -> bool:
    """Whether there is nothing to tell: that it is known for longer is no news."""
    ours = pb.AccessRequest()
    ours.CopyFrom(one)
    ours.revision = other.revision
    ours.as_of.CopyFrom(other.as_of)
    return ours == other


__all__ = ["AccessService"]
