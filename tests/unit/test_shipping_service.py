"""Shipping: what is handed over, when it is handed over again, and which acknowledgements are believed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from licet.wire.signing import Verifier
from licet.wire.usage import UsageBatch
from licet_sidecar.adapters.log_records import EVENT, frame
from licet_sidecar.adapters.usage_log import (
    RETAINED_S,
    LogHeader,
    UsageLog,
    UsageLogError,
)
from licet_sidecar.ports import PulseReport
from licet_sidecar.services import shipping
from licet_sidecar.services.shipping import RESEND_AFTER_MS, ShippingService
from licet_sidecar.services.tally import Tally
from tests.support.fake_clock import FakeClock
from tests.support.published import KEY, OTHER_KEY, Signer
from tests.support.usage import event, packed

ME = "a" * 32
LOG = f"{ME}:1"


class Rig:
    """A log, and its shipping."""

    def __init__(self, directory: Path, incarnation: int = 1) -> None:
        self.clock = FakeClock()
        self.tally = Tally()
        self.log = UsageLog(directory, bytes_max=1 << 30)
        self.log.recover(ME, incarnation - 1)
        self.log.start(LogHeader(ME, incarnation, incarnation - 1, 0, b"prefix00", 1), [])
        self.shipping = ShippingService(self.log, Verifier([KEY.public_key]), self.clock, self.tally)
        self.declared: list[tuple[int, int]] = []

    def decide(self, events: int) -> None:
        for _ in range(events):
            self.log.append(frame(EVENT, packed(event(self.log.last_seq + 1))), 1)

    async def pulse(self, *, arrives: bool = True) -> list[tuple[int, int]]:
        """What one pulse hands over: first and last of each batch."""
        batches = [UsageBatch.unpack(data) for data in await self.shipping.next_batches()]
        self.declared = [(one.first_seq, one.last_seq) for batch in batches for one in batch.lost]
        if arrives:
            self.shipping.handed_over()
        return [(batch.first_seq, batch.last_seq) for batch in batches]

    def hear(
        self, watermark: int, *, generation: int = 1, log: str = LOG, as_log: str = "", signer: Any = None
    ) -> None:
        """An acknowledgement arrives."""
        signer = signer or Signer(generation=generation)
        self.shipping.take_acks(PulseReport(None, {as_log or log: signer.ack(log, watermark)}, "run1"))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.log.close()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "BATCH_EVENTS_MAX", 10)
    monkeypatch.setattr(shipping, "IN_FLIGHT_EVENTS_MAX", 60)


async def test_everything_is_handed_over_once(rig: Rig) -> None:
    rig.decide(25)
    assert await rig.pulse() == [(1, 10), (11, 20), (21, 25)]
    assert await rig.pulse() == []
    rig.decide(1)
    assert await rig.pulse() == [(26, 26)]


async def test_only_what_is_on_disk_is_handed_over(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.decide(3)
    with monkeypatch.context() as patch:

        def failing() -> int:
            raise UsageLogError("the disk failed")

        patch.setattr(rig.log, "sync", failing)
        assert await rig.pulse() == []
    assert rig.tally.log_failures == 1
    assert await rig.pulse() == [(1, 3)]


async def test_what_did_not_arrive_is_handed_over_with_the_next_pulse(rig: Rig) -> None:
    rig.decide(3)
    assert await rig.pulse(arrives=False) == [(1, 3)]
    rig.decide(2)
    assert await rig.pulse() == [(1, 5)]


async def test_a_pulse_carries_a_bounded_number_of_batches(rig: Rig) -> None:
    rig.decide(55)
    assert len(await rig.pulse()) == shipping.BATCHES_PER_PULSE_MAX
    assert await rig.pulse() == [(41, 50), (51, 55)]


async def test_no_more_is_under_way_than_redis_shall_hold(rig: Rig) -> None:
    rig.decide(200)
    handed = [await rig.pulse() for _ in range(5)]
    assert sum(len(batches) for batches in handed) == 6
    rig.hear(30)
    assert await rig.pulse() == [(61, 70), (71, 80), (81, 90)]


async def test_an_acknowledgement_moves_the_watermark(rig: Rig) -> None:
    rig.decide(5)
    await rig.pulse()
    rig.hear(3)
    assert (rig.shipping.acked_seq, rig.shipping.unacked_events) == (3, 2)
    rig.hear(2)  # late
    assert rig.shipping.acked_seq == 3


async def test_what_is_not_acknowledged_in_time_is_handed_over_again(rig: Rig) -> None:
    rig.decide(5)
    await rig.pulse()
    rig.hear(2)
    rig.clock.advance(RESEND_AFTER_MS / 1_000)
    assert await rig.pulse() == []
    rig.clock.advance(0.001)
    assert await rig.pulse() == [(3, 5)]
    assert rig.tally.events_resent == 3


async def test_a_watermark_that_moves_puts_the_repeat_off(rig: Rig) -> None:
    rig.decide(5)
    await rig.pulse()
    rig.clock.advance(9)
    rig.hear(2)
    rig.clock.advance(9)
    assert await rig.pulse() == []


async def test_waiting_begins_when_something_is_under_way(rig: Rig) -> None:
    await rig.pulse()
    rig.clock.advance(3_600)
    rig.decide(1)
    assert await rig.pulse() == [(1, 1)]
    assert await rig.pulse() == []


@pytest.mark.parametrize(
    "forged",
    [
        {"signer": Signer(OTHER_KEY)},
        {"log": f"{ME}:2", "as_log": LOG},
        {"log": f"{'b' * 32}:1", "as_log": LOG},
    ],
    ids=["other key", "other incarnation", "other sidecar"],
)
async def test_a_forged_acknowledgement_frees_nothing_and_is_counted(rig: Rig, forged: dict[str, Any]) -> None:
    rig.decide(5)
    await rig.pulse()
    rig.hear(5, **forged)
    assert (rig.shipping.acked_seq, rig.tally.documents_rejected) == (0, 1)


@pytest.mark.parametrize("kind", ["head", "license", "bundle"])
async def test_another_document_is_no_acknowledgement(rig: Rig, kind: str) -> None:
    rig.decide(5)
    await rig.pulse()
    document = Signer().document(kind, LOG, 5, None)
    rig.shipping.take_acks(PulseReport(None, {LOG: document}, "run1"))
    assert rig.shipping.acked_seq == 0


async def test_an_acknowledgement_of_what_was_never_written_is_not_believed(rig: Rig) -> None:
    rig.decide(5)
    await rig.pulse()
    rig.hear(6)
    assert rig.shipping.acked_seq == 0


async def test_an_acknowledgement_of_a_log_nobody_has_is_nothing(rig: Rig) -> None:
    rig.decide(1)
    await rig.pulse()
    rig.hear(1, log=f"{'c' * 32}:1")
    assert rig.shipping.acked_seq == 0


async def test_a_restored_ledger_gets_again_what_it_lost(rig: Rig) -> None:
    rig.decide(30)
    await rig.pulse()
    rig.hear(30)
    rig.hear(12, generation=2)
    assert rig.shipping.acked_seq == 12
    assert await rig.pulse() == [(13, 22), (23, 30)]


async def test_a_word_of_the_ledger_before_its_restore_counts_no_more(rig: Rig) -> None:
    rig.decide(30)
    await rig.pulse()
    rig.hear(12, generation=2)
    rig.hear(30, generation=1)
    assert rig.shipping.acked_seq == 12


async def test_acknowledged_segments_go_after_their_retention(rig: Rig, tmp_path: Path) -> None:
    rig.decide(5)
    rig.log.rotate([])
    rig.decide(1)
    await rig.pulse()
    old = min(tmp_path.glob("usage-*.log"))
    os.utime(old, (0, 0))  # however long ago it was written
    rig.hear(5)
    assert old.exists()
    rig.clock.advance(RETAINED_S)
    rig.hear(5)
    assert not old.exists()


async def test_logs_of_earlier_incarnations_are_shipped_under_their_names(tmp_path: Path) -> None:
    before = Rig(tmp_path)
    before.decide(12)
    before.log.close()
    rig = Rig(tmp_path, incarnation=2)
    rig.decide(3)
    batches = [UsageBatch.unpack(data) for data in await rig.shipping.next_batches()]
    rig.shipping.handed_over()
    assert [(b.log_id, b.first_seq, b.last_seq) for b in batches] == [(LOG, 1, 10), (LOG, 11, 12), (f"{ME}:2", 1, 3)]
    assert rig.shipping.logs() == [LOG, f"{ME}:2"]
    rig.hear(12)
    assert rig.shipping.unacked_events == 3
    rig.log.close()


async def test_a_gap_that_damage_left_is_shipped_around(tmp_path: Path) -> None:
    before = Rig(tmp_path)
    before.decide(4)
    before.log.rotate([])
    before.decide(3)
    before.log.close()
    first = min(tmp_path.glob("usage-*.log"))
    data = bytearray(first.read_bytes())
    data[-len(frame(EVENT, packed(event(4)))) - 5] ^= 1  # event 3 is damaged, and does not hide 4
    first.write_bytes(bytes(data))
    rig = Rig(tmp_path, incarnation=2)
    assert await rig.pulse() == [(1, 2), (4, 7)]
    assert rig.declared == [(3, 3)]
    rig.log.close()


async def test_events_come_in_order_whatever_is_lost_on_the_way(rig: Rig) -> None:
    rig.decide(50)
    seen: list[int] = []
    for number in range(20):
        for first, last in await rig.pulse(arrives=number % 3 != 0):
            if number % 3:
                seen += range(first, last + 1)
        rig.hear(min(len(seen), 50))
    assert seen == list(range(1, 51))
