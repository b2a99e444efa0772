"""What verifying comes to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

FINDINGS_MAX: Final = 1_000
"""Findings that are listed. The first one says where to look; the rest is counted."""


class Finding(NamedTuple):
    """Something that is not as it was recorded. ``kind`` is ``altered``, ``removed``, ``inserted``, ``reordered``,
    ``block``, ``log``, ``gap``, ``subject``, ``sum``, ``export``, ``conflict``, ``checkpoint`` or ``head``; 0, "" and
    ``None`` where a field does not apply."""

    shard: int | None
    block: int
    log_id: str
    seq: int
    kind: str
    what: str


def about_the_whole(kind: str, what: str) -> Finding:
    """A finding that is about no shard in particular."""
    return Finding(None, 0, "", 0, kind, what)


def order_of(finding: Finding) -> tuple[float, ...]:
    """By shard and block; what is about no block comes after what is, and what is about no shard last."""
    return (math.inf if finding.shard is None else finding.shard, finding.block or math.inf, finding.seq)


class Findings:
    """Collects findings: the first ``FINDINGS_MAX``, and how many there are."""

    def __init__(self) -> None:
        self.listed: list[Finding] = []
        self.total = 0

    def add(self, finding: Finding) -> None:
        """One more."""
        self.total += 1
        if len(self.listed) < FINDINGS_MAX:
            self.listed.append(finding)

    def merge(self, other: Findings) -> None:
        """What somebody else found."""
        self.total += other.total
        self.listed += other.listed[: FINDINGS_MAX - len(self.listed)]


@dataclass(frozen=True, slots=True)
class Gap:
    """Events of a log that a sidecar numbered and the ledger does not have."""

    log_id: str
    from_seq: int
    to_seq: int
    why: str


@dataclass(frozen=True, slots=True)
class LogFacts:
    """One log as the ledger has it."""

    log_id: str
    sidecar: str
    incarnation: int
    watermark: int
    events: int


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the ledger is whole. ``findings`` in the order of shards and blocks, at most ``FINDINGS_MAX`` of
    ``findings_total``. ``heads`` are (shard, last block, hash in hexadecimal). ``opened``: personal parts were opened
    too. ``checkpoints``: how many signed ones the chains were held to.

    ``lost`` are events that their sidecar numbered and declared lost: the ledger has what it can have, so that these do
    not make it less whole. Each is a loss that somebody should look into.

    ``dropped``: events by month that left the ledger as signed exports say. ``rollups_match``: no finding is about a
    sum.
    """

    events: int
    blocks: int
    logs: list[LogFacts]
    gaps: list[Gap]
    lost: list[Gap]
    dropped: dict[str, int]
    conflicts: int
    rollups_match: bool
    findings: list[Finding]
    findings_total: int
    heads: list[tuple[int, int, str]]
    erased_events: int
    erased_subjects: int
    opened: bool
    checkpoints: int

    @property
    def ok(self) -> bool:
        """Nothing is missing, altered, contested, or billed otherwise than recorded."""
        return not (self.gaps or self.conflicts or self.findings_total)

    def as_json(self) -> dict[str, Any]:
        """As the API and ``--json`` have it."""
        return {
            "ok": self.ok,
            **asdict(self),
            "findings": [one._asdict() for one in self.findings],
            "heads": [{"shard": shard, "block": number, "hash": head} for shard, number, head in self.heads],
        }


class Progress(NamedTuple):
    """Events that were checked, of how many."""

    done: int
    of: int
