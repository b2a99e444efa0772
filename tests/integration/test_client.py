"""Both clients against a real gRPC server that answers by script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import licet
from licet.client import aio, blocking
from licet.v1 import approval_pb2 as pb
from tests.support.scripted_sidecar import Refusal, ScriptedSidecar, approved, denied

UNAVAILABLE = Refusal(grpc.StatusCode.UNAVAILABLE, "nothing has been synced yet")


@pytest.fixture
def sidecar() -> Iterator[ScriptedSidecar]:
    scripted = ScriptedSidecar().start()
    yield scripted
    scripted.stop()


class Synchronous:
    """Calls the asynchronous client as if it were the other one, so that both pass the same tests."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = licet.AsyncClient(*arguments, **named)

    def check(self, *arguments: Any, **named: Any) -> licet.Decision:
        return self._runner.run(self._client.check(*arguments, **named))

    def check_batch(self, *arguments: Any, **named: Any) -> list[licet.Decision]:
        return self._runner.run(self._client.check_batch(*arguments, **named))

    def check_stream(self, *arguments: Any, **named: Any) -> Iterator[licet.Decision]:
        stream = self._client.check_stream(*arguments, **named)

        async def following() -> licet.Decision | None:
            return await anext(stream, None)

        while (decision := self._runner.run(following())) is not None:
            yield decision

    def request_access(self, *arguments: Any, **named: Any) -> licet.AskedAccess:
        return self._runner.run(self._client.request_access(*arguments, **named))

    def get_access_request(self, *arguments: Any, **named: Any) -> licet.AccessRequest:
        return self._runner.run(self._client.get_access_request(*arguments, **named))

    def watch_access_request(self, *arguments: Any, **named: Any) -> list[licet.AccessRequest]:
        async def watched() -> list[licet.AccessRequest]:
            return [one async for one in self._client.watch_access_request(*arguments, **named)]

        return self._runner.run(watched())

    def wait_for_approval(self, *arguments: Any, **named: Any) -> licet.AccessRequest:
        return self._runner.run(self._client.wait_for_approval(*arguments, **named))

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[licet.Client, Synchronous], ids=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[Any]:
    opened: list[Any] = []

    def open_client(*arguments: Any, **named: Any) -> Any:
        opened.append(request.param(*arguments, **named))
        return opened[-1]

    yield open_client
    for client in opened:
        client.close()


def test_asks_and_gets_the_answer(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.scripted.append(denied(message="No units left."))
    decision = connect(sidecar.target).check("acme", "llm.generate", subject="ada", quantities={"input": 3})
    assert not decision
    assert decision.reason is licet.Reason.QUOTA_EXHAUSTED
    (request,) = sidecar.requests
    assert (request.tenant, request.action, request.subject.id) == ("acme", "llm.generate", "ada")


def test_sets_a_deadline_of_a_second_by_default(sidecar: ScriptedSidecar, connect: Any) -> None:
    client = connect(sidecar.target)
    client.check("acme", "a")
    client.check("acme", "a", timeout=5)
    assert 0 < sidecar.timeouts_s[0] <= 1.1
    assert 4 < sidecar.timeouts_s[1] <= 5.1


def test_speaks_over_a_unix_socket(tmp_path: Path, connect: Any) -> None:
    sidecar = ScriptedSidecar().start(f"unix:{tmp_path}/licet.sock")
    try:
        assert connect(sidecar.target).check("acme", "a")
    finally:
        sidecar.stop()


def test_takes_the_target_from_the_environment(
    sidecar: ScriptedSidecar, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LICET_SIDECAR", sidecar.target)
    assert connect().check("acme", "a")


def test_ignores_a_proxy_for_the_outside_world(
    sidecar: ScriptedSidecar, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    assert connect(sidecar.target).check("acme", "a")


def test_retries_with_the_same_idempotency_key(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.scripted.extend([UNAVAILABLE, UNAVAILABLE])
    assert connect(sidecar.target).check("acme", "a")
    assert sidecar.calls == 3
    assert len({request.idempotency_key for request in sidecar.requests}) == 1


def test_gives_up_within_the_deadline(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.scripted.extend([UNAVAILABLE] * 50)
    with pytest.raises(licet.SidecarUnavailable, match="nothing has been synced yet") as caught:
        connect(sidecar.target, timeout=0.5).check("acme", "a")
    assert 1 < sidecar.calls <= 4  # of the fifty it would have taken
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_does_not_repeat_a_malformed_request(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.scripted.append(Refusal(grpc.StatusCode.INVALID_ARGUMENT, "tenant: must not be empty"))
    with pytest.raises(licet.InvalidRequest) as caught:
        connect(sidecar.target, fallback="allow").check("", "a")
    assert caught.value.field == "tenant"
    assert sidecar.calls == 1


def test_says_that_a_message_is_too_large(sidecar: ScriptedSidecar, connect: Any) -> None:
    with pytest.raises(licet.MessageTooLarge):
        connect(sidecar.target).check("acme", "a", context={"blob": "x" * 5_000_000}, timeout=5)


def test_times_out(sidecar: ScriptedSidecar, connect: Any) -> None:
    def slow(request: Any) -> Any:
        time.sleep(0.4)
        return approved()

    sidecar.default = slow
    with pytest.raises(licet.Timeout):
        connect(sidecar.target, timeout=0.1).check("acme", "a")


@pytest.mark.parametrize(("fallback", "approved_"), [("allow", True), ("deny", False)])
def test_falls_back_when_nothing_listens(connect: Any, fallback: str, approved_: bool) -> None:
    decision = connect("127.0.0.1:1", fallback=fallback).check("acme", "a")
    assert decision.fallback
    assert decision.approved is approved_


def test_lets_a_call_choose_another_fallback(connect: Any) -> None:
    client = connect("127.0.0.1:1", fallback="allow")
    assert not client.check("acme", "a", fallback="deny")
    with pytest.raises(licet.SidecarUnavailable, match=r"127\.0\.0\.1:1"):
        client.check("acme", "a", fallback="raise")


def test_connects_again_when_the_sidecar_comes_back(tmp_path: Path, connect: Any) -> None:
    address = f"unix:{tmp_path}/licet.sock"
    sidecar = ScriptedSidecar().start(address)
    client = connect(address)
    assert not client.check("acme", "a").fallback
    sidecar.stop()
    assert client.check("acme", "a", fallback="deny").fallback
    sidecar = ScriptedSidecar().start(address)
    try:
        deadline = time.monotonic() + 5
        while client.check("acme", "a", fallback="deny").fallback:
            assert time.monotonic() < deadline
    finally:
        sidecar.stop()


def test_answers_a_batch_in_order(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.scripted.extend([approved(), denied(), approved()])
    checks = [licet.Check("acme", "a", quantity=n) for n in range(3)]
    decisions = connect(sidecar.target).check_batch(checks, semantics=licet.Semantics.PERMIT_ON_FIRST_PERMIT)
    assert [bool(decision) for decision in decisions] == [True, False, True]
    assert [request.quantity for request in sidecar.batches[0].checks] == [0, 1, 2]
    assert sidecar.batches[0].semantics == licet.Semantics.PERMIT_ON_FIRST_PERMIT


def test_falls_back_for_each_check_of_a_batch(connect: Any) -> None:
    client = connect("127.0.0.1:1", fallback=lambda check, error: check.tenant == "acme")
    decisions = client.check_batch([licet.Check("acme", "a"), licet.Check("globex", "a")])
    assert [bool(decision) for decision in decisions] == [True, False]


def test_streams_answers_in_order(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.default = lambda request: approved(rule=str(request.quantity))
    checks = (licet.Check("acme", "a", quantity=n) for n in range(200))
    decisions = list(connect(sidecar.target).check_stream(checks))
    assert [decision.rule for decision in decisions] == [str(n) for n in range(200)]


def test_stream_says_what_it_could_not_send(sidecar: ScriptedSidecar, connect: Any) -> None:
    checks = [licet.Check("acme", "a"), licet.Check("acme", "a", quantity=0.5)]
    with pytest.raises(licet.InvalidRequest) as caught:
        list(connect(sidecar.target).check_stream(checks))
    assert caught.value.field == "quantity"


def test_stream_raises_when_it_breaks(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.scripted.extend([approved(), UNAVAILABLE])
    stream = iter(connect(sidecar.target).check_stream([licet.Check("acme", "a")] * 3))
    assert next(stream)
    with pytest.raises(licet.SidecarUnavailable):
        next(stream)


async def test_streams_from_an_asynchronous_source(sidecar: ScriptedSidecar) -> None:
    async def source() -> AsyncIterator[licet.Check]:
        for n in range(20):
            await asyncio.sleep(0)
            yield licet.Check("acme", "a", quantity=n)

    async with licet.AsyncClient(sidecar.target) as client:
        decisions = [decision async for decision in client.check_stream(source())]
    assert len(decisions) == 20


async def test_canceled_check_cancels_the_call(sidecar: ScriptedSidecar) -> None:
    def slow(request: Any) -> Any:
        time.sleep(0.2)
        return approved()

    sidecar.default = slow
    async with licet.AsyncClient(sidecar.target, fallback="allow") as client:
        task = asyncio.create_task(client.check("acme", "a"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_may_be_closed_twice(sidecar: ScriptedSidecar) -> None:
    with licet.Client(sidecar.target) as client:
        assert client.check("acme", "a")
    client.close()


# Access requests

ID = "5f" * 16


def told(state: str, **fields: Any) -> pb.AccessRequest:
    return pb.AccessRequest(
        id=ID, tenant="acme", state=pb.AccessRequestState.Value(f"ACCESS_REQUEST_STATE_{state}"), **fields
    )


def test_asks_people_and_hands_out_their_request(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.scripted.append(pb.CheckResponse(effect=pb.EFFECT_PENDING, reason=12, access_request_id=ID))
    client = connect(sidecar.target)
    asked = client.request_access("acme", "report.export", subject="ana", quantity=50, justification="quarter end")
    assert asked.request is not None
    assert (asked.request.id, asked.request.state) == (ID, licet.AccessRequestState.PENDING)
    assert asked.decision.access_request_id == ID
    assert not asked.request
    (request,) = sidecar.asked
    assert (request.justification, request.check.quantity) == ("quarter end", 50)
    assert client.request_access("acme", "report.export").request is None  # it is approved already


def test_a_state_of_a_newer_sidecar_is_unknown(sidecar: ScriptedSidecar, connect: Any) -> None:
    assert connect(sidecar.target).get_access_request("acme", ID).state is licet.AccessRequestState.UNKNOWN


def test_watches_a_request_to_its_end(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.watches.append([told("PENDING"), told("PENDING", confirmed=True), told("DENIED", reason="no")])
    seen = list(connect(sidecar.target).watch_access_request("acme", ID, timeout=5))
    assert [(one.state.name, one.confirmed, one.reason) for one in seen] == [
        ("PENDING", False, ""), ("PENDING", True, ""), ("DENIED", False, "no"),
    ]  # fmt: skip
    assert seen[-1].is_final


def test_a_watch_that_breaks_says_so(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.watches.append([told("PENDING"), UNAVAILABLE])
    with pytest.raises(licet.SidecarUnavailable):
        list(connect(sidecar.target).watch_access_request("acme", ID, timeout=5))


def test_waits_for_an_approval_through_a_sidecar_that_stops(
    sidecar: ScriptedSidecar, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (blocking, aio):
        monkeypatch.setattr(module, "WATCH_PAUSE_S", 0.01)
    sidecar.watches.extend([[told("PENDING"), UNAVAILABLE], [told("PENDING")], [told("APPROVED", units=70)]])
    heard = connect(sidecar.target).wait_for_approval("acme", ID, timeout=10)
    assert (bool(heard), heard.units) == (True, 70)


def test_what_is_not_decided_in_time_is_still_pending(sidecar: ScriptedSidecar, connect: Any) -> None:
    sidecar.watches.append([told("PENDING", confirmed=True), UNAVAILABLE])
    heard = connect(sidecar.target).wait_for_approval("acme", ID, timeout=0.4)
    assert (heard.state, heard.confirmed) == (licet.AccessRequestState.PENDING, True)


def test_without_any_sidecar_nobody_can_say(connect: Any) -> None:
    with pytest.raises((licet.SidecarUnavailable, licet.Timeout)):
        connect("127.0.0.1:9").wait_for_approval("acme", ID, timeout=0.2)
