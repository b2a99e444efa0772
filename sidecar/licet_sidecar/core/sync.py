"""What a sidecar knows of the published state, and when it may act on it.

Rules:

* A signed document is taken only when its (generation, revision) is not below what is held for the same thing.
* State moves from one revision to the next in one step: a document newer than the last change read waits until the
  changes up to it were read, so that no answer mixes two revisions.
* The next change must have the next number; anything else is a gap, and everything is read again.
* ``as_of`` advances by heads alone, and only by heads of the server they were read from: a wiped stream answers a
  blocking read with silence.
* State belongs to the run of the server it was read from. What another one holds may be older, even where its numbers
  go on: on another run everything is read again.

Pure; owned by one event loop. What is read, and in which order, is for ``core.following``.
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


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the change stream. ``kind`` is ``bundle``, ``license`` or ``resync``; ``key`` says of what."""

    revision: int
    kind: str
    key: str


@dataclass(slots=True)
class Changes:
    """What entries of the stream touched, from ``cursor`` on. ``bundle`` and the values of ``tenants`` are the
    revision of the newest entry that names it: what is read may not be older. ``bundle`` is ``None`` when none does.
    """

    cursor: int
    bundle: int | None = None
    tenants: dict[str, int] = field(default_factory=dict)


class SyncState:
    """Versions reached. ``generation`` and ``revision`` are those answers come from, ``run`` is that of the server they
    were read from: empty when they come from the disk, or from the control plane itself.
    """

    def __init__(self) -> None:
        self.deployment = ""
        self.generation = 0
        self.revision = 0
        self.run = ""
        self.floor: tuple[int, int] = (0, 0)
        """Newest (generation, revision) acted on before a restart: nothing older may be acted on."""
        self.head: Head | None = None
        self._head_version = (0, 0)
        self._behind = 0
        self._late: tuple[int, tuple[int, int]] | None = None

    @property
    def version(self) -> tuple[int, int]:
        """``(generation, revision)`` in force."""
        return (self.generation, self.revision)

    def accepts(self, statement: Statement, held: tuple[int, int]) -> bool:
        """Whether a verified document may replace one of version ``held``."""
        if self.deployment and statement.deployment != self.deployment:
            return False
        return statement.version >= held and statement.generation >= self.generation

    def follow(self, cursor: int, revisions: Sequence[int]) -> bool:
        """Whether entries with these revisions follow on ``cursor`` without a gap."""
        return list(revisions) == list(range(cursor + 1, cursor + 1 + len(revisions)))

    def reached(self, generation: int, revision: int, run: str) -> None:
        """State of this version, read from the server ``run``, is in force."""
        self.generation = generation
        self.revision = revision
        self.run = run
        self.floor = max(self.floor, (generation, revision))
        self._behind = 0

    def may_serve(self) -> bool:
        """Whether what is in force is not older than what was acted on before."""
        return self.generation > 0 and self.version >= self.floor

    def is_set_back(self, statement: Statement, head: Head) -> bool:
        """Whether a head speaks of less than one that was written before it: what is in force was lost, also where the
        run is the same (emptied, and the database restored from a backup).
        """
        return self.head is not None and head.at_us > self.head.at_us and statement.version < self._head_version

    def head_read(self, statement: Statement, head: Head, run_id: str) -> HeadVerdict:
        """Judges a verified head that was read from the server ``run_id``. Keeps it when it says something new."""
        if head.run_id != run_id or (self.deployment and statement.deployment != self.deployment):
            return HeadVerdict.IGNORED
        if statement.version < self._head_version or statement.generation < self.generation:
            return HeadVerdict.IGNORED
        if run_id != self.run:
            return HeadVerdict.RESYNC
        if statement.version < self.version:
            return HeadVerdict.RESYNC if self._went_back(statement, head) else HeadVerdict.LATE
        if self.head is not None and statement.version == self._head_version and head.at_us < self.head.at_us:
            return HeadVerdict.IGNORED
        self.head = head
        self._head_version = statement.version
        if statement.version == self.version:
            self._behind = 0
            return HeadVerdict.CURRENT
        self._behind += 1
        if self._behind > HEADS_BEHIND_MAX or statement.generation != self.generation:
            self._behind = 0
            return HeadVerdict.RESYNC
        return HeadVerdict.BEHIND

    def _went_back(self, statement: Statement, head: Head) -> bool:
        """Whether a head that names less than what is in force was written after what is in force was published: then
        the control plane does not know of it any more.

        It was, when another head had been read with that already in force: a head goes out only when it names the last
        entry of the stream.
        """
        earlier = self._late
        if earlier is None or earlier[0] != head.at_us:
            self._late = (head.at_us, self.version)
        return earlier is not None and earlier[0] < head.at_us and statement.version < earlier[1]
