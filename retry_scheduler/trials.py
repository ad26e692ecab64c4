"""Finds the row that makes the process die, without blaming those that were in hand with it.

`claims_unsettled` rises with each claim and falls when the outcome is known, so a death leaves it raised on
every row in hand. Once a row has travelled alone without an outcome, its next journey is a trial: the claims
of all rows that are about to travel alone are taken back, and each is counted again just before it is sent,
one at a time in this instance. So only the row that is being sent is blamed for a death.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from retry_scheduler.messages import ClaimedQuarantine, ClaimedRetry
from retry_scheduler.publisher import Accuse
from retry_scheduler.repository import Suspicion
from retry_scheduler.suspicion import ALONE_AFTER, travels_alone

# Puts evidence into the table, however long that takes.
Note = Callable[[Sequence[Suspicion]], Awaitable[None]]


class Trials:
    """The trials of one instance."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def of(
        self, tasks: Sequence[ClaimedRetry | ClaimedQuarantine], note: Note
    ) -> AsyncIterator[Accuse]:
        """Have a trial if one of `tasks` needs it, until the block ends. Yields whom to tell who is sent."""
        accused = [task for task in tasks if travels_alone(task.claims_unsettled)]
        if not any(task.claims_unsettled > ALONE_AFTER + 1 for task in accused):
            yield _accuse_nobody  # most arrive by their first journey alone: it need not cost a statement
            return
        # Before waiting for others' trials: the process may die in one of these.
        await note([Suspicion(task.id, task.claims, task.claims_unsettled - 1) for task in accused])

        async def accuse(place: int) -> None:
            task = tasks[place]
            await note([Suspicion(task.id, task.claims, task.claims_unsettled)])

        async with self._one_at_a_time:
            yield accuse


async def _accuse_nobody(place: int) -> None:
    pass
