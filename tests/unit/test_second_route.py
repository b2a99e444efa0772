"""Without Redis: a sidecar follows what the control plane itself says, and believes no more than what is signed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from licet.domain.catalog import Policy, Rule, RuleEffect
from licet.v1 import approval_pb2 as pb
from licet_sidecar.adapters.https_route import refusal_of
from licet_sidecar.config import ConfigError, parse
from licet_sidecar.ports import LinkDown, PulseReport
from tests.support.fake_second_route import FakeSecondRoute
from tests.support.fake_state_source import FakePublisher
from tests.support.published import KEY, OTHER_KEY, Signer, catalog
from tests.support.sidecar import FakeSidecar, World, ask, hurried

NO = Policy("no", ("*",), (Rule("all", RuleEffect.DENY),))
GONE = LinkDown("gone")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    hurried(monkeypatch)
    made = World(tmp_path / "state")
    made.push(catalog())
    made.license("acme")
    return made


@pytest.fixture
async def sidecar(world: World) -> AsyncIterator[FakeSidecar]:
    """Started while Redis is away."""
    world.source.fail(GONE)
    made = FakeSidecar(world, second=FakeSecondRoute(world.publisher, world.clock))
    made.link.failed(GONE)
    made.start()
    yield made
    await made.stop()


def route(sidecar: FakeSidecar) -> FakeSecondRoute:
    assert sidecar.second is not None
    return sidecar.second


async def reason(sidecar: FakeSidecar, tenant: str = "acme") -> str:
    response = await sidecar.check(ask(tenant, mode=pb.MODE_PEEK))
    return pb.Reason.Name(response.reason).removeprefix("REASON_")


async def test_a_sidecar_that_starts_without_redis_is_ready_and_serves(sidecar: FakeSidecar, world: World) -> None:
    assert not sidecar.sync.ready.is_set()
    await sidecar.sync.follow_second_route()
    assert sidecar.sync.ready.is_set()
    response = await sidecar.check()
    assert (response.effect, response.revision, response.stale) == (pb.EFFECT_APPROVED, 2, False)
    assert response.degraded


async def test_a_license_is_loaded_when_it_is_asked_for(sidecar: FakeSidecar) -> None:
    await sidecar.sync.follow_second_route()
    assert await reason(sidecar) == "OK"
    assert await reason(sidecar, "nobody") == "NO_LICENSE"
    assert route(sidecar).asked[1:] == [((1, 2), [], ["acme"]), ((1, 2), ["acme"], ["nobody"])]
    assert await reason(sidecar) == "OK"
    assert len(route(sidecar).asked) == 3


async def test_what_is_changed_meanwhile_takes_force_with_the_next_round(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.sync.follow_second_route()
    assert await reason(sidecar) == "OK"
    world.push(catalog(NO))
    await sidecar.sync.follow_second_route()
    assert await reason(sidecar) == "POLICY_DENIED"
    world.license("acme", "free")
    world.push(catalog())
    await sidecar.sync.follow_second_route()
    assert await reason(sidecar) == "NOT_ENTITLED"


async def test_it_stays_fresh_for_as_long_as_the_control_plane_answers(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.sync.follow_second_route()
    await sidecar.check()
    world.clock.advance(301)
    assert (await sidecar.check()).stale
    await sidecar.sync.follow_second_route()
    assert not (await sidecar.check()).stale


async def test_redis_takes_over_where_the_second_route_left_off(sidecar: FakeSidecar, world: World) -> None:
    await sidecar.sync.follow_second_route()
    assert await reason(sidecar) == "OK"
    world.source.fail(None)
    sidecar.link.succeeded()
    await sidecar.synced(world.push(catalog(NO)))
    assert await reason(sidecar) == "POLICY_DENIED"


@pytest.mark.parametrize("what", ["head", "manifest", "license", "head of redis", "old", "torn", "newer"])
async def test_nothing_but_what_is_signed_whole_and_not_older_is_taken(
    sidecar: FakeSidecar, world: World, what: str
) -> None:
    await sidecar.sync.follow_second_route()
    assert await reason(sidecar) == "OK"
    forger = Signer(OTHER_KEY)
    before, second = world.publisher.revision, route(sidecar)
    world.push(catalog(NO))
    match what:
        case "head":
            second.changes = {"head": forger.head(9, "", world.clock.us)}
        case "manifest":
            second.changes = {"manifest": forger.bundle(catalog(NO), 9)[0]}
        case "license":
            second.changes = {"licenses": {"globex": world.source.licenses["acme"]}}
        case "head of redis":
            second.changes = {"head": Signer().head(3, "run1", world.clock.us)}
        case "old":
            second.changes = {"head": Signer().head(1, "", world.clock.us)}
        case "torn":
            second.changes = {"chunks": {}}
        case _:
            second.changes = {"head": Signer().head(before, "", world.clock.us)}
    with pytest.raises(LinkDown):
        await sidecar.sync.follow_second_route()
    assert sidecar.tally.documents_rejected == 1
    assert (await reason(sidecar), sidecar.engine.revision) == ("OK", before)


async def test_a_license_in_force_that_the_control_plane_does_not_know_is_of_a_lost_database(
    sidecar: FakeSidecar, world: World
) -> None:
    await sidecar.sync.follow_second_route()
    assert await reason(sidecar) == "OK"
    before = world.publisher.revision
    del world.source.licenses["acme"]
    world.push(catalog())
    with pytest.raises(LinkDown, match="does not have the license of acme"):
        await sidecar.sync.follow_second_route()
    assert (await reason(sidecar), sidecar.engine.revision) == ("OK", before)
    route(sidecar).publisher = FakePublisher(world.source, Signer(generation=2))
    route(sidecar).publisher.push(catalog())
    await sidecar.sync.follow_second_route()
    assert (await reason(sidecar), sidecar.engine.generation) == ("NO_LICENSE", 2)


async def test_a_restart_does_not_go_back_by_the_second_route(world: World) -> None:
    world.source.fail(GONE)
    second = FakeSecondRoute(world.publisher, world.clock)
    before = FakeSidecar(world, second=second)
    await before.sync.follow_second_route()
    await before.stop()
    second.changes = {"head": Signer().head(1, "", world.clock.us)}
    (world.directory / "snapshot").unlink(missing_ok=True)
    after = FakeSidecar(world, incarnation=2, second=second)
    with pytest.raises(LinkDown, match="acted on 2"):
        await after.sync.follow_second_route()
    assert not after.sync.ready.is_set()
    await after.stop()


async def test_usage_goes_the_second_way_and_is_acknowledged(sidecar: FakeSidecar) -> None:
    await sidecar.sync.follow_second_route()
    for _ in range(5):
        await sidecar.check()
    assert sidecar.shipping.unacked_events == 5
    acks = await sidecar.shipping.hand_over(route(sidecar).ship, to_redis=False)
    sidecar.shipping.take_acks(PulseReport(None, acks, ""))
    assert sidecar.shipping.unacked_events == 0


async def test_what_redis_took_and_nobody_acknowledged_goes_again_the_other_way(sidecar: FakeSidecar) -> None:
    await sidecar.sync.follow_second_route()
    for _ in range(5):
        await sidecar.check()
    await sidecar.shipping.hand_over(sidecar.sink.ship)
    sidecar.shipping.start_over()
    acks = await sidecar.shipping.hand_over(route(sidecar).ship, to_redis=False)
    sidecar.shipping.take_acks(PulseReport(None, acks, ""))
    assert sidecar.shipping.unacked_events == 0


@pytest.mark.parametrize(
    ("url", "insecure", "fine"),
    [
        ("https://licet.example", False, True),
        ("https://licet.example:8443/base", False, True),
        ("http://127.0.0.1:7430", False, True),
        ("http://localhost:7430", False, True),
        ("http://[::1]:7430", False, True),
        ("http://licet.example", False, False),
        ("http://10.0.0.1", False, False),
        ("http://licet.example", True, True),
        ("ftp://licet.example", True, False),
        ("licet.example", False, False),
        ("https://user:secret@licet.example", False, False),
        ("https://licet.example:port", False, False),
    ],
)
def test_plain_http_is_for_this_machine_unless_told(url: str, insecure: bool, fine: bool) -> None:
    assert (refusal_of(url, insecure=insecure) == "") is fine


def test_settings_of_the_second_route_are_read_and_refused_with_a_reason(tmp_path: Path) -> None:
    environment = {"LICET_PUBLIC_KEY": KEY.public_key, "LICET_CONTROL_PLANE_URL": "https://licet.example"}
    with pytest.raises(ConfigError, match="LICET_SIDECAR_KEY"):
        parse([], environment)
    with pytest.raises(ConfigError, match="sidecar-key in its state directory"):
        parse(["--sidecar-key-file", str(tmp_path / "missing")], environment)
    (tmp_path / "key").write_text("licet_secret\n")
    config = parse(["--sidecar-key-file", str(tmp_path / "key")], environment)
    assert (config.control_plane_url, config.sidecar_key) == ("https://licet.example", "licet_secret")
    assert "licet_secret" not in repr(config)
    environment["LICET_CONTROL_PLANE_URL"] = "http://licet.example"
    with pytest.raises(ConfigError, match="not encrypted"):
        parse(["--sidecar-key", "k"], environment)
    assert parse(["--sidecar-key", "k", "--control-plane-insecure"], environment).control_plane_url
    with pytest.raises(ConfigError, match="is not a share"):
        parse(["--redis-memory-max", "80"], {"LICET_PUBLIC_KEY": KEY.public_key})
    assert parse(["--redis-memory-max", "0.6"], {"LICET_PUBLIC_KEY": KEY.public_key}).redis_memory_max == 0.6
