"""The load: an upstream that publishes retry requests, and the consumer that the retries come back to."""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.properties import encode_properties, text_headers
from retry_scheduler.broker.publish_link import RETRY_ID, Publication, PublishLink
from retry_scheduler.errors import Unavailable

ORDERS = "bench.orders"
PAYLOAD_BYTES = 1024
_BATCH = 500


class Load:
    """One upstream and one consumer on the same broker. `arrivals`: x-retry-id -> wall clock, seconds."""

    def __init__(self, url: str) -> None:
        self.publish_link = PublishLink(
            url, queues=(ORDERS, "retry.scheduled"), name="bench upstream", on_problem=_fail
        )
        self.intake_link = IntakeLink(
            url, queue=ORDERS, queues=(ORDERS,), prefetch=2000, name="bench consumer", on_problem=_fail
        )
        self.arrivals: dict[str, float] = {}
        self.repeated = 0
        self._payload = base64.b64encode(bytes(range(256)) * (PAYLOAD_BYTES // 256)).decode()

    async def send(
        self, count: int, *, rate_per_s: float | None = None, retry_counts: tuple[int, ...] = (0,)
    ) -> None:
        """Publish `count` requests, confirmed; as fast as the broker takes them, or at a steady rate.

        retry_counts: taken in turn, so that delays of different lengths mix.
        """
        began = time.monotonic()
        sent = 0
        while sent < count:
            due = (
                count if rate_per_s is None else min(count, int((time.monotonic() - began) * rate_per_s) + 1)
            )
            run = min(due - sent, _BATCH)
            if run <= 0:
                await asyncio.sleep(0.001)
                continue
            requests = [
                self._request(retry_counts[(sent + place) % len(retry_counts)]) for place in range(run)
            ]
            outcomes = await self.publish_link.publish(requests)
            if any(outcome is not Outcome.CONFIRMED for outcome in outcomes):
                raise RuntimeError("the broker did not confirm a request")
            sent += run

    async def receive(self, count: int) -> None:
        """Take retries until `count` different ones have arrived."""
        while len(self.arrivals) < count:
            batch = await self.intake_link.take()
            now = time.time()
            for delivery in batch:
                key = text_headers(delivery.properties, (RETRY_ID,))[RETRY_ID]
                if self.arrivals.setdefault(key, now) is not now:
                    self.repeated += 1
            self.intake_link.acknowledge(batch)

    def _request(self, retry_count: int) -> Publication:
        body = {
            "message_id": str(uuid.uuid4()),
            "original_payload": self._payload,
            "original_queue": ORDERS,
            "error_reason": "timeout while calling the tax office",
            "retry_count": retry_count,
            "max_retries": 10,
        }
        return Publication(
            "retry.scheduled",
            key=str(body["message_id"]),
            properties=encode_properties({RETRY_ID: str(body["message_id"])}),
            body=json.dumps(body).encode(),
        )


@asynccontextmanager
async def load(url: str) -> AsyncIterator[Load]:
    """Connect both sides, and disconnect afterwards."""
    made = Load(url)
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
