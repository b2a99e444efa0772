"""Recounting an audit trail names the first entry that is not as it was recorded, and what became of it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from licet_control_plane.core.audit_chain import GENESIS, Entry, Recount, hash_of, recount

Trail = list[tuple[Entry, bytes]]
ENTRIES = 9


def trail(entries: int = ENTRIES) -> Trail:
    made: Trail = []
    previous = GENESIS
    for number in range(1, entries + 1):
        said = ("ada", "api-key", "0a1b", "10.0.0.1", "r1", "license.update", f"t{number}", f"t{number}", "null", "{}")
        entry = Entry(number, number * 1_000, *said, previous)
        previous = hash_of(entry)
        made.append((entry, previous))
    return made


def found(entries: Trail) -> tuple[int, str]:
    hashes = {hash_: entry.number for entry, hash_ in entries}
    done = recount(Recount(), entries, lambda hash_: [hashes[hash_]] if hash_ in hashes else [])
    assert done.fault is not None
    return done.fault.number, done.fault.what


def chained(entries: Trail, start: int) -> Trail:
    """Hashes and links made anew from a place on, as somebody would who knows how."""
    made = entries[:start]
    for entry, _ in entries[start:]:
        linked = replace(entry, number=len(made) + 1, previous=made[-1][1] if made else GENESIS)
        made.append((linked, hash_of(linked)))
    return made


def test_a_trail_as_it_was_recorded_recounts_in_pages() -> None:
    entries = trail()
    done = recount(recount(Recount(), entries[:4]), entries[4:])
    assert (done.number, done.head, done.fault) == (ENTRIES, entries[-1][1], None)


@pytest.mark.parametrize("name", [field.name for field in fields(Entry) if field.name != "number"])
def test_a_changed_field_is_found(name: str) -> None:
    entries = trail()
    entry, hash_ = entries[4]
    value = getattr(entry, name)
    changed: Any = {int: 7, str: "other", bytes: b"\1" * 32}[type(value)]
    entries[4] = (replace(entry, **{name: changed}), hash_)
    assert found(entries) == (5, "entry 5 was altered: its hash is not that of what it says")


@pytest.mark.parametrize(("gone", "says"), [((1,), "entry 1 was removed"), ((4, 5, 6), "entries 4 to 6 were removed")])
def test_removed_entries_are_found(gone: tuple[int, ...], says: str) -> None:
    assert found([one for one in trail() if one[0].number not in gone]) == (gone[0], says)


def test_a_removed_entry_is_found_when_the_rest_was_numbered_anew() -> None:
    entries = [one for one in trail() if one[0].number != 4]
    moved = [(replace(entry, number=place), hash_) for place, (entry, hash_) in enumerate(entries, start=1)]
    assert found(moved) == (4, "entry 4 was removed, and those after it were numbered anew")


def test_an_inserted_entry_is_found_when_the_rest_was_numbered_anew() -> None:
    entries = trail()
    forged = replace(entries[3][0], target="forged", previous=entries[2][1])
    entries.insert(3, (forged, hash_of(forged)))
    moved = [(replace(entry, number=place), hash_) for place, (entry, hash_) in enumerate(entries, start=1)]
    assert found(moved) == (4, "an entry was inserted as entry 4")


def test_reordered_entries_are_found() -> None:
    entries = trail()
    third, seventh = entries[2], entries[6]
    entries[2] = (replace(seventh[0], number=3), seventh[1])
    entries[6] = (replace(third[0], number=7), third[1])
    assert found(entries) == (3, "entries were reordered: entry 3 is the one that was entry 7")


def test_an_entry_that_was_written_anew_with_its_hash_does_not_fit_the_next() -> None:
    entries = trail()
    forged = replace(entries[3][0], target="forged")
    entries[3] = (forged, hash_of(forged))
    assert found(entries) == (4, "entry 5 does not follow entry 4: one of them was written anew")


def test_what_was_chained_anew_recounts_and_only_its_head_differs() -> None:
    entries = trail()
    forged = [*entries[:3], (replace(entries[3][0], target="forged"), b""), *entries[4:]]
    done = recount(Recount(), chained(forged, 3))
    assert done.fault is None
    assert done.head != entries[-1][1]


def test_an_entry_comes_back_from_json_as_it_was() -> None:
    entry, hash_ = trail()[2]
    assert Entry.from_json(entry.as_json(hash_)) == (entry, hash_)
