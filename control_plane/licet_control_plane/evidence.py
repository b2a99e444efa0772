"""Evidence for an auditor: one signed archive of an interval, made from the database and checked without it.

A zip with what was in force (``rules/``), all that was changed or refused (``changes.jsonl``), the decisions of people
in it (``approvals.jsonl``), the signed heads of the audit trail and of the ledger with what recounting both found
(``heads.json``), and a manifest with the SHA-256 of each file, signed. The same state gives the same bytes.

Documents of operators are inside of JSON, never names of files: whoever unpacks it writes only these names.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

from licet.wire.signing import Statement, VerificationError, Verifier
from licet_control_plane.core.audit_chain import Entry, Recount, recount
from licet_control_plane.store.audit_trail import Head
from licet_control_plane.store.revisions import Sign

FORMAT: Final = "licet-evidence/1"
KIND: Final = "evidence"
MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
CHANGES: Final = "changes.jsonl"
APPROVALS: Final = "approvals.jsonl"
HEADS: Final = "heads.json"
APPROVAL_ACTIONS: Final = ("access_request.", "override.")
"""Actions of the audit trail by which people decide about single cases."""
FILES_MAX: Final = 100_000
FILE_BYTES_MAX: Final = 4 * 1024**3
"""Of one file when it is checked: more is no evidence but an attack on whoever checks it."""
_TIME: Final = (1980, 1, 1, 0, 0, 0)
"""Of each file: the earliest that a zip can say, so that it says nothing."""
_PIECE: Final = 1024 * 1024


class EvidenceRefused(Exception):
    """An archive is not what it says. The message names what."""


@dataclass(frozen=True, slots=True)
class Interval:
    """``[from_us, to_us)``, and what the trail was like: entries ``first`` to ``last`` follow the hash ``previous``."""

    from_us: int
    to_us: int
    first: int
    last: int
    previous: bytes


@dataclass(frozen=True, slots=True)
class Checked:
    """What an archive that was checked holds."""

    deployment: str
    from_us: int
    to_us: int
    rules: int
    changes: int
    approvals: int
    files: int
    audit_head: int | None
    audit_ok: bool
    ledger_ok: bool


def write(
    out: IO[bytes],
    *,
    deployment: str,
    interval: Interval,
    rules: Iterable[Mapping[str, Any]],
    changes: Iterable[tuple[Entry, bytes]],
    heads: Mapping[str, Any],
    sign: Sign,
) -> None:
    """Write an archive to a file. ``rules`` each have a ``revision``; ``changes`` are without gaps."""
    digests: dict[str, str] = {}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, lines: Iterable[bytes]) -> None:
            digest = hashlib.sha256()
            with archive.open(_info(name), "w", force_zip64=True) as file:
                for line in lines:
                    digest.update(line)
                    file.write(line)
            digests[name] = digest.hexdigest()

        count = 0
        for rule in rules:
            count += 1
            add(f"rules/{rule['revision']:012}.json", [_json(rule)])
        approvals: list[bytes] = []

        def entries() -> Iterator[bytes]:
            for entry, hash_ in changes:
                line = _json(entry.as_json(hash_))
                if entry.action.startswith(APPROVAL_ACTIONS):
                    approvals.append(line)
                yield line

        add(CHANGES, entries())
        add(APPROVALS, approvals)
        add(HEADS, [_json(heads)])
        manifest = _json(
            {
                "format": FORMAT,
                "deployment": deployment,
                "from_us": interval.from_us,
                "to_us": interval.to_us,
                "first": interval.first,
                "last": interval.last,
                "previous": interval.previous.hex(),
                "rules": count,
                "approvals": len(approvals),
                "files": digests,
            }
        )
        digest = hashlib.sha256(manifest).hexdigest()
        signed = sign(Statement(deployment, KIND, digest, 0, 0, {}))
        archive.writestr(_info(MANIFEST), manifest)
        archive.writestr(_info(SIGNATURE), base64.b64encode(signed))


def check(file: IO[bytes], verifier: Verifier) -> Checked:
    """Check an archive: its signature, every file, the chain of its changes, and that the signed head fits them.

    Raises:
        EvidenceRefused: it was altered, or no trusted key signed it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _checked(archive, verifier)
    # zipfile says NotImplementedError of a compression it lacks, and RuntimeError of a file that is encrypted.
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise EvidenceRefused(f"it is not a zip that can be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise EvidenceRefused(f"its content cannot be read: {error!r}") from error


def _checked(archive: zipfile.ZipFile, verifier: Verifier) -> Checked:
    names = archive.namelist()
    if len(names) != len(set(names)) or len(names) > FILES_MAX:
        raise EvidenceRefused("it holds a file twice, or too many files")
    if any(one.file_size > FILE_BYTES_MAX for one in archive.infolist()):
        raise EvidenceRefused(f"it holds a file of more than {FILE_BYTES_MAX} bytes")
    for name in (MANIFEST, SIGNATURE, CHANGES, HEADS, APPROVALS):
        if name not in names:
            raise EvidenceRefused(f"it holds no {name}")
    raw = archive.read(MANIFEST)
    try:
        signed = base64.b64decode(archive.read(SIGNATURE), validate=True)
        statement = verifier.verify(signed, kind=KIND, key=hashlib.sha256(raw).hexdigest())
    except (VerificationError, binascii.Error) as error:
        raise EvidenceRefused(f"the manifest was altered, or signed by somebody else: {error}") from error
    manifest = json.loads(raw)
    if manifest["format"] != FORMAT or manifest["deployment"] != statement.deployment:
        raise EvidenceRefused("the manifest is of another format or deployment")
    files: dict[str, str] = manifest["files"]
    if other := sorted({*names} ^ {*files, MANIFEST, SIGNATURE}):
        raise EvidenceRefused(f"{other[0]} is there and not in the manifest, or the other way round")
    for name, digest in files.items():
        if _digest(archive, name) != digest:
            raise EvidenceRefused(f"{name} was altered")
    changes, hashes = _changes(archive, manifest)
    heads = json.loads(archive.read(HEADS))
    return Checked(
        deployment=statement.deployment,
        from_us=manifest["from_us"],
        to_us=manifest["to_us"],
        rules=manifest["rules"],
        changes=changes,
        approvals=manifest["approvals"],
        files=len(files),
        audit_head=_head_fits(heads, manifest, hashes, verifier),
        audit_ok=bool(heads["audit"]["verified"]["ok"]),
        ledger_ok=bool(heads["ledger"]["verified"]["ok"]),
    )


def _changes(archive: zipfile.ZipFile, manifest: Mapping[str, Any]) -> tuple[int, tuple[int, bytes]]:
    """How many there are, with number and hash of the last one."""
    first = int(manifest["first"])
    done = Recount(first - 1, bytes.fromhex(manifest["previous"]))
    with archive.open(CHANGES) as lines:
        for line in lines:
            done = recount(done, [Entry.from_json(json.loads(line))])
            if done.fault is not None:
                raise EvidenceRefused(f"{CHANGES}: {done.fault.what}")
    if done.number != int(manifest["last"]):
        raise EvidenceRefused(f"{CHANGES} ends with entry {done.number}, and not with {manifest['last']}")
    return done.number - first + 1, (done.number, done.head)


def _head_fits(
    heads: Mapping[str, Any], manifest: Mapping[str, Any], last: tuple[int, bytes], verifier: Verifier
) -> int | None:
    """The number of the trail's signed head, which may be later than the interval."""
    if heads["audit"]["head"] is None:
        return None
    try:
        head = Head.of(base64.b64decode(heads["audit"]["head"], validate=True), verifier)
    except (VerificationError, binascii.Error) as error:
        raise EvidenceRefused(f"the signed head of the audit trail: {error}") from error
    if head.deployment != manifest["deployment"]:
        raise EvidenceRefused("the signed head of the audit trail is of another deployment")
    if head.number < last[0] or (head.number == last[0] and head.hash != last[1]):
        raise EvidenceRefused("the signed head of the audit trail does not fit the changes")
    return head.number


def _digest(archive: zipfile.ZipFile, name: str) -> str:
    digest = hashlib.sha256()
    with archive.open(name) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _TIME)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    return info


def _json(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()
