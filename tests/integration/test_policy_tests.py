"""``licet policy test``: what passes, what fails and how it says so, and what it refuses to run."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from xml.etree import ElementTree

import pytest

from tests.support.command_line import CommandLine, licet_command

__all__ = ["licet_command"]

EXAMPLES = Path(__file__).parents[2] / "examples" / "catalog"
CATALOG = """\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
attributes:
  region: {type: string, default: ""}
  due: {type: timestamp, default: "2027-01-01T00:00:00Z"}
---
kind: Plan
name: pro
features:
  reports:
    price: {amount: "0.50", currency: USD}
    limits:
      - {amount: 10, per: month}
      - {spend: "4.00 USD", per: day}
---
kind: Policy
name: guard
actions: [report.*]
rules:
  - {name: embargo, effect: deny, when: 'context.region == "xx"'}
  - {name: late, effect: deny, when: 'context.due < now - duration("8760h")'}
---
kind: Policy
name: asleep
enforcement: off
actions: [report.*]
rules: [{name: never, effect: deny}]
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    directory = tmp_path / "catalog"
    directory.mkdir()
    (directory / "all.yaml").write_text(CATALOG)
    return directory


def write(catalog: Path, tests: str, name: str = "all_test.yaml") -> None:
    (catalog / name).write_text(f"kind: PolicyTest\nname: suite\ngiven: {{license: {{plan: pro}}}}\n{dedent(tests)}")


def test_the_example_passes_and_hits_every_rule(licet_command: CommandLine) -> None:
    ended = licet_command("policy", "test", EXAMPLES, "--min-coverage", "100", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["passed"] is True
    assert ended.json["coverage"]["not_hit"] == []
    assert len(ended.json["tests"]) >= 10
    valid = licet_command("policy", "validate", EXAMPLES, "--json")
    assert valid.json["valid"] is True


def test_the_example_of_the_documentation_passes(licet_command: CommandLine, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "documents.md").read_text()
    for number, body in enumerate(re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)):
        if "kind: License\n" in body:
            continue  # they stand in directories of their own
        suffix = "_test.yaml" if "kind: PolicyTest" in body else ".yaml"
        (tmp_path / f"example-{number}{suffix}").write_text(body)
    ended = licet_command("policy", "test", tmp_path)
    assert ended.code == 0, ended.out
    assert "2 passed, 0 failed." in ended.out


def test_failures_say_where_what_and_what_was_expected(licet_command: CommandLine, catalog: Path) -> None:
    write(
        catalog,
        """\
        tests:
          - name: passes
            ask: {action: report.export, quantity: 2}
            expect: {effect: APPROVED, cost: "1.00 USD", remaining: {reports:month: 8, reports:day.usd: "3.00 USD"}}
          - name: fails
            ask: {action: report.export, context: {region: xx}}
            expect: {effect: APPROVED, rule: "", message: nothing, remaining: {reports:month: 9}}
          - name: in the second step
            steps:
              - ask: {action: report.export, repeat: 8}
                expect: {effect: APPROVED, remaining: {reports:month: 2}}
              - ask: {action: report.export, now: "2027-01-16T00:00:00Z", quantity: 3}
                expect: {reason: OK}
        """,
    )
    ended = licet_command("policy", "test", catalog)
    assert ended.code == 1
    assert "ok    suite: passes" in ended.out
    assert f"FAIL  suite: fails  ({catalog}/all_test.yaml:8)" in ended.out
    assert "effect is DENIED, expected APPROVED" in ended.out
    assert "rule is guard/embargo, expected none" in ended.out
    assert "message is 'Policy rule guard/embargo denies this.', expected it to contain 'nothing'" in ended.out
    assert "reports:month was not looked at, expected 9 of it to remain" in ended.out
    assert "step 2: reason is QUOTA_EXHAUSTED, expected OK" in ended.out
    assert "step 2: the answer says: 3 units of reports were asked" in ended.out
    assert "1 passed, 2 failed." in ended.out

    report = catalog.parent / "report.xml"
    found = licet_command("policy", "test", catalog, "--json", "--junit", report)
    assert (found.code, [test["passed"] for test in found.json["tests"]]) == (1, [True, False, False])
    root = ElementTree.parse(report).getroot()
    assert (root.get("tests"), root.get("failures")) == ("3", "2")
    assert [case.get("line") for case in root.iter("testcase")] == ["5", "8", "11"]
    assert len(list(root.iter("failure"))) == 2
    assert licet_command("policy", "test", catalog, "--only", "passes").code == 0
    assert licet_command("policy", "test", catalog, "--only", "no such").code == 2
    assert licet_command("policy", "test", catalog, "--junit", catalog / "no" / "report.xml").code == 1


def test_rules_that_no_test_hits_are_named_by_file_and_line(licet_command: CommandLine, catalog: Path) -> None:
    write(
        catalog,
        """\
        tests:
          - name: embargo
            ask: {action: report.export, context: {region: xx}}
            expect: {reason: POLICY_DENIED}
        """,
    )
    ended = licet_command("policy", "test", catalog, "--min-coverage", "80")
    assert ended.code == 1
    assert "1 of 2 rules hit (50 %)." in ended.out
    assert f"not hit: {catalog}/all.yaml:25  guard/late" in ended.out
    assert "asks for 80 %" in ended.err
    assert licet_command("policy", "test", catalog, "--min-coverage", "50").code == 0
    write(
        catalog,
        """\
        tests:
          - name: late
            ask: {action: report.export, context: {due: "2020-01-01T00:00:00Z"}}
            expect: {rule: guard/late}
        """,
        "more_test.yml",
    )
    assert licet_command("policy", "test", catalog, "--min-coverage", "100").code == 0


def test_what_is_given_is_there(licet_command: CommandLine, catalog: Path) -> None:
    write(
        catalog,
        """\
        tests:
          - name: used and overridden
            given:
              license: {plan: pro, overrides: {reports:month: 20}, addons: {pro: 1}}
              used: {reports:month: 15}
            ask: {action: report.export}
            expect: {remaining: {reports:month: 4}}
          - name: a grant
            given:
              license: {plan: pro, grants: [{limit: reports:day.usd, amount: "1.00 USD"}]}
              used: {reports:day.usd: "4.00 USD"}
            ask: {action: report.export, quantity: 3}
            expect: {reason: QUOTA_EXHAUSTED}
          - name: suspended
            given: {license: {plan: pro, status: suspended}}
            ask: {action: report.export}
            expect: {reason: TENANT_SUSPENDED}
          - name: expired
            given: {license: {plan: pro, ends: "2027-01-01T00:00:00Z"}, now: "2027-01-01T00:00:00Z"}
            ask: {action: report.export}
            expect: {reason: LICENSE_EXPIRED}
          - name: no license
            given: {no_license: true}
            ask: {action: report.export}
            expect: {reason: NO_LICENSE}
          - name: malformed
            ask: {action: report.export, quantities: {rows: 3}}
            expect: {invalid: has no such meter}
        """,
    )
    ended = licet_command("policy", "test", catalog, "--json")
    assert [(test["name"], test["failures"]) for test in ended.json["tests"] if test["failures"]] == [], ended.out
    assert ended.code == 0


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ("tests: [{name: a, ask: {action: x}, expect: {reason: OKAY}}]\n", "'OKAY' is not one of the reasons"),
        ("tests: [{name: a, ask: {action: x}}]\n", "a test needs 'ask' and 'expect'"),
        ("tests: [{name: a, ask: {action: x, contxt: {}}, expect: {}}]\n", "Did you mean 'context'?"),
        ("tests: [{name: a, given: {license: {plan: por}}, ask: {action: x}, expect: {}}]\n", "Did you mean 'pro'?"),
        (
            "tests: [{name: a, given: {used: {reports:mont: 1}}, ask: {action: x}, expect: {}}]\n",
            "Did you mean 'reports:month'?",
        ),
        ("tests: [{name: a, ask: {action: x}, expect: {remaining: {reports:year: 1}}}]\n", "there is no limit"),
        ("tests: []\n", "it is empty"),
    ],
)
def test_a_suite_with_a_mistake_is_not_run(licet_command: CommandLine, catalog: Path, tests: str, problem: str) -> None:
    write(catalog, tests)
    ended = licet_command("policy", "test", catalog)
    assert ended.code == 2
    assert problem in ended.err
    assert f"{catalog}/all_test.yaml:4:" in ended.err
    assert "no test was run" in ended.err


def test_documents_with_a_mistake_and_places_without_tests_are_refused(
    licet_command: CommandLine, catalog: Path
) -> None:
    assert licet_command("policy", "test", catalog).code == 2
    write(catalog, "tests: [{name: a, ask: {action: report.export}, expect: {effect: APPROVED}}]\n")
    assert licet_command("policy", "test", catalog / "all.yaml").code == 0
    (catalog / "all.yaml").write_text(CATALOG.replace("name: pro", "nam: pro"))
    ended = licet_command("policy", "test", catalog)
    assert (ended.code, "Did you mean 'name'?" in ended.err) == (2, True)


def test_a_suite_in_a_file_with_another_name_is_told_where_it_belongs(
    licet_command: CommandLine, catalog: Path
) -> None:
    write(catalog, "tests: [{name: a, ask: {action: report.export}, expect: {}}]\n", "tests.yaml")
    ended = licet_command("policy", "validate", catalog)
    assert ended.code == 1
    assert "_test.yaml" in ended.err


def test_without_the_sidecar_it_says_what_to_install(
    licet_command: CommandLine, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(catalog, "tests: [{name: a, ask: {action: report.export}, expect: {}}]\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = licet_command("policy", "test", catalog)
    assert (ended.code, "pip install 'licet[dev]'" in ended.err) == (2, True)


FLAG = """\
---
kind: Flag
name: format
feature: reports
targeting: [{name: staff, when: 'subject.type == "staff"', serve: columnar}]
schedule: [{at: "2027-01-15T09:00:00Z", percent: 100}]
variants: {plain: 1, columnar: {weight: 0, value: {extension: parquet}}}
"""


def test_a_test_expects_variants(catalog: Path, licet_command: CommandLine) -> None:
    (catalog / "all.yaml").write_text(CATALOG + FLAG)
    tests = """\
        tests:
          - name: staff
            ask: {action: report.export, subject: {type: staff}, now: "2027-01-01T00:00:00Z"}
            expect: {effect: APPROVED, variants: {format: columnar}}
          - name: before
            ask: {action: report.export, now: "2027-01-15T08:59:59Z"}
            expect: {reason: FEATURE_OFF, rule: format, variants: {format: off}}
          - name: after
            ask: {action: report.export, now: "2027-01-15T09:00:00Z"}
            expect: {variants: {format: VARIANT}}
        """
    write(catalog, tests.replace("VARIANT", "plain"))
    assert licet_command("policy", "test", str(catalog)).code == 0
    write(catalog, tests.replace("VARIANT", "columnar"))
    failed = licet_command("policy", "test", str(catalog))
    assert failed.code == 1
    assert "flag format serves plain, expected columnar" in failed.out + failed.err
    write(catalog, tests.replace("VARIANT", "colummar"))
    refused = licet_command("policy", "test", str(catalog))
    assert "Did you mean 'columnar'?" in refused.out + refused.err
