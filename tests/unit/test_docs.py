"""The documentation against the code: links that resolve, and nothing that exists on one side only."""

from __future__ import annotations

import ast
import re
from argparse import _HelpAction
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

from licet.domain.outcomes import Reason
from licet_control_plane.cli.app import command as licet
from licet_control_plane.core.documents import SourceFile, validate
from licet_control_plane.core.documents.licenses import read_licenses
from licet_control_plane.core.documents.suites import read_suites
from licet_sidecar import config

TOP: Final = Path(__file__).resolve().parents[2]
DOCS: Final = TOP / "docs"
_FENCED: Final = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
_METRIC_MAKERS: Final = {"counter": "_total", "create_observable_counter": "_total", "gauge": "", "gauges": ""} | {
    "create_observable_gauge": "",
    "HistogramMetricFamily": "",
}


def _pages() -> list[Path]:
    found = []
    for path in sorted(TOP.rglob("*.md")):
        parts = path.relative_to(TOP).parts
        if not any(part.startswith(".") or part in ("build", "dist", "node_modules") for part in parts):
            found.append(path)
    return found


PAGES: Final = _pages()


def _prose(page: Path) -> str:
    """The text without its code blocks, where a bracket is no link and a hash no heading."""
    return _FENCED.sub("", page.read_text())


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+?)\s*$", _prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _section(page: Path, heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ +{re.escape(heading)}\s*\n(.*?)(?=^#|\Z)", page.read_text(), re.M | re.S)
    assert found, f"{page.name} has no heading {heading!r}"
    return found[1]


def _names(text: str) -> set[str]:
    return set(re.findall(r"`([^`\s=]+)[^`]*`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in _LINK.findall(_prose(page))
        if link.partition("#")[0] and not re.match(r"[a-z]+:", link)
    }
    alone = [page for page in PAGES if page not in linked and page != TOP / "README.md" and DOCS in page.parents]
    assert not alone


def test_pages_that_the_code_refers_to_exist() -> None:
    missing = {
        name
        for folder in ("licet", "sidecar", "control_plane", "deploy", "examples", "proto")
        for path in (TOP / folder).rglob("*")
        if path.suffix in (".py", ".lua", ".proto", ".yaml")
        for name in re.findall(r"docs/[\w./-]+\.md", path.read_text())
        if not (TOP / name).exists()
    }
    assert not missing


def _metrics(folder: str) -> set[str]:
    """Names as Prometheus sees them, of every metric that the code of a program makes."""
    found = set()
    for path in (TOP / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            maker = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = node.args[0]
            if maker in _METRIC_MAKERS and isinstance(name, ast.Constant) and str(name.value).startswith("licet_"):
                found.add(f"{name.value}{_METRIC_MAKERS[maker]}")
    return found


@pytest.mark.parametrize(
    ("folder", "begin", "end"),
    [
        ("sidecar/licet_sidecar", "**Sidecar**", "**Control plane**"),
        ("control_plane/licet_control_plane", "**Control plane**", "\n## "),
    ],
)
def test_metrics_of_the_code_and_of_operations_are_the_same(folder: str, begin: str, end: str) -> None:
    made = _metrics(folder)
    assert made
    page = (DOCS / "operations.md").read_text()
    listed = page.partition("## Metrics")[2].partition(begin)[2].partition(end)[0]
    assert set(re.findall(r"`(licet_\w+)`", listed)) == made


def test_metrics_named_anywhere_in_the_docs_exist() -> None:
    made = _metrics("sidecar/licet_sidecar") | _metrics("control_plane/licet_control_plane")
    packages = {"licet_sidecar", "licet_control_plane"}
    named = {name for page in PAGES for name in re.findall(r"\b(licet_[a-z_]+)\b", _prose(page))}
    assert named - made - packages == set()


def test_alert_rules_are_about_metrics_that_exist_and_say_what_to_do() -> None:
    made = _metrics("sidecar/licet_sidecar") | _metrics("control_plane/licet_control_plane")
    groups = yaml.safe_load((TOP / "deploy/alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    for rule in rules:
        named = set(re.findall(r"licet_\w+", rule["expr"]))
        assert named, rule
        assert named <= made, rule
        assert {"summary", "fix"} <= set(rule["annotations"]), rule
    names = [rule["alert"] for rule in rules]
    assert len(names) == len(set(names))


def test_every_reason_has_its_row() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \|", _section(DOCS / "decisions.md", "Reasons"), re.M)
    assert rows == [reason.name for reason in Reason]


class Command(NamedTuple):
    name: str
    options: frozenset[str]
    variables: frozenset[str]


def _commands() -> Iterator[Command]:
    def walk(command: Any, name: str) -> Iterator[Command]:  # typer has its own copy of click
        if children := getattr(command, "commands", None):
            for child, below in children.items():
                yield from walk(below, f"{name} {child}")
            return
        options = [one for one in command.params if one.param_type_name == "option"]
        longs = frozenset(text for one in options for text in one.opts if text.startswith("--")) - {"--help"}
        variables = frozenset(str(one.envvar) for one in options if one.envvar)
        yield Command(name, longs, variables)

    yield from walk(licet, "licet")


COMMANDS: Final = list(_commands())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_and_its_options_are_described(command: Command) -> None:
    page = DOCS / "cli.md"
    named = _names(_section(page, command.name))
    if command.name == "licet server":  # its options are settings, which have a test of their own below
        return
    assert {option for option in named if option.startswith("--")} == command.options
    assert command.variables <= _names(page.read_text())


def test_no_command_is_described_that_does_not_exist() -> None:
    described = re.findall(r"^### (licet .+?)\s*$", (DOCS / "cli.md").read_text(), re.M)
    assert sorted(described) == sorted(command.name for command in COMMANDS)


def test_every_setting_of_the_sidecar_is_described() -> None:
    actions = [one for one in config._parser()._actions if not isinstance(one, _HelpAction)]
    flags = {one.option_strings[0] for one in actions}
    rows = re.findall(
        r"^\| `(--[\w-]+)` \| `(LICET_\w+)` \|", _section(DOCS / "operations.md", "Sidecar settings"), re.M
    )
    assert dict(rows) == {flag: f"LICET_{flag[2:].replace('-', '_').upper()}" for flag in flags}


def test_every_setting_of_the_control_plane_is_described() -> None:
    server = next(command for command in COMMANDS if command.name == "licet server")
    source = (TOP / "control_plane/licet_control_plane/config.py").read_text()
    read = dict(re.findall(r'value\(\s*"(\w+)", "(LICET_\w+)"', source))
    rows = re.findall(
        r"^\| `(--[\w-]+)` \| (?:`(LICET_\w+)`|–) \|", _section(DOCS / "operations.md", "Control plane settings"), re.M
    )
    assert {flag for flag, _ in rows} == server.options
    assert {flag[2:].replace("-", "_"): variable for flag, variable in rows if variable} == read


def test_defaults_of_settings_are_those_the_programs_have() -> None:
    helps = {one.option_strings[0]: str(one.help) for one in config._parser()._actions}
    defaults = {flag: found[1] for flag, text in helps.items() if (found := re.search(r"\(default (.+?)\)$", text))}
    assert len(defaults) >= 10
    _assert_rows_show("Sidecar settings", defaults)
    helps = {one.opts[0]: str(one.help) for one in _server_options()}
    defaults = {flag: found[1] for flag, text in helps.items() if (found := re.search(r"\[default: ([^],]+)", text))}
    assert len(defaults) >= 6
    _assert_rows_show("Control plane settings", defaults)


def _server_options() -> list[Any]:
    commands: Any = licet
    return [one for one in commands.commands["server"].params if one.opts[0] != "--help"]


def _assert_rows_show(section: str, defaults: dict[str, str]) -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \|[^|]*\|([^|]*)\|", _section(DOCS / "operations.md", section), re.M)
    shown = dict(rows)
    assert {flag: default for flag, default in defaults.items() if default not in shown[flag]} == {}


def test_examples_of_documents_are_valid_together() -> None:
    blocks = [body for language, body in _FENCED.findall((DOCS / "documents.md").read_text()) if language == "yaml"]
    files = [SourceFile(f"example-{number}.yaml", body) for number, body in enumerate(blocks, 1)]
    suites = [file for file in files if "kind: PolicyTest" in file.text]
    licenses = [file for file in files if "kind: License\n" in file.text]
    found = validate([file for file in files if file not in (*suites, *licenses)])
    assert [str(one) for one in (*found.errors, *found.warnings)] == []
    assert found.catalog is not None
    assert suites
    assert [str(one) for one in read_suites(suites, found.catalog)[1]] == []
    written, faults = read_licenses(licenses)
    assert faults == ()
    for source in (one.source for one in written):
        held = [found.catalog.plans[name] for name in (source.plan, *source.addons)]
        limits = {limit.key for plan in held for one in plan.features.values() for limit in one.limits}
        assert source.overrides.keys() <= limits


def test_examples_in_python_compile() -> None:
    for page in PAGES:
        for language, body in _FENCED.findall(page.read_text()):
            if language == "python":
                compile(body, str(page), "exec")


def test_the_service_in_the_readme_is_the_one_in_examples() -> None:
    blocks = [body for language, body in _FENCED.findall((TOP / "README.md").read_text()) if language == "python"]
    assert blocks
    assert all(block.strip() in (TOP / "examples/service.py").read_text() for block in blocks)
