"""Holding a seat: the pace, and when it counts as lost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

import licet
from licet.client.errors import SidecarError
from licet.client.messages import seat_of, seat_state_of
from licet.v1 import approval_pb2 as pb

APPROVED = licet.Decision(licet.Effect.APPROVED, licet.Reason.OK)
DENIED = licet.Decision(licet.Effect.DENIED, licet.Reason.SEAT_UNAVAILABLE)


def seat(heartbeat_s: float = 60, expires_in_s: float = 120) -> licet.Seat:
    expires_at = datetime.now(UTC) + timedelta(seconds=expires_in_s)
    return licet.Seat(APPROVED, "editor:0", timedelta(seconds=heartbeat_s), expires_at)


@pytest.mark.parametrize(("heartbeat_s", "pause_s"), [(1, 0.5), (30, 15), (60, 20), (3_600, 20)])
def test_renews_twice_a_heartbeat_and_at_least_every_twenty_seconds(heartbeat_s: float, pause_s: float) -> None:
    assert licet.SeatHolding(seat(heartbeat_s)).pause_s == pause_s


@pytest.mark.parametrize("state", [licet.SeatState.RECLAIMED, licet.SeatState.UNKNOWN, licet.SeatState.RELEASED])
def test_is_lost_when_a_renewal_says_so(state: licet.SeatState) -> None:
    told: list[licet.SeatState] = []
    holding = licet.SeatHolding(seat(), told.append)
    assert holding.renewed(licet.SeatRenewal(licet.SeatState.HELD))
    assert holding
    assert not holding.renewed(licet.SeatRenewal(state))
    assert not holding
    assert (holding.lost, told) == (state, [state])


def test_outlasts_failed_renewals_until_the_seat_ends() -> None:
    holding = licet.SeatHolding(seat(expires_in_s=60))
    assert holding.unanswered()
    assert holding
    holding = licet.SeatHolding(seat(expires_in_s=-1))
    assert not holding
    assert not holding.unanswered()
    assert holding.lost is licet.SeatState.UNKNOWN


def test_without_a_seat_it_is_what_was_decided() -> None:
    assert licet.SeatHolding(licet.Seat(APPROVED))
    assert not licet.SeatHolding(licet.Seat(DENIED))
    assert licet.SeatHolding(licet.Seat(DENIED)).decision is DENIED


def test_reads_what_the_sidecar_answers() -> None:
    response = pb.AcquireSeatResponse(seat_id="editor:0", seats=2, seats_taken=1)
    response.decision.effect, response.decision.reason = pb.EFFECT_APPROVED, pb.REASON_OK
    response.heartbeat.FromSeconds(60)
    response.expires_at.FromSeconds(1_790_000_000)
    read = seat_of(response)
    assert (read.seat_id, read.heartbeat, read.seats, read.taken) == ("editor:0", timedelta(seconds=60), 2, 1)
    assert read.expires_at == datetime.fromtimestamp(1_790_000_000, UTC)
    with pytest.raises(SidecarError, match="upgrade licet"):
        seat_state_of(99)
