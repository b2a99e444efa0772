"""How the texts on a command line are read, and where a command finds its servers."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from licet_control_plane.cli.arguments import amount, amounts, context_values, counts, instant, seconds
from licet_control_plane.cli.context import (
    DevContext,
    context_path,
    process_started,
    read_context,
    remove_context,
    server_target,
    sidecar_targets,
    write_context,
)
from licet_control_plane.cli.failure import EXIT_USAGE, CliError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("500ms", 0.5), ("60s", 60), ("5m", 300), ("1h", 3600), ("30d", 2_592_000), ("2", 2), ("1.5s", 1.5)],
)
def test_reads_durations(text: str, expected: float) -> None:
    assert seconds(text, "--timeout") == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "soon", "-5s", "5 days", "1e3"])
def test_refuses_what_is_no_duration(text: str) -> None:
    with pytest.raises(CliError) as caught:
        seconds(text, "--timeout")
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.fix


def test_reads_counts_whose_names_hold_colons() -> None:
    assert counts(["llm.tokens:month=1_000", "b=0"], "--override") == {"llm.tokens:month": 1000, "b": 0}
    assert counts(None, "--override") == {}


@pytest.mark.parametrize("pair", ["a", "a=", "=5", "a=x", "a=-1", "a=1.5", f"a={2**53}"])
def test_refuses_what_is_no_count(pair: str) -> None:
    with pytest.raises(CliError, match="--meter"):
        counts([pair], "--meter")


def test_reads_amounts_of_units_and_of_money() -> None:
    assert amount("1_000", "--amount") == 1_000
    assert amount("50 USD", "--amount") == "50.00 USD"
    pairs = ["reports:month=5", "tokens:month@context.team.usd=0.5 USD"]
    assert amounts(pairs, "--override") == {"reports:month": 5, "tokens:month@context.team.usd": "0.50 USD"}
    assert amounts(None, "--override") == {}


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "50.00USD", "-5 USD", str(2**53), "9007200 USD"])
def test_refuses_what_is_no_amount(text: str) -> None:
    with pytest.raises(CliError, match="--amount") as caught:
        amount(text, "--amount")
    assert caught.value.fix


@pytest.mark.parametrize("pair", ["a", "=5", "a=", "a=x"])
def test_refuses_what_is_no_pair_of_limit_and_amount(pair: str) -> None:
    with pytest.raises(CliError, match="--override"):
        amounts([pair], "--override")


def test_guesses_the_type_of_context_unless_told() -> None:
    pairs = ["a=x", "n=5", "r=0.5", "b=true", "s:string=5", "d:double=5", "l:list=x,y", "e=", "q=a=b"]
    assert context_values([*pairs, "t:timestamp=2027-01-31T18:00:00+02:00"]) == {
        "a": "x", "n": 5, "r": 0.5, "b": True, "s": "5", "d": 5.0, "l": ["x", "y"], "e": "", "q": "a=b",
        "t": datetime(2027, 1, 31, 16, tzinfo=UTC),
    }  # fmt: skip


@pytest.mark.parametrize("pair", ["a", "=1", "n:int=x", "n:number=1", "b:bool=yes", "t:timestamp=soon"])
def test_refuses_what_is_no_context(pair: str) -> None:
    with pytest.raises(CliError, match="--context"):
        context_values([pair])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2027-01-31", "2027-01-31T00:00:00Z"),
        ("2027-01-31T18:00:00+02:00", "2027-01-31T16:00:00Z"),
        ("2027-01-31T18:00:00Z", "2027-01-31T18:00:00Z"),
    ],
)
def test_reads_instants_as_utc(text: str, expected: str) -> None:
    assert instant(text, "--ends") == expected


@pytest.fixture
def context_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state" / "dev.json"
    monkeypatch.setenv("LICET_CONTEXT", str(path))
    return path


def own_context() -> DevContext:
    pid = os.getpid()
    return DevContext(pid, process_started(pid), "http://127.0.0.1:1", "key", ["127.0.0.1:2"], "redis://r", "/d")


def test_finds_a_running_stack_without_flags(context_file: Path) -> None:
    write_context(own_context())
    assert stat.S_IMODE(context_file.stat().st_mode) == 0o600
    target = server_target(None, None)
    assert (target.server, target.api_key) == ("http://127.0.0.1:1", "key")
    assert sidecar_targets(None) == ["127.0.0.1:2"]


def test_flags_win_and_the_key_stays_with_its_server(context_file: Path) -> None:
    write_context(own_context())
    assert server_target("http://127.0.0.1:1/", None).api_key == "key"
    assert server_target("example.test:80", "other").server == "http://example.test:80"
    with pytest.raises(CliError, match="no API key"):
        server_target("http://example.test", None)
    assert sidecar_targets(["a:1,b:2", "c:3"]) == ["a:1", "b:2", "c:3"]


def test_ignores_the_context_of_a_process_that_is_gone(context_file: Path) -> None:
    gone = own_context()
    write_context(DevContext(gone.pid, "an earlier start", *(getattr(gone, f) for f in DevContext.__slots__[2:])))
    assert read_context() is None
    assert sidecar_targets(None) == ["127.0.0.1:7420"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"pid": 1}', "\x00"])
def test_ignores_a_context_file_that_is_broken(context_file: Path, content: str) -> None:
    context_file.parent.mkdir()
    context_file.write_text(content)
    assert read_context() is None


def test_removes_only_its_own_context(context_file: Path) -> None:
    write_context(own_context())
    remove_context(os.getpid() + 1)
    assert context_file.exists()
    remove_context(os.getpid())
    assert not context_file.exists()
    remove_context(os.getpid())


def test_keeps_state_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LICET_CONTEXT", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert context_path() == Path("/state/licet/dev.json")
