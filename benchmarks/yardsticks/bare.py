"""The service's work on broker and database in the plainest script: what being a product costs is the rest.

The same statements on the same tables, the same façade, the same batch sizes. Left out: checking the
messages (json.loads and nothing more), malformed input, repeated attempts, returned and refused
publications, manual review, leases of others, log, metrics, health, stopping without losing anything.
"""

import asyncio
import base64
import json
import random
import uuid
from datetime import timedelta

import asyncpg

from benchmarks.load import REQUESTS
from benchmarks.yardsticks.common import READY, URL, delay_ms, fail, open_pool, work_until_sigterm
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.hand import CLAIM_BYTES, CLAIM_ROWS
from retry_scheduler.presence import LEASE
from retry_scheduler.repository import LONG_AGO
from retry_scheduler.sql import query

CLAIMERS = 2
IDLE_S = 0.002


async def store(intake: IntakeLink, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
    """Insert what has arrived, then acknowledge it."""
    while True:
        batch = await intake.take()
        bodies = [json.loads(delivery.body) for delivery in batch]
        await pool.fetch(
            query("store_requests"),
            [body["message_id"] for body in bodies],
            [body["retry_count"] for body in bodies],
            [body["max_retries"] for body in bodies],
            [body["original_queue"] for body in bodies],
            [body["error_reason"] for body in bodies],
            [timedelta(milliseconds=delay_ms(body["retry_count"])) for body in bodies],
            [base64.b64decode(body["original_payload"]) for body in bodies],
            [None] * len(bodies),
            [None] * len(bodies),
            [None] * len(bodies),
        )
        intake.acknowledge(batch)


async def redeliver(link: PublishLink, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
    """Claim, publish, complete; an owner of its own, since it may take back what it does not know to hold."""
    owner = uuid.uuid4()
    await pool.fetch(query("join_instances"), owner, "bare")
    while True:
        rows = await pool.fetch(
            query("claim_due"), CLAIM_ROWS, LEASE, owner, CLAIM_BYTES, LONG_AGO, [], CLAIM_BYTES, CLAIM_BYTES
        )
        if not rows:
            await asyncio.sleep(IDLE_S * (1 + random.random()))
            continue
        await link.publish([_publication(row) for row in rows])
        ids = [row["id"] for row in rows]
        claims = [row["claims"] for row in rows]
        await pool.fetch(query("complete"), ids, claims, ["retried"] * len(ids), [None] * len(ids))


def _publication(row: asyncpg.Record) -> Publication:
    key = f"{row['message_id']}:{row['retry_count']}"
    headers = {
        RETRY_ID: key,
        "x-retry-count": row["retry_count"] + 1,
        "x-original-error": row["error_reason"],
    }
    return Publication(
        row["original_queue"],
        key=key,
        properties=encode_properties(headers, message_id=str(row["message_id"])),
        body=row["payload"],
    )


async def main() -> None:
    """Connect, and run one storing and two redelivering loops."""
    pool = await open_pool(1 + CLAIMERS, jit="off")
    intake = IntakeLink(
        URL, queue=REQUESTS, queues=(REQUESTS,), prefetch=1000, name="bare in", on_problem=fail
    )
    link = PublishLink(URL, queues=(REQUESTS,), name="bare out", on_problem=fail)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(link.run())
        tasks.create_task(intake.run())
        while not (link.ready and intake.up):
            await asyncio.sleep(0.01)
        tasks.create_task(store(intake, pool))
        for _ in range(CLAIMERS):
            tasks.create_task(redeliver(link, pool))
        print(READY, flush=True)


if __name__ == "__main__":
    work_until_sigterm(main)
