"""Makes sure that our queues exist. A queue that exists is used as it is, whatever its arguments.

Looking comes first: declaring a queue with other arguments than it has would close the channel,
and deleting or changing somebody's queue is never ours to do.
"""

from collections.abc import Sequence

from retry_scheduler.broker.connection import Connection, connect
from retry_scheduler.errors import Unavailable

_NOT_FOUND = "404"


async def connect_with_queues(url: str, queues: Sequence[str], *, name: str) -> Connection:
    """Return an open connection, having created those of `queues` that did not exist, durable.

    Parameters and errors otherwise as in `connect`.
    """
    connection = await connect(url, name=name)
    try:
        for queue in queues:
            if await _exists(connection, queue):
                continue
            await connection.close()  # asking for a queue that is not there has closed its channel
            connection = await connect(url, name=name)
            await connection.call(connection.channel.queue_declare, queue, durable=True)
    except BaseException:
        connection.cut("setting up failed")
        raise
    return connection


async def _exists(connection: Connection, queue: str) -> bool:
    try:
        await connection.call(connection.channel.queue_declare, queue, passive=True)
    except Unavailable as problem:
        if problem.problem.startswith(_NOT_FOUND):
            return False
        raise
    return True


async def missing_queues(url: str, queues: Sequence[str], *, name: str) -> list[str]:
    """Return those of `queues` that do not exist; change nothing. Raises Unavailable."""
    missing = []
    for queue in queues:
        connection = await connect(url, name=name)
        try:
            if not await _exists(connection, queue):
                missing.append(queue)
        finally:
            await connection.close()
    return missing
