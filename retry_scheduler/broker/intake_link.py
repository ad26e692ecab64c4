"""Consumes one queue in batches, and reconnects by itself.

What was received is handed out even if its connection has died since: the broker will deliver it
again, and to have stored it by then is what makes the second delivery harmless. Only the
acknowledgement is bound to the channel that delivered. Until it is stored the next connection asks for
nothing: while PostgreSQL is away, each would bring the same messages once more, and memory would fill.

    connecting -> consuming -> (connection lost, or consumer cancelled because the queue was deleted)
        -> connecting -> all stored that came before -> consuming ...
    `stop_consuming` ends it: no more arrives, acknowledging still works
"""

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from pika.exceptions import AMQPError

from retry_scheduler.broker.connection import SERVER, Connection, keep_linked
from retry_scheduler.broker.stalls import Stalls
from retry_scheduler.broker.topology import connect_with_queues
from retry_scheduler.errors import Unavailable

# One batch is one INSERT: more rows gain nothing, more bytes only cost memory.
MAX_BATCH = 1000
MAX_BATCH_BYTES = 16 * 1024 * 1024

# Unique within a process by counting, and between processes by where the count begins.
_intake_ids = itertools.count(random.getrandbits(62))


class Delivery:
    """One message as it came.

    properties: encoded. redelivered: the broker has sent it before. intake_id: a number of ours for
    this delivery alone, negative if redelivered; the broker's tags begin anew with each connection.
    received_s: monotonic time; before it the message had not come, not even to a process that was frozen.
    done: for the consumer to set once it is stored, quarantined, or known to change nothing.
    """

    __slots__ = ("body", "connection", "done", "intake_id", "properties", "received_s", "redelivered", "tag")

    def __init__(
        self,
        connection: Connection,
        tag: int,
        *,
        redelivered: bool,
        properties: bytes,
        body: bytes,
        received_s: float,
    ) -> None:
        self.intake_id = -next(_intake_ids) if redelivered else next(_intake_ids)
        self.received_s = received_s
        self.done = False
        self.connection = connection
        self.tag = tag
        self.redelivered = redelivered
        self.properties = properties
        self.body = body


class IntakeLink:
    """One consumer of one queue."""

    def __init__(
        self,
        url: str,
        *,
        queue: str,
        queues: Sequence[str],
        prefetch: int,
        name: str,
        on_problem: Callable[[Unavailable], None],
    ) -> None:
        """Queue to consume, queues to create where they are missing, and whom to tell of each failed try."""
        self._url = url
        self._queue = queue
        self._queues = queues
        self._prefetch = prefetch
        self._name = name
        self._on_problem = on_problem
        self._connection: Connection | None = None
        self._consumer_tag: str | None = None  # from when it is asked for
        self._consuming = False
        self._wanted = True
        self._arrived: deque[Delivery] = deque()
        self._something_arrived = asyncio.Event()
        self._unstored = 0  # arrived, over whichever connection, and not acknowledged yet
        self._all_stored = asyncio.Event()
        self._stalls = Stalls(time.monotonic())

    @property
    def up(self) -> bool:
        """Whether the broker is delivering to us, or will when what it has delivered before is stored."""
        return self._connection is not None and (self._consuming or self._unstored > 0)

    def connect_from_now_on_to(self, url: str) -> None:
        """Make every further connection with `url`. The one that is open goes on."""
        self._url = url

    async def run(self) -> None:
        """Stay connected until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._stalls.watch(), name="stalls")
            await keep_linked(self._session, on_problem=self._on_problem)

    async def take(self) -> list[Delivery]:
        """Wait until something has arrived and return it, oldest first, at most a batch."""
        await self._something_arrived.wait()
        return self.take_arrived()

    def take_arrived(self) -> list[Delivery]:
        """Return what has arrived, oldest first, at most a batch; perhaps nothing."""
        batch: list[Delivery] = []
        size = 0
        while self._arrived and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            delivery = self._arrived.popleft()
            size += len(delivery.body)
            batch.append(delivery)
        if not self._arrived:
            self._something_arrived.clear()
        return batch

    def acknowledge(self, batch: Sequence[Delivery]) -> None:
        """Tell the broker that everything up to the end of `batch` is safe.

        Batches must be acknowledged in the order they were taken. What came over a connection that
        has ended is passed over: its tags mean nothing to the new one.
        """
        self._unstored -= len(batch)
        if not self._unstored:
            self._all_stored.set()
        for place in range(len(batch) - 1, -1, -1):
            delivery = batch[place]
            if delivery.connection is self._connection and not delivery.connection.closed.done():
                # A channel that closes this moment means the same as one that has closed.
                with suppress(AMQPError):
                    delivery.connection.channel.basic_ack(delivery.tag, multiple=True)
                return

    async def stop_consuming(self) -> None:
        """Ask for no more. What was sent to us until the broker's answer is still to be taken. Never raises.

        None of it may go back: it would come again marked as redelivered, which it is not for us, and a
        redelivered attempt that has been executed changes nothing (docs/contract.md, "Asking for a retry").
        """
        connection, tag = self._connection, self._consumer_tag
        self._consumer_tag = None
        self._consuming = self._wanted = False
        if connection is None or tag is None:
            return
        try:
            await connection.call(partial(_cancel_and_go_on, connection.channel), tag)
        except Unavailable:
            connection.cut("no answer to basic.cancel")

    async def round_trip(self) -> None:
        """Return once the broker has handled all that was sent before. Raises Unavailable."""
        if self._connection is None:
            raise Unavailable(SERVER, "not connected")
        await self._connection.round_trip()

    async def _session(self) -> None:
        connection = await connect_with_queues(self._url, self._queues, name=self._name)
        self._connection = connection
        try:
            connection.channel.add_on_cancel_callback(lambda _: connection.cut("the queue was deleted"))
            await self._wait_until_all_stored(connection)
            await self._consume(connection)
            raise Unavailable(SERVER, await asyncio.shield(connection.closed))
        finally:
            self._consumer_tag = None
            self._consuming = False
            self._connection = None
            await connection.close()

    async def _wait_until_all_stored(self, connection: Connection) -> None:
        """Return also if the connection has ended meanwhile."""
        if not self._unstored:
            return
        self._all_stored.clear()
        stored = asyncio.ensure_future(self._all_stored.wait())
        try:
            await asyncio.wait((stored, connection.closed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stored.cancel()

    async def _consume(self, connection: Connection) -> None:
        await connection.call(connection.channel.basic_qos, prefetch_count=self._prefetch)
        if not self._wanted:
            return
        tag = f"retry-scheduler-{id(connection):x}"
        receive = partial(self._receive, connection)

        def receive_from_pika(_: Any, method: Any, properties: Any, body: bytes) -> None:
            receive(method.delivery_tag, method.redelivered, properties.raw, body)

        connection.deliver_to(receive)
        self._consumer_tag = tag  # who is told to stop before the broker's answer comes cancels it, too
        await connection.call(
            connection.channel.basic_consume, self._queue, receive_from_pika, consumer_tag=tag
        )
        self._consuming = self._wanted

    def _receive(
        self, connection: Connection, tag: int, redelivered: bool, properties: bytes, body: bytes
    ) -> None:
        self._unstored += 1
        delivery = Delivery(
            connection,
            tag,
            redelivered=redelivered,
            properties=properties,
            body=body,
            received_s=self._stalls.earliest_s(time.monotonic()),
        )
        self._arrived.append(delivery)
        self._something_arrived.set()


def _cancel_and_go_on(channel: Any, tag: str, *, callback: Callable[[Any], None]) -> None:
    """Cancel a consumer that receives until the broker answers: pika would reject what comes meanwhile."""
    channel.basic_cancel(tag, callback)
    channel._cancelled.discard(tag)
