"""GET /health and GET /ready: is the service well, and does it take work? Neither tells a secret.

    healthy   both servers answer, take our writes, and let us do our work
    ready     healthy, consuming, beating, not paused, and not about to stop

Every answer comes within two seconds, whatever hangs: each check has a shorter deadline. Whoever
connects must ask within REQUEST_WITHIN_S, in REQUEST_MAX_BYTES, and at most MAX_CONNECTIONS are open:
beyond, the one that has been idle longest makes room, or if all are being answered the new one is
refused.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from retry_scheduler.errors import PortTaken, Unavailable

CHECK_TIMEOUT_S = 1.5
ANSWER_WITHIN_S = 2.0

REQUEST_WITHIN_S = 5.0

# What may come between two answers. No page reads a body, and to read past one takes time from retries.
REQUEST_MAX_BYTES = 16 * 1024

# Far more than probes and people need. Each costs a file descriptor, of which there may be 1,024.
MAX_CONNECTIONS = 100

# A check raises Unavailable if its server is away. Its key is the server's name in the answer.
Checks = Mapping[str, Callable[[], Awaitable[None]]]


class HealthServer(uvicorn.Server):
    """Serves the pages inside the event loop that is running, and leaves signals to the service."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signals."""
        yield


class BoundedProtocol(H11Protocol):
    """One connection to the pages, cut unless it brings one whole request after another in time."""

    _impatience: asyncio.TimerHandle | None = None
    idle_since_s = 0.0
    _received_bytes = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request waits for its answer; half a request does not count."""
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        return cycle is None or cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or make room for it."""
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > MAX_CONNECTIONS:
            others: list[Any] = [other for other in self.connections if other is not self]
            idle = [other for other in others if other.is_idle]
            leaving = min(idle, key=lambda other: other.idle_since_s) if idle else self
            self.connections.discard(leaving)
            leaving.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take what has come, unless it is too much or the end has been decided."""
        if self.transport.is_closing():
            return
        self._received_bytes += len(data)
        if self._received_bytes > REQUEST_MAX_BYTES:
            self.send_400_response("The request is too large.")
        else:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. The request before it is not answered, unless its answer has begun."""
        cycle: Any = self.cycle
        if cycle is not None:
            cycle.disconnected = True  # otherwise it would try to answer, and its failure would be logged
        if cycle is not None and cycle.response_started:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._await_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._impatience is not None:
            self._impatience.cancel()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        # Bytes that arrive do not postpone the end, only an answer does: else one byte a second would do.
        if self._impatience is not None:
            self._impatience.cancel()
        self._received_bytes = 0
        self.idle_since_s = self.loop.time()
        self._impatience = self.loop.call_later(REQUEST_WITHIN_S, self._end_wait)

    def _end_wait(self) -> None:
        if self.is_idle:
            self.transport.abort()
        else:
            self._impatience = self.loop.call_later(ANSWER_WITHIN_S, self.transport.abort)


def build_app(
    service: str,
    checks: Checks,
    is_ready: Callable[[], str | None],
    paused: Callable[[], dict[str, object] | None],
) -> Starlette:
    """Return the application.

    is_ready: None if the service takes work, otherwise the reason why it does not.
    paused: what a paused service would send; None if it is not paused.
    """

    async def run_checks() -> tuple[bool, dict[str, dict[str, str]]]:
        results = await asyncio.gather(*(_outcome(check) for check in checks.values()))
        shown = {
            name: {"status": "up"} if problem is None else {"status": "down", "problem": problem}
            for name, problem in zip(checks, results, strict=True)
        }
        return not any(results), shown

    async def health(_: Request) -> JSONResponse:
        well, shown = await run_checks()
        body = {"status": "healthy" if well else "unhealthy", "service": service, "checks": shown}
        return JSONResponse(body, 200 if well else 503)

    async def ready(_: Request) -> JSONResponse:
        well, shown = await run_checks()
        reason = is_ready()
        body: dict[str, object] = {
            "status": "ready" if well and reason is None else "not_ready",
            "service": service,
            "checks": shown,
        }
        if reason is not None:
            body["reason"] = reason
        if (held_back := paused()) is not None:
            body["paused"] = held_back
        return JSONResponse(body, 200 if body["status"] == "ready" else 503)

    pages = Starlette(
        routes=[Route("/health", health, methods=["GET"]), Route("/ready", ready, methods=["GET"])]
    )
    # /health/ would lead to whatever host the request names.
    pages.router.redirect_slashes = False
    return pages


def build_server(app: Starlette) -> HealthServer:
    """Return the server; run it with `serve(sockets=[listen(...)])`."""
    return HealthServer(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=int(REQUEST_WITHIN_S),
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=REQUEST_MAX_BYTES,
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket for the pages. Raises PortTaken."""
    try:
        # create_server sets SO_REUSEADDR, so that a restart need not wait for old connections.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise PortTaken("HTTP_PORT", f"{host}:{port}", error) from error


async def _outcome(check: Callable[[], Awaitable[None]]) -> str | None:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await check()
    except Unavailable as problem:
        return problem.problem
    except TimeoutError:
        return "no answer in time"
    return None
