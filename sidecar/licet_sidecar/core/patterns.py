"""Which documents govern an action, found by its name and not by asking all of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class ByPattern(Generic[_T]):
    """Things by the patterns of actions they are for: exact names, ``prefix.*`` (any depth), or ``*``.

    The same as ``licet.domain.catalog.matches`` of each; a test holds them together.
    """

    def __init__(self) -> None:
        self._things: list[_T] = []
        self._by_pattern: dict[str, list[int]] = {}

    def add(self, patterns: Iterable[str], thing: _T) -> None:
        """Adds a thing that is for whatever one of ``patterns`` matches."""
        place = len(self._things)
        self._things.append(thing)
        for pattern in patterns:
            self._by_pattern.setdefault(pattern, []).append(place)

    def matching(self, name: str) -> list[_T]:
        """The things for the action of that name, in the order in which they were added."""
        places = {*self._by_pattern.get("*", ()), *self._by_pattern.get(name, ())}
        end = name.find(".")
        while end >= 0:
            places.update(self._by_pattern.get(f"{name[:end]}.*", ()))
            end = name.find(".", end + 1)
        return [self._things[place] for place in sorted(places)]
