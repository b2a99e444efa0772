"""The keys of subjects: made when a subject is first met, found again by a keyed digest, destroyed by an erasure.

A key that was erased must never seal another event. Each erasure raises a count in the rows that ledger transactions
lock; keys found under an older count are forgotten. What was made in a transaction is not remembered past it: it may
be rolled back.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import BigInteger, ColumnElement, Connection, Select, bindparam, or_, select, update

from licet.wire.usage import UsageEvent
from licet_control_plane.core.accounting import storable
from licet_control_plane.core.sealed_events import (
    ALTERED,
    KEY_BYTES,
    NONCE_BYTES,
    UNREADABLE,
    Damaged,
    Sealed,
    open_event,
    public_event,
)
from licet_control_plane.core.subject_keys import PERSON_BYTES, LedgerKey, Subject
from licet_control_plane.store.database import insert_sql, raw_rows
from licet_control_plane.store.schema import logs, subjects

KEYS_MAX: Final = 65_536
"""Keys kept ready: some 500 bytes each. A subject not among them costs a row read."""
_ASK_MAX: Final = 500
"""Values in one question: SQLite takes at least 999."""
_MADE_COLUMNS: Final = ("tenant", "type", "tag", "principal", "key", "created_at")


@dataclass(frozen=True, slots=True)
class SubjectKey:
    """A subject's number, and its key, raw and ready."""

    number: int
    key: bytes
    cipher: AESGCM


class SubjectKeys:
    """Keys for sealing, of whoever writes the ledger. Not for several threads at once."""

    def __init__(self, ledger_key: LedgerKey) -> None:
        self.ledger_key = ledger_key
        self._erasures = -1
        # Two generations instead of an order of use: what was not asked for while the newer one filled up goes.
        self._newer: dict[Subject, SubjectKey] = {}
        self._older: dict[Subject, SubjectKey] = {}
        self._made_now: dict[Subject, SubjectKey] = {}

    def begin(self, erasures: int) -> None:
        """A transaction begins, in which ``erasures`` is what the shard's row says."""
        self._made_now = {}
        if erasures != self._erasures:
            self._erasures = erasures
            self._newer, self._older = {}, {}

    def of(self, connection: Connection, wanted: Collection[Subject], *, now_us: int) -> dict[Subject, SubjectKey]:
        """The keys of ``wanted``; made for those that have none.

        Raises:
            Damaged: a key was altered in the database.
        """
        found: dict[Subject, SubjectKey] = {}
        unknown: dict[bytes, Subject] = {}
        for subject in wanted:
            known = self._newer.get(subject) or self._made_now.get(subject)
            if known is None and (known := self._older.get(subject)) is not None:
                self._remember(subject, known)
            if known is None:
                unknown[self.ledger_key.tag(subject)] = subject
            else:
                found[subject] = known
        if unknown:
            stored = self._stored(connection, unknown)
            for subject, known in stored.items():
                self._remember(subject, known)
            found |= stored
            new = {tag: subject for tag, subject in unknown.items() if subject not in stored}
            if new:
                self._made_now |= self._made(connection, new, now_us)
                found |= {subject: self._made_now[subject] for subject in new.values()}
        return found

    def _made(self, connection: Connection, new: dict[bytes, Subject], now_us: int) -> dict[Subject, SubjectKey]:
        random = os.urandom((KEY_BYTES + NONCE_BYTES) * len(new))
        made = (
            random[start : start + KEY_BYTES + NONCE_BYTES] for start in range(0, len(random), KEY_BYTES + NONCE_BYTES)
        )
        rows = [
            (
                subject.tenant,
                storable(subject.type),
                tag,
                tag[PERSON_BYTES:] if subject.on_behalf_of else None,
                self.ledger_key.wrap(fresh[:KEY_BYTES], tag, fresh[KEY_BYTES:]),
                now_us,
            )
            # Always in the same order: two workers that meet the same subjects then wait, and never for each other.
            for fresh, (tag, subject) in zip(made, sorted(new.items()), strict=True)
        ]
        statement = insert_sql(connection.dialect.name, subjects, _MADE_COLUMNS)
        connection.exec_driver_sql(f"{statement} ON CONFLICT (tag) DO NOTHING", rows)
        return self._stored(connection, new)  # another worker's key, where that one was first

    def _stored(self, connection: Connection, tags: dict[bytes, Subject]) -> dict[Subject, SubjectKey]:
        found: dict[Subject, SubjectKey] = {}
        for some in _parts(list(tags)):
            query = select(subjects.c.number, subjects.c.tag, subjects.c.key).where(subjects.c.tag.in_(some))
            for number, tag, wrapped in connection.execute(query):
                key = self.ledger_key.unwrap(bytes(wrapped or b""), bytes(tag))
                found[tags[bytes(tag)]] = SubjectKey(number, key, AESGCM(key))
        return found

    def _remember(self, subject: Subject, key: SubjectKey) -> None:
        self._newer[subject] = key
        if len(self._newer) >= KEYS_MAX // 2:
            self._older, self._newer = self._newer, {}


@lru_cache
def _of_numbers() -> Select[Any]:
    """Asks for subjects by ``_ASK_MAX`` numbers."""
    columns = (subjects.c.number, subjects.c.tenant, subjects.c.type, subjects.c.tag, subjects.c.key)
    wanted = [bindparam(f"number_{index}", type_=BigInteger) for index in range(_ASK_MAX)]
    return select(*columns).where(subjects.c.number.in_(wanted))


class EventReader:
    """Opens events as rows have them, within one transaction. ``ledger_key`` ``None``: personal parts stay closed."""

    def __init__(self, connection: Connection, ledger_key: LedgerKey | None) -> None:
        self._connection = connection
        self._ledger_key = ledger_key
        self._ciphers: dict[int, AESGCM | None] = {}
        self.erased: set[int] = set()
        """Subjects met so far that have no key."""
        self.owners: dict[int, tuple[str, str]] = {}
        """The tenant and the type of each subject met so far that is there."""
        self._log_ids: dict[int, str] = {}

    def read(self, rows: Sequence[Any]) -> list[UsageEvent]:
        """The events of rows ``(log, subject, public, commitment, personal)``, in order; ``ERASED``, ``UNREADABLE`` or
        ``ALTERED`` for the subject where the personal part cannot be read.

        Raises:
            Damaged: the public part of one was altered.
        """
        ciphers = self.ciphers({row[1] for row in rows})
        events: list[UsageEvent] = []
        for log, subject, public, commitment, personal in rows:
            cipher = ciphers[subject]
            if personal is None:
                events.append(public_event(public))
            elif cipher is None:
                events.append(public_event(public, shown=UNREADABLE))
            else:
                try:
                    events.append(open_event(self.log_id(log), Sealed(public, commitment, personal), cipher))
                except Damaged:  # verify says so; a report shows what it can
                    events.append(public_event(public, shown=ALTERED))
        return events

    @property
    def has_key(self) -> bool:
        """Whether personal parts are opened at all."""
        return self._ledger_key is not None

    def ciphers(self, numbers: Collection[int]) -> dict[int, AESGCM | None]:
        """By number, at least of ``numbers``; ``None`` for a subject that was erased, or whose key cannot be had."""
        if len(self._ciphers) > KEYS_MAX:
            self._ciphers, self.erased, self.owners = {}, set(), {}
        missing = [number for number in numbers if number not in self._ciphers]
        for some in _parts(missing):
            self._ciphers.update(dict.fromkeys(some))
            # One question of one length, put together once; what is asked twice comes once.
            asked = [*some, *[some[0]] * (_ASK_MAX - len(some))]
            for number, tenant, type, tag, wrapped in raw_rows(self._connection, _of_numbers(), asked):
                self.owners[number] = (tenant, type)
                if wrapped is None:
                    self.erased.add(number)
                elif self._ledger_key is not None and tag is not None:
                    try:
                        self._ciphers[number] = AESGCM(self._ledger_key.unwrap(bytes(wrapped), bytes(tag)))
                    except Damaged:
                        pass  # verify says so; a report shows what it can
        return self._ciphers

    def log_id(self, log: int) -> str:
        """The id of the log with a number; empty for one that is not there."""
        known = self._log_ids.get(log)
        if known is None:
            found = self._connection.scalar(select(logs.c.log_id).where(logs.c.log == log))
            known = self._log_ids[log] = found or ""
        return known


def unknown(connection: Connection, numbers: Collection[int]) -> list[int]:
    """Those of ``numbers`` that no subject has, neither a living nor an erased one."""
    known: set[int] = set()
    for some in _parts(list(numbers)):
        known |= set(connection.scalars(select(subjects.c.number).where(subjects.c.number.in_(some))))
    return sorted(set(numbers) - known)


def is_about(ledger_key: LedgerKey, tenant: str, type: str, id: str) -> ColumnElement[bool]:
    """The condition on ``subjects`` for whatever concerns somebody: as the one who acts, or on whose behalf.

    ``on_behalf_of`` has no type of its own: ``id``, ``type/id`` and ``type:id`` are all taken for them.
    """
    person = ledger_key.person(tenant, type, id)
    acts = subjects.c.tag.between(person + bytes(PERSON_BYTES), person + b"\xff" * PERSON_BYTES)
    names = (id, f"{type}/{id}", f"{type}:{id}")
    if not id:
        return acts
    return or_(acts, subjects.c.principal.in_([ledger_key.principal(tenant, name) for name in names]))


def forget(connection: Connection, whom: ColumnElement[bool], *, now_us: int) -> None:
    """Destroy the keys of subjects, and what they could be found by."""
    connection.execute(update(subjects).where(whom).values(tag=None, principal=None, key=None, erased_at=now_us))


def fits(connection: Connection, ledger_key: LedgerKey) -> bool:
    """Whether ``ledger_key`` is what this ledger's keys were wrapped with; true of a ledger without subjects."""
    newest = connection.execute(
        select(subjects.c.tag, subjects.c.key)
        .where(subjects.c.key.is_not(None))
        .order_by(subjects.c.number.desc())
        .limit(5)
    ).all()
    for tag, wrapped in newest:
        try:
            ledger_key.unwrap(bytes(wrapped), bytes(tag))
        except Damaged:
            continue
        return True  # one altered row must not keep a server from starting
    return not newest


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[start : start + _ASK_MAX] for start in range(0, len(values), _ASK_MAX))
