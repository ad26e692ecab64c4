"""The program's commands as a script sees them: exit codes, and one line for each thing that is wrong."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from retry_scheduler.database import DatabaseAddress
from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.broker_users import broker_user
from tests.command import BUG, CONFIG, OK, UNAVAILABLE, USAGE, Environment, call, settings_for
from tests.servers import Database
from tests.service_process import PROJECT
from tests.table import Table
from tests.upstream import RETRY_QUEUE, Upstream

pytest_plugins = ("tests.fixtures",)

# The program, with a bug where it creates its tables.
WITH_A_BUG = """
import sys
from retry_scheduler import cli, schema, service

async def fail(database):
    raise ZeroDivisionError("nobody has foreseen this")

schema.migrate = service.migrate = fail
sys.exit(cli.main())
"""


@pytest.fixture
def environment(database: Database, broker_url: str) -> Environment:
    """Settings that are right."""
    return settings_for(database, broker_url)


@pytest.mark.parametrize(
    "arguments", [("fly",), ("run", "--fast"), ("check", "everything"), ("demo", "--keep=maybe")]
)
def test_what_is_no_command_is_told_with_64(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)

    assert done.returncode == USAGE
    assert done.stdout + done.stderr != ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("run", "--help"), ("migrate", "--help")])
def test_help_and_version_are_given_with_0(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)

    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout != ""


@pytest.mark.parametrize("command", ["run", "check", "migrate", "status", "archive"])
def test_every_wrong_setting_is_named_at_once_with_78_and_no_secret_is_shown(
    command: str, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text("hidden-in-file\n")

    done = call(
        command,
        HTTP_PORT="http",
        METRICS_PORT="0",
        RABBITMQ_URL="http://user:hidden-in-url@localhost/",
        RABBITMQ_PREFETCH="-1",
        POSTGRES_PORT="99999",
        POSTGRES_POOL_MAX="many",
        POSTGRES_PASSWORD="hidden-in-environment",
        POSTGRES_PASSWORD_FILE=str(secret),
        BASE_DELAY_MS="2s",
        LOG_LEVEL="LOUD",
        DEFAULT_MAX_RETRIES="1001",
        MAX_PUBLISH_FAILURES="0",
    )

    assert (done.returncode, done.stdout) == (CONFIG, "")
    named = [
        line.removeprefix("retry-scheduler: bad setting: ").split(":")[0] for line in done.stderr.splitlines()
    ]
    assert sorted(named) == sorted(
        [
            "HTTP_PORT",
            "METRICS_PORT",
            "RABBITMQ_URL",
            "RABBITMQ_PREFETCH",
            "POSTGRES_PORT",
            "POSTGRES_POOL_MAX",
            "POSTGRES_PASSWORD_FILE",
            "BASE_DELAY_MS",
            "LOG_LEVEL",
            "DEFAULT_MAX_RETRIES",
            "MAX_PUBLISH_FAILURES",
        ]
    )
    assert "hidden" not in done.stderr


@pytest.mark.parametrize("command", ["run", "check", "migrate", "status", "archive"])
def test_a_host_that_can_have_no_address_is_a_wrong_setting(command: str) -> None:
    done = call(command, POSTGRES_HOST="a..b", HTTP_HOST="b..c", RABBITMQ_URL=f"amqp://u:p@{'h' * 64}/")

    assert (done.returncode, done.stdout) == (CONFIG, "")
    named = [line.removeprefix("retry-scheduler: bad setting: ") for line in done.stderr.splitlines()]
    assert sorted(line.split(":")[0] for line in named) == ["HTTP_HOST", "POSTGRES_HOST", "RABBITMQ_URL"]
    assert all("is no host name: a part between two dots" in line for line in named)


@pytest.mark.parametrize("command", ["run", "migrate"])
def test_what_nobody_has_foreseen_is_one_line_with_70_in_the_log_or_beside_a_commands_answer(
    command: str,
) -> None:
    nobody, http_port, metrics_port = (str(port) for port in free_ports(3))

    done = subprocess.run(
        [sys.executable, "-c", WITH_A_BUG, command],
        cwd=PROJECT,
        env={
            "HTTP_HOST": LOOPBACK,
            "HTTP_PORT": http_port,
            "METRICS_PORT": metrics_port,
            "RABBITMQ_URL": f"amqp://{LOOPBACK}:{nobody}/",
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    answer, told = (done.stderr, done.stdout) if command == "run" else (done.stdout, done.stderr)
    assert (done.returncode, answer) == (BUG, "")
    *before, event = [json.loads(line) for line in told.splitlines()]
    assert (event["level"], event["service"]) == ("CRITICAL", "retry-scheduler")
    assert event["exception"].startswith("Traceback (most recent call last):")
    assert event["exception"].endswith("ZeroDivisionError: nobody has foreseen this")
    assert all(earlier["level"] != "CRITICAL" for earlier in before)
    assert command == "run" or not before


def test_check_says_that_all_is_well_and_changes_nothing(
    environment: Environment, table: Table, upstream: Upstream, postgres: PrivatePostgres, database: Database
) -> None:
    done = call("check", **environment)

    assert (done.returncode, done.stderr) == (OK, "")
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())
    assert "0001_retry_queue.sql" in done.stdout
    assert RETRY_QUEUE in done.stdout
    assert not upstream.exists(RETRY_QUEUE)
    assert postgres.sql("SELECT count(*) FROM pg_tables WHERE tablename LIKE 'retry%'", database.name) == "0"


def test_check_tells_with_69_which_server_is_away(environment: Environment) -> None:
    (nobody,) = free_ports(1)

    no_postgres = call("check", **(environment | {"POSTGRES_PORT": str(nobody)}))
    no_broker = call(
        "check", **(environment | {"RABBITMQ_URL": f"amqp://guest:secret1@{LOOPBACK}:{nobody}/"})
    )
    neither = call(
        "check", POSTGRES_PORT=str(nobody), RABBITMQ_URL=f"amqp://guest:secret1@{LOOPBACK}:{nobody}/"
    )

    assert [no_postgres.returncode, no_broker.returncode, neither.returncode] == [UNAVAILABLE] * 3
    assert [line.split()[:2] for line in no_postgres.stdout.splitlines()] == [
        ["ok", "settings"],
        ["WRONG", "PostgreSQL"],
        ["ok", "RabbitMQ:"],
    ]
    assert [line.split()[0] for line in no_broker.stdout.splitlines()] == ["ok", "ok", "WRONG"]
    assert [line.split()[0] for line in neither.stdout.splitlines()] == ["ok", "WRONG", "WRONG"]
    assert "secret1" not in no_broker.stdout + no_broker.stderr + neither.stdout + neither.stderr


def test_check_tells_a_wrong_login_and_a_wrong_virtual_host_with_69(
    environment: Environment, rabbitmq: PrivateRabbitMQ
) -> None:
    wrong_password = f"amqp://guest:secret1@{LOOPBACK}:{rabbitmq.port}/"

    for url in (wrong_password, rabbitmq.url("no such virtual host")):
        done = call("check", **(environment | {"RABBITMQ_URL": url}))

        assert done.returncode == UNAVAILABLE
        assert "WRONG RabbitMQ" in done.stdout
        assert "secret1" not in done.stdout + done.stderr
    done = call("check", **(environment | {"POSTGRES_DB": "no_such_database"}))
    assert (done.returncode, "WRONG PostgreSQL" in done.stdout) == (UNAVAILABLE, True)


def test_the_broker_is_told_the_password_of_the_url_also_an_empty_one_and_guest_only_without_a_user(
    environment: Environment, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    def answer(login: str) -> str:
        url = f"amqp://{login}{LOOPBACK}:{rabbitmq.port}/{vhost}"
        return call("check", **(environment | {"RABBITMQ_URL": url})).stdout.splitlines()[-1]

    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    with broker_user(rabbitmq, vhost, "svc", "guest", **everything):
        answers = [answer(login) for login in ("svc:guest@", "", "svc:@")]

    assert [line.split(":")[0] for line in answers] == ["ok    RabbitMQ", "ok    RabbitMQ", "WRONG RabbitMQ"]
    assert "ACCESS_REFUSED" in answers[2]


async def test_migrate_creates_the_tables_once_and_may_be_repeated(
    environment: Environment, table: Table
) -> None:
    first, second = call("migrate", **environment), call("migrate", **environment)

    assert (first.returncode, second.returncode) == (OK, OK)
    assert first.stdout == "applied 0001_retry_queue.sql\n"
    assert "up to date" in second.stdout
    assert await table.value("SELECT count(*) FROM retry_queue") == 0


def test_migrate_tells_with_69_that_the_database_is_away(environment: Environment) -> None:
    done = call("migrate", **(environment | {"POSTGRES_PORT": str(free_ports(1)[0])}))

    assert done.returncode == UNAVAILABLE
    assert "PostgreSQL" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_role_that_may_not_create_tables_is_told_so_with_78(
    environment: Environment, database: Database, table: Table
) -> None:
    await table.fetch(f"ALTER ROLE {database.user} IN DATABASE {database.name} SET search_path = pg_catalog")

    done = call("run", **environment, HTTP_PORT=str(free_ports(1)[0]))

    assert done.returncode == CONFIG
    assert "migrate" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("command", ["run", "migrate"])
async def test_another_programs_table_of_our_name_is_told_with_78_and_what_to_do(
    environment: Environment, table: Table, command: str
) -> None:
    await table.fetch("CREATE TABLE retry_queue (id serial)")

    http_port, metrics_port = map(str, free_ports(2))
    done = call(command, **environment, HTTP_PORT=http_port, METRICS_PORT=metrics_port)

    assert done.returncode == CONFIG
    assert '"retry_queue" already exists' in done.stderr
    assert "rename it" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert await table.fetch("SELECT 1 FROM pg_tables WHERE tablename = 'retry_schema_version'") == []


async def test_a_role_that_may_not_read_the_version_is_told_so_with_78(
    environment: Environment, table: Table
) -> None:
    call("migrate", **environment)
    await table.fetch(f"REVOKE SELECT ON retry_schema_version FROM {table.database.user}")

    done, checked = call("run", **environment), call("check", **environment)

    assert (done.returncode, checked.returncode) == (CONFIG, CONFIG)
    assert "permission denied for table retry_schema_version" in done.stderr
    assert "WRONG PostgreSQL" in checked.stdout


async def test_check_tells_what_it_finds_wrong_in_the_database(
    environment: Environment, table: Table, postgres: PrivatePostgres
) -> None:
    name = table.database.name
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    read_only = call("check", **environment)
    postgres.sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await table.fetch(f"ALTER ROLE {table.database.user} IN DATABASE {name} SET search_path = pg_catalog")
    may_not_create = call("check", **environment)
    await table.fetch(f"ALTER ROLE {table.database.user} IN DATABASE {name} RESET search_path")
    call("migrate", **environment)
    await table.fetch("ALTER TABLE retry_payload RENAME TO elsewhere")
    lacking = call("check", **environment)

    assert (read_only.returncode, "takes no writes" in read_only.stdout) == (UNAVAILABLE, True)
    assert (may_not_create.returncode, "may not create tables" in may_not_create.stdout) == (CONFIG, True)
    assert (lacking.returncode, "table retry_payload" in lacking.stdout) == (CONFIG, True)


def test_the_password_is_not_in_the_address_as_it_is_shown() -> None:
    assert "secret1" not in repr(DatabaseAddress("h", 5432, "d", "u", "secret1", tls=False))


@pytest.mark.parametrize("setting", ["HTTP_PORT", "METRICS_PORT"])
def test_a_port_that_is_taken_is_named_with_78(environment: Environment, setting: str) -> None:
    http_port, metrics_port = free_ports(2)
    with socket.create_server((LOOPBACK, 0)) as taken:
        number = str(taken.getsockname()[1])
        ports = {"HTTP_PORT": str(http_port), "METRICS_PORT": str(metrics_port), setting: number}

        done = call("run", **environment, **ports)

    assert done.returncode == CONFIG
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"retry-scheduler: {setting}: cannot listen on {LOOPBACK}:{number}")


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_this_machine_is_named_with_78_instead_of_the_port(host: str) -> None:
    http_port, metrics_port, nobody = (str(port) for port in free_ports(3))

    done = call(
        "run",
        HTTP_HOST=host,
        HTTP_PORT=http_port,
        METRICS_PORT=metrics_port,
        RABBITMQ_URL=f"amqp://{LOOPBACK}:{nobody}/",
        POSTGRES_PORT=nobody,
    )

    assert done.returncode == CONFIG
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"retry-scheduler: HTTP_HOST: cannot listen on {host}:{http_port}")


def test_secrets_may_come_from_files(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(environment.pop("RABBITMQ_URL") + "\n")
    (tmp_path / "password").write_text(environment.pop("POSTGRES_PASSWORD"))

    done = call(
        "check",
        **environment,
        RABBITMQ_URL_FILE=str(tmp_path / "url"),
        POSTGRES_PASSWORD_FILE=str(tmp_path / "password"),
    )

    assert (done.returncode, done.stderr) == (OK, "")
