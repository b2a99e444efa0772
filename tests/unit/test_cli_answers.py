"""Answers of a server that is older than the command line."""

from __future__ import annotations

import pytest

from licet_control_plane.cli.failure import CliError
from licet_control_plane.cli.rest import Answer
from licet_control_plane.cli.simulate import license_of

OLD = {
    "tenant": "acme",
    "plan": "pro",
    "status": "active",
    "starts_at": None,
    "ends_at": None,
    "addons": {},
    "overrides": {},
    "grants": [],
}


def test_a_license_of_a_server_that_knows_no_grace_has_none() -> None:
    license_ = license_of(Answer(OLD))
    assert (license_.grace_s, license_.cancels) == (0, False)


def test_what_an_answer_lacks_is_said() -> None:
    with pytest.raises(CliError, match="no 'plan'"):
        license_of(Answer({"tenant": "acme"}))
    assert Answer().get("plan") is None
