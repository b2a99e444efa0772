"""``/healthz``, ``/readyz`` and ``/metrics``, on a thread of their own: a busy event loop still answers probes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final

from licet_sidecar.transport.grpc_edge import ListenError

Page = Callable[[], tuple[int, str, bytes]]
REQUEST_TIMEOUT_S: Final = 5.0


class HttpEdge:
    """Serves pages, each a function from nothing to (status, content type, body)."""

    def __init__(self, address: str, pages: dict[str, Page]) -> None:
        """Binds at once.

        Raises:
            ListenError: the address cannot be served.
        """
        host, _, port = address.rpartition(":")
        try:
            self._server = _Server((host.strip("[]") or "127.0.0.1", int(port)), _handler(pages))
        except (OSError, ValueError, OverflowError) as error:
            raise ListenError(
                f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}; stop what uses it, or choose"
                " another with --http-listen"
            ) from error
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stops, and frees the port."""
        if self._thread.is_alive():  # shutdown() waits for the end of a loop that may never have begun
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 16

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A prober that hangs up is no news; whatever else goes wrong shows as a failed probe."""


def _handler(pages: dict[str, Page]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout: ClassVar[float] = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                status, content_type, body = 404, "text/plain", f"no such page; there are {', '.join(pages)}\n".encode()
            else:
                status, content_type, body = page()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Probes are not worth a line each."""

    return Handler
