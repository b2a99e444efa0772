"""Receives an export of the ledger: checks it while it arrives, and puts it in place only when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from licet_control_plane.cli.failure import CliError


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
