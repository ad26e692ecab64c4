"""Answers from the event loop, for the thread in which Prometheus asks.

What is read at the moment of the question is true then; a gauge refreshed by a timer is stale or
expensive. Every answer has a deadline, so that a scrape never hangs.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from retry_scheduler.errors import RetrySchedulerError

ANSWER_WITHIN_S = 2.0

# The share of time that counting a large queue may take: a count of half a second is repeated after ten.
COUNTING_SHARE = 0.05
# A count that failed is tried again soon: blindness must not outlast the fault.
LONGEST_PAUSE_AFTER_FAILURE_S = 1.0

Answer = TypeVar("Answer")


class LiveFigures:
    """The figures that are read when asked for. Its methods are called from other threads."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        count: Callable[[], Awaitable[tuple[int, float]]],
        check: Callable[[], Awaitable[None]],
    ) -> None:
        """count: depth and oldest due time in seconds. check: raises one of our errors unless all is well."""
        self._loop = loop
        self._count = count
        self._check = check
        self._count_not_before_s = 0.0
        self._closed = False

    def queue(self) -> tuple[int, float] | None:
        """Return depth and oldest due time in seconds, or None if they cannot be had now."""
        began_s = time.monotonic()
        if began_s < self._count_not_before_s:
            return None
        figures = self._ask(self._counted())
        ended_s = time.monotonic()
        took_s = ended_s - began_s
        if figures is None:
            self._count_not_before_s = ended_s + min(took_s, LONGEST_PAUSE_AFTER_FAILURE_S)
        else:
            self._count_not_before_s = began_s + took_s / COUNTING_SHARE
        return figures

    def up(self) -> bool:
        """Return whether the service could do its work now."""
        return self._ask(self._well()) is True

    def close(self) -> None:
        """Answer no more: the loop is about to end."""
        self._closed = True

    def _ask(self, question: Coroutine[Any, Any, Answer]) -> Answer | None:
        if self._closed:
            question.close()
            return None
        asking = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return asking.result(timeout=ANSWER_WITHIN_S)
        except (TimeoutError, CancelledError, RetrySchedulerError):
            asking.cancel()
            return None

    async def _counted(self) -> tuple[int, float]:
        return await self._count()

    async def _well(self) -> bool:
        await self._check()
        return True
