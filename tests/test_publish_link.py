"""The publishing link on a real broker: each publication's outcome is told once, whenever it comes."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest

from retry_scheduler.broker import publish_link
from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.broker.size_limit import SizeLimit
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.test_hanging_queue import suspended
from tests.test_poison import LIMIT_BYTES, message_size_limit
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)


@pytest.fixture
async def link(broker_url: str) -> AsyncIterator[PublishLink]:
    """A link that is up."""
    made = PublishLink(broker_url, queues=(), name="test", on_problem=lambda problem: None)
    running = asyncio.create_task(made.run())
    await eventually(lambda: made.ready)
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def publication(queue: str, key: str, body: bytes = b"x") -> Publication:
    return Publication(queue, key=key, properties=encode_properties({RETRY_ID: key}), body=body)


async def test_outcomes_come_in_the_order_of_the_publications(link: PublishLink, upstream: Upstream) -> None:
    upstream.declare("orders")
    upstream.declare("full", x_max_length=1, x_overflow="reject-publish")
    upstream.ask(b"in the way", queue="full")

    outcomes = await link.publish(
        [
            publication(queue, f"{n}:0")
            for n, queue in enumerate(["orders", "nowhere", "full", "orders"] * 100)
        ]
    )

    assert outcomes == [Outcome.CONFIRMED, Outcome.RETURNED, Outcome.REFUSED, Outcome.CONFIRMED] * 100
    assert upstream.depth("orders") == 200


async def test_what_cannot_be_encoded_is_unsendable_and_the_others_arrive(
    link: PublishLink, upstream: Upstream
) -> None:
    upstream.declare("orders")

    outcomes = await link.publish(
        [publication("orders", "1:0"), publication("q" * 256, "2:0"), publication("orders", "3:0")]
    )

    assert outcomes == [Outcome.CONFIRMED, Outcome.UNSENDABLE, Outcome.CONFIRMED]
    assert upstream.depth("orders") == 2


async def test_what_is_confirmed_while_the_caller_works_on_a_wave_is_told_in_a_later_one(
    link: PublishLink, upstream: Upstream, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    upstream.declare("quick", "slow")
    waves: list[list[tuple[int, Outcome]]] = []

    with ExitStack() as until_resumed:
        until_resumed.enter_context(suspended(rabbitmq, vhost, "slow"))
        async for wave in link.waves([publication("quick", "1:0"), publication("slow", "2:0")]):
            waves.append(wave)
            if len(waves) == 1:  # settling rows takes time, and the broker goes on meanwhile
                until_resumed.close()
                await eventually(lambda: upstream.depth("slow") == 1)
                await link.round_trip()
                await link.round_trip()

    assert waves == [[(0, Outcome.CONFIRMED)], [(1, Outcome.CONFIRMED)]]


async def test_a_connection_that_nobody_has_asked_is_not_taken_for_silent(
    link: PublishLink,
    upstream: Upstream,
    rabbitmq: PrivateRabbitMQ,
    vhost: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a wave is settled nobody listens, and that may take as long as PostgreSQL is away."""
    monkeypatch.setattr(publish_link, "CONFIRM_TIMEOUT_S", patience_s := 2.0)
    upstream.declare("quick", "slow")
    told: dict[int, Outcome] = {}

    async def settled_at(monotonic_s: float) -> None:
        await eventually(lambda: time.monotonic() > monotonic_s)

    with suspended(rabbitmq, vhost, "slow"):
        async for wave in link.waves([publication("quick", "1:0"), publication("slow", "2:0")]):
            if not told:
                await settled_at(time.monotonic() + 2 * patience_s)
            told |= dict(wave)
        proven = link.proven

    assert told == {0: Outcome.CONFIRMED, 1: Outcome.OVERDUE}
    assert proven  # as it was: another connection would have to prove itself first


async def test_a_link_that_is_not_up_sends_nothing_and_says_so(broker_url: str, upstream: Upstream) -> None:
    upstream.declare("orders")
    link = PublishLink(broker_url, queues=(), name="test", on_problem=lambda problem: None)

    assert await link.publish([publication("orders", "1:0")]) == [Outcome.NOT_SENT]
    assert await link.publish([]) == []
    assert upstream.depth("orders") == 0


async def test_a_batch_that_may_not_go_on_has_the_rest_not_sent(
    link: PublishLink, upstream: Upstream
) -> None:
    """The process may have been frozen, or kept from its beat, when the first of them had been written."""
    upstream.declare("orders")
    may_go_on = iter([True])
    told = [Outcome.UNKNOWN] * 200

    publications = [publication("orders", f"{n}:0") for n in range(len(told))]
    async for wave in link.waves(publications, lambda: next(may_go_on, False)):
        for place, outcome in wave:
            told[place] = outcome

    sent = told.count(Outcome.CONFIRMED)
    assert 0 < sent < len(told)
    assert told == [Outcome.CONFIRMED] * sent + [Outcome.NOT_SENT] * (len(told) - sent)
    assert upstream.depth("orders") == sent


async def test_a_connection_that_dies_leaves_what_was_sent_unknown_and_the_link_comes_back(
    link: PublishLink, upstream: Upstream, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    upstream.declare("slow", "orders")

    with suspended(rabbitmq, vhost, "slow"):
        publishing = asyncio.create_task(link.publish([publication("slow", f"{n}:0") for n in range(10)]))
        await asyncio.to_thread(rabbitmq.ctl, "close_all_connections", "--vhost", vhost, "maintenance")
        outcomes = await publishing
    await eventually(lambda: link.ready)

    assert outcomes == [Outcome.UNKNOWN] * 10
    assert await link.publish([publication("orders", "1:0")]) == [Outcome.CONFIRMED]


class SpeechlessLimit(SizeLimit):
    """As with a broker that says it in words that we do not know."""

    def learn(self, reason: str) -> int | None:
        return None


async def published_beside_one_that_is_too_large(
    broker_url: str, rabbitmq: PrivateRabbitMQ, size_limit: SizeLimit
) -> tuple[list[Outcome], int]:
    """Return the outcomes of the second of four being too large, and how many arrived."""
    with message_size_limit(rabbitmq, LIMIT_BYTES):
        made = PublishLink(
            broker_url,
            queues=("orders",),
            name="test",
            on_problem=lambda problem: None,
            size_limit=size_limit,
        )
        running = asyncio.create_task(made.run())
        await eventually(lambda: made.ready)
        bodies = (b"x", bytes(LIMIT_BYTES + 1), b"x", bytes(LIMIT_BYTES + 1))
        outcomes = await made.publish(
            [publication("orders", f"{n}:0", body) for n, body in enumerate(bodies)]
        )
        await eventually(lambda: made.ready)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return outcomes, len(Upstream(broker_url).take("orders"))


async def test_of_several_the_one_that_is_too_large_is_named_and_what_was_behind_it_is_not_sent(
    broker_url: str, rabbitmq: PrivateRabbitMQ
) -> None:
    outcomes, arrived = await published_beside_one_that_is_too_large(broker_url, rabbitmq, SizeLimit())

    assert outcomes[0] in (Outcome.UNKNOWN, Outcome.CONFIRMED)
    assert outcomes[1:] == [Outcome.TOO_LARGE, Outcome.NOT_SENT, Outcome.NOT_SENT]
    assert arrived == 1


async def test_after_a_channel_was_closed_over_something_unnamed_everything_outstanding_is_suspect(
    broker_url: str, rabbitmq: PrivateRabbitMQ
) -> None:
    outcomes, arrived = await published_beside_one_that_is_too_large(broker_url, rabbitmq, SpeechlessLimit())

    assert outcomes[0] in (Outcome.SUSPECT, Outcome.CONFIRMED)
    assert outcomes[1:] == [Outcome.SUSPECT] * 3
    assert arrived == 1
