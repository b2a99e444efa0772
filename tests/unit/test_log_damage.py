"""Torn and damaged log files: every record that is whole is recovered, every event that is not is declared.

The oracle knows where each record lies. What was altered anywhere in a record is lost; everything else must be read,
byte for byte, and each lost event must be in a declared extent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from licet.wire.usage import event_seq
from licet_sidecar.adapters.log_records import EVENT, EVENT_BYTES_MIN, FRAME, examine, frame, records
from licet_sidecar.adapters.usage_log import GONE, LogHeader, UsageLog, floor_record
from tests.support.usage import event, packed

ME = "a" * 32


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power losses, and there are thousands of files."""
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@dataclass(frozen=True, slots=True)
class Written:
    """A file's bytes, and where each event lies in it: number to (start, end)."""

    data: bytes
    events: dict[int, tuple[int, int]]


def written(path: Path, *, first_seq: int = 1) -> Written:
    """The map of an undamaged file."""
    data = path.read_bytes()
    where = {}
    start = 0
    for kind, payload, end in records(data):
        if kind == EVENT:
            where[event_seq(payload)] = (start, end)
        start = end
    assert start == len(data)
    assert not where or min(where) == first_seq
    return Written(data, where)


def make(directory: Path, events: list[int], *, notes: bool = True) -> UsageLog:
    """A log with a segment of so many events for each number, closed; between events there are other records."""
    directory.mkdir(exist_ok=True)
    log = UsageLog(directory, bytes_max=1 << 30)
    log.start(LogHeader(ME, 1, 0, 0, b"prefix00", 1), [floor_record(1, 1)])
    for number, count in enumerate(events):
        if number:
            log.rotate([floor_record(1, 2)])
        for _ in range(count):
            log.append(frame(EVENT, packed(event(log.last_seq + 1))), 1)
            if notes and log.last_seq % 3 == 0:
                log.append(floor_record(1, log.last_seq), 0)
    log.close()
    return log


def readable(log: UsageLog, last: int) -> dict[int, bytes]:
    """All events that can be read, by number, as shipping would ask for them."""
    found: dict[int, bytes] = {}
    at = 1
    while at <= last:
        some = log.read_events(ME, 1, at, last, events_max=3, bytes_max=1 << 20)
        if not some:
            break
        found |= {event_seq(one): one for one in some}
        assert max(found) >= at
        at = max(found) + 1
    return found


def lost(log: UsageLog, last: int) -> set[int]:
    return {seq for one in log.lost(ME, 1, 1, last) for seq in range(one.first_seq, one.last_seq + 1)}


def recovered(directory: Path) -> tuple[UsageLog, bool]:
    log = UsageLog(directory, bytes_max=1 << 30)
    report = log.recover(ME, 1)
    return log, report.intact


def test_a_bit_flipped_anywhere_costs_one_event_at_most_and_is_declared(tmp_path: Path) -> None:
    make(tmp_path, [5])
    (path,) = tmp_path.glob("usage-*.log")
    before = written(path)
    for offset in range(len(before.data)):
        for bit in (offset % 8,):
            data = bytearray(before.data)
            data[offset] ^= 1 << bit
            path.write_bytes(bytes(data))
            log, intact = recovered(tmp_path)
            hit = {seq for seq, (start, end) in before.events.items() if start <= offset < end}
            found = readable(log, 5)
            assert set(found) == set(before.events) - hit, (offset, bit)
            assert all(one == packed(event(seq)) for seq, one in found.items())
            declared = {seq for one in log.segments for damage in one.damage for seq in _range(damage)}
            assert hit <= declared, (offset, bit)
            assert not (set(found) & declared), (offset, bit)
            assert not intact, (offset, bit)  # what was spent is not known for certain


def _range(damage: object) -> range:
    return range(damage.first_lost, damage.last_lost + 1)  # type: ignore[attr-defined]


_WOUNDS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
        st.tuples(st.just("zero"), st.floats(0, 1, exclude_max=True), st.integers(1, 400)),
        st.tuples(st.just("noise"), st.floats(0, 1, exclude_max=True), st.integers(1, 400)),
        st.tuples(st.just("tear"), st.floats(0, 1, exclude_max=True), st.just(0)),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=3), which=st.integers(0, 2), wounds=_WOUNDS)
def test_whatever_happens_to_a_file_whole_events_are_read_and_the_others_declared(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], which: int, wounds: list[tuple[str, float, int]]
) -> None:
    directory = tmp_path_factory.mktemp("log")
    make(directory, sizes)
    paths = sorted(directory.glob("usage-*.log"))
    firsts = [1, *(1 + sum(sizes[: number + 1]) for number in range(len(sizes) - 1))]
    maps = [written(path, first_seq=first) for path, first in zip(paths, firsts, strict=True)]
    which %= len(paths)
    data = bytearray(maps[which].data)
    for what, where, amount in wounds:
        at = int(where * len(data))
        match what:
            case "flip" if data:
                data[at] ^= amount
            case "zero":
                data[at : at + amount] = bytes(len(data[at : at + amount]))
            case "noise":
                data[at : at + amount] = os.urandom(len(data[at : at + amount]))
            case _:
                del data[at:]
    paths[which].write_bytes(bytes(data))
    total = sum(sizes)
    whole = {
        seq
        for number, one in enumerate(maps)
        for seq, (start, end) in one.events.items()
        if number != which or data[start:end] == one.data[start:end]
    }
    log, _ = recovered(directory)
    found = readable(log, total)
    if not any(segment.path == paths[which] for segment in log.segments):
        # Nothing in it could be made out: it was left as it is, for people, and what it had is not there.
        assert paths[which].read_bytes() == data
        whole -= maps[which].events.keys()
    assert set(found) == whole
    assert all(one == packed(event(seq)) for seq, one in found.items())
    # What the end of the log's last file lost may look like a record that was never finished.
    last_file = which == len(paths) - 1
    unknown = {seq for seq in maps[-1].events if seq > max(found, default=0)} if last_file else set()
    declared = lost(log, total)
    assert set(range(1, total + 1)) - whole - unknown <= declared
    assert not declared & whole


def test_both_ends_of_the_head_say_whose_log_it_is(tmp_path: Path) -> None:
    make(tmp_path, [2])
    (path,) = tmp_path.glob("usage-*.log")
    data = bytearray(path.read_bytes())
    data[:40] = bytes(40)
    path.write_bytes(bytes(data))
    log, intact = recovered(tmp_path)
    assert (sorted(readable(log, 2)), lost(log, 2), intact) == ([1, 2], set(), False)


def test_a_file_without_any_header_is_read_under_that_of_its_log(tmp_path: Path) -> None:
    make(tmp_path, [3, 2])
    first = min(tmp_path.glob("usage-*.log"))
    data = first.read_bytes()
    whole = written(first)
    first.write_bytes(bytes(whole.events[1][0]) + data[whole.events[1][0] :])
    log, _ = recovered(tmp_path)
    assert sorted(readable(log, 5)) == [1, 2, 3, 4, 5]


def test_a_file_that_is_missing_between_two_is_declared(tmp_path: Path) -> None:
    make(tmp_path, [2, 3, 2])
    sorted(tmp_path.glob("usage-*.log"))[1].unlink()
    log, intact = recovered(tmp_path)
    assert (sorted(readable(log, 7)), lost(log, 7), intact) == ([1, 2, 6, 7], {3, 4, 5}, True)


def test_what_was_acknowledged_and_deleted_is_told_apart(tmp_path: Path) -> None:
    make(tmp_path, [2, 3])
    min(tmp_path.glob("usage-*.log")).unlink()
    log, _ = recovered(tmp_path)
    assert [(one.first_seq, one.last_seq, one.reason) for one in log.lost(ME, 1, 1, 5)] == [(1, 2, GONE)]
    assert log.lost(ME, 1, 3, 5) == []


def test_damage_that_comes_later_is_found_while_reading(tmp_path: Path) -> None:
    log = UsageLog(tmp_path, bytes_max=1 << 30)
    log.start(LogHeader(ME, 1, 0, 0, b"prefix00", 1), [])
    for seq in range(1, 11):
        log.append(frame(EVENT, packed(event(seq))), 1)
    (path,) = tmp_path.glob("usage-*.log")
    start, end = written(path).events[4]
    with path.open("r+b") as file:
        file.seek(start + 20)
        file.write(b"\xff\xff")
    assert log.found_damaged() == []
    assert sorted(readable(log, 10)) == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert lost(log, 10) == {4}
    (said,) = log.found_damaged()
    assert f"bytes {start:,} to {end:,}" in said
    assert "1 events are lost, 4 to 4" in said
    assert log.events_damaged == 1
    readable(log, 10)
    assert log.found_damaged() == []  # said once
    log.append(frame(EVENT, packed(event(11))), 1)
    assert sorted(readable(log, 11))[-1] == 11
    log.close()


def test_damage_at_the_end_of_a_living_file_is_counted_exactly(tmp_path: Path) -> None:
    log = UsageLog(tmp_path, bytes_max=1 << 30)
    log.start(LogHeader(ME, 1, 0, 0, b"prefix00", 1), [])
    for seq in range(1, 6):
        log.append(frame(EVENT, packed(event(seq))), 1)
    (path,) = tmp_path.glob("usage-*.log")
    with path.open("r+b") as file:
        file.seek(written(path).events[4][0])
        file.write(bytes(len(frame(EVENT, packed(event(4)))) * 2))
    assert sorted(readable(log, 5)) == [1, 2, 3]
    assert lost(log, 5) == {4, 5}
    log.append(frame(EVENT, packed(event(6))), 1)
    assert sorted(log.read_events(ME, 1, 4, 6, events_max=9, bytes_max=1 << 20)) == [packed(event(6))]
    log.close()


def test_an_event_that_repeats_a_number_does_not_pass_for_another(tmp_path: Path) -> None:
    data = b"".join(frame(EVENT, packed(event(seq))) for seq in (1, 2, 2, 3))
    found = examine(data, 1)
    assert (found.last_seq, found.events) == (3, 3)
    assert [(one.lost, one.exact) for one in found.damage] == [(0, True)]


def test_the_end_of_a_log_is_declared_as_many_events_as_it_could_have_held() -> None:
    whole = [frame(EVENT, packed(event(seq))) for seq in (1, 2, 3)]
    data = bytearray(b"".join(whole))
    for at in (len(whole[0]) + 15, len(whole[0]) + len(whole[1]) + 15):
        data[at] ^= 1
    (damage,) = examine(bytes(data), 1).damage
    assert (damage.first_lost, damage.exact) == (2, False)
    assert 3 <= damage.last_lost <= 1 + len(data) // EVENT_BYTES_MIN


def test_no_event_is_shorter_than_the_bound_on_how_many_there_were() -> None:
    shortest = event(
        1, at_us=0, tenant="", subject_type="", subject_id="", action="", effect=0, reason=0, revision=0, units={},
        cost_nanos=0, currency="", idempotency_key="", context={}, spends=[],
    )  # fmt: skip
    assert len(packed(shortest)) + FRAME.size == EVENT_BYTES_MIN


def test_segments_follow_on_each_other(tmp_path: Path) -> None:
    log = make(tmp_path, [2, 2, 2])
    assert all(one.last_seq + 1 == other.header.first_seq for one, other in pairwise(log.segments))
