"""Access requests as a sidecar sees them: what the tenant's document says of each, and what was asked here since.

The document is the truth; what was asked here and is not in it yet is only remembered, so that who asks again gets the
same id. Nothing is sent from here: the event of a decision carries the id, and the ledger's side makes a request of it.
Owned by one event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

from licet.domain.approvals import (
    EXPIRES_AFTER_S,
    OPEN_MAX,
    QUIET_US,
    RequestEntry,
    RequestState,
    request_id,
    request_key,
)
from licet_sidecar.core.inquiry import Inquiry

ASKED_MAX: Final = 10_000
"""Requests remembered that no document has yet. One that is forgotten is asked for under the same id within the
hour."""
_EXPIRES_AFTER_US: Final = EXPIRES_AFTER_S * 1_000_000


class Asked(NamedTuple):
    """``id`` is empty when there is, or may be, no request. ``denial``: somebody said no, not long ago."""

    id: str
    denial: RequestEntry | None = None
    is_full: bool = False


class TenantRequests:
    """The requests of one license document."""

    __slots__ = ("_by_id", "_entries", "_newest")

    def __init__(self, entries: Iterable[RequestEntry]) -> None:
        self._entries = tuple(entries)
        self._newest = {entry.key: entry for entry in self._entries}
        self._by_id = {entry.id: entry for entry in self._entries}

    def newest(self, key: str) -> RequestEntry | None:
        """The latest request for a key."""
        return self._newest.get(key)

    def open(self, key: str, now_us: int) -> RequestEntry | None:
        """The request for a key that people can decide, also when an earlier one changed since."""
        entry = self._newest.get(key)
        if entry is None or entry.is_open(now_us):
            return entry
        return next((one for one in reversed(self._entries) if one.key == key and one.is_open(now_us)), None)

    def get(self, id_: str) -> RequestEntry | None:
        """The request with an id."""
        return self._by_id.get(id_)

    def live(self, key: str, now_us: int) -> RequestEntry | None:
        """The approval that is in force for a key."""
        entry = self._newest.get(key)
        if entry is None or entry.is_live(now_us):
            return entry
        # One that was used up and asked for again: it has not ended, and what is left of it can be taken.
        return next((one for one in reversed(self._entries) if one.key == key and one.is_live(now_us)), None)

    def is_full(self, now_us: int) -> bool:
        """Whether the tenant has as many open requests as it may have."""
        return len(self._entries) >= OPEN_MAX and sum(one.is_open(now_us) for one in self._entries) >= OPEN_MAX


NO_REQUESTS: Final = TenantRequests(())


class _Remembered(NamedTuple):
    tenant: str
    key: str
    previous: str
    until_us: int


class RequestBook:
    """What was asked here and is in no document yet."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, _Remembered] = OrderedDict()
        self._by_key: dict[str, str] = {}

    def ask(self, known: TenantRequests, tenant: str, key: str, now_us: int, *, records: bool) -> Asked:
        """The request for a key. Without ``records`` none is begun: then there is only one that was.

        The document's open request, else the one that was asked for here, else a new one.
        """
        pending = known.open(key, now_us)
        if pending is not None:
            return Asked(pending.id)
        entry = known.newest(key)
        if entry is not None and entry.state is RequestState.DENIED and now_us < entry.at_us + QUIET_US:
            return Asked(entry.id, entry)
        previous = entry.id if entry is not None else ""
        full = known.is_full(now_us)
        asked = self._by_key.get(key)
        if asked is not None:
            remembered = self._by_id[asked]
            if remembered.previous == previous and now_us < remembered.until_us and not full:
                return Asked(asked)
            self._forget(asked)
        if full:
            return Asked("", is_full=True)
        if not records:
            return Asked("")
        new = request_id(key, previous, now_us)
        while known.get(new) is not None:  # a request that followed the same one, or one of this hour
            new = request_id(key, new, now_us)
        self._by_id[new] = _Remembered(tenant, key, previous, now_us + _EXPIRES_AFTER_US)
        self._by_key[key] = new
        if len(self._by_id) > ASKED_MAX:
            self._forget(next(iter(self._by_id)))
        return Asked(new)

    def until_us(self, tenant: str, id_: str) -> int:
        """Until when a request that was asked for here is remembered; 0 when it is not."""
        remembered = self._by_id.get(id_)
        return remembered.until_us if remembered is not None and remembered.tenant == tenant else 0

    def _forget(self, id_: str) -> None:
        remembered = self._by_id.pop(id_)
        if self._by_key.get(remembered.key) == id_:
            del self._by_key[remembered.key]


def key_for(inquiry: Inquiry, rule: str) -> str:
    """The key of a request for what an inquiry asks, where ``rule`` wants an approval."""
    subject = (inquiry.subject_type, inquiry.subject_id)
    return request_key(inquiry.tenant, subject, inquiry.on_behalf_of, inquiry.action, rule)
