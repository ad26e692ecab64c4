"""The private servers keep their data over crashes, keep to themselves, and leave nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import asyncpg
import pika
import pytest

from retry_scheduler.demo import postgres_programs, private_rabbitmq, rabbitmq_home
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.demo.processes import PrivateServerError, ServerMissing, descendants, wait_until
from tests.servers import Database, skip_or_fail

STARTS_SERVERS = """
import sys, time
from pathlib import Path
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ

folder = Path(sys.argv[1])
PrivatePostgres(folder / "postgres").start()
PrivateRabbitMQ(folder / "rabbitmq").start()
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def second_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="retry-scheduler-tests-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def second_rabbitmq(second_folder: Path) -> Iterator[PrivateRabbitMQ]:
    node = PrivateRabbitMQ(second_folder / "rabbitmq")
    try:
        node.start()
    except ServerMissing as missing:
        skip_or_fail(missing)
    yield node
    node.stop()


@pytest.fixture
def second_postgres(second_folder: Path) -> Iterator[PrivatePostgres]:
    with PrivatePostgres(second_folder / "postgres") as server:
        yield server


def test_two_nodes_run_side_by_side_and_know_nothing_of_each_other(
    rabbitmq: PrivateRabbitMQ, second_rabbitmq: PrivateRabbitMQ
) -> None:
    second_rabbitmq.add_vhost("only-here")

    assert "only-here" in second_rabbitmq.ctl("list_vhosts")
    assert "only-here" not in rabbitmq.ctl("list_vhosts")
    assert second_rabbitmq.eval("nodes().") == "[]"


def test_messages_survive_a_shutdown_and_a_crash_of_the_node(second_rabbitmq: PrivateRabbitMQ) -> None:
    second_rabbitmq.add_vhost("kept / ü")
    url = second_rabbitmq.url("kept / ü")
    publish(url, queue="orders", bodies=[b"before"])

    second_rabbitmq.stop()
    second_rabbitmq.start()
    publish(url, queue="orders", bodies=[b"between"])
    second_rabbitmq.kill()
    second_rabbitmq.start()

    assert second_rabbitmq.url("kept / ü") == url
    assert second_rabbitmq.queue_depth("kept / ü", "orders") == 2


def test_a_queue_depth_counts_unacknowledged_messages_too(
    rabbitmq: PrivateRabbitMQ, vhost: str, broker_url: str
) -> None:
    publish(broker_url, queue="orders", bodies=[b"1", b"2", b"3"])

    with closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection:
        connection.channel().basic_get("orders")

        assert rabbitmq.queue_depth(vhost, "orders") == 3

    with pytest.raises(PrivateServerError, match="no queue 'nowhere'"):
        rabbitmq.queue_depth(vhost, "nowhere")


def test_a_frozen_node_keeps_its_connections_and_says_nothing(rabbitmq: PrivateRabbitMQ) -> None:
    rabbitmq.freeze()
    with socket.create_connection((rabbitmq.host, rabbitmq.port), timeout=0.2) as connection:
        connection.sendall(private_rabbitmq.PROTOCOL_HEADER)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        rabbitmq.thaw()

        assert connection.recv(1) != b""


async def test_rows_survive_a_shutdown_and_a_crash_of_postgresql(second_postgres: PrivatePostgres) -> None:
    second_postgres.create_role("clerk", "o'clock")
    second_postgres.create_database("ledger", owner="clerk")
    await add_line(second_postgres, "before")

    second_postgres.stop()
    second_postgres.start()
    await add_line(second_postgres, "between")
    second_postgres.kill()
    second_postgres.start()

    assert second_postgres.sql("SELECT line FROM lines", database="ledger").split() == ["before", "between"]
    assert second_postgres.sql("SHOW fsync") == "on"
    assert second_postgres.sql("SHOW synchronous_commit") == "on"


async def test_a_frozen_postgresql_answers_after_it_is_thawed(
    postgres: PrivatePostgres, database: Database
) -> None:
    connection = await asyncpg.connect(database.dsn)
    try:
        postgres.freeze()
        with pytest.raises(TimeoutError):
            await asyncpg.connect(database.dsn, timeout=0.2)
        postgres.thaw()

        assert await connection.fetchval("SELECT 42") == 42
    finally:
        postgres.thaw()
        await connection.close()


async def test_each_test_has_a_database_of_its_own(database: Database) -> None:
    connection = await asyncpg.connect(database.dsn)
    try:
        await connection.execute("CREATE TABLE mine (id int)")

        assert await connection.fetchval("SELECT current_user") == database.user
        assert await connection.fetchval("SELECT current_database()") == database.name
    finally:
        await connection.close()


def test_a_server_that_runs_is_not_started_twice(
    postgres: PrivatePostgres, second_rabbitmq: PrivateRabbitMQ
) -> None:
    for server in (postgres, second_rabbitmq):
        with pytest.raises(PrivateServerError, match="running already"):
            server.start()

        assert server.is_running


def test_a_server_that_cannot_start_says_why(second_folder: Path) -> None:
    server = PrivatePostgres(second_folder / "wrong", settings={"shared_buffers": "nonsense"})

    with pytest.raises(PrivateServerError, match='invalid value for parameter "shared_buffers"'):
        server.start()

    assert not server.is_running


def test_stop_leaves_no_process_behind_and_stopping_again_is_harmless(
    second_folder: Path, second_rabbitmq: PrivateRabbitMQ, second_postgres: PrivatePostgres
) -> None:
    ours = {*descendants(second_rabbitmq.pid), *descendants(second_postgres.pid)}

    for server in (second_rabbitmq, second_postgres):
        server.stop()
        server.stop()

    assert ours
    assert ours.isdisjoint(descendants(1))
    assert processes_of(second_folder) == []


def test_not_even_a_killed_owner_leaves_servers_behind(second_folder: Path) -> None:
    folder = second_folder / "orphans"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_SERVERS, str(folder)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        if owner.stdout.readline() != "started\n":
            pytest.skip("the servers are not installed")
        names = processes_of(folder)
        owner.send_signal(signal.SIGKILL)

    assert {"beam.smp", "epmd", "postgres"} <= set(names)
    wait_until(lambda: processes_of(folder) == [], within=timedelta(seconds=10), what="the orphans to end")


def test_a_missing_package_is_reported_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_home, "SCRIPTS", tmp_path / "nowhere")
    monkeypatch.setattr(postgres_programs, "PACKAGE", "package_that_nobody_has")

    with pytest.raises(ServerMissing, match="apt-get install --no-install-recommends rabbitmq-server"):
        PrivateRabbitMQ(tmp_path / "rabbitmq").start()
    with pytest.raises(ServerMissing, match=r"pip install 'retry-scheduler\[demo\]'"):
        PrivatePostgres(tmp_path / "postgres").start()


def publish(url: str, *, queue: str, bodies: list[bytes]) -> None:
    """Publish persistent messages to a durable queue, each confirmed: what a crash must not take."""
    with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        channel.queue_declare(queue, durable=True)
        channel.confirm_delivery()
        for body in bodies:
            channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2))


async def add_line(server: PrivatePostgres, line: str) -> None:
    connection = await asyncpg.connect(host=server.host, port=server.port, user="clerk", database="ledger")
    try:
        await connection.execute("CREATE TABLE IF NOT EXISTS lines (line text)")
        await connection.execute("INSERT INTO lines VALUES ($1)", line)
    finally:
        await connection.close()


def processes_of(folder: Path) -> list[str]:
    """Return the names of all running processes that have the folder in their command or environment."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            said = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if os.fsencode(folder) in said and state not in "ZX" and int(process.name) != os.getpid():
                found.append((process / "comm").read_text().strip())
        except (OSError, ValueError):
            continue  # not a process, or gone, or somebody else's
    return sorted(found)
