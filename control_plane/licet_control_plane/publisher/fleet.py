"""The registry of sidecars: who was heard of, when, and who said goodbye.

A sidecar that retires says so in its last heartbeat; one that stops and keeps its id, because of open reservations,
removes its heartbeat. A heartbeat that is gone because Redis lost it looks the same, so a
goodbye counts only when the heartbeat had been seen under the same epoch and run that still hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from licet.wire.documents import Heartbeat
from licet.wire.registers import HOLD_MARGIN_S, Pair
from licet_control_plane.core.fleet import GONE_S_MIN, Sidecar, State, heard
from licet_control_plane.core.learning import Holder
from licet_control_plane.core.reclaim import HolderState, holder_state
from licet_control_plane.store import sidecars as store
from licet_control_plane.store.database import Database

SAVE_S_MIN: Final = 5.0
"""How often heartbeats alone are written to the database; news is written at once."""

FORGET_S: Final = 600.0
"""How often sidecars that are gone for good are dropped: pods come and go, and a registry must not grow with them."""

GAP_S_MAX: Final = HOLD_MARGIN_S
"""A registry that could not look for longer than this may have missed a sidecar that Redis then forgot."""


class Fleet:
    """All sidecars by id, as of the last look. Used by the publisher's task; others only read."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.sidecars: dict[str, Sidecar] = {}
        self._seen_under: dict[str, Pair] = {}
        self._looked_s = -math.inf
        self._saved_s = -math.inf
        self._unsaved: set[str] = set()
        self._complete_since_s = -math.inf
        self._watched_since_s = math.inf
        self._forgot_s = -math.inf

    async def load(self) -> None:
        """Take up what is remembered."""
        for sidecar in await self._database.read(store.load):
            self.sidecars[sidecar.heartbeat.sidecar] = sidecar

    def live_count(self, now_s: float) -> int:
        """Sidecars heard of lately."""
        return sum(sidecar.state(now_s) is State.LIVE for sidecar in self.sidecars.values())

    def holders(self) -> list[Holder]:
        """Sidecars that may hold leases."""
        return [
            Holder(
                one.heartbeat.sidecar,
                one.last_heard_s,
                Pair(one.heartbeat.asserted_epoch, one.heartbeat.asserted_run),
                one.heartbeat.asserted_ms,
            )
            for one in self.sidecars.values()
            if not one.gone
        ]

    @property
    def looked_s(self) -> float:
        """When heartbeats were last looked at, in contents that were intact; minus infinity for never."""
        return self._looked_s

    @property
    def complete_since_s(self) -> float:
        """Since when the registry has surely known every sidecar, and all that they said."""
        return self._complete_since_s

    def complete_for_s(self, now_s: float) -> float:
        """For how long the registry has surely known every sidecar."""
        return now_s - self._complete_since_s

    def watched_s(self, now_s: float) -> float:
        """For how long heartbeats have been looked at without a pause: silence before that says nothing."""
        if now_s - self._looked_s > GAP_S_MAX:
            return 0.0
        return max(0.0, now_s - self._watched_since_s)

    def dead_count(self, now_s: float) -> int:
        """Sidecars that neither signed off nor were heard of, and may have left units behind."""
        return sum(holder_state(one, now_s) is HolderState.DEAD for one in self.sidecars.values())

    async def retire(self, sidecars: Collection[str], now_s: float) -> None:
        """Note that these hold nothing any more, as if they had signed off. One that is heard of again is back."""
        for name in sidecars:
            if name in self.sidecars:
                self.sidecars[name] = replace(self.sidecars[name], gone=True)
                self._unsaved.add(name)
        await self.save(now_s)

    def contents_were_lost(self, now_s: float, *, fresh: bool) -> None:
        """Redis lost its data, heartbeats included. ``fresh``: nothing was ever published, so nobody holds anything."""
        self._seen_under.clear()
        if not fresh and now_s - self._looked_s > GAP_S_MAX:
            self._complete_since_s = now_s

    async def update(self, heartbeats: Mapping[str, Heartbeat], contents: Pair, now_s: float) -> list[str]:
        """Take in what was found in contents that are intact. Returns sidecars whose heartbeat can be removed."""
        news = False
        for name, heartbeat in heartbeats.items():
            self._seen_under[name] = contents
            old = self.sidecars.get(name)
            if old is not None and old.heartbeat.at_us == heartbeat.at_us:
                continue  # nothing was heard since: the hash keeps what a dead sidecar said last
            news = news or old is None or old.gone or old.heartbeat.incarnation != heartbeat.incarnation
            news = news or heartbeat.retired
            self.sidecars[name] = heard(old, heartbeat, now_s)
            self._unsaved.add(name)
        for name, seen_under in list(self._seen_under.items()):
            if name in heartbeats:
                continue
            del self._seen_under[name]
            if seen_under == contents and name in self.sidecars:
                self.sidecars[name] = replace(self.sidecars[name], gone=True)
                self._unsaved.add(name)
                news = True
        if now_s - self._looked_s > GAP_S_MAX:
            self._watched_since_s = now_s
        self._looked_s = now_s
        if self._unsaved and (news or now_s - self._saved_s >= SAVE_S_MIN):
            await self.save(now_s)
        if now_s - self._forgot_s >= FORGET_S:
            await self._forget_gone(now_s)
        forgotten = [
            name
            for name in heartbeats
            if name in self.sidecars
            and (self.sidecars[name].heartbeat.retired or now_s - self.sidecars[name].last_heard_s >= GONE_S_MIN)
        ]
        for name in forgotten:
            # That its heartbeat is gone next time is our doing: it said no goodbye, and may have left units behind.
            del self._seen_under[name]
        return forgotten

    async def _forget_gone(self, now_s: float) -> None:
        """Those that left a day ago: they hold nothing, and what they spent is counted in the base of its quota."""
        self._forgot_s = now_s
        gone = [
            name
            for name, one in self.sidecars.items()
            if one.gone and name not in self._unsaved and now_s - one.last_heard_s >= GONE_S_MIN
        ]
        if gone:
            await self._database.write(store.forget, gone)
            for name in gone:
                del self.sidecars[name]
                self._seen_under.pop(name, None)

    async def save(self, now_s: float) -> None:
        """Write what changed to the database."""
        changed = [self.sidecars[name] for name in self._unsaved]
        await self._database.write(store.save, changed)
        self._unsaved.clear()
        self._saved_s = now_s
