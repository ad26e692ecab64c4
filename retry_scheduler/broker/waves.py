"""When the broker's answers are taken: several together, since each taking is a statement for PostgreSQL.

all of a batch answered         -> at once
no more have come for a moment  -> those that have: one queue that is slow must not keep the others'
                                   rows in hand, where they take the place of what is due
they keep coming one by one     -> every WAVE_S
"""

import asyncio
from contextlib import suppress

from retry_scheduler.broker.confirms import ConfirmBatch

# How long outcomes may wait for the rest of their batch.
WAVE_S = 0.1

# RabbitMQ confirms what goes to queues that are well within a few milliseconds of each other.
QUIET_S = 0.02


async def wave_complete(batch: ConfirmBatch) -> None:
    """Return when what has come is to be taken; after WAVE_S also if nothing has."""
    for _ in range(round(WAVE_S / QUIET_S)):
        known = batch.open
        with suppress(TimeoutError):
            async with asyncio.timeout(QUIET_S):
                await batch.done.wait()
                return
        if batch.has_new and batch.open == known:
            return
