"""Makes sure that our queues exist, and tells what they are. A queue that exists is used as it is.

Looking comes first: declaring a queue with other arguments than it has would close the channel,
and deleting or changing somebody's queue is never ours to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from retry_scheduler.broker.connection import Connection, connect
from retry_scheduler.errors import Unavailable

_NOT_FOUND = "404"


@dataclass(frozen=True, slots=True)
class QueueState:
    """messages: ready, not counting those that consumers have."""

    messages: int
    consumers: int


async def connect_with_queues(url: str, queues: Sequence[str], *, name: str) -> Connection:
    """Return an open connection, having created those of `queues` that did not exist, durable.

    Parameters and errors otherwise as in `connect`.
    """
    connection = await connect(url, name=name)
    try:
        for queue in queues:
            if await _state(connection, queue):
                continue
            await connection.close()  # asking for a queue that is not there has closed its channel
            connection = await connect(url, name=name)
            await connection.call(connection.channel.queue_declare, queue, durable=True)
    except BaseException:
        connection.cut("setting up failed")
        raise
    return connection


async def queue_states(url: str, queues: Sequence[str], *, name: str) -> dict[str, QueueState | None]:
    """Return what each of `queues` holds, None if it does not exist; change nothing. Raises Unavailable."""
    states = {}
    for queue in queues:
        connection = await connect(url, name=name)
        try:
            states[queue] = await _state(connection, queue)
        finally:
            await connection.close()
    return states


async def _state(connection: Connection, queue: str) -> QueueState | None:
    try:
        answer = await connection.call(connection.channel.queue_declare, queue, passive=True)
    except Unavailable as problem:
        if problem.problem.startswith(_NOT_FOUND):
            return None
        raise
    return QueueState(answer.method.message_count, answer.method.consumer_count)
