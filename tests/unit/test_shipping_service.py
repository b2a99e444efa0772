"""Shipping: what is handed over, when it is handed over again, and which acknowledgements are believed."""

from __future__ import annotations

import asyncio
import contextlib
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
from licet_sidecar.ports import LinkFull, PulseReport
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


# What is lost, what is not, and a ledger that was restored


def hear_lost(rig: Rig, watermark: int, lost: list[list[int]], *, generation: int = 1) -> None:
    document = Signer(generation=generation).document("ack", LOG, watermark, {"lost": lost})
    rig.shipping.take_acks(PulseReport(None, {LOG: document}, "run1"))


async def test_what_the_ledger_was_told_is_lost_and_is_not_is_kept_and_sent(rig: Rig) -> None:
    rig.decide(10)
    hear_lost(rig, 0, [])
    await rig.pulse()
    hear_lost(rig, 10, [[4, 6]])  # somebody declared it, who can write the stream
    assert (rig.shipping.acked_seq, rig.tally.acks_contested) == (3, 1)
    rig.clock.advance(RESEND_AFTER_MS / 1_000 + 0.001)
    assert await rig.pulse() == [(4, 10)]
    hear_lost(rig, 10, [])
    assert rig.shipping.acked_seq == 10


async def test_what_was_never_written_may_be_declared_lost_and_stops_nothing(rig: Rig) -> None:
    rig.decide(5)
    await rig.pulse()
    hear_lost(rig, 10**15, [[1, 3], [4, 10**15]])
    assert rig.shipping.acked_seq == 0
    hear_lost(rig, 10**15, [[6, 8], [9, 10**15]])
    assert rig.shipping.acked_seq == 5
    rig.decide(1)
    assert await rig.pulse() == [(6, 6)]
    hear_lost(rig, 10**15, [[6, 10**15]])
    assert rig.shipping.acked_seq == 5
    hear_lost(rig, 10**15, [[8, 10**15]])  # and not 7, which was never written
    assert rig.shipping.acked_seq == 5


async def test_a_head_of_a_restored_ledger_has_everything_sent_again(rig: Rig) -> None:
    rig.decide(5)
    await rig.pulse()
    rig.hear(5)
    rig.shipping.ledger_began(1)
    assert await rig.pulse() == []
    rig.shipping.ledger_began(2)
    rig.hear(5)  # the word of before
    assert await rig.pulse() == [(1, 5)]
    rig.hear(5, generation=2)
    assert rig.shipping.unacked_events == 0


async def test_what_is_lost_indeed_is_acknowledged(tmp_path: Path) -> None:
    before = Rig(tmp_path)
    before.decide(3)
    before.log.close()
    (path,) = tmp_path.glob("usage-*.log")
    data = bytearray(path.read_bytes())
    data[-len(frame(EVENT, packed(event(3)))) - 5] ^= 1  # event 2
    path.write_bytes(bytes(data))
    rig = Rig(tmp_path, incarnation=2)
    assert await rig.pulse() == [(1, 1), (3, 3)]
    assert (rig.declared, rig.tally.events_declared_lost) == ([(2, 2)], 1)
    hear_lost(rig, 3, [[2, 2]])
    assert (rig.shipping.unacked_events, rig.tally.acks_contested) == (0, 0)
    rig.log.close()


async def test_a_log_that_ends_in_damage_is_declared_to_its_end(tmp_path: Path) -> None:
    before = Rig(tmp_path)
    before.decide(3)
    before.log.close()
    (path,) = tmp_path.glob("usage-*.log")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    rig = Rig(tmp_path, incarnation=2)
    assert await rig.pulse() == [(1, 2), (4, 3)]
    assert rig.declared == [(3, 3)]
    assert await rig.pulse() == []
    rig.log.close()


async def test_a_restored_ledger_is_told_what_was_deleted(rig: Rig) -> None:
    rig.decide(20)
    rig.log.rotate([])
    rig.decide(10)
    await rig.pulse()
    rig.hear(25)
    rig.clock.advance(RETAINED_S)
    rig.hear(25)  # the first segment goes
    rig.hear(12, generation=2)
    assert (await rig.pulse(), rig.declared) == ([(21, 30)], [(13, 20)])


async def test_a_restored_ledger_is_told_what_was_deleted_also_after_a_restart(tmp_path: Path) -> None:
    before = Rig(tmp_path)
    before.decide(20)
    before.log.rotate([])
    before.decide(10)
    before.log.close()
    min(tmp_path.glob("usage-*.log")).unlink()  # acknowledged, and deleted
    rig = Rig(tmp_path, incarnation=2)
    assert await rig.pulse() == [(21, 30)]
    rig.hear(12, generation=2)
    assert (await rig.pulse(), rig.declared) == ([(21, 30)], [(13, 20)])
    rig.hear(30, generation=2)
    assert rig.shipping.unacked_events == 0
    rig.log.close()


async def test_a_file_that_cannot_be_read_now_is_not_declared_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.decide(3)
    with monkeypatch.context() as patch:

        def failing(*_: Any, **__: Any) -> list[bytes]:
            raise OSError(5, "Input/output error")

        patch.setattr(rig.log, "read_events", failing)
        assert await rig.pulse() == []
        patch.setattr(rig.log, "read_events", lambda *_, **__: [])
        assert await rig.pulse() == []
    assert await rig.pulse() == [(1, 3)]


async def test_an_event_larger_than_a_batch_is_a_batch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "BATCH_BYTES_MAX", 10)
    rig.decide(2)
    assert (await rig.pulse(), rig.declared) == ([(1, 1), (2, 2)], [])


# Redis is protected


@pytest.mark.parametrize(
    ("report", "why"),
    [
        (PulseReport(None, {}, "run1", backlog_batches=1_000), "1,000 batches wait"),
        (PulseReport(None, {}, "run1", memory_share=0.85), "85% of its memory"),
    ],
    ids=["backlog", "memory"],
)
async def test_over_a_bound_of_redis_usage_stays_in_the_log(rig: Rig, report: PulseReport, why: str) -> None:
    rig.decide(3)
    rig.shipping.take_report(report)
    assert await rig.pulse() == []
    assert why in rig.shipping.held_back
    assert [UsageBatch.unpack(one).last_seq for one in await rig.shipping.next_batches(to_redis=False)] == [3]
    rig.shipping.take_report(PulseReport(None, {}, "run1", backlog_batches=999, memory_share=0.84))
    assert await rig.pulse() == [(1, 3)]
    assert rig.shipping.held_back == ""


async def test_a_full_redis_is_left_alone_for_longer_each_time(rig: Rig) -> None:
    rig.decide(1)

    async def refuse(batches: list[bytes]) -> None:
        sent.append(len(batches))
        if batches:
            raise LinkFull("OOM")

    sent: list[int] = []
    for _ in range(40):
        with contextlib.suppress(LinkFull):
            await rig.shipping.hand_over(refuse)
        rig.clock.advance(1)
    tried = [second for second, batches in enumerate(sent) if batches]
    assert tried == [0, 1, 3, 7, 15, 31]
    assert rig.tally.shipping_full == 6


async def test_one_hands_over_at_a_time(rig: Rig) -> None:
    rig.decide(25)
    seen: list[tuple[int, int]] = []

    async def send(batches: list[bytes]) -> None:
        await asyncio.sleep(0.01)
        seen.extend((one.first_seq, one.last_seq) for one in map(UsageBatch.unpack, batches))

    await asyncio.gather(*(rig.shipping.hand_over(send) for _ in range(3)))
    assert seen == [(1, 10), (11, 20), (21, 25)]
