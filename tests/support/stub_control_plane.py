"""An HTTP server in this process that stands for the control plane: canned answers, and a record of requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    body: Any
    authorization: str


Answer = Callable[[Request], tuple[int, Any]]


class StubControlPlane:
    """``answers`` maps "METHOD /path" to a JSON value, or to a function of the request that gives status and value."""

    def __init__(self) -> None:
        self.answers: dict[str, Any | Answer] = {"GET /v1/status": {"ok": True}}
        self.requests: list[Request] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                url = urlsplit(self.path)
                length = int(self.headers.get("Content-Length") or 0)
                raw = self.rfile.read(length)
                request = Request(
                    self.command,
                    url.path,
                    dict(parse_qsl(url.query)),
                    json.loads(raw) if raw else None,
                    self.headers.get("Authorization", ""),
                )
                stub.requests.append(request)
                answer = stub.answers.get(f"{request.method} {request.path}")
                if answer is None:
                    status, value = 404, {"title": "Not found", "detail": request.path, "fix": "ask for something else"}
                elif callable(answer):
                    status, value = answer(request)
                else:
                    status, value = 200, answer
                payload = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/problem+json" if status >= 400 else "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = do_PATCH = do_DELETE = _handle  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
