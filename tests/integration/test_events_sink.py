"""CloudEvents over HTTP to a real server that fails, hangs, goes away and comes back: every event, in order, signed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from licet.wire.names import usage_shard
from licet.wire.usage import UsageBatch, decision_id
from licet_control_plane.config import ConfigError, ServerConfig
from licet_control_plane.core.cloud_events import CONTENT_TYPE, secret_of
from licet_control_plane.sink import sender
from licet_control_plane.store import ledger
from tests.support.control_plane import NAMES, Deployment, deployment, until
from tests.support.http_receiver import Received, Receiver
from tests.support.usage import batch
from tests.support.valkey import ValkeyProcess

SECRET: Final = bytes(range(32))
OTHER: Final = "b" * 32  # of another shard


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


@pytest.fixture
async def running(
    tmp_path: Path, valkey_process: ValkeyProcess, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Deployment]:
    monkeypatch.setattr(sender, "POLL_S", 0.01)
    monkeypatch.setattr(sender, "_BACKOFF_FACTOR", 0.02)
    async with deployment(tmp_path / "state", valkey_process.url, start=False) as made:
        made.settings = {"events_url": f"http://127.0.0.1:{receiver.port}/in", "events_secret": SECRET}
        await made.start()
        yield made


async def send(running: Deployment, *batches: UsageBatch) -> None:
    for one in batches:
        await running.redis.xadd(NAMES.usage(usage_shard(one.sidecar)), {"b": one.pack()})


async def taken(receiver: Receiver, count: int) -> list[dict[str, Any]]:
    async def there() -> bool:
        return len({(event["data"]["log_id"], event["id"]) for event in receiver.events()}) >= count

    await until(there)
    return receiver.events()


def seqs(events: list[dict[str, Any]], sidecar: str = "a" * 32) -> list[int]:
    return [event["data"]["seq"] for event in events if event["data"]["log_id"].startswith(sidecar)]


async def test_every_event_is_sent_once_in_order_and_signed(running: Deployment, receiver: Receiver) -> None:
    await send(running, batch(1, 700), batch(1, 20, sidecar=OTHER), batch(701, 1_200))
    events = await taken(receiver, 1_220)
    assert seqs(events) == list(range(1, 1_201))
    assert seqs(events, OTHER) == list(range(1, 21))
    for request in receiver.received:
        assert request.headers["content-type"] == CONTENT_TYPE
        assert len(request.events) <= sender.EVENTS_MAX
        text = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
        signature = base64.b64encode(hmac.digest(SECRET, text, hashlib.sha256)).decode()
        assert request.headers["webhook-signature"] == f"v1,{signature}"
    assert len({request.headers["webhook-id"] for request in receiver.received}) == len(receiver.received)


async def test_an_event_is_a_cloud_event_without_what_is_personal(running: Deployment, receiver: Receiver) -> None:
    await send(running, batch(1, 1, subject_id="ada@example.com", on_behalf_of="bob", resource_id="r-7"))
    (event,) = await taken(receiver, 1)
    assert {name: event[name] for name in event if name != "data"} == {
        "specversion": "1.0",
        "id": decision_id(b"prefix00", 1),
        "source": "urn:licet:" + "d" * 32,
        "type": "dev.licet.usage.check",
        "subject": "acme",
        "time": event["data"]["at"],
        "datacontenttype": "application/json",
    }
    assert (event["data"]["units"], event["data"]["subject"]) == ({"reports": 1}, {"type": "user"})
    text = json.dumps(event)
    for personal in ("ada@example.com", "bob", "r-7", "job-1", "region"):
        assert personal not in text


async def test_what_is_personal_is_sent_when_asked_for_and_not_once_it_was_erased(
    running: Deployment, receiver: Receiver
) -> None:
    await running.stop()
    running.settings["events_personal"] = True
    receiver.answer = lambda _request: 503
    await running.start()
    await send(running, batch(1, 1), batch(2, 2, subject_id="bob"))
    await until(lambda: failed(running, 1))
    assert running.plane.sender is not None
    assert b'"ada"' in receiver.received[-1].body
    await running.plane.database.write(ledger.erase, running.ledger_key, "acme", "user", "ada", now_us=1)
    tries = running.plane.sender.counts.failures
    await until(lambda: failed(running, tries + 2))  # the one under way was read before
    receiver.answer = lambda _request: 200
    ada, bob = await taken(receiver, 2)
    assert (ada["data"]["subject"]["id"], ada["data"]["context"]) == ("(erased)", {})
    assert (bob["data"]["subject"]["id"], bob["data"]["context"]) == ("bob", {"region": "eu"})
    assert receiver.taken[0].headers["webhook-id"] == receiver.received[0].headers["webhook-id"]


async def test_a_receiver_that_fails_and_hangs_up_gets_everything_in_the_end_and_holds_up_nobody(
    running: Deployment, receiver: Receiver
) -> None:
    answers = iter([500, None, 429, None, 503] * 2)
    receiver.answer = lambda _request: next(answers, 202)
    await send(running, *(batch(first, first + 9) for first in range(1, 200, 10)))
    await until(lambda: recorded(running, 200))
    events = await taken(receiver, 200)
    assert seqs(events) == list(range(1, 201))
    assert running.plane.sender is not None
    counts = running.plane.sender.counts
    assert counts.failures >= 10
    ids: dict[str, set[bytes]] = {}
    for request in receiver.received:
        ids.setdefault(request.headers["webhook-id"], set()).add(request.body)
    assert all(len(bodies) == 1 for bodies in ids.values())
    await until(lambda: caught_up(running))
    metrics = running.plane.metrics.render().decode()
    assert "licet_events_sent_total 200.0" in metrics
    assert "licet_events_lag_blocks 0.0" in metrics
    assert not counts.trouble


async def test_a_receiver_that_was_away_and_a_server_that_restarted_go_on_where_it_was(
    running: Deployment, receiver: Receiver
) -> None:
    await send(running, batch(1, 100))
    await taken(receiver, 100)
    await until(lambda: caught_up(running))
    port, before = receiver.port, receiver.events()
    receiver.stop()
    await send(running, batch(101, 200), batch(1, 5, sidecar=OTHER))
    await until(lambda: failed(running, 3))
    await until(lambda: recorded(running, 205))
    assert running.plane.sender is not None
    assert sum(running.plane.sender.counts.lag_blocks.values()) >= 1
    await running.stop()
    again = Receiver(port)
    try:
        await running.start()
        events = await taken(again, 105)
        assert seqs(before) + seqs(events) == list(range(1, 201))
        assert seqs(events, OTHER) == [1, 2, 3, 4, 5]
    finally:
        again.stop()


async def test_a_receiver_that_does_not_answer_in_time_gets_it_again(
    running: Deployment, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.stop()
    monkeypatch.setattr(sender, "REQUEST_S_MAX", 0.2)
    answered = threading.Event()

    def slow(_request: Received) -> int:
        if not answered.is_set():
            answered.wait(10)
            return 500
        return 200

    receiver.answer = slow
    await running.start()
    await send(running, batch(1, 3))
    await until(lambda: failed(running, 2))
    answered.set()
    assert seqs(await taken(receiver, 3)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"events_url": "ftp://x"}, "begins with https"),
        ({"events_url": "https://x"}, "LICET_EVENTS_SECRET_FILE"),
        ({"events_url": "https://x", "events_secret_file": "{path}"}, "24 are the least"),
        ({"events_url": "https://x", "events_secret_file": "{path}.missing"}, "No such file"),
    ],
)
def test_a_server_says_what_is_wrong_with_its_settings(tmp_path: Path, settings: dict[str, str], says: str) -> None:
    path = tmp_path / "secret"
    path.write_text("short\n")
    given = {name: value.format(path=path) for name, value in settings.items()}
    with pytest.raises(ConfigError, match=says):
        ServerConfig.of({}, **given)


def test_secrets_are_read_as_standard_webhooks_write_them(tmp_path: Path) -> None:
    text = "whsec_" + base64.b64encode(SECRET).decode()
    assert secret_of(text + "\n") == SECRET
    assert secret_of("a secret of 24 bytes or more") == b"a secret of 24 bytes or more"
    with pytest.raises(ValueError, match="base64"):
        secret_of("whsec_!")
    path = tmp_path / "secret"
    path.write_text(text)
    config = ServerConfig.of({"LICET_EVENTS_PERSONAL": "true"}, events_url="https://x/y", events_secret_file=path)
    assert (config.events_secret, config.events_personal) == (SECRET, True)
    assert text not in repr(config)
    assert repr(SECRET) not in repr(config)


async def failed(running: Deployment, times: int) -> bool:
    assert running.plane.sender is not None
    return running.plane.sender.counts.failures >= times


async def recorded(running: Deployment, count: int) -> bool:
    await asyncio.sleep(0)
    return running.plane.drain.events >= count


async def caught_up(running: Deployment) -> bool:
    assert running.plane.sender is not None
    return not any(running.plane.sender.counts.lag_blocks.values())
