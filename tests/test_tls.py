"""TLS to both servers: a right certificate is enough, nothing else is, and there is no way to plain text."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from retry_scheduler.demo.ports import LOOPBACK
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.errors import BadSettings
from retry_scheduler.settings import load_settings
from tests.command import CONFIG, OK, UNAVAILABLE, call
from tests.contract import ANSWERS_WITHIN_S
from tests.factories import make_request
from tests.service_process import MakeService, ServiceProcess, StartService
from tests.tls_front import SSL_REQUEST
from tests.tls_servers import CANARY, Tenant
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures", "tests.tls_fixtures")

DATABASE_EVENT, BROKER_EVENT = "PostgreSQL health check failed", "Failed to connect to RabbitMQ"

SMALL_ONES = 200
LARGE_BYTES = 3_000_000  # many TLS records, and more than is read at a time

REFUSALS = {
    "unknown authority": ("authority", "SSL_CERT_FILE"),
    "other name": ("another name", "renew it"),
    "expired": ("has expired", "renew it"),
}


def error_of(service: ServiceProcess, event: str) -> str:
    return str(service.log_events(event)[-1]["error"])


async def test_with_certificates_that_are_right_retries_go_through_and_every_connection_is_encrypted(
    tenant: Tenant, start_service: StartService
) -> None:
    # The driver's own variables must not weaken what the settings ask for.
    service = await start_service(**tenant.settings, RABBITMQ_PREFETCH="200", PGSSLMODE="disable")
    upstream = tenant.upstream
    upstream.declare("orders", "large")
    large = base64.b64encode(bytes(range(256)) * (LARGE_BYTES // 256)).decode()

    upstream.ask_for_many([make_request() for _ in range(SMALL_ONES)])
    upstream.ask(make_request(original_queue="large", original_payload=large))
    await upstream.receive("orders", SMALL_ONES)
    (message,) = await upstream.receive("large", 1)
    sessions = int(
        tenant.servers.postgres.sql(f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{tenant.name}'")
    )
    in_plain_text = tenant.servers.rabbitmq.eval(
        "[C || C <- rabbit_networking:connection_info_all([user, ssl]),"
        f' proplists:get_value(user, C) =:= <<"{tenant.name}">>, not proplists:get_value(ssl, C)].'
    )
    checked = await asyncio.to_thread(lambda: call("check", **tenant.settings))

    assert base64.b64encode(message.body).decode() == large
    assert 1 < sessions <= tenant.servers.postgres_front.encrypted_connections
    assert in_plain_text == "[]"
    assert (checked.returncode, checked.stderr) == (OK, "")
    assert await service.stop() == 0


@pytest.mark.parametrize("kind", REFUSALS)
async def test_a_certificate_that_is_wrong_is_refused_in_words_and_a_right_one_needs_no_restart(
    tenant: Tenant, make_service: MakeService, kind: str
) -> None:
    service = make_service(**tenant.settings)
    upstream = tenant.upstream
    upstream.declare("orders")
    tenant.servers.show(kind)
    try:
        service.start()
        await eventually(
            lambda: all(len(service.log_events(event)) >= 2 for event in (DATABASE_EVENT, BROKER_EVENT)),
            within=timedelta(seconds=20),
        )
        ready = service.ready()
        checked = await asyncio.to_thread(lambda: call("check", **tenant.settings))
        users = tenant.servers.rabbitmq.eval(
            "[U || [{user, U}] <- rabbit_networking:connection_info_all([user])]."
        )
    finally:
        tenant.servers.show("good")
    await service.wait_until_ready(within=timedelta(seconds=10))
    upstream.ask(make_request())
    await upstream.receive("orders", 1)

    said = [
        *(error_of(service, event) for event in (DATABASE_EVENT, BROKER_EVENT)),
        *checked.stdout.splitlines()[1:],
    ]
    assert len(said) == 4
    for line in said:
        assert all(words in line for words in ("TLS: ", *REFUSALS[kind])), line
    assert (ready.status, checked.returncode) == (503, UNAVAILABLE)
    assert ready.took_s < ANSWERS_WITHIN_S
    assert tenant.name not in users
    assert CANARY not in service.log_text() + checked.stdout + checked.stderr + json.dumps(ready.body)


class Recorder:
    """A server that answers like one without TLS, and keeps what it was sent, for each connection."""

    def __init__(self, answer: bytes) -> None:
        self.received: list[bytes] = []
        self._answer = answer

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve, and give the port."""
        server = await asyncio.start_server(self._serve, LOOPBACK, 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place = len(self.received)
        self.received.append(b"")
        while piece := await reader.read(10_000):
            self.received[place] += piece
            writer.write(self._answer)
        writer.close()


async def test_a_server_without_tls_is_refused_and_is_sent_nothing_in_plain_text(
    tenant: Tenant, make_service: MakeService
) -> None:
    postgres, broker = Recorder(b"N"), Recorder(b"AMQP\0\0\x09\x01")
    async with postgres.listening() as postgres_port, broker.listening() as broker_port:
        url = tenant.broker_url.replace(f":{tenant.servers.amqps_port}/", f":{broker_port}/")
        service = make_service(**tenant.settings | {"POSTGRES_PORT": str(postgres_port), "RABBITMQ_URL": url})
        service.start()
        await eventually(
            lambda: all(len(service.log_events(event)) >= 3 for event in (DATABASE_EVENT, BROKER_EVENT)),
            within=timedelta(seconds=20),
        )
        service.kill()

    assert set(postgres.received) == {SSL_REQUEST}
    assert {sent[:2] for sent in broker.received} == {b"\x16\x03"}  # a TLS handshake
    assert CANARY.encode() not in b"".join(postgres.received + broker.received)
    assert "rejected SSL" in error_of(service, DATABASE_EVENT)
    assert "does not speak TLS on this port" in error_of(service, BROKER_EVENT)


async def test_a_server_that_speaks_tls_only_is_told_apart_from_one_that_is_away(
    tenant: Tenant, postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ
) -> None:
    in_plain_text = tenant.settings | {
        "POSTGRES_SSL": "false",
        "RABBITMQ_URL": tenant.broker_url_with("x", scheme="amqp"),
    }
    without_tls = tenant.settings | {
        "POSTGRES_PORT": str(postgres.port),
        "RABBITMQ_URL": f"amqps://guest:guest@{LOOPBACK}:{rabbitmq.port}/",
    }

    to_encrypted, to_plain = await asyncio.gather(
        *(asyncio.to_thread(call, "check", **settings) for settings in (in_plain_text, without_tls))
    )

    assert (to_encrypted.returncode, to_plain.returncode) == (UNAVAILABLE, UNAVAILABLE)
    _, database, broker = to_encrypted.stdout.splitlines()
    assert "no encryption" in database
    assert "begins with amqps://" in broker
    _, database, broker = to_plain.stdout.splitlines()
    assert "rejected SSL" in database
    assert "does not speak TLS on this port" in broker


def test_authorities_that_cannot_be_read_are_named_with_78_and_only_where_tls_is_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no certificate\n")

    for path, problem in (
        (tmp_path / "none.pem", "cannot read"),
        (tmp_path / "notes.txt", "holds no certificate"),
    ):
        for tls in ({"POSTGRES_SSL": "true"}, {"RABBITMQ_URL": "amqps://h/"}):
            with pytest.raises(BadSettings, match=problem) as refusal:
                load_settings({"SSL_CERT_FILE": str(path), **tls})
            assert refusal.value.problems[0].startswith("SSL_CERT_FILE: ")
        load_settings({"SSL_CERT_FILE": str(path)})

    done = call("run", SSL_CERT_FILE=str(tmp_path / "none.pem"), POSTGRES_SSL="true")
    assert (done.returncode, "SSL_CERT_FILE" in done.stderr) == (CONFIG, True)
