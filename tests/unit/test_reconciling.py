"""What counts as a difference between ledger and registers, and what is only on its way."""

from __future__ import annotations

from licet.wire.registers import Pair, Register
from licet_control_plane.core.reconciling import (
    FOLDED,
    LogSides,
    Place,
    Sides,
    differences,
    is_forgotten,
    is_rolled_back,
    meaning,
    settled,
)


def register(used: int, *, sealed: bool = False) -> Register:
    return Register(used + 5, used, 0, 1, 1, Pair(1, "run"), 1, sealed)


def test_each_holder_is_compared_and_those_without_a_register_with_the_base() -> None:
    registers = {"a": register(10), "b": register(7), "c": register(3), "sealed": register(9, sealed=True)}
    ledger = {"a": 10, "b": 13, "sealed": 9, "left": 4}
    assert differences("t", "q", 13, registers, ledger) == {
        Place("t", "q", "b"): Sides(12, 13),
        Place("t", "q", "c"): Sides(3, 0),
    }
    assert differences("t", "q", 15, {}, {"left": 4, "gone": 9}) == {Place("t", "q", FOLDED): Sides(15, 13)}
    assert differences("t", "q", 0, {}, {}) == {}


def test_what_a_sidecar_may_spend_before_it_says_so_is_no_difference() -> None:
    for units, differs in ((9, True), (10, False), (15, False), (16, True)):
        assert bool(differences("t", "q", 0, {"a": register(10)}, {"a": units})) == differs


def test_a_difference_counts_once_it_stays_and_nothing_of_its_is_on_its_way() -> None:
    stays, moves, busy, folded = (Place("t", "q", name) for name in ("a", "b", "c", FOLDED))
    before = {stays: Sides(5, 4), moves: Sides(5, 4), busy: Sides(5, 4), folded: Sides(5, 4)}
    after = {stays: Sides(5, 4), moves: Sides(6, 4), busy: Sides(5, 4), folded: Sides(5, 4)}
    counts, moving = settled(before, after, {"c"})
    assert (set(counts), set(moving)) == ({stays}, {moves, busy, folded})
    counts, moving = settled(before, after, ())
    assert (set(counts), set(moving)) == ({stays, busy, folded}, {moves})
    assert settled(before, {}, ()) == ({}, {})
    assert settled({}, after, ())[0] == {}


def test_the_direction_of_a_difference_is_told() -> None:
    assert "not in the ledger" in meaning(Sides(5, 4))
    assert "overspent" in meaning(Sides(4, 5))


def test_logs_may_be_ahead_of_the_ledger_and_never_behind() -> None:
    on_its_way = LogSides("s:1", last_seq=10, acked_seq=5, watermark=7)
    assert not is_forgotten(on_its_way)
    assert not is_rolled_back(on_its_way)
    assert is_forgotten(on_its_way._replace(watermark=4))
    assert is_rolled_back(on_its_way._replace(watermark=11))
