"""Whoever can write Redis cannot write policy: what must not be believed changes no answer, shows, and is healed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from licet.domain.catalog import License, LicenseStatus, Policy, Rule, RuleEffect
from licet.v1 import approval_pb2 as pb
from tests.integration.test_sidecar_process import CATALOG, Sidecar
from tests.support.fleet import wait_until
from tests.support.published import OTHER_KEY, Signer, catalog
from tests.support.redis_publisher import RedisPublisher
from tests.support.sidecar import ask
from tests.support.valkey import ValkeyProcess

SEEDS: Final = range(1)
DENIES: Final = catalog(Policy("no", ("*",), (Rule("all", RuleEffect.DENY),)))
SHOWS: Final = ("documents_rejected", "heads_ignored", "resyncs")

Corruption = Callable[["Attack"], None]


class Attack:
    """What somebody with write access to Redis can do; ``undo`` puts everything back."""

    def __init__(self, publisher: RedisPublisher, chance: random.Random) -> None:
        self.publisher = publisher
        self.chance = chance
        self.names = publisher.names
        self.redis = publisher.redis
        keys = [key for key in self.redis.scan_iter("*") if b":usage" not in key and b":sidecars" not in key]
        self._kept = {key: self.redis.dump(key) for key in keys}

    def undo(self) -> None:
        for key, value in self._kept.items():
            self.redis.restore(key, 0, value, replace=True)

    def read(self, key: str) -> bytes:
        value: bytes = self.redis.get(key)
        return value

    def flipped(self, key: str) -> None:
        data = bytearray(self.read(key))
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        self.redis.set(key, bytes(data))

    def truncated(self, key: str) -> None:
        data = self.read(key)
        self.redis.set(key, data[: self.chance.randrange(len(data))])

    def announced(self, kind: str, key: str, *, ahead: int = 1) -> None:
        """An entry of the stream, so that everybody reads what it names."""
        revision = self.publisher.revision + ahead
        self.redis.xadd(self.names.changes(), {"kind": kind, "key": key, "digest": ""}, f"{revision}-0")

    def license(self, document: bytes | None = None) -> None:
        if document is not None:
            self.redis.set(self.names.license("acme"), document)
        self.announced("license", "acme")

    def bundle(self, signer: Signer, revision: int) -> None:
        manifest, chunks = signer.bundle(DENIES, revision)
        for digest, chunk in chunks.items():
            self.redis.set(self.names.chunk(digest), chunk)
        self.redis.set(self.names.bundle(), manifest)
        self.announced("bundle", "bundle")

    @property
    def next(self) -> int:
        return self.publisher.revision + 1


def canceled(signer: Signer, revision: int, tenant: str = "acme") -> bytes:
    return signer.license(License(tenant, "pro", LicenseStatus.CANCELED), revision)


def _altered_chunk(attack: Attack) -> None:
    manifest, chunks = Signer().bundle(DENIES, attack.next)
    for digest, chunk in chunks.items():
        attack.redis.set(attack.names.chunk(digest), chunk[:-1] + b"?")
    attack.redis.set(attack.names.bundle(), manifest)
    attack.announced("bundle", "bundle")


def _older_head(attack: Attack) -> None:
    attack.redis.set(attack.names.head(), Signer().head(1, "another run", 1))


CORRUPTIONS: Final[dict[str, Corruption]] = {
    "head flipped": lambda attack: attack.flipped(attack.names.head()),
    "head truncated": lambda attack: attack.truncated(attack.names.head()),
    "head lost": lambda attack: attack.redis.delete(attack.names.head()),
    "head of another server": _older_head,
    "head of another key": lambda attack: attack.redis.set(
        attack.names.head(), Signer(OTHER_KEY).head(99, "run", 2_000_000_000_000_000)
    ),
    "manifest flipped": lambda attack: (attack.flipped(attack.names.bundle()), attack.announced("bundle", "bundle")),
    "manifest older": lambda attack: attack.bundle(Signer(), 1),
    "manifest of another key": lambda attack: attack.bundle(Signer(OTHER_KEY), attack.next),
    "manifest of another deployment": lambda attack: attack.bundle(Signer(deployment="e" * 32), attack.next),
    "manifest lost": lambda attack: (attack.redis.delete(attack.names.bundle()), attack.announced("bundle", "bundle")),
    "chunk altered": _altered_chunk,
    "license flipped": lambda attack: (attack.flipped(attack.names.license("acme")), attack.license()),
    "license older": lambda attack: attack.license(canceled(Signer(), 1)),
    "license of another tenant": lambda attack: attack.license(canceled(Signer(), attack.next, "globex")),
    "license of another key": lambda attack: attack.license(canceled(Signer(OTHER_KEY), attack.next)),
    "license mixed up with the bundle": lambda attack: attack.license(attack.read(attack.names.bundle())),
    "license lost": lambda attack: (attack.redis.delete(attack.names.license("acme")), attack.license()),
    "entry missing": lambda attack: attack.announced("license", "acme", ahead=3),
    "entry of nobody": lambda attack: attack.redis.xadd(attack.names.changes(), {"x": "y"}, f"{attack.next}-0"),
    "everything wiped": lambda attack: attack.redis.flushall(),
}


@pytest.fixture
def publisher(valkey_process: ValkeyProcess) -> Iterator[RedisPublisher]:
    made = RedisPublisher(valkey_process.url)
    made.push(CATALOG)
    made.license("acme", "large")
    made.push(CATALOG)
    made.license("acme", "large")
    yield made
    made.close()


@pytest.fixture
def sidecar(tmp_path: Path, valkey_process: ValkeyProcess) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path, valkey_process.url)
    yield made
    made.program.kill()


def shown(sidecar: Sidecar) -> float:
    """The sum of the counters that tell of what was not believed."""
    _, page = sidecar.page("/metrics")
    return sum(float(value) for value in re.findall(rf"^licet_(?:{'|'.join(SHOWS)})_total (\S+)", page, re.MULTILINE))


def answer(sidecar: Sidecar) -> tuple[Any, ...]:
    response = sidecar.check(ask(mode=pb.MODE_PEEK))
    return response.effect, response.reason, response.revision


@pytest.mark.parametrize("seed", SEEDS)
def test_what_must_not_be_believed_changes_no_answer_shows_and_is_healed(
    sidecar: Sidecar, publisher: RedisPublisher, seed: int
) -> None:
    chance = random.Random(seed)
    sidecar.start()
    assert answer(sidecar)[0] == pb.EFFECT_APPROVED
    for name, corrupt in CORRUPTIONS.items():
        before, told = answer(sidecar), shown(sidecar)
        attack = Attack(publisher, chance)
        corrupt(attack)
        wait_until(f"{name}: told", lambda told=told: shown(sidecar) > told, within_s=20)  # type: ignore[misc]
        assert answer(sidecar) == before, name
        attack.undo()
        newest = publisher.license("other")
        wait_until(f"{name}: healed", lambda newest=newest: answer(sidecar)[2] == newest, within_s=20)  # type: ignore[misc]
        assert answer(sidecar)[:2] == before[:2], name


@pytest.mark.parametrize("name", ["head flipped", "manifest of another key", "manifest older", "chunk altered"])
def test_a_sidecar_that_starts_on_what_must_not_be_believed_is_not_ready_until_it_is_true(
    sidecar: Sidecar, publisher: RedisPublisher, name: str
) -> None:
    attack = Attack(publisher, random.Random(0))
    CORRUPTIONS[name](attack)
    sidecar.start(ready=False)
    wait_until("told", lambda: shown(sidecar) > 1, within_s=20)
    assert sidecar.page("/readyz")[0] == 503
    attack.undo()
    wait_until("ready", lambda: sidecar.page("/readyz")[0] == 200, within_s=20)
    assert answer(sidecar)[0] == pb.EFFECT_APPROVED
