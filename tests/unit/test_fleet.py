"""Who lives, and who has confirmed a revision."""

from __future__ import annotations

import pytest

from licet_control_plane.core.fleet import GONE_S_MIN, Rollout, Sidecar, State, rollout
from tests.support.control_plane import heartbeat

NOW_S = 100_000.0


def sidecar(name: str, *, revision: int = 5, generation: int = 1, silent_s: float = 0.0, gone: bool = False) -> Sidecar:
    return Sidecar(heartbeat(name, revision=revision, generation=generation), NOW_S - silent_s, gone)


def stand(*sidecars: Sidecar, published: bool = True) -> Rollout:
    return rollout(sidecars, generation=1, revision=5, published=published, staleness_s_max=60.0, now_s=NOW_S)


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
