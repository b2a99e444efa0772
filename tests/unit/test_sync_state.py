"""What a sidecar may act on: versions, gaps and heads."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from licet.wire.documents import Head
from licet.wire.signing import Statement
from licet_sidecar.core.sync import HEADS_BEHIND_MAX, HeadVerdict, SyncState

DEPLOYMENT: Final = "d" * 32
RUN: Final = "run1"


def statement(revision: int, *, generation: int = 1, deployment: str = DEPLOYMENT) -> Statement:
    return Statement(deployment, "license", "acme", generation, revision, {})


def at(revision: int, *, generation: int = 1) -> SyncState:
    state = SyncState()
    state.deployment = DEPLOYMENT
    state.reached(generation, revision, RUN)
    return state


def heard(
    state: SyncState,
    revision: int,
    *,
    generation: int = 1,
    at_us: int = 100,
    run: str = RUN,
    read_from: str = RUN,
    deployment: str = DEPLOYMENT,
) -> HeadVerdict:
    head = Head(at_us, run, 1, 1)
    return state.head_read(statement(revision, generation=generation, deployment=deployment), head, read_from)


@pytest.mark.parametrize(
    ("offered", "held", "accepted"),
    [
        ((1, 5), (0, 0), True),
        ((1, 5), (1, 5), True),
        ((1, 6), (1, 5), True),
        ((1, 4), (1, 5), False),
        ((2, 1), (1, 5), True),
        ((1, 9), (2, 1), False),
    ],
)
def test_a_document_is_taken_only_when_it_is_not_older(
    offered: tuple[int, int], held: tuple[int, int], accepted: bool
) -> None:
    document = statement(offered[1], generation=offered[0])
    assert SyncState().accepts(document, held) is accepted


def test_a_document_of_an_ended_generation_is_not_taken() -> None:
    assert not at(3, generation=2).accepts(statement(99, generation=1), (0, 0))


def test_a_document_of_another_deployment_is_not_taken() -> None:
    assert not at(3).accepts(statement(9, deployment="e" * 32), (0, 0))


@pytest.mark.parametrize(
    ("cursor", "revisions", "follows"),
    [
        (5, [], True),
        (5, [6], True),
        (5, [6, 7, 8], True),
        (5, [7], False),
        (5, [6, 8], False),
        (5, [5, 6], False),
        (5, [6, 6], False),
        (5, [7, 6], False),
        (0, [1], True),
    ],
)
def test_changes_follow_only_without_a_gap(cursor: int, revisions: list[int], follows: bool) -> None:
    assert SyncState().follow(cursor, revisions) is follows


def test_nothing_may_be_served_before_the_first_state() -> None:
    assert not SyncState().may_serve()


def test_nothing_older_than_the_floor_may_be_served() -> None:
    state = SyncState()
    state.floor = (1, 10)
    state.reached(1, 9, RUN)
    assert not state.may_serve()
    state.reached(1, 10, RUN)
    assert state.may_serve()


def test_a_new_generation_is_above_any_floor_of_the_one_before() -> None:
    state = SyncState()
    state.floor = (1, 1_000)
    state.reached(2, 1, RUN)
    assert state.may_serve()


def test_a_head_of_the_revision_in_force_is_current() -> None:
    state = at(5)
    assert heard(state, 5) is HeadVerdict.CURRENT
    assert state.head is not None
    assert state.head.at_us == 100


def test_a_head_of_another_server_is_ignored() -> None:
    assert heard(at(5), 5, run="run0") is HeadVerdict.IGNORED
    assert heard(at(5), 5, read_from="run2") is HeadVerdict.IGNORED


def test_a_head_of_another_deployment_is_ignored() -> None:
    assert heard(at(5), 5, deployment="e" * 32) is HeadVerdict.IGNORED


def test_a_head_older_than_one_heard_is_ignored() -> None:
    state = at(5)
    heard(state, 6)
    assert heard(state, 5) is HeadVerdict.IGNORED


def test_a_head_written_before_one_heard_is_ignored() -> None:
    state = at(5)
    heard(state, 5, at_us=100)
    assert heard(state, 5, at_us=99) is HeadVerdict.IGNORED
    assert heard(state, 5, at_us=100) is HeadVerdict.CURRENT


def test_a_head_that_a_change_overtook_is_late_and_not_wrong() -> None:
    assert heard(at(5), 4) is HeadVerdict.LATE


def test_a_head_of_an_ended_generation_is_ignored() -> None:
    assert heard(at(5, generation=2), 9, generation=1) is HeadVerdict.IGNORED


def test_a_head_ahead_is_waited_for_and_then_everything_is_read_again() -> None:
    state = at(5)
    verdicts = [heard(state, 6, at_us=100 + number) for number in range(HEADS_BEHIND_MAX + 1)]
    assert verdicts == [HeadVerdict.BEHIND] * HEADS_BEHIND_MAX + [HeadVerdict.RESYNC]


def test_progress_ends_the_waiting() -> None:
    state = at(5)
    for number in range(HEADS_BEHIND_MAX):
        heard(state, 6, at_us=100 + number)
    state.reached(1, 6, RUN)
    assert heard(state, 7, at_us=200) is HeadVerdict.BEHIND


def test_a_head_of_a_new_generation_is_read_for_at_once() -> None:
    assert heard(at(5), 1, generation=2) is HeadVerdict.RESYNC


@given(
    steps=st.lists(
        st.tuples(
            st.booleans(), st.integers(1, 3), st.integers(0, 6), st.integers(0, 5), st.sampled_from([RUN, "run2"])
        ),
        max_size=40,
    )
)
def test_a_current_head_never_speaks_of_another_state(steps: list[tuple[bool, int, int, int, str]]) -> None:
    state = SyncState()
    for moves, generation, revision, at_us, run in steps:
        if moves:
            if (generation, revision) >= (state.generation, state.revision):
                state.reached(generation, revision, RUN)
            continue
        verdict = heard(state, revision, generation=generation, at_us=at_us, run=run)
        if verdict is HeadVerdict.CURRENT:
            assert (generation, revision, run) == (state.generation, state.revision, RUN)
        assert state.floor >= (state.generation, state.revision)
