"""A team's program as it meets the service: asks for retries, and consumes what comes back.

Plain pika, a connection for each call, so that it works as soon as the broker does. Importing
retry_scheduler.broker changes what pika makes of arriving properties; here they are decoded by pika's
own decoder whether it was imported or not.
"""

import json
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, StreamLostError
from pika.spec import BasicProperties

from retry_scheduler.broker.properties import RawProperties
from tests.waiting import eventually

RETRY_QUEUE = "retry.scheduled"
REVIEW_QUEUE = "manual-review.pending"

# So many requests make one transaction: bigger ones gain nothing.
TRANSACTION = 1000


@dataclass(frozen=True)
class Message:
    """One message that came. raw_properties: as they were on the wire. received_at_s: Unix time."""

    body: bytes
    raw_properties: bytes
    redelivered: bool
    received_at_s: float

    @property
    def properties(self) -> Any:
        """The properties as pika's own decoder understands them."""
        return BasicProperties().decode(self.raw_properties)

    @property
    def headers(self) -> dict[str, Any]:
        """The headers, decoded."""
        return self.properties.headers or {}

    @property
    def retry_id(self) -> str:
        """The header by which a consumer knows a duplicate."""
        return str(self.headers["x-retry-id"])

    @property
    def message_id(self) -> str:
        """The message's id."""
        return str(self.properties.message_id)

    @property
    def review(self) -> dict[str, Any]:
        """The body of a manual review message."""
        fields: dict[str, Any] = json.loads(self.body)
        return fields


class Upstream:
    """Everything that the programs around the service do. `url`: the broker's address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def declare(self, *queues: str, **arguments: Any) -> None:
        """Create durable queues. arguments: as RabbitMQ calls them, with _ for -."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        with self.channel() as channel:
            for queue in queues:
                channel.queue_declare(queue, durable=True, arguments=named)

    def delete(self, queue: str) -> None:
        """Delete a queue with all that is in it."""
        with self.channel() as channel:
            channel.queue_delete(queue)

    def exists(self, queue: str) -> bool:
        """Whether there is such a queue."""
        try:
            self.depth(queue)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True

    def depth(self, queue: str) -> int:
        """How many messages wait in a queue, not counting those that a consumer has."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    def ask(
        self,
        *bodies: bytes,
        queue: str = RETRY_QUEUE,
        headers: Mapping[str, Any] | None = None,
        **properties: Any,
    ) -> None:
        """Publish requests, and return when the broker has accepted every one."""
        with self.channel() as channel:
            channel.confirm_delivery()
            for body in bodies:
                channel.basic_publish(
                    "",
                    queue,
                    body,
                    BasicProperties(delivery_mode=2, headers=headers, **properties),
                    mandatory=True,
                )

    def ask_for_many(self, bodies: Sequence[bytes], queue: str = RETRY_QUEUE) -> None:
        """Publish many requests, in transactions, and return when the broker has accepted every one."""
        with self.channel() as channel:
            channel.tx_select()
            for start in range(0, len(bodies), TRANSACTION):
                for body in bodies[start : start + TRANSACTION]:
                    channel.basic_publish("", queue, body, BasicProperties(delivery_mode=2))
                channel.tx_commit()

    def take(self, queue: str) -> list[Message]:
        """Take what waits in a queue now."""
        taken: list[Message] = []
        with self.channel() as channel:
            count = channel.queue_declare(queue, passive=True).method.message_count
            if count:
                for method, properties, body in channel.consume(queue, auto_ack=True, inactivity_timeout=5):
                    assert method is not None, f"took {len(taken)} of {count} messages"
                    taken.append(_message(method, properties, body))
                    if len(taken) == count:
                        break
                channel.cancel()
        return taken

    async def receive(
        self, queue: str, count: int, *, within: timedelta = timedelta(seconds=10)
    ) -> list[Message]:
        """Wait until at least `count` messages have come, and take all that are there then."""
        await self.filled(queue, count, within=within)
        return self.take(queue)

    async def filled(
        self,
        queue: str,
        count: int,
        *,
        within: timedelta = timedelta(seconds=10),
        every: timedelta = timedelta(milliseconds=20),
    ) -> None:
        """Wait until at least `count` messages wait in a queue."""
        await eventually(lambda: self.depth(queue) >= count, within=within, every=every)

    @contextmanager
    def channel(self) -> Iterator[BlockingChannel]:
        """A channel of its own connection."""
        parameters = pika.URLParameters(self.url)
        parameters.heartbeat = 0  # nobody answers for us while a test is busy elsewhere
        parameters.connection_attempts = 1
        parameters.socket_timeout = 5
        connection = pika.BlockingConnection(parameters)
        try:
            yield connection.channel()
        except BaseException as error:
            if not isinstance(error, AMQPError):
                # A test's timeout, perhaps because the broker does not answer: then it would not
                # answer a polite close either, and pika would wait for that without end.
                connection._impl._terminate_stream(StreamLostError("given up"))
            raise
        finally:
            if connection.is_open:
                connection.close()


class Receiver:
    """A consumer that runs in a thread of its own, and notes when each message came."""

    def __init__(self, upstream: Upstream, queue: str) -> None:
        self._upstream = upstream
        self._queue = queue
        self._messages: deque[Message] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"receiver of {queue}")

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    @property
    def messages(self) -> list[Message]:
        """What has come, in this order."""
        return list(self._messages)

    def __len__(self) -> int:
        return len(self._messages)

    def _work(self) -> None:
        with self._upstream.channel() as channel:
            channel.basic_qos(prefetch_count=500)
            for method, properties, body in channel.consume(self._queue, inactivity_timeout=0.1):
                if method is not None:
                    self._messages.append(_message(method, properties, body))
                    channel.basic_ack(method.delivery_tag)
                elif self._stop.is_set():
                    break


class Load:
    """Asks for retries at a steady rate from a thread of its own, and repeats what was not accepted.

    accepted: ids of the messages that the broker has confirmed. A message whose confirm was lost is
    sent again, as a careful upstream does, and so may have come twice.
    """

    def __init__(self, upstream: Upstream, bodies: Iterable[tuple[str, bytes]], *, per_second: float) -> None:
        self.accepted: list[str] = []
        self._upstream = upstream
        self._bodies = bodies
        self._pause_s = 1 / per_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="load")

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Send no more, and return when what was being sent has been accepted."""
        self._stop.set()
        self._thread.join(timeout=30)
        assert not self._thread.is_alive(), "the load does not come to its end"

    def _work(self) -> None:
        waiting = iter(self._bodies)
        message_id, body = next(waiting)
        while not self._stop.is_set():
            try:
                with self._upstream.channel() as channel:
                    channel.confirm_delivery()
                    while not self._stop.wait(self._pause_s):
                        channel.basic_publish(
                            "", RETRY_QUEUE, body, BasicProperties(delivery_mode=2), mandatory=True
                        )
                        self.accepted.append(message_id)
                        message_id, body = next(waiting)
            except AMQPError:  # refused, returned, or the broker is away: the same message again
                self._stop.wait(0.1)


def _message(method: Any, properties: Any, body: bytes) -> Message:
    raw = properties.raw if isinstance(properties, RawProperties) else b"".join(properties.encode())
    return Message(body, raw, method.redelivered, time.time())


def signed_64_bit_header(message: Message, name: str) -> int:
    """Return the number in a header. Raises ValueError if it does not travel as a signed 64-bit integer."""
    entry = bytes((len(name),)) + name.encode() + b"l"
    at = message.raw_properties.index(entry) + len(entry)
    (number,) = struct.unpack_from(">q", message.raw_properties, at)
    return int(number)
