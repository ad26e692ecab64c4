"""RabbitMQ alone: durable queues with a TTL whose messages expire into the consumer's queue.

The message is the 1 KiB payload itself, persistent; publishing is confirmed and consumption is
acknowledged. One queue for each delay: in a common one the messages with a short delay would wait
behind those with a long one. What it does not do: no limit of attempts, no record, no answer to any
question, and RabbitMQ moves expired messages without a confirm of its own.
"""

from collections.abc import Iterable

from benchmarks.load import ORDERS, PAYLOAD, Message
from retry_scheduler.broker.connection import connect
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication


async def declare_queues(url: str, delays_ms: Iterable[int]) -> None:
    """Create a queue for each delay."""
    connection = await connect(url, name="bench native")
    for delay_ms in delays_ms:
        arguments = {
            "x-message-ttl": delay_ms,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": ORDERS,
        }
        await connection.call(
            connection.channel.queue_declare, _queue(delay_ms), durable=True, arguments=arguments
        )
    await connection.close()


def delayed(message: Message) -> Publication:
    """Return the message for the queue of its delay."""
    return Publication(
        _queue(message.delay_ms),
        key=message.key,
        properties=encode_properties({RETRY_ID: message.key}, message_id=message.message_id),
        body=PAYLOAD,
    )


def _queue(delay_ms: int) -> str:
    return f"bench.delay.{delay_ms}"
