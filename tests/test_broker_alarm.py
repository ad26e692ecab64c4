"""A broker with an alarm takes no messages for a while: a state to wait out, not a connection to give up."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.factories import make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# Longer than the wait for a confirm, 10 s: the alarm must outlast it to prove anything.
LONGER_THAN_A_CONFIRM_S = 12


@contextmanager
def disk_alarm(rabbitmq: PrivateRabbitMQ) -> Iterator[None]:
    rabbitmq.ctl("set_disk_free_limit", "10000GB")
    try:
        yield
    finally:
        rabbitmq.ctl("set_disk_free_limit", "50MB")


async def test_an_alarm_that_outlasts_a_confirm_delays_everything_and_repeats_nothing(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> None:
    service = await start_service(BASE_DELAY_MS="3000", MAX_DELAY_MS="3000")
    upstream.declare("orders")
    ids = [new_id() for _ in range(300)]
    upstream.ask_for_many(
        [make_request(message_id=message_id, original_queue="orders") for message_id in ids]
    )
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == len(ids))

    with disk_alarm(rabbitmq):
        await eventually(
            lambda: service.metrics().value("retry_oldest_due_seconds") > LONGER_THAN_A_CONFIRM_S,
            within=timedelta(seconds=30),
        )
        ready, health = service.ready(), service.health()
        busy_s = service.metrics().value("process_cpu_seconds_total")
    await eventually(table.settled, within=timedelta(seconds=5))

    assert (ready.status, ready.body["reason"]) == (503, "blocked")
    assert health.status == 503
    assert "blocked" in health.body["checks"]["rabbitmq"]["problem"]
    assert busy_s < 5, "a hot loop: the service had nothing to do but wait"
    assert sorted(message.message_id for message in upstream.take("orders")) == sorted(ids)
    metrics = service.metrics()
    assert metrics.value("retry_publications_unknown_total") == 0
    assert metrics.value("retry_reconnects_total") == 0
