"""Arguments of the command line: the options that several commands share, and how their texts are read. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Annotated, Final

import typer

from licet.domain.ids import UNITS_MAX
from licet.domain.money import format_budget, parse_budget
from licet_control_plane.cli.failure import EXIT_USAGE, CliError

ServerOption = Annotated[
    str | None, typer.Option("--server", envvar="LICET_SERVER", help="Control plane, http://host:port.")
]
ApiKeyOption = Annotated[
    str | None, typer.Option("--api-key", envvar="LICET_API_KEY", help="API key.", show_default=False)
]
SidecarOption = Annotated[
    list[str] | None,
    typer.Option("--sidecar", envvar="LICET_SIDECAR", help="Sidecar, host:port or unix:/path; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Return when all live sidecars confirm the change.")]
TimeoutOption = Annotated[str, typer.Option("--timeout", help="How long to wait at most: 500ms, 60s, 5m.")]

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, None: 1.0}

ContextScalar = str | int | float | bool | datetime
ContextItem = ContextScalar | list[str]


def bad(message: str, fix: str) -> CliError:
    """The error for an argument that cannot be read."""
    return CliError(message, fix=fix, exit_code=EXIT_USAGE)


def seconds(text: str, option: str) -> float:
    """Seconds of ``500ms``, ``60s``, ``5m``, ``1h``, ``30d`` or a plain number of seconds.

    Raises:
        CliError: it is none of them.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise bad(f"{option} {text!r} is not a duration.", "write it as 500ms, 60s, 5m, 1h or 30d")
    return float(match[1]) * _SECONDS[match[2]]


def counts(pairs: Iterable[str] | None, option: str) -> dict[str, int]:
    """``NAME=NUMBER`` pairs as a map.

    Raises:
        CliError: a pair has another form, or its number is not whole, negative, or too large.
    """
    parsed: dict[str, int] = {}
    for pair in pairs or ():
        name, equals, number = pair.rpartition("=")
        digits = number.replace("_", "")
        if not equals or not name or not (digits.isascii() and digits.isdecimal()):
            raise bad(
                f"{option} {pair!r} must be NAME=NUMBER, a whole number that is not negative.", f"{option} name=5"
            )
        if int(digits) > UNITS_MAX:
            raise bad(f"{option} {pair!r}: the largest number is {UNITS_MAX}.", "give a smaller one")
        parsed[name] = int(digits)
    return parsed


def amount(text: str, option: str) -> int | str:
    """An amount as the API takes it: a whole number of units, or money such as ``50.00 USD``.

    Raises:
        CliError: it is neither, or too large.
    """
    digits = text.replace("_", "")
    if digits.isascii() and digits.isdecimal():
        if int(digits) > UNITS_MAX:
            raise bad(f"{option} {text!r}: the largest number is {UNITS_MAX}.", "give a smaller one")
        return int(digits)
    try:
        return format_budget(*parse_budget(text))
    except ValueError as error:
        raise bad(
            f"{option} {text!r} is neither a whole number of units nor money: {error}.",
            f"{option} 1000, or for a budget {option} '50.00 USD'",
        ) from error


def amounts(pairs: Iterable[str] | None, option: str) -> dict[str, int | str]:
    """``KEY=AMOUNT`` pairs as a map, the amounts as ``amount`` reads them.

    Raises:
        CliError: a pair has another form.
    """
    parsed: dict[str, int | str] = {}
    for pair in pairs or ():
        key, equals, text = pair.rpartition("=")
        if not equals or not key:
            raise bad(f"{option} {pair!r} must be FEATURE:LIMIT=AMOUNT.", f"{option} reports:month=1000")
        parsed[key] = amount(text, option)
    return parsed


def instant(text: str, option: str) -> str:
    """An instant as the API takes it, in UTC: from a date, or a date and time with or without a zone (then UTC).

    Raises:
        CliError: it is neither.
    """
    return _datetime(text, option).isoformat().replace("+00:00", "Z")


def context_values(pairs: Iterable[str] | None) -> dict[str, ContextItem]:
    """``NAME=VALUE`` pairs as attributes; ``NAME:TYPE=VALUE`` says which type, else it is guessed from the text.

    Types are string, int, double, bool, list (separated by commas) and timestamp; guessed are bool, int and double.

    Raises:
        CliError: a pair has another form, or its value is not of the type it names.
    """
    parsed: dict[str, ContextItem] = {}
    for pair in pairs or ():
        left, equals, text = pair.partition("=")
        name, colon, kind = left.partition(":")
        if not equals or not name:
            raise bad(f"--context {pair!r} must be NAME=VALUE or NAME:TYPE=VALUE.", "--context model=small, n:int=5")
        if not colon:
            parsed[name] = _guess(text)
        elif kind in _READERS:
            try:
                parsed[name] = _READERS[kind](text)
            except ValueError as error:
                raise bad(f"--context {name}: {text!r} is not of type {kind}.", "correct the value or type") from error
        else:
            raise bad(f"--context {name}: {kind!r} is not a type.", f"use one of {', '.join(_READERS)}")
    return parsed


def _datetime(text: str, option: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise bad(f"{option} {text!r} is not a date.", "write 2027-01-31, or 2027-01-31T18:00:00Z") from error
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _guess(text: str) -> ContextItem:
    for read in (_bool, int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


_READERS: Final[dict[str, Callable[[str], ContextItem]]] = {
    "string": str,
    "int": int,
    "double": float,
    "bool": _bool,
    "list": lambda text: [item for item in text.split(",") if item],
    "timestamp": lambda text: _datetime(text, "--context"),
}
