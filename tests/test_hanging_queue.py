"""A queue that takes messages and confirms none, as one without a majority: only its own may wait."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.factories import make_request, new_id
from tests.service_process import ServiceProcess, StartService
from tests.table import Table
from tests.upstream import Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# After ten seconds without a confirm the service gives up waiting for it.
A_CONFIRM_IS_OVERDUE_WITHIN = timedelta(seconds=20)

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


async def test_a_queue_that_confirms_nothing_delays_no_other_and_gets_its_messages_when_it_is_back(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    service = await start_service()
    upstream.declare("orders", "hanging")
    stuck = [new_id() for _ in range(5)]
    others = ((message_id, make_request(message_id=message_id)) for message_id in iter(new_id, ""))

    with suspended(rabbitmq, vhost, "hanging"):
        upstream.ask_for_many(
            [make_request(message_id=message_id, original_queue="hanging") for message_id in stuck]
        )
        with Load(upstream, others, per_second=100) as load:
            await eventually(
                lambda: service.metrics().value("retry_publications_unknown_total") == len(stuck),
                within=A_CONFIRM_IS_OVERDUE_WITHIN,
            )
        meanwhile = await table.fetch(
            "SELECT status, retry_count, last_error FROM retry_queue WHERE original_queue = 'hanging'"
        )
        await eventually(lambda: executed(service) == len(load.accepted))
        slowest = await table.value(
            "SELECT max(finished_at - next_retry_at) FROM retry_queue WHERE original_queue = 'orders'"
        )
    await eventually(table.settled)

    assert [tuple(row) for row in meanwhile] == [("pending", 0, "overdue")] * len(stuck)
    assert len(load.accepted) > 500
    assert slowest < THE_PROMISE
    assert Counter(message.message_id for message in upstream.take("orders")) == dict.fromkeys(
        load.accepted, 1
    )
    assert {message.message_id for message in upstream.take("hanging")} == set(stuck)
    assert service.metrics().value("retry_reconnects_total") == 0


def executed(service: ServiceProcess) -> float:
    return service.metrics().value("retries_executed_total", queue="orders", status="success")
