"""What the service manager is told: ready at once, how it is, and a ping as long as everything moves."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from retry_scheduler import supervision
from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.supervision import (
    STANDS_AFTER_S,
    STEP_AT_LEAST_EVERY_S,
    Progress,
    ServiceManager,
    Supervisor,
)
from tests.factories import make_request
from tests.servers import Database
from tests.service_manager import FakeManager
from tests.service_process import PROJECT, START_TAKES, MakeService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, Upstream
from tests.virtual_time import pass_time, run_in_virtual_time
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# A manager kills a service that is silent for so long. The service's own unit says 30 s.
WATCHDOG_S = 3.0
PINGS_PER_S = 1

HEALS_WITHIN = timedelta(seconds=20)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeManager]:
    with FakeManager(tmp_path / "notify", watchdog_s=WATCHDOG_S) as fake:
        yield fake


async def test_it_is_ready_before_its_servers_are_and_says_what_it_waits_for(
    make_service: MakeService, manager: FakeManager, postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ
) -> None:
    service = make_service(**manager.environment)
    postgres.stop()
    rabbitmq.stop()

    service.start()
    await eventually(lambda: manager.status == "waiting for PostgreSQL and RabbitMQ", within=START_TAKES)
    assert manager.told[0] == "READY=1"
    assert service.ready().status == 503
    await eventually(lambda: manager.pings >= 2)

    postgres.start()
    await eventually(lambda: manager.status == "waiting for RabbitMQ", within=HEALS_WITHIN)
    rabbitmq.start()
    await eventually(lambda: manager.status == "healthy", within=HEALS_WITHIN)

    # A process that stands still sends nothing, and goes on when it can.
    service.freeze()
    manager.count_anew()
    await eventually(lambda: manager.longest_silence_s > WATCHDOG_S)
    service.thaw()
    manager.count_anew()
    await eventually(lambda: manager.pings >= 3)

    service.terminate()
    assert await service.wait_until_ended() == 0
    await eventually(lambda: manager.told[-2:] == ["STOPPING=1", "STATUS=stopping"])
    assert manager.told.count("READY=1") == manager.told.count("STOPPING=1") == 1


async def test_an_outage_of_both_servers_with_work_in_hand_does_not_look_like_standing_still(
    make_service: MakeService,
    manager: FakeManager,
    postgres: PrivatePostgres,
    rabbitmq: PrivateRabbitMQ,
    upstream: Upstream,
    table: Table,
) -> None:
    upstream.declare("orders")
    service = make_service(**manager.environment)
    service.start()
    await service.wait_until_ready()
    upstream.ask(*(make_request(retry_after_ms=1000) for _ in range(5)))
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 5)

    # Silent servers are worse than dead ones: every call lasts until its deadline.
    postgres.freeze()
    upstream.ask(make_request())
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0)  # in hand, for a table that does not answer
    rabbitmq.freeze()
    manager.count_anew()
    outage = timedelta(seconds=STANDS_AFTER_S + 2 * STEP_AT_LEAST_EVERY_S)
    await eventually(lambda: manager.pings >= outage.total_seconds() * PINGS_PER_S, within=2 * outage)
    await eventually(lambda: manager.status == "waiting for PostgreSQL and RabbitMQ", within=outage)
    assert manager.longest_silence_s < WATCHDOG_S

    postgres.thaw()
    rabbitmq.thaw()
    await eventually(lambda: manager.status == "healthy", within=HEALS_WITHIN)
    await upstream.filled("orders", 6, within=HEALS_WITHIN)
    await eventually(table.settled)
    assert "A loop stands still" not in service.log_text()


@pytest.mark.parametrize("stuck", ["intake", "claim", "beat", "event loop"])
async def test_a_loop_that_waits_for_what_never_comes_silences_the_watchdog(
    stuck: str,
    manager: FakeManager,
    database: Database,
    broker_url: str,
    upstream: Upstream,
    tmp_path: Path,
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    log = tmp_path / "log"
    http_port, metrics_port = free_ports(2)
    environment = {
        "PATH": os.environ["PATH"],
        "HTTP_HOST": LOOPBACK,
        "HTTP_PORT": str(http_port),
        "METRICS_PORT": str(metrics_port),
        "RABBITMQ_URL": broker_url,
        "POSTGRES_HOST": database.host,
        "POSTGRES_PORT": str(database.port),
        "POSTGRES_DB": database.name,
        "POSTGRES_USER": database.user,
        "POSTGRES_PASSWORD": database.password,
        **manager.environment,
    }

    with started([sys.executable, "-m", "tests.standing_service", stuck], environment, log):
        if stuck != "beat":  # without a beat it never gets as far as that
            await eventually(lambda: manager.status == "healthy", within=START_TAKES)
            manager.count_anew()
            await eventually(lambda: manager.pings >= 5, within=HEALS_WITHIN)
        upstream.ask(make_request(max_retries=0))
        await eventually(lambda: manager.told, within=START_TAKES)
        manager.count_anew()
        await eventually(lambda: manager.silence_s > WATCHDOG_S, within=HEALS_WITHIN)

    assert "STOPPING=1" not in manager.told
    complaints = [json.loads(line) for line in log.read_text().splitlines() if "A loop stands still" in line]
    assert [event["loops"] for event in complaints] == ([] if stuck == "event loop" else [[stuck]])


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """Run a program until the block is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=output)
        try:
            yield
        finally:
            process.kill()
            process.wait(timeout=10)


class Scene:
    """A supervisor in virtual time, beside two loops that step once a second until they are told not to."""

    def __init__(self, manager: ServiceManager) -> None:
        self.progress = Progress()
        self.moving = {"intake", "claim"}
        self.stop = asyncio.Event()
        self._supervisor = Supervisor(manager, self.progress, lambda: "healthy")

    async def __aenter__(self) -> "Scene":
        self._tasks = [
            asyncio.create_task(self._supervisor.run(self.stop)),
            *(asyncio.create_task(self._step(loop)) for loop in sorted(self.moving)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop.set()
        await asyncio.gather(*self._tasks)

    async def _step(self, loop: str) -> None:
        while loop in self.moving and not self.stop.is_set():
            self.progress.moved(loop)
            await pass_time(1)


class Notes(ServiceManager):
    """A manager that notes the virtual time of each ping."""

    def __init__(self, *, watchdog_s: float | None) -> None:
        super().__init__(watchdog_s=watchdog_s)
        self.pings_s: list[float] = []
        self.told: list[str] = []

    def tell(self, *assignments: str) -> None:
        if assignments == ("WATCHDOG=1",):
            self.pings_s.append(asyncio.get_running_loop().time())
        else:
            self.told += assignments


def test_one_loop_that_has_ended_silences_the_watchdog_though_the_others_move() -> None:
    notes = Notes(watchdog_s=30)

    async def scenario() -> float:
        async with Scene(notes) as scene:
            await pass_time(100)
            ended_s = asyncio.get_running_loop().time()
            scene.moving.discard("intake")
            await pass_time(200)
            assert scene.progress.standing() == ["intake"]
        return ended_s

    ended_s = run_in_virtual_time(scenario(), supervision)

    assert max(after - before for before, after in pairwise(notes.pings_s)) <= 15  # systemd asks for half
    assert ended_s + STANDS_AFTER_S - 15 <= notes.pings_s[-1] <= ended_s + STANDS_AFTER_S + 1
    assert notes.told == ["READY=1", "STATUS=healthy", "STOPPING=1", "STATUS=stopping"]


def test_a_loop_whose_next_step_moves_many_bytes_has_that_much_more_time() -> None:
    notes = Notes(watchdog_s=30)

    async def scenario() -> tuple[list[str], list[str]]:
        async with Scene(notes) as scene:
            await pass_time(10)
            scene.moving.discard("intake")
            await pass_time(2)
            scene.progress.moved("intake", next_takes_s=60)
            await pass_time(60 + STANDS_AFTER_S - 2)
            meanwhile = scene.progress.standing()
            await pass_time(4)
            return meanwhile, scene.progress.standing()

    assert run_in_virtual_time(scenario(), supervision) == ([], ["intake"])


def test_a_loop_that_moves_again_brings_the_pings_back() -> None:
    notes = Notes(watchdog_s=30)

    async def scenario() -> float:
        async with Scene(notes) as scene:
            scene.moving.discard("claim")
            await pass_time(100)
            before = len(notes.pings_s)
            scene.progress.moved("claim")
            await pass_time(5)
            return len(notes.pings_s) - before

    assert run_in_virtual_time(scenario(), supervision) == 1


def test_nobody_is_pinged_who_does_not_watch() -> None:
    notes = Notes(watchdog_s=None)

    async def scenario() -> None:
        async with Scene(notes):
            await pass_time(100)

    run_in_virtual_time(scenario(), supervision)

    assert notes.pings_s == []
    assert notes.told[:2] == ["READY=1", "STATUS=healthy"]


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),  # meant for another process
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_what_the_environment_says(
    environment: dict[str, str], watchdog_s: float | None
) -> None:
    assert ServiceManager.named_by(environment).watchdog_s == watchdog_s


def test_a_socket_without_a_file_is_reached() -> None:
    name = f"retry-scheduler-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(5)

        ServiceManager.named_by({"NOTIFY_SOCKET": f"@{name}"}).tell("READY=1", "STATUS=healthy")

        assert listening.recv(100) == b"READY=1\nSTATUS=healthy"


def test_a_manager_that_is_gone_or_was_never_there_troubles_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ServiceManager(str(tmp_path / "gone")).tell("WATCHDOG=1")
    assert "Cannot tell the service manager" in capsys.readouterr().out

    monkeypatch.delattr(socket, "socket")
    ServiceManager.named_by({}).tell("READY=1")
