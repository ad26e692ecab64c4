"""Links for what must travel alone: a connection for each borrower, on which nothing else is outstanding.

    made -> lent -> at rest when it comes back: kept -> lent again
                |                                    `-> closed after a while without a borrower
                `-> otherwise (what it sent has ended it, or is not confirmed): closed

What is suspected comes in bursts, after an incident. A connection for each would cost the broker more than
all that is sent through it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from retry_scheduler.broker.publish_link import PublishLink

KEPT_S = 5.0


class SpareLinks:
    """Makes links where none is left, and runs them."""

    def __init__(self, make: Callable[[], PublishLink]) -> None:
        """make: returns a link that is not running yet."""
        self._make = make
        self._kept: dict[PublishLink, asyncio.TimerHandle] = {}
        self._running: dict[PublishLink, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[PublishLink]:
        """Lend a link, perhaps one that is not ready yet, until the block ends."""
        link = self._take_kept() or self._start()
        try:
            yield link
        except BaseException:  # in the middle of something
            self._end(link)
            raise
        if _is_like_new(link):
            self._kept[link] = asyncio.get_running_loop().call_later(KEPT_S, self._end_kept, link)
        else:
            self._end(link)

    async def run(self) -> None:
        """Wait until cancelled, then close all links."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            running = list(self._running.values())
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _take_kept(self) -> PublishLink | None:
        while self._kept:
            link, expiry = self._kept.popitem()
            expiry.cancel()
            if _is_like_new(link):
                return link
            self._end(link)
        return None

    def _start(self) -> PublishLink:
        link = self._make()
        self._running[link] = task = asyncio.create_task(link.run(), name="spare link")
        task.add_done_callback(lambda _: self._running.pop(link, None))
        return link

    def _end_kept(self, link: PublishLink) -> None:
        del self._kept[link]
        self._end(link)

    def _end(self, link: PublishLink) -> None:
        if (task := self._running.get(link)) is not None:
            task.cancel()


def _is_like_new(link: PublishLink) -> bool:
    # Whoever raises the broker's size limit need not tell us; it holds for channels opened from then on.
    return link.at_rest and not link.size_limit.known
