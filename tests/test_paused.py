"""After a restore from a backup the service takes requests and sends nothing until an operator says so."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from retry_scheduler.demo.postgres_programs import find_programs, run_program
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.observability import events
from tests.factories import make_request, new_id
from tests.servers import Database, random_name
from tests.service_manager import FakeManager
from tests.service_process import MakeService, ServiceProcess, StartService
from tests.table import Table
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)


@pytest.fixture
def restored(postgres: PrivatePostgres, database: Database) -> Iterator[Database]:
    """A second empty database, for what comes out of the backup."""
    name = random_name()
    postgres.create_database(name, owner=database.user)
    yield replace(database, name=name)
    postgres.drop_database(name)


def release(service: ServiceProcess) -> None:
    os.kill(service.pid, signal.SIGUSR1)


def due(service: ServiceProcess) -> int:
    """How many retries /ready says would be sent at once."""
    return int(service.ready().body["paused"]["due"])


def program(name: str, postgres: PrivatePostgres, database: Database, folder: Path, *more: str) -> str:
    """Run one of PostgreSQL's own programs on a database and return what it prints."""
    address = ("-h", postgres.host, "-p", str(postgres.port), "-U", postgres.superuser, "-d", database.name)
    return run_program([find_programs() / name, *address, *more], folder=folder)


async def test_a_restored_backup_sends_nothing_until_released_and_says_what_it_would_send(
    start_service: StartService,
    make_service: MakeService,
    upstream: Upstream,
    table: Table,
    restored: Database,
    postgres: PrivatePostgres,
    tmp_path: Path,
) -> None:
    upstream.declare("orders")
    first = await start_service()
    known = [new_id() for _ in range(4)]
    upstream.ask(*(make_request(message_id=each, retry_after_ms=3000) for each in known))
    await eventually(lambda: table.value("SELECT count(*) = 4 FROM retry_queue"))
    backup = tmp_path / "backup.sql"
    backup.write_text(program("pg_dump", postgres, table.database, tmp_path))
    sent = {message.retry_id for message in await upstream.receive("orders", 4)}
    await first.stop()

    program("psql", postgres, restored, tmp_path, "-q", "-v", "ON_ERROR_STOP=1", "-f", str(backup))
    service = make_service(POSTGRES_DB=restored.name, START_PAUSED="true")
    service.start()
    await eventually(
        lambda: service.ready().body["reason"].startswith("paused: 4 "), within=timedelta(seconds=20)
    )
    page, up = service.ready(), service.metrics().value("service_up")
    new = new_id()
    upstream.ask(b"malformed", make_request(message_id=new))
    await eventually(lambda: due(service) == 5, within=timedelta(seconds=15))
    waiting = [upstream.depth("orders"), upstream.depth(REVIEW_QUEUE)]
    claims = await Table(restored).value("SELECT max(claims) FROM retry_queue")
    (paused, *_) = service.log_events(events.PAUSED)
    await Table(restored).fetch(
        "UPDATE retry_queue SET status = 'discarded', finished_at = now() WHERE message_id = $1", known[0]
    )
    release(service)
    again = await upstream.receive("orders", 4)
    await upstream.filled(REVIEW_QUEUE, 1)
    await service.wait_until_ready()
    await service.stop()

    assert (page.status, page.body["status"], up) == (503, "not_ready", 0)
    assert page.body["reason"].startswith("paused: 4 retries would be sent at once, the oldest due since 20")
    assert "SIGUSR1" in page.body["reason"]
    assert page.body["paused"]["oldest_due_at"].startswith("20")
    assert {check["status"] for check in page.body["checks"].values()} == {"up"}
    assert (paused["level"], paused["due"]) == ("WARNING", 4)
    assert waiting == [0, 0]
    assert claims == 0
    # Under the same keys: a consumer that deduplicates has nothing twice.
    assert {message.retry_id for message in again} - {f"{new}:0"} == sent - {f"{known[0]}:0"}
    assert len(service.log_events(events.RELEASED)) == 1
    assert await Table(restored).statuses() == {"retried": 4, "discarded": 1}


async def test_a_paused_service_stops_when_told_to_and_a_restart_without_it_releases(
    make_service: MakeService, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.declare("orders")
    with FakeManager(tmp_path / "notify", watchdog_s=60) as manager:
        service = make_service(**manager.environment)
        service.start("--paused")
        await eventually(lambda: "paused" in service.ready().body, within=timedelta(seconds=20))
        upstream.ask(make_request())
        await eventually(lambda: due(service) == 1, within=timedelta(seconds=15))
        # What `systemctl status` shows must not say that all is well.
        await eventually(lambda: manager.status.startswith("paused: 1 "))

        exit_code = await service.stop()
    unsent = upstream.depth("orders")
    service.start()

    await upstream.receive("orders", 1)
    assert (exit_code, unsent) == (0, 0)


async def test_releasing_a_service_that_is_not_paused_changes_nothing(
    start_service: StartService, upstream: Upstream
) -> None:
    service = await start_service()
    upstream.declare("orders")

    release(service)
    await eventually(lambda: service.log_events(events.NOT_PAUSED))
    upstream.ask(make_request())

    await upstream.receive("orders", 1)
    assert "paused" not in service.ready().body
