"""Serves GET /metrics from threads of its own, so that a busy event loop can be seen from outside.

Whoever connects must ask within REQUEST_WITHIN_S, and at most MAX_CONNECTIONS are open: beyond, the
one that has been silent longest makes room, or if all are being answered the new one is refused.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, MetricsHandler

from retry_scheduler.errors import PortTaken

log = structlog.get_logger()

REQUEST_WITHIN_S = 5.0

# Each is a thread. Prometheus uses one, two for high availability, a person with curl another.
MAX_CONNECTIONS = 20

# The silent one's thread has to wake up and leave.
MAKING_ROOM_TAKES_S = 0.5

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
        self._silent_since_s: dict[Any, float] = {}  # connections that have not asked yet, oldest first
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
            self._cut_oldest_silent(1)
            if not self._free.acquire(timeout=MAKING_ROOM_TAKES_S):
                self.shutdown_request(request)
                return
        with self._lock:
            self._silent_since_s[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self.has_asked(request)
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection, in its own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.has_asked(request)
            self._free.release()

    def has_asked(self, request: Any) -> bool:
        """Note that a connection is silent no longer. Returns False if it was cut before."""
        with self._lock:
            return self._silent_since_s.pop(request, None) is not None

    def service_actions(self) -> None:
        """Cut who has been silent for too long; called twice a second."""
        now_s = time.monotonic()
        with self._lock:
            late = [
                since_s for since_s in self._silent_since_s.values() if now_s - since_s > REQUEST_WITHIN_S
            ]
        self._cut_oldest_silent(len(late))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong, unless it is only that the other side has left."""
        if not isinstance(sys.exception(), OSError):
            log.exception("Failed to answer a reader of /metrics")

    def _cut_oldest_silent(self, count: int) -> None:
        with self._lock:
            for request in list(self._silent_since_s)[:count]:
                del self._silent_since_s[request]
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread reads the end of the stream, and closes


class _Handler(MetricsHandler):
    """Answers one request."""

    timeout = REQUEST_WITHIN_S  # for each read, and for writing the whole page
    server: MetricsServer

    def parse_request(self) -> bool:
        """Read the request. A connection that was cut meanwhile is not answered."""
        return super().parse_request() and self.server.has_asked(self.connection)


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
