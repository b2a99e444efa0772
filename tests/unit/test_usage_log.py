"""The write-ahead log: what a crash, a bad disk or a full one leaves, and what is read from it again."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from licet.domain.ids import LimitKey
from licet.wire import envelope, usage
from licet.wire.usage import EventKind, event_seq
from licet_sidecar.adapters import usage_log
from licet_sidecar.adapters.log_records import EVENT, HEADER, frame
from licet_sidecar.adapters.usage_log import (
    RESERVED_BYTES,
    RETAINED_S,
    LogHeader,
    Recovered,
    UsageLog,
    UsageLogError,
    floor_record,
    lease_record,
    reservation_record,
)
from licet_sidecar.core.lease import Lease, Terms
from tests.support.usage import event, packed

ME = "a" * 32
OTHER = "b" * 32
QUOTA = "reports:month:1788220800"
NOW_S = 1_790_000_000.0


def header(incarnation: int = 1, *, sidecar: str = ME, first_seq: int = 1) -> LogHeader:
    return LogHeader(sidecar, incarnation, incarnation - 1, 0, b"prefix00", first_seq)


def lease(cap: int, used: int, *, end: int = 1_790_812_800) -> Lease:
    made = Lease(LimitKey("reports:month"), "", 1_788_220_800, end, Terms(1_000))
    made.cap, made.used = cap, used
    return made


def record(seq: int, **changes: Any) -> bytes:
    return frame(EVENT, packed(event(seq, **changes)))


def started(
    directory: Path, incarnation: int = 1, *, sidecar: str = ME, records: Sequence[bytes] = (), bytes_max: int = 1 << 30
) -> UsageLog:
    directory.mkdir(exist_ok=True)
    log = UsageLog(directory, bytes_max=bytes_max)
    log.recover(sidecar, incarnation - 1)
    log.start(header(incarnation, sidecar=sidecar), records)
    return log


def written(directory: Path, events: int, **settings: Any) -> UsageLog:
    """A log of so many events, closed."""
    log = started(directory, **settings)
    for seq in range(1, events + 1):
        log.append(record(seq), 1)
    log.close()
    return log


def filled(log: UsageLog) -> None:
    """Appends until the log refuses."""
    for seq in range(1, 100):
        log.append(record(seq), 1)


def recovered(directory: Path, incarnation: int = 1, *, sidecar: str = ME) -> tuple[UsageLog, Recovered]:
    log = UsageLog(directory, bytes_max=1 << 30)
    return log, log.recover(sidecar, incarnation)


def seqs(
    log: UsageLog, first: int, last: int = 10**9, *, incarnation: int = 1, sidecar: str = ME, **bounds: int
) -> list[int]:
    limits = {"events_max": 10_000, "bytes_max": 1 << 30, **bounds}
    return [event_seq(one) for one in log.read_events(sidecar, incarnation, first, last, **limits)]


def only_file(directory: Path) -> Path:
    (path,) = directory.glob("usage-*.log")
    return path


# Torn tails and damage


def test_a_tail_torn_at_any_byte_is_cut_and_every_whole_record_kept(tmp_path: Path) -> None:
    log = written(tmp_path / "whole", 3)
    path = only_file(tmp_path / "whole")
    data = path.read_bytes()
    ends = [len(data) - sum(len(record(seq)) for seq in range(kept + 1, 4)) for kept in range(4)]
    assert ends[-1] == log.segments[0].size
    for size in range(ends[0], len(data) + 1):
        torn = tmp_path / f"torn-{size}"
        torn.mkdir()
        (torn / path.name).write_bytes(data[:size])
        again, report = recovered(torn)
        kept = max(number for number, end in enumerate(ends) if end <= size)
        assert seqs(again, 1) == list(range(1, kept + 1))
        assert (torn / path.name).stat().st_size == ends[kept] == again.total_bytes
        assert (report.damaged, report.intact) == ([], True)


@pytest.mark.parametrize("tail", [b"\0" * 3, b"\0" * 4_096, b"\xff" * 50, b"\x05\0\0\0"], ids=repr)
def test_a_tail_that_never_was_a_record_is_cut(tmp_path: Path, tail: bytes) -> None:
    log = written(tmp_path, 2)
    with only_file(tmp_path).open("ab") as file:
        file.write(tail)
    again, report = recovered(tmp_path)
    assert only_file(tmp_path).stat().st_size == log.segments[0].size
    assert (seqs(again, 1), report.damaged) == ([1, 2], [])


def test_a_flipped_bit_before_the_tail_is_reported_and_nothing_is_cut(tmp_path: Path) -> None:
    written(tmp_path, 3)
    path = only_file(tmp_path)
    data = path.read_bytes()
    first = len(data) - sum(len(record(seq)) for seq in (1, 2, 3))
    second = first + len(record(1))
    for offset in range(second, second + len(record(2))):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[offset] ^= 1 << bit
            path.write_bytes(bytes(damaged))
            log, report = recovered(tmp_path)
            assert len(report.damaged) == 1, offset
            assert path.name in report.damaged[0]
            assert seqs(log, 1) == [1]
            assert path.read_bytes() == bytes(damaged)
            assert not report.intact


def test_damage_far_before_the_next_whole_record_is_damage_and_no_torn_tail(tmp_path: Path) -> None:
    log = started(tmp_path)
    log.append(record(1), 1)
    log.append(record(2, context={"long": "x" * 100_000}), 1)
    log.append(record(3), 1)
    log.close()
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[-len(record(3)) - 90_000] ^= 1
    path.write_bytes(bytes(data))
    _, report = recovered(tmp_path)
    assert len(report.damaged) == 1
    assert path.stat().st_size == len(data)


def test_a_page_of_zeros_between_records_is_damage(tmp_path: Path) -> None:
    written(tmp_path, 3)
    path = only_file(tmp_path)
    data = path.read_bytes()
    cut = len(data) - len(record(3))
    path.write_bytes(data[:cut] + b"\0" * 4_096 + data[cut:])
    log, report = recovered(tmp_path)
    assert (len(report.damaged), seqs(log, 1)) == (1, [1, 2, 3])
    assert "no event is lost" in report.damaged[0]


def test_damage_in_an_earlier_segment_does_not_doubt_the_leases(tmp_path: Path) -> None:
    log = started(tmp_path)
    log.append(record(1) + record(2), 2)
    log.rotate([lease_record("acme", lease(50, 2))])
    log.append(record(3), 1)
    log.close()
    first = min(tmp_path.glob("usage-*.log"))
    data = bytearray(first.read_bytes())
    data[-len(record(2)) - 3] ^= 1
    first.write_bytes(bytes(data))
    again, report = recovered(tmp_path)
    assert (len(report.damaged), report.intact) == (1, True)
    assert report.leases["acme", QUOTA].cap == 50
    assert seqs(again, 1) == [2, 3]  # what is readable is shipped, under its own numbers


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 10])
def test_a_file_without_a_header_is_reported_left_and_not_trusted(tmp_path: Path, content: bytes) -> None:
    written(tmp_path, 2)
    newer = tmp_path / f"usage-{ME}-0000000001-0000000000000003.log"
    newer.write_bytes(content)
    _, report = recovered(tmp_path)
    assert len(report.damaged) == 1
    assert "no readable header" in report.damaged[0]
    assert newer.read_bytes() == content
    assert not report.intact


def test_a_file_of_a_newer_program_is_refused_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / f"usage-{ME}-0000000001-0000000000000001.log"
    body = envelope.pack("usage-log", [ME, 1, 0, 0, b"prefix00", 1])
    path.write_bytes(frame(HEADER, body[:1] + b"\x63" + body[2:]))
    with pytest.raises(UsageLogError, match="upgrade it"):
        recovered(tmp_path)


def test_other_files_are_left_alone_and_unfinished_ones_go(tmp_path: Path) -> None:
    unfinished = tmp_path / f"usage-{ME}-0000000001-0000000000000001.new"
    for name in ("identity", "usage-1.log", "notes.new"):
        (tmp_path / name).write_bytes(b"mine")
    unfinished.write_bytes(b"half")
    _, report = recovered(tmp_path)
    assert report.damaged == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["identity", "notes.new", "usage-1.log"]


# Disks that are full


def test_a_file_that_may_not_grow_takes_nothing_and_goes_on_when_it_may(tmp_path: Path) -> None:
    log = started(tmp_path)
    log.append(record(1), 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The kernel takes a part of the record, and refuses the rest.
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.total_bytes + 10, limits[1]))
        for _ in range(3):
            with pytest.raises(UsageLogError, match="cannot be written"):
                log.append(record(2), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (log.last_seq, only_file(tmp_path).stat().st_size) == (1, log.total_bytes)
    log.append(record(2), 1)
    assert seqs(log, 1) == [1, 2]
    log.close()
    again, report = recovered(tmp_path)
    assert (seqs(again, 1), report.damaged, report.intact) == ([1, 2], [], True)


def test_a_device_without_room_takes_nothing_and_says_so(tmp_path: Path) -> None:
    log = started(tmp_path)
    log.append(record(1), 1)
    descriptor = log._descriptor
    log._descriptor = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(UsageLogError, match="No space left on device"):
        log.append(record(2), 1)
    os.close(log._descriptor)
    log._descriptor = descriptor
    log.append(record(2), 1)
    assert seqs(log, 1) == [1, 2]
    log.close()


def test_a_disk_that_became_read_only_takes_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = started(tmp_path)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(UsageLogError, match="Read-only file system"):
            log.append(record(1), 1)
    log.append(record(1), 1)
    assert seqs(log, 1) == [1]
    log.close()


# What a restart knows


def test_a_restart_knows_leases_and_floor_exactly(tmp_path: Path) -> None:
    log = started(tmp_path, records=[floor_record(1, 3), lease_record("acme", lease(10, 4))])
    log.append(record(1, spends=[(QUOTA, 3)]), 1)
    log.append(lease_record("acme", lease(100, 7)), 0)
    log.append(record(2, spends=[(QUOTA, 5)]) + record(3, spends=[(QUOTA, 1), ("reports:day:1", 9)]), 2)
    log.append(floor_record(1, 9), 0)
    log.append(record(4, tenant="globex", spends=[(QUOTA, 50)]), 1)
    log.close()
    _, report = recovered(tmp_path)
    assert report.floor == (1, 9)
    assert {key: (one.cap, one.used) for key, one in report.leases.items()} == {("acme", QUOTA): (100, 13)}
    assert (report.incarnation, report.last_seq, report.intact) == (1, 4, True)


def test_a_restart_reads_the_newest_segment_alone(tmp_path: Path) -> None:
    log = started(tmp_path, records=[floor_record(1, 3), lease_record("globex", lease(10, 4))])
    log.append(record(1, spends=[(QUOTA, 3)]), 1)
    log.rotate([floor_record(2, 1), lease_record("acme", lease(20, 5))])
    log.append(record(2, spends=[(QUOTA, 3)]), 1)
    log.close()
    _, report = recovered(tmp_path)
    assert report.floor == (2, 1)
    assert {key: (one.cap, one.used) for key, one in report.leases.items()} == {("acme", QUOTA): (20, 8)}
    assert report.last_seq == 2


def test_a_restart_survives_a_start_that_failed(tmp_path: Path) -> None:
    log = started(tmp_path, records=[floor_record(1, 3), lease_record("acme", lease(10, 4))])
    log.append(record(1, spends=[(QUOTA, 3)]), 1)
    log.close()
    _, report = recovered(tmp_path, incarnation=3)  # 2 and 3 were counted, and never began a log
    assert (report.incarnation, report.last_seq, report.floor, report.intact) == (1, 1, (1, 3), True)
    assert report.leases["acme", QUOTA].used == 7


def test_a_new_id_takes_up_no_lease_but_earlier_answers(tmp_path: Path) -> None:
    log = started(tmp_path, records=[lease_record("acme", lease(10, 4))])
    log.append(record(1), 1)
    log.close()
    again, report = recovered(tmp_path, incarnation=0, sidecar=OTHER)
    assert (report.leases, report.floor, report.intact) == ({}, (0, 0), False)
    assert [(one.sidecar, last) for one, last in again.logs()] == [(ME, 1)]


def test_an_id_whose_log_is_gone_is_not_trusted(tmp_path: Path) -> None:
    _, report = recovered(tmp_path, incarnation=4)
    assert (report.intact, report.incarnation) == (False, 0)


def test_logs_without_events_go_once_a_new_one_begins(tmp_path: Path) -> None:
    for incarnation in range(1, 6):
        started(tmp_path, incarnation, records=[lease_record("acme", lease(10, 4))]).close()
    assert [path.name.split("-")[2] for path in tmp_path.glob("usage-*.log")] == ["0000000005"]


_POINTS = st.lists(
    st.one_of(
        st.tuples(st.just("spend"), st.integers(0, 9)),
        st.tuples(st.just("lease"), st.integers(0, 50)),
        st.tuples(st.just("floor"), st.integers(1, 9)),
        st.tuples(st.just("rotate"), st.just(0)),
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("tear"), st.integers(1, 60)),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(points=_POINTS)
def test_any_history_is_known_after_any_restart(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[str, int]]
) -> None:
    directory = tmp_path_factory.mktemp("log")
    held = lease(0, 0)
    floor = (0, 0)
    incarnation, last_seq = 1, {1: 0}

    def records() -> list[bytes]:
        return [floor_record(*floor), lease_record("acme", held)]

    log = started(directory, 1, records=records())
    for what, number in points:
        match what:
            case "spend":
                last_seq[incarnation] += 1
                held.used += number
                log.append(record(last_seq[incarnation], spends=[(QUOTA, number)] if number else []), 1)
            case "lease":
                held.cap = held.used + number
                log.append(lease_record("acme", held), 0)
            case "floor":
                floor = (1, floor[1] + number)
                log.append(floor_record(*floor), 0)
            case "rotate":
                log.rotate(records())
            case _:
                if what == "tear":  # half a record that was never answered
                    path = log.segments[-1].path
                    with path.open("ab") as file:
                        file.write(record(999)[:number])
                log.close()
                log = UsageLog(directory, bytes_max=1 << 30)
                report = log.recover(ME, incarnation)
                assert (report.damaged, report.intact, report.floor) == ([], True, floor)
                assert (report.incarnation, report.last_seq) == (incarnation, last_seq[incarnation])
                (one,) = report.leases.values()
                assert (one.cap, one.used) == (held.cap, held.used)
                incarnation += 1
                last_seq[incarnation] = 0
                log.start(header(incarnation), records())
    for each, last in last_seq.items():
        assert seqs(log, 1, incarnation=each) == list(range(1, last + 1))
    assert log.total_bytes == sum(path.stat().st_size for path in directory.glob("usage-*.log"))
    log.close()
    shutil.rmtree(directory)


# Full and failing disks


def _short(written_bytes: int) -> Callable[[int, bytes, int], int]:
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        return real(descriptor, data[:written_bytes], offset)

    return pwrite


def _no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", [_short(0), _short(7), _short(100), _no_space], ids=["0", "7", "100", "ENOSPC"])
def test_an_append_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    log = written(tmp_path, 0)
    log = started(tmp_path, 2)
    log.append(record(1), 1)
    before = (log.last_seq, log.total_bytes, log.segments[-1].size, log.segments[-1].path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        with pytest.raises(UsageLogError, match=r"full|No space"):
            log.append(record(2) + record(3), 2)
    assert (log.last_seq, log.total_bytes, log.segments[-1].size, log.segments[-1].path.read_bytes()) == before
    log.append(record(2), 1)
    log.close()
    again, report = recovered(tmp_path, incarnation=2)
    assert (seqs(again, 1, incarnation=2), report.damaged) == ([1, 2], [])


def test_a_part_that_could_not_be_cut_off_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = started(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _short(50))
        patch.setattr(os, "ftruncate", _no_space)
        with pytest.raises(UsageLogError):
            log.append(record(1), 1)
    log.append(record(1), 1)
    log.append(record(2), 1)
    log.close()
    again, report = recovered(tmp_path)
    assert (seqs(again, 1), report.damaged) == ([1, 2], [])


def test_a_full_log_takes_no_event_and_says_so(tmp_path: Path) -> None:
    log = started(tmp_path, bytes_max=1_000)
    with pytest.raises(UsageLogError, match="maximum of 1,000 bytes"):
        filled(log)
    assert log.total_bytes <= 1_000
    assert 1 <= log.last_seq < 99
    log.close()


def test_a_full_log_still_takes_notes_within_a_reserve(tmp_path: Path) -> None:
    log = started(tmp_path, bytes_max=100)
    with pytest.raises(UsageLogError):
        log.append(record(1), 1)
    log.append(lease_record("acme", lease(3, 3)), 0)
    log.append(floor_record(1, 7), 0)
    with pytest.raises(UsageLogError):
        log.append(b"x" * (RESERVED_BYTES + 1), 0)
    log.close()
    _, report = recovered(tmp_path)
    assert report.floor == (1, 7)


def test_space_that_was_released_can_be_used_again(tmp_path: Path) -> None:
    log = started(tmp_path, bytes_max=1_500)
    with pytest.raises(UsageLogError):
        filled(log)
    log.rotate([])
    last = log.last_seq
    log.release(ME, 1, last, 0.0)
    log.append(record(last + 1), 1)
    assert seqs(log, last + 1) == [last + 1]
    log.close()


def test_a_rotation_that_fails_leaves_the_segment_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = started(tmp_path)
    log.append(record(1), 1)
    for call in ("write", "fsync", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _no_space)
            with pytest.raises(UsageLogError):
                log.rotate([floor_record(1, 1)])
    log.append(record(2), 1)
    assert (len(log.segments), log.sync(), seqs(log, 1)) == (1, 2, [1, 2])
    log.rotate([])
    log.append(record(3), 1)
    assert seqs(log, 1) == [1, 2, 3]
    log.close()


def test_a_log_that_cannot_be_begun_says_where_to_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = UsageLog(tmp_path, bytes_max=1 << 30)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _no_space)
        with pytest.raises(UsageLogError, match=f"cannot write {tmp_path}.*free space there"):
            log.start(header(), [])
    assert list(tmp_path.glob("usage-*.log")) == []


def test_only_what_was_synced_counts_as_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = started(tmp_path)
    log.append(record(1), 1)
    assert (log.synced_seq, log.sync(), log.synced_seq) == (0, 1, 1)
    log.append(record(2), 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _no_space)
        with pytest.raises(UsageLogError, match="cannot be synced"):
            log.sync()
    assert log.synced_seq == 1
    log.close()


def test_a_sync_that_failed_is_not_believed_when_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = started(tmp_path)
    log.append(record(1), 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _no_space)
        with pytest.raises(UsageLogError):
            log.sync()
    with pytest.raises(UsageLogError, match="restart on a disk that works"):
        log.sync()  # the kernel would say yes now: it reports a lost write only once
    assert log.synced_seq == 0
    log.close()


def test_a_rotation_makes_the_closed_segment_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = started(tmp_path)
    log.append(record(1), 1)
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(
        os, "fdatasync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), real(descriptor))
    )
    log.rotate([])
    assert log.segments[0].path.stat().st_ino in synced
    assert log.synced_seq == 1
    log.close()


# Reading


def _rotated(directory: Path, per_segment: int, segments: int) -> UsageLog:
    log = started(directory)
    seq = 0
    for number in range(segments):
        if number:
            log.rotate([lease_record("acme", lease(10, seq))])
        for _ in range(per_segment):
            seq += 1
            log.append(record(seq), 1)
    return log


@pytest.mark.parametrize("events_max", [1, 2, 3, 5, 7, 100])
def test_reading_on_from_window_to_window_gives_every_event_once(tmp_path: Path, events_max: int) -> None:
    log = _rotated(tmp_path, 4, 4)
    found: list[int] = []
    while window := seqs(log, len(found) + 1, events_max=events_max):
        assert len(window) <= events_max
        found += window
    assert found == list(range(1, 17))
    log.close()


def test_a_window_can_be_read_again_and_backwards(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 4, 4)
    for first, last in [(1, 16), (6, 9), (6, 9), (2, 3), (16, 16), (1, 1), (5, 100), (17, 20)]:
        assert seqs(log, first, last) == list(range(first, min(last, 16) + 1))
    log.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    windows=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=8),
    per_segment=st.integers(1, 9),
)
def test_any_windows_in_any_order_are_read_right(
    tmp_path_factory: pytest.TempPathFactory, windows: list[tuple[int, int, int]], per_segment: int
) -> None:
    directory = tmp_path_factory.mktemp("log")
    log = _rotated(directory, per_segment, 3)
    for first, length, events_max in windows:
        last = first + length - 1
        expected = list(range(first, min(last, log.last_seq) + 1))[:events_max]
        assert seqs(log, first, last, events_max=events_max) == expected
    log.close()
    shutil.rmtree(directory)


def test_a_window_ends_before_it_grows_too_large(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 4, 2)
    size = len(packed(event(1)))
    assert seqs(log, 1, bytes_max=3 * size) == [1, 2, 3]
    assert seqs(log, 4, bytes_max=3 * size) == [4, 5, 6]
    log.close()


def test_events_that_are_appended_later_are_read_on(tmp_path: Path) -> None:
    log = started(tmp_path)
    assert seqs(log, 1) == []
    for seq in range(1, 6):
        log.append(record(seq), 1)
        assert seqs(log, seq) == [seq]
    log.close()


def test_events_larger_than_one_reading_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_log, "_READ_BYTES", 64)
    log = _rotated(tmp_path, 3, 2)
    assert seqs(log, 1) == [1, 2, 3, 4, 5, 6]
    log.close()


def test_events_of_several_ids_and_incarnations_are_apart(tmp_path: Path) -> None:
    written(tmp_path, 3, sidecar=OTHER, incarnation=1)
    for path in tmp_path.glob("usage-*.log"):
        os.utime(path, (0, 0))  # clearly the older: file systems keep times as coarse as a tick of the kernel
    written(tmp_path, 2, incarnation=1)
    written(tmp_path, 4, incarnation=2)
    log = started(tmp_path, 3)
    assert [(one.sidecar, one.incarnation, last) for one, last in log.logs()] == [
        (OTHER, 1, 3),
        (ME, 1, 2),
        (ME, 2, 4),
        (ME, 3, 0),
    ]
    assert seqs(log, 1, sidecar=OTHER) == [1, 2, 3]
    assert seqs(log, 2, incarnation=1) == [2]
    assert seqs(log, 1, incarnation=2) == [1, 2, 3, 4]
    assert seqs(log, 1, incarnation=3) == []
    log.close()


def test_segments_of_a_copied_directory_are_read_in_the_order_they_were_written(tmp_path: Path) -> None:
    _rotated(tmp_path, 2, 3).close()
    for age, path in enumerate(sorted(tmp_path.glob("usage-*.log"))):
        os.utime(path, (NOW_S - age, NOW_S - age))  # the first is the youngest
    log, report = recovered(tmp_path)
    assert seqs(log, 1) == [1, 2, 3, 4, 5, 6]
    assert [(one.first_seq, last) for one, last in log.logs()] == [(1, 6)]
    assert report.leases["acme", QUOTA].used == 4


# Releasing


def released(log: UsageLog, watermark: int, *, sidecar: str = ME) -> None:
    """Acknowledged so far, and past the retention."""
    log.release(sidecar, 1, watermark, 0.0)
    log.release(sidecar, 1, watermark, RETAINED_S)


def test_a_segment_is_kept_until_all_of_it_is_acknowledged(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 4, 3)
    released(log, 3)
    assert seqs(log, 1) == list(range(1, 13))
    released(log, 7)
    assert seqs(log, 5) == list(range(5, 13))
    assert len(list(tmp_path.glob("usage-*.log"))) == 2
    log.close()


def test_an_acknowledged_segment_is_kept_for_repeats(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 4, 2)
    path = log.segments[0].path
    os.utime(path, (0, 0))  # however long ago it was written: the control plane may have been away
    log.release(ME, 1, 4, 1_000.0)
    log.release(ME, 1, 7, 1_000.0 + RETAINED_S - 0.001)
    assert path.exists()
    assert not log.is_past(log.header, 4)
    log.release(ME, 1, 7, 1_000.0 + RETAINED_S)
    assert not path.exists()
    assert log.is_past(log.header, 4)
    assert not log.is_past(log.header, 5)
    log.close()


def test_each_event_is_past_ten_minutes_after_its_own_acknowledgement(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 9, 1)
    for second in range(RETAINED_S + 9):
        log.release(ME, 1, min(9, second), float(second))
    assert [seq for seq in range(1, 10) if log.is_past(log.header, seq)] == [1, 2, 3, 4, 5, 6, 7, 8]
    log.close()


def test_what_a_restored_ledger_lost_is_not_past(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 9, 1)
    released(log, 9)
    log.release(ME, 1, 3, RETAINED_S + 1.0)
    assert [seq for seq in range(1, 10) if log.is_past(log.header, seq)] == [1, 2, 3]
    log.release(ME, 1, 9, RETAINED_S + 2.0)
    log.release(ME, 1, 9, 2.0 * RETAINED_S)
    assert not log.is_past(log.header, 4)
    log.close()


def test_what_is_acknowledged_makes_room_when_the_log_is_half_full(tmp_path: Path, monkeypatch: Any) -> None:
    log = _rotated(tmp_path, 4, 4)
    monkeypatch.setattr(log, "_bytes_max", 2 * log.total_bytes - 1)
    log.release(ME, 1, 15, 0.0)
    assert [one.header.first_seq for one in log.segments] == [5, 9, 13], "oldest first, and no more than it takes"
    log.close()


def test_the_segment_in_use_is_never_released(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 4, 1)
    released(log, 4)
    log.append(record(5), 1)
    assert seqs(log, 1) == [1, 2, 3, 4, 5]
    log.close()


def test_an_acknowledgement_frees_only_its_own_log(tmp_path: Path) -> None:
    written(tmp_path, 3, sidecar=OTHER)
    written(tmp_path, 3)
    log = started(tmp_path, 2)
    released(log, 10, sidecar=OTHER)
    assert seqs(log, 1, sidecar=OTHER) == []
    assert seqs(log, 1, incarnation=1) == [1, 2, 3]
    log.close()


def test_events_that_are_gone_are_skipped_and_not_renumbered(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 4, 2)
    released(log, 4)
    assert seqs(log, 1) == [5, 6, 7, 8]
    assert seqs(log, 1, events_max=2) == [5, 6]
    log.close()


def test_the_total_is_the_size_of_all_files(tmp_path: Path) -> None:
    log = _rotated(tmp_path, 3, 3)
    assert log.total_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    released(log, 3)
    assert log.total_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    log.close()
    again, _ = recovered(tmp_path)
    assert again.total_bytes == log.total_bytes


def test_a_frame_is_length_checksum_kind_and_payload() -> None:
    length, _, kind = struct.unpack_from("<IIB", frame(EVENT, b"abc"))
    assert (length, kind, frame(EVENT, b"abc")[9:]) == (3, EVENT, b"abc")


# Reservations


def reserved(seq: int, number: int = 0) -> bytes:
    """The record of a reservation and its event, as they are written."""
    wire = [usage.decision_id(b"prefix00", number or seq), "acme", "report.export", [seq], {}, []]
    return reservation_record(wire) + record(seq, kind=EventKind.RESERVE, units={}, spends=[], expires_us=5)


def settled(seq: int, about: int, kind: EventKind = EventKind.CANCEL) -> bytes:
    return record(seq, kind=kind, about=usage.decision_id(b"prefix00", about), units={}, spends=[])


def held(report: Recovered) -> list[int]:
    return [int(id_[16:], 16) for id_ in report.reservations]


def test_open_reservations_are_found_again_and_settled_ones_are_not(tmp_path: Path) -> None:
    log = started(
        tmp_path, records=[reservation_record([usage.decision_id(b"before00", 9), "acme", "old", [], {}, []])]
    )
    for seq in (1, 2, 3):
        log.append(reserved(seq), 1)
    log.append(settled(4, 1), 1)
    log.append(settled(5, 2, EventKind.COMMIT), 1)
    log.append(reserved(6, 3), 1)  # extended: the newer record counts
    log.close()
    _, report = recovered(tmp_path)
    assert held(report) == [9, 3]
    assert report.reservations[usage.decision_id(b"prefix00", 3)][3] == [6]
    assert [usage.unpack_event(event).about[16:] for _, event in report.settled] == [f"{1:016x}", f"{2:016x}"]


def test_a_tail_torn_at_any_byte_leaves_a_reservation_with_its_event_or_none(tmp_path: Path) -> None:
    log = started(tmp_path / "whole")
    log.append(reserved(1), 1)
    before = log.segments[0].size
    log.append(reserved(2), 1)
    middle = log.segments[0].size
    log.append(settled(3, 1), 1)
    log.close()
    path = only_file(tmp_path / "whole")
    data = path.read_bytes()
    for size in range(before, len(data) + 1):
        torn = tmp_path / f"torn-{size}"
        torn.mkdir()
        (torn / path.name).write_bytes(data[:size])
        again, report = recovered(torn)
        expected = [2] if size == len(data) else [1, 2] if size >= middle else [1]
        assert held(report) == expected
        assert (len(seqs(again, 1)), report.damaged) == (3 if size == len(data) else len(expected), [])


def test_a_log_goes_on_growing_after_a_head_that_is_larger_than_a_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_log, "SEGMENT_BYTES", 1_000)
    log = started(tmp_path, records=[reservation_record(["0" * 32, "x" * 2_000])])
    assert not log.wants_rotation
    for seq in range(1, 10):
        log.append(record(seq), 1)
    assert log.wants_rotation
    log.close()


def test_settled_reservations_of_earlier_incarnations_are_found_too(tmp_path: Path) -> None:
    for incarnation in (1, 2, 3):
        log = started(tmp_path, incarnation)
        log.append(settled(1, incarnation), 1)
        log.append(record(2), 1)
        log.close()
    _, report = recovered(tmp_path, 3)
    assert [usage.unpack_event(event).about[16:] for _, event in report.settled] == [f"{n:016x}" for n in (1, 2, 3)]


def test_what_is_open_behind_damage_is_left_to_be_settled_and_doubted(tmp_path: Path) -> None:
    log = started(tmp_path)
    log.append(reserved(1), 1)
    damaged = log.segments[-1].size
    log.append(record(2) + reserved(3), 2)
    log.append(reserved(4) + settled(5, 4), 2)
    log.close()
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[damaged + 12] ^= 1
    path.write_bytes(data)
    _, report = recovered(tmp_path)
    assert (report.intact, report.reservations) == (False, {})
    assert list(report.orphans) == [usage.decision_id(b"prefix00", seq) for seq in (1, 3)]
    assert report.doubted == set(report.orphans)


def test_an_id_that_goes_on_leaves_what_others_reserved_alone(tmp_path: Path) -> None:
    log = started(tmp_path)
    log.append(reserved(1), 1)
    log.close()
    _, report = recovered(tmp_path)
    assert (report.intact, held(report), report.orphans) == (True, [1], {})
