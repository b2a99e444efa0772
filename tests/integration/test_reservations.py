"""Reservations with the SDK, a real sidecar process and a real Redis: both clients, kills, and what Redis is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import licet
from licet.domain.catalog import Action, Entitlement, OnExpiry, Plan, ReservationTerms
from tests.integration.test_sidecar_process import Sidecar
from tests.support.command_line import CommandLine, Ended, licet_command
from tests.support.fleet import wait_until
from tests.support.published import catalog, limit
from tests.support.redis_publisher import RedisPublisher
from tests.support.valkey import ValkeyProcess

__all__ = ["licet_command"]

AMOUNT = 100
CATALOG = catalog(
    Action("report.export", {"": "reports"}),
    Action("paid-late", {"": "reports"}, reservation=ReservationTerms(1, OnExpiry.COMMIT)),
    Plan("pro", {"reports": Entitlement(limits=(limit(AMOUNT),))}),
)


@pytest.fixture
def publisher(valkey_process: ValkeyProcess) -> Iterator[RedisPublisher]:
    made = RedisPublisher(valkey_process.url)
    made.push(CATALOG)
    made.license("acme")
    yield made
    made.close()


@pytest.fixture
def sidecar(tmp_path: Path, publisher: RedisPublisher, valkey_process: ValkeyProcess) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path, valkey_process.url).start()
    yield made
    made.program.kill()


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[licet.Client]:
    with licet.Client(sidecar.address, timeout=5) as made:
        yield made


def registered(publisher: RedisPublisher) -> tuple[int, int]:
    """Units used and reserved of the month, as Redis counts them."""
    registers = publisher.registers("acme").values()
    return sum(used for _, used, _ in registers), sum(reserved for _, _, reserved in registers)


def test_a_block_commits_what_it_used(client: licet.Client) -> None:
    with client.reserve("acme", "report.export", quantity=60) as held:
        assert held
        assert held.expires_at is not None
        settlement = held.commit(quantity=20)
    assert settlement
    assert (settlement.state, settlement.committed) == (licet.ReservationState.COMMITTED, {"reports": 20})
    assert settlement.decision is not None
    assert settlement.decision.quotas[0].remaining == 80
    assert held.commit() == settlement


def test_a_block_that_ends_commits_what_was_reserved_and_one_that_raises_cancels(client: licet.Client) -> None:
    with client.reserve("acme", "report.export", quantity=60):
        pass
    with pytest.raises(RuntimeError, match="boom"), client.reserve("acme", "report.export", quantity=40):
        raise RuntimeError("boom")
    assert client.check("acme", "report.export", quantity=40)
    assert not client.check("acme", "report.export", quantity=1)


def test_a_denied_block_runs_and_settles_nothing(client: licet.Client) -> None:
    with client.reserve("acme", "report.export", quantity=AMOUNT + 1) as held:
        assert not held
        assert held.decision.reason is licet.Reason.QUOTA_EXHAUSTED
    assert held.commit().state is licet.ReservationState.UNKNOWN


def test_what_exceeds_the_limit_is_unfunded(client: licet.Client) -> None:
    held = client.reserve("acme", "report.export", quantity=60)
    settlement = held.commit(quantity=101)
    assert not settlement
    assert (settlement.committed, settlement.unfunded) == ({"reports": 60}, {"reports": 41})


def test_settling_by_id_and_extending(client: licet.Client) -> None:
    held = client.reserve("acme", "report.export", quantity=60, expires_after=30)
    assert held.extend(600) is licet.ReservationState.HELD
    assert client.extend_reservation("acme", held.id).expires_at is not None
    assert client.cancel_reservation("acme", held.id) is licet.ReservationState.CANCELED
    assert client.commit_reservation("acme", held.id).decision is None
    with pytest.raises(licet.InvalidRequest) as caught:
        client.commit_reservation("acme", "nonsense")
    assert caught.value.field == "reservation_id"
    with pytest.raises(licet.InvalidRequest):
        client.reserve("acme", "report.export", expires_after=0.1)


def test_a_fallback_holds_nothing(sidecar: Sidecar) -> None:
    with (
        licet.Client("127.0.0.1:1", fallback="allow") as away,
        away.reserve("acme", "report.export", quantity=5) as held,
    ):
        assert held
        assert (held.id, held.decision.fallback) == ("", True)


def test_the_asynchronous_client_does_the_same(sidecar: Sidecar) -> None:
    async def work() -> None:
        async with licet.AsyncClient(sidecar.address, timeout=5) as client:
            async with client.reserve("acme", "report.export", quantity=60) as held:
                assert (await held.commit(quantity=10)).committed == {"reports": 10}
            with pytest.raises(RuntimeError):
                async with client.reserve("acme", "report.export", quantity=50):
                    raise RuntimeError
            held = await client.reserve("acme", "report.export", quantity=50)
            assert await held.extend(60) is licet.ReservationState.HELD
            assert await held.cancel() is licet.ReservationState.CANCELED
            async with client.reserve("acme", "report.export", quantity=50):
                pass
            assert await client.check("acme", "report.export", quantity=40)
            assert not await client.check("acme", "report.export")

    asyncio.run(work())


def test_a_kill_between_reserving_and_committing_loses_nothing(
    sidecar: Sidecar, client: licet.Client, publisher: RedisPublisher
) -> None:
    told = client.reserve("acme", "report.export", quantity=40)
    wait_until("Redis counts it", lambda: registered(publisher) == (0, 40))
    untold = client.reserve("acme", "report.export", quantity=40)
    sidecar.program.kill()
    sidecar.start()
    assert client.check("acme", "report.export", quantity=20)
    assert not client.check("acme", "report.export", quantity=1)
    assert told.commit(quantity=30).committed == {"reports": 30}
    assert untold.commit().committed == {"reports": 40}
    wait_until("Redis counts it", lambda: registered(publisher) == (90, 0))
    sidecar.program.kill()
    sidecar.start()
    assert told.commit(quantity=30).committed == {"reports": 30}
    assert client.check("acme", "report.export", quantity=10)
    assert not client.check("acme", "report.export", quantity=1)


def test_it_expires_by_itself_also_to_a_commit(client: licet.Client, publisher: RedisPublisher) -> None:
    canceled = client.reserve("acme", "report.export", quantity=50, expires_after=1)
    paid = client.reserve("acme", "paid-late", quantity=30)
    wait_until("both expired", lambda: registered(publisher) == (30, 0))
    assert canceled.commit().state is licet.ReservationState.EXPIRED
    assert paid.commit().committed == {"reports": 30}


def test_the_command_line_makes_and_settles_them(sidecar: Sidecar, licet_command: CommandLine) -> None:
    def run(*arguments: object) -> Ended:
        return licet_command("reservation", *arguments, "--sidecar", sidecar.address, "--json")

    made = run("make", "acme", "report.export", "--quantity", 60, "--expires-after", "30s").json
    assert made["decision"]["effect"] == "APPROVED"
    assert run("make", "acme", "report.export", "--quantity", 60).code == 1
    assert run("extend", "acme", made["reservation_id"], "--expires-after", "10m").json["state"] == "HELD"
    beyond = run("commit", "acme", made["reservation_id"], "--quantity", 101)
    assert (beyond.code, beyond.json["unfunded"]) == (1, {"reports": 41})
    late = run("cancel", "acme", made["reservation_id"])
    assert (late.code, late.json["state"]) == (1, "COMMITTED")
    assert "committed before" in late.err
    nowhere = run("commit", "acme", "0" * 32)
    assert (nowhere.code, nowhere.json["state"]) == (1, "UNKNOWN")
    assert "Settle it with the sidecar that made it" in nowhere.err
    other = run("make", "acme", "report.export", "--quantity", 40).json
    assert run("cancel", "acme", other["reservation_id"]).json["state"] == "CANCELED"
    assert run("commit", "acme", "nonsense").code == 2
    text = licet_command("reservation", "make", "acme", "report.export", "--sidecar", sidecar.address).out
    assert "held " in text


def test_open_reservations_outlive_an_orderly_stop(sidecar: Sidecar, client: licet.Client) -> None:
    held = client.reserve("acme", "report.export", quantity=60)
    assert sidecar.stop() == 0
    assert sidecar.log_lines("stopping with open reservations")
    sidecar.start()
    assert held.commit().committed == {"reports": 60}
    assert "licet_reservations_open 0.0" in sidecar.page("/metrics")[1]
    assert 'licet_reservations_settled_total{outcome="committed"} 1.0' in sidecar.page("/metrics")[1]
