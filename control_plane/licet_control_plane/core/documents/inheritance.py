"""Plans that extend plans, and roles that include roles: put together once, here, so that nobody after has to know.

What is published, compared and decided by is the whole meaning; the files keep the way it was written. What a plan
takes over and what it replaces is in ``docs/documents.md``. Refuses circles, and chains and products that would cost
more than they say. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from licet.domain.catalog import Entitlement, Plan, Role
from licet_control_plane.core.documents.findings import Findings
from licet_control_plane.core.documents.index import DocumentIndex
from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.documents.sources import LIMITS_MAX, EntitlementSource, PlanSource, RoleSource
from licet_control_plane.core.suggestion import did_you_mean

CHAIN_MAX: Final = 8
"""Most plans above a plan. Whoever wants to know what a plan grants reads all of them."""

FEATURES_MAX: Final = 500_000
"""Most features of all plans together after they were put together: short files must not say more than fits."""

PATTERNS_MAX: Final = 500_000
"""Most patterns of all roles together after they were put together, for the same reason."""


def resolve_plans(index: DocumentIndex, findings: Findings) -> None:
    """Puts every plan that can be known into ``index.plans``, whole; what is wrong with the others is reported."""
    for document in index.named("Plan").values():
        _check_extends(document, index, findings)
    total = 0
    for name, document in index.named("Plan").items():
        for link in reversed(list(_chain(name, index))):
            source = index.source(link, PlanSource)
            if source is None:
                break  # its errors are reported; what builds on it is not known
            if link not in index.plans:
                made = _put_together(source, index, findings)
                if made is None:
                    break
                index.plans[link] = made
                total += len(made.features)
        if total > FEATURES_MAX:
            findings.error(
                document,
                ("extends",),
                f"the plans have more than {FEATURES_MAX} features, counting what they take over",
                "Extend fewer large plans.",
            )
            return


def resolve_roles(index: DocumentIndex, findings: Findings) -> None:
    """Puts every role into ``index.roles``, with the patterns of those it includes; circles are reported."""
    total = 0
    for document in index.named("Role").values():
        for made in _roles_below(document, index, findings):
            index.roles[made.name] = made
            total += len(made.actions)
            if total > PATTERNS_MAX:
                findings.error(
                    document,
                    ("includes",),
                    f"the roles have more than {PATTERNS_MAX} patterns, counting those they include",
                    "Include fewer large roles, or write wider patterns.",
                )
                return


def _check_extends(document: SourceDocument, index: DocumentIndex, findings: Findings) -> None:
    extends = document.root.at("extends").text()
    plans = index.named("Plan")
    if not extends:
        return
    if extends not in plans:
        findings.unknown(document, ("extends",), "plan", extends, plans)
        return
    chain = list(_chain(document.name, index))
    last = plans[chain[-1]].root.at("extends").text()
    if last == document.name:
        findings.error(
            document,
            ("extends",),
            f"the plan extends itself: {' -> '.join([*chain, document.name])}",
            "Let one of them extend none of the others.",
            code="circle",
        )
    elif len(chain) > CHAIN_MAX + 1:
        findings.error(
            document,
            ("extends",),
            f"there are more than {CHAIN_MAX} plans above this one",
            f"Extend one that is higher up, such as {chain[-2]!r}.",
        )


def _chain(name: str, index: DocumentIndex) -> Iterator[str]:
    """The plan and those above it, nearest first: to the top, to where it runs in a circle, or one too far."""
    seen: set[str] = set()
    plans = index.named("Plan")
    while name in plans and name not in seen and len(seen) <= CHAIN_MAX + 1:
        seen.add(name)
        yield name
        name = plans[name].root.at("extends").text()


def _put_together(source: PlanSource, index: DocumentIndex, findings: Findings) -> Plan | None:
    own = source.to_domain()
    if source.extends is None:
        return own
    parent = index.plans.get(source.extends)
    if parent is None:
        return None
    document = index.named("Plan")[source.name]
    features = _left_over(parent, source, document, findings)
    for name, written in (source.features or {}).items():
        extended = features.get(name)
        features[name] = _merged(extended, own.features[name], written) if extended else own.features[name]
        if len(features[name].limits) > LIMITS_MAX:
            findings.error(
                document,
                ("features", name, "limits"),
                f"with those of {parent.name!r} it has {len(features[name].limits)}, and {LIMITS_MAX} are the most",
                "Leave some out with 'without', or replace one by giving it the same name.",
            )
    return Plan(own.name, features, own.title, own.fee if source.fee else parent.fee)


def _left_over(
    parent: Plan, source: PlanSource, document: SourceDocument, findings: Findings
) -> dict[str, Entitlement]:
    """The parent's features, without those and the limits that the plan leaves out."""
    features = dict(parent.features)
    for position, removed in enumerate(source.without):
        name = removed.partition(":")[0]
        entitlement = features.get(name)
        if removed == name and entitlement is not None:
            del features[name]
            continue
        limits = tuple(limit for limit in entitlement.limits if limit.key != removed) if entitlement else ()
        if entitlement is not None and len(limits) < len(entitlement.limits):
            features[name] = replace(entitlement, limits=limits)
            continue
        known = [limit.key for one in features.values() for limit in one.limits] if ":" in removed else list(features)
        findings.error(
            document,
            ("without", position),
            f"there is no {'limit' if ':' in removed else 'feature'} {removed!r} to leave out of {parent.name!r}",
            did_you_mean(removed, known),
            code="unknown-name",
        )
    return features


def _merged(parent: Entitlement, own: Entitlement, written: EntitlementSource) -> Entitlement:
    """A feature that both plans have: what is written replaces, and limits are replaced by their key."""
    mine = {limit.key: limit for limit in own.limits}
    kept = [mine.pop(limit.key, limit) for limit in parent.limits]
    return Entitlement(
        price=own.price or parent.price,
        limits=(*kept, *mine.values()),
        seats=own.seats or parent.seats,
        heartbeat_s=own.heartbeat_s if written.heartbeat or not parent.heartbeat_s else parent.heartbeat_s,
        included=own.included or parent.included,
    )


def _roles_below(top: SourceDocument, index: DocumentIndex, findings: Findings) -> Iterator[Role]:
    """The role and those it includes that were not put together yet, each after those that it includes."""
    if top.name in index.roles:
        return
    path: dict[str, Iterator[tuple[int, str]]] = {top.name: _includes(top)}  # the roles that are being put together
    while path:
        name = next(reversed(path))
        document = index.named("Role")[name]
        below = next(path[name], None)
        if below is None:
            del path[name]
            yield _with_included(document, index)
            continue
        position, included = below
        where = ("includes", position)
        if included in path:
            circle = [*list(path)[list(path).index(included) :], included]
            findings.error(
                document,
                where,
                f"the role includes itself: {' -> '.join(circle)}",
                "Let one of them include none of the others.",
                code="circle",
            )
        elif included not in index.named("Role"):
            findings.unknown(document, where, "role", included, index.named("Role"))
        elif included not in index.roles:
            path[included] = _includes(index.named("Role")[included])


def _includes(document: SourceDocument) -> Iterator[tuple[int, str]]:
    named = ((position, node.text()) for position, node in enumerate(document.root.at("includes").items()))
    return ((position, name) for position, name in named if name)


def _with_included(document: SourceDocument, index: DocumentIndex) -> Role:
    source = index.source(document.name, RoleSource)
    if source is None:  # its errors are reported
        return Role(document.name, ())
    included = (pattern for name in source.includes if name in index.roles for pattern in index.roles[name].actions)
    return Role(source.name, tuple(dict.fromkeys((*source.actions, *included))))
