"""Evidence: one archive of an interval that is checked without the server, and shows what was done to it."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, update

from licet.wire.signing import SigningKey, Verifier
from licet_control_plane.evidence import CHANGES, HEADS, MANIFEST, SIGNATURE, Checked, EvidenceRefused, check
from licet_control_plane.store import access
from licet_control_plane.store.schema import audit
from tests.support.control_plane import deployment
from tests.support.site import BUNDLE, Site
from tests.support.valkey import ValkeyProcess

ALL = {"from": "2000-01-01", "to": "2100-01-01"}
Files = dict[str, bytes]


@pytest.fixture
async def site(tmp_path: Path, valkey_process: ValkeyProcess, database_url: str) -> AsyncIterator[Site]:
    async with deployment(tmp_path / "state", valkey_process.url, database_url=database_url) as running:
        made = Site(running)
        await made.ask("POST", "/v1/bundles", documents=[{"path": "../a.yaml", "content": BUNDLE}])
        await made.ask("POST", "/v1/licenses", tenant="acme", plan="pro")
        await made.ask("POST", "/v1/bundles", documents=[{"path": "b.yaml", "content": BUNDLE.replace("100", "9")}])
        approved: dict[str, Any] = {"by": "ada", "action": "access_request.approve", "target": "r1"}
        await made.sql(partial(access.record, **approved, before=None, after={}, now_us=2_000_000_000_000_000))
        assert (await made.ask("GET", "/v1/audit/head")).status_code == 200
        await running.headed(3)  # published, and the same from here on
        yield made


async def archive(site: Site, **query: str) -> bytes:
    answer = await site.ask("GET", "/v1/audit/evidence", params=query or ALL)
    assert answer.status_code == 200, answer.text
    return answer.content


def checked(data: bytes, site: Site) -> Checked:
    return check(io.BytesIO(data), site.running.verifier)


def files_of(data: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        return {name: found.read(name) for name in found.namelist()}


def zipped(files: Files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
    return out.getvalue()


async def test_it_holds_rules_changes_approvals_and_heads_and_is_the_same_each_time(site: Site) -> None:
    data = await archive(site)
    assert data == await archive(site)
    found = checked(data, site)
    assert (found.rules, found.changes, found.approvals, found.audit_head) == (2, 4, 1, 4)
    assert (found.audit_ok, found.ledger_ok) == (True, True)
    files = files_of(data)
    assert sorted(files) == [
        "approvals.jsonl", "changes.jsonl", "heads.json", "manifest.json", "manifest.sig",
        "rules/000000000001.json", "rules/000000000003.json",
    ]  # fmt: skip
    rule = json.loads(files["rules/000000000001.json"])
    assert (rule["by"], rule["files"]) == ("admin", [{"path": "../a.yaml", "content": BUNDLE}])
    actions = [json.loads(line)["action"] for line in files[CHANGES].splitlines()]
    assert actions == ["bundle.push", "license.create", "bundle.push", "access_request.approve"]


async def test_an_interval_has_what_was_in_force_at_its_beginning(site: Site) -> None:
    found = checked(await archive(site, **{"from": "2090-01-01", "to": "2091-01-01"}), site)
    assert (found.rules, found.changes, found.approvals) == (1, 0, 0)
    none = checked(await archive(site, **{"from": "2000-01-01", "to": "2001-01-01"}), site)
    assert (none.rules, none.changes) == (0, 0)
    answer = await site.ask("GET", "/v1/audit/evidence", params={"from": "2002-01-01", "to": "2001-01-01"})
    assert answer.status_code == 422


def _less(files: Files) -> None:
    lines = files[CHANGES].splitlines(keepends=True)
    files[CHANGES] = b"".join(lines[:-1])


ALTERED: dict[str, Callable[[Files], Any]] = {
    "changes.jsonl was altered": _less,
    "rules/000000000001.json was altered": lambda files: files.update({"rules/000000000001.json": b"{}"}),
    "the manifest was altered": lambda files: files.update({MANIFEST: files[MANIFEST] + b" "}),
    "extra.txt is there and not in the manifest": lambda files: files.update({"extra.txt": b""}),
    "rules/000000000003.json is there and not": lambda files: files.pop("rules/000000000003.json"),
    "it holds no manifest.sig": lambda files: files.pop(SIGNATURE),
    "signed by somebody else": lambda files: files.update({SIGNATURE: base64.b64encode(b"x")}),
}


async def test_what_was_altered_is_found_and_named(site: Site) -> None:
    data = await archive(site)
    for says, alter in ALTERED.items():
        files = files_of(data)
        alter(files)
        with pytest.raises(EvidenceRefused, match=says):
            checked(zipped(files), site)
    for nonsense in (b"", b"x" * 100, data[:-50]):
        with pytest.raises(EvidenceRefused):
            checked(nonsense, site)
    other = SigningKey.generate()
    with pytest.raises(EvidenceRefused, match="signed by somebody else"):
        check(io.BytesIO(data), Verifier([other.public_key]))
    checked(zipped(files_of(data)), site)


async def test_evidence_of_a_trail_that_was_altered_says_so(site: Site) -> None:
    await archive(site)
    change = update(audit).where(audit.c.number == 2).values(by="mallory")
    await site.sql(partial(Connection.execute, statement=change))
    data = await archive(site)
    assert json.loads(files_of(data)[HEADS])["audit"]["verified"]["fault"]["entry"] == 2
    with pytest.raises(EvidenceRefused, match="entry 2 was altered"):
        checked(data, site)
