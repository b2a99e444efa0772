"""Who lives, and who has confirmed a revision."""

from __future__ import annotations

import pytest

from licet_control_plane.core.fleet import GONE_S_MIN, LIVE_S_MAX, Rollout, Sidecar, State, heard, is_undrained, rollout
from tests.support.control_plane import heartbeat

NOW_S = 100_000.0


def sidecar(name: str, *, revision: int = 5, generation: int = 1, silent_s: float = 0.0, gone: bool = False) -> Sidecar:
    return Sidecar(heartbeat(name, revision=revision, generation=generation), NOW_S - silent_s, gone)


def stand(*sidecars: Sidecar, published: bool = True) -> Rollout:
    return rollout(sidecars, generation=1, revision=5, published=published, staleness_s_max=60.0, looked_s=NOW_S)


def test_a_fleet_of_zero_is_done_once_published() -> None:
    assert stand().done
    assert not stand(published=False).done


def test_waits_for_a_live_sidecar_that_is_behind() -> None:
    result = stand(sidecar("a"), sidecar("b", revision=4))
    assert [one.heartbeat.sidecar for one in result.confirmed] == ["a"]
    assert [one.heartbeat.sidecar for one in result.waiting] == ["b"]
    assert not result.done


def test_a_later_revision_confirms_and_an_earlier_generation_does_not() -> None:
    assert stand(sidecar("a", revision=9), sidecar("b", revision=1, generation=2)).done
    assert not stand(sidecar("a", revision=9, generation=0)).done


def test_does_not_wait_for_a_sidecar_that_answers_stale_by_now() -> None:
    result = stand(sidecar("a", revision=4, silent_s=60.5))
    assert [one.heartbeat.sidecar for one in result.silent] == ["a"]
    assert result.done
    assert not stand(sidecar("a", revision=4, silent_s=59.5)).done


def test_a_sidecar_that_left_is_in_no_list() -> None:
    result = stand(sidecar("a", revision=4, gone=True))
    assert (result.confirmed, result.waiting, result.silent) == ([], [], [])


@pytest.mark.parametrize(
    ("silent_s", "state"), [(0.0, State.LIVE), (5.0, State.LIVE), (5.1, State.SILENT), (GONE_S_MIN, State.GONE)]
)
def test_state_by_silence(silent_s: float, state: State) -> None:
    assert sidecar("a", silent_s=silent_s).state(NOW_S) is state


# How far the ledger surely is


def said(before: Sidecar | None, seconds: float, last: int, acked: int, *, ahead: float = 0.0, **more: int) -> Sidecar:
    """After a heartbeat that arrived so many seconds after ``NOW_S``, from a clock so far ahead."""
    at_us = int((NOW_S + seconds + ahead) * 1_000_000)
    beat = heartbeat("a", at_us=at_us, log_last_seq=last, log_acked_seq=acked, **more)
    return heard(before, beat, NOW_S + seconds)


def undrained(sidecar: Sidecar, seconds: float, watermark: int) -> bool:
    return is_undrained(sidecar, watermark, at_s=NOW_S + seconds - LIVE_S_MAX)


def test_a_log_that_is_in_the_ledger_is_drained_up_to_its_heartbeat_and_no_further() -> None:
    one = said(None, 0, 7, 7)
    assert not undrained(one, 0, 7)
    assert undrained(one, 0.1, 7)
    assert undrained(one, 0, 6), "the sidecar says so, and this ledger does not have it"


def test_a_busy_log_is_drained_up_to_where_it_ended_a_moment_ago() -> None:
    one = said(None, 0, 10, 4)
    assert undrained(one, 0, 4)
    one = said(one, 1, 20, 9)
    assert undrained(one, 0, 9)
    one = said(one, 2, 30, 11)
    assert not undrained(one, 0, 11)
    assert undrained(one, 1, 11)
    one = said(said(one, 3, 40, 29), 4, 50, 30)
    assert not undrained(one, 2, 30)


def test_a_clock_that_is_ahead_settles_nothing_and_one_that_is_behind_only_what_it_is_past() -> None:
    assert undrained(said(None, 0, 7, 7, ahead=3_600), 1, 7)
    late = said(None, 0, 7, 7, ahead=-60)
    assert undrained(late, 0, 7)
    assert not is_undrained(late, 7, at_s=NOW_S - 60)


def test_another_incarnation_begins_anew() -> None:
    one = said(said(None, 0, 7, 7), 1, 3, 0, incarnation=2)
    assert undrained(one, 0, 0)


def test_who_left_holds_what_the_ledger_does_not_have() -> None:
    gone = Sidecar(heartbeat("a", log_last_seq=7, log_acked_seq=6), NOW_S, gone=True)
    assert is_undrained(gone, 6, at_s=0.0)
    assert not is_undrained(gone, 7, at_s=NOW_S + 1)
