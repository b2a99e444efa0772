"""Files that people keep of what the server signed, such as a checkpoint: written as JSON, read for what is signed."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from licet_control_plane.cli.arguments import bad
from licet_control_plane.cli.failure import EXIT_USAGE, CliError


def write(path: Path, answer: dict[str, Any]) -> None:
    """Keep an answer of the server.

    Raises:
        CliError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(answer, indent=2) + "\n")
    except OSError as error:
        raise CliError(
            f"{path} cannot be written: {error.strerror}.",
            fix="name another file with --output",
            exit_code=EXIT_USAGE,
        ) from error


def document_in(path: Path, *, kind: str, option: str, made_by: str) -> str:
    """What is signed in a file of ``kind``, base64, as the API takes it. ``option`` named the file; ``made_by`` is the
    command that writes such files.

    Raises:
        CliError: it cannot be read, or is no such file.
    """
    fix = f"make one with: {made_by} --output FILE"
    try:
        found = json.loads(path.read_text())
        if found["kind"] != kind:
            raise bad(f"{option} {path}: its kind is {found['kind']!r}, not {kind!r}.", fix)
        return base64.b64encode(base64.b64decode(found["document"], validate=True)).decode()
    except OSError as error:
        raise bad(f"{option} {path} cannot be read: {error.strerror}.", fix) from error
    except (KeyError, TypeError, binascii.Error, ValueError) as error:
        raise bad(f"{option} {path}: it is not a {kind}.", fix) from error
