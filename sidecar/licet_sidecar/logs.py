"""Log lines of a sidecar: one JSON object each, on standard error, through the standard library.

structlog, which the control plane uses, costs 5 MB of resident memory here; a sidecar is paid for once in each pod.
Secrets never get this far: URLs are stripped of passwords where errors are made.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

ROOT = "licet"


class Logger:
    """An event, in words that never change, and its fields."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{ROOT}.{name}")

    def debug(self, event: str, **fields: Any) -> None:
        """For whoever reads the code."""
        self._logger.debug(event, extra={"fields": fields})

    def info(self, event: str, **fields: Any) -> None:
        """Something an operator may want to know later."""
        self._logger.info(event, extra={"fields": fields})

    def warning(self, event: str, **fields: Any) -> None:
        """Something is wrong, and handled."""
        self._logger.warning(event, extra={"fields": fields})

    def error(self, event: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """Somebody has to act."""
        self._logger.error(event, extra={"fields": fields}, exc_info=exc_info)


class JsonFormatter(logging.Formatter):
    """One line, keys in a fixed order: time, level, logger, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        line: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(level: str) -> None:
    """Sends everything of ``level`` and above to standard error.

    Raises:
        ValueError: no such level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None or level.upper() == "NOTSET":
        raise ValueError(f"--log-level {level!r} is not one of debug, info, warning and error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(ROOT).setLevel(number)
