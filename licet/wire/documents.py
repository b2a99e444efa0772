"""Payloads of the signed documents, and of the unsigned heartbeat: what each says, in one place.

=========  ==========  ============================  ====================================================
kind       key         Redis key                     payload
=========  ==========  ============================  ====================================================
bundle     ``bundle``  ``licet:doc:bundle``          ``Manifest``: digests of the chunks with the documents
license    tenant      ``licet:{tenant}:license``    ``licet.domain.catalog.License``
head       ``head``    ``licet:head``                ``Head``: "this server's contents were checked"
ack        log id      ``licet:acked`` (hash)        ``AckPayload``; the revision is the watermark, the generation the
                                                     ledger's
=========  ==========  ============================  ====================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

from licet.domain.approvals import Override
from licet.domain.catalog import Catalog, Document
from licet.domain.catalog_wire import document_from_wire, document_to_wire
from licet.wire import envelope

BUNDLE: Final = "bundle"
LICENSE: Final = "license"
HEAD: Final = "head"
ACK: Final = "ack"
BUNDLE_KEY: Final = "bundle"
HEAD_KEY: Final = "head"

CHUNK_COUNT: Final = 256
"""Chunks a bundle is cut into, at most. Of 10,000 rules of 200 bytes, one changed rule then moves about 8 KB."""
_CHUNK_KIND: Final = "chunk"
_HEARTBEAT_KIND: Final = "heartbeat"
_SECOND_ROUTE_KIND: Final = "second-route"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle consists of: the SHA-256 (hex) of each chunk, in order. ``observe`` answers everything APPROVED.

    ``salt`` keys the hashes of attributes that are recorded hashed; the same in every bundle of a deployment.
    ``overrides`` are those in force when it was signed: with the bundle they are as hard to take out or to bring back.
    """

    chunks: tuple[str, ...]
    observe: bool = False
    message: str = ""
    published_us: int = 0
    salt: bytes = b""
    overrides: tuple[Override, ...] = ()

    def has_content_of(self, other: Manifest) -> bool:
        """Whether both say the same but for their overrides, and for when and why."""
        return (self.chunks, self.observe, self.salt) == (other.chunks, other.observe, other.salt)

    def to_payload(self) -> dict[str, Any]:
        """As msgpack-able primitives."""
        payload = {name: getattr(self, name) for name in ("chunks", "observe", "message", "published_us", "salt")}
        if self.overrides:
            payload["overrides"] = [override.to_wire() for override in self.overrides]
        return payload

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """The inverse of ``to_payload``; unknown keys are ignored.

        Raises:
            KeyError: the chunks are missing.
            ValueError: an override does what this program does not know.
        """
        return cls(
            tuple(payload["chunks"]),
            bool(payload["observe"]),
            payload["message"],
            int(payload["published_us"]),
            payload.get("salt", b""),
            tuple(Override.from_wire(one) for one in payload.get("overrides", ())),
        )


@dataclass(frozen=True, slots=True)
class Head:
    """Said each second, only after the contents of the Redis server ``run_id`` were checked against the database.

    ``at_us`` is the control plane's clock, microseconds since the Unix epoch; ``epoch`` the newest epoch of quota
    registers; ``live`` the number of sidecars heard of lately, at least 1; ``ledger_generation`` tells sidecars of a
    ledger that was restored, 0 for what an older control plane says; ``bundle`` the revision of the newest bundle, so
    that an older one cannot stand in for it, 0 when there is none.
    """

    at_us: int
    run_id: str
    epoch: int
    live: int
    ledger_generation: int = 0
    bundle: int = 0

    def to_payload(self) -> dict[str, Any]:
        """As msgpack-able primitives."""
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """The inverse of ``to_payload``; unknown keys are ignored.

        Raises:
            KeyError: a field is missing.
        """
        return cls(
            payload["at_us"],
            payload["run_id"],
            payload["epoch"],
            max(1, payload["live"]),
            payload.get("ledger_generation", 0),
            payload.get("bundle", 0),
        )


@dataclass(frozen=True, slots=True)
class AckPayload:
    """``lost``: ranges (first, last) up to the watermark that the ledger has not, as they were declared lost.

    Signed with the acknowledgement: whoever can write Redis can declare anything lost, and must not make a sidecar
    delete events that it still has.
    """

    lost: tuple[tuple[int, int], ...] = ()

    def to_payload(self) -> dict[str, Any]:
        """As msgpack-able primitives."""
        return {"lost": [list(one) for one in self.lost]} if self.lost else {}

    @classmethod
    def from_payload(cls, payload: dict[str, Any] | None) -> Self:
        """The inverse of ``to_payload``; unknown keys are ignored.

        Raises:
            TypeError, ValueError: a range is not one.
        """
        return cls(tuple((int(first), int(last)) for first, last in (payload or {}).get("lost", ())))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a sidecar that cannot reach Redis gets over HTTPS: signed documents, of one committed state.

    ``manifest`` is ``None`` when the sidecar has the bundle, or nothing was ever pushed. ``absent``: tenants that were
    asked for and have no license.
    """

    head: bytes
    manifest: bytes | None = None
    chunks: Mapping[str, bytes] = field(default_factory=dict)
    licenses: Mapping[str, bytes] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """In an envelope."""
        return envelope.pack(
            _SECOND_ROUTE_KIND, [self.head, self.manifest, dict(self.chunks), dict(self.licenses), list(self.absent)]
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The inverse of ``pack``; fields that a newer program appended are ignored.

        Raises:
            EnvelopeError: not a snapshot.
        """
        body = envelope.unpack(_SECOND_ROUTE_KIND, data)
        try:
            head, manifest, chunks, licenses, absent = body[:5]
            return cls(head, manifest, dict(chunks), dict(licenses), tuple(absent))
        except (TypeError, ValueError) as error:
            raise envelope.EnvelopeError(f"snapshot: {error}") from error


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a sidecar says of itself each second, unsigned: for operators and the publishing barrier.

    ``*_us`` are the sidecar's clock. ``asserted_epoch`` and ``asserted_run`` name the newest (epoch, run) under which
    it has asserted every lease it holds; ``asserted_ms`` is an instant, milliseconds of the Redis clock, after which
    every lease it holds was answered for. ``log_bytes`` counts what the ledger has not committed yet. ``retired``: it
    gave up its registers, and its id is never used again. ``keys``: ids of the public keys that it trusts.
    ``acted_generation`` and ``acted_revision`` name the newest state it ever acted on, which after a restart can be
    newer than the one in force, and ``deployment`` whose state that was: empty while it does not know.
    """

    sidecar: str
    incarnation: int
    at_us: int
    started_us: int
    address: str
    version: str
    ready: bool
    draining: bool
    generation: int
    revision: int
    as_of_us: int
    asserted_epoch: int
    asserted_run: str
    tenants_held: int
    log_last_seq: int
    log_acked_seq: int
    log_bytes: int
    hostname: str = ""
    pid: int = 0
    asserted_ms: int = 0
    retired: bool = False
    keys: tuple[str, ...] = ()
    deployment: str = ""
    acted_generation: int = 0
    acted_revision: int = 0

    @property
    def acted(self) -> tuple[int, int]:
        """As newer and older."""
        return (self.acted_generation, self.acted_revision)

    def pack(self) -> bytes:
        """In an envelope, for the registry."""
        return envelope.pack(_HEARTBEAT_KIND, asdict(self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The inverse of ``pack``; unknown keys are ignored.

        Raises:
            EnvelopeError: not a heartbeat.
        """
        body = envelope.unpack(_HEARTBEAT_KIND, data)
        try:
            known = {name: body[name] for name in cls.__slots__ if name in body}
            for name in _HEARTBEAT_NUMBERS & known.keys():
                if not isinstance(known[name], int):
                    raise envelope.EnvelopeError(f"heartbeat: {name} is not a number")
            return cls(**{**known, "keys": tuple(known.get("keys", ()))})
        except TypeError as error:
            raise envelope.EnvelopeError(f"heartbeat: field {error} is missing") from error


_HEARTBEAT_NUMBERS: Final = frozenset(one.name for one in fields(Heartbeat) if one.type == "int")


def digest_of(data: bytes) -> str:
    """SHA-256, hex: names a chunk, and tells a repeated change from a different one with the same id."""
    return hashlib.sha256(data).hexdigest()


def chunk_catalog(catalog: Catalog) -> list[bytes]:
    """The catalog cut into at most ``CHUNK_COUNT`` chunks, by the hash of each document's kind and name.

    The same documents always give the same chunks, so that a push moves only those that hold a change.
    """
    documents_by_bucket: dict[int, list[Document]] = {}
    for document in catalog.documents():
        name = f"{type(document).__name__}/{document.name}"
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % CHUNK_COUNT
        documents_by_bucket.setdefault(bucket, []).append(document)
    return [
        envelope.pack(_CHUNK_KIND, [document_to_wire(document) for document in documents])
        for _, documents in sorted(documents_by_bucket.items())
    ]


def catalog_of_chunks(chunks: Iterable[bytes], digests: Sequence[str]) -> Catalog:
    """The inverse of ``chunk_catalog``, when the chunks are exactly those the signed manifest names.

    Raises:
        ValueError: a chunk is missing, altered, or written by a newer program.
    """
    chunks = list(chunks)
    if len(chunks) != len(digests):
        raise ValueError("the chunks are not those that the manifest names")
    return Catalog.of(
        document
        for chunk, digest in zip(chunks, digests, strict=True)
        for document in documents_of_chunk(chunk, digest)
    )


def documents_of_chunk(chunk: bytes, digest: str) -> tuple[Document, ...]:
    """The documents of one chunk, when it is the one that the signed manifest names by ``digest``.

    Raises:
        ValueError: it is altered, or written by a newer program.
    """
    if digest_of(chunk) != digest:
        raise ValueError("the chunks are not those that the manifest names")
    try:
        return tuple(document_from_wire(wire) for wire in envelope.unpack(_CHUNK_KIND, chunk))
    except KeyError as error:
        raise ValueError(f"a document of the bundle lacks {error}") from error
