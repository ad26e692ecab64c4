"""Whether a message was given to another instance meanwhile is for the broker to say: no guess without it."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

import pytest

from retry_scheduler.broker.connection import Connection
from retry_scheduler.broker.intake_link import Delivery
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.errors import Unavailable
from retry_scheduler.messages import parse_request
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.repeated_attempts import Candidate, RepeatedAttempts
from retry_scheduler.repository import Attempt, AttemptState, Repository
from tests.factories import make_request


class Silent:
    """A connection that does not answer, and has ended or not."""

    def __init__(self, *, ended: bool) -> None:
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if ended:
            self.closed.set_result("the end")

    async def round_trip(self) -> None:
        raise Unavailable("RabbitMQ", "no answer in time")


class JustExecuted:
    """A repository in which every attempt was stored a moment ago, and executed."""

    async def attempt_states(self, attempts: Sequence[Attempt]) -> dict[Attempt, AttemptState]:
        return {attempt: AttemptState("retried", 0, 0.0, False, False) for attempt in attempts}


def repeated(connection: Silent) -> Candidate:
    body = make_request()
    delivery = Delivery(
        cast(Connection, connection),
        1,
        redelivered=False,
        properties=encode_properties({}),
        body=body,
        received_s=time.monotonic() - 1,
    )
    return Candidate(parse_request(body, own_queues=(), default_max_retries=3), delivery)


async def test_while_the_broker_does_not_answer_nothing_is_decided() -> None:
    candidate = repeated(Silent(ended=False))

    with pytest.raises(Unavailable):
        await RepeatedAttempts(cast(Repository, JustExecuted()), Metrics()).onward([candidate])

    assert not candidate.delivery.done


async def test_what_came_over_a_connection_that_has_ended_was_given_to_the_other_instance() -> None:
    candidate = repeated(Silent(ended=True))

    decided: Any = await RepeatedAttempts(cast(Repository, JustExecuted()), Metrics()).onward([candidate])

    assert decided == ([], {})
    assert candidate.delivery.done
