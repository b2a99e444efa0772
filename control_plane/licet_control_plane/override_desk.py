"""Break-glass overrides: set, cleared, published. One transaction each: the override, the manifest with all that are in
force as a revision of its own, and the line in the audit trail. The bundle's content stays as it is.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from licet.domain.approvals import Override
from licet.wire.documents import BUNDLE, BUNDLE_KEY, Manifest
from licet_control_plane.changes import Changes
from licet_control_plane.core.overrides import checked, effect_of
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.store import access, bundles, meta, overrides, revisions
from licet_control_plane.store.database import Database
from licet_control_plane.store.overrides import StoredOverride


class OverrideExists(Exception):
    """There is another override with this id; the argument is the id."""


class OverrideUnknown(Exception):
    """There is no such override; the argument is its id."""


@dataclass(frozen=True, slots=True)
class OverrideAsked:
    """An override to set, from now on for ``lasts_s`` seconds. Without ``id`` it gets one."""

    action: str
    effect: str
    lasts_s: int
    reason: str
    tenant: str = ""
    subject: str = ""
    id: str = ""


class OverrideDesk:
    """``wake`` has what is made published."""

    def __init__(
        self, database: Database, changes: Changes, *, wake: asyncio.Event, now_s: Callable[[], float]
    ) -> None:
        self._database = database
        self._changes = changes
        self._wake = wake
        self._now_s = now_s

    async def set(self, asked: OverrideAsked, *, by: str) -> tuple[StoredOverride, int, bool]:
        """Put an override in force. With the id of one that says the same it changes nothing.

        Returns it, the revision that publishes it, and whether it is new.

        Raises:
            ChangeInvalid: it cannot be.
            OverrideExists: its id is another's.
        """
        made = await self._database.write(self._set, asked, by)
        self._wake.set()
        return made

    async def clear(self, id_: str, *, by: str) -> tuple[StoredOverride, int]:
        """End an override before its time. One that is over stays as it is.

        Raises:
            OverrideUnknown: there is none.
        """
        made = await self._database.write(self._clear, id_, by)
        self._wake.set()
        return made

    def _set(self, connection: Connection, asked: OverrideAsked, by: str) -> tuple[StoredOverride, int, bool]:
        meta.lock(connection)
        now_us = self._now_us()
        id_ = asked.id or secrets.token_hex(8)
        override = Override(
            id=id_,
            action=asked.action,
            effect=effect_of(asked.effect),
            ends_us=now_us + asked.lasts_s * 1_000_000,
            reason=asked.reason,
            by=by,
            tenant=asked.tenant,
            subject=asked.subject,
        )
        existing = overrides.get(connection, id_)
        if existing is not None:
            same = replace(override, ends_us=existing.set_at_us + asked.lasts_s * 1_000_000, by=existing.override.by)
            if same != existing.override:
                raise OverrideExists(id_)
            return existing, meta.read(connection).revision, False
        in_force = overrides.live(connection, now_us)
        checked(override, asked.lasts_s, len(in_force), self._changes.catalog_in_force(connection).actions)
        overrides.add(connection, override, now_us)
        revision = self._publish(connection, by=by, message=f"override {id_}", now_us=now_us)
        self._audit(connection, "override.set", override, None, _audited(override), by=by, now_us=now_us)
        return StoredOverride(override, now_us, 0, ""), revision, True

    def _clear(self, connection: Connection, id_: str, by: str) -> tuple[StoredOverride, int]:
        meta.lock(connection)
        stored = overrides.get(connection, id_)
        if stored is None:
            raise OverrideUnknown(id_)
        now_us = self._now_us()
        if stored.cleared_at_us or now_us >= stored.override.ends_us:
            return stored, meta.read(connection).revision
        overrides.clear(connection, id_, by=by, now_us=now_us)
        revision = self._publish(connection, by=by, message=f"override {id_} cleared", now_us=now_us)
        self._audit(
            connection, "override.clear", stored.override, _audited(stored.override), None, by=by, now_us=now_us
        )
        return replace(stored, cleared_at_us=now_us, cleared_by=by), revision

    def _publish(self, connection: Connection, *, by: str, message: str, now_us: int) -> int:
        bundle = bundles.current(connection)
        if bundle is None:
            raise ChangeInvalid("action", "no bundle was pushed yet", "Run licet policy push.")
        manifest = Manifest(
            chunks=bundle.chunks,
            observe=bundle.observe,
            message=bundle.message,
            published_us=now_us,
            salt=meta.read(connection).redaction_salt,
            overrides=overrides.live(connection, now_us),
        )
        return revisions.append(
            connection,
            kind=BUNDLE,
            key=BUNDLE_KEY,
            payload=manifest.to_payload(),
            sign=self._changes.sign,
            now_us=now_us,
            by=by,
            message=message,
        )

    @staticmethod
    def _audit(
        connection: Connection, action: str, override: Override, before: Any, after: Any, *, by: str, now_us: int
    ) -> None:
        access.record(
            connection,
            by=by,
            action=action,
            target=override.rule,
            before=before,
            after=after,
            now_us=now_us,
            tenant=override.tenant,
        )

    def _now_us(self) -> int:
        return int(self._now_s() * 1_000_000)


def _audited(override: Override) -> dict[str, Any]:
    """What the audit trail keeps. Whether it is about one subject, not about whom: a name would outlive its erasure."""
    return {
        "action": override.action,
        "effect": override.effect.value,
        "tenant": override.tenant,
        "one_subject": bool(override.subject),
        "ends_at_us": override.ends_us,
        "reason": override.reason,
    }
