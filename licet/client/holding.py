"""Holding a seat for as long as a block runs: how often to renew it, and when it counts as lost.

The pace and the verdict are here, without I/O; ``blocking`` and ``aio`` renew on a thread and in a task.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from licet.client.model import Decision, Seat, SeatRenewal, SeatState

RENEW_S_MAX: Final = 20.0
"""However long the heartbeat: a holder whose sidecar restarts or dies should be heard of within the minute in which its
seat is kept for it."""

OnLost = Callable[[SeatState], None]


class SeatHolding:
    """A seat that is being held. True while it is.

    ``seat`` is what was answered; ``lost`` the state it was lost in, ``None`` while it is not.
    """

    def __init__(self, seat: Seat, on_lost: OnLost | None = None) -> None:
        self.seat = seat
        self.lost: SeatState | None = None
        self._on_lost = on_lost
        self._ends_s = _in_s(seat.expires_at)

    @property
    def decision(self) -> Decision:
        """The decision: why there is no seat, if there is none."""
        return self.seat.decision

    @property
    def held(self) -> bool:
        """Whether the action may go on: approved, and the seat, if there is one, was not lost."""
        return bool(self.seat) and self.lost is None and (not self.seat.seat_id or time.monotonic() < self._ends_s)

    def __bool__(self) -> bool:
        return self.held

    @property
    def pause_s(self) -> float:
        """Seconds until the next renewal is due."""
        heartbeat = self.seat.heartbeat
        return min(RENEW_S_MAX, heartbeat.total_seconds() / 2 if heartbeat else RENEW_S_MAX)

    def renewed(self, renewal: SeatRenewal) -> bool:
        """Takes in an answer. Whether to go on renewing."""
        if renewal.state is SeatState.HELD:
            self._ends_s = _in_s(renewal.expires_at)
            return True
        self._lose(renewal.state)
        return False

    def unanswered(self) -> bool:
        """A renewal failed. Whether to go on renewing: until the seat has ended by itself."""
        if time.monotonic() < self._ends_s:
            return True
        self._lose(SeatState.UNKNOWN)
        return False

    def _lose(self, state: SeatState) -> None:
        self.lost = state
        if self._on_lost is not None:
            self._on_lost(state)


def _in_s(at: datetime | None) -> float:
    """A time of this machine's clock, which is the sidecar's, as one that does not step."""
    return time.monotonic() + (at - datetime.now(UTC)).total_seconds() if at else float("inf")
