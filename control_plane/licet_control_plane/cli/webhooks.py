"""``licet webhook create|list|show|delete|enable|rotate-secret|test|deliveries|redeliver``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, seconds
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, note, say, table

WebhookArgument = Annotated[str, typer.Argument(help="Its id, as `licet webhook list` shows it.", metavar="WEBHOOK")]


def create(
    url: Annotated[str, typer.Argument(help="Where to: https, or http on this machine.", metavar="URL")],
    event: Annotated[
        list[str] | None, typer.Option("--event", help="Such as license.expiring; may be repeated. [default: all]")
    ] = None,
    threshold: Annotated[
        list[int] | None, typer.Option("--threshold", help="Percent of a quota; may be repeated. [default: 80, 100]")
    ] = None,
    shortest_window: Annotated[
        str, typer.Option("--shortest-window", help="Thresholds of windows that are at least so long: minute to year.")
    ] = "hour",
    tenant: Annotated[str, typer.Option("--tenant", help="Only events of this tenant.")] = "",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Send events to an address from now on. Prints the secret that signs them, once.

    \b
    Example:
      licet webhook create https://example.com/licet --event license.expiring --event quota.threshold --threshold 90
    """
    from licet_control_plane.cli.rest import ControlPlane

    body: dict[str, Any] = {"url": url, "shortest_window": shortest_window, "tenant": tenant}
    if event:
        body["events"] = event
    if threshold:
        body["thresholds"] = threshold
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"creating a webhook on {control_plane.target.server}")
        made = control_plane.post("/v1/webhooks", body)
    _shown_with_secret(made, as_json)


def list_(as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """List webhooks.

    \b
    Example:
      licet webhook list
    """
    found = _ask("get", "/v1/webhooks", server, api_key)
    if as_json:
        emit_json(found)
        return
    columns = ("id", "url", "events", "tenant", "waiting", "dropped", "failing_since", "disabled_why")
    table(columns, ([item[column] for column in columns] for item in found["items"]), numeric=("waiting", "dropped"))


def show(
    webhook: WebhookArgument, as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None
) -> None:
    """Show one webhook.

    \b
    Example:
      licet webhook show wh_0123456789abcdef
    """
    _shown(_ask("get", _path(webhook), server, api_key), as_json)


def delete(
    webhook: WebhookArgument, as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None
) -> None:
    """Send nothing to it any more, and drop what was not delivered.

    \b
    Example:
      licet webhook delete wh_0123456789abcdef
    """
    _shown(_ask("delete", _path(webhook), server, api_key), as_json)


def enable(
    webhook: WebhookArgument, as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None
) -> None:
    """Send to a webhook again that was disabled. What waits comes first.

    \b
    Example:
      licet webhook enable wh_0123456789abcdef
    """
    _shown(_ask("post", f"{_path(webhook)}/enable", server, api_key, {}), as_json)


def rotate_secret(
    webhook: WebhookArgument,
    overlap: Annotated[
        str, typer.Option("--overlap", help="How long requests are signed with the old secret too: 0, 1h, 7d.")
    ] = "24h",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Replace the secret of a webhook. Prints the new one, once.

    \b
    Example:
      licet webhook rotate-secret wh_0123456789abcdef --overlap 7d
    """
    body = {"overlap_s": int(seconds(overlap, "--overlap"))}
    _shown_with_secret(_ask("post", f"{_path(webhook)}/secret", server, api_key, body), as_json)


def send_test(
    webhook: WebhookArgument, as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None
) -> None:
    """Send it webhook.test now; `licet webhook deliveries` says how that went.

    \b
    Example:
      licet webhook test wh_0123456789abcdef
    """
    _shown(_ask("post", f"{_path(webhook)}/test", server, api_key, {}), as_json)


def deliveries(
    webhook: WebhookArgument,
    limit: Annotated[int, typer.Option("--limit", help="The newest so many.", min=1, max=1_000)] = 20,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """What a webhook was told in the last 30 days, the newest first, and what it answered.

    \b
    Example:
      licet webhook deliveries wh_0123456789abcdef
    """
    found = _ask("get", f"{_path(webhook)}/deliveries?limit={limit}", server, api_key)
    if as_json:
        emit_json(found)
        return
    columns = ("id", "type", "tenant", "at", "state", "attempts", "next_at", "status", "error")
    table(columns, ([item[column] for column in columns] for item in found["items"]), numeric=("attempts",))


def redeliver(
    webhook: WebhookArgument,
    message: Annotated[str, typer.Option("--message", help="The id of one; without it, all that failed.")] = "",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Send a message again, or all that failed for good.

    \b
    Example:
      licet webhook redeliver wh_0123456789abcdef --message msg_0123456789abcdef01234567
    """
    found = _ask("post", f"{_path(webhook)}/redeliver", server, api_key, {"message": message})
    if as_json:
        emit_json(found)
    else:
        say(f"{found['messages']} messages are sent again")


def _path(webhook: str) -> str:
    from urllib.parse import quote

    return f"/v1/webhooks/{quote(webhook, safe='')}"


def _ask(
    method: str, path: str, server: str | None, api_key: str | None, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        if method != "get":
            note(f"on {control_plane.target.server}")
        send = getattr(control_plane, method)
        found: dict[str, Any] = send(path) if body is None else send(path, body)
        return found


def _shown(webhook: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(webhook)
    else:
        _print_webhook(webhook)


def _shown_with_secret(webhook: dict[str, Any], as_json: bool) -> None:
    _shown(webhook, as_json)
    if not as_json:
        say(f"  secret     {webhook['secret']}")
        note("keep the secret: it is not shown again")


def _print_webhook(webhook: dict[str, Any]) -> None:
    state = f"disabled: {webhook['disabled_why']}" if webhook["disabled_at"] else "enabled"
    say(f"{webhook['id']}  {webhook['url']}  {state}")
    say(f"  events     {', '.join(webhook['events'])}")
    percents = ", ".join(f"{percent} %" for percent in webhook["thresholds"])
    windows = f", of windows of a {webhook['shortest_window']} or longer"
    say(f"  thresholds {percents + windows if percents else 'none'}")
    say(f"  tenant     {webhook['tenant'] or 'all'}")
    say(f"  waiting    {webhook['waiting']}")
    if webhook["old_secret_until"]:
        say(f"  old secret signs too until {webhook['old_secret_until']}")
    if webhook["dropped"]:
        say(f"  dropped    {webhook['dropped']} thresholds, because too many waited")
    if webhook["failing_since"]:
        say(f"  failing    since {webhook['failing_since']}")
