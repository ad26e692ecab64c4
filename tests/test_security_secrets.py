"""No password shows anywhere: in what a command prints, in the log at any level, on a page, in /proc."""

import asyncio
import base64
import json
import urllib.request
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest

from retry_scheduler.assembly import database_address
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.database import Database
from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.errors import BadSettings
from retry_scheduler.service import Service
from retry_scheduler.settings import load_settings
from tests.command import CONFIG, OK, UNAVAILABLE, USAGE, call
from tests.factories import make_request
from tests.service_process import MakeService, ServiceProcess, StartService
from tests.tls_servers import CANARY, PASSWORD, Tenant
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures", "tests.tls_fixtures")

WRONG = f"{CANARY} wrong/@%"

# However a password is written, it holds one of these: as it is or percent-encoded, or in base64.
TRACES = [CANARY, *(base64.b64encode(b" " * skip + CANARY.encode())[4:-4].decode() for skip in range(3))]


def assert_nothing_shows(*texts: str) -> None:
    for text in texts:
        for trace in TRACES:
            at = text.find(trace)
            assert at < 0, f"a secret shows: {text[max(at - 200, 0) : at + 100]}"


def everything_to_be_seen(service: ServiceProcess) -> list[str]:
    """Return what an operator, a neighbour on the machine or a stranger can see of a running service."""
    with urllib.request.urlopen(f"http://{LOOPBACK}:{service.metrics_port}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    return [
        metrics,
        json.dumps(service.health().body),
        json.dumps(service.ready().body),
        process_file(service, "cmdline"),
        service.log_text(),
        service.error_output(),
    ]


def process_file(service: ServiceProcess, name: str) -> str:
    return Path(f"/proc/{service.pid}/{name}").read_text()


async def test_no_command_shows_a_secret_whatever_is_wrong(tenant: Tenant) -> None:
    good = tenant.settings
    (nobody,) = free_ports(1)
    encoded = quote(PASSWORD, safe="")
    wrong = good | {"POSTGRES_PASSWORD": WRONG, "RABBITMQ_URL": tenant.broker_url_with(WRONG)}
    calls = [
        ("check", good),
        ("check", wrong),
        ("check", good | {"SSL_CERT_FILE": ""}),
        ("check", good | {"POSTGRES_PORT": str(nobody), "RABBITMQ_URL": f"amqp://u:{encoded}@h.invalid/"}),
        ("run", good | {"RABBITMQ_URL": f"http://u:{encoded}@h/"}),
        ("run", good | {"RABBITMQ_URL": f"amqp://u:{PASSWORD}@h/"}),  # nobody has encoded it
        ("run", good | {"RABBITMQ_URL": f"amqp://:{encoded}@h:x/", "POSTGRES_PASSWORD_FILE": "/nowhere"}),
        ("run", good | {"HTTP_HOST": "no address"}),
        ("migrate", wrong),
        ("--help", wrong),
        ("fly", wrong),
    ]

    done = await asyncio.gather(
        *(asyncio.to_thread(call, command, **environment) for command, environment in calls)
    )

    for (command, _), result in zip(calls, done, strict=True):
        assert_nothing_shows(result.stdout, result.stderr)
        assert "Traceback" not in result.stdout + result.stderr, command
    codes = [result.returncode for result in done]
    assert codes == [OK, *[UNAVAILABLE] * 3, *[CONFIG] * 4, UNAVAILABLE, OK, USAGE]


async def test_no_secret_shows_at_the_debug_level_while_all_goes_well_and_while_connections_break(
    tenant: Tenant, start_service: StartService
) -> None:
    service = await start_service(**tenant.settings, LOG_LEVEL="DEBUG")
    upstream = tenant.upstream
    upstream.declare("orders")
    upstream.ask(make_request(), b"no JSON")
    await upstream.receive("orders", 1)

    tenant.servers.rabbitmq.eval('rabbit_networking:close_all_connections(<<"tests">>).')
    tenant.servers.postgres.sql(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{tenant.name}'"
    )
    await eventually(lambda: service.log_events("Failed to connect to RabbitMQ"))
    await service.wait_until_ready()

    assert "pika" in service.log_text()  # it is the debug level
    assert_nothing_shows(*everything_to_be_seen(service))


async def test_no_secret_shows_while_the_passwords_are_refused_at_the_debug_level(
    tenant: Tenant, make_service: MakeService
) -> None:
    service = make_service(
        **tenant.settings
        | {"LOG_LEVEL": "DEBUG", "POSTGRES_PASSWORD": WRONG, "RABBITMQ_URL": tenant.broker_url_with(WRONG)}
    )
    service.start()
    await eventually(
        lambda: (
            len(service.log_events("Failed to connect to RabbitMQ")) >= 2
            and len(service.log_events("PostgreSQL health check failed")) >= 2
        ),
        within=timedelta(seconds=20),
    )

    seen = everything_to_be_seen(service)
    assert "password authentication failed" in service.log_text()
    assert "ACCESS_REFUSED" in service.log_text()
    assert_nothing_shows(*seen)
    assert await service.stop() == 0
    assert_nothing_shows(service.log_text(), service.error_output())


async def test_secrets_from_files_are_not_in_the_environment_of_the_process(
    tenant: Tenant, start_service: StartService, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    (tmp_path / "url").write_text(tenant.broker_url + "\n")
    files = {
        "POSTGRES_PASSWORD": "",
        "POSTGRES_PASSWORD_FILE": str(tmp_path / "password"),
        "RABBITMQ_URL": "",
        "RABBITMQ_URL_FILE": str(tmp_path / "url"),
    }

    service = await start_service(**tenant.settings | files)

    assert_nothing_shows(process_file(service, "environ"))


def test_nothing_that_holds_a_secret_shows_it_when_it_is_printed() -> None:
    settings = load_settings(
        {"POSTGRES_PASSWORD": PASSWORD, "RABBITMQ_URL": f"amqp://u:{quote(PASSWORD, safe='')}@h/"}
    )
    address = database_address(settings)
    link = PublishLink(
        settings.rabbitmq_url.get_secret_value(), queues=(), name="x", on_problem=lambda problem: None
    )

    for thing in (
        settings,
        settings.rabbitmq_url,
        settings.model_dump(),
        settings.model_dump_json(),
        address,
        Database(address, pool_min=0, pool_max=1),
        link,
        Service(settings),
    ):
        assert_nothing_shows(str(thing), repr(thing), f"{thing}")


@pytest.mark.parametrize("name", ["POSTGRES_PASSWORD", "RABBITMQ_URL"])
def test_a_secret_that_is_not_text_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadSettings) as refusal:
        load_settings({name: f"amqp://u:{CANARY}\udcff@h/"})  # a byte that is not UTF-8, as Python gives it

    assert refusal.value.problems == (f"{name}: is not UTF-8",)


@pytest.mark.parametrize(
    "password", ["p@ss", "1/pass", "1?pass", "1#pass", "p ass", "päss", "p[ss", "pa\tss"]
)
def test_a_password_that_nobody_has_encoded_is_refused_before_a_piece_of_it_is_taken_for_the_host(
    password: str,
) -> None:
    with pytest.raises(BadSettings) as refusal:
        load_settings({"RABBITMQ_URL": f"amqp://u:{password}@h/"})

    assert refusal.value.problems[0].startswith("RABBITMQ_URL: ")
    assert password not in refusal.value.problems[0]
