"""Where usage goes, in memory. ``tests/contract/test_usage_sink.py`` holds it to the port."""

from __future__ import annotations

from collections.abc import Sequence

from licet_sidecar.ports import PulseReport


class FakeUsageSink:
    """A ``UsageSink``."""

    def __init__(self, run_id: str = "run1") -> None:
        self.run_id = run_id
        self.head: bytes | None = None
        self.acks: dict[str, bytes] = {}
        self.heartbeats: dict[str, bytes] = {}
        self.batches: list[bytes] = []
        self.trouble: Exception | None = None

    async def pulse(self, heartbeat: tuple[str, bytes], logs: Sequence[str], batches: Sequence[bytes]) -> PulseReport:
        """See ``UsageSink``."""
        if self.trouble is not None:
            raise self.trouble
        self.batches += batches
        self.heartbeats[heartbeat[0]] = heartbeat[1]
        return PulseReport(
            self.head,
            {log: self.acks[log] for log in logs if log in self.acks},
            self.run_id,
            backlog_batches=len(self.batches),
        )

    async def ship(self, batches: Sequence[bytes]) -> None:
        """See ``UsageSink``."""
        if self.trouble is not None:
            raise self.trouble
        self.batches += batches

    async def deregister(self, sidecar: str) -> None:
        """See ``UsageSink``."""
        if self.trouble is not None:
            raise self.trouble
        self.heartbeats.pop(sidecar, None)
