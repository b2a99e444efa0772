"""The control plane as asked over HTTPS, in memory. ``tests/contract/test_second_route.py`` holds it to the port."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from licet.wire.documents import Snapshot
from licet.wire.usage import UsageBatch
from tests.support.fake_clock import FakeClock
from tests.support.fake_state_source import FakePublisher


class FakeSecondRoute:
    """A ``SecondRoute`` of what a ``FakePublisher`` published."""

    def __init__(self, publisher: FakePublisher, clock: FakeClock) -> None:
        self.publisher = publisher
        self.clock = clock
        self.trouble: Exception | None = None
        self.asked: list[tuple[tuple[int, int], list[str], list[str]]] = []
        self.watermarks: dict[str, int] = {}
        self.changes: dict[str, Any] = {}
        """Fields of the next snapshots to be replaced."""

    async def snapshot(self, have: tuple[int, int], known: Collection[str], wanted: Collection[str]) -> bytes:
        """See ``SecondRoute``."""
        if self.trouble is not None:
            raise self.trouble
        self.asked.append((have, sorted(known), sorted(wanted)))
        publisher, source = self.publisher, self.publisher.source
        changed = have != (publisher.signer.generation, publisher.revision)
        tenants = sorted({*known, *wanted} if changed else set(wanted))
        fields: dict[str, Any] = {
            "head": publisher.signer.head(publisher.revision, "", self.clock.us),
            "manifest": source.manifest if changed else None,
            "chunks": dict(source.chunks) if changed else {},
            "licenses": {one: source.licenses[one] for one in tenants if one in source.licenses},
            "absent": tuple(one for one in tenants if one not in source.licenses),
        }
        return Snapshot(**{**fields, **self.changes}).pack()

    async def ship(self, batches: Sequence[bytes]) -> Mapping[str, bytes]:
        """See ``SecondRoute``."""
        if self.trouble is not None:
            raise self.trouble
        acks: dict[str, bytes] = {}
        for one in map(UsageBatch.unpack, batches):
            watermark = self.watermarks.get(one.log_id, 0)
            if one.first_seq <= watermark + 1:
                self.watermarks[one.log_id] = max(watermark, one.last_seq)
            acks[one.log_id] = self.publisher.signer.ack(one.log_id, self.watermarks.get(one.log_id, 0))
        return acks
