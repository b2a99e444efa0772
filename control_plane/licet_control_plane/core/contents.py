"""What a Redis server holds, compared with what it should hold. Pure.

Heads vouch for the server's contents, so they go out only after ``assess`` said INTACT.
Source: the protocol of sync, ``docs/adr/0001-redis-is-not-the-record.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Found:
    """What is there. ``last_revision``: the last id of the stream of changes, 0 when there is no stream.

    ``has_manifest``: the manifest is one of this database, not older than the last published. ``has_chunks``: all that
    the last published manifest names are there. ``last_is_own``: the last entry of the stream is the change that the
    database has under that revision, as far as it says which it is. ``generation``: of the manifest, as it says itself.
    ``head`` and ``acted``: the newest (generation, revision) that the head names, and that a sidecar says it has acted
    on, as far as they are believed (``core.lost``).
    """

    run_id: str
    deployment: str
    epoch: int
    last_revision: int
    has_manifest: bool
    has_chunks: bool = True
    last_is_own: bool = True
    generation: int = 0
    head: tuple[int, int] = (0, 0)
    acted: tuple[int, int] = (0, 0)

    @property
    def has_sentinel(self) -> bool:
        """Whether the key that says "this data was put here by …" exists."""
        return bool(self.deployment)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How a server keeps what it is told. ``eviction_policy`` is its ``maxmemory-policy``, empty when it says none."""

    eviction_policy: str = ""
    memory_bytes_max: int = 0
    append_only: bool = True

    @property
    def evicts(self) -> bool:
        """Whether it throws data away when its memory is full, instead of refusing more."""
        return self.memory_bytes_max > 0 and self.eviction_policy not in ("", "noeviction")

    @property
    def warning(self) -> str:
        """What is wrong with that and what to do, for people; empty when nothing is.

        No promise hangs on it: what was evicted or not kept is missed, and learned again. But leasing stops meanwhile.
        """
        if self.evicts:
            return (
                f"Redis evicts data when its memory is full (maxmemory-policy {self.eviction_policy}): each evicted"
                " quota stops leasing for its tenant until it was learned again. Set maxmemory-policy noeviction."
            )
        if not self.append_only:
            return (
                "Redis keeps no append-only file: each restart of it loses all quotas, and leasing stops until they"
                " were learned again. Set appendonly yes."
            )
        return ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What should be there. ``revision`` is the last that this publisher published. ``revision_published`` is the last
    that is published, and ``revision_allocated`` the last of all, as the database said after the server was looked at:
    another publisher may have led, and whoever asks the control plane itself acts on what is not published yet.

    ``run_id`` is that of the server whose contents were checked last, empty for none.
    """

    deployment: str
    generation: int
    epoch: int
    revision: int
    revision_published: int
    revision_allocated: int
    has_manifest: bool
    run_id: str


class Contents(Enum):
    """The verdict, worst first."""

    FOREIGN = "another deployment's data"
    NEWER = "newer than the database"
    LOST = "lost"
    INCOMPLETE = "incomplete"
    NEW_RUN = "intact on another run of the server"
    INTACT = "intact"


def assess(found: Found, expected: Expected) -> Contents:
    """What to make of a server.

    FOREIGN and NEWER stop the publisher. LOST needs a new epoch and everything again; INCOMPLETE everything again
    (a failover lost the newest writes, or a key is missing); NEW_RUN needs every mark put in learning.
    """
    if found.has_sentinel and found.deployment != expected.deployment:
        return Contents.FOREIGN
    # Also when a restored database has used the same numbers again meanwhile, for something else.
    if found.last_revision > expected.revision_allocated or found.epoch > expected.epoch or not found.last_is_own:
        return Contents.NEWER
    # The entries may be lost, and what they announced may be known all the same. A head names what was noted before as
    # published; from what it vouches for a sidecar would take what is written now, under the same number.
    if found.head > (expected.generation, expected.revision_published):
        return Contents.NEWER
    if found.acted > (expected.generation, expected.revision_allocated):
        return Contents.NEWER
    if not found.has_sentinel:
        return Contents.LOST
    # One more than published is a publisher that died between the entry and its note in the database.
    has_bundle = found.has_manifest and found.has_chunks
    if found.last_revision < expected.revision or (expected.has_manifest and not has_bundle):
        return Contents.INCOMPLETE
    if found.run_id != expected.run_id:
        return Contents.NEW_RUN
    return Contents.INTACT
