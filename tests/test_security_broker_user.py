"""A broker's user with the rights of docs/security.md: enough for all the work; what is missing is told."""

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from urllib.parse import quote

import pytest

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.broker_users import broker_user, grant
from tests.command import OK, UNAVAILABLE, call
from tests.factories import make_request
from tests.servers import random_name
from tests.service_process import PROJECT, MakeService, StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

PASSWORD = "pass/word of the broker"
LET_QUEUES_ALONE = "^$"

AddUser = Callable[[dict[str, str]], tuple[str, str]]


def documented_rights() -> dict[str, str]:
    """Return the three patterns of the page's command."""
    page = (PROJECT / "docs" / "security.md").read_text()
    (command,) = re.findall(r"^rabbitmqctl set_permissions .*$", page, flags=re.MULTILINE)
    configure, write, read = shlex.split(command)[-3:]
    return {"configure": configure, "write": write, "read": read}


@pytest.fixture
def add_user(rabbitmq: PrivateRabbitMQ, vhost: str) -> Iterator[AddUser]:
    """Add users with given rights in the test's virtual host; returns name and address."""
    with ExitStack() as users:

        def add(rights: dict[str, str]) -> tuple[str, str]:
            name = random_name()
            users.enter_context(broker_user(rabbitmq, vhost, name, PASSWORD, **rights))
            url = f"amqp://{name}:{quote(PASSWORD, safe='')}@{rabbitmq.host}:{rabbitmq.port}/{vhost}"
            return name, url

        yield add


async def test_the_documented_rights_are_enough_to_create_the_queues_and_do_all_the_work(
    start_service: StartService, upstream: Upstream, table: Table, add_user: AddUser
) -> None:
    _, url = add_user(documented_rights())
    service = await start_service(RABBITMQ_URL=url, MAX_PUBLISH_FAILURES="2")
    upstream.declare("orders")

    upstream.ask(
        make_request(),
        make_request(max_retries=0),
        make_request(original_queue="nowhere"),
        b"no JSON",
    )
    await upstream.receive("orders", 1)
    await upstream.receive(REVIEW_QUEUE, 3)
    upstream.delete(REVIEW_QUEUE)  # the service creates it again
    upstream.ask(make_request(max_retries=0))
    await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)

    assert service.health().status == 200
    assert call("check", **service.environment).returncode == OK
    assert [event for event in service.log_events() if "ACCESS_REFUSED" in str(event)] == []
    assert await service.stop() == 0


async def test_where_the_queues_exist_no_right_to_configure_is_needed(
    start_service: StartService, upstream: Upstream, add_user: AddUser
) -> None:
    upstream.declare(RETRY_QUEUE, REVIEW_QUEUE, "orders")
    _, url = add_user(documented_rights() | {"configure": LET_QUEUES_ALONE})

    await start_service(RABBITMQ_URL=url)
    upstream.ask(make_request(), make_request(max_retries=0))

    await upstream.receive("orders", 1)
    await upstream.receive(REVIEW_QUEUE, 1)


@pytest.mark.parametrize(
    ("right", "event", "words"),
    [
        ("configure", "Failed to connect to RabbitMQ", "access to queue 'retry.scheduled'"),
        ("write", "Failed to connect to RabbitMQ", "access to exchange 'amq.default'"),
        ("read", "Failed to start RabbitMQ consumer", "access to queue 'retry.scheduled'"),
    ],
)
async def test_no_right_can_be_spared_and_the_one_that_is_missing_is_named_until_it_is_given(
    make_service: MakeService,
    upstream: Upstream,
    rabbitmq: PrivateRabbitMQ,
    vhost: str,
    add_user: AddUser,
    right: str,
    event: str,
    words: str,
) -> None:
    name, url = add_user(documented_rights() | {right: "^$"})
    service = make_service(RABBITMQ_URL=url)
    if right != "configure":
        upstream.declare(RETRY_QUEUE, REVIEW_QUEUE)
    upstream.declare("orders")
    service.start()
    if right == "write":  # noticed when something is to be published
        upstream.ask(make_request())

    await eventually(lambda: len(service.log_events(event)) >= 3, within=timedelta(seconds=20))
    checked = call("check", **service.environment)
    (said,) = {entry["error"] for entry in service.log_events(event)}
    grant(rabbitmq, vhost, name, **documented_rights())
    await service.wait_until_ready()
    upstream.ask(make_request())
    await upstream.receive("orders", 2 if right == "write" else 1, within=timedelta(seconds=15))

    if right == "write":  # the other two are needed for what `check` does not do
        assert (checked.returncode, words in checked.stdout) == (UNAVAILABLE, True)
    assert said.startswith("403 ACCESS_REFUSED")
    assert words in said
    assert PASSWORD not in service.log_text()
