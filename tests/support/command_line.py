"""Runs ``licet`` in this process, as the console script would, and keeps what it wrote."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from licet_control_plane.cli.entry import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output, which is all that ``--json`` promises."""
        return json.loads(self.out.splitlines()[-1])


class CommandLine:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Ended:
        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["licet", *map(str, arguments)])
        code = main()
        captured = self._capsys.readouterr()
        return Ended(code, captured.out, captured.err)


@pytest.fixture
def licet_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """The command line, on a machine where no stack runs and nothing is set."""
    for name in ("LICET_SERVER", "LICET_API_KEY", "LICET_SIDECAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LICET_CONTEXT", str(tmp_path / "no-stack.json"))
    return CommandLine(monkeypatch, capsys)
