"""``licet sidecar list`` and ``licet status``."""

from __future__ import annotations

from typing import Any, Final

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, say, table

_NUMERIC: Final = ("revision", "log lag", "log bytes", "tenants", "heard s ago")


def list_(as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """The sidecars, the revision each one serves, and how far the ledger is behind its log.

    \b
    Example:
      licet sidecar list
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get("/v1/sidecars")
    if as_json:
        emit_json(result)
        return
    rows = (
        (
            str(item["sidecar"])[:12],
            item.get("address"),
            item.get("hostname"),
            item.get("version"),
            item.get("state"),
            item.get("ready"),
            item.get("revision"),
            _lag(item),
            item.get("log_bytes"),
            item.get("tenants_held"),
            _one_decimal(item.get("last_heard_s")),
        )
        for item in result["items"]
    )
    columns = ("sidecar", "address", "host", "version", "state", "ready", *_NUMERIC)
    table(columns, rows, numeric=_NUMERIC)


def status(as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """How the control plane, its database, Redis and the ledger are doing.

    \b
    Example:
      licet status
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get("/v1/status")
        if as_json:
            emit_json(result)
            return
        say(f"control plane  {control_plane.target.server}")
    _print_tree(result, "")


def _print_tree(values: dict[str, Any], indent: str) -> None:
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        if isinstance(value, dict) and value:
            say(f"{indent}{name}")
            _print_tree(value, indent + "  ")
        else:
            say(f"{indent}{name:<{width}}  {'-' if value is None else value}")


def _lag(item: dict[str, Any]) -> int | None:
    last, acked = item.get("log_last_seq"), item.get("log_acked_seq")
    return last - acked if isinstance(last, int) and isinstance(acked, int) else None


def _one_decimal(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
