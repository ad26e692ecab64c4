"""A queue that takes messages and confirms none, as one without a majority: only its own may wait."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import cycle

import pytest

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.hand import CLAIM_ROWS
from retry_scheduler.observability.events import QUEUE_CONFIRMS, QUEUE_HANGS
from tests.factories import make_request, new_id
from tests.service_process import ServiceProcess, StartService
from tests.table import Table
from tests.upstream import Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

A_CONFIRM_IS_OVERDUE_WITHIN = timedelta(seconds=20)

# A confirm is overdue after ten seconds, and a row that is held is looked at again after seconds.
EACH_IS_LOOKED_AT_AGAIN_WITHIN = timedelta(seconds=90)
HELD_NO_LONGER_THAN = timedelta(seconds=30)

THE_PROMISE = timedelta(seconds=5)


@contextmanager
def suspended(rabbitmq: PrivateRabbitMQ, vhost: str, queue: str) -> Iterator[None]:
    process = (
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)), '
        "Pid = amqqueue:get_pid(Q), "
    )
    rabbitmq.eval(process + "sys:suspend(Pid).")
    try:
        yield
    finally:
        rabbitmq.eval(process + "sys:resume(Pid).")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("others_per_second", [100, 0], ids=["beside other traffic", "alone"])
async def test_a_queue_that_confirms_nothing_delays_no_other_and_gets_each_message_once_when_it_is_back(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    vhost: str,
    others_per_second: int,
) -> None:
    """More messages than are held in hand, and the queue is away for longer than several tries take."""
    service = await start_service(RABBITMQ_PREFETCH="100")
    upstream.declare("orders", "hanging", "alive")
    stuck = [new_id() for _ in range(600)]
    others = ((message_id, make_request(message_id=message_id)) for message_id in iter(new_id, ""))

    with suspended(rabbitmq, vhost, "hanging"):
        upstream.ask_for_many(
            [make_request(message_id=message_id, original_queue="hanging") for message_id in stuck]
        )
        load = Load(upstream, others, per_second=others_per_second or 1)
        with load if others_per_second else nullcontext():
            await eventually(
                lambda: table.value(
                    "SELECT min(claims) >= 3 FROM retry_queue WHERE original_queue = 'hanging'"
                ),
                within=EACH_IS_LOOKED_AT_AGAIN_WITHIN,
            )
        upstream.ask(make_request(original_queue="alive"))
        await upstream.receive("alive", 1)
        meanwhile = await table.value(
            "SELECT count(*) FROM retry_queue"
            " WHERE original_queue = 'hanging' AND status = 'pending' AND last_error IN ('overdue', 'held')"
        )
        await eventually(lambda: executed(service) == len(load.accepted))
        slowest = await table.value(
            "SELECT max(finished_at - next_retry_at) FROM retry_queue WHERE original_queue = 'orders'"
        )
    await eventually(table.settled, within=HELD_NO_LONGER_THAN)

    assert meanwhile == len(stuck)
    assert len(load.accepted) >= 10 * others_per_second
    assert slowest is None or slowest < THE_PROMISE
    assert Counter(message.message_id for message in upstream.take("orders")) == dict.fromkeys(
        load.accepted, 1
    )
    assert Counter(message.message_id for message in upstream.take("hanging")) == dict.fromkeys(stuck, 1)
    assert service.metrics().value("retry_reconnects_total") == 0
    assert [event["queue"] for event in service.log_events(QUEUE_HANGS)] == ["hanging"]
    assert [event["queue"] for event in service.log_events(QUEUE_CONFIRMS)] == ["hanging"]


async def test_a_queue_that_confirms_nothing_and_gets_more_and_more_keeps_no_other_waiting(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    """So many come within the ten seconds until a confirm is overdue that they would fill the hand."""
    service = await start_service(RABBITMQ_PREFETCH="100")
    upstream.declare("orders", "hanging")
    queues: dict[str, str] = {}

    def by_turns() -> Iterator[tuple[str, bytes]]:
        for queue in cycle(("orders", "hanging", "hanging", "hanging")):
            message_id = new_id()
            queues[message_id] = queue
            yield message_id, make_request(message_id=message_id, original_queue=queue)

    with suspended(rabbitmq, vhost, "hanging"):
        with Load(upstream, by_turns(), per_second=150) as load:
            await eventually(
                lambda: service.metrics().value("retry_publications_unknown_total") > 0,
                within=A_CONFIRM_IS_OVERDUE_WITHIN,
            )
        orders = [message_id for message_id in load.accepted if queues[message_id] == "orders"]
        await eventually(lambda: executed(service) == len(orders))
        slowest = await table.value(
            "SELECT max(finished_at - next_retry_at) FROM retry_queue WHERE original_queue = 'orders'"
        )
    await eventually(table.settled, within=HELD_NO_LONGER_THAN)

    assert len(load.accepted) - len(orders) > CLAIM_ROWS
    assert slowest < THE_PROMISE
    hanging = set(load.accepted) - set(orders)
    assert Counter(message.message_id for message in upstream.take("orders")) == dict.fromkeys(orders, 1)
    assert Counter(message.message_id for message in upstream.take("hanging")) == dict.fromkeys(hanging, 1)
    assert service.metrics().value("retry_reconnects_total") == 0


def executed(service: ServiceProcess) -> float:
    return service.metrics().value("retries_executed_total", queue="orders", status="success")
