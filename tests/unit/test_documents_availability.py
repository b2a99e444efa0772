"""What this version cannot do is refused in words, where it stands, and never accepted in silence."""

from __future__ import annotations

import pytest

from licet_control_plane.core.documents.availability import NOT_AVAILABLE
from tests.support.documents import only_error, validated

WORLD = "{kind: Feature, name: f}\n---\n{kind: Action, name: a, feature: f}\n---\n"
ACTION = WORLD + "kind: Action\nname: b\nfeature: f\n"
FLAG = WORLD + "kind: Flag\nname: g\nfeature: f\n"

REFUSED = [
    (FLAG + "▶variants: {a: 50, b: 50}\n", "'variants'", "one flag for each"),
    (FLAG + "▶schedule: []\n", "'schedule'", "Push the change"),
    (FLAG + "rollout: {percent: 5, ▶schedule: []}\n", "'schedule'", "Push the change"),
]


@pytest.mark.parametrize(("text", "said", "fix"), REFUSED)
def test_refuses_at_its_place_and_only_once(text: str, said: str, fix: str) -> None:
    error = only_error(text)
    assert error.message == f"{said} is not available in this version"
    assert fix in error.fix


def test_every_row_of_the_table_is_tested() -> None:
    rows = {(row.kind, row.path[-1], value) for row in NOT_AVAILABLE for value in row.values or {""}}
    assert len(rows) + sum(row.path == ("rollout", "schedule") for row in NOT_AVAILABLE) == len(REFUSED)


def test_a_refusal_does_not_hide_the_other_errors_of_its_document() -> None:
    result = validated(FLAG + "variants: {a: 50}\nrollout: {percent: many}\nscoop: 1\n")
    assert [error.path.rpartition(" ")[2] for error in result.errors] == ["variants", "rollout.percent", "scoop"]


@pytest.mark.parametrize("level", ["logged", "synced", "shipped"])
def test_every_durability_is_taken(level: str) -> None:
    assert not validated(ACTION + f"durability: {level}\n").errors


def test_warns_of_an_action_that_is_priced_in_two_currencies() -> None:
    features = "{kind: Feature, name: f}\n---\n{kind: Feature, name: g}\n---\n"
    action = "{kind: Action, name: a, meters: {x: f, y: g}}\n---\n"
    price = '{{price: {{amount: "1", per_units: 1, currency: {}}}}}'
    plan = f"kind: Plan\nname: p\nfeatures:\n  f: {price.format('USD')}\n  g: {price.format('EUR')}\n"
    (warning,) = validated(features + action + plan).warnings
    assert "'a' is priced in EUR and USD" in warning.message
