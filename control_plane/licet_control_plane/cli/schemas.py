"""``licet policy schema``: JSON Schemas of documents, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from licet_control_plane.cli.arguments import JsonOption, bad
from licet_control_plane.cli.failure import CliError
from licet_control_plane.cli.output import emit_json, say


def schema(
    kind: Annotated[
        str, typer.Argument(metavar="[KIND]", help="A kind, such as Plan; without it, any kind of a bundle.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write all of them to this directory, KIND.json each.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the JSON Schema of documents, so that an editor completes and checks them while they are written.

    Editors with a YAML language server take it from a first line such as

      # yaml-language-server: $schema=schemas/Document.json

    What an editor cannot see, names of other documents and conditions among it, `licet policy validate` checks.

    \b
    Examples:
      licet policy schema > Document.json
      licet policy schema Plan
      licet policy schema --output schemas/
    """
    from licet_control_plane.core.documents.json_schema import ANY, KINDS, schema_of
    from licet_control_plane.core.suggestion import did_you_mean

    if kind and kind not in KINDS:
        raise bad(f"KIND: there is no kind {kind!r}.", did_you_mean(kind, KINDS))
    if out is None:
        emit_json(schema_of(kind or ANY))
        return
    written = []
    for one in (kind,) if kind else KINDS:
        path = out / f"{one}.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(schema_of(one), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CliError(f"{path}: cannot be written: {error.strerror}.", fix="check the directory") from error
        written.append(str(path))
    if as_json:
        emit_json({"files": written})
        return
    for name in written:
        say(f"  {name}")
