"""Holds an old transaction open, as a forgotten session does: no vacuum removes what it might still see."""

import asyncio
import threading
from contextlib import suppress

from chaos.bed import Place
from chaos.moment import TROUBLE, connect

# Often enough to begin anew soon after the server has ended it.
LOOK_EVERY_S = 0.5

_OLD = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1"


class PinnedHorizon:
    """One transaction on a thread; a new one when it was lost with the server."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._work, name="horizon", daemon=True)

    def pin(self) -> None:
        """Begin."""
        self._thread.start()

    def release(self) -> None:
        """End it; returns when it is over."""
        self._released.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._released.wait(LOOK_EVERY_S):
            with suppress(*TROUBLE):
                asyncio.run(self._hold())

    async def _hold(self) -> None:
        connection = await connect(self._place)
        try:
            await connection.execute(_OLD)
            while not self._released.is_set():
                await connection.execute("SELECT 1", timeout=LOOK_EVERY_S * 20)
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            connection.terminate()
