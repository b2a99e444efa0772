"""Recorded decisions asked again under another bundle: what is asked, what cannot be known any more, and the sums.

A usage event holds who, what, how many units, the declared context and the answer; not the roles and attributes of the
subject, nor the attributes of the resource. So both bundles are asked the same reconstructed question, and it is their
two answers that are compared; what the record says tells how far the reconstruction can be trusted. Pure, and of
bounded size: sums by tenant and reason, and a few examples of each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple

from licet.domain.catalog import Catalog, Enforcement, Entitlement, License, Limit, matches
from licet.domain.entitlements import entitlements_of
from licet.domain.flags import OFF, ON
from licet.domain.money import format_budget
from licet.domain.windows import Period, window_of

EXAMPLES_MAX: Final = 3
_ROLES_TRIED_MAX: Final = 16


class Doubt(StrEnum):
    """Why a decision is not replayed exactly as it was made."""

    ROLES = "roles are not recorded: assumed to be such as explain the recorded answer"
    ATTRIBUTES = (
        "a condition reads attributes of the subject or the resource, which are not recorded: taken as not sent"
    )
    METERS = "several meters of the action draw on one feature: how the units were divided is not recorded"
    LICENSE = "the license was changed after it: replayed under the present one"
    DEGRADED = "it was answered while Redis or the state was away"
    OTHERWISE = "what is live now answers otherwise than was recorded: another bundle then, or earlier use of a quota"


class Skipped(StrEnum):
    """Why a record is not replayed at all."""

    KIND = "reservations and seats are not replayed, and what they used is not counted"
    FEATURES = "the action does not draw on the recorded features any more, or the context does not fit it"


class Prior(NamedTuple):
    """What was used of a limit before the replay begins has to be known: of this feature, from this instant on."""

    limit: str
    feature: str
    from_s: int
    currency: str


class Change(NamedTuple):
    """From one answer to another."""

    tenant: str
    before: str
    after: str


@dataclass(slots=True)
class ChangeSum:
    """How often, over how many units, and a few decisions for example."""

    decisions: int = 0
    units: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Summary:
    """What a simulation came to."""

    replayed: int = 0
    changes: dict[Change, ChangeSum] = field(default_factory=dict)
    costs: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Of a tenant in a currency: nanos before and after."""
    doubts: Counter[Doubt] = field(default_factory=Counter)
    doubtful: int = 0
    skipped: Counter[Skipped] = field(default_factory=Counter)
    unknown_start: set[str] = field(default_factory=set)
    """Limits of which earlier use could not be had: they begin empty."""

    @property
    def changed(self) -> int:
        """Decisions whose answer would be another."""
        return sum(one.decisions for one in self.changes.values())

    def add(
        self, event: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], doubts: set[Doubt]
    ) -> None:
        """One decision, with its answers under both bundles."""
        if "invalid" in before or "invalid" in after:
            self.skipped[Skipped.FEATURES] += 1
            return
        self.replayed += 1
        if doubts:
            self.doubtful += 1
            self.doubts.update(doubts)
        said, says = answer_of(before), answer_of(after)
        if said != says:
            one = self.changes.setdefault(Change(event["tenant"], said, says), ChangeSum())
            one.decisions += 1
            one.units += sum(event["units"].values())
            if len(one.examples) < EXAMPLES_MAX:
                one.examples.append(event["decision_id"])
        for place, answer in enumerate((before, after)):
            if answer["cost_nanos"]:
                sums = self.costs.setdefault((event["tenant"], answer["currency"]), [0, 0])
                sums[place] += answer["cost_nanos"]


def answer_of(answer: Mapping[str, Any]) -> str:
    """An answer in a few words: ``APPROVED OK`` or ``DENIED POLICY_DENIED embargo/region``; with the variants of flags,
    such as ``APPROVED OK editor=canvas``.
    """
    variants = sorted(f"{flag}={served}" for flag, served in answer["exposures"].items() if served not in (ON, OFF))
    return " ".join(part for part in (answer["effect"], answer["reason"], answer["rule"], *variants) if part)


def recorded_answer(event: Mapping[str, Any]) -> dict[str, Any]:
    """What was answered, in the form of the engine's answers."""
    cost = event["cost"] or {"amount_nanos": 0, "currency": ""}
    return {
        "effect": event["effect"],
        "reason": event["reason"],
        "rule": event["rule"],
        "exposures": event["exposures"],
        "cost_nanos": cost["amount_nanos"],
        "currency": cost["currency"],
    }


def check_of(event: Mapping[str, Any], roles: Sequence[str]) -> dict[str, Any]:
    """What was asked, as far as it is recorded, as the engine takes it."""
    return {
        "tenant": event["tenant"],
        "action": event["action"],
        "subject": {**event["subject"], "roles": list(roles)},
        "resource": event["resource"],
        "context": event["context"],
        "units": event["units"],
        "now_us": event["at_us"],
    }


class Unrecorded:
    """What the decisions on each action read that events do not hold, under any of some bundles."""

    def __init__(self, catalogs: Sequence[Catalog]) -> None:
        self._catalogs = catalogs
        self._known: dict[str, tuple[set[Doubt], list[tuple[str, ...]]]] = {}

    def doubts(self, action: str) -> set[Doubt]:
        """Of a decision on ``action``."""
        return set(self._of(action)[0])

    def roles(self, action: str) -> list[tuple[str, ...]]:
        """Sets of roles that a subject may have had, the likeliest first; one when roles make no difference."""
        return self._of(action)[1]

    def _of(self, action: str) -> tuple[set[Doubt], list[tuple[str, ...]]]:
        known = self._known.get(action)
        if known is None:
            known = self._known[action] = self._look(action)
        return known

    def _look(self, action: str) -> tuple[set[Doubt], list[tuple[str, ...]]]:
        doubts: set[Doubt] = set()
        opening: dict[str, None] = {}
        named: dict[str, None] = {}
        for catalog in self._catalogs:
            for role in catalog.roles.values():
                named[role.name] = None
                if matches(role.actions, action):
                    opening[role.name] = None
            for when in _conditions(catalog, action):
                if "subject.roles" in when:
                    doubts.add(Doubt.ROLES)
                    named |= dict.fromkeys(re.findall(r"""["']([^"']+)["']\s+in\s+subject\.roles""", when))
                if "subject.attributes" in when or "resource.attributes" in when:
                    doubts.add(Doubt.ATTRIBUTES)
            found = catalog.actions.get(action)
            if found is not None and len(set(found.meters.values())) < len(found.meters):
                doubts.add(Doubt.METERS)
        if opening:
            doubts.add(Doubt.ROLES)
        if Doubt.ROLES not in doubts:
            return doubts, [()]
        singles = [(name,) for name in dict.fromkeys((*sorted(opening), *sorted(named)))]
        return doubts, [(), *singles[: _ROLES_TRIED_MAX - 2], tuple(sorted(opening))]


def priors(license_: License, catalogs: Iterable[Catalog], since_s: int) -> tuple[set[Prior], set[str]]:
    """What has to be known of use before ``since_s``; and limits of which it cannot be had.

    Limits of a subject or an attribute, and what grants have left, are not in the ledger's sums.
    """
    wanted: set[Prior] = set()
    unknown: set[str] = set()
    for catalog in catalogs:
        for feature, limit, granted in _limits(license_, catalog):
            if limit.per is Period.SECOND:
                continue
            window = window_of(limit.per, limit.anchor, since_s, starts_s=license_.starts_s, ends_s=license_.stops_s)
            if window.start >= since_s:
                continue
            if limit.scope:
                unknown.add(limit.key)
                continue
            unknown |= {grant.key for grant in granted.grants if grant.limit == limit.key}
            wanted.add(Prior(limit.key, feature, max(0, window.start), limit.currency))
    return wanted, unknown


def cost_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    """Costs that would be others, by tenant and currency, the largest difference first."""
    changed = [(key, sums) for key, sums in summary.costs.items() if sums[0] != sums[1]]
    for (tenant, currency), (before, after) in sorted(changed, key=lambda one: (-abs(one[1][1] - one[1][0]), one[0])):
        yield {
            "tenant": tenant,
            "currency": currency,
            "before_nanos": before,
            "after_nanos": after,
            "before": format_budget(before, currency),
            "after": format_budget(after, currency),
            "difference": f"{'+' if after > before else ''}{format_budget(after - before, currency)}",
        }


def _conditions(catalog: Catalog, action: str) -> Iterator[str]:
    for policy in catalog.policies.values():
        if policy.enforcement is not Enforcement.OFF and matches(policy.actions, action):
            yield from (rule.when for rule in policy.rules)
    found = catalog.actions.get(action)
    features = found.meters.values() if found else ()
    for flag in catalog.flags.values():
        if flag.feature in features:
            yield from (target.when for target in flag.targeting)


def _limits(license_: License, catalog: Catalog) -> Iterator[tuple[str, Limit, Entitlement]]:
    for feature, granted in entitlements_of(license_, catalog).items():
        for limit in granted.limits:
            yield feature, limit, granted
