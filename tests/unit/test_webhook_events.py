"""What webhooks tell, and where they may be sent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from licet.domain.catalog import License, LicenseStatus
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.core.webhook_events import (
    BACKOFF_S,
    change_type,
    checked_url,
    crossed,
    may_connect,
    retry_at_us,
)

ACME = License("acme", "pro", ends_s=100)
SUSPENDED = replace(ACME, status=LicenseStatus.SUSPENDED)


@pytest.mark.parametrize(
    ("old", "new", "action", "type_"),
    [
        (None, ACME, "license.create", "license.created"),
        (ACME, SUSPENDED, "license.update", "license.suspended"),
        (SUSPENDED, ACME, "license.resume", "license.resumed"),
        (ACME, replace(ACME, status=LicenseStatus.CANCELED), "license.cancel", "license.canceled"),
        (ACME, replace(ACME, ends_s=200), "license.renew", "license.renewed"),
        (ACME, replace(ACME, ends_s=200), "license.update", "license.changed"),
        (ACME, replace(ACME, plan="big"), "license.change_plan", "license.changed"),
    ],
)
def test_a_change_has_one_type(old: License | None, new: License, action: str, type_: str) -> None:
    assert change_type(old, new, action) == type_


@pytest.mark.parametrize(
    ("address", "public", "private"),
    [
        ("93.184.215.14", True, True),
        ("2606:2800:21f::1", True, True),
        ("127.0.0.1", False, True),
        ("10.0.0.1", False, True),
        ("100.64.0.1", False, True),
        ("::1", False, True),
        ("fd00::1", False, True),
        ("::ffff:10.0.0.1", False, True),
        ("64:ff9b::a00:1", False, True),
        ("2002:a00:1::", False, True),
        ("169.254.169.254", False, False),
        ("fd00:ec2::254", False, False),
        ("100.100.100.200", False, False),
        ("168.63.129.16", False, False),
        ("192.0.0.192", False, False),
        ("::ffff:168.63.129.16", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("64:ff9b::a9fe:a9fe", False, False),
        ("fe80::1%eth0", False, False),
        ("0.0.0.0", False, False),
        ("224.0.0.1", False, False),
    ],
)
def test_only_public_addresses_are_connected_to_unless_private_ones_are_allowed(
    address: str, public: bool, private: bool
) -> None:
    assert (may_connect(address, private=False), may_connect(address, private=True)) == (public, private)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://user:secret@example.com/", "a user"),
        ("https://example.com/#a", "a fragment"),
        ("https://example.com/a b", "blanks"),
        ("ftp://example.com/", "no URL"),
        ("https:///path", "no URL"),
        ("https://example.com:99999/", "no URL"),
        ("https://a..b/", "no name"),
        ("https://.example.com/", "no name"),
        (f"https://{'a' * 64}.example.com/", "no name"),
        ("http://example.com/", "readable"),
        ("https://127.0.0.1/", "private"),
        ("https://localhost/", "private"),
        ("https://[::ffff:10.0.0.1]/", "private"),
        ("https://169.254.169.254/latest", "private"),
    ],
)
def test_an_address_that_nothing_may_be_sent_to_is_refused(url: str, says: str) -> None:
    with pytest.raises(ChangeInvalid, match=says) as refused:
        checked_url(url, private=False)
    assert refused.value.fix.endswith(".")


def test_http_is_for_this_machine_only_and_only_when_private_addresses_are_allowed() -> None:
    assert checked_url("http://127.0.0.1:8080/in", private=True)
    assert checked_url("http://localhost/in", private=True)
    with pytest.raises(ChangeInvalid, match="readable"):
        checked_url("http://10.0.0.1/in", private=True)
    with pytest.raises(ChangeInvalid, match="private"):
        checked_url("http://127.0.0.1:8080/in", private=False)


def test_a_message_is_tried_for_days_and_then_given_up() -> None:
    waits = [retry_at_us(attempts, 0, 0.5) for attempts in range(1, len(BACKOFF_S) + 1)]
    assert [int(wait or 0) // 1_000_000 for wait in waits] == list(BACKOFF_S)
    assert sum(BACKOFF_S) > 3 * 86_400
    assert retry_at_us(len(BACKOFF_S) + 1, 0, 0.5) is None


def test_a_percentage_is_reached_at_the_unit() -> None:
    both = frozenset({80, 100})
    assert [crossed(units, 10, both) for units in (7, 8, 9, 10)] == [[], [80], [80], [80, 100]]
    assert crossed(5, 0, both) == []
