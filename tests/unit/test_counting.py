"""Which window a quota belongs to, under a license's own terms."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from licet.domain.catalog import Catalog, Entitlement, Grant, License, Limit, Plan
from licet.domain.ids import LimitKey
from licet.domain.windows import FOREVER_S, Anchor, Period, Window
from licet.wire.names import scope_digest
from licet.wire.registers import Marker, marker_name, parts_of_marker
from licet_control_plane.core.counting import Counting, Kind, limits_by_key, scope_values
from tests.support.usage import event


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


START, END = at("2025-01-31T12:00"), at("2029-01-31T12:00")
GRANT = Grant("g1", LimitKey("calls:month"), 50, at("2026-03-05"), at("2026-04-07"))
LIMITS = (
    Limit(LimitKey("calls:month"), 100, Period.MONTH),
    Limit(LimitKey("calls:own"), 100, Period.MONTH, anchor=Anchor.LICENSE),
    Limit(LimitKey("calls:term"), 100, Period.TERM),
    Limit(LimitKey("calls:second.rate"), 5, Period.SECOND),
    Limit(LimitKey("calls:spend"), 10**9, Period.DAY, currency="USD"),
    Limit(LimitKey("calls:day@context.a+subject"), 7, Period.DAY, ("context.a", "subject")),
)
CATALOG = Catalog.of(
    [
        Plan("pro", {"calls": Entitlement(limits=LIMITS)}),
        Plan("old", {"calls": Entitlement(limits=(Limit(LimitKey("calls:hour"), 9, Period.HOUR),))}),
    ]
)
OF_SCOPED = Grant("g2", LimitKey("calls:day@context.a+subject"), 50, at("2026-03-05"), at("2026-04-07"))
LICENSE = License("acme", "pro", starts_s=START, ends_s=END, grants=(GRANT, OF_SCOPED))


@pytest.fixture
def counting() -> Counting:
    return Counting(LICENSE, CATALOG, limits_by_key(CATALOG))


@pytest.mark.parametrize(
    ("key", "start", "window"),
    [
        ("calls:month", at("2026-03-01"), Window(at("2026-03-01"), at("2026-04-01"))),
        ("calls:own", at("2026-02-28T12:00"), Window(at("2026-02-28T12:00"), at("2026-03-31T12:00"))),
        ("calls:term", START, Window(START, END)),
        ("calls:second.rate", 0, Window(0, FOREVER_S)),
        ("calls:spend", at("2026-03-02"), Window(at("2026-03-02"), at("2026-03-03"))),
        ("calls:day@context.a+subject", at("2026-03-02"), Window(at("2026-03-02"), at("2026-03-03"))),
        ("calls:day@context.a+subject+g2", OF_SCOPED.starts_s, Window(OF_SCOPED.starts_s, OF_SCOPED.ends_s)),
        ("calls:month+g1", GRANT.starts_s, Window(GRANT.starts_s, GRANT.ends_s)),
        (
            "calls:hour",
            at("2026-03-02T05:00"),
            Window(at("2026-03-02T05:00"), at("2026-03-02T06:00")),
        ),  # another plan's
    ],
)
def test_a_window_follows_from_the_license(counting: Counting, key: str, start: int, window: Window) -> None:
    assert counting.window(key, start, None) == window
    assert counting.window(key, start, Marker(start, start + 1, 0)) == window


@pytest.mark.parametrize(
    "key", ["calls:month", "calls:own", "calls:term", "calls:month+g1", "calls:month+ended", "no:x"]
)
def test_a_window_of_terms_that_were_changed_is_what_the_marker_says(counting: Counting, key: str) -> None:
    start = at("2026-03-09T01:02")
    assert counting.window(key, start, None) is None
    assert counting.window(key, start, Marker(start, start + 99, 0)) == Window(start, start + 99)
    assert counting.window(key, start, Marker(start + 50, start + 99, start)) == Window(start, start + 50)
    assert counting.window(key, start, Marker(start + 50, start + 99, start - 1)) is None


def test_kinds_are_those_of_the_license_alone(counting: Counting) -> None:
    kinds = {key: counting.kind(key) for key in ("calls:month", "calls:second.rate", "calls:spend", "calls:month+g1")}
    assert list(kinds.values()) == [Kind.UNITS, Kind.RATE, Kind.BUDGET, Kind.UNITS]
    assert counting.kind("calls:hour") is None
    assert Counting(None, CATALOG, limits_by_key(CATALOG)).kind("calls:second.rate") is None


def test_only_the_end_of_a_term_or_a_grant_can_be_moved(counting: Counting) -> None:
    ends = {
        key: counting.ends_for_good(key)
        for key in ("calls:month", "calls:hour", "calls:term", "calls:month+g1", "no:x")
    }
    assert list(ends.values()) == [True, True, False, False, False]


def test_starts_that_may_be_old(counting: Counting) -> None:
    assert set(counting.starts()) == {START, GRANT.starts_s}
    assert set(Counting(None, CATALOG, {}).starts()) == set()


def test_a_license_that_is_gone_leaves_calendar_windows_and_no_term() -> None:
    orphan = Counting(None, CATALOG, limits_by_key(CATALOG))
    assert orphan.window("calls:month", at("2026-03-01"), None) == Window(at("2026-03-01"), at("2026-04-01"))
    assert orphan.window("calls:term", 0, None) is None


def test_scopes_are_found_by_doing_again_what_a_sidecar_did() -> None:
    events = [event(1, subject_type="user", subject_id="ada", context={"team": "blue", "n": 3}), event(2, context={})]
    found = scope_values([("subject",), ("context.team", "context.n"), ()], events)
    assert found[scope_digest(("user/ada",))] == {"subject": "user/ada"}
    assert found[scope_digest(("blue", "3"))] == {"context.team": "blue", "context.n": "3"}
    assert found[scope_digest(("", ""))] == {"context.team": "", "context.n": ""}
    assert scope_values([], events) == {}


@pytest.mark.parametrize("key", ["calls:month", "calls:day@subject", "calls:day@context.a+subject", "calls:month+g1"])
@pytest.mark.parametrize("scope", ["", scope_digest(("user/ada",))])
def test_a_marker_names_its_limit_and_scope(key: str, scope: str) -> None:
    assert parts_of_marker(marker_name(LimitKey(key), scope)) == (key, scope)


def test_a_grant_that_is_gone_still_tops_up_its_limit(counting: Counting) -> None:
    found = counting.limit("calls:day@context.a+subject+gone")
    assert found is not None
    assert found.key == OF_SCOPED.limit
    assert not counting.ends_for_good("calls:day@context.a+subject+gone")
    assert counting.ends_for_good("calls:day@context.a+subject")


def test_the_units_of_an_approval_that_ended_are_over_for_good_and_those_of_a_grant_are_not() -> None:
    counting = Counting(License("acme", "pro"), Catalog(), {})
    assert counting.ends_for_good("reports:approval+" + "5f" * 16)
    assert not counting.ends_for_good("reports:month+" + "5f" * 16)
