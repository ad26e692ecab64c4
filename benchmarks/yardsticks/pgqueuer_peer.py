"""What one would build instead: PgQueuer, with a RabbitMQ consumer in front and a confirmed publish behind.

The consumer stores a whole batch with one enqueue, execute_after being the delay, and acknowledges
it then. The job publishes to the original queue and waits for the confirm; PgQueuer deletes it
afterwards. The AMQP client is our own façade, which is faster than the usual ones, so that what is
compared is the queue.
"""

import asyncio
import base64
import json
from datetime import timedelta
from typing import Any

from pgqueuer import PgQueuer
from pgqueuer.queries import Queries

from benchmarks.load import REQUESTS
from benchmarks.yardsticks.common import READY, URL, delay_ms, fail, open_pool, work_until_sigterm
from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.broker.publish_link import PublishLink

ENTRYPOINT = "redeliver"

# The best of batches from 100 to 1000, 2 to 4 batches in hand or no limit, 4 and 8 connections.
BATCH = 250
IN_HAND = 4 * BATCH
CONNECTIONS = 8


async def store(intake: IntakeLink, queries: Any) -> None:
    """Enqueue what has arrived, then acknowledge it."""
    while True:
        batch = await intake.take()
        delays = [json.loads(delivery.body)["retry_count"] for delivery in batch]
        await queries.enqueue(
            [ENTRYPOINT] * len(batch),
            [delivery.body for delivery in batch],
            [0] * len(batch),
            [timedelta(milliseconds=delay_ms(retry_count)) for retry_count in delays],
        )
        intake.acknowledge(batch)


async def redeliver(link: PublishLink, job: Any) -> None:
    """Publish one job's message and wait for the confirm."""
    body = json.loads(job.payload)
    key = f"{body['message_id']}:{body['retry_count']}"
    headers = {
        RETRY_ID: key,
        "x-retry-count": body["retry_count"] + 1,
        "x-original-error": body["error_reason"],
    }
    publication = Publication(
        body["original_queue"],
        key=key,
        properties=encode_properties(headers, message_id=body["message_id"]),
        body=base64.b64decode(body["original_payload"]),
    )
    (outcome,) = await link.publish([publication])
    if outcome is not Outcome.CONFIRMED:
        raise RuntimeError(outcome.value)


async def main() -> None:
    """Connect, install PgQueuer's tables, and run."""
    pool = await open_pool(CONNECTIONS)
    queuer = PgQueuer.from_asyncpg_pool(pool)
    queries = Queries(queuer.connection)
    await queries.install()
    intake = IntakeLink(
        URL, queue=REQUESTS, queues=(REQUESTS,), prefetch=1000, name="pgqueuer in", on_problem=fail
    )
    link = PublishLink(URL, queues=(REQUESTS,), name="pgqueuer out", on_problem=fail)

    async def handle(job: Any) -> None:
        await redeliver(link, job)

    queuer.entrypoint(ENTRYPOINT, accepts_context=False)(handle)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(link.run())
        tasks.create_task(intake.run())
        while not (link.ready and intake.up):
            await asyncio.sleep(0.01)
        tasks.create_task(store(intake, queries))
        tasks.create_task(queuer.run(batch_size=BATCH, max_concurrent_tasks=IN_HAND))
        print(READY, flush=True)


if __name__ == "__main__":
    work_until_sigterm(main)
