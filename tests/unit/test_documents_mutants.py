"""Valid documents of every kind, broken at random: each is refused, all of them at once, each at its place."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from licet_control_plane.core.documents import SourceFile, validate
from licet_control_plane.core.documents.findings import Findings
from licet_control_plane.core.documents.reading import read
from licet_control_plane.core.documents.sources import SOURCE_OF_KIND

Written = dict[str, Any]
Break = Callable[[random.Random, Written], str | None]
"""Breaks a document, and returns its text when it is not just what is left of it; ``None``: it does not apply."""

MORE: Final = """\
{kind: Plan, name: pro-plus, extends: pro, without: [insights]}
---
{kind: Role, name: head, includes: [analyst], actions: [llm.*]}
"""


def examples() -> list[Written]:
    texts = [path.read_text() for path in sorted((Path(__file__).parents[2] / "examples" / "catalog").glob("*.yaml"))]
    findings = Findings()
    read_ = [read(SourceFile("1.yaml", text), findings)[0] for text in (*texts, MORE)]
    return [document.root.plain() for documents in read_ for document in documents]


DOCUMENTS: Final = examples()


def _text(document: Written) -> str:
    return json.dumps(document, indent=2)


def unknown_field(rng: random.Random, document: Written) -> str | None:
    return _text({**document, rng.choice(("naem", "x", "featuresof")): rng.choice((1, "a", None))})


def another_type(rng: random.Random, document: Written) -> str | None:
    field = rng.choice(list(document))
    return _text({**document, field: rng.choice(({"of": ["another"]}, [["a"]]))})


def missing_field(rng: random.Random, document: Written) -> str | None:
    field = rng.choice(("name", "kind"))
    return _text({name: value for name, value in document.items() if name != field})


def repeated_key(rng: random.Random, document: Written) -> str | None:
    first, rest = _text(document).split("\n", 1)
    return f'{first}\n  "kind": "{document["kind"]}",\n{rest}'


def cut_off(rng: random.Random, document: Written) -> str | None:
    return _text(document)[: -rng.randint(1, 2)]


def unknown_name(rng: random.Random, document: Written) -> str | None:
    changed = {
        "Action": {"feature": "nobody.has"} if "feature" in document else {"meters": {"in": "nobody.has"}},
        "Plan": {"features": {"nobody.has": {}}},
        "Flag": {"feature": "nobody.has"},
        "Role": {"includes": ["analyst", "nobody.has"]},
        "Policy": {"rules": [{"name": "r", "effect": "require_approval", "approval": "nobody.has"}]},
    }.get(document["kind"])
    return _text({**document, **changed}) if changed else None


def circle(rng: random.Random, document: Written) -> str | None:
    changed = {"Plan": {"extends": document["name"]}, "Role": {"includes": [document["name"]]}}.get(document["kind"])
    return _text({**document, **changed}) if changed else None


def overflow(rng: random.Random, document: Written) -> str | None:
    if document["kind"] != "Plan":
        return None
    broken = rng.choice(
        (
            {"limits": [{"amount": rng.choice((2**53, 10**29, -1)), "per": "day"}]},
            {"limits": [{"spend": "9007199254741.00 USD", "per": "day"}]},
            {"price": {"amount": "1." + "0" * 9 + "1", "currency": "USD"}},
            {"seats": 1_000_001},
            {"seats": 1, "heartbeat": "9999999h"},
        )
    )
    return _text({**document, "features": {"reports": broken}})


def broken_condition(rng: random.Random, document: Written) -> str | None:
    if document["kind"] != "Policy":
        return None
    when = rng.choice(
        ("1 +", "quantity", "'a' == 1", "context.nothing == 'x'", "(", "quantity > 1 &&& true", "a" * 5_000)
    )
    return _text({**document, "rules": [*document["rules"], {"name": "broken", "effect": "deny", "when": when}]})


BREAKS: Final[tuple[Break, ...]] = (
    unknown_field,
    another_type,
    missing_field,
    repeated_key,
    cut_off,
    unknown_name,
    circle,
    overflow,
    broken_condition,
)


def test_what_is_broken_was_sound_and_of_every_kind() -> None:
    files = [SourceFile(f"{place}.yaml", _text(document)) for place, document in enumerate(DOCUMENTS)]
    assert validate(files).errors == ()
    assert {document["kind"] for document in DOCUMENTS} == set(SOURCE_OF_KIND)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_every_broken_document_is_refused_at_its_place_all_at_once(seed: int, count: int) -> None:
    rng = random.Random(seed)
    texts = {f"{place}.yaml": _text(document) for place, document in enumerate(DOCUMENTS)}
    broken: dict[str, str] = {}
    for place in rng.sample(range(len(DOCUMENTS)), count):
        document = DOCUMENTS[place]
        ways = [(way.__name__, text) for way in BREAKS if (text := way(rng, document)) is not None]
        name, texts[f"{place}.yaml"] = rng.choice(ways)
        broken[f"{place}.yaml"] = name
    result = validate([SourceFile(path, text) for path, text in texts.items()])
    assert result.catalog is None
    # What stands between documents is looked at when every file could be read to its end, and conditions over actions
    # that could be read.
    kinds = {DOCUMENTS[int(path.partition(".")[0])]["kind"] for path in broken}
    hidden = {"unknown_name", "circle", "broken_condition"} if "cut_off" in broken.values() else set()
    hidden |= {"broken_condition"} if "Action" in kinds else set()
    expected = {path for path, name in broken.items() if name not in hidden}
    assert expected <= {error.file for error in result.errors}, (broken, [str(error) for error in result.errors])
    for error in result.errors:
        lines = texts[error.file].split("\n")
        assert 1 <= error.line <= len(lines) + 1
        assert 1 <= error.column <= len(lines[min(error.line, len(lines)) - 1]) + 1
        assert error.message
        assert error.code
        assert "\n" not in str(error)
