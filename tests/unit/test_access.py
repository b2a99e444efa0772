"""Roles, the text of API keys, and counting attempts in bounded memory."""

from __future__ import annotations

import pytest

from licet_control_plane.core.access import (
    KEY_PATTERN,
    Need,
    Role,
    allowed,
    is_mistyped,
    key_id_of,
    key_text,
)
from licet_control_plane.core.attempts import Attempts, source_of

MAY = {
    Role.ADMIN: {"read", "read records", "change", "approve", "manage", "hand in"},
    Role.OPERATOR: {"read", "read records", "change"},
    Role.APPROVER: {"read", "approve"},
    Role.AUDITOR: {"read", "read records"},
    Role.SIDECAR: {"hand in"},
}


@pytest.mark.parametrize("role", Role)
def test_a_role_may_exactly_what_is_written_down(role: Role) -> None:
    assert {need.value for need in Need if allowed(role, need)} == MAY[role]


@pytest.mark.parametrize("secret", [bytes(32), bytes([255] * 32), bytes(range(32))])
def test_a_key_has_the_documented_form_and_says_its_id(secret: bytes) -> None:
    key = key_text(bytes.fromhex("0a1b2c3d4e5f"), secret)
    assert KEY_PATTERN.fullmatch(key)
    assert key_id_of(key) == "0a1b2c3d4e5f"
    assert not is_mistyped(key)


def test_a_key_with_one_other_character_is_known_to_be_mistyped() -> None:
    key = key_text(b"123456", bytes(range(32)))
    for place in range(len("licet_"), len(key)):
        other = "1" if key[place] != "1" else "2"
        changed = key[:place] + other + key[place + 1 :]
        assert is_mistyped(changed) or KEY_PATTERN.fullmatch(changed) is None


def test_keys_of_different_secrets_differ() -> None:
    assert key_text(b"123456", bytes(32)) != key_text(b"123456", bytes(31) + b"\1")


def test_who_tried_too_often_waits_and_others_do_not() -> None:
    attempts = Attempts(burst=3, per_s=0.5)
    assert [attempts.take("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert attempts.wait_s("a", 0.0) == 2.0
    assert attempts.wait_s("b", 0.0) == 0.0
    assert attempts.take("a", 2.0)
    assert not attempts.take("a", 2.0)
    assert attempts.wait_s("a", 1e9) == 0.0


def test_sources_are_bounded_and_the_quietest_makes_room() -> None:
    attempts = Attempts(burst=1, per_s=0.001, sources_max=3)
    for source in "abcd":
        attempts.take(source, 0.0)
    assert len(attempts) == 3
    assert attempts.wait_s("a", 0.0) == 0.0
    assert attempts.wait_s("d", 0.0) > 0


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:2", "2001:db8::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("unix", "unix"),
    ],
)
def test_neighbors_of_an_ipv6_address_are_one_source(address: str, source: str) -> None:
    assert source_of(address) == source
