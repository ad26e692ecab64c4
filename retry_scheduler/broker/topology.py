"""Makes sure that our queues exist, and tells what they are. A queue that exists is used as it is.

Looking comes first: declaring a queue with other arguments than it has would close the channel,
and deleting or changing somebody's queue is never ours to do.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from retry_scheduler.broker.connection import Connection, connect
from retry_scheduler.errors import Unavailable

_NOT_FOUND = "404"
_PRECONDITION_FAILED = "406"

# How RabbitMQ says in what a queue differs from its declaration. AMQP has no other way to ask.
_DIFFERS = re.compile(
    r"inequivalent arg '(?P<name>[^']+)' for .* but current is "
    r"(?:the value '(?P<value>.*)' of type '(?P<type>\w+)'|'?(?P<plain>\w+)'?)"
)
# A queue has about ten arguments that this can be asked of.
_MOST_QUESTIONS = 20


@dataclass(frozen=True, slots=True)
class QueueState:
    """messages: ready, not counting those that consumers have."""

    messages: int
    consumers: int


@dataclass(frozen=True, slots=True)
class QueueShape:
    """How an existing queue was declared. unknown: what could not be found out, in words."""

    durable: bool = True
    auto_delete: bool = False
    arguments: dict[str, int | str | bool] = field(default_factory=dict)
    broker_version: str = ""
    unknown: str | None = None


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


async def queue_shape(url: str, queue: str, *, name: str) -> QueueShape:
    """Return how a queue that exists was declared; change nothing. Raises Unavailable.

    Declaring an existing queue never changes it: the broker refuses, and names one difference. So this
    declares it with what is known so far until nothing differs. What a policy adds does not show.
    """
    known: dict[str, bool] = {"durable": True, "auto_delete": False}
    arguments: dict[str, int | str | bool] = {}
    unknown: str | None = None
    version = ""
    for _ in range(_MOST_QUESTIONS):
        connection = await connect(url, name=name)
        version = connection.broker_version
        try:
            if await _state(connection, queue) is None:  # else this would create it
                unknown = "it does not exist"
                break
            await connection.call(connection.channel.queue_declare, queue, arguments=arguments, **known)
            break
        except Unavailable as problem:
            unknown = None
            difference = _DIFFERS.search(problem.problem)
            if not problem.problem.startswith(_PRECONDITION_FAILED) or difference is None:
                unknown = problem.problem
                break
            argument = difference["name"]
            if argument in known:
                known[argument] = difference["plain"] == "true"
                continue
            value = _value(difference["value"], difference["type"])
            if value is None or argument in arguments:
                unknown = problem.problem
                break
            arguments[argument] = value
        finally:
            await connection.close()
    return QueueShape(known["durable"], known["auto_delete"], arguments, version, unknown)


async def _state(connection: Connection, queue: str) -> QueueState | None:
    try:
        answer = await connection.call(connection.channel.queue_declare, queue, passive=True)
    except Unavailable as problem:
        if problem.problem.startswith(_NOT_FOUND):
            return None
        raise
    return QueueState(answer.method.message_count, answer.method.consumer_count)


def _value(text: str | None, kind: str | None) -> int | str | bool | None:
    """Return an argument's value from the broker's words, None if they make no sense to us."""
    if text is None:
        return None
    if kind in ("longstr", "shortstr"):
        return text
    if kind == "bool":
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else None
