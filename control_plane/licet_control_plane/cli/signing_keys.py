"""``licet signing-key generate|rotate|retire|list``: changing the key that documents are signed with."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import (
    ApiKeyOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    seconds,
)
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import CliError
from licet_control_plane.cli.output import emit_json, note, say, table

POLL_S: Final = 0.2
_PATH: Final = "/v1/signing-keys"

ForceOption = Annotated[
    bool, typer.Option("--force", help="Also while live sidecars are in the way: they refuse what is published then.")
]


def generate(as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """Make the next signing key. Nothing is signed with it yet.

    Give its public half to the sidecars beside the one they have, then: licet signing-key rotate.

    \b
    Example:
      licet signing-key generate && licet signing-key list --trust > public-key.txt
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"making a signing key on {control_plane.target.server}")
        made = control_plane.post(_PATH, {})
    if as_json:
        emit_json(made)
    else:
        say(made["public_key"])


def rotate(
    force: ForceOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Sign with the next key from now on, and wait until all that is published is signed with it.

    Refused while a live sidecar does not trust it. Checks go on meanwhile.

    \b
    Example:
      licet signing-key rotate
    """
    from licet_control_plane.cli.rest import ControlPlane

    deadline = time.monotonic() + seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"rotating the signing key of {control_plane.target.server}")
        active: dict[str, Any] = control_plane.post(f"{_PATH}/rotate", {"force": force})
        while active["resigned_at"] is None:
            if time.monotonic() >= deadline:
                raise CliError(
                    f"{active['id']} is active; not everything is signed with it yet.",
                    fix="it goes on by itself: licet signing-key list shows when it is done",
                )
            time.sleep(POLL_S)
            items: list[dict[str, Any]] = control_plane.get(_PATH)["items"]
            active = next(item for item in items if item["id"] == active["id"])
    if as_json:
        emit_json(active)
    else:
        say(f"{active['id']} is active, and everything that is published is signed with it")
        note("take the old public key away from the sidecars, then: licet signing-key retire OLD")


def retire(
    key: Annotated[str, typer.Argument(help="Its id, from the list.", metavar="KEY")],
    force: ForceOption = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Destroy the private half of the previous key, or of a next one that is not wanted after all.

    Refused while a live sidecar still trusts it.

    \b
    Example:
      licet signing-key retire 0a1b2c3d4e5f6071
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"retiring signing key {key} of {control_plane.target.server}")
        retired = control_plane.post(f"{_PATH}/{quote(key, safe='')}/retire", {"force": force})
    if as_json:
        emit_json(retired)
    else:
        say(f"{retired['id']} is retired since {retired['retired_at']}")


def list_(
    trust: Annotated[
        bool, typer.Option("--trust", help="Only the public keys that sidecars should have now, one a line.")
    ] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """List signing keys: which one signs, since when, and how many live sidecars trust each.

    \b
    Example:
      licet signing-key list --trust > public-key.txt
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        found = control_plane.get(_PATH)
    if as_json:
        emit_json(found)
    elif trust:
        for public_key in found["trust"]:
            say(public_key)
    else:
        columns = ("id", "state", "activated_at", "resigned_at", "retired_at", "trusted_by", "not_trusted_by")
        table(columns, ([item[name] for name in columns] for item in found["items"]), numeric=columns[-2:])
