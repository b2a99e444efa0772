"""``licet policy test``: suites of tests kept beside the policies, answered by the decision engine itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from licet_control_plane.cli.arguments import JsonOption, bad
from licet_control_plane.cli.bundles import print_errors, read_sources
from licet_control_plane.cli.failure import EXIT_NO, EXIT_USAGE, CliError
from licet_control_plane.cli.output import emit_json, note, say

if TYPE_CHECKING:
    from licet.domain.catalog import Catalog
    from licet_control_plane.cli.evaluator import Evaluator
    from licet_control_plane.core.documents.suites import Given, Suite, TestSource
    from licet_control_plane.core.policy_tests import Coverage


@dataclass(slots=True)
class _Outcome:
    """What became of one test. ``failures``: sentences, each about one question."""

    suite: str
    name: str
    file: str
    line: int
    seconds: float
    failures: list[str] = field(default_factory=list)


def run_tests(
    directory: Annotated[
        Path, typer.Argument(help="Directory of documents and their tests, in files *_test.yaml.", metavar="DIR")
    ],
    only: Annotated[str, typer.Option("--only", help="Only tests whose name, or whose suite's, holds this.")] = "",
    min_coverage: Annotated[
        float, typer.Option("--min-coverage", min=0, max=100, help="Fail when fewer % of the rules are hit.")
    ] = 0,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write a JUnit report to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the tests kept beside the policies: what is given, what is asked, what is expected. Needs no server.

    Tests are YAML documents of the kind PolicyTest in files *_test.yaml, which validate and push leave out. The
    decision engine of the sidecar answers them, so that what passes here is what services will be answered. Reports
    the rules that no test made match. Exits with 0 when all pass, with 1 when not, with 2 when they cannot be run.

    \b
    Examples:
      licet policy test catalog/
      licet policy test catalog/ --min-coverage 90 --junit report.xml
    """
    from licet_control_plane.cli.evaluator import Evaluator
    from licet_control_plane.core.documents import SourceFile, validate
    from licet_control_plane.core.documents.suites import is_suite, read_suites
    from licet_control_plane.core.policy_tests import Coverage, rules_in

    sources = [SourceFile(path, text) for path, text in read_sources(directory)]
    tests = [SourceFile(path, text) for path, text in read_sources(directory, suites=True)]
    assert all(is_suite(file.path) for file in tests)
    validated = validate(sources)
    _refuse(validated.errors, directory, as_json)
    assert validated.catalog is not None
    suites, errors = read_suites(tests, validated.catalog)
    _refuse(errors, directory, as_json)
    coverage = Coverage(rules_in(sources))
    outcomes: list[_Outcome] = []
    with Evaluator() as engine:
        engine.load("bundle", validated.catalog)
        for suite in suites:
            for place, one in enumerate(suite.source.tests):
                if only and only not in one.name and only not in suite.source.name:
                    continue
                outcome = _run(engine, suite, place, one, validated.catalog, coverage)
                outcomes.append(outcome)
                if not as_json:
                    _print_outcome(outcome, directory)
    if not outcomes:
        raise bad(f"{directory}: no test {f'with {only!r} in its name' if only else 'in it'}.", "correct --only")
    failed = [outcome for outcome in outcomes if outcome.failures]
    if junit is not None:
        _write_junit(junit, outcomes)
    too_few = coverage.percent < min_coverage
    if as_json:
        emit_json(_as_json(outcomes, coverage, passed=not failed and not too_few))
    else:
        _print_coverage(coverage, directory)
        say(f"{len(outcomes) - len(failed)} passed, {len(failed)} failed.")
    if too_few:
        note(
            f"{coverage.percent:.0f} % of the rules are hit, and --min-coverage asks for {min_coverage:g} %:"
            " write tests for those above"
        )
    if failed or too_few:
        raise typer.Exit(EXIT_NO)


def _run(
    engine: Evaluator, suite: Suite, place: int, test: TestSource, catalog: Catalog, coverage: Coverage
) -> _Outcome:
    from licet_control_plane.core.documents.suites import StepSource, given_of
    from licet_control_plane.core.policy_tests import check_of, mismatches

    started_s = time.perf_counter()
    given = given_of(suite.source, test)
    outcome = _Outcome(suite.source.name, test.name, suite.file, suite.line_of(place), 0)
    engine.begin("bundle", given.license_)
    _use(engine, given)
    steps = test.steps
    if test.ask is not None and test.expect is not None:
        steps = (StepSource(ask=test.ask, expect=test.expect),)
    for number, step in enumerate(steps, 1):
        answers = engine.check("bundle", [check_of(step.ask, given, catalog)] * step.ask.repeat, trace=True)
        for answer in answers:
            coverage.hit.update(name for name, matched, _ in answer.get("rules", ()) if matched)
        where = f"step {number}: " if test.steps else ""
        wrong = mismatches(step.expect, answers[-1])
        outcome.failures += [f"{where}{one}" for one in wrong]
        message = answers[-1].get("message")
        if wrong and message:
            outcome.failures.append(f"{where}the answer says: {message}")
    outcome.seconds = time.perf_counter() - started_s
    return outcome


def _use(engine: Evaluator, given: Given) -> None:
    from licet_control_plane.core.documents.suites import amount_of
    from licet_control_plane.core.policy_tests import who_of

    for used in given.used:
        # What the suite says is used of a limit that this test's license does not have means nothing here.
        engine.use("bundle", given.tenant, used.limit, amount_of(used.units), who=who_of(used), now_us=given.now_us)


def _refuse(errors: Any, directory: Path, as_json: bool) -> None:
    if not errors:
        return
    shown = [error.as_json() for error in errors]
    if as_json:
        emit_json({"passed": False, "errors": shown})
    print_errors(shown, directory, so="no test was run")
    raise typer.Exit(EXIT_USAGE)


def _print_outcome(outcome: _Outcome, directory: Path) -> None:
    base = directory.parent if directory.is_file() else directory
    if not outcome.failures:
        say(f"ok    {outcome.suite}: {outcome.name}")
        return
    say(f"FAIL  {outcome.suite}: {outcome.name}  ({base / outcome.file}:{outcome.line})")
    for failure in outcome.failures:
        say(f"        {failure}")


def _print_coverage(coverage: Coverage, directory: Path) -> None:
    base = directory.parent if directory.is_file() else directory
    if not coverage.rules:
        say("no rules to hit.")
        return
    hit = len(coverage.rules) - len(coverage.missed)
    say(f"{hit} of {len(coverage.rules)} rules hit ({coverage.percent:.0f} %).")
    for rule in coverage.missed:
        say(f"  not hit: {base / rule.file}:{rule.line}  {rule.name}")


def _as_json(outcomes: list[_Outcome], coverage: Coverage, *, passed: bool) -> dict[str, Any]:
    return {
        "passed": passed,
        "tests": [
            {
                "suite": one.suite,
                "name": one.name,
                "file": one.file,
                "line": one.line,
                "passed": not one.failures,
                "failures": one.failures,
            }
            for one in outcomes
        ],
        "coverage": {
            "rules": len(coverage.rules),
            "hit": len(coverage.rules) - len(coverage.missed),
            "percent": round(coverage.percent, 2),
            "not_hit": [{"rule": rule.name, "file": rule.file, "line": rule.line} for rule in coverage.missed],
        },
    }


def _write_junit(path: Path, outcomes: list[_Outcome]) -> None:
    from xml.etree import ElementTree

    root = ElementTree.Element(
        "testsuites", tests=str(len(outcomes)), failures=str(sum(bool(one.failures) for one in outcomes))
    )
    by_suite: dict[str, list[_Outcome]] = {}
    for one in outcomes:
        by_suite.setdefault(one.suite, []).append(one)
    for name, members in by_suite.items():
        failures = sum(bool(one.failures) for one in members)
        total_s = sum(one.seconds for one in members)
        suite = ElementTree.SubElement(
            root, "testsuite", name=name, tests=str(len(members)), failures=str(failures), time=f"{total_s:.6f}"
        )
        for one in members:
            case = ElementTree.SubElement(
                suite, "testcase", classname=name, name=one.name, file=one.file, line=str(one.line),
                time=f"{one.seconds:.6f}",
            )  # fmt: skip
            if one.failures:
                failure = ElementTree.SubElement(case, "failure", message=one.failures[0])
                failure.text = "\n".join([f"{one.file}:{one.line}", *one.failures])
    try:
        ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise CliError(
            f"--junit {path}: cannot be written: {error.strerror}.", fix="name a file in a directory that exists"
        ) from error
