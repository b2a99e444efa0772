"""The catalog in ``examples/`` is what newcomers copy: it is valid, warns of nothing, and shows every kind."""

from __future__ import annotations

from pathlib import Path

from licet.domain.catalog import Catalog
from licet_control_plane.core.documents import SourceFile, validate

DIRECTORY = Path(__file__).parents[2] / "examples" / "catalog"


def example_catalog() -> Catalog:
    files = [SourceFile(path.name, path.read_text(encoding="utf-8")) for path in sorted(DIRECTORY.glob("*.yaml"))]
    result = validate(files)
    assert [str(finding) for finding in result.errors] == []
    assert [str(finding) for finding in result.warnings] == []
    assert result.catalog is not None
    return result.catalog


def test_the_examples_are_valid_and_show_every_kind() -> None:
    catalog = example_catalog()
    assert all(getattr(catalog, kind) for kind in Catalog.__dataclass_fields__)


def test_enterprise_has_no_limits_and_every_feature_of_the_catalog() -> None:
    catalog = example_catalog()
    enterprise = catalog.plans["enterprise"].features
    assert enterprise.keys() == catalog.features.keys()
    assert not any(entitlement.limits for entitlement in enterprise.values())
