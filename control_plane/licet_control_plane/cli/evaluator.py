"""The sidecar's decision engine as a child process: questions in, answers out, over its standard input and output.

``docs/adr/0027-the-command-line-asks-the-sidecars-engine.md``. Belongs to one thread; ends with the ``with`` block.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from licet.domain.catalog import Catalog, License
from licet.domain.catalog_wire import document_to_wire, license_to_wire
from licet_control_plane.cli.failure import EXIT_USAGE, CliError

_PROGRAM: Final = "licet_sidecar"
ENDS_S_MAX: Final = 5.0
CHECKS_MAX: Final = 500
"""Checks in one line: enough that the process is not switched to for each, few enough to show progress."""


class EngineFailed(CliError):
    """The engine ended, or did not understand: a defect, or two versions that do not fit together."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the decision engine failed: {why}",
            fix="install licet and its sidecar in the same version: pip install 'licet[dev]'",
        )


class Evaluator:
    """A running engine."""

    def __init__(self) -> None:
        """Start it.

        Raises:
            CliError: the sidecar is not installed.
        """
        # Looked for and not imported: the two programs know nothing of each other.
        if importlib.util.find_spec(_PROGRAM) is None:
            raise CliError(
                "this command needs the sidecar's decision engine, which is not installed.",
                fix="pip install 'licet[dev]'",
                exit_code=EXIT_USAGE,
            )
        self._process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, "evaluate"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def load(self, name: str, catalog: Catalog, *, observe: bool = False) -> None:
        """Put a bundle in force under ``name``."""
        documents = [document_to_wire(document) for document in catalog.documents()]
        self._call({"op": "bundle", "name": name, "documents": documents, "observe": observe})

    def begin(self, name: str, license_: License | None) -> None:
        """Forget what was used; then there is at most this license."""
        self._call({"op": "begin", "name": name, "license": license_to_wire(license_) if license_ else None})

    def use(self, name: str, tenant: str, limit: str, units: int, *, who: Mapping[str, Any], now_us: int) -> bool:
        """Count units as used. False when the license has no such limit."""
        answer = self._call(
            {"op": "use", "name": name, "tenant": tenant, "limit": limit, "units": units, "who": who, "now_us": now_us}
        )
        return "unknown_limit" not in answer

    def check(self, name: str, checks: Sequence[Mapping[str, Any]], *, trace: bool = False) -> list[dict[str, Any]]:
        """The answers to checks, in order; what each takes is gone for the next."""
        answers: list[dict[str, Any]] = []
        for start in range(0, len(checks), CHECKS_MAX):
            part = list(checks[start : start + CHECKS_MAX])
            answers += self._call({"op": "check", "name": name, "checks": part, "trace": trace})["answers"]
        return answers

    def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request, separators=(",", ":")) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise EngineFailed(str(error)) from error
        if not line:
            raise EngineFailed(f"it ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise EngineFailed(str(answer["failed"]))
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass  # it ended before it was asked to
        try:
            self._process.wait(ENDS_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
