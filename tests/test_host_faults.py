"""The machine around the service: file descriptors that run out, names that lead nowhere, clocks that lie."""

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from time import monotonic, time
from typing import Any

from prometheus_client import CollectorRegistry

from chaos.proxy import proxies
from retry_scheduler.demo.ports import LOOPBACK
from retry_scheduler.observability.metrics_server import serve_metrics
from tests.contract import ANSWERS_WITHIN_S, HEALED_WITHIN_S
from tests.factories import make_request
from tests.service_process import MakeService, ServiceProcess, StartService
from tests.table import Table
from tests.under_load import Report, Watch, accounts, first_retry_s, flowing, requests
from tests.upstream import RETRY_QUEUE, Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

HEALED_WITHIN = timedelta(seconds=HEALED_WITHIN_S)


async def crowd(service: ServiceProcess, ports: tuple[int, ...], seconds: float) -> None:
    """Connect to these ports again and again, and ask nothing: each one costs a file descriptor."""
    callers: list[socket.socket] = []
    until = monotonic() + seconds
    while monotonic() < until:
        for port in ports * 4:
            caller = socket.socket()
            caller.setblocking(False)
            caller.connect_ex((LOOPBACK, port))
            callers.append(caller)
        await asyncio.sleep(0.3)  # noqa: TID251  how often the crowd comes
    for caller in callers:
        caller.close()


async def test_without_file_descriptors_the_service_waits_and_goes_on_when_there_are_some(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    """All are taken by a crowd at the pages, and the connections to PostgreSQL have to be opened anew."""
    upstream.declare("orders", RETRY_QUEUE)
    with proxies(table.database.port) as (to_postgres,):
        service = await start_service(POSTGRES_PORT=str(to_postgres.port), RABBITMQ_PREFETCH="100")
        ports = (service.http_port, service.metrics_port)
        with Load(upstream, requests(), per_second=100) as load:
            await flowing(service)
            _, hard = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (highest_file(service) + 1, hard))
            watch = Watch(service)
            to_postgres.refuse()
            await crowd(service, ports, seconds=1)
            to_postgres.heal()
            await crowd(service, ports, seconds=7)
            share = watch.cpu_share
            watch.assert_calm()
            resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (1024, hard))
            freed_at = time()
            recovered_s = await first_retry_s(table, freed_at)
            await eventually(lambda: service.health().status == 200, within=HEALED_WITHIN)
            await flowing(service)
            await accounts(load, upstream, table, [service], exactly_once=True)
            said = watch.said()

    record_property("cpu_share_meanwhile", round(share, 2))
    record_property("first_retry_after_s", recovered_s)
    assert "Too many open files" in said
    assert recovered_s <= HEALED_WITHIN_S
    assert service.is_running


def highest_file(service: ServiceProcess) -> int:
    return max(int(file.name) for file in Path(f"/proc/{service.pid}/fd").iterdir())


class Starved:
    """A listening socket that cannot accept, as when no file descriptor is left."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.tries_at_s: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)

    def accept(self) -> None:
        self.tries_at_s.append(monotonic())
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def test_a_caller_of_the_metrics_for_whom_there_is_no_file_descriptor_makes_no_hot_loop() -> None:
    server = serve_metrics(CollectorRegistry(), host=LOOPBACK, port=0, on_death=lambda _: None)
    starved = Starved(server.socket)
    server.socket = starved  # type: ignore[assignment]
    with socket.create_connection((LOOPBACK, server.server_address[1])):
        await eventually(lambda: len(starved.tries_at_s) >= 4)
    await asyncio.to_thread(server.shutdown)
    server.server_close()

    first, *_, fourth = starved.tries_at_s[:4]
    assert fourth - first > 0.3


@contextmanager
def reader_asleep(pipe: Path) -> Iterator[None]:
    """Whoever writes to `pipe` finds a reader who never reads; afterwards there is an empty file."""
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield
    finally:
        pipe.unlink()
        pipe.touch()
        os.close(reader)


async def test_a_log_that_nobody_reads_blocks_neither_retries_nor_the_end(
    make_service: MakeService, upstream: Upstream, table: Table, tmp_path: Path
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    service = make_service(RABBITMQ_PREFETCH="100")
    with reader_asleep(tmp_path / f"service-{service.http_port}.log"):
        service.start()
        await service.wait_until_ready()
        # Two lines of a quarter of a KiB each for every one: many times what a pipe holds.
        upstream.ask_for_many([make_request() for _ in range(3000)])
        await upstream.filled("orders", 3000, within=timedelta(seconds=20))
        await eventually(table.settled)
        health = service.health()
        code = await service.stop()

    assert health.status == 200
    assert code == 0


async def test_servers_whose_names_lead_nowhere_are_waited_for_and_the_pages_answer(
    make_service: MakeService,
) -> None:
    service = make_service(
        RABBITMQ_URL="amqp://guest:guest@no-such-host.invalid/", POSTGRES_HOST="no-such-host.invalid"
    )
    service.start()
    await eventually(lambda: service.health().status == 503)
    watch = Watch(service)
    await eventually(lambda: watch.complaints().total() >= 4, within=timedelta(seconds=20))
    health = service.health()
    watch.assert_calm()

    assert health.took_s < ANSWERS_WITHIN_S
    assert service.is_running
    assert await service.stop() == 0


SHIFTED_CLOCK = """
import datetime, time
real_time, Real = time.time, datetime.datetime
time.time = lambda: real_time() + {shift_s}
class Shifted(Real):
    @classmethod
    def now(cls, tz=None):
        return Real.now(tz) + datetime.timedelta(seconds={shift_s})
datetime.datetime = Shifted
"""


def hours_off(service: ServiceProcess) -> int:
    told = datetime.fromisoformat(service.log_events()[-1]["timestamp"])
    return round((told.timestamp() - time()) / 3600)


async def test_an_instance_whose_clock_is_an_hour_off_retries_on_time_beside_one_whose_clock_is_right(
    start_service: StartService, upstream: Upstream, table: Table, tmp_path: Path
) -> None:
    """Only the database's clock decides what is due and whose lease holds."""
    upstream.declare("orders", RETRY_QUEUE)
    services = []
    for name, shift_s in (("fast", 3600), ("slow", -3600), ("right", 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SHIFTED_CLOCK.format(shift_s=shift_s))
        services.append(await start_service(PYTHONPATH=str(folder), PYTHONWARNINGS="ignore"))

    with Load(upstream, requests(), per_second=150) as load:
        for service in services:
            await flowing(service, count=100)
        await accounts(load, upstream, table, services, exactly_once=True)
    late = await table.row(
        "SELECT min(finished_at - next_retry_at), max(finished_at - next_retry_at) FROM retry_queue"
    )

    assert timedelta(0) <= late[0] and late[1] < HEALED_WITHIN
    assert [hours_off(service) for service in services] == [1, -1, 0], "the clocks were not off"
