"""One document against its model: what pydantic says, in words for people and at the place in the file."""

from __future__ import annotations

import re
import typing
from types import UnionType
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from licet_control_plane.core.documents.findings import Findings, Path
from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.documents.sources import SOURCE_OF_KIND, DocumentSource
from licet_control_plane.core.suggestion import did_you_mean

_Model = TypeVar("_Model", bound=BaseModel)

API_VERSION: Final = "licet/v1"

_HEADER_FIELDS: Final = ("apiVersion", "kind")

_VALUE_CHARS_SHOWN_MAX: Final = 60

_SHAPES: Final = {
    "string_type": ("a text", "Put it in quotes."),
    "int_type": ("a whole number", "Write digits, such as 1_000_000; there are no fractions of a unit."),
    "int_from_float": ("a whole number", "Write digits, such as 1_000_000; there are no fractions of a unit."),
    "float_type": ("a number", "Write digits, without quotes."),
    "bool_type": ("true or false", "Write one of them, without quotes."),
    "tuple_type": ("a list", "Write [one, two], or one line with '- ' for each."),
    "dict_type": ("a mapping", "Write {key: value}, or one line with 'key: value' for each."),
    "model_type": ("a mapping", "Write {key: value}, or one line with 'key: value' for each."),
}


def check_schema(document: SourceDocument, findings: Findings) -> DocumentSource | None:
    """What a document says by itself; ``None`` when it has errors, all of which are then among ``findings``."""
    kind = document.kind
    if kind == "License":
        findings.error(
            document,
            ("kind",),
            "licenses are not documents of a bundle",
            "Keep them in a directory of their own, and put them in force with 'licet license import'.",
        )
        return None
    model = SOURCE_OF_KIND.get(kind)
    if model is None:
        _report_kind(document, findings)
        return None
    return check_model(document, model, findings)


def check_model(document: SourceDocument, model: type[_Model], findings: Findings) -> _Model | None:
    """The document as its model reads it; ``None`` when it has errors, all of which are then among ``findings``."""
    sound = _check_api_version(document, findings)
    body = {key: node.plain() for key, node in document.root.entries().items() if key not in _HEADER_FIELDS}
    try:
        written = model.model_validate(body)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _report(document, model, detail, findings)
        return None
    return written if sound else None


def _report_kind(document: SourceDocument, findings: Findings) -> None:
    if document.kind == "PolicyTest":
        findings.error(
            document,
            ("kind",),
            "tests are no documents of a bundle",
            "Move it to a file whose name ends in _test.yaml: 'licet policy test' reads those.",
        )
    elif document.kind:
        findings.unknown(document, ("kind",), "kind", document.kind, SOURCE_OF_KIND)
    elif "kind" in document.root.entries():
        findings.error(document, ("kind",), "the kind must be a word", did_you_mean("", SOURCE_OF_KIND))
    else:
        findings.error(
            document, (), "the document does not say its kind", f"Add 'kind: …'. {did_you_mean('', SOURCE_OF_KIND)}"
        )


def _check_api_version(document: SourceDocument, findings: Findings) -> bool:
    node = document.root.entries().get("apiVersion")
    if node is None or node.value == API_VERSION:
        return True
    findings.error(
        document,
        ("apiVersion",),
        f"the version {_shown(node.plain())} is not known to this program",
        f"Write {API_VERSION}, or leave it out.",
    )
    return False


def _report(document: SourceDocument, model: type[BaseModel], detail: ErrorDetails, findings: Findings) -> None:
    path: Path = detail["loc"]
    of_key = bool(path) and path[-1] == "[key]"
    if of_key:
        path = path[:-1]
    kind = detail["type"]
    context: dict[str, Any] = detail.get("ctx", {})
    value = detail["input"]
    match kind:
        case "refused":
            findings.error(document, path, context["message"], context["fix"], at_key=of_key)
        case "missing":
            findings.error(document, path, f"{path[-1]!r} is missing", f"Add '{path[-1]}: …'.")
        case "extra_forbidden":
            known = _fields_at(model, path[:-1])
            fix = did_you_mean(str(path[-1]), known)
            findings.error(document, path, f"there is no field {path[-1]!r} here", fix, at_key=True)
        case "enum" | "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            findings.error(document, path, f"{_shown(value)} is not possible here", did_you_mean(str(value), allowed))
        case "too_short" if len(value) >= context["min_length"]:
            pass  # only because its items are wrong, which is reported for each
        case "too_short" if not value:
            findings.error(document, path, "it is empty", "Name at least one.")
        case "too_short" | "too_long":
            bound = "fewest" if kind == "too_short" else "most"
            count = context["min_length" if kind == "too_short" else "max_length"]
            findings.error(document, path, f"it has {context['actual_length']}, and {count} are the {bound}")
        case "greater_than_equal" | "less_than_equal":
            at_least = kind == "greater_than_equal"
            bound = f"{context['ge' if at_least else 'le']:.0f}"
            word = "less" if at_least else "more"
            findings.error(
                document,
                path,
                f"{_shown(value)} is {word} than {bound}",
                f"Write {bound} or {'more' if at_least else 'less'}.",
            )
        case "string_too_long":
            findings.error(document, path, f"the text has more than {context['max_length']} characters", "Shorten it.")
        case "string_too_short":
            findings.error(document, path, "the text is empty", "Leave the field out, or fill it in.")
        case shape if shape in _SHAPES:
            wanted, fix = _SHAPES[shape]
            if value is None:
                fix = "Fill it in, or leave the field out."
            findings.error(document, path, f"{_shown(value)} is not {wanted}", fix)
        case _:
            findings.error(document, path, detail["msg"])


def _shown(value: Any) -> str:
    """A value as it is named in a message: short, and in the words of YAML."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _VALUE_CHARS_SHOWN_MAX else text[:_VALUE_CHARS_SHOWN_MAX] + "…"


def _fields_at(model: type[BaseModel], path: Path) -> list[str]:
    """The fields that the model at ``path`` knows."""
    at: Any = model
    for part in path:
        if isinstance(at, type) and issubclass(at, BaseModel):
            field = at.model_fields.get(str(part))
            at = field.annotation if field else None
        else:
            at = typing.get_args(at)[-1 if typing.get_origin(at) is dict else 0]
        at = _stripped(at)
    if not (isinstance(at, type) and issubclass(at, BaseModel)):
        return []
    return [*at.model_fields, *(_HEADER_FIELDS if not path else ())]


def _stripped(annotation: Any) -> Any:
    """The type inside ``Annotated`` and ``… | None``."""
    while True:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif origin in (typing.Union, UnionType):
            annotation = next(one for one in typing.get_args(annotation) if one is not type(None))
        else:
            return annotation
