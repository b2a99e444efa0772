"""Reservations as the log keeps them: their records and events, and what is taken up of them after a restart."""

from __future__ import annotations

from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet.wire.usage import EventKind
from licet_sidecar.adapters.usage_log import Recovered, reservation_record
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.lease import Lease
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.reservations import Outcome, ReservationBook, ReservationState, from_wire, orphaned, to_wire
from licet_sidecar.services.events import flags_of, spends_of
from licet_sidecar.services.idempotency import answer_of


def records_of(book: ReservationBook) -> list[bytes]:
    """Records of every open reservation."""
    return [reservation_record(to_wire(reservation)) for reservation in book.all()]


def recover(book: ReservationBook, recovered: Recovered, leases: LeaseBook, now_us: int, boot_ms: int) -> None:
    """Takes up what an earlier process left: open reservations, once its leases are in ``leases``, and outcomes.

    Also those of an id that is used no more: nobody else knows of them, and they are to be committed, or to expire.
    """

    def lease_of(tenant: str, quota: str) -> Lease | None:
        held = leases.tenants.get(tenant)
        return held.others.get(quota) if held else None

    orphans = [orphaned(wire, doubted=id_ in recovered.doubted) for id_, wire in recovered.orphans.items()]
    for wire in [*recovered.reservations.values(), *orphans]:
        reservation = from_wire(wire, lease_of, boot_ms)
        reservation.size = len(reservation_record(wire))
        book.add(reservation)
    for prefix, data in recovered.settled:
        event = usage.unpack_event(data)
        settled_ms = boot_ms - max(0, now_us - event.at_us) // 1_000
        answer = b""
        if event.kind == EventKind.COMMIT:
            state = ReservationState.COMMITTED
            observed = bool(event.flags & usage.FLAG_OBSERVED)
            committed = dict(event.units)
            if observed:
                for feature, units in event.unfunded.items():
                    committed[feature] = committed.get(feature, 0) + units
            answer = pb.CommitReservationResponse(
                state=pb.RESERVATION_STATE_COMMITTED,
                decision=answer_of(prefix, event),
                committed=committed,
                unfunded={} if observed else event.unfunded,
            ).SerializeToString()
        else:
            state = ReservationState.CANCELED if event.kind == EventKind.CANCEL else ReservationState.EXPIRED
        book.remember(event.about, Outcome(event.tenant, state, answer, settled_ms, event.action))


def event_of(
    kind: EventKind, inquiry: Inquiry, decision: Decision, seq: int, *, at_us: int, revision: int
) -> usage.UsageEvent:
    """The event of a decision about a reservation. It carries no idempotency key: of the two events of a reservation
    only the first is a call that is repeated by key.
    """
    return usage.UsageEvent(
        seq=seq,
        at_us=at_us,
        tenant=inquiry.tenant,
        subject_type=inquiry.subject_type,
        subject_id=inquiry.subject_id,
        on_behalf_of=inquiry.on_behalf_of,
        action=inquiry.action,
        effect=int(decision.effect),
        reason=int(decision.reason),
        rule=decision.rule,
        revision=revision,
        units=dict(decision.units),
        cost_nanos=decision.cost_nanos,
        currency=decision.currency,
        flags=flags_of(decision),
        idempotency_key="",
        resource_type=inquiry.resource_type,
        resource_id=inquiry.resource_id,
        context=dict(decision.context),
        spends=spends_of(decision),
        shadow=list(decision.shadow),
        feature_costs=decision.feature_costs,
        kind=kind,
        priced_as=decision.priced_as,
        exposures=decision.exposures,
        access_request_id=decision.access_request_id,
    )
