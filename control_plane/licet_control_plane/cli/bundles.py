"""``licet policy validate`` and ``licet policy push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import (
    ApiKeyOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    WaitOption,
    bad,
    seconds,
)
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO, CliError
from licet_control_plane.cli.output import emit_json, note, say

DirectoryArgument = Annotated[Path, typer.Argument(help="Directory of YAML documents (or one file).", metavar="DIR")]

_SUFFIXES: Final = (".yaml", ".yml")
_SUITE_SUFFIXES: Final = ("_test.yaml", "_test.yml")
"""Of files with tests: as in ``core.documents.suites``, which loads too much for every command."""


def validate(
    directory: DirectoryArgument,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when there are warnings, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check documents without publishing them: every error with file, line, column and the fix.

    Warnings tell of what is legal and makes no sense: conditions that are never true, rules that never decide, names
    that nobody has. They are certain, and with --strict they count.

    \b
    Examples:
      licet policy validate catalog/
      licet policy validate catalog/ --strict --json
    """
    sources = read_sources(directory)
    from licet_control_plane.core.documents import SourceFile
    from licet_control_plane.core.documents import validate as validate_documents

    result = validate_documents([SourceFile(path, text) for path, text in sources])
    errors = [error.as_json() for error in result.errors]
    warnings = [warning.as_json() for warning in result.warnings]
    if as_json:
        emit_json({"valid": not errors, "files": len(sources), "errors": errors, "warnings": warnings})
    else:
        print_warnings(warnings, directory)
        print_errors(errors, directory)
        if not errors:
            count = f", {len(warnings)} warning{_s(len(warnings))}" if warnings else ""
            say(f"{directory}: {len(sources)} file{_s(len(sources))}, valid{count}.")
    if errors or (strict and warnings):
        raise typer.Exit(EXIT_NO)


def push(
    directory: DirectoryArgument,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    message: Annotated[str, typer.Option("--message", "-m", help="Why, for the audit trail.")] = "",
    observe: Annotated[
        bool, typer.Option("--observe", help="Answer everything APPROVED and record the real decisions.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change; publish nothing.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Publish a directory of documents, all or nothing.

    \b
    Example:
      licet policy push catalog/ --wait --message "raise the pro limits"
    """
    from licet_control_plane.cli.rest import ControlPlane, Problem

    timeout_s = seconds(timeout, "--timeout")
    sources = read_sources(directory)
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"{'checking against' if dry_run else 'pushing to'} {control_plane.target.server}")
        body: dict[str, Any] = {
            "documents": [{"path": path, "content": text} for path, text in sources],
            "observe": observe,
            "message": message,
            "dry_run": dry_run,
        }
        try:
            result: dict[str, Any] = control_plane.post("/v1/bundles", body)
        except Problem as problem:
            if not any(error.get("file") for error in problem.errors):
                raise  # not about documents
            if as_json:
                emit_json({"published": False, "errors": problem.errors})
            print_errors(problem.errors, directory)
            raise typer.Exit(EXIT_NO) from problem
        print_warnings(result["warnings"], directory)
        published = not dry_run and not result["unchanged"]
        revision = int(result["revision"])
        if not as_json:
            _print_push(result, dry_run=dry_run, observe=observe)
        rollout = None
        if wait and not dry_run:
            rollout = control_plane.wait_for_rollout(revision, timeout_s=timeout_s)
    if as_json:
        emit_json({"published": published, **result, "rollout": rollout})
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)


def read_sources(directory: Path, *, suites: bool = False) -> list[tuple[str, str]]:
    """Path (relative to ``directory``, with forward slashes) and text of each YAML file in it, ordered by path.

    Either the documents, or with ``suites`` the tests that are kept beside them.

    Raises:
        CliError: it is not there, holds no such file, or one cannot be read.
    """
    if directory.is_file():
        # Whoever names one file of documents has the tests for it beside it.
        named = f"{directory.stem}{_SUITE_SUFFIXES[0]}"
        paths, base = [directory.with_name(named) if suites else directory], directory.parent
        paths = [path for path in paths if path.is_file()]
    elif directory.is_dir():
        base = directory
        paths = sorted(
            path
            for path in directory.rglob("*")
            if path.suffix in _SUFFIXES
            and path.name.endswith(_SUITE_SUFFIXES) == suites
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(directory).parts)
        )
    else:
        raise bad(f"{directory}: no such file or directory.", "name the directory that holds your YAML documents")
    if not paths and suites:
        raise bad(
            f"{directory}: no test in it.", "write some in files whose names end in _test.yaml; see docs/documents.md"
        )
    if not paths:
        raise bad(f"{directory}: no .yaml or .yml file in it.", "name the directory that holds your YAML documents")
    sources = []
    for path in paths:
        try:
            sources.append((path.relative_to(base).as_posix(), path.read_text(encoding="utf-8-sig")))
        except UnicodeDecodeError as error:
            raise bad(f"{path}: not UTF-8 at byte {error.start}.", "save the file as UTF-8") from error
        except OSError as error:
            raise bad(f"{path}: cannot be read: {error.strerror}.", "check the permissions of the file") from error
    return sources


def report_rollout(rollout: dict[str, Any], *, timeout_s: float, quiet: bool) -> None:
    """Say who has confirmed the change, and who is not asked any more because it fell silent.

    Raises:
        CliError: not all live sidecars have; names those.
    """
    revision = rollout["revision"]
    for silent in rollout["silent"]:
        note(f"  silent, and so not waited for: {_sidecar_line(silent)}")
    if not rollout["done"]:
        waiting = "".join(f"\n  waiting for {_sidecar_line(sidecar)}" for sidecar in rollout["waiting"])
        reason = waiting or " (the change has not left the control plane yet)"
        raise CliError(
            f"revision {revision} was not confirmed by every sidecar within {timeout_s:g} s:{reason}",
            fix="the change stands, and reaches them once they are back; see `licet sidecar list` and `licet status`",
        )
    confirmed = len(rollout["confirmed"])
    if not quiet:
        say(
            f"live on all {confirmed} sidecar{_s(confirmed)} (revision {revision})."
            if confirmed
            else f"published (revision {revision}); no sidecar is connected."
        )


def _sidecar_line(sidecar: dict[str, Any]) -> str:
    name = " ".join(part for part in (sidecar["sidecar"][:12], sidecar.get("address")) if part)
    return f"{name} at revision {sidecar['revision']}, last heard {sidecar['last_heard_s']:.1f} s ago"


def _print_push(result: dict[str, Any], *, dry_run: bool, observe: bool) -> None:
    if result["unchanged"]:
        say(f"nothing changed; revision {result['revision']} stands.")
        return
    for word, sign in (("added", "+"), ("modified", "~"), ("removed", "-")):
        for name in result["changed"][word]:
            say(f"  {sign} {name}")
    mode = ", in observe mode" if observe else ""
    say("valid; nothing was published." if dry_run else f"published as revision {result['revision']}{mode}.")


def print_errors(
    errors: list[dict[str, Any]], directory: Path | None, *, so: str = "nothing is published while one stands"
) -> None:
    """Where each is and what to do; files are those of ``directory``, or of a bundle that is not on this machine."""
    for error in errors:
        _print_finding(error, directory)
    if errors:
        note(f"{len(errors)} error{_s(len(errors))}; {so}.")


def print_warnings(warnings: list[dict[str, Any]], directory: Path) -> None:
    """Where each is and what to do."""
    for warning in warnings:
        _print_finding(warning, directory, "warning: ")


def _print_finding(finding: dict[str, Any], directory: Path | None, before: str = "") -> None:
    base = Path() if directory is None else directory.parent if directory.is_file() else directory
    where = f" ({finding['path']})" if finding.get("path") else ""
    code = f" [{finding['code']}]" if before else ""
    note(f"{base / finding['file']}:{finding['line']}:{finding['column']}: {before}{finding['message']}{where}{code}")
    if finding.get("fix"):
        note(f"  fix: {finding['fix']}")


def _s(count: int) -> str:
    return "" if count == 1 else "s"
