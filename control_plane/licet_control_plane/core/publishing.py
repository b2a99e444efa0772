"""In which order the publisher writes, so that it can be killed, paused or overtaken between any two writes. Pure.

Rules:

1. Revisions are published without a gap: one that was committed before the one below it waits for that.
2. Whoever acts on an entry of the stream finds everything it needs: what it names is written before it.
3. An entry that the stream refuses is a repeat when it has the same digest; anything else stops the publisher.
4. What was lost is written again before the sentinel says that it is there, and the run of the server is noted last:
   a publisher that dies in between starts over.
5. After a loss nothing is left that is newer than what was published: a database that is lost may have written it, and
   its revision is given to something else.
6. A head says what was true when the outbox was last found empty, not when the head was written.
7. Of a generation before nothing is written again. What the database has of it was perhaps never published, under
   numbers that a database that is lost had given to something else; and until the new generation is there whole, and a
   head names it, sidecars follow the lost one.

That documents are set only if newer, and a head only where the stream ends at its revision on the server that was
checked, is kept by ``publisher/lua``.
Source: the protocol of sync; ``docs/adr/0042-heads-vouch-for-what-was-checked.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from licet_control_plane.core.contents import Contents


class Write(Enum):
    """What copying one revision takes."""

    CHUNKS = auto()
    LIMITS = auto()
    DOCUMENT = auto()
    ENTRY = auto()


COPYING = (Write.CHUNKS, Write.LIMITS, Write.DOCUMENT, Write.ENTRY)


class Restore(Enum):
    """What putting a server's contents right takes."""

    MARKS_BEGUN = auto()
    MARKS_TOUCHED = auto()
    DOCUMENTS = auto()
    STREAM_END = auto()
    SENTINEL = auto()
    RUN_NOTED = auto()


def restoring(verdict: Contents, *, new_run: bool) -> tuple[Restore, ...]:
    """What to do about a verdict, in order. ``new_run``: the marks were last looked after on another run."""
    again = (Restore.DOCUMENTS, Restore.STREAM_END, Restore.SENTINEL, Restore.RUN_NOTED)
    if verdict is Contents.LOST:
        return (Restore.MARKS_BEGUN, *again)
    touched = (Restore.MARKS_TOUCHED,) if new_run else ()
    if verdict is Contents.INCOMPLETE:
        return (*touched, *again)
    if verdict is Contents.NEW_RUN:
        # That its stream ends where it should says nothing of the rest: a part of what was written while the server
        # changed went to the one before.
        return (*touched, Restore.DOCUMENTS, Restore.RUN_NOTED)
    return ()


def is_written_again(generation: int, *, current: int) -> bool:
    """Whether a published document of ``generation`` is written again where something was lost, in the generation
    ``current`` of the database.
    """
    return generation == current


def contiguous(revisions: Sequence[int], *, after: int) -> int:
    """How many of the ``revisions``, ascending, follow on ``after`` without a gap."""
    for position, revision in enumerate(revisions):
        if revision != after + 1 + position:
            return position
    return len(revisions)


def is_repeat(digest: str, found: str | None) -> bool:
    """Whether an entry that the stream refused is there already. ``found``: the digest there, ``None`` for no entry."""
    return found == digest
