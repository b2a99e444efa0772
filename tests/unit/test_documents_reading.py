"""Reading YAML: what a value means, where it stands, and what is refused before it can do harm."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from licet.domain.catalog import Feature
from licet_control_plane.core.documents import SourceFile, validate
from licet_control_plane.core.documents.reading import DEPTH_MAX, DOCUMENTS_MAX, FILE_BYTES_MAX
from tests.support.documents import MARK, catalog_of, only_error, validated


def test_reads_many_documents_from_many_files() -> None:
    catalog = catalog_of("kind: Feature\nname: a\n---\nkind: Feature\nname: b\n", "kind: Feature\nname: c\n")
    assert list(catalog.features) == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n", "---\nkind: Feature\nname: a\n---\n"])
def test_empty_documents_are_nothing(text: str) -> None:
    assert len(catalog_of(text).features) <= 1


@pytest.mark.parametrize("word", ["no", "on", "y", "12:30", "2026-01-01", "1.2.3", "0x1F", "010"])
def test_words_that_old_yaml_would_convert_stay_words(word: str) -> None:
    assert catalog_of(f"kind: Feature\nname: a\ntitle: {word}\n").features["a"].title == word


def test_numbers_may_have_underscores() -> None:
    catalog = catalog_of(
        """
        {kind: Feature, name: f}
        ---
        {kind: Action, name: a, feature: f}
        ---
        {kind: Plan, name: p, features: {f: {limits: [{amount: 10_000_000, per: month}]}}}
        """
    )
    assert catalog.plans["p"].features["f"].limits[0].amount == 10_000_000


def test_an_alias_repeats_a_value() -> None:
    text = "kind: Feature\nname: a\nunit: &unit token\ntitle: *unit\n"
    assert catalog_of(text).features["a"] == Feature("a", "token", "token")


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("kind: Feature\nname: a\n▶name: b\n", "the key 'name' is there twice; first at 2:1", "Remove one"),
        ("kind: Feature\nname: a\n▶<<: {title: x}\n", "merge keys (<<) are not supported", "alias"),
        ("kind: Feature\nname: ▶!!python/object:os.system a\n", "tags such as !!python/object:os.system", "Remove it"),
        ("kind: Feature\nname: ▶!secret a\n", "tags such as !secret", "Remove it"),
        ("kind: Feature\nname: ▶*missing\n", "there is no anchor &missing", "Define the anchor first"),
        ("kind: Feature\nname: &a [▶*a]\n", "stands inside its own anchor", "Write the value out"),
        ("? ▶[a]\n: b\n", "a key must be a word, not a list", "Quote it"),
        ("kind: Feature\nname: a\ntitle: b▶: c\n", "mapping values are not allowed", "Quote a value"),
        ("kind: Feature\n▶\tname: a\n", "found a tab character", "Indent with spaces"),
        ('kind: Feature\nname: "a▶', "unexpected end of stream", "Close the quote"),
        ('kind: Feature\nname: "ä▶\x07"\n', "the character U+0007 is not allowed", "Remove the character"),
        ("kind: Feature\nname: a\n---\n▶- a list\n", "a document must be a mapping", "Begin it with 'kind: …'"),
        ("kind: Feature\nname: a\n---\n▶just text\n", "a document must be a mapping", "Begin it with 'kind: …'"),
        ("[" * DEPTH_MAX + "▶[" + "]" * (DEPTH_MAX + 1), f"nested more than {DEPTH_MAX} deep", "flatter"),
    ],
)
def test_refuses_at_its_place(text: str, message: str, fix: str) -> None:
    error = only_error(text)
    assert message in error.message
    assert fix in error.fix


def test_refuses_aliases_that_multiply() -> None:
    levels = ["l0: &l0 [1,1,1,1,1,1,1,1,1,1]"]
    levels += [f"l{n}: &l{n} [{','.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9)]
    result = validated("\n".join(levels))
    assert "counting what aliases stand for" in result.errors[0].message


def test_refuses_a_file_one_byte_too_large() -> None:
    document = "kind: Feature\nname: a\n"
    assert validated(document.ljust(FILE_BYTES_MAX, "#")).errors == ()
    assert str(FILE_BYTES_MAX) in validated(document.ljust(FILE_BYTES_MAX + 1, "#")).errors[0].message


def test_refuses_a_bundle_of_too_many_documents() -> None:
    half = "kind: Feature\n---\n" * (DOCUMENTS_MAX // 2)
    result = validated(half, half, "kind: Feature\n")
    assert any(f"more than {DOCUMENTS_MAX} documents" in error.message for error in result.errors)


def test_an_unreadable_file_hides_no_errors_of_the_others() -> None:
    result = validated("kind: [", "kind: Feature\nname: Not A Name\n")
    assert [error.file for error in result.errors] == ["1.yaml", "2.yaml"]


def test_names_that_may_stand_in_an_unread_part_are_not_missed() -> None:
    result = validated("kind: Feature\nname: f\ntitle: a: b\n", "kind: Action\nname: a\nfeature: f\n")
    assert [error.file for error in result.errors] == ["1.yaml"]


def test_an_error_says_file_line_column_document_field_problem_and_fix() -> None:
    error = only_error(f"kind: Feature\nname: a\n{MARK}tilte: x\n")
    assert str(error) == ("1.yaml:3:1: Feature a: tilte: there is no field 'tilte' here. Did you mean 'title'?")


@settings(max_examples=200)
@given(st.text(alphabet=st.sampled_from("kind:Featur\n -[]{}&*!|>'\"#,?%@`0\t."), max_size=60))
def test_whatever_is_written_gives_errors_and_never_an_exception(text: str) -> None:
    result = validate([SourceFile("1.yaml", text)])
    assert (result.catalog is None) == bool(result.errors)
