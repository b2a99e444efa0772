"""A state directory belongs to one process, and its id to one place."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from licet_sidecar.adapters import state_directory
from licet_sidecar.adapters.state_directory import (
    IDENTITY_FILE,
    LOCK_FILE,
    Identity,
    StateDirectory,
    StateDirectoryError,
)


def claimed(path: Path) -> Identity:
    """The identity one start gets."""
    directory = StateDirectory(path)
    identity = directory.claim_identity()
    directory.close()
    return identity


def test_an_id_is_128_random_bits(tmp_path: Path) -> None:
    one, two = claimed(tmp_path / "one"), claimed(tmp_path / "two")
    assert re.fullmatch(r"[0-9a-f]{32}", one.sidecar)
    assert one.sidecar != two.sidecar
    assert (one.incarnation, one.previous) == (1, 0)


def test_each_start_is_the_next_incarnation_of_the_same_id(tmp_path: Path) -> None:
    identities = [claimed(tmp_path / "state") for _ in range(3)]
    assert len({identity.sidecar for identity in identities}) == 1
    assert [(one.incarnation, one.previous) for one in identities] == [(1, 0), (2, 1), (3, 2)]


def test_a_start_that_went_no_further_is_counted_too(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    first = directory.claim_identity()
    assert directory.claim_identity() == Identity(first.sidecar, 2, 1)
    directory.close()


def test_a_second_process_is_refused_and_told_who_and_what_to_do(tmp_path: Path) -> None:
    first = StateDirectory(tmp_path)
    with pytest.raises(StateDirectoryError) as caught:
        StateDirectory(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert f"(pid {os.getpid()})" in message
    assert "--state-dir" in message
    first.close()
    StateDirectory(tmp_path).close()


def test_a_refused_process_changes_nothing(tmp_path: Path) -> None:
    first = StateDirectory(tmp_path)
    first.claim_identity()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StateDirectoryError):
        StateDirectory(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    first.close()


def test_a_lock_file_without_a_process_does_not_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("4194304")
    StateDirectory(tmp_path).close()


def test_a_copied_directory_takes_a_new_id(tmp_path: Path) -> None:
    original = claimed(tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "clone")
    clone = claimed(tmp_path / "clone")
    assert clone.sidecar != original.sidecar
    assert (clone.incarnation, clone.previous) == (1, 0)
    assert claimed(tmp_path / "original") == Identity(original.sidecar, 2, 1)


def test_a_moved_directory_keeps_its_id(tmp_path: Path) -> None:
    original = claimed(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert claimed(tmp_path / "there") == Identity(original.sidecar, 2, 1)


def test_after_a_reboot_a_new_id_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = claimed(tmp_path / "state")
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("00000000-0000-0000-0000-000000000000\n")
    monkeypatch.setattr(state_directory, "_BOOT_ID_PATH", boot_id)
    rebooted = claimed(tmp_path / "state")
    assert (rebooted.sidecar != original.sidecar, rebooted.previous) == (True, 0)
    assert claimed(tmp_path / "state").sidecar == rebooted.sidecar


def test_where_nothing_tells_a_reboot_every_start_takes_a_new_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_directory, "_BOOT_ID_PATH", tmp_path / "missing")
    assert claimed(tmp_path / "state").sidecar != claimed(tmp_path / "state").sidecar


def test_a_renounced_id_does_not_come_back(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    renounced = directory.claim_identity()
    directory.renounce_identity()
    directory.renounce_identity()
    directory.close()
    after = claimed(tmp_path)
    assert (after.sidecar != renounced.sidecar, after.incarnation, after.previous) == (True, 1, 0)
    assert not after.moved, "what lies here is its own"


def test_what_lies_in_a_copy_of_a_renounced_directory_may_be_in_use_elsewhere(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "original")
    directory.claim_identity()
    directory.renounce_identity()
    directory.close()
    shutil.copytree(tmp_path / "original", tmp_path / "clone")
    assert claimed(tmp_path / "clone").moved
    assert not claimed(tmp_path / "original").moved


def test_an_id_is_renounced_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StateDirectory(tmp_path)
    renounced = directory.claim_identity()

    def full(*_: Any) -> None:
        raise StateDirectoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "write_atomically", full)
        directory.renounce_identity()
    directory.close()
    after = claimed(tmp_path)
    assert (after.sidecar != renounced.sidecar, after.moved) == (True, True)


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"\x93\x01\xa8identity\x91\xa1x", b"\x93\x02\xa8identity\xc0"])
def test_a_damaged_identity_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    original = claimed(tmp_path)
    (tmp_path / IDENTITY_FILE).write_bytes(content)
    after = claimed(tmp_path)
    assert (after.sidecar != original.sidecar, after.previous) == (True, 0)


@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
def test_a_place_that_is_no_directory_is_refused_with_what_to_do(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateDirectoryError, match=r"cannot be written.*--state-dir"):
        StateDirectory(tmp_path / path)


def test_a_read_only_directory_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StateDirectoryError, match="Permission denied; give a writable one with --state-dir"):
        StateDirectory(tmp_path)


def test_a_missing_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    StateDirectory(tmp_path / "deep" / "state").close()
    assert (tmp_path / "deep" / "state").stat().st_mode & 0o077 == 0


def test_files_are_replaced_wholly_and_read_back(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    assert directory.read("snapshot") is None
    directory.write_atomically("snapshot", b"one" * 1_000)
    directory.write_atomically("snapshot", b"two")
    assert directory.read("snapshot") == b"two"
    assert (tmp_path / "snapshot").stat().st_mode & 0o077 == 0
    directory.close()


@pytest.mark.parametrize("failing", ["write", "fsync", "open"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    directory = StateDirectory(tmp_path)
    directory.write_atomically("snapshot", b"good")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(StateDirectoryError, match=r"cannot write .*snapshot: No space left on device"):
            directory.write_atomically("snapshot", b"bad")
    assert directory.read("snapshot") == b"good"
    directory.close()


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StateDirectory(tmp_path)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    directory.write_atomically("snapshot", b"0123456789")
    monkeypatch.undo()
    assert directory.read("snapshot") == b"0123456789"
    directory.close()


def test_an_identity_that_cannot_be_counted_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StateDirectory(tmp_path)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StateDirectoryError, match="No space left"):
            directory.claim_identity()
    assert directory.claim_identity().incarnation == 1
    directory.close()
