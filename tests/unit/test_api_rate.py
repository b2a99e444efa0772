"""The rate of the REST API, for each caller apart."""

from __future__ import annotations

from licet_control_plane.api.rate import CALLERS_MAX, Buckets


def test_a_burst_passes_and_then_one_for_each_that_the_rate_refills() -> None:
    buckets = Buckets(10)
    assert [buckets.take("a", 0.0) for _ in range(20)] == [(left, 0.0) for left in range(19, -1, -1)]
    assert buckets.take("a", 0.0) == (0, 0.1)
    assert buckets.take("a", 0.1) == (0, 0.0)
    assert buckets.take("a", 100.0) == (19, 0.0)


def test_callers_do_not_take_from_each_other() -> None:
    buckets = Buckets(1)
    assert [buckets.take("a", 0.0)[1] for _ in range(3)] == [0.0, 0.0, 1.0]
    assert buckets.take("b", 0.0) == (1, 0.0)


def test_callers_that_were_not_heard_of_for_long_make_room() -> None:
    buckets = Buckets(1)
    for number in range(CALLERS_MAX + 1):
        buckets.take(f"{number}", 0.0)
    assert buckets.take("0", 0.0) == (1, 0.0)
    assert buckets.take(f"{CALLERS_MAX}", 0.0) == (0, 0.0)
