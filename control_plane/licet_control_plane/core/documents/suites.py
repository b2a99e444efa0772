"""Test suites of policies: ``kind: PolicyTest``, kept beside the documents they test, in files ``*_test.yaml``.

They are no documents of a bundle: ``validate`` and ``push`` leave the files out. Read and verified here; whether the
answers are the expected ones is said by the decision engine, which this program does not hold. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, StrictBool

from licet.domain.catalog import Catalog, Grant, License, LicenseStatus, Plan
from licet.domain.entitlements import entitlements_of
from licet.domain.flags import OFF, ON
from licet.domain.ids import TENANT_PATTERN, UNITS_MAX, LimitKey
from licet.domain.money import parse_budget
from licet.domain.outcomes import Effect, Reason
from licet_control_plane.core.documents.findings import DocumentError, Findings, Path
from licet_control_plane.core.documents.model import Source
from licet_control_plane.core.documents.nodes import SourceDocument
from licet_control_plane.core.documents.reading import SourceFile, read
from licet_control_plane.core.documents.scalars import MoneyForm, PositiveUnits, Text, Units, refused
from licet_control_plane.core.documents.schema import check_model

KIND: Final = "PolicyTest"
SUFFIXES: Final = ("_test.yaml", "_test.yml")
TENANT_DEFAULT: Final = "tenant"
REPEAT_MAX: Final = 10_000
_GRANT_ENDS_S: Final = 253_402_300_799
NOW_DEFAULT: Final = datetime(2027, 1, 15, 12, tzinfo=UTC)
"""In the middle of every window, so that what a test says does not depend on the day it runs."""


def is_suite(path: str) -> bool:
    """Whether a file holds tests and no documents, by its name."""
    return path.endswith(SUFFIXES)


def _instant(value: Any) -> datetime | None:
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        at = None
    if at is None or at.year < 1971:
        raise refused(f"{value!r} is not an instant", 'Write one such as "2027-01-31T18:00:00Z", in quotes.')
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _quantity(value: Any) -> int | tuple[int, str]:
    """Units, or for a budget nanos and their currency."""
    if isinstance(value, str):
        try:
            return parse_budget(value)
        except ValueError as error:
            raise refused(str(error), 'Write units, such as 100, or money, such as "5.00 USD".') from None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= UNITS_MAX:
        raise refused(f"{value!r} is not an amount", 'Write units, such as 100, or money, such as "5.00 USD".')
    return value


def _tenant(value: Any) -> str:
    if not isinstance(value, str) or not TENANT_PATTERN.fullmatch(value):
        raise refused(f"{value!r} cannot name a tenant", "Use letters, digits, dots, dashes and underscores.")
    return value


def _word_of(kind: type[Effect] | type[Reason]) -> Any:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in kind.__members__:
            names = ", ".join(kind.__members__)
            raise refused(f"{value!r} is not one of the {kind.__name__.lower()}s", f"There are: {names}.")
        return value

    return BeforeValidator(check, json_schema_input_type=Literal[tuple(kind.__members__)])


Instant = Annotated[datetime | None, BeforeValidator(_instant, json_schema_input_type=str | None)]
Amount = Annotated[
    int | tuple[int, str],
    BeforeValidator(_quantity, json_schema_input_type=Annotated[int, Field(ge=0, le=UNITS_MAX)] | MoneyForm),
]
Attribute = str | int | float | bool | list[str]


class SubjectSource(Source):
    """Who acts."""

    id: Text = ""
    type: Text = ""
    roles: tuple[str, ...] = ()
    attributes: dict[str, Attribute] = Field(default_factory=dict)
    on_behalf_of: Text = ""


class ResourceSource(Source):
    """What it is done to."""

    id: Text = ""
    type: Text = ""
    attributes: dict[str, Attribute] = Field(default_factory=dict)


class GrantSource(Source):
    """A top-up; without ``starts`` and ``ends`` it is in force."""

    limit: str
    amount: Amount
    id: Text = "grant"
    priority: int = 100
    starts: Instant = None
    ends: Instant = None


class LicenseSource(Source):
    """What the tenant holds."""

    plan: str
    status: LicenseStatus = LicenseStatus.ACTIVE
    starts: Instant = None
    ends: Instant = None
    addons: dict[str, PositiveUnits] = Field(default_factory=dict)
    overrides: dict[str, Amount] = Field(default_factory=dict)
    grants: tuple[GrantSource, ...] = ()


class ScopedUse(Source):
    """What one subject, or one value of an attribute, has used already."""

    limit: str
    units: Amount
    subject: SubjectSource = SubjectSource()
    context: dict[str, Attribute] = Field(default_factory=dict)


UsedForm = tuple[ScopedUse, ...] | dict[str, Amount]


def _used(value: Any) -> Any:
    """``{key: units}`` is short for a list."""
    if isinstance(value, dict):
        return [{"limit": key, "units": units} for key, units in value.items()]
    return value


class GivenSource(Source):
    """What is so before anything is asked. Of a test's and its suite's, the test's counts, field by field."""

    now: Instant = None
    tenant: Annotated[str, BeforeValidator(_tenant)] | None = None
    license: LicenseSource | None = None
    no_license: StrictBool = False
    used: Annotated[tuple[ScopedUse, ...], BeforeValidator(_used, json_schema_input_type=UsedForm)] = ()


class AskSource(Source):
    """One check, ``repeat`` times."""

    action: str
    subject: SubjectSource = SubjectSource()
    quantity: Units | None = None
    quantities: dict[str, Units] = Field(default_factory=dict)
    context: dict[str, Attribute | None] = Field(default_factory=dict)
    resource: ResourceSource = ResourceSource()
    now: Instant = None
    repeat: Annotated[int, Field(ge=1, le=REPEAT_MAX)] = 1
    peek: StrictBool = False


class ExpectSource(Source):
    """What is expected of the answer, or of the last one. What is not said may be anything."""

    effect: Annotated[str | None, _word_of(Effect)] = Field(default=None, validate_default=False)
    reason: Annotated[str | None, _word_of(Reason)] = Field(default=None, validate_default=False)
    rule: str | None = None
    message: str | None = None
    remaining: dict[str, Amount] = Field(default_factory=dict)
    cost: Annotated[Amount | None, Field()] = None
    shadow: tuple[str, ...] | None = None
    variants: dict[str, str] = Field(default_factory=dict)
    invalid: str | None = None


class StepSource(Source):
    """One question and what is expected; what it takes is gone for the next."""

    ask: AskSource
    expect: ExpectSource


class TestSource(Source):
    """One test: one question, or several ``steps``."""

    name: Annotated[Text, Field(min_length=1)]
    given: GivenSource = GivenSource()
    ask: AskSource | None = None
    expect: ExpectSource | None = None
    steps: tuple[StepSource, ...] = ()


class SuiteSource(Source):
    """``kind: PolicyTest``."""

    name: Annotated[Text, Field(min_length=1)]
    given: GivenSource = GivenSource()
    tests: Annotated[tuple[TestSource, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Suite:
    """A verified suite, and where it stands."""

    file: str
    source: SuiteSource
    document: SourceDocument

    def line_of(self, test: int) -> int:
        """The line on which a test begins."""
        return self.document.root.position_of(("tests", test))[0]


@dataclass(frozen=True, slots=True)
class Given:
    """What is so before anything is asked. ``license_`` is ``None`` for a tenant without one."""

    now_us: int
    tenant: str
    license_: License | None
    used: tuple[ScopedUse, ...]


def read_suites(files: Iterable[SourceFile], catalog: Catalog) -> tuple[list[Suite], tuple[DocumentError, ...]]:
    """The suites of ``files``, with all that is wrong with them; names are those of ``catalog``."""
    findings = Findings()
    suites: list[Suite] = []
    for file in files:
        documents, _ = read(file, findings)
        for document in documents:
            if document.kind != KIND:
                findings.error(
                    document,
                    ("kind",),
                    f"the kind {document.kind!r} is none of a file of tests",
                    f"Write 'kind: {KIND}', or move the document to a file with another name.",
                )
                continue
            source = check_model(document, SuiteSource, findings)
            if source is not None:
                suites.append(Suite(document.file, source, document))
                _check_names(suites[-1], catalog, findings)
    return suites, findings.errors()


def given_of(suite: SuiteSource, test: TestSource) -> Given:
    """What holds for a test: its own, else its suite's."""
    own, shared = test.given, suite.given
    now = own.now or shared.now or NOW_DEFAULT
    tenant = own.tenant or shared.tenant or TENANT_DEFAULT
    # A test that says either of the two says it for itself.
    license_ = None if own.no_license else own.license or (None if shared.no_license else shared.license)
    return Given(
        now_us=_us(now),
        tenant=tenant,
        license_=license_of(tenant, license_) if license_ else None,
        used=own.used if "used" in own.model_fields_set else shared.used,
    )


def license_of(tenant: str, source: LicenseSource) -> License:
    """The license a test describes."""
    return License(
        tenant=tenant,
        plan=source.plan,
        status=source.status,
        starts_s=_us(source.starts) // 1_000_000 if source.starts else 0,
        ends_s=_us(source.ends) // 1_000_000 if source.ends else 0,
        addons=dict(source.addons),
        overrides={key: amount_of(amount) for key, amount in source.overrides.items()},
        grants=tuple(
            Grant(
                id=grant.id,
                limit=LimitKey(grant.limit),
                amount=amount_of(grant.amount),
                starts_s=_us(grant.starts) // 1_000_000 if grant.starts else 0,
                ends_s=_us(grant.ends) // 1_000_000 if grant.ends else _GRANT_ENDS_S,
                priority=grant.priority,
            )
            for grant in source.grants
        ),
    )


def amount_of(amount: int | tuple[int, str]) -> int:
    """Units, or nanos."""
    return amount if isinstance(amount, int) else amount[0]


def _us(at: datetime) -> int:
    return int(at.timestamp()) * 1_000_000 + at.microsecond


def _check_names(suite: Suite, catalog: Catalog, findings: Findings) -> None:
    document, source = suite.document, suite.source
    _check_given(document, ("given",), source.given, catalog, findings)
    if source.given.license is not None and source.given.license.plan in catalog.plans:
        shared = _limit_keys(license_of(TENANT_DEFAULT, source.given.license), catalog)
        for used in source.given.used:
            if used.limit not in shared:
                findings.unknown(document, ("given", "used"), "limit", used.limit, shared)
    seen: dict[str, int] = {}
    for place, test in enumerate(source.tests):
        path: Path = ("tests", place)
        if seen.setdefault(test.name, place) != place:
            findings.error(document, (*path, "name"), f"the test {test.name!r} is there twice", "Rename one of them.")
        if bool(test.steps) == (test.ask is not None) or (test.ask is None) != (test.expect is None):
            findings.error(
                document, path, "a test needs 'ask' and 'expect', or 'steps'", "Write both, or a list of 'steps'."
            )
        _check_given(document, (*path, "given"), test.given, catalog, findings)
        given = given_of(source, test)
        known = _limit_keys(given.license_, catalog)
        for used in test.given.used:
            if used.limit not in known:
                findings.unknown(document, (*path, "given", "used"), "limit", used.limit, known)
        for steps_path, expect in _expectations(test, path):
            _check_variants(document, steps_path, expect, catalog, findings)
            for key in expect.remaining:
                if given.license_ is not None and key not in known:
                    findings.unknown(document, (*steps_path, "remaining", key), "limit", key, known)


def _check_variants(
    document: SourceDocument, path: Path, expect: ExpectSource, catalog: Catalog, findings: Findings
) -> None:
    for name, served in expect.variants.items():
        flag = catalog.flags.get(name)
        if flag is None:
            findings.unknown(document, (*path, "variants", name), "flag", name, catalog.flags)
            continue
        choices = [*(variant.name for variant in flag.variants), OFF] if flag.variants else [ON, OFF]
        if served not in choices:
            findings.unknown(document, (*path, "variants", name), "variant", served, choices)


def _expectations(test: TestSource, path: Path) -> list[tuple[Path, ExpectSource]]:
    found: list[tuple[Path, ExpectSource]] = [
        ((*path, "steps", place, "expect"), step.expect) for place, step in enumerate(test.steps)
    ]
    return [((*path, "expect"), test.expect), *found] if test.expect else found


def _check_given(
    document: SourceDocument, path: Path, given: GivenSource, catalog: Catalog, findings: Findings
) -> None:
    license_ = given.license
    if license_ is None:
        return
    plans: Mapping[str, Plan] = catalog.plans
    if license_.plan not in plans:
        findings.unknown(document, (*path, "license", "plan"), "plan", license_.plan, plans)
        return
    for addon in license_.addons:
        if addon not in plans:
            findings.unknown(document, (*path, "license", "addons", addon), "plan", addon, plans)
    known = _limit_keys(license_of(TENANT_DEFAULT, license_), catalog)
    for key in license_.overrides:
        if key not in known:
            findings.unknown(document, (*path, "license", "overrides", key), "limit", key, known)
    for place, grant in enumerate(license_.grants):
        if grant.limit not in known:
            findings.unknown(document, (*path, "license", "grants", place, "limit"), "limit", grant.limit, known)


def _limit_keys(license_: License | None, catalog: Catalog) -> list[str]:
    if license_ is None:
        return []
    granted = entitlements_of(license_, catalog).values()
    return [str(limit.key) for one in granted for limit in one.limits] + [
        str(grant.key) for one in granted for grant in one.grants
    ]
