"""Fixtures of all tests: real servers, shared by the run, with a database and a virtual host per test."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.servers import Database, SharedServers, random_name


@pytest.fixture(scope="session")
def shared_servers(request: pytest.FixtureRequest) -> Iterator[SharedServers]:
    """The servers that the collected tests need, and no others: a test of one server waits for one."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with SharedServers(with_postgres="postgres" in needed, with_rabbitmq="rabbitmq" in needed) as servers:
        yield servers


@pytest.fixture
def postgres(shared_servers: SharedServers) -> PrivatePostgres:
    """The shared PostgreSQL, running. A test may stop, kill or freeze it and need not clean up."""
    return shared_servers.postgres()


@pytest.fixture
def rabbitmq(shared_servers: SharedServers) -> PrivateRabbitMQ:
    """The shared RabbitMQ, running. A test may stop, kill or freeze it and need not clean up."""
    return shared_servers.rabbitmq()


@pytest.fixture
def database(postgres: PrivatePostgres, shared_servers: SharedServers) -> Iterator[Database]:
    """An empty database for this test alone; dropped afterwards with the connections left to it."""
    name = random_name()
    postgres.create_database(name, owner=Database.user)
    yield Database(host=postgres.host, port=postgres.port, name=name)
    shared_servers.postgres().drop_database(name)


@pytest.fixture
def vhost(rabbitmq: PrivateRabbitMQ, shared_servers: SharedServers) -> Iterator[str]:
    """An empty virtual host for this test alone; deleted afterwards with all that is in it."""
    name = random_name()
    rabbitmq.add_vhost(name)
    yield name
    shared_servers.rabbitmq().delete_vhost(name)


@pytest.fixture
def broker_url(rabbitmq: PrivateRabbitMQ, vhost: str) -> str:
    """The AMQP address of this test's own virtual host."""
    return rabbitmq.url(vhost)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    """Fail a test that leaves an asyncio task running: nobody would ever see how it ends."""
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left running: {sorted(str(task.get_coro()) for task in left)}"
