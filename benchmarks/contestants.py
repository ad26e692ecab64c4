"""Who is measured side by side: the service, and what it is compared with.

All get the same number of messages from the same upstream, and the same consumer takes their
retries. Where a choice had to be made it favours the yardstick: see docs/performance.md.
"""

import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.bed import CHECKOUT, Place, Program
from benchmarks.load import ORDERS, PAYLOAD_BASE64, REQUESTS, Message
from benchmarks.yardsticks import celery_message, native
from benchmarks.yardsticks.common import BASE_DELAY, READY
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication

TUNED = {"RABBITMQ_PREFETCH": "1000"}
AT_ONCE = {"BASE_DELAY_MS": "1", "JITTER_MS": "0"}
AT_ONCE_DELAYS_MS = {0: 1}
MIXED_DELAYS_MS = {0: 2000, 1: 4000, 2: 8000}

PEERS_PYTHON = CHECKOUT / ".venv-peers" / "bin" / "python"
ERROR = "timeout while calling the tax office"


class Contestant(Protocol):
    """One way to get a message back after a delay."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    @property
    def entry_queues(self) -> tuple[str, ...]:
        """Where the upstream publishes, as far as the load has to create it."""

    def absent_because(self) -> str | None:
        """Return why it cannot run here, or None if it can."""

    def running(self, place: Place) -> AbstractAsyncContextManager[list[Program]]:
        """Set it up in `place` and let it work until the block ends."""

    def publication(self, message: Message) -> Publication:
        """Return what the upstream has to publish."""


def request(message: Message) -> Publication:
    """Return the retry request of the contract; its headers are only the upstream's own bookkeeping."""
    body = {
        "message_id": message.message_id,
        "original_payload": PAYLOAD_BASE64,
        "original_queue": ORDERS,
        "error_reason": ERROR,
        "retry_count": message.retry_count,
        "max_retries": 10,
    }
    return Publication(
        REQUESTS,
        key=message.key,
        properties=encode_properties({RETRY_ID: message.key}),
        body=json.dumps(body).encode(),
    )


@dataclass(frozen=True)
class Service:
    """The service itself, one instance or several."""

    settings: Mapping[str, str] = field(default_factory=dict)
    instances: int = 1
    name: str = "retry-scheduler"
    entry_queues: tuple[str, ...] = (REQUESTS,)

    def absent_because(self) -> str | None:
        return None

    @asynccontextmanager
    async def running(self, place: Place) -> AsyncIterator[list[Program]]:
        if self.instances == 0:
            yield []
            return
        fewer = Service(self.settings, self.instances - 1)
        with place.service(self.settings) as program:
            async with fewer.running(place) as programs:
                yield [program, *programs]

    def publication(self, message: Message) -> Publication:
        return request(message)


@dataclass(frozen=True)
class Script:
    """A program of `benchmarks.yardsticks` that takes the contract's requests."""

    name: str
    module: str
    base_delay_ms: int
    python: Path = Path(sys.executable)
    entry_queues: tuple[str, ...] = (REQUESTS,)

    def absent_because(self) -> str | None:
        return None if self.python.exists() else "not installed (make peers)"

    @asynccontextmanager
    async def running(self, place: Place) -> AsyncIterator[list[Program]]:
        place.migrate()
        command: list[str | Path] = [self.python, "-m", f"benchmarks.yardsticks.{self.module}"]
        settings = {BASE_DELAY: str(self.base_delay_ms)}
        with place.program(
            command, settings, lambda log: READY in log.read_text(errors="replace")
        ) as program:
            yield [program]

    def publication(self, message: Message) -> Publication:
        return request(message)


@dataclass(frozen=True)
class Celery(Script):
    """Celery's worker. The upstream writes Celery's task messages by itself, which costs it less."""

    entry_queues: tuple[str, ...] = (celery_message.QUEUE,)

    def publication(self, message: Message) -> Publication:
        return celery_message.task(message)


@dataclass(frozen=True)
class Native:
    """RabbitMQ alone: a queue for each delay, whose messages expire into the consumer's queue."""

    delays_ms: tuple[int, ...]
    name: str = "RabbitMQ TTL + DLX"
    entry_queues: tuple[str, ...] = ()

    def absent_because(self) -> str | None:
        return None

    @asynccontextmanager
    async def running(self, place: Place) -> AsyncIterator[list[Program]]:
        await native.declare_queues(place.url, self.delays_ms)
        yield []

    def publication(self, message: Message) -> Publication:
        return native.delayed(message)


def yardsticks(delays_ms: Mapping[int, int]) -> list[Contestant]:
    """Return what the service is compared with. delays_ms: the delay of each retry_count in use."""
    return [
        Native(tuple(delays_ms.values())),
        Script("bare script", "bare", delays_ms[0]),
        Script("PgQueuer", "pgqueuer_peer", delays_ms[0], PEERS_PYTHON),
        Celery("Celery", "celery_peer", delays_ms[0], PEERS_PYTHON),
    ]
