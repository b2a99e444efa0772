"""Licenses in files: YAML and CSV say the same, and every error has its line."""

from __future__ import annotations

import pytest

from licet_control_plane.core.documents.licenses import read_licenses
from licet_control_plane.core.documents.reading import SourceFile

YAML = """\
kind: License
tenant: acme
plan: pro
status: suspended
starts_at: 2027-01-01
ends_at: 2028-01-01T01:00:00+01:00
grace: 7d
renewal_period: year
auto_renew: true
addons: {extra: 2, more: 1}
overrides: {reports:month: 1_000, "llm:budget": "50.00 USD"}
---
kind: License
tenant: globex
plan: pro
ends_at: never
"""
CSV = """\
plan,tenant,status,starts_at,ends_at,grace,renewal_period,auto_renew,addons,overrides
pro,acme,suspended,2027-01-01,2028-01-01T01:00:00+01:00,7d,year,TRUE,extra=2; more=1,@

pro , globex,,,never,,,,,
""".replace("@", "reports:month=1_000;llm:budget=50.00 USD")
AS_SENT = [
    {
        "tenant": "acme",
        "plan": "pro",
        "status": "suspended",
        "starts_at": "2027-01-01T00:00:00Z",
        "ends_at": "2028-01-01T00:00:00Z",
        "grace_s": 604_800,
        "renewal_period": "year",
        "auto_renew": True,
        "addons": {"extra": 2, "more": 1},
        "overrides": {"reports:month": 1_000, "llm:budget": "50.00 USD"},
    },
    {"tenant": "globex", "plan": "pro", "ends_at": None},
]


@pytest.mark.parametrize(("path", "text"), [("a.yaml", YAML), ("a.csv", CSV)])
def test_both_forms_say_the_same(path: str, text: str) -> None:
    written, faults = read_licenses([SourceFile(path, text)])
    assert faults == ()
    assert [one.source.as_json() for one in written] == AS_SENT


@pytest.mark.parametrize(
    ("path", "text", "line", "message"),
    [
        ("a.csv", "tenant,plna,plan\nacme,,pro\n", 1, "no column 'plna'"),
        ("a.csv", "tenant,tenant\na,b\n", 1, "is there twice"),
        ("a.csv", "tenant,plan\nacme,\n", 2, "'plan' is missing"),
        ("a.csv", "tenant,plan\nok,pro\nac me,pro\n", 3, "cannot name a tenant"),
        ("a.csv", 'tenant,plan\n"a\nb",pro\nacme,pro,more\n', 2, "cannot name a tenant"),
        ("a.csv", 'tenant,plan\n"a\nb",pro\nacme,pro,more\n', 4, "3 cells under 2 columns"),
        ("a.csv", 'tenant,plan\nacme,"pro\n', 2, "not CSV"),
        ("a.csv", "tenant,plan,ends_at\nacme,pro,9999-12-31T23:59:59-01:00\n", 2, "is not a date"),
        ("a.csv", "tenant,plan,auto_renew\nacme,pro,maybe\n", 2, "not true or false"),
        ("a.csv", "tenant,plan,addons\nacme,pro,extra=-1\n", 2, "is not a whole number"),
        ("a.csv", "tenant,plan,addons\nacme,pro,extra\n", 2, "is not a name"),
        ("a.csv", "tenant,plan,overrides\nacme,pro,reports:month=lots\n", 2, "neither a whole number"),
        ("a.csv", "tenant,plan,overrides\nacme,pro,reports:month=99999999999999999999\n", 2, "neither a whole number"),
        ("a.csv", "tenant,plan\nacme,pro\nglobex,pro\nacme,team\n", 4, "is there twice; first at a.csv:2"),
        ("a.yaml", "kind: License\ntenant: acme\nplan: pro\nends: 2027-01-01\n", 4, "no field 'ends'"),
        ("a.yaml", "kind: License\ntenant: acme\nplan: pro\nends_at: soon\n", 4, "'soon' is not a date"),
        ("a.yaml", "kind: Plan\nname: pro\n", 1, "only licenses stand here"),
        ("a.yaml", "kind: License\ntenant: [\n", 3, ""),
    ],
)
def test_what_is_wrong_is_said_with_its_line(path: str, text: str, line: int, message: str) -> None:
    _, faults = read_licenses([SourceFile(path, text)])
    assert any(fault.line == line and message in fault.message for fault in faults), [str(fault) for fault in faults]


def test_a_tenant_of_two_files_is_named_with_the_first() -> None:
    text = "kind: License\ntenant: acme\nplan: pro\n"
    _, (fault,) = read_licenses([SourceFile("a.yaml", text), SourceFile("b.yaml", text)])
    assert (fault.file, fault.code) == ("b.yaml", "twice")
    assert "a.yaml:2" in fault.message
