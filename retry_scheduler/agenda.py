"""Knows when the next attempts are due, so that the scheduler sleeps exactly until then.

Due times come from two sides: the consumer tells what it has just stored, and a look at the table
each second tells what anybody has stored. Both only cover the near future, which bounds the memory:
what is due later will be seen by a later look. Reads the monotonic clock itself, because the event
loop's own stands still while a callback runs.
"""

import asyncio
import heapq
import time
from collections.abc import Iterable

# Must be longer than the time between two looks at the table, with something to spare for a slow one.
HORIZON_S = 3.0

# Due times this close together are served by one claim.
GRAIN_S = 0.002


class Agenda:
    """A set of wake-up times for one sleeper."""

    def __init__(self) -> None:
        self._times: list[int] = []  # a heap of monotonic times in grains
        self._known: set[int] = set()
        self._changed = asyncio.Event()

    def expect(self, due_in_s: Iterable[float]) -> None:
        """Note that something is due in so many seconds. Zero or less means now."""
        now = time.monotonic()
        # While nobody waits (the broker is blocked, or claiming is paused) passed times would pile up.
        if self._forget_until(now):
            self._remember(int(now / GRAIN_S))
        for seconds in due_in_s:
            if seconds > HORIZON_S:
                continue
            # Rounded up: waking early would find nothing due yet.
            grain = int((now + max(seconds, 0.0)) / GRAIN_S) + 1 if seconds > 0 else int(now / GRAIN_S)
            self._remember(grain)

    def wake(self) -> None:
        """Note that something may be due now."""
        self.expect((0.0,))

    async def wait(self, longest_s: float) -> bool:
        """Sleep until something is due, at most `longest_s`, and forget the times that have passed.

        Returns whether something is due.
        """
        deadline = time.monotonic() + longest_s
        while True:
            now = time.monotonic()
            if self._times and self._times[0] * GRAIN_S <= now:
                self._forget_until(now)
                return True
            wake_at = min(deadline, self._times[0] * GRAIN_S) if self._times else deadline
            if wake_at <= now:
                return False
            self._changed.clear()
            try:
                async with asyncio.timeout(wake_at - now):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _remember(self, grain: int) -> None:
        if grain not in self._known:
            self._known.add(grain)
            heapq.heappush(self._times, grain)
            if self._times[0] == grain:
                self._changed.set()

    def _forget_until(self, now: float) -> bool:
        """Return whether there was anything to forget."""
        before = len(self._times)
        while self._times and self._times[0] * GRAIN_S <= now:
            self._known.discard(heapq.heappop(self._times))
        return len(self._times) < before
