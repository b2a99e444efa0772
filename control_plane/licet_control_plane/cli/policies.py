"""``licet policy history | show | export | diff | rollback``: what was pushed, what differs, and going back."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

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
from licet_control_plane.cli.bundles import print_errors, read_sources, report_rollout
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO, EXIT_USAGE, CliError
from licet_control_plane.cli.output import emit_json, note, say, table

RevisionArgument = Annotated[int, typer.Argument(help="A revision, as `licet policy history` lists them.", min=1)]


def history(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many, the newest first.")] = 20,
    before: Annotated[int | None, typer.Option("--before", min=1, help="Only revisions below this one.")] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """List the bundles that were pushed, the newest first: when, by whom, why, and how many documents each changed.

    \b
    Examples:
      licet policy history
      licet policy history --limit 5 --before 120
    """
    from licet_control_plane.cli.rest import ControlPlane

    items: list[dict[str, Any]] = []
    next_: int | None = before
    with ControlPlane(server_target(server, api_key)) as control_plane:
        while len(items) < limit:
            page = control_plane.get("/v1/bundles", before=next_, limit=min(100, limit - len(items)))
            items += page["items"]
            next_ = page["next"]
            if next_ is None:
                break
    if as_json:
        emit_json({"items": items, "next": next_})
        return
    table(
        ("revision", "pushed", "by", "mode", "documents", "message"),
        [
            (
                f"{item['revision']}{' *' if item['current'] else ''}",
                _when(item["at"]),
                item["by"],
                "observe" if item["observe"] else "enforce",
                _counts(item["changed"]),
                item["message"],
            )
            for item in items
        ],
    )
    if items:
        note("* is in force, or about to be")
    if next_ is not None:
        note(f"more: licet policy history --before {next_}")


def show(
    revision: RevisionArgument,
    file: Annotated[str, typer.Option("--file", help="Print this file of it, as it was pushed.")] = "",
    document: Annotated[
        str, typer.Option("--document", metavar="KIND/NAME", help="Print this document of it, such as Plan/pro.")
    ] = "",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Show a bundle: when, by whom, why, what it changed, and what it holds; or one file or document of it.

    \b
    Examples:
      licet policy show 12
      licet policy show 12 --file plans.yaml
      licet policy show 12 --document Plan/pro
    """
    from licet_control_plane.cli.rest import ControlPlane

    if file and document:
        raise bad("--file and --document cannot be given together.", "give one of them")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        if file:
            found = control_plane.get(f"/v1/bundles/{revision}/files")
            _print_part(found["files"], file, revision, "file", as_json)
            return
        if document:
            found = control_plane.get(f"/v1/bundles/{revision}/files", canonical=True)
            parts = [
                {"path": name, "content": text} for one in found["files"] for name, text in _documents(one["content"])
            ]
            _print_part(parts, document, revision, "document", as_json)
            return
        bundle = control_plane.get(f"/v1/bundles/{revision}")
        files = [one["path"] for one in control_plane.get(f"/v1/bundles/{revision}/files")["files"]]
    if as_json:
        emit_json({**bundle, "files": files})
        return
    say(f"revision   {revision}{', in force or about to be' if bundle['current'] else ''}")
    say(f"pushed     {_when(bundle['at'])} UTC by {bundle['by']}")
    say(f"published  {_when(bundle['published_at']) + ' UTC' if bundle['published_at'] else 'not yet'}")
    say(f"mode       {'observe' if bundle['observe'] else 'enforce'}")
    say(f"message    {bundle['message'] or '-'}")
    say(f"files      {', '.join(files)}")
    say("documents  " + ", ".join(f"{one['kind']}/{one['name']}" for one in bundle["documents"]))
    _print_changed(bundle["changed"])


def export(
    revision: Annotated[
        int | None, typer.Argument(metavar="[REV]", help="A revision; without it, what is in force.", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write to; made when it is not there.")
    ] = None,
    canonical: Annotated[
        bool, typer.Option("--canonical", help="Written anew, one file for each kind, without comments.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also into a directory that is not empty.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Write the documents of a bundle to a directory, as they were pushed, each with its apiVersion.

    What is exported and pushed again changes nothing.

    \b
    Examples:
      licet policy export --output catalog/
      licet policy export 12 --canonical --output /tmp/revision-12
    """
    from licet_control_plane.cli.rest import ControlPlane

    if out is None:
        raise bad("--output is missing.", "name a directory to write to: --output catalog/")
    if out.exists() and not out.is_dir():
        raise bad(f"--output {out}: it is a file.", "name a directory")
    if not force and out.is_dir() and any(out.iterdir()):
        raise bad(
            f"--output {out}: the directory is not empty.",
            "name another one, or write over files of the same names with --force",
        )
    with ControlPlane(server_target(server, api_key)) as control_plane:
        if revision is None:
            revision = int(control_plane.get("/v1/bundles/current")["revision"])
        found = control_plane.get(f"/v1/bundles/{revision}/files", canonical=canonical)
    for one in found["files"]:
        _verify_inside(one["path"])
    for one in found["files"]:
        path = out / one["path"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(one["content"], encoding="utf-8", newline="")
        except OSError as error:
            raise CliError(f"{path}: cannot be written: {error.strerror}.", fix="check the directory") from error
    paths = [one["path"] for one in found["files"]]
    if as_json:
        emit_json({"revision": revision, "out": str(out), "files": paths, "as_pushed": found["as_pushed"]})
        return
    for path in paths:
        say(f"  {out / path}")
    say(f"revision {revision}: {len(paths)} file{'' if len(paths) == 1 else 's'}.")
    if not found["as_pushed"] and not canonical:
        note("its files were not kept; they are written anew")


def diff(
    what: Annotated[str, typer.Argument(metavar="DIR|REV", help="A directory of documents, or a revision.")],
    with_: Annotated[
        int | None, typer.Argument(metavar="[REV]", help="The revision to compare with; without it, what is live.")
    ] = None,
    observe: Annotated[bool, typer.Option("--observe", help="DIR is to be pushed with --observe.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Show what changes in meaning: for each plan, feature, limit, price, action, policy rule, role and flag.

    DIR is compared with what is live, as a push would change it; REV alone is what going back to it would change; of
    REV and another REV, the second is the newer. Comments, files and the way things are written do not count.

    Exits with 0 when there is no difference, with 1 when there is, with 2 when the comparison cannot be made.

    \b
    Examples:
      licet policy diff catalog/
      licet policy diff 12
      licet policy diff 12 14
      licet policy diff catalog/ 12
    """
    from licet_control_plane.cli.rest import ControlPlane, Problem

    # A directory named 12 is written ./12.
    revision = int(what) if what.isascii() and what.isdecimal() else None
    body: dict[str, Any] = {}
    if revision is None:
        documents = [{"path": path, "content": text} for path, text in read_sources(Path(what))]
        body = {"before": with_, "documents": documents, "observe": observe}
    elif with_ is None:
        body = {"after": revision}
    else:
        body = {"before": revision, "after": with_}
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"comparing at {control_plane.target.server}")
        try:
            found = control_plane.post("/v1/bundles/diff", body)
        except Problem as problem:
            if any(error.get("file") for error in problem.errors):
                if as_json:
                    emit_json({"errors": problem.errors})
                print_errors(problem.errors, Path(what), so="nothing was compared")
                raise typer.Exit(EXIT_USAGE) from problem
            problem.exit_code = EXIT_USAGE
            raise
    if as_json:
        emit_json(found)
    else:
        print_differences(found["differences"])
        if found["equal"]:
            with_what = f"revision {found['before']}" if found["before"] else "nothing (no bundle was pushed yet)"
            say(f"no difference from {with_what}.")
    if not found["equal"]:
        raise typer.Exit(EXIT_NO)


def rollback(
    revision: RevisionArgument,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    message: Annotated[str, typer.Option("--message", "-m", help="Why, for the audit trail.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change; publish nothing.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Publish the content of an older bundle again, as a new revision, in the mode it had.

    It is validated as a push is, and refused when this version of the control plane does not accept it any more.

    \b
    Examples:
      licet policy rollback 12 --dry-run
      licet policy rollback 12 --wait --message "the new limits were too low"
    """
    from licet_control_plane.cli.rest import ControlPlane, Problem

    timeout_s = seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        doing = "checking a rollback" if dry_run else "rolling back"
        note(f"{doing} of {control_plane.target.server} to revision {revision}")
        try:
            result = control_plane.post(f"/v1/bundles/{revision}/rollback", {"message": message, "dry_run": dry_run})
        except Problem as problem:
            if not any(error.get("file") for error in problem.errors):
                raise
            if as_json:
                emit_json({"published": False, "errors": problem.errors})
            print_errors(problem.errors, None)
            raise CliError(
                f"revision {revision} is not valid any more; nothing was published.",
                fix=f"licet policy export {revision} --output DIR, mend it there, and push it",
            ) from problem
        new = int(result["revision"])
        if not as_json:
            print_differences(result["differences"])
            if result["unchanged"]:
                say(f"nothing changed; revision {new} says what revision {revision} said.")
            elif dry_run:
                say("valid; nothing was published.")
            else:
                mode = ", in observe mode" if result["observe"] else ""
                say(f"revision {revision} is published again, as revision {new}{mode}.")
        rollout = None
        if wait and not dry_run:
            rollout = control_plane.wait_for_rollout(new, timeout_s=timeout_s)
    if as_json:
        emit_json({"published": not dry_run and not result["unchanged"], **result, "rollout": rollout})
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)


def print_differences(differences: list[dict[str, Any]]) -> None:
    """One line for each, with the old and new text of conditions below."""
    signs = {"added": "+", "removed": "-", "changed": "~"}
    for one in differences:
        held = one.get("licenses")
        holders = f"  [{held:,} license{'' if held == 1 else 's'}]" if held else ""
        say(f"  {signs[one['change']]} {one['text']}{holders}")
        if one["path"] and one["path"][-1] in ("condition", "order"):
            for sign, text in (("-", one["before"]), ("+", one["after"])):
                for line in text.splitlines():
                    say(f"      {sign} {line}")


def _print_part(parts: list[dict[str, str]], name: str, revision: int, what: str, as_json: bool) -> None:
    from licet_control_plane.core.suggestion import did_you_mean

    for part in parts:
        if part["path"] == name:
            if as_json:
                emit_json({"revision": revision, what: name, "content": part["content"]})
            else:
                say(part["content"].rstrip("\n"))
            return
    raise CliError(
        f"revision {revision} has no {what} {name!r}.", fix=did_you_mean(name, [part["path"] for part in parts])
    )


def _documents(text: str) -> list[tuple[str, str]]:
    """``Kind/name`` and text of each document of a canonical file, whose form is known."""
    found = []
    for part in re.split(r"^---\n", text, flags=re.MULTILINE):
        kind, name = (re.search(rf"^{key}: '?\"?([^'\"\n]*)", part, re.MULTILINE) for key in ("kind", "name"))
        if kind and name:
            found.append((f"{kind[1]}/{name[1]}", part))
    return found


def _verify_inside(path: str) -> None:
    """Refuses a path that would leave the directory: whoever pushed it chose it."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise CliError(
            f"the bundle has a file {path!r}, which would not be written inside the directory.",
            fix="use --canonical, which chooses the names itself",
        )


def _print_changed(changed: dict[str, list[str]]) -> None:
    for word, sign in (("added", "+"), ("modified", "~"), ("removed", "-")):
        for name in changed[word]:
            say(f"  {sign} {name}")


def _counts(changed: dict[str, list[str]]) -> str:
    signs = (("added", "+"), ("modified", "~"), ("removed", "-"))
    return " ".join(f"{sign}{len(changed[word])}" for word, sign in signs if changed[word])


def _when(at: str) -> str:
    return at[:19].replace("T", " ")
