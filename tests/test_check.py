"""`retry-scheduler check` warns where a promise of the contract would not hold; `migrate --sql` is enough."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from retry_scheduler.broker.topology import QueueShape
from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.processes import ServerMissing
from retry_scheduler.preflight import _losses
from tests.command import OK, UNAVAILABLE, Environment, call, settings_for
from tests.factories import make_request
from tests.servers import Database, skip_or_fail
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream

pytest_plugins = ("tests.fixtures",)


@pytest.fixture
def environment(database: Database, broker_url: str) -> Environment:
    return settings_for(database, broker_url)


def warnings_of(environment: Environment, *, exit_code: int = OK) -> dict[str, list[str]]:
    """Return what `check` warns of, by subject."""
    done = call("check", "--json", **environment)
    assert (done.returncode, done.stderr) == (exit_code, "")
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["exit_code"] == exit_code
    warned: dict[str, list[str]] = {}
    for finding in answer["findings"]:
        if finding["level"] == "warn":
            assert finding["exit_code"] == OK
            warned.setdefault(finding["subject"], []).append(finding["remark"])
    return warned


def test_queues_that_may_lose_messages_are_warned_of_and_stay_as_they_are(
    environment: Environment, upstream: Upstream
) -> None:
    upstream.declare(
        RETRY_QUEUE,
        x_message_ttl=86_400_000,
        x_max_length=1000,
        x_expires=90_000_000,
        x_dead_letter_exchange="graveyard",
        x_max_priority=5,
    )
    upstream.declare(REVIEW_QUEUE, x_queue_type="quorum", x_delivery_limit=2)
    upstream.ask(make_request())

    warned = warnings_of(environment)
    text = call("check", **environment)

    moves = "moves messages to the exchange 'graveyard'"
    assert warned.keys() == {f"RabbitMQ queue {RETRY_QUEUE}", f"RabbitMQ queue {REVIEW_QUEUE}"}
    expires, ttl, length = warned[f"RabbitMQ queue {RETRY_QUEUE}"]
    assert "90000000 ms without a consumer" in expires
    assert ttl.startswith(f"{moves} after 86400000 ms")
    assert length.startswith(f"{moves} beyond 1000 (x-max-length)")
    (limit,) = warned[f"RabbitMQ queue {REVIEW_QUEUE}"]
    assert limit.startswith("drops messages that were delivered 2 times")
    assert text.returncode == OK
    assert text.stdout.count("\nwarn ") == 4
    assert upstream.depth(RETRY_QUEUE) == 1
    assert warnings_of(environment) == warned


def test_a_queue_that_is_not_durable_is_warned_of_and_good_ones_are_not(
    environment: Environment, upstream: Upstream
) -> None:
    with upstream.channel() as channel:
        channel.queue_declare(RETRY_QUEUE, durable=False, auto_delete=True)
    upstream.declare(REVIEW_QUEUE, x_max_length=1000, x_overflow="reject-publish", x_queue_mode="lazy")

    warned = warnings_of(environment)

    assert warned == {
        f"RabbitMQ queue {RETRY_QUEUE}": [
            "is not durable: its messages are gone when the broker restarts",
            "is deleted, with its messages, when its last consumer leaves",
        ]
    }


@pytest.mark.parametrize(
    ("version", "limit", "problems"), [("3.13.7", None, 0), ("4.1.0", None, 1), ("4.1.0", -1, 0), ("", 7, 1)]
)
def test_a_quorum_queue_drops_after_20_deliveries_from_rabbitmq_4_on_unless_told_otherwise(
    version: str, limit: int | None, problems: int
) -> None:
    arguments: dict[str, int | str | bool] = {"x-queue-type": "quorum"}
    if limit is not None:
        arguments["x-delivery-limit"] = limit

    found = list(_losses(QueueShape(arguments=arguments, broker_version=version)))

    assert len(found) == problems


async def test_rights_that_archiving_lacks_are_warned_of_unless_it_is_off(
    environment: Environment, table: Table
) -> None:
    call("migrate", **environment)
    before = warnings_of(environment)
    await table.fetch(f"REVOKE DELETE ON retry_queue FROM {table.database.user}")

    lacking, off = warnings_of(environment), warnings_of(environment | {"RETENTION_DAYS": "0"})

    assert (before, off) == ({}, {})
    ((warning,),) = lacking.values()
    assert "nothing will be archived: this role lacks DELETE on retry_queue" in warning


async def test_an_index_that_did_not_come_back_from_a_backup_is_warned_of(
    environment: Environment, table: Table
) -> None:
    call("migrate", **environment)
    await table.fetch("DROP INDEX idx_retry_next_retry")

    ((warning,),) = warnings_of(environment).values()

    assert warning.startswith("no valid index idx_retry_next_retry: every look reads the whole table")


async def test_a_role_that_commits_without_waiting_for_the_disk_is_warned_of(
    environment: Environment, table: Table
) -> None:
    where = table.database
    await table.fetch(f"ALTER ROLE {where.user} IN DATABASE {where.name} SET synchronous_commit = off")

    ((warning,),) = warnings_of(environment).values()

    assert warning.startswith("synchronous_commit is off")
    assert "this program's own sessions set it to on" in warning


@pytest.fixture
def careless_postgres() -> Iterator[PrivatePostgres]:
    """A server that a crash of the machine may destroy."""
    folder = Path(tempfile.mkdtemp(prefix="retry-scheduler-tests-"))
    folder.chmod(0o711)  # run by root, PostgreSQL's user has to pass through
    settings = {"fsync": "off", "full_page_writes": "off"}
    try:
        with PrivatePostgres(folder / "postgres", settings=settings) as server:
            yield server
    except ServerMissing as missing:
        skip_or_fail(missing)
    finally:
        shutil.rmtree(folder)


def test_a_server_that_a_crash_may_destroy_is_warned_of(careless_postgres: PrivatePostgres) -> None:
    (nobody,) = free_ports(1)

    ((fsync, full_page_writes),) = warnings_of(
        {
            "POSTGRES_HOST": careless_postgres.host,
            "POSTGRES_PORT": str(careless_postgres.port),
            "POSTGRES_USER": careless_postgres.superuser,
            "POSTGRES_DB": "postgres",
            "RABBITMQ_URL": f"amqp://guest:guest@{LOOPBACK}:{nobody}/",
        },
        exit_code=UNAVAILABLE,
    ).values()

    assert fsync.startswith("fsync is off: a crash of the machine may lose")
    assert full_page_writes.startswith("full_page_writes is off: ")


async def test_a_dba_can_run_the_sql_and_a_role_with_the_rights_it_names_can_do_everything(
    environment: Environment,
    postgres: PrivatePostgres,
    database: Database,
    start_service: StartService,
    upstream: Upstream,
    table: Table,
) -> None:
    (nobody,) = free_ports(1)
    printed = call("migrate", "--sql", POSTGRES_PORT=str(nobody))
    dba = await asyncpg.connect(
        host=database.host, port=database.port, user=postgres.superuser, database=database.name
    )
    try:
        # Nothing is left to the role but what the script says.
        await dba.execute(f"ALTER DATABASE {database.name} OWNER TO {postgres.superuser}")
        await dba.execute(printed.stdout)
        grants = "".join(line.removeprefix("--") for line in re.findall(r"^--   .*\n", printed.stdout, re.M))
        await dba.execute(grants.replace("...", database.user))
    finally:
        await dba.close()

    assert (printed.returncode, printed.stderr) == (OK, "")
    assert warnings_of(environment) == {}
    assert call("migrate", **environment).stdout == "the tables are up to date\n"
    await start_service()
    upstream.declare("orders")
    upstream.ask(make_request())
    await upstream.receive("orders", 1)
    await table.fetch("UPDATE retry_queue SET finished_at = now() - interval '31 days'")
    assert call("archive", **environment).stdout.startswith("archived 1 attempts")
    assert call("status", **environment).returncode == OK


def test_migrate_tells_as_json_what_it_has_applied(environment: Environment) -> None:
    first, again = call("migrate", "--json", **environment), call("migrate", "--json", **environment)

    assert json.loads(first.stdout) == {"applied": ["0001_retry_queue.sql"]}
    assert json.loads(again.stdout) == {"applied": []}
