"""What is believed of a database that is lost, and how a new generation is called above it."""

from __future__ import annotations

from typing import Any

import pytest

from licet.wire import envelope
from licet.wire.documents import Heartbeat
from licet.wire.envelope import EnvelopeError
from licet.wire.signing import Statement
from licet_control_plane.core.lost import GENERATIONS_LOST_MAX, head_version, new_generation, newest_acted
from tests.support.control_plane import heartbeat

MINE = "d" * 32


def acted(generation: int, revision: int, *, deployment: str = MINE) -> Heartbeat:
    name = f"{generation}-{revision}"
    return heartbeat(name, deployment=deployment, acted_generation=generation, acted_revision=revision)


def newest(*heartbeats: Heartbeat) -> str | None:
    found = newest_acted(heartbeats, deployment=MINE, generation=3)
    return found.sidecar if found else None


def test_who_acted_on_most_is_found_by_generation_first() -> None:
    assert newest() is None
    assert newest(acted(2, 90), acted(3, 1), acted(3, 4), acted(3, 2)) == "3-4"


def test_sidecars_of_another_deployment_or_of_none_say_nothing() -> None:
    assert newest(acted(9, 9, deployment="e" * 32), acted(9, 9, deployment=""), acted(1, 1)) == "1-1"


def test_a_claim_far_beyond_the_database_stops_nobody_and_hides_no_other() -> None:
    last = 3 + GENERATIONS_LOST_MAX
    assert newest(acted(last + 1, 1)) is None
    assert newest(acted(last + 1, 1), acted(4, 1)) == "4-1"
    assert newest(acted(last, 1), acted(4, 1)) == f"{last}-1"


@pytest.mark.parametrize(
    ("seen", "called"),
    [
        ((), 4),
        ((0, 2), 4),
        ((7, 5), 8),
        ((3 + GENERATIONS_LOST_MAX,), 4 + GENERATIONS_LOST_MAX),
        ((4 + GENERATIONS_LOST_MAX, 5), 6),
        ((2**63, 2**100), 4),
    ],
)
def test_a_new_generation_is_above_all_that_is_believed(seen: tuple[int, ...], called: int) -> None:
    assert new_generation(3, seen) == called


def test_whatever_stops_publishing_is_below_the_new_generation() -> None:
    for generation in range(1, 2 * GENERATIONS_LOST_MAX):
        if (one := newest_acted([acted(generation, 1)], deployment=MINE, generation=3)) is not None:
            assert one.acted < (new_generation(3, [one.acted[0]]), 0)


@pytest.mark.parametrize(
    ("head", "version"),
    [
        (None, (0, 0)),
        (Statement(MINE, "head", "head", 4, 9, None), (4, 9)),
        (Statement("e" * 32, "head", "head", 4, 9, None), (0, 0)),
        (Statement(MINE, "head", "head", 4 + GENERATIONS_LOST_MAX, 9, None), (0, 0)),
    ],
)
def test_a_head_counts_when_it_may_be_of_the_lost_database(head: Statement | None, version: tuple[int, int]) -> None:
    assert head_version(head, deployment=MINE, generation=3) == version


@pytest.mark.parametrize("field", ["acted_generation", "acted_revision", "at_us", "generation"])
@pytest.mark.parametrize("value", ["9", 9.5, None, [9]])
def test_a_heartbeat_whose_numbers_are_none_is_unreadable(field: str, value: Any) -> None:
    body = envelope.unpack("heartbeat", acted(1, 1).pack())
    with pytest.raises(EnvelopeError, match=field):
        Heartbeat.unpack(envelope.pack("heartbeat", {**body, field: value}))
