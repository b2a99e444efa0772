"""Answers already given, by (tenant, action, idempotency key), so that a repeated call takes nothing twice.

An answer is known until ten minutes after the ledger acknowledged its event: as long as it was not, as long as the log
keeps it. The latest ``ANSWERS_MAX`` are in memory as they were given. An index says where in the log the others are:
those are put together from their events, and lack what an event does not record. A call that is still being decided is
joined.

After a start the log's events are looked at newest first: at least ``KNOWN_AT_ONCE`` before the first call is answered,
the others in the background, within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Awaitable, Coroutine, Iterator
from typing import Any, Final

import msgpack

from licet.domain.flags import OFF, ON, VARIANT_KEY
from licet.domain.outcomes import Effect, Reason
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet.wire.envelope import EnvelopeError
from licet_sidecar.adapters.usage_log import Segment, UsageLog
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.tenant import prepare
from licet_sidecar.services.answer_index import AnswerIndex
from licet_sidecar.services.tally import Tally

ANSWERS_MAX: Final = 8_192
"""About 5 MB. At 2,000 calls a second the last four seconds: retries come within one."""
KNOWN_AT_ONCE: Final = 32_768
"""A tenth of a second of work at a start. At 2,000 calls a second the last 16 seconds before the crash."""
EVENTS_PER_TURN: Final = 128
"""Looked at in one turn of the loop, in about a third of a millisecond."""

_TENANT: Final = usage.UsageEvent._fields.index("tenant")
_ACTION: Final = usage.UsageEvent._fields.index("action")
_KEY: Final = usage.UsageEvent._fields.index("idempotency_key")
_KIND: Final = usage.UsageEvent._fields.index("kind")
_ANSWERED_AGAIN: Final = (usage.EventKind.CHECK, usage.EventKind.RESERVE)
"""Who asks for a seat again gets the one it has, whatever the key."""

RESERVE: Final = b"\0"
"""Begins what is kept of the request of a ``Reserve``. No encoded ``CheckRequest`` begins so: there is no field 0."""

KEY_REUSED: Final = (
    "idempotency_key: it was used for another request; use a new key for each action, and the same one only to"
    " repeat it"
)

Key = tuple[str, str, str]
Answer = bytes | Awaitable[bytes]


def key_of(inquiry: Inquiry) -> Key | None:
    """What a repeat of the call is recognized by; ``None`` when it cannot be, or takes nothing."""
    if not inquiry.idempotency_key or inquiry.peek:
        return None
    return (inquiry.tenant, inquiry.action, inquiry.idempotency_key)


class RecentAnswers:
    """Owned by one event loop."""

    def __init__(self, log: UsageLog, tally: Tally) -> None:
        self._log = log
        self._tally = tally
        self._answers: dict[Key, tuple[bytes, bytes, int]] = {}
        self._order: deque[Key] = deque()  # oldest first: deleting a dict's first key over and over is quadratic
        self._under_way: dict[Key, tuple[bytes, asyncio.Task[bytes]]] = {}
        self._index = AnswerIndex()
        self._older: Iterator[None] = iter(())

    def find(self, key: Key) -> tuple[bytes | usage.UsageEvent, Answer] | None:
        """(encoded request, its answer) when the key was used; instead of the request its event, when only the log
        knows it any more.
        """
        if self._under_way:
            under_way = self._under_way.get(key)
            if under_way is not None:
                return under_way[0], asyncio.shield(under_way[1])
        if not self._index.knows(hash(key)):
            return None
        answered = self._answers.get(key)
        return self._find_logged(key) if answered is None else answered[:2]

    def remember(self, key: Key, request: bytes, response: bytes, seq: int, position: int) -> None:
        """Keeps an answer, whose event this incarnation logged as ``seq`` at ``position``."""
        self._index.add(hash(key), position)
        if key not in self._answers:
            self._order.append(key)
        self._answers[key] = (request, response, seq)
        if len(self._order) > ANSWERS_MAX:
            del self._answers[self._order.popleft()]

    def join(self, key: Key, request: bytes, waiting: Coroutine[Any, Any, bytes]) -> Awaitable[bytes]:
        """Runs a decision that has to wait as a task that repeated calls join; a caller that leaves does not end it."""
        task = asyncio.get_running_loop().create_task(waiting, name="check")
        self._under_way[key] = (request, task)
        task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return asyncio.shield(task)

    def expire(self) -> None:
        """Forgets what was acknowledged long enough ago, or is gone from the log. To be called every second or so."""
        log = self._log
        while self._order and log.is_past(log.header, self._answers[self._order[0]][2]):
            del self._answers[self._order.popleft()]
        self._tally.idempotent_evicted += self._index.sweep([segment.ordinal for segment in log.segments])

    def recover(self) -> None:
        """Takes up what the segments of earlier incarnations tell, of whatever id: who repeats a call does not know of
        ids. ``recover_older`` does the rest.
        """
        segments = list(reversed(self._log.segments))
        events = at_once = 0
        while at_once < len(segments) and events < KNOWN_AT_ONCE:
            segment = segments[at_once]
            events += segment.last_seq - segment.header.first_seq + 1
            at_once += 1
        for _ in self._index_all(segments[:at_once]):
            pass
        self._older = self._index_all(segments[at_once:])

    async def recover_older(self) -> None:
        """The rest of ``recover``, in the background."""
        for _ in self._older:
            for _ in itertools.islice(self._older, EVENTS_PER_TURN):
                pass
            await asyncio.sleep(0)

    # Inside

    def _find_logged(self, key: Key) -> tuple[usage.UsageEvent, bytes] | None:
        for position in self._index.positions(hash(key)):
            found = self._log.event_at(position)
            if found is None:
                continue
            header, data = found
            event = usage.unpack_event(data)
            if (event.tenant, event.action, event.idempotency_key) == key:
                if self._log.is_past(header, event.seq):
                    return None
                return event, _answer_in_full(header.decision_prefix, event)
        return None

    def _index_all(self, segments: list[Segment]) -> Iterator[None]:
        """Notes the keyed events of segments, given newest first; in small steps."""
        for segment in segments:
            entries = bytearray()
            with contextlib.suppress(OSError):  # it was acknowledged and deleted meanwhile
                for event, position in self._log.positions(segment):
                    key = _key_in(event)
                    if key is not None:
                        entries += AnswerIndex.packed(hash(key), position)
                    yield
            yield from self._index.add_older(bytes(entries))


def answer_of(prefix: bytes, event: usage.UsageEvent) -> pb.CheckResponse:
    """The answer that an event was recorded with; without message, quotas, ``retry_after`` and variants' values."""
    observed = event.flags & usage.FLAG_OBSERVED
    response = pb.CheckResponse(
        decision_id=usage.decision_id(prefix, event.seq),
        effect=pb.Effect.ValueType(Effect.APPROVED if observed else event.effect),
        reason=pb.Reason.ValueType(Reason(event.reason)),
        rule=event.rule,
        revision=event.revision,
        stale=bool(event.flags & usage.FLAG_STALE),
        degraded=bool(event.flags & usage.FLAG_DEGRADED),
        access_request_id=event.access_request_id,
    )
    response.as_of.seconds = event.at_us // 1_000_000
    if event.cost_nanos:
        response.cost.amount_nanos = event.cost_nanos
        response.cost.currency = event.currency
    if observed:
        response.metadata["observed_effect"] = Effect(event.effect).name
    for flag, served in event.exposures.items():
        if served not in (ON, OFF):
            response.metadata[f"{VARIANT_KEY}{flag}"] = served
    return response


def _answer_in_full(prefix: bytes, event: usage.UsageEvent) -> bytes:
    decision = answer_of(prefix, event)
    if event.kind != usage.EventKind.RESERVE:
        return bytes(decision.SerializeToString())
    reserved = pb.ReserveResponse(decision=decision)
    if event.expires_us:
        reserved.reservation_id = decision.decision_id
        reserved.expires_at.FromMicroseconds(event.expires_us)
    return bytes(reserved.SerializeToString())


def is_recorded_as(event: usage.UsageEvent, inquiry: Inquiry, rulebook: Rulebook) -> bool:
    """Whether an inquiry with the event's key is the one that the event records, as far as it does.

    Units and declared attributes are compared only under the bundle they were read by: another one may read them
    otherwise, and a repeated call must not be refused for that.

    Raises:
        InvalidInquiry: the inquiry does not fit its action, so it is not.
    """
    if (
        event.subject_type != inquiry.subject_type
        or event.subject_id != inquiry.subject_id
        or event.on_behalf_of != inquiry.on_behalf_of
        or event.resource_type != inquiry.resource_type
        or event.resource_id != inquiry.resource_id
    ):
        return False
    bound = rulebook.action(inquiry.action)
    units = event.units_held if event.kind == usage.EventKind.RESERVE else event.units
    if not units or bound is None or rulebook.revision > event.revision:
        return True  # without units, it was denied before they were read
    prepare(bound, inquiry)
    # Packed, because what is no number does not equal itself.
    return units == inquiry.units and _packed(event.context) == _packed(dict(bound.recorded(inquiry.declared)))


def _packed(context: dict[str, Any]) -> bytes:
    return bytes(msgpack.packb(context))


def _key_in(event: bytes) -> Key | None:
    """What a repeat of the call is recognized by; only these fields are looked at, as there may be millions."""
    try:
        fields = msgpack.unpackb(event, raw=False, strict_map_key=False)
        key = fields[_KEY]
        if len(fields) > _KIND and fields[_KIND] not in _ANSWERED_AGAIN:
            return None
        return (fields[_TENANT], fields[_ACTION], key) if key else None
    except (ValueError, TypeError, LookupError, EnvelopeError):
        return None
