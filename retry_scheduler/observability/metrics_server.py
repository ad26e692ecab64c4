"""Serves GET /metrics from threads of its own, so that a busy event loop can be seen from outside.

Whoever connects must ask within REQUEST_WITHIN_S, in HEAD_MAX_BYTES, and take the answer as quickly.
At most MAX_CONNECTIONS are open: beyond, the one that has kept us waiting longest makes room, or if
none does the new one is refused.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from io import BytesIO
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, MetricsHandler

from retry_scheduler.errors import PortTaken
from retry_scheduler.observability import events

log = structlog.get_logger()

REQUEST_WITHIN_S = 5.0

# Each is a thread. Prometheus uses one, two for high availability, a person with curl another.
MAX_CONNECTIONS = 20

# The thread of the one that makes room has to wake up and leave.
MAKING_ROOM_TAKES_S = 0.5


# Prometheus asks in 500 bytes.
HEAD_MAX_BYTES = 16 * 1024

PATH = "/metrics"

NEXT_TRY_TO_ACCEPT_S = 0.2


class MetricsServer(ThreadingMixIn, TCPServer):
    """Stop it with `shutdown` and `server_close`. Not an HTTPServer, which asks the DNS for its own name."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        """Listen. Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        # Since when we wait for connections to ask, or to take their answer; oldest first.
        self._waiting_since_s: dict[Any, float] = {}
        super().__init__((host, port), _Handler.factory(registry))

    def get_request(self) -> Any:
        """Accept a connection. Raises OSError, after a pause."""
        try:
            return super().get_request()
        except OSError:
            # Without a free file descriptor the caller stays in line, and asking again at once is a hot loop.
            time.sleep(NEXT_TRY_TO_ACCEPT_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a new connection, or refuse it."""
        if not self._free.acquire(blocking=False):
            self._cut_oldest(1)
            if not self._free.acquire(timeout=MAKING_ROOM_TAKES_S):
                self.shutdown_request(request)
                return
        self.wait_for(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self.wait_no_more(request)
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection, in its own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.wait_no_more(request)
            self._free.release()

    def wait_for(self, request: Any) -> None:
        """Note that from now on it is a connection's turn to do something."""
        with self._lock:
            self._waiting_since_s.pop(request, None)  # so that it comes last
            self._waiting_since_s[request] = time.monotonic()

    def wait_no_more(self, request: Any) -> bool:
        """Note that a connection has done it. Returns False if it was cut before."""
        with self._lock:
            return self._waiting_since_s.pop(request, None) is not None

    def service_actions(self) -> None:
        """Cut who has kept us waiting for too long; called twice a second."""
        now_s = time.monotonic()
        with self._lock:
            late = [
                since_s for since_s in self._waiting_since_s.values() if now_s - since_s > REQUEST_WITHIN_S
            ]
        self._cut_oldest(len(late))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong, unless it is only that the other side has left."""
        if not isinstance(sys.exception(), OSError):
            log.exception(events.PAGE_FAILED)

    def _cut_oldest(self, count: int) -> None:
        with self._lock:
            for request in list(self._waiting_since_s)[:count]:
                del self._waiting_since_s[request]
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread's reading or writing ends, and it closes


class _Handler(MetricsHandler):
    """Answers one request. Errors are told by their code alone, without anything of what was asked."""

    timeout = REQUEST_WITHIN_S  # for each read, and for writing the whole page
    default_request_version = "HTTP/1.0"  # a request that names none is refused, in a form that can be read
    error_message_format = "%(message)s\n"
    error_content_type = "text/plain; charset=utf-8"
    server: MetricsServer

    def setup(self) -> None:
        """Read what is asked, which the parser would do line by line without a bound on all of them."""
        super().setup()
        self.rfile.close()
        self._head = self._read_head()
        self.rfile = BytesIO(self._head)

    def parse_request(self) -> bool:
        """Return whether there is a question to answer. A connection that was cut meanwhile has none."""
        if not super().parse_request():
            return False
        refusal = self._refusal()
        if refusal is not None:
            self.send_error(refusal)
        return refusal is None and self.server.wait_no_more(self.connection)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error, in the words of the standard."""
        super().send_error(code)

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin to answer: now the other side has to take it."""
        self.server.wait_for(self.connection)
        super().send_response(code, message)
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")

    def version_string(self) -> str:
        """Tell nobody which versions are running."""
        return "retry-scheduler"

    def _read_head(self) -> bytes:
        head = b""
        while b"\n\r\n" not in head and b"\n\n" not in head and len(head) <= HEAD_MAX_BYTES:
            piece = self.connection.recv(4096)
            if not piece:
                break
            head += piece
        return head

    def _refusal(self) -> HTTPStatus | None:
        if len(self._head) > HEAD_MAX_BYTES:
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        if len(self.requestline.split()) < 3:
            return HTTPStatus.BAD_REQUEST
        if self.path.partition("?")[0] != PATH:
            return HTTPStatus.NOT_FOUND
        return None if self.command == "GET" else HTTPStatus.METHOD_NOT_ALLOWED


def serve_metrics(
    registry: CollectorRegistry, *, host: str, port: int, on_death: Callable[[Exception], object]
) -> MetricsServer:
    """Return the server, serving from a thread. Raises PortTaken.

    on_death: called from that thread if it ends by an error.
    """
    try:
        server = MetricsServer(registry, host=host, port=port)
    except OSError as error:
        raise PortTaken("METRICS_PORT", f"{host}:{port}", error) from error

    def serve() -> None:
        try:
            server.serve_forever()
        except Exception as error:
            on_death(error)

    threading.Thread(target=serve, name="metrics", daemon=True).start()
    return server
