"""What a sidecar knows of the published state, and when it may act on it.

Rules:

* A signed document is taken only when its (generation, revision) is not below what is held for the same thing.
* State moves from one revision to the next in one step: a document newer than the last change read waits until the
  changes up to it were read, so that no answer mixes two revisions.
* The next change must have the next number; anything else is a gap, and everything is read again.
* ``as_of`` advances by heads alone, and only by heads of the server they were read from: a wiped stream answers a
  blocking read with silence.

Pure; owned by one event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from licet.wire.documents import Head
from licet.wire.signing import Statement

HEADS_BEHIND_MAX: Final = 2
"""Heads in a row that name a revision not reached yet, before everything is read again."""


class HeadVerdict(Enum):
    """What a head means."""

    CURRENT = auto()
    BEHIND = auto()
    RESYNC = auto()
    LATE = auto()
    """Written before the change that is already in force was published: says nothing new, and nothing is wrong."""
    IGNORED = auto()


@dataclass(slots=True)
class Changes:
    """What entries of the stream touched, from ``cursor`` on."""

    cursor: int
    bundle: bool = False
    tenants: set[str] = field(default_factory=set)


class SyncState:
    """Versions reached. ``generation`` and ``revision`` are those answers come from."""

    def __init__(self) -> None:
        self.deployment = ""
        self.generation = 0
        self.revision = 0
        self.floor: tuple[int, int] = (0, 0)
        """Newest (generation, revision) acted on before a restart: nothing older may be acted on."""
        self.head: Head | None = None
        self._head_version = (0, 0)
        self._behind = 0

    def accepts(self, statement: Statement, held: tuple[int, int]) -> bool:
        """Whether a verified document may replace one of version ``held``."""
        if self.deployment and statement.deployment != self.deployment:
            return False
        return statement.version >= held and statement.generation >= self.generation

    def follow(self, cursor: int, revisions: Sequence[int]) -> bool:
        """Whether entries with these revisions follow on ``cursor`` without a gap."""
        return list(revisions) == list(range(cursor + 1, cursor + 1 + len(revisions)))

    def reached(self, generation: int, revision: int) -> None:
        """State of this version is in force."""
        self.generation = generation
        self.revision = revision
        self.floor = max(self.floor, (generation, revision))
        self._behind = 0

    def may_serve(self) -> bool:
        """Whether what is in force is not older than what was acted on before."""
        return self.generation > 0 and (self.generation, self.revision) >= self.floor

    def head_read(self, statement: Statement, head: Head, run_id: str) -> HeadVerdict:
        """Judges a verified head that was read from the server ``run_id``. Keeps it when it says something new."""
        if head.run_id != run_id or (self.deployment and statement.deployment != self.deployment):
            return HeadVerdict.IGNORED
        if statement.version < self._head_version or statement.generation < self.generation:
            return HeadVerdict.IGNORED
        if statement.version < (self.generation, self.revision):
            return HeadVerdict.LATE
        if self.head is not None and statement.version == self._head_version and head.at_us < self.head.at_us:
            return HeadVerdict.IGNORED
        self.head = head
        self._head_version = statement.version
        if statement.version == (self.generation, self.revision):
            self._behind = 0
            return HeadVerdict.CURRENT
        self._behind += 1
        if self._behind > HEADS_BEHIND_MAX or statement.generation != self.generation:
            self._behind = 0
            return HeadVerdict.RESYNC
        return HeadVerdict.BEHIND
