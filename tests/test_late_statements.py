"""A statement that was given up on may come through all the same: on a slow link, beside its repetition."""

import asyncio
import time
from collections.abc import Sequence
from datetime import timedelta

import pytest

from retry_scheduler.agenda import Agenda
from retry_scheduler.backoff import BackoffPolicy
from retry_scheduler.broker.connection import connect
from retry_scheduler.broker.intake_link import Delivery, IntakeLink
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.consumer import Consumer
from retry_scheduler.database import Database
from retry_scheduler.errors import Unavailable
from retry_scheduler.messages import RetryRequest
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.repository import Attempt, Repository, Stored
from retry_scheduler.supervision import Progress
from tests.factories import make_request
from tests.table import Table

pytest_plugins = ("tests.fixtures",)


class LateRepository(Repository):
    """Its first statement is lost on a slow link, until the next try has asked what is stored."""

    _late: tuple[Sequence[RetryRequest], Sequence[timedelta]] | None = None

    async def store(
        self, requests: Sequence[RetryRequest], delays: Sequence[timedelta]
    ) -> dict[Attempt, Stored]:
        if self._late is None:
            self._late = requests, delays
            raise Unavailable("PostgreSQL", "no answer in time")
        return await super().store(requests, delays)

    async def stored_intakes(self, requests: Sequence[RetryRequest]) -> dict[int, tuple[Attempt, Stored]]:
        found = await super().stored_intakes(requests)
        if self._late is not None:
            await super().store(*self._late)
            self._late = (), ()
        return found


async def test_a_statement_that_comes_through_beside_its_repetition_is_counted_as_what_it_was(
    opened: Database, broker_url: str, table: Table
) -> None:
    await opened.open()
    connection = await connect(broker_url, name="test")
    stop, metrics = asyncio.Event(), Metrics()
    intake = IntakeLink(
        broker_url, queue="q", queues=("q",), prefetch=1, name="test", on_problem=lambda problem: None
    )
    consumer = Consumer(
        intake,
        LateRepository(opened),
        Agenda(),
        metrics,
        policy=BackoffPolicy(base=timedelta(hours=1), cap=timedelta(hours=1), jitter=timedelta(0)),
        own_queues=(),
        default_max_retries=3,
        progress=Progress(),
        on_malformed=stop.set,
    )
    batch = [
        Delivery(
            connection,
            tag,
            redelivered=False,
            properties=encode_properties({}),
            body=make_request(),
            received_s=time.monotonic(),
        )
        for tag in (1, 2, 3)
    ]

    with pytest.raises(Unavailable):
        await consumer.run_once(batch)
    await consumer.run_once(batch, again=True)

    scheduled = metrics.registry.get_sample_value("retries_scheduled_total", {"queue": "orders"})
    assert scheduled == 3
    assert metrics.registry.get_sample_value("retry_duplicates_total", {"kind": "ignored"}) in (None, 0)
    assert await table.statuses() == {"pending": 3}
    await connection.close()
    await opened.close()
