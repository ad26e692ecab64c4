"""SIGHUP: passwords are rotated while the service runs, and nothing is lost or even interrupted."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest

from retry_scheduler.demo.ports import LOOPBACK
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.observability import events
from tests.factories import make_request, new_id
from tests.servers import Database, random_name
from tests.service_process import MakeService, ServiceProcess
from tests.table import Table
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

SERVERS_TAKE = timedelta(seconds=10)


@dataclass
class Logins:
    """A role and a user of the same name whose passwords are asked for, and the files that hold them."""

    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    vhost: str
    database: str
    name: str
    password_file: Path
    url_file: Path

    @property
    def settings(self) -> dict[str, str]:
        """Settings with which the service logs in by them."""
        return {
            "POSTGRES_DB": self.database,
            "POSTGRES_USER": self.name,
            "POSTGRES_PASSWORD": "",
            "POSTGRES_PASSWORD_FILE": str(self.password_file),
            "RABBITMQ_URL": "",
            "RABBITMQ_URL_FILE": str(self.url_file),
        }

    def set_on_servers(self, password: str) -> None:
        """Change both passwords on the servers. Connections that are open stay."""
        self.postgres.sql(f"ALTER ROLE {self.name} PASSWORD '{password}'")
        self.rabbitmq.ctl("change_password", self.name, password)

    def write_files(self, password: str) -> None:
        """Write both files."""
        self.password_file.write_text(f"{password}\n")
        user = f"{self.name}:{quote(password, safe='')}"
        self.url_file.write_text(f"amqp://{user}@{LOOPBACK}:{self.rabbitmq.port}/{self.vhost}\n")

    def sessions(self) -> set[str]:
        """Whoever is logged in, by names that no later connection gets."""
        backends = self.postgres.sql(f"SELECT pid FROM pg_stat_activity WHERE usename = '{self.name}'")
        connections = json.loads(self.rabbitmq.ctl("list_connections", "--formatter", "json", "name", "user"))
        return set(backends.split()) | {
            connection["name"] for connection in connections if connection["user"] == self.name
        }

    def cut(self) -> None:
        """End every session, as a restart of both servers would."""
        self.postgres.sql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.name}'"
        )
        self.rabbitmq.ctl("close_all_user_connections", self.name, "cut by the test")


@pytest.fixture
def logins(
    postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ, vhost: str, tmp_path: Path
) -> Iterator[Logins]:
    """Logins of this test alone, with the password "first" on the servers and in the files."""
    name = random_name()
    made = Logins(postgres, rabbitmq, vhost, name, name, tmp_path / "password", tmp_path / "url")
    rules = Path(postgres.sql("SHOW hba_file"))
    trusting = rules.read_text()
    postgres.create_role(name, "first")
    postgres.create_database(name, owner=name)
    rabbitmq.ctl("add_user", name, "first")
    rabbitmq.ctl("set_permissions", "-p", vhost, name, ".*", ".*", ".*")
    made.write_files("first")
    rules.write_text(f"host all {name} {LOOPBACK}/32 scram-sha-256\n{trusting}")
    postgres.sql("SELECT pg_reload_conf()")
    yield made
    rules.write_text(trusting)
    postgres.sql("SELECT pg_reload_conf()")
    postgres.drop_database(name)
    postgres.sql(f"DROP ROLE {name}")
    rabbitmq.ctl("delete_user", name)


@pytest.fixture
def stored(logins: Logins) -> Table:
    """The tables of the service that uses `logins`, as the superuser sees them, who needs no password."""
    server = logins.postgres
    return Table(Database(server.host, server.port, logins.database, user=server.superuser))


def reload(service: ServiceProcess) -> None:
    os.kill(service.pid, signal.SIGHUP)


async def test_rotated_passwords_are_used_by_the_next_connections_and_nothing_is_lost_or_interrupted(
    make_service: MakeService, upstream: Upstream, logins: Logins, stored: Table
) -> None:
    service = make_service(**logins.settings)
    service.start()
    await service.wait_until_ready()
    upstream.declare("orders")
    upstream.ask(make_request())
    await upstream.receive("orders", 1)
    ids = [new_id() for _ in range(200)]
    before = logins.sessions()

    logins.set_on_servers("second/@%&")
    logins.write_files("second/@%&")
    reload(service)
    await eventually(lambda: service.log_events(events.SECRETS_RELOADED))
    upstream.ask_for_many([make_request(message_id=name, retry_after_ms=1500) for name in ids[:100]])
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 101)
    undisturbed = service.metrics()
    after = logins.sessions()
    logins.cut()
    upstream.ask_for_many([make_request(message_id=name) for name in ids[100:]])
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 201, within=SERVERS_TAKE)
    await eventually(stored.settled, within=SERVERS_TAKE)
    messages = upstream.take("orders")
    await service.wait_until_ready()

    assert before
    assert before <= after  # whoever was logged in stayed so
    assert undisturbed.value("retry_reconnects_total") == 0
    assert {message.message_id for message in messages} == set(ids)  # a cut may double some
    assert await stored.statuses() == {"retried": 201}
    assert service.metrics().value("retry_reconnects_total", server="RabbitMQ") > 0
    assert before.isdisjoint(logins.sessions())
    (event,) = service.log_events(events.SECRETS_RELOADED)
    assert (event["level"], sorted(event["changed"])) == ("INFO", ["POSTGRES_PASSWORD", "RABBITMQ_URL"])
    refused = [word for word in ("password authentication", "ACCESS_REFUSED") if word in service.log_text()]
    assert refused == []
    assert "second" not in service.log_text()
    assert await service.stop() == 0


async def test_what_is_wrong_in_the_files_changes_nothing_and_is_told_without_a_secret(
    make_service: MakeService, upstream: Upstream, logins: Logins, stored: Table
) -> None:
    service = make_service(**logins.settings)
    service.start()
    await service.wait_until_ready()
    upstream.declare("orders")

    reload(service)
    await eventually(lambda: len(service.log_events(events.SECRETS_RELOADED)) == 1)
    logins.password_file.write_text("hidden")  # right by itself, but it came with a wrong one
    logins.url_file.write_text("http://hidden:hidden@localhost/")
    reload(service)
    await eventually(lambda: len(service.log_events(events.SECRETS_KEPT)) == 1)
    logins.write_files("hidden")
    logins.password_file.write_text("")
    reload(service)
    await eventually(lambda: len(service.log_events(events.SECRETS_KEPT)) == 2)
    logins.password_file.unlink()
    reload(service)
    await eventually(lambda: len(service.log_events(events.SECRETS_KEPT)) == 3)
    logins.cut()
    upstream.ask_for_many([make_request() for _ in range(20)])
    await upstream.receive("orders", 20, within=timedelta(seconds=20))
    await eventually(stored.settled)

    (unchanged,) = service.log_events(events.SECRETS_RELOADED)
    assert unchanged["changed"] == []
    refused = service.log_events(events.SECRETS_KEPT)
    assert {event["level"] for event in refused} == {"ERROR"}
    assert [[problem.split(":")[0] for problem in event["problems"]] for event in refused] == [
        ["RABBITMQ_URL"],
        ["POSTGRES_PASSWORD"],
        ["POSTGRES_PASSWORD_FILE"],
    ]
    assert "hidden" not in service.log_text()
    assert "password authentication" not in service.log_text()


async def test_a_wrong_password_at_the_start_is_mended_by_the_file_and_a_signal(
    make_service: MakeService, upstream: Upstream, logins: Logins
) -> None:
    logins.write_files("outdated")
    service = make_service(**logins.settings)
    service.start()
    await eventually(
        lambda: (
            service.log_events("PostgreSQL health check failed")
            and service.log_events("Failed to connect to RabbitMQ")
        ),
        within=SERVERS_TAKE,
    )

    logins.write_files("first")
    reload(service)
    await service.wait_until_ready()
    upstream.declare("orders")
    upstream.ask(make_request())
    await upstream.receive("orders", 1)

    refusals = service.log_events("PostgreSQL health check failed")
    assert "password authentication failed" in refusals[0]["error"]
    assert "outdated" not in service.log_text()
