"""``licet usage subject export|erase``: what the ledger holds about somebody."""

from __future__ import annotations

from typing import Annotated

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, bad
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, note, say

TenantArgument = Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")]
SubjectArgument = Annotated[
    str, typer.Argument(help="Type and id, as services name them, such as user/ada.", metavar="TYPE/ID")
]


def export(
    tenant: TenantArgument,
    subject: SubjectArgument,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Every event about somebody, as JSON Lines, by time; those in which others acted on their behalf included.

    \b
    Example:
      licet usage subject export acme user/ada > ada.jsonl
    """
    from licet_control_plane.cli.rest import ControlPlane

    path, body = _request(tenant, subject, "export")
    count = 0
    with ControlPlane(server_target(server, api_key)) as control_plane:
        for line in control_plane.post_lines(path, body):
            print(line)
            count += 1
    note(f"{count:,} events about {subject} of {tenant}")


def erase(
    tenant: TenantArgument,
    subject: SubjectArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do it: it cannot be undone.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Destroy what the ledger holds about somebody: id, resources, attributes, keys of calls.

    What was used stays counted and billed, and the ledger verifies as before. Usage still on its way is not erased: run
    the command again once it has arrived. It is in the audit trail, without the name.

    \b
    Example:
      licet usage subject erase acme user/ada --yes
    """
    from licet_control_plane.cli.rest import ControlPlane

    path, body = _request(tenant, subject, "erase")
    if not yes:
        raise bad(
            f"this destroys what the ledger holds about {subject} of {tenant}, and cannot be undone.",
            "look at it with `licet usage subject export`, then add --yes",
        )
    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.post(path, body)
    if as_json:
        emit_json(result)
    elif result["subjects"]:
        say(f"erased what was personal in {result['events']:,} events of {tenant}")
    else:
        say(f"the ledger holds nothing about {subject} of {tenant}")


def _request(tenant: str, subject: str, verb: str) -> tuple[str, dict[str, str]]:
    from urllib.parse import quote

    type_, slash, id_ = subject.partition("/")
    if not slash or not id_:
        raise bad(f"{subject!r} is not TYPE/ID.", "write it as services name it, such as user/ada")
    return f"/v1/tenants/{quote(tenant, safe='')}/subjects/{verb}", {"type": type_, "id": id_}
