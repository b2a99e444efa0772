"""Counts kept as plain integers on the hot path; ``services.metrics`` reads them when somebody scrapes."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from licet.domain.outcomes import Effect, Reason

LATENCY_BUCKETS_US: Final = (10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 250_000, 1_000_000)
_REASONS: Final = max(Reason) + 1


class Tally:
    """What happened since the start. Owned by the event loop; read from any thread, a moment late at worst."""

    __slots__ = (
        "acks_contested",
        "answers",
        "batches_shipped",
        "calls_refused",
        "documents_rejected",
        "durability_missed",
        "durability_waits",
        "events_declared_lost",
        "events_resent",
        "heads_ignored",
        "idempotent_evicted",
        "idempotent_repeats",
        "latency_counts",
        "latency_sum_us",
        "lease_wait_sum_us",
        "lease_waits",
        "license_loads",
        "log_failures",
        "recalls",
        "reservations_settled",
        "resyncs",
        "seat_calls",
        "seats_acquired",
        "seats_denied",
        "seats_held",
        "seats_reclaimed",
        "seats_released",
        "second_route_failures",
        "second_route_rounds",
        "settle_calls",
        "settle_failures",
        "shipping_full",
        "stale_answers",
        "units_unfunded",
        "units_unlogged",
    )

    def __init__(self) -> None:
        self.answers = [0] * ((max(Effect) + 1) * _REASONS)
        self.latency_counts = [0] * (len(LATENCY_BUCKETS_US) + 1)
        self.latency_sum_us = 0
        self.lease_waits = 0
        self.lease_wait_sum_us = 0
        self.license_loads = 0
        self.settle_calls = 0
        self.settle_failures = 0
        self.recalls = 0
        self.resyncs = 0
        self.documents_rejected = 0
        self.heads_ignored = 0
        self.batches_shipped = 0
        self.events_resent = 0
        self.events_declared_lost = 0
        self.acks_contested = 0
        self.durability_waits = 0
        self.second_route_rounds = 0
        self.second_route_failures = 0
        self.durability_missed = 0
        self.shipping_full = 0
        self.log_failures = 0
        self.units_unlogged = 0
        self.units_unfunded = 0
        self.reservations_settled: dict[str, int] = {}
        """By outcome, lower case."""
        self.idempotent_repeats = 0
        self.idempotent_evicted = 0
        self.calls_refused = 0
        self.stale_answers = 0
        self.seat_calls = 0
        self.seats_acquired = 0
        self.seats_denied = 0
        self.seats_held = 0
        self.seats_reclaimed = 0
        self.seats_released = 0

    def answered(self, effect: int, reason: int, took_us: int) -> None:
        """Counts one answer."""
        self.answers[effect * _REASONS + reason] += 1
        self.latency_counts[bisect_left(LATENCY_BUCKETS_US, took_us)] += 1
        self.latency_sum_us += took_us

    def by_effect_and_reason(self) -> list[tuple[Effect, Reason, int]]:
        """Every combination that occurred."""
        return [
            (Effect(index // _REASONS), Reason(index % _REASONS), count)
            for index, count in enumerate(self.answers)
            if count
        ]
