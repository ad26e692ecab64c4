"""GET /health and GET /ready: is the service well, and does it take work? Neither tells a secret.

    healthy   both servers answer and take our writes
    ready     healthy, consuming, and not about to stop

Every answer comes within two seconds, whatever hangs: each check has a shorter deadline.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from retry_scheduler.errors import PortTaken, Unavailable

CHECK_TIMEOUT_S = 1.5

# A check raises Unavailable if its server is away. Its key is the server's name in the answer.
Checks = Mapping[str, Callable[[], Awaitable[None]]]


class HealthServer(uvicorn.Server):
    """Serves the pages inside the event loop that is running, and leaves signals to the service."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signals."""
        yield


def build_app(service: str, checks: Checks, is_ready: Callable[[], str | None]) -> Starlette:
    """Return the application.

    is_ready: None if the service takes work, otherwise the reason why it does not.
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
        return JSONResponse(body, 200 if body["status"] == "ready" else 503)

    return Starlette(
        routes=[Route("/health", health, methods=["GET"]), Route("/ready", ready, methods=["GET"])]
    )


def build_server(app: Starlette) -> HealthServer:
    """Return the server; run it with `serve(sockets=[listen(...)])`."""
    return HealthServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
            limit_concurrency=100,
            h11_max_incomplete_event_size=16 * 1024,
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
