"""What a ``SecondRoute`` promises, held to by the fake and by HTTP, plain and with TLS, to a real control plane."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from licet.domain.catalog import License
from licet.wire.documents import ACK, HEAD, HEAD_KEY, Head, Manifest, Snapshot
from licet.wire.signing import Verifier
from licet_control_plane.api.app import make_app
from licet_control_plane.server import listen, serve
from licet_control_plane.store import access
from licet_sidecar.adapters import https_route
from licet_sidecar.adapters.https_route import HttpsRoute
from licet_sidecar.ports import LinkDown, LinkRefused, SecondRoute
from tests.support.control_plane import catalog, deployment
from tests.support.fake_clock import FakeClock
from tests.support.fake_second_route import FakeSecondRoute
from tests.support.fake_state_source import FakePublisher, FakeStateSource
from tests.support.published import KEY
from tests.support.usage import batch
from tests.support.valkey import free_port

LOG = f"{'a' * 32}:1"
SIDECAR_KEY = "licet_sidecar"


class Plane:
    """A control plane with a bundle and a license for acme, and the route to it."""

    def __init__(self, route: SecondRoute, verifier: Verifier, trouble: Any) -> None:
        self.route = route
        self.verifier = verifier
        self.break_it = trouble


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[int, Any, Any]]:
    """A control plane over HTTP, which cannot reach its Redis: port, deployment, and what ends it."""
    async with deployment(directory, f"redis://127.0.0.1:{free_port()}/0") as running:
        await running.push()
        await running.license("acme")
        database = running.plane.database
        await database.write(access.add_key, name="pods", role=access.SIDECAR, key=SIDECAR_KEY, now_us=1)
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(make_app(running.plane), listener, stop))

        async def end() -> None:
            stop.set()
            await serving

        try:
            yield port, running, end
        finally:
            await end()


@pytest.fixture(params=["fake", "http"])
async def plane(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Plane]:
    if request.param == "fake":
        publisher = FakePublisher(FakeStateSource())
        publisher.push(catalog())
        publisher.license(License("acme", "pro"))
        fake = FakeSecondRoute(publisher, FakeClock())

        async def break_fake() -> None:
            fake.trouble = LinkDown("gone")

        yield Plane(fake, Verifier([KEY.public_key]), break_fake)
        return
    async with served(tmp_path / "state") as (port, running, end):
        yield Plane(HttpsRoute(f"http://127.0.0.1:{port}", SIDECAR_KEY), running.verifier, end)


async def test_a_snapshot_has_what_was_asked_for_and_is_signed(plane: Plane) -> None:
    found = Snapshot.unpack(await plane.route.snapshot((0, 0), [], ["acme", "nobody"]))
    head = plane.verifier.verify(found.head, kind=HEAD, key=HEAD_KEY)
    assert (head.revision, Head.from_payload(head.payload).run_id) == (2, "")
    assert found.manifest is not None
    manifest = plane.verifier.verify(found.manifest, kind="bundle", key="bundle")
    assert set(Manifest.from_payload(manifest.payload).chunks) <= set(found.chunks)
    assert (list(found.licenses), found.absent) == (["acme"], ("nobody",))
    again = Snapshot.unpack(await plane.route.snapshot((head.generation, 2), ["acme"], []))
    assert (again.manifest, again.licenses, again.absent) == (None, {}, ())


async def test_batches_are_acknowledged_with_a_signature_and_may_come_again(plane: Plane) -> None:
    for _ in range(2):
        acks = await plane.route.ship([batch(1, 5).pack(), batch(6, 7).pack()])
        assert plane.verifier.verify(acks[LOG], kind=ACK, key=LOG).revision == 7
    assert await plane.route.ship([]) == {}


async def test_a_broken_route_is_told(plane: Plane) -> None:
    await plane.break_it()
    with pytest.raises(LinkDown):
        await plane.route.snapshot((0, 0), [], [])
    with pytest.raises(LinkDown):
        await plane.route.ship([batch(1, 5).pack()])


async def test_a_wrong_key_is_told_with_what_to_do(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (port, _, _):
        with pytest.raises(LinkRefused, match="401"):
            await HttpsRoute(f"http://127.0.0.1:{port}", "licet_wrong").snapshot((0, 0), [], [])


async def test_after_a_failure_nobody_tries_for_a_moment() -> None:
    calls = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        head = await reader.readuntil(b"\r\n\r\n")  # all of it: a request that nobody reads ends in a broken pipe
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        writer.write(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    route = HttpsRoute(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "k")
    for _ in range(10):
        with pytest.raises(LinkDown, match="503"):
            await route.snapshot((0, 0), [], [])
    assert calls == 1
    server.close()


# TLS


def certificate(directory: Path, name: str) -> Path:
    """A certificate of its own authority for 127.0.0.1, with its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / f"{name}.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


async def test_a_certificate_of_a_known_authority_is_accepted_and_no_other(tmp_path: Path) -> None:
    mine, other = certificate(tmp_path, "mine"), certificate(tmp_path, "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(mine)
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\n{"acks": {}}')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/base"
    assert await HttpsRoute(url, "secret", ca_file=str(mine)).ship([b"one"]) == {}
    assert seen[0].startswith(b"POST /base/v1/usage/batches HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in seen[0]
    for ca_file in (str(other), ""):
        with pytest.raises(LinkDown, match=r"(?i)certificate"):
            await HttpsRoute(url, "secret", ca_file=ca_file).ship([b"one"])
    assert len(seen) == 1
    with pytest.raises(LinkRefused, match="ca-file"):
        HttpsRoute(url, "secret", ca_file=str(tmp_path / "missing.pem"))
    server.close()


async def test_an_answer_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https_route, "MESSAGE_BYTES_MAX", 1_000)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 5_000)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    with pytest.raises(LinkDown, match="larger than is accepted"):
        await HttpsRoute(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "k").snapshot((0, 0), [], [])
    server.close()
