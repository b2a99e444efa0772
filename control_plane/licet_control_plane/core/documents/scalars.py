"""The words and numbers of documents: how names, units, money, durations and patterns are written, and their bounds.

Each is an annotated type for the models in ``sources``; a refused value carries its own fix.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, Strict, WithJsonSchema
from pydantic_core import PydanticCustomError

from licet.domain.ids import NAME_CHARS_MAX, NAME_PATTERN, UNITS_MAX
from licet.domain.money import parse_budget, parse_money, parse_nanos

TEXT_CHARS_MAX: Final = 256
"""Longest title, unit or default."""

DURATION_S_MAX: Final = 366 * 86_400
"""Longest duration: a year, the longest window there is."""

_SECONDS_OF: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION: Final = re.compile(r"([0-9]{1,9})([smhd])")
_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_LIMIT_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_PATTERN: Final = re.compile(rf"\*|{NAME_PATTERN.pattern}(\.\*)?")
_APPROVER: Final = re.compile(r"(user|group|role):[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_CEL_RESERVED: Final = frozenset(
    (
        *("as", "break", "const", "continue", "else", "false", "for", "function", "if", "import", "in", "let"),
        *("loop", "namespace", "null", "package", "return", "true", "var", "void", "while"),
    )
)


def refused(message: str, fix: str) -> PydanticCustomError:
    """The error that says ``message``, a clause, and ``fix``, a sentence."""
    # As context and not as the template, because people's text may hold braces.
    return PydanticCustomError("refused", "{message}", {"message": message, "fix": fix})


def duration_s(text: str) -> int:
    """Seconds of ``90s``, ``30m``, ``24h`` or ``7d``.

    Raises:
        ValueError: something else, zero, or longer than ``DURATION_S_MAX``.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration")
    seconds = int(match[1]) * _SECONDS_OF[match[2]]
    if not 0 < seconds <= DURATION_S_MAX:
        raise ValueError(f"{text!r} is not between 1s and 366d")
    return seconds


def _name(text: str) -> str:
    if len(text) > NAME_CHARS_MAX or not NAME_PATTERN.fullmatch(text):
        raise refused(
            f"{text!r} is not a name",
            f"Names are lower case, such as 'llm.output_tokens', and have at most {NAME_CHARS_MAX} characters.",
        )
    return text


def _attribute_name(text: str) -> str:
    if not _WORD.fullmatch(text) or text in _CEL_RESERVED:
        raise refused(
            f"{text!r} cannot name an attribute",
            "It must be a word that conditions can use: letters, digits and '_', and no word of CEL such as 'in'.",
        )
    return text


def _limit_name(text: str) -> str:
    if not _LIMIT_NAME.fullmatch(text):
        raise refused(f"{text!r} is not a name for a limit", "Use lower-case letters, digits, '-' and '_', at most 64.")
    return text


def _removal(text: str) -> str:
    feature, colon, limit = text.partition(":")
    if not NAME_PATTERN.fullmatch(feature) or len(text) > TEXT_CHARS_MAX or (colon and not limit):
        raise refused(
            f"{text!r} is neither a feature nor the key of a limit",
            "Write a feature, such as 'reports', or a limit's key, such as 'reports:month'.",
        )
    return text


def _action_pattern(text: str) -> str:
    if len(text) > NAME_CHARS_MAX or not _PATTERN.fullmatch(text):
        raise refused(f"{text!r} is not a pattern of actions", "Write an exact name, 'prefix.*', or '*'.")
    return text


def _approver(text: str) -> str:
    if not _APPROVER.fullmatch(text):
        raise refused(f"{text!r} is not an approver", "Write 'user:…', 'group:…' or 'role:…'.")
    return text


def _scope_path(text: str) -> str:
    prefix, _, attribute = text.partition(".")
    if text != "subject" and not (prefix == "context" and _WORD.fullmatch(attribute)):
        raise refused(f"{text!r} is not a scope", "Write 'subject' or 'context.<attribute>'.")
    return text


def _attribute_path(text: str) -> str:
    prefix, _, attribute = text.partition(".")
    if prefix != "context" or not _WORD.fullmatch(attribute):
        raise refused(f"{text!r} does not name an attribute", "Write 'context.<attribute>'.")
    return text


def _currency(text: str) -> str:
    if not _CURRENCY.fullmatch(text):
        raise refused(f"{text!r} is not a currency", "Write its three-letter code (ISO 4217), such as USD.")
    return text


def _seconds(value: Any) -> int:
    if not isinstance(value, str):
        raise refused(f"{value!r} is not a duration", "Write it with its unit, such as 90s, 30m, 24h or 7d.")
    try:
        return duration_s(value)
    except ValueError as error:
        raise refused(str(error), "Write a whole number and s, m, h or d, such as 90s, 30m, 24h or 7d.") from None


def _nanos(value: Any) -> int:
    if isinstance(value, float):
        raise refused(f"{value!r} is a number that cannot be exact", f'Write money in quotes: "{value!r}".')
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise refused(f"{value!r} is not an amount of money", 'Write it in quotes, such as "8.00".')
    try:
        return parse_nanos(str(value))
    except ValueError as error:
        raise refused(str(error), 'Write a plain decimal in quotes, such as "8.00".') from None


def _budget(value: Any) -> tuple[int, str]:
    if not isinstance(value, str):
        raise refused(f"{value!r} is not an amount of money", 'Write it with its currency, such as "500.00 USD".')
    try:
        return parse_budget(value)
    except ValueError as error:
        raise refused(str(error), 'Write a plain decimal and a currency, such as "500.00 USD".') from None


def _fee(value: Any) -> tuple[int, str]:
    if not isinstance(value, str):
        raise refused(f"{value!r} is not an amount of money", 'Write it with its currency, such as "49.00 USD".')
    try:
        return parse_money(value)
    except ValueError as error:
        raise refused(str(error), 'Write a plain decimal and a currency, such as "49.00 USD".') from None


def _not_blank(text: str) -> str:
    if not text.strip():
        raise refused("the text is empty", "Leave the field out, or fill it in.")
    return text


# What a schema for editors says of them. Its patterns are those of ECMAScript, and sometimes wider than what is read.
_NAME_FORM: Final = NAME_PATTERN.pattern
MoneyForm = Annotated[str, Field(pattern=r"^ *[0-9]+(\.[0-9]+)? +[A-Z]{3} *$")]
DurationForm = Annotated[str, Field(pattern=r"^[0-9]{1,9}[smhd]$")]
DecimalForm = Annotated[str, Field(pattern=r"^ *[0-9]+(\.[0-9]{1,9})? *$")] | Annotated[int, Field(ge=0)]


def _form(pattern: str, chars_max: int | None = None) -> WithJsonSchema:
    bound = {} if chars_max is None else {"maxLength": chars_max}
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern})$", **bound})


Name = Annotated[str, AfterValidator(_name), _form(_NAME_FORM, NAME_CHARS_MAX)]
AttributeName = Annotated[str, AfterValidator(_attribute_name), _form(_WORD.pattern)]
LimitName = Annotated[str, AfterValidator(_limit_name), _form(_LIMIT_NAME.pattern)]
Removal = Annotated[str, AfterValidator(_removal), _form(rf"{_NAME_FORM}(:.+)?", TEXT_CHARS_MAX)]
"""A feature's name, or a limit's key."""
ActionPattern = Annotated[str, AfterValidator(_action_pattern), _form(_PATTERN.pattern, NAME_CHARS_MAX)]
Approver = Annotated[str, AfterValidator(_approver), _form(_APPROVER.pattern)]
ScopePath = Annotated[str, AfterValidator(_scope_path), _form(rf"subject|context\.{_WORD.pattern}")]
AttributePath = Annotated[str, AfterValidator(_attribute_path), _form(rf"context\.{_WORD.pattern}")]
Currency = Annotated[str, AfterValidator(_currency), _form(_CURRENCY.pattern)]
Text = Annotated[str, Field(max_length=TEXT_CHARS_MAX)]
ConditionText = Annotated[str, AfterValidator(_not_blank)]
Seconds = Annotated[int, BeforeValidator(_seconds, json_schema_input_type=DurationForm)]
Nanos = Annotated[int, BeforeValidator(_nanos, json_schema_input_type=DecimalForm)]
Budget = Annotated[tuple[int, str], BeforeValidator(_budget, json_schema_input_type=MoneyForm)]
"""Nanos, and their currency."""
FeeAmount = Annotated[tuple[int, str], BeforeValidator(_fee, json_schema_input_type=MoneyForm)]
"""As ``Budget``, but not bounded by what a quota can count."""
Units = Annotated[int, Strict(), Field(ge=0, le=UNITS_MAX)]
PositiveUnits = Annotated[int, Strict(), Field(ge=1, le=UNITS_MAX)]
"""Whole numbers only: a unit is the smallest thing that is counted."""
