"""What a database that was restored from a backup can tell of the one that is lost, by what that one published. Pure.

Nothing here is proven: a manifest or a head is looked at and not verified, and a heartbeat is what anybody says who can
write Redis. It decides two things only: that publishing stops, which an operator sees and gets past with a new
generation, and how that is numbered. Claims are believed up to ``GENERATIONS_LOST_MAX`` beyond the database, so that a
new generation is above every one that stops publishing, and no claim takes the numbers near their end: at 1,000 for
each start that an operator makes, the 2^53 that Lua can count last for nine trillion starts.

Source: ``docs/adr/0042-heads-vouch-for-what-was-checked.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from licet.wire.documents import Heartbeat
from licet.wire.signing import Statement

GENERATIONS_LOST_MAX: Final = 1_000
"""Generations that a database which was restored may not know of. More than that is not believed."""


def is_believed(claimed: int, generation: int) -> bool:
    """Whether a database of ``generation`` may have lost a generation that is called ``claimed``."""
    return claimed <= generation + GENERATIONS_LOST_MAX


def new_generation(generation: int, seen: Iterable[int]) -> int:
    """How a new generation is called: above the database's own, and above all that was ``seen`` and is believed. Two
    that are called the same would be mixed.
    """
    return max([generation, *(one for one in seen if is_believed(one, generation))]) + 1


def head_version(head: Statement | None, *, deployment: str, generation: int) -> tuple[int, int]:
    """What the ``head`` names, when it is one of the ``deployment`` and is believed; else zeros."""
    if head is None or head.deployment != deployment or not is_believed(head.generation, generation):
        return (0, 0)
    return head.version


def newest_acted(heartbeats: Iterable[Heartbeat], *, deployment: str, generation: int) -> Heartbeat | None:
    """The heartbeat of who acted on most, of those of the ``deployment`` that are believed; ``None`` for none.

    A sidecar of another deployment, or one that does not know of which it is, says nothing of this database.
    """
    believed = [one for one in heartbeats if one.deployment == deployment and is_believed(one.acted[0], generation)]
    return max(believed, key=lambda one: one.acted, default=None)
