"""What is made of the contents of a Redis server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from licet_control_plane.core.contents import Contents, Expected, Found, assess

EXPECTED = Expected(
    deployment="d",
    generation=2,
    epoch=3,
    revision=10,
    revision_published=11,
    revision_allocated=12,
    has_manifest=True,
    run_id="run-a",
)
INTACT = Found(run_id="run-a", deployment="d", epoch=3, last_revision=10, has_manifest=True)
EMPTY: dict[str, Any] = {"deployment": "", "epoch": 0, "last_revision": 0, "has_manifest": False}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Contents.INTACT),
        ({"last_revision": 11}, Contents.INTACT),  # announced, and not yet noted as published
        ({"epoch": 2}, Contents.INTACT),  # allocated in the database, and not yet in the sentinel
        ({"run_id": "run-b"}, Contents.NEW_RUN),
        ({"last_revision": 9}, Contents.INCOMPLETE),
        ({"last_revision": 9, "run_id": "run-b"}, Contents.INCOMPLETE),
        ({"has_manifest": False}, Contents.INCOMPLETE),
        (EMPTY, Contents.LOST),
        ({"deployment": "", "epoch": 0}, Contents.LOST),
        ({"last_revision": 13}, Contents.NEWER),
        ({"epoch": 4}, Contents.NEWER),
        ({**EMPTY, "last_revision": 13}, Contents.NEWER),
        ({"head": (2, 11), "acted": (2, 12)}, Contents.INTACT),  # of another publisher; by who asked the control plane
        ({"head": (2, 12)}, Contents.NEWER),
        ({"head": (3, 1)}, Contents.NEWER),
        ({"acted": (2, 13)}, Contents.NEWER),
        ({"acted": (3, 1)}, Contents.NEWER),
        ({"head": (1, 99), "acted": (1, 99)}, Contents.INTACT),  # of the generation before
        ({**EMPTY, "acted": (2, 13)}, Contents.NEWER),
        ({"deployment": "other", "acted": (2, 13)}, Contents.FOREIGN),
        ({"deployment": "other"}, Contents.FOREIGN),
    ],
)
def test_verdict(changes: dict[str, Any], verdict: Contents) -> None:
    assert assess(replace(INTACT, **changes), EXPECTED) is verdict


def test_a_first_start_on_an_empty_server_is_a_loss_of_nothing() -> None:
    fresh = replace(
        EXPECTED,
        generation=1,
        epoch=0,
        revision=0,
        revision_published=0,
        revision_allocated=0,
        has_manifest=False,
        run_id="",
    )
    assert assess(replace(INTACT, **EMPTY), fresh) is Contents.LOST
