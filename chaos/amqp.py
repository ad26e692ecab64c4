"""A program's connection to the broker: confirmed publishing, and consuming that comes back by itself.

Plain pika from a thread of each one's own, and nothing of the service's broker package: what both had in
common neither would notice.
"""

import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError, NackError, UnroutableError

from chaos.oplog import OperationLog
from chaos.requests import RETRY_QUEUE, Request

# A frozen broker is noticed after two or three of these.
HEARTBEAT_S = 5
CONNECT_TIMEOUT_S = 5
PAUSE_S = 0.2
# How often an idle consumer looks whether it should end, and answers heartbeats.
LOOK_EVERY_S = 0.2
PREFETCH = 50

# The last one is no AMQPError: a broker that is frozen during the handshake.
_CONNECTION_LOST = (AMQPError, OSError, AMQPConnectorException)


def connect(url: str) -> BlockingConnection:
    """Return an open connection. Raises one of _CONNECTION_LOST."""
    parameters = pika.URLParameters(url)
    parameters.heartbeat = HEARTBEAT_S
    parameters.connection_attempts = 1
    parameters.socket_timeout = parameters.stack_timeout = CONNECT_TIMEOUT_S
    return BlockingConnection(parameters)


class Upstream:
    """Publishes requests, mandatory and confirmed, one at a time, and logs what became of each."""

    def __init__(self, url: str, log: OperationLog, process: str) -> None:
        self._url = url
        self._log = log
        self._process = process
        self._connection: BlockingConnection | None = None
        self._channel: BlockingChannel | None = None

    def enqueue(self, request: Request) -> str:
        """Send one request and return ok (confirmed), fail (certainly not in the queue) or info (unknown)."""
        operation = self._log.new_operation()
        self._log.write("enqueue", "invoke", operation=operation, process=self._process, **request.described)
        outcome = self._publish(request.body)
        self._log.write("enqueue", outcome, operation=operation)
        return outcome

    def answer_heartbeats(self) -> None:
        """For whoever has sent nothing for a while."""
        if self._connection is not None:
            try:
                self._connection.process_data_events(0)
            except _CONNECTION_LOST:
                self._forget()

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None and self._connection.is_open:
            with suppress(*_CONNECTION_LOST):
                self._connection.close()
        self._forget()

    def _publish(self, body: bytes) -> str:
        try:
            channel = self._open_channel()
        except _CONNECTION_LOST:
            return "fail"
        try:
            channel.basic_publish(
                "", RETRY_QUEUE, body, pika.BasicProperties(delivery_mode=2), mandatory=True
            )
        except (UnroutableError, NackError):
            return "fail"
        except _CONNECTION_LOST:
            self._forget()
            return "info"
        return "ok"

    def _open_channel(self) -> BlockingChannel:
        if self._channel is None or not self._channel.is_open:
            self._connection = connect(self._url)
            self._channel = self._connection.channel()
            self._channel.confirm_delivery()
        return self._channel

    def _forget(self) -> None:
        self._connection = self._channel = None


class QueueConsumer(ABC):
    """A thread that consumes one queue until told to stop; acknowledges a message when `handle` returns."""

    def __init__(self, url: str, queue: str) -> None:
        self._url = url
        self._queue = queue
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"consumer of {queue}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, once what is in hand is done."""
        self._stop.set()
        self._thread.join(timeout=30)

    @property
    def is_alive(self) -> bool:
        """Whether it still consumes. One that has died of an error has left its traceback on stderr."""
        return self._thread.is_alive()

    @abstractmethod
    def handle(self, body: bytes, properties: Any, *, redelivered: bool) -> None:
        """Do what this consumer does with one message."""

    def idle(self) -> None:  # noqa: B027  most have nothing to do then
        """Do what has to be done while nothing comes."""

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self._consume()
            except _CONNECTION_LOST:
                self._stop.wait(PAUSE_S)

    def _consume(self) -> None:
        connection = connect(self._url)
        channel = connection.channel()
        channel.basic_qos(prefetch_count=PREFETCH)
        for method, properties, body in channel.consume(self._queue, inactivity_timeout=LOOK_EVERY_S):
            if method is not None:
                self.handle(body, properties, redelivered=method.redelivered)
                channel.basic_ack(method.delivery_tag)
            else:
                self.idle()
            if self._stop.is_set():
                break
        connection.close()


def declare_queues(url: str, *queues: str) -> None:
    """Create durable queues where they are missing."""
    connection = connect(url)
    channel = connection.channel()
    for queue in queues:
        channel.queue_declare(queue, durable=True)
    connection.close()
