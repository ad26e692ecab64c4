"""Fixtures of the tests that run the real program. A pytest plugin: modules name it in `pytest_plugins`."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from retry_scheduler.database import Database as OurDatabase
from retry_scheduler.database import DatabaseAddress
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.schema import migrate
from tests.command import settings_for
from tests.factories import PAYLOAD, encoded
from tests.scene import Scene
from tests.servers import Database
from tests.service_process import MakeService, ServiceProcess, StartService, complaints_about_log
from tests.table import Table
from tests.upstream import Upstream

# Retries come back at once where a test is not about delays.
QUICK = {"BASE_DELAY_MS": "20", "MAX_DELAY_MS": "100", "JITTER_MS": "10", "POSTGRES_POOL_MIN": "2"}

# What takes longest comes last: a mistake in the rest is seen without waiting for it.
LAST_MODULES = ("tests.test_two_instances", "tests.test_crash", "tests.test_chaos")

_services = pytest.StashKey[list[ServiceProcess]]()


@pytest.fixture
def make_service(
    request: pytest.FixtureRequest, tmp_path: Path, database: Database, broker_url: str
) -> Iterator[MakeService]:
    """Make any number of instances. Those still running at the end are killed; every log is checked."""
    made: list[ServiceProcess] = []
    request.node.stash[_services] = made

    def make(**settings: str) -> ServiceProcess:
        service = ServiceProcess(tmp_path, {**settings_for(database, broker_url), **QUICK, **settings})
        made.append(service)
        return service

    yield make
    for service in made:
        service.kill()
    secrets = {
        "the database's password": database.password,
        "the broker's password": "guest:guest",
        "a payload": PAYLOAD[:20].decode(),
        "a payload in base64": encoded(PAYLOAD)[:20],
    }
    complaints = [text for service in made for text in complaints_about_log(service, secrets=secrets)]
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def start_service(make_service: MakeService) -> StartService:
    """Start any number of instances, side by side if started together."""

    async def start(**settings: str) -> ServiceProcess:
        service = make_service(**settings)
        service.start()
        await service.wait_until_ready()
        return service

    return start


@pytest.fixture
def upstream(broker_url: str) -> Upstream:
    """The programs around the service, on this test's virtual host, which has no queues yet."""
    return Upstream(broker_url)


@pytest.fixture
def table(database: Database) -> Table:
    """This test's database; it has no tables until the service has started."""
    return Table(database)


@pytest.fixture
async def opened(database: Database) -> OurDatabase:
    """This test's database with its tables, as the service's own code reaches it."""
    address = DatabaseAddress(
        database.host, database.port, database.name, database.user, database.password, tls=False
    )
    where = OurDatabase(address, pool_min=0, pool_max=1)
    await migrate(where)
    return where


@pytest.fixture
def migrated(opened: OurDatabase, table: Table) -> Table:
    """This test's database with its tables."""
    return table


@pytest.fixture
def scene(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ, vhost: str
) -> Scene:
    """Everything for a service under load behind a proxy."""
    return Scene(start_service, upstream, table, rabbitmq, vhost)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of each instance's log with a test that failed."""
    report = yield
    if report.failed:
        for service in item.stash.get(_services, []):
            title = f"log of the service on port {service.http_port}"
            report.sections.append((title, service.log_tail() + service.error_output()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests have measured."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.when == "call" and report.user_properties:
                figures = ", ".join(f"{name} = {value}" for name, value in report.user_properties)
                terminalreporter.write_line(f"{report.location[2]}: {figures}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run quick tests first: those without servers, then the others, then the longest."""
    items.sort(key=_slowness)


def _slowness(item: pytest.Item) -> int:
    module = getattr(item, "module", None)
    if module is not None and module.__name__ in LAST_MODULES:
        return 2 + LAST_MODULES.index(module.__name__)
    names: Any = getattr(item, "fixturenames", ())
    return 1 if {"postgres", "rabbitmq"} & set(names) else 0
