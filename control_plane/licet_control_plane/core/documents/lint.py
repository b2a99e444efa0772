"""What is legal and makes no sense: conditions that are never true, rules that never decide, names nobody has.

Only what is certain is reported, because a warning that is wrong once is never read again; in the tests, the sidecar's
engine is asked. Works on documents without errors: only then is known what they mean together. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from licet.domain.catalog import Enforcement, LicenseStatus, Rule, RuleEffect
from licet.domain.expressions import Call, CheckedExpression, Constant, Expression, Items, Name, Select, is_whole
from licet_control_plane.core.documents.findings import Findings, Path
from licet_control_plane.core.documents.index import DocumentIndex
from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.documents.satisfiability import why_never_true
from licet_control_plane.core.documents.sources import PolicySource
from licet_control_plane.core.suggestion import did_you_mean

_ALWAYS: Final = Constant("bool", True)
SAME_MAX: Final = 8
"""Denials of one condition that are looked at; more of them tell nothing new."""

_ROLE_PREFIX: Final = "role:"


def check_sense(index: DocumentIndex, checked: Mapping[str, CheckedExpression], findings: Findings) -> None:
    """Warns of everything of that kind. ``checked``: what conditions are made of, by their source."""
    _check_reach(index, findings)
    _check_chains(index, findings)
    placed = list(_rules(index, checked))
    for one in placed:
        if not _check_words(one, index, findings):
            _check_truth(one, index, findings)
    _check_shadows(placed, findings)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A rule, where it stands, and the actions it is asked about. ``condition`` is ``_ALWAYS`` without one.

    ``number`` is the same for conditions that say the same, and 0 for those that always hold.
    """

    document: SourceDocument
    policy: PolicySource
    position: int
    rule: Rule
    condition: Expression
    number: int
    actions: frozenset[str]

    @property
    def full_name(self) -> str:
        return f"{self.policy.name}/{self.rule.name}"

    @property
    def place(self) -> Path:
        return ("rules", self.position)

    @property
    def when(self) -> Path:
        return (*self.place, "when")


def _rules(index: DocumentIndex, checked: Mapping[str, CheckedExpression]) -> Iterator[_Placed]:
    """Rules of all policies, in the order in which they are looked at. Those asked about no action are left out."""
    trees: dict[str, Expression] = {"": _ALWAYS}
    numbers: dict[tuple[Expression, str], int] = {(_ALWAYS, ""): 0}
    for name, document in sorted(index.named("Policy").items()):
        policy = index.source(name, PolicySource)
        if policy is None:
            continue
        actions = index.matching(policy.actions)
        written = document.root.at("rules").items()
        for position, rule in enumerate(policy.to_domain().rules):
            source = written[position].at("when").text()
            if source not in trees and source in checked:
                trees[source] = checked[source].tree()
            if actions and source in trees:
                tree = trees[source]
                # Two loops look alike; whether they are tells only their text.
                number = numbers.setdefault((tree, "" if is_whole(tree) else source), len(numbers))
                yield _Placed(document, policy, position, rule, tree, number, actions)


def _check_reach(index: DocumentIndex, findings: Findings) -> None:
    """Actions that no plan can reach, as any plan can be an add-on to any other; and features that nothing draws on."""
    granted = {feature for plan in index.plans.values() for feature in plan.features}
    seated = {name for plan in index.plans.values() for name, one in plan.features.items() if one.seats}
    metered: set[str] = set()
    for name, action in index.actions.items():
        features = dict.fromkeys(action.meters.values())
        metered.update(features)
        missing = [feature for feature in features if feature not in granted]
        if missing and index.plans:
            findings.warning(
                index.named("Action")[name],
                ("feature",) if "" in action.meters else ("meters",),
                f"no plan grants {missing[0]!r}, so that {name!r} is always answered NOT_ENTITLED",
                f"Grant {missing[0]!r} in a plan.",
                code="unreachable-action",
            )
    for name, document in index.named("Feature").items():
        if name not in metered and name not in seated:
            findings.warning(
                document,
                ("name",),
                f"no action draws on {name!r}, and no plan sells it by the seat",
                f"Add an action with 'feature: {name}', or remove it.",
                code="unused-feature",
            )


def _check_chains(index: DocumentIndex, findings: Findings) -> None:
    if not index.roles:
        return  # whoever declares no roles may use some all the same
    for document in index.named("ApprovalChain").values():
        for number, stage in enumerate(document.root.at("stages").items()):
            for field in ("approvers", "escalate_to"):
                for position, node in enumerate(stage.at(field).items()):
                    word = node.text()
                    role = word.removeprefix(_ROLE_PREFIX)
                    if word.startswith(_ROLE_PREFIX) and role not in index.roles:
                        _warn_of_role(document, ("stages", number, field, position), role, index, findings)


def _warn_of_role(document: SourceDocument, path: Path, role: str, index: DocumentIndex, findings: Findings) -> None:
    findings.warning(document, path, f"no Role is named {role!r}", did_you_mean(role, index.roles), code="unknown-role")


def _check_words(one: _Placed, index: DocumentIndex, findings: Findings) -> bool:
    """Texts that a variable is compared with and can never have. Whether there were some."""
    known = _known(one, index)
    found = False
    for variable, text in dict.fromkeys(_compared(one.condition)):
        if variable == "subject.roles":
            if index.roles and text not in index.roles:
                _warn_of_role(one.document, one.when, text, index, findings)
        elif variable == "quantities":
            meters = {meter for name in one.actions for meter in index.actions[name].meters if meter}
            if text not in meters:
                findings.warning(
                    one.document,
                    one.when,
                    f"none of the policy's actions has a meter {text!r}: reading quantities[{text!r}] fails",
                    did_you_mean(text, meters),
                    code="unknown-meter",
                )
        elif text not in known[variable]:
            found = True
            what = {"license.plan": "there is no plan", "action": "the policy is not asked about an action"}
            findings.warning(
                one.document,
                one.when,
                f"{variable} is never {text!r}: {what.get(variable, 'there is no status')} of that name",
                did_you_mean(text, known[variable]),
                code="unknown-value",
            )
    return found


def _known(one: _Placed, index: DocumentIndex) -> Mapping[str, frozenset[str]]:
    return {
        "license.plan": frozenset(index.plans),
        "license.status": frozenset(LicenseStatus),
        "action": one.actions,
    }


def _compared(expression: Expression) -> Iterator[tuple[str, str]]:
    """Variables with few values, and the texts they are compared with, anywhere in an expression."""
    named = ("license.plan", "license.status", "action")
    pending = [expression]
    while pending:
        match pending.pop():
            case Call("_==_" | "_!=_", (Name(name), Constant("string", text))) if name in named:
                yield name, text
            case Call("_==_" | "_!=_", (Constant("string", text), Name(name))) if name in named:
                yield name, text
            case Call("@in", (Constant("string", text), Name("subject.roles"))):
                yield "subject.roles", text
            case Call("@in", (Name(name), Items(elements))) if name in named:
                yield from ((name, one.value) for one in elements if isinstance(one, Constant))
            case Call("_[_]", (Name("quantities"), Constant("string", text))):
                yield "quantities", text
            case Select(Name("quantities"), text, False):
                yield "quantities", text
            case Call(_, arguments):
                pending += reversed(arguments)
            case Select(operand, _, _):
                pending.append(operand)
            case Items(elements):
                pending += reversed(elements)


def _check_truth(one: _Placed, index: DocumentIndex, findings: Findings) -> None:
    if why := why_never_true(one.condition, _known(one, index)):
        findings.warning(
            one.document,
            one.when,
            f"the condition is never true: {why}",
            "Correct it, or remove the rule.",
            code="never-true",
        )


def _check_shadows(placed: list[_Placed], findings: Findings) -> None:
    """Rules that never decide, because others always do. Shadow policies are recorded rule by rule, and left out."""
    enforced = [one for one in placed if one.policy.enforcement is Enforcement.ENFORCE]
    denials = _Denials(enforced)
    first: dict[tuple[str, RuleEffect, int], _Placed] = {}
    asking: set[str] = set()
    for one in enforced:
        first.setdefault((one.policy.name, one.rule.effect, one.number), one)
        if one.rule.effect is RuleEffect.REQUIRE_APPROVAL:
            asking.add(one.policy.name)
    for place, one in enumerate(enforced):
        if why := denials.over(one, place) or _shadow_of_beside(one, first, one.policy.name in asking):
            findings.warning(
                one.document,
                one.place,
                f"the rule never decides{', unless its condition fails' if one.number else ''}: {why}",
                "Remove it, or change one of the two.",
                code="shadowed-rule",
            )


class _Denials:
    """Rules that deny whatever another one is about: those without a condition together, or one with the same."""

    def __init__(self, enforced: list[_Placed]) -> None:
        self._always: dict[str, tuple[int, _Placed]] = {}  # by action
        self._by_number: dict[int, list[tuple[int, _Placed]]] = {}
        self._covering: dict[frozenset[str], tuple[int, _Placed] | None] = {}
        seen: set[frozenset[str]] = set()
        for place, one in enumerate(enforced):
            if one.rule.effect is not RuleEffect.DENY:
                continue
            if one.number:
                same = self._by_number.setdefault(one.number, [])
                if len(same) < SAME_MAX:
                    same.append((place, one))
            elif one.actions not in seen:
                seen.add(one.actions)
                for action in one.actions:
                    self._always.setdefault(action, (place, one))

    def over(self, one: _Placed, place: int) -> str:
        """Why the rule never decides, when others deny all its actions whenever it matches."""
        if one.actions not in self._covering:
            always = [self._always.get(action) for action in one.actions]
            found = [each for each in always if each is not None]
            # Of several, the last one that is looked at: before it, not all is denied.
            self._covering[one.actions] = max(found, key=lambda each: each[0]) if len(found) == len(always) else None
        covering = self._covering[one.actions]
        same = (each for each in self._by_number.get(one.number, ()) if each[1].actions >= one.actions)
        for each in (*([covering] if covering else ()), *same):
            # A denial wins over every other effect; of denials, the first one that is looked at.
            if each[1] is not one and (one.rule.effect is not RuleEffect.DENY or each[0] < place):
                return f"{each[1].full_name} denies {_when(each[1])}, and a denial wins"
        return ""


def _shadow_of_beside(one: _Placed, first: Mapping[tuple[str, RuleEffect, int], _Placed], asks: bool) -> str:
    """Whether the rules of its own policy leave it nothing to decide; ``asks``: some of them require approval."""
    effect = one.rule.effect
    if effect is RuleEffect.DENY:
        return ""
    if effect is RuleEffect.ALLOW and not asks:
        return "allow rules exempt from the approvals of their own policy, and it asks for none"
    for number in (0, one.number):
        if effect is RuleEffect.REQUIRE_APPROVAL and (other := first.get((one.policy.name, RuleEffect.ALLOW, number))):
            return f"{other.full_name} exempts from it {_when(other)}"
        other = first.get((one.policy.name, effect, number))
        if other is not None and other.position < one.position:
            return f"{other.full_name}, above it, does the same {_when(other)}"
    return ""


def _when(one: _Placed) -> str:
    return "on the same condition" if one.number else "always"
