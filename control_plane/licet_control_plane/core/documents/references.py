"""What documents say about each other: names that must exist once, attributes that must be declared.

Works on the written documents and not on their records, so that one wrong field does not hide the errors elsewhere.
Whatever has the wrong type is passed over: the schema has reported it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from licet.domain.catalog import Action, AttributeType, Entitlement, Limit
from licet.domain.conditions import CONTEXT_PREFIX
from licet.domain.flags import OFF, ON
from licet.domain.redaction import RecordMode
from licet_control_plane.core.documents.findings import Findings, Path
from licet_control_plane.core.documents.index import DocumentIndex
from licet_control_plane.core.documents.nodes import Node, SourceDocument
from licet_control_plane.core.documents.sources import PlanSource
from licet_control_plane.core.suggestion import did_you_mean

_SCOPE_TYPES: Final = frozenset((AttributeType.STRING, AttributeType.INT, AttributeType.BOOL))
"""Types whose every value can have a quota of its own."""


def check_references(index: DocumentIndex, findings: Findings) -> None:
    """Every name that a document mentions, except the attributes inside conditions."""
    for document in index.documents:
        match document.kind:
            case "Action":
                _check_action(document, index, findings)
            case "Plan":
                _check_plan(document, index, findings)
            case "Policy":
                _check_patterns(document, index, findings)
                _check_rules(document, index, findings)
            case "Role":
                _check_patterns(document, index, findings)
            case "Flag":
                _check_flag(document, index, findings)


def _check_feature(
    document: SourceDocument, path: tuple[str, ...], name: str, index: DocumentIndex, findings: Findings
) -> None:
    if name and name not in index.named("Feature"):
        findings.unknown(document, path, "feature", name, index.named("Feature"))


def _check_action(document: SourceDocument, index: DocumentIndex, findings: Findings) -> None:
    _check_feature(document, ("feature",), document.root.at("feature").text(), index, findings)
    for meter, node in document.root.at("meters").entries().items():
        _check_feature(document, ("meters", meter), node.text(), index, findings)


def _check_patterns(document: SourceDocument, index: DocumentIndex, findings: Findings) -> None:
    actions = index.named("Action")
    for position, node in enumerate(document.root.at("actions").items()):
        pattern = node.text()
        if pattern and not index.matching((pattern,)):
            findings.warning(
                document,
                ("actions", position),
                f"{pattern!r} matches no action, so that it has no effect",
                did_you_mean(pattern, actions),
                code="matches-no-action",
            )


def _check_rules(document: SourceDocument, index: DocumentIndex, findings: Findings) -> None:
    chains = index.named("ApprovalChain")
    seen: dict[str, int] = {}
    for position, rule in enumerate(document.root.at("rules").items()):
        name = rule.at("name").text()
        if name and seen.setdefault(name, position) != position:
            findings.error(
                document,
                ("rules", position, "name"),
                f"the rule {name!r} is there twice",
                "Rename one of them: decisions name the rule that made them.",
            )
        approval = rule.at("approval").text()
        if approval and approval not in chains:
            findings.unknown(document, ("rules", position, "approval"), "approval chain", approval, chains)


def _check_flag(document: SourceDocument, index: DocumentIndex, findings: Findings) -> None:
    _check_feature(document, ("feature",), document.root.at("feature").text(), index, findings)
    variants = document.root.at("variants").entries()
    seen: set[str] = set()
    for position, target in enumerate(document.root.at("targeting").items()):
        name, serve = target.at("name").text(), target.at("serve").text()
        if name and name in seen:
            findings.error(
                document,
                ("targeting", position, "name"),
                f"the rule {name!r} is there twice",
                "Rename one of them: explanations name the rule that decided.",
            )
        seen.add(name)
        if serve and serve not in (ON, OFF, *variants):
            findings.error(
                document,
                ("targeting", position, "serve"),
                f"{serve!r} is neither a variant of the flag nor on or off",
                did_you_mean(serve, (*variants, ON, OFF)),
            )


def _check_plan(document: SourceDocument, index: DocumentIndex, findings: Findings) -> None:
    source = index.source(document.name, PlanSource) if _is_first(document, index) else None
    own = source.to_domain() if source else None
    plan = index.plans.get(document.name) if source else None
    for feature, entitlement in document.root.at("features").entries().items():
        if feature not in index.named("Feature"):
            findings.error(
                document,
                ("features", feature),
                f"there is no feature {feature!r}",
                did_you_mean(feature, index.named("Feature")),
                at_key=True,
            )
            continue
        metering = _actions_metering(feature, index)
        _check_price_by(document, feature, entitlement, metering, findings)
        _check_scopes(document, feature, entitlement, metering, findings)
        if own is not None:
            _check_limit_keys(document, feature, own.features[feature].limits, findings)
            if plan is not None:
                _check_budgets(document, feature, own.features[feature], plan.features[feature], findings)
        if entitlement.at("limits").items() and not metering:
            findings.warning(
                document,
                ("features", feature, "limits"),
                f"no action draws on {feature!r}, so that its limits have no effect",
                f"Add an action with 'feature: {feature}'.",
                code="limit-without-action",
            )
    _check_currencies(document, index, findings)


def _is_first(document: SourceDocument, index: DocumentIndex) -> bool:
    """Whether it is the one that counts of those with its name."""
    return index.named(document.kind).get(document.name) is document


def _check_currencies(document: SourceDocument, index: DocumentIndex, findings: Findings) -> None:
    plan = index.plans.get(document.name)
    if plan is None or not _is_first(document, index):
        return
    prices = {feature: entitlement.price for feature, entitlement in plan.features.items() if entitlement.price}
    for name, action in index.actions.items():
        currencies = {prices[feature].currency for feature in action.meters.values() if feature in prices}
        if len(currencies) > 1:
            findings.warning(
                document,
                ("features",),
                f"action {name!r} is priced in {' and '.join(sorted(currencies))}: its cost shows only one of them",
                "Price the features of one action in one currency.",
                code="two-currencies",
            )


def _actions_metering(feature: str, index: DocumentIndex) -> dict[str, Action | None]:
    """Actions that draw on a feature, by name; ``None`` for one whose attributes are not known, as it has errors."""
    metering: dict[str, Action | None] = {}
    for name, document in index.named("Action").items():
        meters = document.root.at("meters").entries().values()
        if document.root.at("feature").text() == feature or any(node.text() == feature for node in meters):
            metering[name] = index.actions.get(name)
    return metering


def _check_price_by(
    document: SourceDocument,
    feature: str,
    entitlement: Node,
    metering: Mapping[str, Action | None],
    findings: Findings,
) -> None:
    by = entitlement.at("price").at("by").text()
    if not by.startswith(CONTEXT_PREFIX) or None in metering.values():
        return
    path = ("features", feature, "price", "by")
    attribute = by.removeprefix(CONTEXT_PREFIX)
    declared = {name: spec for action in metering.values() if action for name, spec in action.attributes.items()}
    if attribute not in declared:
        findings.error(
            document,
            path,
            f"no action that draws on {feature!r} declares the attribute {attribute!r}",
            did_you_mean(attribute, declared),
        )
    elif declared[attribute].type is not AttributeType.STRING:
        findings.error(
            document, path, f"{by} is of type {declared[attribute].type.value}", "Price by an attribute of type string."
        )
    for name, action in sorted(metering.items()):
        if action is not None and attribute in action.attributes:
            _check_recorded(document, path, name, action, attribute, "the bill needs its value", findings)


def _check_scopes(
    document: SourceDocument,
    feature: str,
    entitlement: Node,
    metering: Mapping[str, Action | None],
    findings: Findings,
) -> None:
    for limit_position, limit in enumerate(entitlement.at("limits").items()):
        for scope_position, node in enumerate(limit.at("scope").items()):
            scope = node.text()
            if not scope.startswith(CONTEXT_PREFIX):
                continue
            path = ("features", feature, "limits", limit_position, "scope", scope_position)
            attribute = scope.removeprefix(CONTEXT_PREFIX)
            for name, action in sorted(metering.items()):
                if action is None:
                    continue
                spec = action.attributes.get(attribute)
                if spec is None:
                    findings.error(
                        document,
                        path,
                        f"the action {name!r} draws on {feature!r} and does not declare the attribute {attribute!r}",
                        f"Declare it there, or change the scope. {did_you_mean(attribute, action.attributes)}",
                    )
                elif spec.type not in _SCOPE_TYPES:
                    findings.error(
                        document,
                        path,
                        f"{attribute!r} is of type {spec.type.value} in the action {name!r}, and cannot be counted by",
                        "Use an attribute of type string, int or bool.",
                    )
                else:
                    _check_recorded(
                        document, path, name, action, attribute, "the names of its quotas would tell it", findings
                    )


def _check_recorded(
    document: SourceDocument,
    path: tuple[str | int, ...],
    name: str,
    action: Action,
    attribute: str,
    why: str,
    findings: Findings,
) -> None:
    record = action.attributes[attribute].record
    if record is not RecordMode.KEEP:
        findings.error(
            document,
            path,
            f"{attribute!r} has 'record: {record.value}' in the action {name!r}: {why}",
            "Use another attribute here, or write 'record: keep' there.",
        )


def _check_limit_keys(document: SourceDocument, feature: str, limits: Sequence[Limit], findings: Findings) -> None:
    seen: dict[str, int] = {}
    for position, limit in enumerate(limits):
        first = seen.setdefault(limit.key, position)
        if first != position:
            line, column = document.root.position_of(("features", feature, "limits", first))
            findings.error(
                document,
                ("features", feature, "limits", position),
                f"this limit and the one at {line}:{column} both have the key {limit.key!r}",
                "Give one a name, such as 'name: burst': usage is counted by it.",
            )


def _check_budgets(
    document: SourceDocument, feature: str, own: Entitlement, whole: Entitlement, findings: Findings
) -> None:
    """Budgets that cannot be spent at the price of the whole plan: one of the two may be that of the extended plan."""
    price = whole.price
    written = {limit.key: position for position, limit in enumerate(own.limits)}
    for limit in whole.limits:
        if not limit.currency or (price and price.currency == limit.currency):
            continue
        said = f"is priced in {price.currency}" if price else "has no price"
        position = written.get(limit.key)
        path: Path = ("features", feature, "price")
        which = f"the budget {limit.key!r}"
        if position is not None:
            path, which = ("features", feature, "limits", position, "spend"), "this budget"
        findings.error(
            document,
            path,
            f"{which} is in {limit.currency}, and {feature!r} {said} in this plan",
            f"Write the budget in {price.currency}."
            if price
            else f"Add a price in {limit.currency}, or limit units with 'amount'.",
        )
