"""Every condition of every policy and flag, compiled against every action it will be asked about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from licet.domain.catalog import Action, Attribute
from licet.domain.conditions import CONTEXT_PREFIX, ConditionEnvironment, ConditionError
from licet.domain.expressions import CheckedExpression
from licet_control_plane.core.documents.findings import Findings, Path
from licet_control_plane.core.documents.index import DocumentIndex
from licet_control_plane.core.documents.nodes import Node, SourceDocument

ENVIRONMENTS_MAX: Final = 64
"""Environments kept at once, at 200 KB each. Policies are checked one by one, and few actions differ in attributes."""

_FAILURES_MAX: Final = 3
"""Sets of attributes a condition is found to fail for before the rest are passed over: they fail alike."""

_NAMES_MAX: Final = 3

_Signature = tuple[tuple[str, str], ...]


class ConditionChecks:
    """Compiles each condition as seldom as possible.

    A source that compiled once compiles again wherever the attributes it refers to have the same types; so that it
    is compiled once in most bundles, however many actions it governs.
    """

    def __init__(self) -> None:
        self._environments: dict[_Signature, ConditionEnvironment] = {}
        self._passed: dict[str, list[Mapping[str, str]]] = {}
        self.checked: dict[str, CheckedExpression] = {}
        """What each source that compiled is made of, the same for every action."""

    def problems(self, source: str, attributes: Mapping[str, Attribute]) -> tuple[ConditionError, ...]:
        """What is wrong with ``source`` for an action with ``attributes``; empty when nothing is."""
        types = {name: spec.type.value for name, spec in attributes.items()}
        for needed in self._passed.get(source, ()):
            if needed.items() <= types.items():
                return ()
        try:
            environment = self._environment(tuple(sorted(types.items())), attributes)
            condition, self.checked[source] = environment.compile_checked(source)
        except ConditionError as error:
            return (error, *error.further)
        used = (name.removeprefix(CONTEXT_PREFIX) for name in condition.variables if name.startswith(CONTEXT_PREFIX))
        self._passed.setdefault(source, []).append({name: types[name] for name in used})
        return ()

    def _environment(self, signature: _Signature, attributes: Mapping[str, Attribute]) -> ConditionEnvironment:
        environment = self._environments.pop(signature, None) or ConditionEnvironment(attributes)
        if len(self._environments) >= ENVIRONMENTS_MAX:
            del self._environments[next(iter(self._environments))]  # the one not used for longest
        self._environments[signature] = environment
        return environment


def check_conditions(index: DocumentIndex, findings: Findings) -> Mapping[str, CheckedExpression]:
    """Reports every condition that does not compile, at its place inside the ``when``.

    Policies that are off are checked too, so that turning one on is never the moment its mistakes appear. Actions
    with errors of their own are left out: their attributes are not known.

    Returns what each sound condition is made of, by its source.
    """
    checks = ConditionChecks()
    groups: dict[frozenset[str], list[list[Action]]] = {}  # many policies are asked about the same actions
    for document in index.of_kind("Policy"):
        patterns = [node.text() for node in document.root.at("actions").items()]
        names = index.matching(patterns)
        if names not in groups:
            groups[names] = _by_signature([index.actions[name] for name in sorted(names) if name in index.actions])
        distinct = groups[names]
        for position, rule in enumerate(document.root.at("rules").items()):
            if findings.full:
                return checks.checked
            when = rule.at("when")
            if when.text().strip():
                _check_one(document, ("rules", position, "when"), when, distinct, checks, findings)
    for document in index.of_kind("Flag"):
        _check_targeting(document, index, checks, findings)
    return checks.checked


def _check_targeting(
    document: SourceDocument, index: DocumentIndex, checks: ConditionChecks, findings: Findings
) -> None:
    """Conditions of a flag, against the actions that draw on its feature."""
    feature = document.root.at("feature").text()
    distinct = _by_signature(
        [action for _, action in sorted(index.actions.items()) if feature in action.meters.values()]
    )
    for position, target in enumerate(document.root.at("targeting").items()):
        if findings.full:
            return
        when = target.at("when")
        if when.text().strip():
            _check_one(document, ("targeting", position, "when"), when, distinct, checks, findings)


def _by_signature(actions: list[Action]) -> list[list[Action]]:
    """Actions grouped by what they declare: one check is enough for a group."""
    groups: dict[_Signature, list[Action]] = {}
    for action in actions:
        signature = tuple(sorted((name, spec.type.value) for name, spec in action.attributes.items()))
        groups.setdefault(signature, []).append(action)
    return list(groups.values())


def _check_one(
    document: SourceDocument,
    path: Path,
    when: Node,
    groups: list[list[Action]],
    checks: ConditionChecks,
    findings: Findings,
) -> None:
    actions_by_problem: dict[tuple[int, int, str], list[str]] = {}
    failures = 0
    for group in groups:
        problems = checks.problems(when.text(), group[0].attributes)
        for problem in problems:
            found = actions_by_problem.setdefault((problem.line, problem.column, problem.message), [])
            found.extend(action.name for action in group)
        failures += bool(problems)
        if failures >= _FAILURES_MAX:
            break
    for (line, column, message), names in actions_by_problem.items():
        findings.error_inside(
            document,
            path,
            document.position_inside(when, line, column),
            message,
            f"The condition is asked about {_listed(sorted(names))}.",
            code="condition",
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_MAX])
    return shown if len(names) <= _NAMES_MAX else f"{shown} and others"
