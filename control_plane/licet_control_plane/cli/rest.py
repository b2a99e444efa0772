"""The REST API as the commands use it: JSON in, JSON out, and every failure a ``CliError`` with what to do."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx

from licet_control_plane.cli.context import Target
from licet_control_plane.cli.failure import EXIT_NO, EXIT_UNREACHABLE, EXIT_USAGE, CliError

REQUEST_S_MAX: Final = 30.0
"""A push of thousands of documents is validated while we wait; everything else answers in milliseconds."""

ROLLOUT_POLL_S: Final = 0.1
"""A change reaches sidecars in under 500 ms, so this is what `--wait` adds to it at most."""


def _tls_for(server: str) -> ssl.SSLContext | bool:
    """How to verify it. Plain HTTP gets a context that trusts nobody: reading all certificates takes 50 ms."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if server.startswith("http://") else True


class Problem(CliError):
    """The server refused. ``status`` is the HTTP status; ``errors`` lists faults of documents, if that is why."""

    def __init__(self, message: str, *, fix: str, status: int, errors: list[dict[str, Any]]) -> None:
        super().__init__(message, fix=fix, exit_code=EXIT_USAGE if status == httpx.codes.BAD_REQUEST else EXIT_NO)
        self.status = status
        self.errors = errors


class Answer(dict[str, Any]):
    """A JSON object of an answer. That it lacks a field is said to the person at the keyboard, and is no traceback:
    an older server does not know what this command line asks for. What has a default is read with ``get``."""

    def __missing__(self, field: str) -> Any:
        """Say what to do.

        Raises:
            CliError: always.
        """
        raise CliError(
            f"the server's answer has no {field!r}: it is older than this command line, or newer",
            fix="use a command line of the server's version; `licet --version` and the server's log say them",
        )


class ControlPlane:
    """One connection to the REST API."""

    def __init__(self, target: Target) -> None:
        self.target = target
        try:
            loopback = urlsplit(target.server).hostname in ("127.0.0.1", "localhost", "::1")
            self._http = httpx.Client(
                base_url=target.server,
                headers={"Authorization": f"Bearer {target.api_key}"},
                timeout=REQUEST_S_MAX,
                verify=_tls_for(target.server),
                trust_env=not loopback,  # a proxy for the outside world is never on the way to this machine
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise CliError(
                f"{target.server!r} is not the address of a server: {error}",
                fix="give a URL, such as http://127.0.0.1:7430",
                exit_code=EXIT_USAGE,
            ) from error

    def get(self, path: str, **query: Any) -> Any:
        """GET; parameters that are ``None`` are left out.

        Raises:
            CliError: unreachable.
            Problem: refused.
        """
        return self._send("GET", path, params={name: value for name, value in query.items() if value is not None})

    def post(self, path: str, body: Mapping[str, Any], *, once: str = "") -> Any:
        """POST a JSON object. ``once``: a key under which it is done once, however often sent. Raises as ``get``."""
        return self._send("POST", path, json=body, headers={"Idempotency-Key": once} if once else None)

    def post_lines(self, path: str, body: Mapping[str, Any]) -> Iterator[str]:
        """POST a JSON object; the lines of the answer as they come. Raises as ``get``."""
        with self._reaching(), self._http.stream("POST", path, json=body) as response:
            if not response.is_success:
                response.read()
                raise _problem(response, self.target.server)
            for line in response.iter_lines():
                if line:
                    yield line

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        """PATCH with a JSON object. Raises as ``get``."""
        return self._send("PATCH", path, json=body)

    def put(self, path: str, body: Mapping[str, Any]) -> Any:
        """PUT a JSON object. Raises as ``get``."""
        return self._send("PUT", path, json=body)

    def delete(self, path: str) -> Any:
        """DELETE. Raises as ``get``."""
        return self._send("DELETE", path)

    @contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        """GET a body of any length, in pieces. Raises as ``get``, also while it arrives."""
        with self._reaching(), self._http.stream("GET", path) as response:
            if not response.is_success:
                response.read()
                raise _problem(response, self.target.server)
            yield response.iter_raw()

    def wait_for_rollout(self, revision: int, *, timeout_s: float) -> dict[str, Any]:
        """Wait until every sidecar that was heard of lately confirms ``revision``; returns the last rollout state.

        The caller looks at its ``done``: it is false when ``timeout_s`` passed first. Sidecars that have not confirmed
        are named by their ``address`` too.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            rollout: dict[str, Any] = self.get(f"/v1/revisions/{revision}/rollout")
            if rollout["done"] or time.monotonic() >= deadline:
                late = [*rollout["waiting"], *rollout["silent"]]
                if late:
                    known = {item["sidecar"]: item["address"] for item in self.get("/v1/sidecars")["items"]}
                    for sidecar in late:
                        sidecar["address"] = known.get(sidecar["sidecar"], "")
                return rollout
            time.sleep(ROLLOUT_POLL_S)

    def _send(self, method: str, path: str, **arguments: Any) -> Any:
        with self._reaching():
            response = self._http.request(method, path, **arguments)
        if response.is_success:
            return response.json(object_hook=Answer)
        raise _problem(response, self.target.server)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns what goes wrong on the way into errors for the person at the keyboard."""
        try:
            yield
        except httpx.UnsupportedProtocol as error:
            raise CliError(
                f"{self.target.server!r} is not the address of a server.",
                fix="give a URL, such as http://127.0.0.1:7430",
                exit_code=EXIT_USAGE,
            ) from error
        except httpx.TimeoutException as error:
            raise CliError(
                f"the control plane at {self.target.server} did not answer within {REQUEST_S_MAX:g} s.",
                fix="look at its log; `licet status` shows whether its database and Redis are well",
                exit_code=EXIT_UNREACHABLE,
            ) from error
        except httpx.TransportError as error:
            raise CliError(
                f"cannot reach the control plane at {self.target.server}: {error}",
                fix="start it with `licet dev` or `licet server`, or name it with --server or LICET_SERVER",
                exit_code=EXIT_UNREACHABLE,
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()


def _problem(response: httpx.Response, server: str) -> Problem:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {"detail": response.text.strip()[:200] or response.reason_phrase}
    title, detail, fix = (str(body.get(part) or "") for part in ("title", "detail", "fix"))
    if response.status_code == httpx.codes.UNAUTHORIZED and not fix:
        fix = "set LICET_API_KEY to a key of this server; it writes the first one to admin-key in its state directory"
    message = (detail or title or f"HTTP {response.status_code}").rstrip(".")  # a title is only the name of the status
    errors = body.get("errors")
    return Problem(
        f"{message} ({server} answered {response.status_code})",
        fix=fix,
        status=response.status_code,
        errors=[entry for entry in errors if isinstance(entry, dict)] if isinstance(errors, list) else [],
    )
