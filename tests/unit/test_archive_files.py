"""The archive's files: what was on disk stays readable, what was torn is cut off, what was damaged is named."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from licet_control_plane.archive import files
from licet_control_plane.archive.files import (
    ArchiveDamaged,
    ArchiveDirectory,
    ArchiveInUse,
    ArchiveUnavailable,
    ShardArchive,
    deployment_of,
    files_of,
    read,
    shards_in,
)

DEPLOYMENT = "d" * 32


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "archive"
    path.mkdir()
    return path


def opened(directory: Path, shard: int = 0, deployment: str = DEPLOYMENT) -> ShardArchive:
    return ShardArchive.open(directory, shard, deployment)


def filled(directory: Path, frames: int = 4, *, each: int = 2) -> ShardArchive:
    """Frames of ``each`` records that say which number they have."""
    archive = opened(directory)
    for _ in range(frames):
        archive.append(archive.last + 1, [record(archive.last + 1 + index) for index in range(each)], now_s=0)
    return archive


def record(number: int) -> bytes:
    return b"record %d " % number * 20


def numbers(directory: Path, *, after: int = 0, shard: int = 0) -> list[int]:
    found = list(read(directory, shard, DEPLOYMENT, after=after))
    assert [one.data for one in found] == [record(one.number) for one in found]
    return [one.number for one in found]


def test_records_are_read_as_they_were_appended(directory: Path) -> None:
    filled(directory).close()
    assert numbers(directory) == list(range(1, 9))
    assert numbers(directory, after=3) == list(range(4, 9))
    assert numbers(directory, after=8) == []
    assert (shards_in(directory), deployment_of(directory)) == ([0], DEPLOYMENT)


def test_opening_goes_on_where_it_ended(directory: Path) -> None:
    filled(directory).close()
    archive = opened(directory)
    assert (archive.last, archive.torn) == (8, None)
    archive.append(9, [record(9)], now_s=0)
    archive.close()
    assert numbers(directory) == list(range(1, 10))
    assert archive.bytes == files.size_of(directory)


def test_a_number_cannot_be_left_out_or_repeated(directory: Path) -> None:
    archive = filled(directory)
    for first in (8, 10):
        with pytest.raises(ValueError, match="cannot follow record 8"):
            archive.append(first, [b"x"], now_s=0)
    archive.append(9, [], now_s=0)
    assert archive.last == 8


def test_files_are_rotated_by_size_and_by_age(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = opened(directory)
    archive.append(1, [record(1)], now_s=0)
    archive.append(2, [record(2)], now_s=files.FILE_S_MAX - 1)
    archive.append(3, [record(3)], now_s=files.FILE_S_MAX)
    monkeypatch.setattr(files, "FILE_BYTES_MAX", 1)
    archive.append(4, [record(4)], now_s=files.FILE_S_MAX)
    archive.append(5, [record(5)], now_s=files.FILE_S_MAX)
    archive.close()
    names = [path.name for path in files_of(directory / "shard-0")]
    assert names == [f"{first:016d}.archive" for first in (1, 3, 4, 5)]
    assert numbers(directory) == [1, 2, 3, 4, 5]
    assert numbers(directory, after=3) == [4, 5]
    assert opened(directory).last == 5


def test_a_missing_file_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILE_BYTES_MAX", 1)
    filled(directory).close()
    files_of(directory / "shard-0")[1].unlink()
    found: list[int] = []
    with pytest.raises(ArchiveDamaged, match="3 to 4 are missing"):
        found.extend(one.number for one in read(directory, 0, DEPLOYMENT))
    assert numbers(directory, after=4) == [5, 6, 7, 8]


def test_files_of_another_deployment_or_shard_or_name_are_refused(directory: Path) -> None:
    filled(directory).close()
    with pytest.raises(ArchiveDamaged, match="belongs to shard 0 of deployment d"):
        opened(directory, deployment="e" * 32)
    (directory / "shard-0").rename(directory / "shard-1")
    with pytest.raises(ArchiveDamaged, match="belongs to shard 0"):
        opened(directory, shard=1)
    (path,) = files_of(directory / "shard-1")
    (directory / "shard-1").rename(directory / "shard-0")
    path = directory / "shard-0" / path.name
    path.rename(path.with_name(f"{5:016d}.archive"))
    with pytest.raises(ArchiveDamaged, match="renamed"):
        opened(directory)


def test_only_one_process_has_the_directory(directory: Path) -> None:
    claimed = ArchiveDirectory.claim(directory)
    with pytest.raises(ArchiveInUse):
        ArchiveDirectory.claim(directory)
    claimed.close()
    ArchiveDirectory.claim(directory).close()


@given(cut=st.integers(0, 10_000))
@settings(deadline=None)
def test_a_torn_end_is_cut_off_and_every_whole_frame_stays(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("torn")
    archive = filled(directory, each=1)
    ends = [0]
    (path,) = files_of(directory / "shard-0")
    content = path.read_bytes()
    for _, _, end in files._walk(path, content, files._header(path, content)[1], may_be_torn=False):
        ends.append(end)
    archive.close()
    length = cut % len(content)
    with path.open("r+b") as file:
        file.truncate(length)
    whole = sum(end <= length for end in ends[1:])
    assert numbers(directory) == list(range(1, whole + 1))
    again = opened(directory)
    assert again.last == whole
    again.append(whole + 1, [record(whole + 1)], now_s=0)
    again.close()
    assert numbers(directory) == list(range(1, whole + 2))


@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
@settings(deadline=None)
def test_a_flipped_byte_never_passes_and_takes_no_good_record_with_it(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    directory = tmp_path_factory.mktemp("flipped")
    filled(directory, each=1).close()
    (path,) = files_of(directory / "shard-0")
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position] ^= flip
    path.write_bytes(content)
    found: list[int] = []
    damaged = False
    try:
        for one in read(directory, 0, DEPLOYMENT):
            assert one.data == record(one.number)
            found.append(one.number)
    except ArchiveDamaged:
        damaged = True
    assert found == list(range(1, len(found) + 1))
    if damaged:
        with pytest.raises(ArchiveDamaged):
            opened(directory)
        assert path.read_bytes() == content
    else:  # only the last frame can pass for torn: the ledger has it, and it is appended again
        assert found == [1, 2, 3]
        assert opened(directory).last == 3


def test_damage_is_reported_with_its_extent(directory: Path) -> None:
    filled(directory).close()
    (path,) = files_of(directory / "shard-0")
    content = bytearray(path.read_bytes())
    start = files._header(path, bytes(content))[1]
    second = files._frame_at(bytes(content), start)
    assert second is not None
    content[second[2] + 30] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveDamaged, match=rf"damaged from byte {second[2]} up to byte \d+, after record 2"):
        opened(directory)


def test_a_file_that_was_only_begun_is_begun_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(directory).close()
    begun = directory / "shard-0" / f"{9:016d}.archive"
    begun.write_bytes(files.MAGIC + b"\xf7L")
    archive = opened(directory)
    assert (archive.last, archive.torn and archive.torn.path) == (8, begun)
    monkeypatch.setattr(files, "FILE_BYTES_MAX", 1)
    archive.append(9, [record(9)], now_s=0)
    archive.close()
    assert numbers(directory) == list(range(1, 10))


def test_a_full_disk_loses_nothing_and_is_gone_on_from(directory: Path) -> None:
    archive = filled(directory)
    (path,) = files_of(directory / "shard-0")
    size = path.stat().st_size
    with file_size_max(size + 10), pytest.raises(ArchiveUnavailable, match=str(path)):
        archive.append(9, [os.urandom(2_000)], now_s=0)
    assert archive.last == 8
    assert path.stat().st_size > size  # a part of it was written
    archive.append(9, [record(9)], now_s=0)
    archive.close()
    assert numbers(directory) == list(range(1, 10))


def test_a_full_disk_while_a_file_is_begun_leaves_none(directory: Path) -> None:
    archive = filled(directory)
    with file_size_max(10), pytest.raises(ArchiveUnavailable):
        archive.append(9, [record(9)], now_s=files.FILE_S_MAX)
    assert len(files_of(directory / "shard-0")) == 1
    archive.append(9, [record(9)], now_s=files.FILE_S_MAX)
    archive.close()
    assert numbers(directory) == list(range(1, 10))


def test_after_a_failed_fsync_the_frame_is_written_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = filled(directory)
    works = os.fsync

    def fails(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    for _ in range(2):
        with pytest.raises(ArchiveUnavailable, match="Input/output error"):
            archive.append(9, [record(9)], now_s=0)
    monkeypatch.setattr(os, "fsync", works)
    archive.append(9, [record(9)], now_s=0)
    archive.close()
    assert numbers(directory) == list(range(1, 10))


@contextmanager
def file_size_max(size: int) -> Iterator[None]:
    """As if the disk were full: writes that make a file larger are cut short, then fail."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
