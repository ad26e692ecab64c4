"""Notices that the process has stood still: what it reads afterwards may have been there for as long.

A frozen process (SIGSTOP, a virtual machine that is paused) has no notion of the time that passes, and
the broker may have given up on it meanwhile. One timer, twice a second: shorter stalls
matter only where what another instance was given was not marked as redelivered.
"""

import asyncio
import time

TICK_S = 0.5

# Later than this, and a tick was not only delayed by other work.
STALL_S = 3 * TICK_S

# So long after a stall the sockets may still hold what had come during it.
AFTERMATH_S = 2.0


class Stalls:
    """Knows when this process was last certainly awake. Times are monotonic seconds."""

    def __init__(self, now_s: float) -> None:
        self._ticked_s = now_s
        self._stalled_since_s = self._stalled_until_s = float("-inf")

    def tick(self, now_s: float) -> None:
        """Note that the process is awake."""
        if now_s - self._ticked_s > STALL_S:
            self._stalled_since_s, self._stalled_until_s = self._ticked_s, now_s
        self._ticked_s = now_s

    def earliest_s(self, now_s: float) -> float:
        """Return the earliest moment at which something read at `now_s` may have reached this machine."""
        self.tick(now_s)
        return self._stalled_since_s if now_s - self._stalled_until_s < AFTERMATH_S else now_s

    async def watch(self) -> None:
        """Tick until cancelled."""
        while True:
            self.tick(time.monotonic())
            await asyncio.sleep(TICK_S)
