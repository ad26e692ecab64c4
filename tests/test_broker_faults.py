"""What RabbitMQ refuses at run time: logins, rights, queues, and waiting for an acknowledgement.

Each fault is provoked under load, and costs no message, no hot loop, and no more than 5 s after its end.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, time

import pytest

from chaos.proxy import proxies
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.contract import HEALED_WITHIN_S
from tests.factories import make_request, new_id
from tests.scene import Scene
from tests.service_process import MakeService, StartService
from tests.table import Table
from tests.under_load import INTAKE_LOST, Report, Watch, first_retry_s, through
from tests.upstream import RETRY_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

HEALED_WITHIN = timedelta(seconds=HEALED_WITHIN_S)

# To tell pauses that grow from a loop that runs hot.
LONG_ENOUGH_S = 4


@dataclass(frozen=True)
class Broker:
    """What an operator of the broker may do. user: the service's, with the password `before`."""

    rabbitmq: PrivateRabbitMQ
    vhost: str
    user: str
    upstream: Upstream

    def close_connections(self) -> None:
        self.rabbitmq.ctl("close_all_connections", "--vhost", self.vhost, "maintenance")

    def change_password(self) -> None:
        self.rabbitmq.ctl("change_password", self.user, "after")
        self.close_connections()

    def restore_password(self) -> None:
        self.rabbitmq.ctl("change_password", self.user, "before")

    def clear_permissions(self) -> None:
        self.rabbitmq.ctl("clear_permissions", "-p", self.vhost, self.user)
        self.close_connections()

    def forbid_writing(self) -> None:
        self.rabbitmq.ctl("set_permissions", "-p", self.vhost, self.user, ".*", "", ".*")

    def forbid_reading(self) -> None:
        self.rabbitmq.ctl("set_permissions", "-p", self.vhost, self.user, ".*", ".*", "")
        self.close_connections()

    def restore_permissions(self) -> None:
        self.rabbitmq.ctl("set_permissions", "-p", self.vhost, self.user, ".*", ".*", ".*")

    def forbid_connections(self) -> None:
        self.rabbitmq.ctl("set_vhost_limits", "-p", self.vhost, '{"max-connections": 0}')
        self.close_connections()

    def allow_connections(self) -> None:
        self.rabbitmq.ctl("clear_vhost_limits", "-p", self.vhost)

    def delete_vhost(self) -> None:
        self.rabbitmq.delete_vhost(self.vhost)

    def create_vhost(self) -> None:
        self.rabbitmq.add_vhost(self.vhost)
        self.restore_permissions()
        self.upstream.declare("orders", RETRY_QUEUE)


@pytest.fixture
def broker(rabbitmq: PrivateRabbitMQ, vhost: str, upstream: Upstream) -> Iterator[Broker]:
    """The broker with a user for the service alone, and the queue `orders`."""
    broker = Broker(rabbitmq, vhost, f"user-of-{vhost}", upstream)
    rabbitmq.ctl("add_user", broker.user, "before")
    broker.restore_permissions()
    upstream.declare("orders")
    yield broker
    rabbitmq.ctl("delete_user", broker.user)


@pytest.mark.parametrize(
    ("breaking", "mending", "problem"),
    [
        pytest.param(
            Broker.change_password, Broker.restore_password, "ACCESS_REFUSED", id="password changed"
        ),
        pytest.param(
            Broker.clear_permissions, Broker.restore_permissions, "access to vhost", id="no permissions"
        ),
        pytest.param(
            Broker.forbid_writing, Broker.restore_permissions, "403 ACCESS_REFUSED", id="writing forbidden"
        ),
        pytest.param(
            Broker.forbid_reading, Broker.restore_permissions, "403 ACCESS_REFUSED", id="reading forbidden"
        ),
        pytest.param(
            Broker.forbid_connections, Broker.allow_connections, "connection limit", id="connection limit"
        ),
        pytest.param(Broker.delete_vhost, Broker.create_vhost, "vhost", id="virtual host deleted"),
    ],
)
async def test_what_the_broker_refuses_at_run_time_is_named_and_waited_for_without_a_flood(
    start_service: StartService,
    broker: Broker,
    table: Table,
    record_property: Report,
    breaking: Callable[[Broker], None],
    mending: Callable[[Broker], None],
    problem: str,
) -> None:
    address = f"amqp://{broker.user}:before@{broker.rabbitmq.host}:{broker.rabbitmq.port}/{broker.vhost}"
    service = await start_service(RABBITMQ_URL=address)
    ids = [new_id() for _ in range(100)]
    broker.upstream.ask_for_many(
        [make_request(message_id=message_id, retry_after_ms=2000) for message_id in ids]
    )
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == len(ids))

    watch = Watch(service)
    breaking(broker)
    await eventually(lambda: problem in watch.said(), within=timedelta(seconds=10))
    complained = watch.complaints().total()
    # Without pauses between the tries there would be hundreds in this time.
    await eventually(
        lambda: watch.complaints().total() >= complained + 3 and watch.lasted_s > LONG_ENOUGH_S,
        within=timedelta(seconds=30),
    )
    watch.assert_calm()
    health = service.health()
    mending(broker)
    mended_at = time()
    ids.append(new_id())

    def asked() -> bool:
        """A new virtual host has no queue before the service is back."""
        broker.upstream.ask(make_request(message_id=ids[-1]))
        return True

    await eventually(asked, within=HEALED_WITHIN)
    recovered_s = await first_retry_s(table, mended_at)
    await broker.upstream.filled("orders", len(ids))
    await eventually(table.settled, within=timedelta(seconds=10))
    messages = broker.upstream.take("orders")  # with the duplicates of what had no confirm

    record_property("first_retry_after_mending_s", recovered_s)
    assert health.status == 503 or breaking is Broker.forbid_writing
    assert recovered_s <= HEALED_WITHIN_S
    assert {message.message_id for message in messages} == set(ids)
    await eventually(lambda: service.ready().status == 200, within=HEALED_WITHIN)


@contextmanager
def held_exclusively(upstream: Upstream) -> Iterator[None]:
    """A stranger's connection owns the retry queue: nobody else may even look at it."""
    with upstream.channel() as channel:
        channel.queue_delete(RETRY_QUEUE)
        channel.queue_declare(RETRY_QUEUE, exclusive=True)
        yield


@contextmanager
def consumed_exclusively(upstream: Upstream) -> Iterator[None]:
    """A stranger is the only one who may consume the retry queue."""
    with upstream.channel() as channel:
        channel.basic_consume(RETRY_QUEUE, lambda *_: None, exclusive=True)
        yield


@pytest.mark.parametrize("taken", [held_exclusively, consumed_exclusively])
async def test_a_retry_queue_that_a_stranger_keeps_to_himself_is_waited_for(
    make_service: MakeService,
    upstream: Upstream,
    record_property: Report,
    taken: Callable[[Upstream], Iterator[None]],
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    service = make_service()

    with taken(upstream):  # type: ignore[attr-defined]
        service.start()
        await eventually(lambda: service.log_events(INTAKE_LOST), within=timedelta(seconds=20))
        watch = Watch(service)
        await eventually(
            lambda: watch.complaints()[INTAKE_LOST] >= 3 and watch.lasted_s > LONG_ENOUGH_S,
            within=timedelta(seconds=15),
        )
        watch.assert_calm()
        ready, said = service.ready(), watch.said()
    began = monotonic()
    await service.wait_until_ready(within=HEALED_WITHIN)
    upstream.ask(make_request())
    await upstream.receive("orders", 1)

    record_property("ready_after_s", round(monotonic() - began, 2))
    assert ready.status == 503
    assert "405 RESOURCE_LOCKED" in said or "403 ACCESS_REFUSED" in said


async def test_a_quorum_retry_queue_with_a_delivery_limit_loses_nothing_when_connections_break(
    scene: Scene,
) -> None:
    scene.upstream.declare(RETRY_QUEUE, x_queue_type="quorum", x_delivery_limit=20)
    async with scene.under_load(behind="RabbitMQ") as flow:
        for _ in range(5):
            flow.link.reset()
            await flow.goes_on(count=40)
        await flow.accounts()


@contextmanager
def short_consumer_timeout(rabbitmq: PrivateRabbitMQ, seconds: int) -> Iterator[None]:
    """Connections opened meanwhile must acknowledge within `seconds`; normally within half an hour."""
    setting = (
        "application:set_env(rabbit, consumer_timeout, {}),"
        " application:set_env(rabbit, channel_tick_interval, {})."
    )
    rabbitmq.eval(setting.format(seconds * 1000, 1000))
    try:
        yield
    finally:
        rabbitmq.eval(setting.format(1_800_000, 60_000))


@pytest.mark.timeout(120)
async def test_postgresql_away_for_longer_than_the_broker_waits_for_an_acknowledgement_is_no_requeue_loop(
    scene: Scene, record_property: Report
) -> None:
    with short_consumer_timeout(scene.rabbitmq, 4):
        async with scene.under_load(behind="PostgreSQL", per_second=100) as flow:
            watch = Watch(flow.service)
            flow.link.refuse()
            # The broker takes its messages back. Asked for again, they would come and go every 4 s.
            await eventually(
                lambda: watch.complaints()[INTAKE_LOST],
                within=timedelta(seconds=20),
                every=timedelta(milliseconds=200),
            )
            await watch.stays_calm_until(watch.lasted_s + 10)
            said, lost = watch.said(), watch.complaints()[INTAKE_LOST]
            health = flow.service.health()
            flow.link.heal()
            healed_at = time()
            recovered_s = await flow.first_retry_s(healed_at)
            await flow.goes_on()
            await flow.accounts(exactly_once=True)

    record_property("first_retry_after_return_s", recovered_s)
    assert "acknowledgement" in said and "timed out" in said
    assert lost == 1
    assert health.body["checks"]["rabbitmq"]["status"] == "up"
    assert recovered_s <= HEALED_WITHIN_S


@pytest.mark.timeout(90)
async def test_connections_that_break_while_postgresql_is_away_do_not_fill_the_memory(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    vhost: str,
    record_property: Report,
) -> None:
    """Each new connection brings the same messages again; keeping them all would grow without end."""
    upstream.declare("orders", RETRY_QUEUE)
    with proxies(rabbitmq.port, table.database.port) as (to_rabbitmq, to_postgres):
        service = await start_service(
            RABBITMQ_PREFETCH="200",
            RABBITMQ_URL=through(to_rabbitmq, vhost),
            POSTGRES_PORT=str(to_postgres.port),
        )
        to_postgres.refuse()
        idle = service.rss_bytes
        ids = [new_id() for _ in range(200)]
        payload = "A" * 100_000
        upstream.ask_for_many(
            [make_request(message_id=message_id, original_payload=payload) for message_id in ids]
        )
        await eventually(lambda: service.rss_bytes > idle + 0.9 * len(ids) * len(payload))
        before = service.rss_bytes
        for _ in range(12):
            tries = to_rabbitmq.accepted
            to_rabbitmq.reset()
            await eventually(lambda: to_rabbitmq.accepted >= tries + 2)  # noqa: B023
            await asyncio.sleep(0.7)  # noqa: TID251  in which nothing of it must come again
        after = service.rss_bytes
        health = service.health()
        to_postgres.heal()
        ids.append(new_id())  # consuming goes on, too
        upstream.ask(make_request(message_id=ids[-1]))
        messages = await upstream.receive("orders", len(ids), within=timedelta(seconds=20))
        await eventually(table.settled)

    record_property("grown_mib", (after - before) // 2**20)
    assert after - before < 100 * 2**20
    assert health.body["checks"]["rabbitmq"]["status"] == "up"
    assert {message.message_id for message in messages} == set(ids)
