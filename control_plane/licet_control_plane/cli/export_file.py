"""Exports of the ledger. One that arrives is checked on the way, and put in place only when it is whole; one that was
kept is held to what was signed, without a server."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.cli.failure import CliError
from licet_control_plane.core.accounting import storable
from licet_control_plane.core.sealed_events import COLUMNS, UNITS, Damaged, fields_of
from licet_control_plane.store.exports import Export, Ranges
from licet_control_plane.store.partitions import Month


def receive(chunks: Iterable[bytes], out: Path) -> dict[str, Any]:
    """Write a gzipped export to ``out``; returns its last line.

    Raises:
        CliError: it ended early, was damaged on the way, or the file cannot be written.
    """
    part = out.with_name(f"{out.name}.part")
    digest = hashlib.sha256()
    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
    tail = b""
    try:
        with part.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                # The last line, which has no part in the digest, is known only at the end.
                text = tail + inflater.decompress(chunk)
                cut = text.rfind(b"\n", 0, max(0, len(text) - 1)) + 1
                digest.update(text[:cut])
                tail = text[cut:]
            file.flush()
            os.fsync(file.fileno())
        end = json.loads(tail) if inflater.eof else None
        if not isinstance(end, dict) or end.get("sha256") != digest.hexdigest():
            raise CliError("the export did not arrive whole; no file was written.", fix="run the command again")
        os.replace(part, out)
    except OSError as error:
        raise CliError(f"{out} cannot be written: {error.strerror}.", fix="name a file that can be") from error
    except (ValueError, zlib.error) as error:
        raise CliError(
            "the export was damaged on the way; no file was written.", fix="run the command again"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return end


class NotWhole(Exception):
    """The file is not what was signed. The message says what is wrong, and at which line."""


@dataclass(frozen=True, slots=True)
class KeptExport:
    """A file that holds exactly what a trusted key signed. ``digest`` (hexadecimal) is what the chain names it by."""

    deployment: str
    month: str
    events: int
    logs: int
    sha256: str
    digest: str


def check_kept(path: Path, verifier: Verifier) -> KeptExport:
    """Read an export that was kept, all of it.

    Its last line is signed over the digest of the rest, so that no byte of it can be another one. That its columns say
    what the events say, and its ranges what they are, shows that it was whole when it was signed.

    Raises:
        NotWhole: it is damaged, was changed, ends early, or no trusted key signed it.
        OSError: it cannot be read.
    """
    kept = _Kept()
    try:
        with gzip.open(path) as file:
            for line in file:
                kept.take(line)
        return kept.closed(verifier)
    except (VerificationError, Damaged) as error:
        raise NotWhole(f"line {kept.lines}: {error}") from error
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise NotWhole(f"after line {kept.lines}: it is no gzip file, or its end is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotWhole(f"line {kept.lines}: not a line of an export") from error


class _Kept:
    """Takes the lines of an export one by one. The last one, which is signed, is known only at the end."""

    def __init__(self) -> None:
        self.lines = 1
        """The line that is looked at."""
        self._digest = hashlib.sha256()
        self._ranges = Ranges()
        self._events = 0
        self._names: dict[int, str] = {}
        self._columns: list[str] = []
        self._month: Month | None = None
        self._last: bytes | None = None

    def take(self, line: bytes) -> None:
        if self._last is not None:
            self._digest.update(self._last)
            self._read(json.loads(self._last))
            self.lines += 1
        self._last = line

    def _read(self, value: Any) -> None:
        if self._month is None:
            self._month, self._columns = Month.parse(value["month"]), value["columns"]
        elif isinstance(value, dict):
            self._names |= {int(log): str(log_id) for log, log_id in value["logs"].items()}
        else:
            row = dict(zip(self._columns, value, strict=True))
            _check_row(row, self._month)
            self._ranges.add(self._names[row["log"]], row["seq"])
            self._events += 1

    def closed(self, verifier: Verifier) -> KeptExport:
        document = base64.b64decode(json.loads(self._last or b"")["signed"], validate=True)
        export = Export.of(document, str(self._month), verifier)
        if export.sha256 != self._digest.hexdigest():
            raise NotWhole("what it holds is not what was signed")
        if (export.events, export.ranges) != (self._events, self._ranges.found):
            raise NotWhole("its events are not those that were signed")
        logs = len(export.ranges)
        return KeptExport(export.deployment, export.month, export.events, logs, export.sha256, export.digest.hex())


def _check_row(row: dict[str, Any], month: Month) -> None:
    """
    Raises:
        Damaged: the columns of an event do not repeat what was sealed.
    """
    fields = fields_of(base64.b64decode(row["public"], validate=True))
    for name, field in zip(COLUMNS, fields[1:UNITS], strict=True):
        if row[name] != (storable(field) if isinstance(field, str) else field):
            raise Damaged(f"column {name} is not what the event says")
    if row["units_total"] != sum(fields[UNITS].values()):
        raise Damaged("column units_total is not what the event says")
    if not month.start_us <= row["at"] < month.end_us:
        raise Damaged(f"the event is not of {month}")
