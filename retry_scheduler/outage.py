"""How long to wait between tries while a server does not answer.

Some tries may succeed while others fail (no file descriptor left, a server that restarts again and
again): so not a success ends the pauses, only time without a failure does.
"""

import asyncio
import time

# Soon enough to be back within a second, seldom enough to cost nothing.
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 1.0

# After so long without a failure, the next one is taken for the first of another outage. A try that
# waits for a silent server takes up to 8 s.
OVER_AFTER_S = 10.0


class OutageBackoff:
    """The pauses of all who try the same thing: FIRST_PAUSE_S, doubled by each failure up to LAST_PAUSE_S."""

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._until_s = float("-inf")

    async def wait(self) -> None:
        """Wait after a failed try. Who fails while others wait goes on together with them."""
        now_s = time.monotonic()
        if now_s >= self._until_s:
            first = now_s - self._until_s > OVER_AFTER_S
            self._pause_s = FIRST_PAUSE_S if first else min(self._pause_s * 2, LAST_PAUSE_S)
            self._until_s = now_s + self._pause_s
        await asyncio.sleep(self._until_s - now_s)
