"""Logs and metrics of the server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import structlog
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry, generate_latest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def configure_logging(level: str) -> None:
    """Structured lines on standard error: JSON when it is not a terminal."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if terminal else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
            if terminal
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)


class Metrics:
    """Numbers that are read when Prometheus asks, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=self._registry)
        self._provider = MeterProvider([reader], shutdown_on_exit=False)
        self._meter = self._provider.get_meter("licet_control_plane")

    def gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """A number that goes up and down."""
        self._meter.create_observable_gauge(name, [_observe(read)], description=description)

    def counter(self, name: str, description: str, read: Callable[[], float]) -> None:
        """A number that only grows while the server runs."""
        self._meter.create_observable_counter(name, [_observe(read)], description=description)

    def gauges(self, name: str, label: str, description: str, read: Callable[[], Mapping[str, float]]) -> None:
        """A number for each value of ``label``."""

        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, {label: key}) for key, value in read().items()]

        self._meter.create_observable_gauge(name, [observe], description=description)

    def render(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Let the provider go."""
        self._provider.shutdown()


def _observe(read: Callable[[], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _options: [Observation(read())]
