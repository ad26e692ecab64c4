"""Strangers who connect to the pages and say nothing: they keep nobody out, and do not stay."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from time import monotonic

import pytest

from retry_scheduler.demo.ports import LOOPBACK
from tests.service_process import ServiceProcess, StartService
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

STRANGERS = 150
MOST_OPEN = 100
MOST_THREADS = 40
SILENT_AT_MOST_S = 5.0


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what the test has opened."""
    with ExitStack() as stack:
        yield stack


def connect(opened: ExitStack, port: int, words: bytes) -> socket.socket:
    connection = opened.enter_context(socket.create_connection((LOOPBACK, port), timeout=10))
    connection.sendall(words)
    return connection


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def count(service: ServiceProcess, what: str) -> int:
    return len(list(Path(f"/proc/{service.pid}/{what}").iterdir()))


async def test_half_requests_keep_nobody_from_health_and_their_number_is_bounded(
    start_service: StartService, opened: ExitStack
) -> None:
    service = await start_service()
    files = count(service, "fd")

    for _ in range(STRANGERS):
        connect(opened, service.http_port, b"GET /hea")
    pages = [service.health(), service.ready()]

    assert [page.status for page in pages] == [200, 200]
    assert count(service, "fd") <= files + MOST_OPEN + 5


async def test_silent_readers_of_metrics_keep_nobody_out_and_their_threads_are_bounded(
    start_service: StartService, opened: ExitStack
) -> None:
    service = await start_service()

    strangers = [connect(opened, service.metrics_port, b"GET /met") for _ in range(STRANGERS)]
    metrics = service.metrics()

    assert metrics.value("service_up") == 1
    assert count(service, "task") < MOST_THREADS
    assert sum(map(is_closed, strangers)) >= STRANGERS - MOST_THREADS


async def test_whoever_does_not_ask_in_time_is_cut_also_if_a_byte_comes_now_and_then(
    start_service: StartService, opened: ExitStack
) -> None:
    service = await start_service()
    began = monotonic()
    waiting = [
        connect(opened, port, words)
        for port in (service.http_port, service.metrics_port)
        for words in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"G")
    ]
    dripping = [waiting[2], waiting[5]]

    def all_closed() -> bool:
        for connection in dripping:
            if not is_closed(connection):
                connection.send(b"E")
        return all(map(is_closed, waiting))

    await eventually(all_closed, within=timedelta(seconds=10), every=timedelta(milliseconds=200))

    assert SILENT_AT_MOST_S - 1 < monotonic() - began < SILENT_AT_MOST_S + 2
    assert service.health().status == 200
    assert service.metrics().value("service_up") == 1


async def test_one_connection_may_ask_again_and_again(start_service: StartService, opened: ExitStack) -> None:
    service = await start_service()
    reader, writer = await asyncio.open_connection(LOOPBACK, service.http_port)

    for _ in range(5):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = [line.split(b":")[1] for line in head.splitlines() if line.startswith(b"content-length:")]
        body = json.loads(await reader.readexactly(int(length)))

        assert head.startswith(b"HTTP/1.1 200 ")
        assert body["status"] == "healthy"
    writer.close()
    await writer.wait_closed()
