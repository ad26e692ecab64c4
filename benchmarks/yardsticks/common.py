"""What the yardstick programs share: where the servers are, and working until SIGTERM."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import uvloop

from retry_scheduler.errors import Unavailable

URL = os.environ.get("RABBITMQ_URL", "")
READY = "ready"
BASE_DELAY = "BENCH_BASE_DELAY_MS"


async def open_pool(size: int, **session: str) -> "asyncpg.Pool[asyncpg.Record]":
    """Return a pool of `size` open connections. session: settings of each."""
    return await asyncpg.create_pool(
        host=os.environ["POSTGRES_HOST"],
        port=int(os.environ["POSTGRES_PORT"]),
        user=os.environ["POSTGRES_USER"],
        database=os.environ["POSTGRES_DB"],
        min_size=size,
        max_size=size,
        server_settings={"synchronous_commit": "on", **session},
    )


def delay_ms(retry_count: int) -> int:
    """Return the delay of a retry: the base, doubled with each."""
    return int(os.environ[BASE_DELAY]) << retry_count


def work_until_sigterm(work: Callable[[], Awaitable[Any]]) -> None:
    """Run `work` and end without a word at SIGTERM."""

    async def main() -> None:
        task = asyncio.ensure_future(work())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await asyncio.wait((task,))
        if not task.cancelled():
            task.result()

    uvloop.run(main())


def fail(problem: Unavailable) -> None:
    """Say what is wrong with the broker."""
    print(problem, flush=True)
