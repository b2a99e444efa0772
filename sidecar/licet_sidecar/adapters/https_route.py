"""The second route: the control plane's REST API, for what Redis cannot carry while it cannot be reached.

``http.client`` in a thread: the probes' server has loaded it anyway, and these calls are few. One connection a call, no
repeats: who calls again, and when, is decided by the caller. TLS is verified; plain ``http://`` is for loopback.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import ssl
import time
from collections.abc import Collection, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from licet.wire.envelope import MESSAGE_BYTES_MAX
from licet.wire.usage import pack_batches
from licet_sidecar.ports import LinkDown, LinkRefused

TIMEOUT_S: Final = 4.0
"""Of each step of a call. Redis is away meanwhile, so that nothing better can be done; and the pulse must turn."""
CALLS_MAX: Final = 4
"""At once. Many cold tenants at once are a queue."""
QUIET_S: Final = 1.0
"""After a failure nobody tries for so long: checks of tenants that are not known must not pile up."""

_JSON: Final = "application/json"
_OCTETS: Final = "application/octet-stream"


class HttpsRoute:
    """A ``SecondRoute``."""

    def __init__(self, url: str, key: str, *, ca_file: str = "") -> None:
        """``url`` such as ``https://licet.example``, ``key`` an API key of the role ``sidecar``.

        Raises:
            LinkRefused: the file with authorities cannot be used.
        """
        parts = urlsplit(url)
        self._url = url
        self._host, self._port = parts.hostname or "", parts.port
        self._base = parts.path.rstrip("/")
        self._key = key
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca_file or None)
            except OSError as error:
                raise LinkRefused(f"--control-plane-ca-file {ca_file}: {error}") from error
        self._calls = asyncio.Semaphore(CALLS_MAX)
        self._quiet_until_s = 0.0
        self._trouble = ""

    async def snapshot(self, have: tuple[int, int], known: Collection[str], wanted: Collection[str]) -> bytes:
        """See ``SecondRoute``."""
        asked = {"generation": have[0], "revision": have[1], "known": list(known), "wanted": list(wanted)}
        return await self._post("/v1/sidecar/snapshot", json.dumps(asked).encode(), _JSON)

    async def ship(self, batches: Sequence[bytes]) -> Mapping[str, bytes]:
        """See ``SecondRoute``."""
        if not batches:
            return {}
        answer = await self._post("/v1/usage/batches", pack_batches(batches), _OCTETS)
        try:
            return {log: base64.b64decode(ack) for log, ack in json.loads(answer)["acks"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise LinkDown(f"{self._url} does not answer as a control plane does: {error!r}") from error

    async def _post(self, path: str, body: bytes, content_type: str) -> bytes:
        async with self._calls:
            if time.monotonic() < self._quiet_until_s:
                raise LinkDown(self._trouble)
            try:
                status, answer = await asyncio.to_thread(self._call, path, body, content_type)
            except (OSError, HTTPException) as error:
                raise self._failed(f"the control plane at {self._url} cannot be reached: {error}") from error
        if status == 200:
            return answer
        said = f"the control plane at {self._url} answers {status} to {path}: {_detail(answer)}"
        if status >= 500 or status == 429:
            raise self._failed(said)
        raise LinkRefused(said)

    def _failed(self, trouble: str) -> LinkDown:
        self._trouble = trouble
        self._quiet_until_s = time.monotonic() + QUIET_S
        return LinkDown(trouble)

    def _call(self, path: str, body: bytes, content_type: str) -> tuple[int, bytes]:
        connection: HTTPConnection
        if self._tls is not None:
            connection = HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self._tls)
        else:
            connection = HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": content_type}
            connection.request("POST", self._base + path, body, headers)
            response = connection.getresponse()
            answer = response.read(MESSAGE_BYTES_MAX + 1)
            if len(answer) > MESSAGE_BYTES_MAX:
                raise HTTPException("the answer is larger than is accepted")
            return response.status, answer
        finally:
            connection.close()


def refusal_of(url: str, *, insecure: bool) -> str:
    """What is wrong with a control plane's URL, empty when nothing is. ``insecure``: plain HTTP is wanted, anywhere."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"{url!r} is not a URL: {error}"
    if parts.scheme not in ("https", "http") or not host or parts.query or parts.fragment or parts.username:
        return f"{url!r} is not the URL of a control plane; give https://host[:port]"
    if parts.scheme == "http" and not insecure and not _is_loopback(host):
        return (
            f"{url!r} is not encrypted: who listens could read usage and the key. Give an https:// URL, or"
            " --control-plane-insecure when the network is trusted"
        )
    return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _detail(answer: bytes) -> str:
    try:
        problem = json.loads(answer)
        return f"{problem['detail']} {problem['fix']}"
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")
