"""A role with the rights of docs/security.md and no other: enough for all the work, and none to spare."""

import asyncio
import re
from collections.abc import Iterator
from datetime import timedelta

import asyncpg
import pytest

from retry_scheduler.database import Database, DatabaseAddress
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.errors import UnusableSchema
from retry_scheduler.schema import inspect, migrate, script
from tests import servers
from tests.command import CONFIG, call
from tests.factories import make_request, new_id
from tests.service_process import PROJECT, MakeService, StartService
from tests.table import Table
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

FORBIDDEN = [
    "CREATE TABLE mine (id int)",
    "CREATE TEMPORARY TABLE mine (id int)",
    "ALTER TABLE retry_queue ADD COLUMN mine int",
    "DROP TABLE retry_queue",
    "TRUNCATE retry_payload",
    "DELETE FROM retry_queue",
    "DELETE FROM retry_payload",
    "DELETE FROM retry_quarantine",
    "SELECT * FROM retry_queue_archive",
    "INSERT INTO retry_schema_version (version, name) VALUES (99, 'x')",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "DROP TRIGGER retry_payload_follows_its_row ON retry_queue",
    "COPY retry_queue TO PROGRAM 'cat'",
    "CREATE ROLE mine SUPERUSER",
]


def documented_sql(role: str, database: str) -> list[str]:
    """Return the statements of the page, for another role and another database."""
    page = (PROJECT / "docs" / "security.md").read_text()
    (block,) = re.findall(r"^```sql\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    return [
        statement.replace("retry_service", role).replace("DATABASE eracun", f"DATABASE {database}")
        for statement in block.strip().splitlines()
    ]


def rights_in(statements: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (right, table) of every GRANT on tables."""
    for statement in statements:
        found = re.fullmatch(r"GRANT ([A-Z, ]+) ON (retry_[a-z_, ]+) TO \w+;", statement)
        if found:
            yield from ((right, table) for right in found[1].split(", ") for table in found[2].split(", "))


@pytest.fixture
def role(postgres: PrivatePostgres, database: servers.Database) -> Iterator[servers.Database]:
    """The test's database, migrated by its owner, as seen by a role that has what the page grants.

    What everybody may do by default is taken away, so that nothing else helps.
    """
    address = DatabaseAddress(
        database.host, database.port, database.name, database.user, database.password, tls=False
    )
    assert asyncio.run(migrate(Database(address, pool_min=0, pool_max=1)))
    name = servers.random_name()
    for statement in (
        f"REVOKE ALL ON DATABASE {database.name} FROM PUBLIC",
        "REVOKE ALL ON SCHEMA public FROM PUBLIC",
        *documented_sql(name, database.name),
    ):
        postgres.sql(statement, database.name)
    yield servers.Database(database.host, database.port, database.name, user=name, password="not asked for")
    postgres.sql(f"DROP OWNED BY {name}", database.name)
    postgres.sql(f"DROP ROLE {name}")


async def test_the_documented_rights_are_enough_for_every_way_a_message_can_take(
    start_service: StartService, upstream: Upstream, table: Table, role: servers.Database
) -> None:
    service = await start_service(POSTGRES_USER=role.user, MAX_PUBLISH_FAILURES="2")
    upstream.declare("orders")
    repeated = new_id()
    # Somebody who left long ago is forgotten by whoever comes next: the one DELETE.
    await table.fetch(
        "INSERT INTO retry_instance (id, name, gone_at)"
        " VALUES (gen_random_uuid(), 'old', now() - interval '1 day')"
    )

    upstream.ask(
        make_request(message_id=repeated),
        make_request(message_id=repeated),
        make_request(max_retries=0),
        make_request(original_queue="nowhere"),
        b"no JSON",
    )
    await upstream.receive("orders", 1)
    await upstream.receive(REVIEW_QUEUE, 3)
    await eventually(table.settled)
    healthy = service.health()
    service.kill()
    restarted = await start_service(POSTGRES_USER=role.user)
    upstream.ask(make_request())
    await upstream.receive("orders", 1, within=timedelta(seconds=15))
    await eventually(table.settled)

    # The killed one is buried by its successor, after it has stood still.
    await eventually(
        lambda: restarted.log_events("An instance has stopped beating - its claimed retries are taken over"),
        within=timedelta(seconds=15),
    )
    assert healthy.status == 200
    assert await table.value("SELECT count(*) FROM retry_instance WHERE name = 'old'") == 0
    assert await restarted.stop() == 0
    errors = [
        event for event in (*service.log_events(), *restarted.log_events()) if event["level"] == "ERROR"
    ]
    assert errors == []


async def test_the_role_may_neither_change_the_tables_nor_delete_what_is_in_them(
    role: servers.Database,
) -> None:
    for statement in FORBIDDEN:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await Table(role).fetch(statement)
            pytest.fail(f"allowed: {statement}")


async def test_no_right_can_be_spared_and_the_one_that_is_missing_is_named(
    role: servers.Database, postgres: PrivatePostgres, table: Table
) -> None:
    address = DatabaseAddress(role.host, role.port, role.name, role.user, role.password, tls=False)
    database = Database(address, pool_min=0, pool_max=1)
    rights = list(rights_in(documented_sql(role.user, role.name)))
    assert (await inspect(database)).problem is None

    for right, name in rights:
        await table.fetch(f"REVOKE {right} ON {name} FROM {role.user}")
        with pytest.raises(UnusableSchema, match=name) as refusal:
            await migrate(database)
        await table.fetch(f"GRANT {right} ON {name} TO {role.user}")

        assert len(str(refusal.value).splitlines()) == 1
        assert "rant this role" in str(refusal.value)

    assert len(rights) == 14
    assert (await inspect(database)).problem is None


def test_the_script_for_the_owner_names_the_same_rights() -> None:
    needed, _, _ = script().partition("RETENTION_DAYS=0")
    granted = [line.removeprefix("--").strip().replace("...", "role") for line in needed.splitlines()]

    assert set(rights_in(granted)) == set(rights_in(documented_sql("role", "database")))


async def test_a_right_that_is_missing_at_the_start_is_told_in_one_line_with_78(
    make_service: MakeService, table: Table, role: servers.Database
) -> None:
    await table.fetch(f"REVOKE UPDATE ON retry_payload FROM {role.user}")
    settings = {
        "POSTGRES_HOST": role.host,
        "POSTGRES_PORT": str(role.port),
        "POSTGRES_DB": role.name,
        "POSTGRES_USER": role.user,
    }

    started, migrated, checked = await asyncio.gather(
        *(asyncio.to_thread(call, command, **settings) for command in ("run", "migrate", "check"))
    )

    assert (started.returncode, migrated.returncode, checked.returncode) == (CONFIG, CONFIG, CONFIG)
    for said in (started.stderr, migrated.stderr):
        (line,) = said.splitlines()
        assert "UPDATE on retry_payload" in line


async def test_a_migration_that_the_role_may_not_apply_is_told_with_78_and_what_to_do(
    table: Table, role: servers.Database
) -> None:
    await table.fetch("DELETE FROM retry_schema_version")  # as if this program were newer than the tables

    done = await asyncio.to_thread(
        call,
        "run",
        POSTGRES_HOST=role.host,
        POSTGRES_PORT=str(role.port),
        POSTGRES_DB=role.name,
        POSTGRES_USER=role.user,
    )

    assert done.returncode == CONFIG
    (line,) = done.stderr.splitlines()
    assert "retry-scheduler migrate" in line
