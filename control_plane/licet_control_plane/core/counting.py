"""How the limits of one tenant are counted: which kind each is, and the window that a quota belongs to. Pure.

A quota is named ``<limit key>[@<scope digest>]:<window start>``; a grant's limit key is ``<limit key>+<grant id>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum

from licet.domain.approvals import is_approval_key
from licet.domain.catalog import Catalog, Grant, License, Limit
from licet.domain.entitlements import entitlements_of
from licet.domain.ids import LimitKey
from licet.domain.windows import Period, Window, window_of
from licet.wire.names import scope_digest, subject_value
from licet.wire.registers import Marker, parts_of_marker
from licet.wire.usage import UsageEvent


class Kind(StrEnum):
    """What the amount of a limit counts."""

    UNITS = "units"
    BUDGET = "budget"
    """Nanos of a currency."""
    RATE = "rate"
    """Thousandths of a unit a second; its registers hold shares."""


class Counting:
    """The limits and grants of a license under a catalog. ``license_`` is ``None`` when there is none any more."""

    def __init__(self, license_: License | None, catalog: Catalog, limits_of_plans: Mapping[str, Limit]) -> None:
        """``limits_of_plans``: ``limits_by_key(catalog)``, made once for many tenants."""
        self._license = license_
        self._limits: dict[str, Limit] = {}
        self._grants: dict[str, Grant] = {}
        if license_ is not None:
            for entitlement in entitlements_of(license_, catalog).values():
                self._limits.update((limit.key, limit) for limit in entitlement.limits)
                self._grants.update((grant.key, grant) for grant in entitlement.grants)
        self._of_plans = limits_of_plans

    def limit(self, key: str) -> Limit | None:
        """The limit of a key, or the one that the key's grant tops up. Also of another plan: a tenant may return to
        the plan that it left."""
        name = self._topped_up(key)
        return self._limits.get(name) or self._of_plans.get(name)

    def kind(self, key: str) -> Kind | None:
        """The kind of a limit; ``None`` when the license does not have it: elsewhere the same key may mean another."""
        grant = self._grants.get(key)
        limit = self._limits.get(grant.limit if grant else key)
        if limit is None:
            return None
        return Kind.RATE if limit.is_rate else Kind.BUDGET if limit.currency else Kind.UNITS

    def ends_for_good(self, key: str) -> bool:
        """Whether a window of a limit that is over stays over. The end of a term or of a grant can be moved, that of an
        approval cannot."""
        limit = self.limit(key)
        if limit is None and is_approval_key(key):
            return True
        return limit is not None and self._topped_up(key) == key and limit.per is not Period.TERM

    def window(self, key: str, start: int, marker: Marker | None) -> Window | None:
        """The window of a quota that starts at ``start`` (seconds).

        From the grant, or from the limit and the terms of the license. When these were changed since, the window is
        what the mark's ``marker`` says; without one, ``None``: nobody leases from it.
        """
        window = self._derived(key, start)
        if window is not None and window.start == start:
            return window
        if marker is None:
            return None
        if marker.start == start:
            return Window(start, marker.end)
        # The window before ended, at the latest, when this one began.
        return Window(start, marker.start) if marker.previous_start == start else None

    def starts(self) -> Iterator[int]:
        """Starts of windows that may be older than a year: of the term, and of grants."""
        if self._license is not None:
            yield self._license.starts_s
        for grant in self._grants.values():
            yield grant.starts_s

    def _topped_up(self, key: str) -> str:
        """The limit that a grant's key tops up, also of a grant that is not there any more; any other key is its own.

        A limit's own key may hold a ``+``: ``reports:day@context.team+subject``.
        """
        if (grant := self._grants.get(key)) is not None:
            return grant.limit
        if key in self._limits or key in self._of_plans:
            return key
        return key.rpartition("+")[0] or key

    def _derived(self, key: str, start: int) -> Window | None:
        if (grant := self._grants.get(key)) is not None:
            return Window(grant.starts_s, grant.ends_s)
        limit = self.limit(key)
        if limit is None or self._topped_up(key) != key:
            return None
        starts_s, ends_s = (self._license.starts_s, self._license.stops_s) if self._license else (0, 0)
        if limit.per is Period.TERM and self._license is None:
            return None
        try:
            return window_of(limit.per, limit.anchor, start, starts_s=starts_s, ends_s=ends_s)
        except ValueError:
            return None  # a start that no window has: someone else wrote it


def limits_by_key(catalog: Catalog) -> dict[str, Limit]:
    """Every limit of every plan by its key; of plans that have the same one, any."""
    return {
        limit.key: limit
        for plan in catalog.plans.values()
        for entitlement in plan.features.values()
        for limit in entitlement.limits
    }


def limit_key_of(marker_name: str) -> LimitKey:
    """The limit key of a marker's name."""
    return parts_of_marker(marker_name)[0]


def scope_values(scopes: Iterable[tuple[str, ...]], events: Iterable[UsageEvent]) -> dict[str, dict[str, str]]:
    """What scope digests stand for, as far as ``events`` tell: digest to value by path, such as ``context.team``.

    A digest cannot be turned back; whoever used a quota lately is found by doing again what the sidecar did.
    """
    wanted = {scope for scope in scopes if scope}
    found: dict[str, dict[str, str]] = {}
    for event in events:
        for scope in wanted:
            values = tuple(_scope_value(path, event) for path in scope)
            found.setdefault(scope_digest(values), dict(zip(scope, values, strict=True)))
    return found


def _scope_value(path: str, event: UsageEvent) -> str:
    if path == "subject":
        return subject_value(event.subject_type, event.subject_id)
    return str(event.context.get(path.removeprefix("context."), ""))
