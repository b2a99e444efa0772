"""Metrics: opentelemetry-sdk instruments that read plain counters when somebody scrapes.

Recording into instruments on the hot path would cost more than deciding; observing costs a check under 1 µs. The
latency histogram has no observable form in the SDK, so it is handed to the Prometheus registry as what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

from licet_sidecar.adapters.redis_link import round_trips
from licet_sidecar.adapters.usage_log import UsageLog
from licet_sidecar.clock import Clock
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.reservations import ReservationBook
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.shipping import ShippingService
from licet_sidecar.services.tally import LATENCY_BUCKETS_US, Tally

CONTENT_TYPE: Final = exposition.CONTENT_TYPE_LATEST


class Metrics:
    """``/metrics`` of a sidecar."""

    def __init__(
        self,
        engine: Engine,
        log: UsageLog,
        shipping: ShippingService,
        link: LinkState,
        clock: Clock,
        tally: Tally,
        reservations: ReservationBook,
    ) -> None:
        self._provider = MeterProvider(
            metric_readers=[PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False)],
            resource=Resource.get_empty(),
            shutdown_on_exit=False,
        )
        meter = self._provider.get_meter("licet.sidecar")
        self._registry: CollectorRegistry = REGISTRY

        def counter(name: str, description: str, read: Callable[[], float]) -> None:
            meter.create_observable_counter(name, [_single(read)], description=description)

        def gauge(name: str, description: str, read: Callable[[], float], unit: str = "") -> None:
            meter.create_observable_gauge(name, [_single(read)], description=description, unit=unit)

        meter.create_observable_counter(
            "licet_checks", [lambda _: _answers(tally)], description="Answers, by effect and reason."
        )
        counter("licet_check_waits", "Checks that waited for a license or a lease.", lambda: tally.lease_waits)
        counter("licet_check_wait_seconds", "Time they waited.", lambda: tally.lease_wait_sum_us / 1e6)
        counter("licet_checks_stale", "Answers marked stale.", lambda: tally.stale_answers)
        counter(
            "licet_targeting_failures",
            "Conditions of flags that could not be evaluated, which lets nobody in.",
            lambda: engine.targeting_failures,
        )
        counter("licet_settle_calls", "Calls to the quota registers.", lambda: tally.settle_calls)
        counter("licet_settle_failures", "Those that were not answered.", lambda: tally.settle_failures)
        counter("licet_redis_round_trips", "Times Redis was waited for; a pipeline is one.", lambda: round_trips.total)
        counter("licet_recalls", "Times idle units were called back from other sidecars.", lambda: tally.recalls)
        counter("licet_license_loads", "Licenses read on a tenant's first check.", lambda: tally.license_loads)
        counter("licet_resyncs", "Times the whole state was read again.", lambda: tally.resyncs)
        counter(
            "licet_documents_rejected",
            "Documents, heads and acknowledgements that were unsigned, wrongly signed, damaged or older.",
            lambda: tally.documents_rejected,
        )
        counter("licet_heads_ignored", "Heads of another server, or older ones.", lambda: tally.heads_ignored)
        counter("licet_log_failures", "Times the usage log could not take a record.", lambda: tally.log_failures)
        counter(
            "licet_units_unlogged", "Units approved although they could not be logged.", lambda: tally.units_unlogged
        )
        counter("licet_batches_shipped", "Batches of usage events handed over.", lambda: tally.batches_shipped)
        counter("licet_events_resent", "Events handed over again.", lambda: tally.events_resent)
        counter("licet_events_declared_lost", "Events declared lost.", lambda: tally.events_declared_lost)
        counter(
            "licet_acks_contested",
            "Acknowledgements of events as lost that the log still has.",
            lambda: tally.acks_contested,
        )
        gauge("licet_usage_held_back", "1 while Redis is spared more usage.", lambda: int(bool(shipping.held_back)))
        gauge("licet_usage_backlog_batches", "Batches in the usage stream.", lambda: shipping.backlog_batches)
        gauge("licet_redis_memory_ratio", "Used of what Redis may use.", lambda: shipping.memory_share)
        counter("licet_usage_full", "Times Redis was full.", lambda: tally.shipping_full)
        counter("licet_durability_waits", "Answers that waited for their event.", lambda: tally.durability_waits)
        counter("licet_durability_missed", "Those whose event was not safe in time.", lambda: tally.durability_missed)
        counter("licet_second_route_rounds", "Rounds over HTTPS.", lambda: tally.second_route_rounds)
        counter("licet_second_route_failures", "Those that failed.", lambda: tally.second_route_failures)
        counter("licet_idempotent_repeats", "Calls answered from an earlier answer.", lambda: tally.idempotent_repeats)
        counter("licet_idempotent_evicted", "Keys forgotten early for want of room.", lambda: tally.idempotent_evicted)
        gauge("licet_reservations_open", "Open reservations.", lambda: reservations.open_count)
        meter.create_observable_counter(
            "licet_reservations_settled",
            [lambda _: [Observation(n, {"outcome": outcome}) for outcome, n in tally.reservations_settled.items()]],
            description="Reservations settled, by outcome.",
        )
        counter(
            "licet_reservations_forgotten",
            "Outcomes of reservations forgotten early for want of room.",
            lambda: reservations.outcomes_evicted,
        )
        counter(
            "licet_units_unfunded",
            "Units used beyond a reservation that no limit had room for.",
            lambda: tally.units_unfunded,
        )
        gauge("licet_seats_held", "Seats this sidecar answers for.", lambda: tally.seats_held)
        counter("licet_seats_acquired", "Seats given.", lambda: tally.seats_acquired)
        counter("licet_seats_denied", "Seats denied because all were taken.", lambda: tally.seats_denied)
        counter("licet_seats_released", "Seats given back by their holders.", lambda: tally.seats_released)
        counter(
            "licet_seats_reclaimed",
            "Seats taken back from silent holders, or that could not be vouched for any more.",
            lambda: tally.seats_reclaimed,
        )
        counter("licet_seat_calls", "Calls to Redis about seats.", lambda: tally.seat_calls)
        gauge("licet_revision", "Revision in force.", lambda: engine.revision)
        gauge(
            "licet_state_age_seconds",
            "Age of the last confirmation that the state in force is current; -1 before the first.",
            lambda: max(0.0, (clock.now_us() - engine.as_of_us) / 1e6) if engine.as_of_us else -1.0,
        )
        gauge("licet_redis_up", "1 when Redis answered last.", lambda: int(link.up))
        gauge("licet_tenants_loaded", "Licenses in memory.", lambda: len(engine.tenants))
        gauge("licet_tenants_held", "Tenants with leases.", lambda: len(engine.leases.tenants))
        gauge(
            "licet_log_events_unacknowledged",
            "Events the ledger has not acknowledged.",
            lambda: shipping.unacked_events,
        )
        gauge("licet_log_bytes", "Size of the usage log on disk.", lambda: log.total_bytes)
        gauge("licet_log_bytes_max", "What it may grow to.", lambda: log.bytes_max)
        gauge("licet_log_disk_free_bytes", "Room on its disk.", log.disk_free_bytes)
        gauge("licet_log_events_damaged", "Events in it that cannot be read.", lambda: log.events_damaged)
        self._latency = _Latency(tally)
        self._registry.register(self._latency)

    def page(self) -> bytes:
        """All metrics, in the Prometheus text format."""
        return exposition.generate_latest(self._registry)

    def close(self) -> None:
        """Frees the registry."""
        self._registry.unregister(self._latency)
        self._provider.shutdown()


class _Latency(Collector):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        counts = list(self._tally.latency_counts)
        buckets = []
        total = 0
        for upper_us, count in zip((*LATENCY_BUCKETS_US, None), counts, strict=True):
            total += count
            buckets.append(("+Inf" if upper_us is None else str(upper_us / 1e6), total))
        family = HistogramMetricFamily(
            "licet_check_duration_seconds", "Time from request bytes to response bytes, waits included."
        )
        family.add_metric([], buckets, self._tally.latency_sum_us / 1e6)
        yield family


def _single(read: Callable[[], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(read())]


def _answers(tally: Tally) -> list[Observation]:
    return [
        Observation(count, {"effect": effect.name, "reason": reason.name})
        for effect, reason, count in tally.by_effect_and_reason()
    ]
