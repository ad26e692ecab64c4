"""The load: an upstream that publishes, and the consumer that the retries come back to.

Both live in the benchmark's own process and are the same for everybody who is measured.
"""

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count as count_up
from itertools import islice

from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.properties import text_headers
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.errors import Unavailable

REQUESTS = "retry.scheduled"
ORDERS = "bench.orders"
PAYLOAD = bytes(range(256)) * 4
PAYLOAD_BASE64 = base64.b64encode(PAYLOAD).decode()

# An upstream with one batch at a time would wait for the broker's disk between two; four keep it busy.
_BATCH = 250
_BATCHES_OUT = 4

# Nothing has arrived for so long: something is lost.
_SILENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Message:
    """One failed message on its way in. key: the x-retry-id under which its retry must come back."""

    message_id: str
    retry_count: int
    delay_ms: int

    @property
    def key(self) -> str:
        return f"{self.message_id}:{self.retry_count}"


def messages(delays_ms: Mapping[int, int]) -> Iterator[Message]:
    """Yield messages without end. delays_ms: the delay of each retry_count; they take turns."""
    turns = list(delays_ms.items())
    for number in count_up():
        retry_count, delay_ms = turns[number % len(turns)]
        yield Message(str(uuid.uuid4()), retry_count, delay_ms)


class Load:
    """One upstream and one consumer on the same broker. Times are wall clock seconds by key."""

    def __init__(self, url: str, entry_queues: tuple[str, ...]) -> None:
        """entry_queues: where the upstream publishes; created, durable, where they are missing."""
        self.publish_link = PublishLink(
            url, queues=(ORDERS, *entry_queues), name="bench upstream", on_problem=_fail
        )
        self.intake_link = IntakeLink(
            url, queue=ORDERS, queues=(ORDERS,), prefetch=2000, name="bench consumer", on_problem=_fail
        )
        self.sent: dict[str, tuple[float, float]] = {}  # time, and delay in seconds
        self.arrivals: dict[str, float] = {}
        self.repeated = 0

    async def send(
        self,
        made: Iterable[tuple[Message, Publication]],
        *,
        rate_per_s: float | None = None,
    ) -> None:
        """Publish all, confirmed; as fast as the broker takes them, or at a steady rate."""
        source = iter(made)
        room = asyncio.Semaphore(_BATCHES_OUT)
        began = time.monotonic()
        sent = 0
        async with asyncio.TaskGroup() as publishing:
            while True:
                wanted = _BATCH
                if rate_per_s is not None:
                    wanted = min(wanted, int((time.monotonic() - began) * rate_per_s) + 1 - sent)
                if wanted <= 0:
                    await asyncio.sleep(0.001)
                    continue
                await room.acquire()
                batch = list(islice(source, wanted))
                if not batch:
                    return
                now = time.time()
                for message, _ in batch:
                    self.sent[message.key] = (now, message.delay_ms / 1000)
                publishing.create_task(self._publish([publication for _, publication in batch], room))
                sent += len(batch)

    async def receive(self, count: int) -> None:
        """Take retries until `count` different ones have arrived. Raises RuntimeError if they stop coming."""
        while len(self.arrivals) < count:
            try:
                async with asyncio.timeout(_SILENCE_S):
                    batch = await self.intake_link.take()
            except TimeoutError:
                missing = count - len(self.arrivals)
                raise RuntimeError(f"{missing} of {count} retries did not arrive") from None
            now = time.time()
            for delivery in batch:
                key = text_headers(delivery.properties, (RETRY_ID,))[RETRY_ID]
                if self.arrivals.setdefault(key, now) is not now:
                    self.repeated += 1
            self.intake_link.acknowledge(batch)

    async def run(
        self,
        count: int,
        delays_ms: Mapping[int, int],
        publication: Callable[[Message], Publication],
        *,
        rate_per_s: float | None = None,
        until: int | None = None,
    ) -> float:
        """Send `count` messages and return the seconds from the first publish to the last arrival.

        until: how many arrivals to wait for, where this is not the first call; `count` otherwise.
        """
        chosen = islice(messages(delays_ms), count)
        made: Iterable[tuple[Message, Publication]] = ((each, publication(each)) for each in chosen)
        if rate_per_s is None:
            made = list(made)  # building them is not part of what is measured
        began = time.monotonic()
        async with asyncio.TaskGroup() as sides:
            sides.create_task(self.send(made, rate_per_s=rate_per_s))
            sides.create_task(self.receive(until or count))
        return time.monotonic() - began

    def lateness_ms(self) -> list[float]:
        """Return arrival minus (sending plus delay) of all that arrived, in ms, in order of sending."""
        return [
            (self.arrivals[key] - sent - delay) * 1000
            for key, (sent, delay) in self.sent.items()
            if key in self.arrivals
        ]

    async def _publish(self, batch: list[Publication], room: asyncio.Semaphore) -> None:
        try:
            outcomes = await self.publish_link.publish(batch)
        finally:
            room.release()
        if any(outcome is not Outcome.CONFIRMED for outcome in outcomes):
            raise RuntimeError("the broker did not confirm a message of the upstream")


@asynccontextmanager
async def load(url: str, *entry_queues: str) -> AsyncIterator[Load]:
    """Connect both sides, and disconnect afterwards."""
    made = Load(url, entry_queues)
    links = [asyncio.create_task(link.run()) for link in (made.publish_link, made.intake_link)]
    try:
        while not (made.publish_link.ready and made.intake_link.up):
            await asyncio.sleep(0.01)
        yield made
    finally:
        for task in links:
            task.cancel()
        await asyncio.gather(*links, return_exceptions=True)


def _fail(problem: Unavailable) -> None:
    print(f"bench: {problem}")
