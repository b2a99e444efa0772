"""The signing key is rotated under load: no check fails, no answer is stale, and what the old key signs is refused.

With real processes: two control planes could not tell more, as the database decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import licet
from licet.wire.names import RedisNames
from licet.wire.signing import SigningKey, Statement, read_own, signed_with
from tests.support.fleet import Fleet, wait_until

CATALOG = """\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Plan
name: pro
features:
  reports: {}
"""
COLD_TENANTS = 4
NAMES = RedisNames()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, count=2, sidecar_flags=("--staleness-max", "20s"))
    try:
        fleet.start()
        fleet.push(CATALOG)
        for number in range(COLD_TENANTS):
            fleet.licet("license", "create", f"cold{number}", "--plan", "pro")
        fleet.licet("license", "create", "acme", "--plan", "pro", "--wait")
        yield fleet
    finally:
        fleet.stop()


class Load:
    """Checks of one sidecar, one after the other: of a warm tenant, and now and then of one that it has not met."""

    def __init__(self, address: str, prefix: int) -> None:
        self.wrong: list[str] = []
        self.answers = 0
        self.as_of = datetime.min.replace(tzinfo=UTC)
        self._address = address
        self._cold = [f"cold{number}" for number in range(prefix, COLD_TENANTS, 2)]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with licet.Client(self._address) as client:
            next_s = time.monotonic()
            while not self._end.is_set():
                tenant = "acme"
                if self._cold and time.monotonic() >= next_s:
                    tenant, next_s = self._cold.pop(), next_s + 1.0
                try:
                    answer = client.check(tenant, "report.export")
                except licet.LicetError as error:
                    self.wrong.append(f"{tenant}: {error!r}")
                    continue
                self.answers += 1
                self.as_of = answer.as_of or self.as_of
                if not answer.approved or answer.stale or answer.degraded:
                    self.wrong.append(f"{tenant}: {answer}")

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


def test_the_key_is_rotated_under_load_and_the_old_one_is_refused_afterwards(fleet: Fleet) -> None:
    pem = (fleet.directory / "server" / "signing-key.pem").read_bytes()
    private = load_pem_private_key(pem, password=None)
    assert isinstance(private, Ed25519PrivateKey)
    old = SigningKey(private)
    loads = [Load(address, number) for number, address in enumerate(fleet.addresses)]
    try:
        following = fleet.licet("signing-key", "generate")
        wait_until("sidecars trust both keys", lambda: _trusted_by(fleet, following["id"]) == 2)
        active = fleet.licet("signing-key", "rotate")
        assert active["id"] == following["id"]
        wait_until("sidecars trust the new key alone", lambda: _trusted_by(fleet, old.key_id) == 0)
        fleet.licet("signing-key", "retire", old.key_id)
        answers, now = [load.answers for load in loads], datetime.now(UTC)
        wait_until("checks go on", lambda: all(load.answers > n + 50 for load, n in zip(loads, answers, strict=True)))
        wait_until("heads of the new key are believed", lambda: all(load.as_of > now for load in loads))
    finally:
        for load in loads:
            load.stop()
    assert [load.wrong for load in loads] == [[], []]
    pem = (fleet.directory / "server" / "signing-key.pem").read_bytes()
    assert pem != private
    assert (fleet.directory / "server" / "public-key.txt").read_text().split() == [active["public_key"]]

    with redis.Redis.from_url(fleet.valkey.url) as store:
        for name in (NAMES.bundle(), NAMES.license("acme"), NAMES.head()):
            wait_until("all is signed anew", lambda name=name: signed_with(store.get(name)) == active["id"])  # type: ignore[misc]
        _forge(store, old)
    before = [fleet.metric(number, "licet_documents_rejected_total") for number in (0, 1)]
    wait_until(
        "the forged license is refused",
        lambda: all(fleet.metric(number, "licet_documents_rejected_total") > before[number] for number in (0, 1)),
    )
    for address in fleet.addresses:
        with licet.Client(address) as client:
            assert client.check("acme", "report.export").approved
    assert fleet.licet("audit", "verify")["ok"]


def _trusted_by(fleet: Fleet, key: str) -> int:
    items = fleet.licet("signing-key", "list")["items"]
    count: int = next(item["trusted_by"] for item in items if item["id"] == key)
    return count


def _forge(store: redis.Redis, old: SigningKey) -> None:
    """A license that is canceled, in the next revision, with its entry in the stream: as the thief of a key would."""
    newest = store.xrevrange(NAMES.changes(), count=1)
    revision = int(newest[0][0].partition(b"-")[0]) + 1
    now = read_own(store.get(NAMES.license("acme")))
    payload = {**now.payload, "status": "canceled"}
    forged = old.sign(Statement(now.deployment, now.kind, now.key, now.generation, revision, payload))
    store.set(NAMES.license("acme"), forged)
    store.xadd(NAMES.changes(), {"kind": "license", "key": "acme"}, id=f"{revision}-0")
